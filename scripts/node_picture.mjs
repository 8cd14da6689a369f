// An act for frontend.mjs: shows a node of a graph and saves a picture of it; for the load node
// also of its browser of tasks.

const MARGIN = [28, 62, 28, 24]; // left, top (the title and the badge over it), right, bottom
const TALLEST = 760; // pixels; a node of more is shown smaller

/** Puts the node where nothing lies over it; returns its box in the window. Runs in the page. */
async function show({ ui, type, tallest }) {
  const { app } = window;
  await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", false);
  await app.loadGraphData(ui, true, true, null);
  await new Promise((done) => setTimeout(done, 700));
  const node = app.graph.nodes.findLast((one) => one.type === type);
  const links = [...app.graph.links.values()];
  const near = new Set(links.flatMap(({ origin_id: from, target_id: to }) =>
    from === node.id || to === node.id ? [from, to] : []));
  for (const other of [...app.graph.nodes]) if (!near.has(other.id)) app.graph.remove(other);
  for (const group of [...app.graph.groups]) app.graph.remove(group);
  const { ds, canvas } = app.canvas;
  const box = canvas.getBoundingClientRect();
  ds.scale = Math.min(1, tallest / node.size[1]);
  ds.offset[0] = (520 - box.x) / ds.scale - node.pos[0];
  ds.offset[1] = (170 - box.y) / ds.scale - node.pos[1];
  app.canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 700));
  return [520, 170, node.size[0] * ds.scale, node.size[1] * ds.scale];
}

export default async function picture(page, { ui, type, path, dialog }) {
  const [x, y, width, height] = await page.evaluate(show, { ui, type, tallest: TALLEST });
  const [left, top, right, bottom] = MARGIN;
  await page.mouse.move(300, 1050);
  await page.screenshot({ path, clip: { x: x - left, y: y - top, width: width + left + right,
    height: height + top + bottom } });
  if (!dialog) return { height };
  await page.evaluate((kind) => window.app.graph.nodes.findLast((one) => one.type === kind).widgets
    .find((one) => one.name === "browse").callback(), type);
  await page.waitForFunction(() => {
    const cards = [...document.querySelectorAll(".diffscaler-card")];
    return cards.length && cards.every((card) => card.querySelector(".diffscaler-title"))
      && [...document.querySelectorAll(".diffscaler-card img")].every((one) => one.complete);
  });
  await page.locator(".diffscaler-browser").screenshot({ path: dialog });
  await page.keyboard.press("Escape");
  return { height };
}
