// An act for frontend.mjs: makes one subgraph node of a graph, as "Convert to Subgraph" and
// "Publish" in ComfyUI do, and gives back what publishing would write.

/** Runs in the page. */
async function convert({ name, about, aliases, api, places, inputs, outputs }) {
  const { app } = window;
  await app.loadApiJson(api, name);
  await new Promise((done) => setTimeout(done, 300));
  const { graph } = app;
  for (const node of graph.nodes) {
    const place = places[node.id];
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, place.size[0]), Math.max(height, place.size[1])]);
    node.pos = place.pos;
    if (place.color) Object.assign(node, window.LGraphCanvas.node_colors[place.color]);
    for (const widget of node.widgets ?? []) {
      if (widget.name === "control_after_generate") widget.value = "randomize";
    }
  }
  const { subgraph, node } = graph.convertToSubgraph(new Set(graph.nodes));
  const inner = (id) => subgraph.getNodeById(id) ?? subgraph.nodes.find((one) => String(one.id) === id);
  for (const { name: called, to } of inputs) {
    if (subgraph.inputs.some((input) => input.name === called)) continue; // a seed is made one
    const ends = to.map(([id, input]) => {
      const target = inner(id);
      return [target.inputs.find((slot) => slot.name === input), target];
    });
    const added = subgraph.addInput(called, String(ends[0][0].type));
    for (const [slot, target] of ends) added.connect(slot, target);
  }
  for (const { name: called, from: [id, index] } of outputs) {
    const source = inner(id);
    subgraph.addOutput(called, String(source.outputs[index].type)).connect(source.outputs[index], source);
  }
  Object.assign(subgraph, { name });
  node.title = name;
  node.pos = [0, 0];
  await new Promise((done) => setTimeout(done, 300));
  node.setSize([340, node.computeSize()[1]]);
  const bounds = subgraph.nodes.map((one) => [one.pos[0], one.pos[0] + one.size[0]]);
  subgraph.inputNode.pos = [Math.min(...bounds.map((b) => b[0])) - 260, 0];
  subgraph.outputNode.pos = [Math.max(...bounds.map((b) => b[1])) + 120, 0];
  const { nodes, subgraphs } = app.canvas._serializeItems([node]);
  Object.assign(subgraphs[0], { category: "DiffScaler", description: about });
  return {
    revision: 0, last_node_id: node.id, last_link_id: 0, nodes, links: [], version: 0.4,
    definitions: { subgraphs },
    extra: { BlueprintDescription: about, BlueprintSearchAliases: aliases },
  };
}

export default (page, given) => page.evaluate(convert, given);
