// The strength curve under the text of the node DiffScalerScheduleTask. The text stays the only
// thing that is saved and run: the curve is drawn from it, and an edit of the curve writes it.

import { app } from "../../scripts/app.js";
import { asPoints, polyline, windowCurve } from "./curve_maths.js";
import { SchedulePlot } from "./schedule_plot.js";
import {
  PARTS, entriesOf, limits, parse, strip, withAdded, withMoved, withRemoved, write,
} from "./schedule_text.js";
import { addStyles } from "./styles.js";
import { say } from "./texts.js";

/** @typedef {import("./curve_maths.js").Point} Point */
/** @typedef {import("./curve_maths.js").Interpolation} Interpolation */
/** @typedef {import("./schedule_text.js").Part} Part */

const NODE = "DiffScalerScheduleTask";
const READ = ["points", "interpolation", "start", "end", "fade"];
const HEIGHT = 160; // pixels, the least
const MARGIN = 10; // pixels that ComfyUI leaves round a widget
const ROOM = 70; // pixels that a new node is higher, for the text
const LEAST = 0.001; // between two points' percents

class ScheduleCurve {
  /** @param {any} node A ComfyUI node of this type. */
  constructor(node) {
    this.node = node;
    /** @type {Part | ""} */
    this.part = "";
    this.plot = new SchedulePlot({
      add: (percent, factor) => this.add(percent, factor),
      move: (index, percent, factor) => this.move(index, percent, factor),
      remove: (index) => this.remove(index),
    });
    this.element = document.createElement("div");
    this.element.className = "diffscaler-schedule";
    this.element.style.minHeight = `${HEIGHT}px`;
    this.buttons = this.#choose();
    const row = document.createElement("div");
    row.className = "diffscaler-parts";
    row.setAttribute("role", "radiogroup");
    row.setAttribute("aria-label", say("part"));
    row.append(...this.buttons, hint());
    this.element.append(row, this.plot.element);
    forwardToCanvas(this.element);
    this.element.addEventListener("pointerenter", () => this.refresh());
    this.seen = "";
  }

  /** @param {string} name */
  widget(name) {
    return this.node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
  }

  get text() {
    return String(this.widget("points")?.value ?? "");
  }

  set text(written) {
    const widget = this.widget("points");
    widget.value = written; // calls its callback, and so refreshes
    this.refresh();
    app.graph?.setDirtyCanvas(true, true);
  }

  /** @returns {Interpolation} */
  get interpolation() {
    return this.widget("interpolation")?.value;
  }

  /** Draws again if anything that counts has changed. */
  refresh() {
    const values = READ.map((name) => this.widget(name)?.value);
    const seen = JSON.stringify([...values, this.part, ...READ.map((n) => this.#isLinked(n)),
      this.#isLinked("keyframes")]);
    if (seen === this.seen) return;
    this.seen = seen;
    this.plot.show(this.#picture());
    const own = this.#written()?.entries ?? [];
    for (const button of this.buttons) {
      const part = /** @type {Part | ""} */ (button.dataset.part ?? "");
      button.setAttribute("aria-checked", String(part === this.part));
      button.classList.toggle("diffscaler-own", part !== "" && entriesOf(own, part).length > 0);
    }
  }

  /** @param {number} percent @param {number} factor */
  add(percent, factor) {
    this.#make();
    const { entries } = parse(this.text, this.interpolation);
    const there = entriesOf(entries, this.part).filter((entry) => entry.percent === percent);
    if (there.length > 1) return -1;
    const { text, start } = withAdded(this.text, entries, this.part, [percent, factor]);
    this.text = text;
    return this.#own().findIndex((entry) => entry.start === start);
  }

  /** @param {number} index @param {number} percent @param {number} factor */
  move(index, percent, factor) {
    const own = this.#own();
    const [low, high] = limits(own, index, LEAST);
    if (low > high) percent = own[index].percent;
    else percent = Math.min(Math.max(percent, low), high);
    this.text = withMoved(this.text, own[index], percent, factor);
  }

  /** @param {number} index */
  remove(index) {
    this.text = withRemoved(this.text, this.#own()[index]);
  }

  /** The points of the chosen part, by percent. */
  #own() {
    return entriesOf(this.#written()?.entries ?? [], this.part);
  }

  #written() {
    try {
      return parse(this.text, this.interpolation);
    } catch {
      return null;
    }
  }

  /** Writes what is drawn, where it has no points of its own yet: an edit begins with that. */
  #make() {
    if (!strip(this.text)) {
      const curve = this.#window();
      const points = asPoints(curve, this.interpolation);
      const lines = (points ?? curve.points).map(([percent, factor]) => write("", percent, factor));
      this.text = [...(points ? [] : [curve.interpolation]), ...lines].join("\n");
    }
    const { entries, parts } = parse(this.text, this.interpolation);
    if (!this.part || entriesOf(entries, this.part).length) return;
    for (const point of parts[this.part]) {
      const now = parse(this.text, this.interpolation);
      this.text = withAdded(this.text, now.entries, this.part, point).text;
    }
  }

  #window() {
    const [start, end, fade] = ["start", "end", "fade"].map((name) => this.widget(name)?.value);
    return windowCurve(start, end, fade);
  }

  /** @param {string} name */
  #isLinked(name) {
    const slot = this.node.inputs?.find((/** @type {any} */ input) => input.name === name);
    return slot?.link != null;
  }

  /** @returns {import("./schedule_plot.js").Picture} */
  #picture() {
    /** @type {import("./schedule_plot.js").Picture} */
    const empty = { curves: [], points: [], inherited: false, note: "", isError: false,
      locked: true };
    if (this.#isLinked("keyframes")) return { ...empty, note: say("keyframesCount") };
    const linked = READ.filter((name) => this.#isLinked(name));
    if (linked.includes("points") || linked.includes("interpolation")) {
      return { ...empty, note: say("fromAnotherNode", linked[0]) };
    }
    try {
      return { ...empty, locked: false, ...(strip(this.text) ? this.#textCurves()
        : this.#windowCurves(linked)) };
    } catch (error) {
      return { ...empty, note: /** @type {Error} */ (error).message, isError: true };
    }
  }

  /** @param {string[]} linked */
  #windowCurves(linked) {
    if (linked.length) return { note: say("fromAnotherNode", linked[0]), locked: true };
    const { points, interpolation } = this.#window();
    const curves = [{ name: this.part || "all", line: polyline(points, interpolation) }];
    return { curves, inherited: true };
  }

  #textCurves() {
    const { entries, parts, interpolation } = parse(this.text, this.interpolation);
    const own = entriesOf(entries, this.part);
    const shared = /** @type {Point[]} */ (
      entriesOf(entries, "").map(({ percent, factor }) => [percent, factor]));
    /** @type {(name: string, points: Point[]) => {name: string, line: Point[]}} */
    const curve = (name, points) => ({ name, line: polyline(points, interpolation) });
    const withOwn = PARTS.filter((part) => entriesOf(entries, part).length);
    const others = withOwn.filter((part) => part !== this.part).map((p) => curve(p, parts[p]));
    if (this.part && shared.length) others.push(curve("all", shared));
    const edited = this.part ? parts[this.part] : shared.length ? shared : [[0, 1]];
    return {
      curves: [curve(this.part || "all", /** @type {Point[]} */ (edited)), ...others],
      points: own.map(({ percent, factor }) => /** @type {Point} */ ([percent, factor])),
      inherited: !own.length,
    };
  }

  /** Makes the buttons that choose which part is edited. */
  #choose() {
    const parts = /** @type {(Part | "")[]} */ (["", ...PARTS]);
    return parts.map((part) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.part = part;
      button.className = `diffscaler-${part || "all"}`;
      button.textContent = part || say("all");
      button.title = part ? say("editPart", part) : say("editAll");
      button.setAttribute("role", "radio");
      button.addEventListener("click", () => {
        this.part = part;
        this.refresh();
      });
      return button;
    });
  }
}

/** Makes the mark that says how to edit. */
function hint() {
  const mark = document.createElement("span");
  mark.className = "diffscaler-hint";
  mark.textContent = "?";
  mark.title = say("editHint");
  return mark;
}

/** Lets the wheel and the middle button move the canvas, as over any other widget. @param {HTMLElement} element */
function forwardToCanvas(element) {
  const isOverCanvas = () => !(/** @type {any} */ (window).LiteGraph?.vueNodesMode);
  element.addEventListener("wheel", (event) => {
    if (!isOverCanvas()) return;
    event.preventDefault();
    event.stopPropagation();
    app.canvas.processMouseWheel(event);
  }, { passive: false });
  for (const [name, method] of [["pointerdown", "processMouseDown"],
    ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]]) {
    element.addEventListener(name, (/** @type {any} */ event) => {
      const isMiddle = event.button === 1 || (event.buttons & 4) !== 0;
      if (isMiddle && isOverCanvas()) app.canvas[method](event);
    });
  }
}

/** @param {any} object @param {string} name @param {() => void} then */
function after(object, name, then) {
  const before = object[name];
  object[name] = function (/** @type {any[]} */ ...args) {
    const result = before?.apply(this, args);
    then();
    return result;
  };
}

app.registerExtension({
  name: "DiffScaler.ScheduleCurve",
  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    addStyles();
    const curve = new ScheduleCurve(node);
    const widget = node.addDOMWidget("curve", "diffscaler_curve", curve.element, {
      serialize: false, // not an input of the node
      hideOnZoom: false,
      getMinHeight: () => HEIGHT + 2 * MARGIN,
      onDraw: () => curve.refresh(),
    });
    widget.serialize = false; // nor part of a saved workflow
    const refresh = () => curve.refresh();
    for (const name of READ) {
      const read = curve.widget(name);
      if (read) after(read, "callback", refresh);
    }
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0]), height + ROOM]); // a loaded one has its own size
    after(node, "onConfigure", refresh);
    after(node, "onConnectionsChange", refresh);
    refresh();
  },
});
