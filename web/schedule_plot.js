// Draws strength over sampling time and lets points be moved. Knows no ComfyUI and no text.

import { say } from "./texts.js";

/** @typedef {import("./curve_maths.js").Point} Point */

/**
 * @typedef {object} Picture What is drawn.
 * @property {{name: string, line: Point[]}[]} curves The first is the one that is edited.
 * @property {Point[]} points The edited curve's own, by percent.
 * @property {boolean} inherited The curve is shown, but its points are written elsewhere.
 * @property {string} note Said over the curve; "" says nothing.
 * @property {boolean} isError The note is about a mistake.
 * @property {boolean} locked Nothing can be edited.
 */

/**
 * @typedef {object} Edits What a user wants. All percents are in 0..1.
 * @property {(percent: number, factor: number) => number} add Returns the new point's index, or -1.
 * @property {(index: number, percent: number, factor: number) => void} move
 * @property {(index: number) => void} remove
 */

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 26, RIGHT = 10, TOP = 8, BOTTOM = 18; // pixels round the curve
const OFF = 28; // pixels outside the curve's box at which a dragged point lets go
/** What the mouse rounds a percent and a factor to: a pixel is about 0.003 and 0.01. @type {Point} */
const STEP = [0.01, 0.05];
/** The same while Shift is held. @type {Point} */
const FINE = [0.001, 0.01];
const KEY = 0.01, KEY_SHIFT = 0.1; // how far an arrow goes

export class SchedulePlot {
  /** @param {Edits} edits */
  constructor(edits) {
    this.edits = edits;
    this.element = document.createElement("div");
    this.element.className = "diffscaler-plot";
    this.svg = svg("svg", { class: "diffscaler-plot-svg" });
    this.grid = svg("g", { class: "diffscaler-grid" });
    this.others = svg("g", { class: "diffscaler-others" });
    this.path = svg("path", { class: "diffscaler-curve" });
    this.grip = svg("path", { class: "diffscaler-grip" });
    this.dots = svg("g", { class: "diffscaler-dots" });
    this.svg.append(this.grid, this.others, this.path, this.grip, this.dots);
    this.note = document.createElement("div");
    this.note.className = "diffscaler-note";
    this.element.append(this.svg, this.note);
    /** @type {Picture | null} */
    this.picture = null;
    /** @type {{index: number, pointer: number, gone: boolean} | null} */
    this.drag = null;
    this.size = [0, 0];
    this.range = [0, 1.5];
    this.#listen();
    new ResizeObserver(() => this.#resize()).observe(this.svg);
  }

  /** @param {Picture} picture */
  show(picture) {
    this.picture = picture;
    if (!this.drag) this.range = rangeOf(picture);
    this.#draw();
  }

  #resize() {
    // layout pixels: ComfyUI scales what it lays over the canvas by a CSS transform
    const { clientWidth, clientHeight } = this.svg;
    if (!clientWidth || !clientHeight) return;
    this.size = [clientWidth, clientHeight];
    this.svg.setAttribute("viewBox", `0 0 ${clientWidth} ${clientHeight}`);
    this.#draw();
  }

  #draw() {
    if (!this.picture || !this.size[0]) return;
    const { curves, points, inherited, note, isError, locked } = this.picture;
    this.note.textContent = note;
    this.element.classList.toggle("diffscaler-error", isError);
    this.element.classList.toggle("diffscaler-locked", locked);
    this.element.classList.toggle("diffscaler-inherited", inherited);
    this.#drawGrid();
    const [edited, ...others] = curves;
    this.others.replaceChildren(
      ...others.map(({ name, line }) => svg("path", { class: `diffscaler-${name}`, d: this.#d(line) })),
    );
    this.path.setAttribute("d", edited ? this.#d(edited.line) : "");
    this.path.setAttribute("class", `diffscaler-curve diffscaler-${edited?.name ?? "all"}`);
    this.grip.setAttribute("d", locked || !edited ? "" : this.#d(edited.line));
    this.#drawDots(locked || inherited ? [] : points);
  }

  #drawGrid() {
    const [width, height] = this.size;
    const [low, high] = this.range;
    const marks = [];
    for (let factor = low; factor <= high + 1e-9; factor += high - low > 3 ? 1 : 0.5) {
      const y = this.#y(factor);
      const isWhole = Math.abs(factor - Math.round(factor)) < 1e-9;
      marks.push(svg("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y,
        class: isWhole ? "diffscaler-whole" : "" }));
      if (isWhole) marks.push(text(factor.toFixed(0), LEFT - 6, y + 3.5, "end"));
    }
    for (const percent of [0, 0.25, 0.5, 0.75, 1]) {
      const x = this.#x(percent);
      marks.push(svg("line", { x1: x, x2: x, y1: TOP, y2: height - BOTTOM }));
    }
    marks.push(text(`0 ${say("noise")}`, LEFT, height - 5, "start"));
    marks.push(text("0.5", this.#x(0.5), height - 5, "middle"));
    marks.push(text(`${say("picture")} 1`, width - RIGHT, height - 5, "end"));
    this.grid.replaceChildren(...marks);
  }

  /** Keeps the elements of points that stay: the focus and a drag hang on them. @param {Point[]} points */
  #drawDots(points) {
    const { dots } = this;
    while (dots.children.length > points.length) dots.lastElementChild?.remove();
    while (dots.children.length < points.length) dots.append(svg("circle", { r: 5, tabindex: 0 }));
    points.forEach(([percent, factor], i) => {
      const dot = dots.children[i];
      const label = say("point", i + 1, points.length, round(factor), round(percent));
      set(dot, { cx: this.#x(percent), cy: this.#y(factor), role: "slider", "aria-label": label,
        "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": percent, "aria-valuetext": label });
      dot.classList.toggle("diffscaler-gone", Boolean(this.drag?.gone) && this.drag?.index === i);
    });
  }

  #listen() {
    const { svg: root } = this;
    root.addEventListener("pointerdown", (event) => this.#press(event));
    root.addEventListener("mousedown", (event) => event.preventDefault()); // #press sets the focus
    root.addEventListener("pointermove", (event) => this.#pull(event));
    for (const name of ["pointerup", "lostpointercapture", "pointercancel"]) {
      root.addEventListener(name, () => this.#release(name === "pointerup"));
    }
    root.addEventListener("dblclick", (event) => {
      event.stopPropagation();
      if (this.picture?.locked || this.#indexOf(event.target) >= 0) return;
      const at = this.#at(event);
      if (!at.outside) this.edits.add(...snap(at.percent, at.factor, STEP));
    });
    root.addEventListener("contextmenu", (event) => {
      const index = this.#indexOf(event.target);
      if (index < 0) return;
      event.preventDefault();
      event.stopPropagation();
      this.edits.remove(index);
    });
    root.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0 || this.picture?.locked) return;
    let index = this.#indexOf(event.target);
    if (index < 0 && event.target === this.grip) {
      const { percent, factor } = this.#at(event);
      index = this.edits.add(...snap(percent, factor, STEP));
    }
    if (index < 0) return;
    event.stopPropagation();
    /** @type {SVGElement} */ (this.dots.children[index])?.focus({ preventScroll: true });
    this.drag = { index, pointer: event.pointerId, gone: false };
    this.svg.setPointerCapture(event.pointerId);
  }

  /** @param {PointerEvent} event */
  #pull(event) {
    if (this.drag?.pointer !== event.pointerId) return;
    event.stopPropagation();
    const { percent, factor, outside } = this.#at(event);
    this.drag.gone = outside;
    const step = event.shiftKey ? FINE : STEP;
    this.edits.move(this.drag.index, ...snap(percent, factor, step));
    this.#draw();
  }

  /** @param {boolean} isDone Not broken off. */
  #release(isDone) {
    const { drag } = this;
    if (!drag) return;
    this.drag = null;
    if (isDone && drag.gone) this.edits.remove(drag.index);
    if (this.picture) this.show(this.picture); // the scale may change now
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const index = this.#indexOf(event.target);
    const point = this.picture?.points[index];
    if (index < 0 || !point || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = event.shiftKey ? KEY_SHIFT : KEY;
    const [percent, factor] = point;
    const moves = /** @type {Record<string, Point>} */ ({
      ArrowLeft: [percent - by, factor], ArrowRight: [percent + by, factor],
      ArrowDown: [percent, factor - by], ArrowUp: [percent, factor + by],
    });
    const removes = event.key === "Delete" || event.key === "Backspace";
    if (!removes && !moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation(); // or ComfyUI would delete the node
    if (removes) this.edits.remove(index);
    else this.edits.move(index, ...moves[event.key]);
    const last = this.dots.children.length - 1;
    /** @type {SVGElement} */ (this.dots.children[Math.min(index, last)])?.focus();
  }

  /** @param {EventTarget | null} target */
  #indexOf(target) {
    return [...this.dots.children].findIndex((dot) => dot === target);
  }

  /** Where the pointer is, within the curve's box, and whether far outside. @param {MouseEvent} event */
  #at(event) {
    const box = this.svg.getBoundingClientRect();
    const [width, height] = this.size;
    const x = ((event.clientX - box.left) / box.width) * width;
    const y = ((event.clientY - box.top) / box.height) * height;
    const [low, high] = this.range;
    const percent = (x - LEFT) / (width - LEFT - RIGHT);
    const share = (height - BOTTOM - y) / (height - TOP - BOTTOM);
    const outside = x < -OFF || y < -OFF || x > width + OFF || y > height + OFF;
    return { percent: within(percent, 0, 1), factor: within(low + share * (high - low), low, high),
      outside };
  }

  /** @param {number} percent */
  #x(percent) {
    return LEFT + percent * (this.size[0] - LEFT - RIGHT);
  }

  /** @param {number} factor */
  #y(factor) {
    const [low, high] = this.range;
    const height = this.size[1];
    return height - BOTTOM - ((factor - low) / (high - low)) * (height - TOP - BOTTOM);
  }

  /** @param {Point[]} line */
  #d(line) {
    const at = (/** @type {Point} */ [percent, factor]) => `${this.#x(percent).toFixed(2)},${this.#y(factor).toFixed(2)}`;
    return `M${line.map(at).join("L")}`;
  }
}

/** Factors from 0 to 1.5, or as far as the curves reach in halves. @param {Picture} picture */
function rangeOf({ curves }) {
  const factors = curves.flatMap(({ line }) => line.map(([, factor]) => factor));
  const low = Math.min(0, Math.floor(Math.min(...factors, 0) * 2) / 2);
  const high = Math.max(1.5, Math.ceil(Math.max(...factors, 0) * 2) / 2);
  return [low, high];
}

/** @param {string} name @param {Record<string, string | number>} [attributes] */
function svg(name, attributes = {}) {
  return set(/** @type {SVGElement} */ (document.createElementNS(SVG, name)), attributes);
}

/** @template {Element} T @param {T} element @param {Record<string, string | number>} attributes */
function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}

/** @param {string} said @param {number} x @param {number} y @param {string} anchor */
function text(said, x, y, anchor) {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = said;
  return element;
}

/** @param {number} number @param {number} low @param {number} high */
const within = (number, low, high) => Math.min(Math.max(number, low), high);

/**
 * @param {number} percent
 * @param {number} factor
 * @param {Point} steps
 * @returns {Point}
 */
const snap = (percent, factor, steps) => /** @type {Point} */ ([percent, factor].map(
  (number, i) => Math.round(number / steps[i]) / Math.round(1 / steps[i]),
));

/** @param {number} number */
const round = (number) => Math.round(number * 1000) / 1000;
