// Opens a graph and gives it back: the saved workflow, the prompt, and which widgets it shows.

import { both, openGraph } from "./pages.mjs";

export default async function plain(page, { ui, type }) {
  await openGraph(page, ui, type);
  const widgets = await page.evaluate(() => Object.fromEntries(window.app.graph.nodes
    .map((node) => [node.type, (node.widgets ?? []).map((widget) => widget.name)])));
  return { ...await both(page), widgets };
}
