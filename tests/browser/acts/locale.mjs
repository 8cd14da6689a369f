// Shows two nodes in one language, on one palette and in one renderer: their texts as a user sees
// them, the tooltips that a resting mouse brings up, and the colours of the edge between them.

const LINK = "DIFFSCALER_TASK";
const TOOLTIPS = ".node-tooltip, .p-tooltip-text";
const settle = (page, time = 800) => page.waitForTimeout(time);

/** The page, anew, with other settings. */
async function openWith(page, settings) {
  await page.evaluate((values) => fetch("/api/settings", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values),
  }), settings);
  await page.reload({ waitUntil: "domcontentloaded" });
  await page.waitForFunction(() => window.app?.graph
    && window.LiteGraph?.registered_node_types?.DiffScalerLoadTask);
  await settle(page, 2000);
}

/** A load, a stack and a settings node; the task's edge between the first two. */
async function build() {
  const { app, LiteGraph } = window;
  await app.loadGraphData({ version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: [],
    groups: [], config: {}, extra: {} }, true, true, null);
  const add = (type, pos) => {
    const node = LiteGraph.createNode(type);
    node.pos = pos;
    app.graph.add(node);
    return node;
  };
  const load = add("DiffScalerLoadTask", [0, 0]);
  const stack = add("DiffScalerStackTasks", [520, 0]);
  const train = add("DiffScalerTrainTask", [1000, -60]);
  add("DiffScalerScheduleTask", [0, 420]);
  load.connect(0, stack, stack.inputs.findIndex((input) => input.type === "DIFFSCALER_TASK"));
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [120, 200];
  app.canvas.setDirty(true, true);
  const shown = (node) => ({
    title: node.title,
    inputs: node.inputs.map((input) => input.label || input.localized_name || input.name),
    widgets: (node.widgets ?? []).map((widget) => widget.label || widget.name),
    outputs: node.outputs.map((output) => output.label || output.localized_name || output.name),
  });
  const definition = window.LiteGraph.registered_node_types.DiffScalerStackTasks;
  return { load: shown(load), stack: shown(stack), train: shown(train),
    category: definition.category, description: definition.nodeData.description };
}

/** Where in the window a node's slot is, and the middle of the first link. */
const places = (page) => page.evaluate(() => {
  const { graph, canvas } = window.app;
  const box = canvas.canvas.getBoundingClientRect();
  const place = ([x, y]) => {
    const [left, top] = canvas.ds.convertOffsetToCanvas([x, y]);
    return [box.x + left, box.y + top];
  };
  const [load, stack] = graph.nodes;
  const link = [...graph.links.values()][0];
  return {
    link: place(link._pos),
    title: place([stack.pos[0] + 90, stack.pos[1] - 15]),
    model: place(stack.getInputPos(0)),
    growing: place(stack.getInputPos(1)),
    output: place(load.getOutputPos(0)),
  };
});

/** What a mouse that rests there is told. */
async function told(page, [x, y]) {
  await page.mouse.move(5, 5);
  await settle(page, 300);
  await page.mouse.move(x + 6, y + 3);
  await page.mouse.move(x, y, { steps: 3 });
  await page.waitForFunction((which) => [...document.querySelectorAll(which)]
    .some((one) => one.checkVisibility() && one.textContent.trim()), TOOLTIPS, { timeout: 8000 })
    .catch(() => {});
  return page.evaluate((which) => [...document.querySelectorAll(which)]
    .filter((one) => one.checkVisibility()).map((one) => one.textContent.trim()).join(" | "),
  TOOLTIPS);
}

/** The colours: in the canvas' tables, on the screen in the middle of the link, of HTML slots. */
async function colours(page, at) {
  await page.mouse.move(5, 5);
  await settle(page);
  const [x, y] = at.map(Math.round);
  const png = await page.screenshot({ clip: { x: x - 2, y: y - 12, width: 5, height: 25 } });
  const tables = await page.evaluate((type) => ({
    link: window.LGraphCanvas.link_type_colors[type],
    slot: window.app.canvas.default_connection_color_byType[type],
    variable: getComputedStyle(document.documentElement)
      .getPropertyValue(`--color-datatype-${type}`).trim(),
    all: Object.fromEntries(Object.entries(window.LGraphCanvas.link_type_colors)),
    dots: [...document.querySelectorAll("[data-testid=slot-dot]")]
      .map((dot) => getComputedStyle(dot).backgroundColor),
    node: window.LiteGraph.NODE_DEFAULT_BGCOLOR,
    canvas: window.app.canvas.clear_background_color,
  }), LINK);
  return { ...tables, png: png.toString("base64") };
}

/** The task's colour while a palette that knows the type is in force, and after it. */
const overruled = (page) => page.evaluate((type) => {
  const table = window.LGraphCanvas.link_type_colors;
  const told = (colour) => { Object.assign(table, { [type]: colour }); return table[type]; };
  return [told("#123456"), told("")];
}, LINK);

export default async function locale(page, { language, palette, vue, other, screenshot }) {
  await openWith(page, {
    "Comfy.Locale": language, "Comfy.ColorPalette": palette, "Comfy.VueNodes.Enabled": vue,
    "LiteGraph.Node.TooltipDelay": 200,
  });
  const texts = await page.evaluate(build);
  await settle(page, vue ? 2500 : 1000);
  await page.evaluate(() => window.app.canvas.setDirty(true, true));
  const at = await places(page);
  const tooltips = {};
  for (const which of ["title", "model", "growing", "output"]) tooltips[which] = await told(page, at[which]);
  await told(page, at.model);
  if (screenshot) await page.screenshot({ path: screenshot });
  const own = await page.evaluate(() => ({
    ends: [...document.querySelectorAll(".diffscaler-grid text")].map((one) => one.textContent),
    parts: [...document.querySelectorAll(".diffscaler-parts button")].map((one) => one.textContent),
    hint: document.querySelector(".diffscaler-hint")?.title,
  }));
  const found = { [palette]: await colours(page, at.link) };
  await page.evaluate((name) => window.app.extensionManager.setting // no reload, as in the dialog
    .set("Comfy.ColorPalette", name), other);
  await settle(page, 1500);
  found[other] = await colours(page, at.link);
  return { ...texts, own, tooltips, colours: found, overruled: await overruled(page) };
}
