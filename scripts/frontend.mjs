// Drives ComfyUI's real frontend in a headless Chromium; scripts/frontend.py starts it.
// One JSON request on stdin: {playwright, chromium, url, jobs}; one JSON answer on stdout:
// {results: one per job, problems: what the page complained about}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const request = JSON.parse(readFileSync(0, "utf8"));
const { chromium } = createRequire(import.meta.url)(request.playwright);

const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const PATIENCE = 120_000;

/** Waits until the app has every node type of the server. */
async function open(page) {
  await page.goto(request.url, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(
    () => window.app?.graph && window.LiteGraph?.registered_node_types?.DiffScalerLoadTask,
    null,
    { timeout: PATIENCE },
  );
}

/** An API graph, put on the canvas at given places: {ui, api}, as the frontend writes both. */
async function arrange({ api, layout }) {
  const { app, LiteGraph } = window;
  await app.loadApiJson(api, "workflow");
  const settle = () => new Promise((done) => setTimeout(done, 300));
  await settle();
  const graph = app.graph;
  for (const node of graph.nodes) {
    const place = layout.nodes[node.id];
    const [width, height] = node.computeSize();
    node.setSize([place.size[0] || width, Math.max(place.size[1], height)]);
    node.pos = place.pos;
    if (place.color) Object.assign(node, LGraphCanvas.node_colors[place.color]);
    for (const widget of node.widgets ?? []) {
      if (widget.name === "control_after_generate") widget.value = "fixed";
    }
  }
  const note = LiteGraph.createNode("MarkdownNote");
  note.title = layout.note.title;
  note.pos = layout.note.pos;
  graph.add(note);
  note.setSize(layout.note.size);
  note.widgets[0].value = layout.note.text;
  const edges = (id) => { // left, top, right, bottom; a frame leaves room for both titles
    const { pos: [x, y], size: [width, height] } = graph.getNodeById(id);
    return [x - 16, y - 30 - 44, x + width + 16, y + height + 16];
  };
  for (const { title, nodes, color } of layout.groups) {
    const group = new LiteGraph.LGraphGroup(title);
    Object.assign(group, { color, font_size: 24 });
    graph.add(group);
    group.pos = [0, 1].map((axis) => Math.min(...nodes.map((id) => edges(id)[axis])));
    group.size = [2, 3].map((end) =>
      Math.max(...nodes.map((id) => edges(id)[end])) - group.pos[end - 2]);
  }
  await settle();
  const { output } = await app.graphToPrompt();
  return { ui: graph.serialize(), api: output };
}

/** A shipped workflow, opened as the template browser opens it: {missing, errors, api}. */
async function load({ ui }) {
  const { app, LiteGraph } = window;
  await app.loadGraphData(ui, true, true, null);
  await new Promise((done) => setTimeout(done, 800));
  const types = app.graph.nodes.map((node) => node.type);
  const missing = types.filter((type) => !(type in LiteGraph.registered_node_types));
  const errors = app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type);
  const { output } = await app.graphToPrompt();
  return { missing, errors, types, api: output };
}

/** Presses "Run" and waits for the end: the prompt's id, or the server's refusal. */
async function queue(page) {
  const answered = page.waitForResponse((answer) => new URL(answer.url()).pathname === "/api/prompt"
    && answer.request().method() === "POST", { timeout: PATIENCE });
  await page.evaluate(() => { window.app.queuePrompt(0); });
  const answer = await answered;
  if (!answer.ok()) return { refused: await answer.text() };
  const { prompt_id: id } = await answer.json();
  const outputs = await page.evaluate(async (key) => {
    for (;;) {
      const entry = (await (await fetch(`/api/history/${key}`)).json())[key];
      if (entry) return Object.keys(entry.outputs);
      await new Promise((done) => setTimeout(done, 250));
    }
  }, id);
  await page.waitForFunction( // the page hears of it a moment later
    (nodes) => nodes.every((node) => window.app.nodeOutputs?.[node]),
    outputs,
    { timeout: PATIENCE, polling: 500 },
  );
  return { prompt_id: id };
}

/** Shows the whole graph without what lies over it, and saves that. */
async function screenshot(page, path) {
  await page.keyboard.press("Escape");
  await page.evaluate(async () => {
    const [x, y, width, height] = (() => {
      const boxes = window.app.graph.nodes.map((node) => node.boundingRect);
      const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]));
      return [left, top, Math.max(...boxes.map((b) => b[0] + b[2])) - left,
        Math.max(...boxes.map((b) => b[1] + b[3])) - top];
    })();
    const { ds, canvas } = window.app.canvas;
    const [left, top] = [80, 130]; // beside and below the app's bars
    const room = [canvas.clientWidth - left - 40, canvas.clientHeight - top - 30];
    ds.scale = Math.min(room[0] / width, room[1] / height, 1);
    ds.offset[0] = left / ds.scale - x;
    ds.offset[1] = top / ds.scale - y;
    window.app.canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 3000));
  });
  await page.screenshot({ path });
}

async function work(page, job) {
  if (job.kind === "arrange") return page.evaluate(arrange, job);
  if (job.kind === "act") return (await import(pathToFileURL(job.module))).default(page, job.given);
  const result = await page.evaluate(load, job);
  if (job.queue) Object.assign(result, await queue(page));
  if (job.screenshot) await screenshot(page, job.screenshot);
  return result;
}

const browser = await chromium.launch({ executablePath: request.chromium, args: FLAGS });
try {
  const problems = [];
  const here = new URL(request.url).host;
  /** A browser of its own, that remembers no other graph. */
  const fresh = async () => {
    const page = await browser.newPage({ viewport: { width: 1800, height: 1100 } });
    page.setDefaultTimeout(PATIENCE);
    page.on("pageerror", (error) => problems.push(error.message.slice(0, 300)));
    await page.route((url) => url.host !== here && /^http/.test(url.protocol), (r) => r.abort());
    await open(page);
    return page;
  };
  let page = await fresh();
  const results = [];
  for (const job of request.jobs) {
    // the frontend keeps pictures by node id, and would give other graphs' nodes room for them
    if (job.kind === "arrange" && results.length) {
      await page.context().close();
      page = await fresh();
    }
    results.push(await work(page, job));
  }
  process.stdout.write(JSON.stringify({ results, problems }));
} finally {
  await browser.close();
}
