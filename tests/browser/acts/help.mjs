// Opens a node's help page from the toolbox over the selected node; says what it shows.

import { addNode } from "./pages.mjs";

export default async function help(page, { type, screenshot }) {
  await addNode(page, type);
  await page.evaluate((kind) => {
    const { app } = window;
    app.canvas.selectNode(app.graph.nodes.find((node) => node.type === kind));
  }, type);
  await page.locator('[data-testid="info-button"]').click();
  const picture = page.locator(".node-help-content .markdown-content img").first();
  await picture.waitFor();
  await page.waitForFunction(() =>
    document.querySelector(".node-help-content .markdown-content img").complete);
  const said = await picture.evaluate((image) => ({ source: new URL(image.src).pathname,
    size: [image.naturalWidth, image.naturalHeight], alt: image.alt }));
  if (screenshot) await page.screenshot({ path: screenshot });
  return { ...said, title: await page.locator(".node-help-content h1").first().innerText() };
}
