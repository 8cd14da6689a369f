// What several acts need: a workflow on the canvas, at a known scale, and places in it.

/** Opens a graph and lays its first node of a type into the middle of the window. */
export async function openGraph(page, ui, type, { vue = false, scale = 1 } = {}) {
  await page.evaluate((on) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on), vue);
  await page.evaluate((graph) => window.app.loadGraphData(graph, true, true, null), ui);
  await page.evaluate(({ kind, zoom }) => {
    const { app } = window;
    const node = app.graph.nodes.find((one) => one.type === kind);
    app.canvas.ds.scale = zoom;
    app.canvas.ds.offset[0] = 500 / zoom - node.pos[0];
    app.canvas.ds.offset[1] = 180 / zoom - node.pos[1];
    app.canvas.setDirty(true, true);
  }, { kind: type, zoom: scale });
  await page.waitForTimeout(vue ? 1500 : 800);
}

/** Adds one node of a type to an empty graph. */
export async function addNode(page, type, options) {
  const ui = { version: 0.4, last_node_id: 1, last_link_id: 0, links: [], groups: [], config: {},
    extra: {}, nodes: [] };
  await page.evaluate((graph) => window.app.loadGraphData(graph, true, true, null), ui);
  const made = await page.evaluate((kind) => {
    const node = window.LiteGraph.createNode(kind);
    window.app.graph.add(node);
    return window.app.graph.serialize();
  }, type);
  await openGraph(page, made, type, options);
}

/** The saved workflow and the prompt of the canvas. */
export const both = (page) => page.evaluate(async () => {
  const { output } = await window.app.graphToPrompt();
  return { ui: window.app.graph.serialize(), api: output };
});

/** A widget's value on the only node of a type. */
export const value = (page, type, name) => page.evaluate(([kind, widget]) => window.app.graph.nodes
  .find((node) => node.type === kind).widgets.find((one) => one.name === widget).value, [type, name]);

/** Gives a widget a value as a typing user does. */
export const setValue = (page, type, name, to) => page.evaluate(([kind, widget, wanted]) => {
  const found = window.app.graph.nodes.find((node) => node.type === kind).widgets
    .find((one) => one.name === widget);
  found.value = wanted;
  found.callback?.(wanted);
}, [type, name, to]);
