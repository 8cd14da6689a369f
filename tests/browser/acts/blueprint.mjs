// Adds a subgraph blueprint of the node library to a graph, connects it, and runs the graph.

/** The frontend's own store of what it loaded. Runs in the page. */
function listed() {
  const { $pinia } = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
  return $pinia._s.get("subgraph").subgraphBlueprints.map(
    ({ name, display_name: title, category, description }) => ({ name, title, category, description }));
}

/** As the library's "add to canvas" does. Runs in the page. */
async function add({ name, api, into, from, values }) {
  const { app } = window;
  await app.loadApiJson(api, "test");
  await new Promise((done) => setTimeout(done, 500));
  const { $pinia } = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
  const { nodes, definitions } = $pinia._s.get("subgraph").getBlueprint(name);
  const made = app.canvas._deserializeItems(
    { nodes, subgraphs: definitions.subgraphs }, { position: [900, 900] });
  const node = made.nodes.values().next().value;
  const slot = (slots, wanted) => slots.findIndex((one) => one.name === wanted);
  for (const [input, [source, output]] of Object.entries(into)) {
    app.graph.getNodeById(source).connect(output, node, slot(node.inputs, input));
  }
  for (const [output, [target, input]] of Object.entries(from)) {
    const end = app.graph.getNodeById(target);
    node.connect(slot(node.outputs, output), end, slot(end.inputs, input));
  }
  for (const widget of node.widgets) {
    if (widget.name in values) widget.value = values[widget.name];
  }
  const { output } = await app.graphToPrompt();
  return { api: output, title: node.title, widgets: node.widgets.map((widget) => widget.name) };
}

export default async function act(page, given) {
  await page.waitForFunction((name) => {
    const { $pinia } = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
    return $pinia._s.get("subgraph")?.subgraphBlueprints.some(({ display_name: n }) => n === name);
  }, given.title);
  const all = await page.evaluate(listed);
  const { name } = all.find(({ title }) => title === given.title);
  const added = await page.evaluate(add, { ...given, name });
  const answered = page.waitForResponse((answer) =>
    new URL(answer.url()).pathname === "/api/prompt" && answer.request().method() === "POST");
  await page.evaluate(() => { window.app.queuePrompt(0); });
  const answer = await answered;
  const said = await answer.json();
  if (given.screenshot) await page.screenshot({ path: given.screenshot });
  return { listed: all, added, prompt_id: said.prompt_id, refused: answer.ok() ? null : said };
}
