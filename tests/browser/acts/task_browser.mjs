// Opens the task browser from the node's button, looks at its cards, searches, chooses.

import { addNode, both, value } from "./pages.mjs";

const NODE = "DiffScalerLoadTask";

const press = (page, vue) => vue
  ? page.locator('[data-testid="node-widget"] button', { hasText: "browse tasks" }).click()
  : (async () => {
    const [x, y] = await page.evaluate((kind) => {
      const { app } = window;
      const node = app.graph.nodes.find((one) => one.type === kind);
      const button = node.widgets.find((one) => one.name === "browse");
      const { ds, canvas } = app.canvas;
      const box = canvas.getBoundingClientRect();
      const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + button.last_y + 10];
      return [0, 1].map((i) => (at[i] + ds.offset[i]) * ds.scale + [box.x, box.y][i]);
    }, NODE);
    await page.mouse.click(x, y);
  })();

const cards = (page) => page.evaluate(() =>
  [...document.querySelectorAll(".diffscaler-card:not([hidden])")].map((card) => ({
    file: card.dataset.file,
    said: card.innerText,
    width: card.querySelector("img")?.naturalWidth ?? 0,
    problem: card.classList.contains("diffscaler-problem"),
    chosen: card.getAttribute("aria-pressed") === "true",
  })));

/** Every card has its facts. */
const filled = (page) => page.waitForFunction(() => {
  const all = [...document.querySelectorAll(".diffscaler-card")];
  const pictures = [...document.querySelectorAll(".diffscaler-card img")];
  return all.length && all.every((card) => card.querySelector(".diffscaler-title"))
    && pictures.every((picture) => picture.complete);
});

export default async function act(page, { vue, search, family, choose, screenshot }) {
  await addNode(page, NODE, { vue });
  const before = await both(page);
  await press(page, vue);
  await filled(page);
  const said = { before, all: await cards(page) };
  said.families = await page.locator(".diffscaler-family option").allInnerTexts();
  if (screenshot) await page.screenshot({ path: screenshot });
  await page.keyboard.type(search); // the search has the focus
  said.found = await cards(page);
  said.count = await page.locator(".diffscaler-count").innerText();
  await page.locator(".diffscaler-search").fill("");
  await page.locator(".diffscaler-family").selectOption(family);
  said.ofFamily = await cards(page);
  await page.keyboard.press("Escape");
  said.escaped = await value(page, NODE, "task_name");
  await press(page, vue);
  await filled(page);
  await page.locator(`.diffscaler-card[data-file="${choose}"]`).click();
  await page.waitForFunction(() => !document.querySelector(".diffscaler-browser"));
  said.hacked = await page.evaluate(() => window.hacked ?? null);
  return { ...said, chosen: await value(page, NODE, "task_name"), after: await both(page) };
}
