// A button on the node DiffScalerLoadTask that shows all task files with their pictures. What it
// shows comes from routes that ComfyUI has for every model folder; nothing is sent elsewhere.

import { app } from "../../scripts/app.js";
import { addStyles } from "./styles.js";
import { chooseTask } from "./task_dialog.js";
import { factsOf } from "./task_facts.js";
import { say } from "./texts.js";

const NODE = "DiffScalerLoadTask";
const INPUT = "task_name";
const FOLDER = "diffscaler";

/** Facts that were read, by file and when it was written. @type {Map<string, Promise<import("./task_facts.js").TaskFacts>>} */
const known = new Map();

/** @param {string} route @returns {Promise<any>} Null where the server has no answer. */
async function get(route) {
  try {
    const answer = await app.api.fetchApi(route);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** Returns the files that the node offers now; one that was just saved is among them. @param {any} widget @returns {Promise<string[]>} */
async function filesOf(widget) {
  const told = await get(`/object_info/${NODE}`);
  const spec = told?.[NODE]?.input?.required?.[INPUT];
  const files = Array.isArray(spec?.[0]) ? spec[0] : spec?.[1]?.options ?? widget.options.values;
  return Array.isArray(files) ? files : [];
}

/** @param {any} node */
async function browse(node) {
  const widget = node.widgets.find((/** @type {any} */ one) => one.name === INPUT);
  const [files, listed] = await Promise.all([filesOf(widget), get(`/experiment/models/${FOLDER}`)]);
  /** @type {Map<string, {size: number, modified: number}>} */
  const stats = new Map();
  for (const one of Array.isArray(listed) ? listed : []) {
    if (!stats.has(one.name)) stats.set(one.name, one); // the first folder's counts, as it does for loading
  }
  const chosen = await chooseTask(files, String(widget.value), (file) => {
    const stat = stats.get(file);
    const key = `${file}\n${stat?.modified}\n${stat?.size}`;
    const query = new URLSearchParams({ filename: file });
    const read = async () =>
      factsOf(file, await get(`/view_metadata/${FOLDER}?${query}`), stat?.size);
    if (!known.has(key)) known.set(key, read());
    return /** @type {Promise<import("./task_facts.js").TaskFacts>} */ (known.get(key));
  });
  if (chosen === null) return;
  if (Array.isArray(widget.options.values)) widget.options.values = files;
  widget.value = chosen;
  widget.callback?.(chosen, app.canvas, node);
  app.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "DiffScaler.TaskBrowser",
  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    addStyles();
    const button = node.addWidget("button", "browse", null, () => void browse(node), {
      serialize: false, // not an input of the node
    });
    button.label = say("browse");
    button.serialize = false; // nor part of a saved workflow
    button.tooltip = say("browseHint");
  },
});
