// Edits the strength curve of a schedule node as a user does, with real mouse and keyboard events.

import { addNode, both, openGraph, setValue, value } from "./pages.mjs";

const NODE = "DiffScalerScheduleTask";
const text = (page) => value(page, NODE, "points");

/** Where a percent and a factor are in the window, read off the drawn grid. */
async function place(page, percent, factor) {
  const [left, right, low, high] = await page.evaluate(() => {
    const lines = [...document.querySelectorAll(".diffscaler-grid line")];
    const box = (line) => line.getBoundingClientRect();
    const upright = lines.filter((l) => l.getAttribute("x1") === l.getAttribute("x2"));
    const whole = lines.filter((l) => l.classList.contains("diffscaler-whole"));
    return [box(upright.at(0)).x, box(upright.at(-1)).x, box(whole[0]).y, box(whole[1]).y];
  });
  return [left + percent * (right - left), low + factor * (high - low)];
}

async function press(page, percent, factor) {
  await page.mouse.move(...await place(page, percent, factor));
  await page.mouse.down();
}

async function drag(page, from, to) {
  await press(page, ...from);
  const [x, y] = await place(page, ...to);
  await page.mouse.move(x, y, { steps: 4 });
  await page.mouse.up();
}

const drawn = (page) => page.evaluate(() => ({
  d: document.querySelector(".diffscaler-curve").getAttribute("d"),
  dots: [...document.querySelectorAll(".diffscaler-dots circle")]
    .map((dot) => [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))]),
  others: document.querySelectorAll(".diffscaler-others path").length,
  note: document.querySelector(".diffscaler-note").textContent,
  isError: document.querySelector(".diffscaler-plot").classList.contains("diffscaler-error"),
}));

const withKeyframes = () => {
  const { app, LiteGraph } = window;
  const frames = LiteGraph.createNode("CreateHookKeyframe");
  app.graph.add(frames);
  const node = app.graph.nodes.find((one) => one.type === "DiffScalerScheduleTask");
  frames.connect(0, node, node.inputs.findIndex((input) => input.name === "keyframes"));
};

const acts = {
  async edits(page) {
    const said = { window: await drawn(page) };
    await press(page, 0.5, 1);
    await page.mouse.up();
    said.pressed = await text(page);
    await drag(page, [0.5, 1], [0.3, 0.5]);
    said.dragged = await text(page);
    await page.mouse.dblclick(...await place(page, 0.8, 0.25));
    said.doubled = await text(page);
    await drag(page, [0.8, 0.25], [0.1, 1.25]); // no further than its neighbour
    said.stopped = await text(page);
    await page.locator(".diffscaler-parts button", { hasText: "shift" }).click();
    said.inherited = await drawn(page);
    await press(page, 0.9, 1.25);
    await page.mouse.up();
    said.part = await text(page);
    await page.mouse.click(...await place(page, 0.9, 1.25), { button: "right" });
    said.rightClicked = await text(page);
    await drag(page, [0, 1], [0.2, -3]);
    said.draggedOff = await text(page);
    await page.locator(".diffscaler-parts button", { hasText: "all" }).click();
    await page.locator(".diffscaler-dots circle").first().focus();
    for (const key of ["ArrowDown", "Shift+ArrowDown", "ArrowRight"]) await page.keyboard.press(key);
    said.arrows = await text(page);
    await page.keyboard.press("Delete");
    said.deleted = await text(page);
    said.nodes = await page.evaluate(() => window.app.graph.nodes.length);
    return said;
  },
  async undo(page) {
    await setValue(page, NODE, "points", "0: 0\n0.5: 1");
    await page.evaluate(() => window.app.extensionManager.workflow.activeWorkflow.changeTracker
      .captureCanvasState());
    await drag(page, [0.5, 1], [0.7, 0.5]);
    const dragged = await text(page);
    await page.evaluate(() => document.activeElement?.blur());
    await page.keyboard.press("Control+z");
    await page.waitForTimeout(1500);
    return { dragged, undone: await text(page), drawn: await drawn(page) };
  },
  async shows(page, { given }) {
    const { points, ...others } = given;
    for (const [name, to] of Object.entries(others)) await setValue(page, NODE, name, to);
    await setValue(page, NODE, "points", points);
    return { drawn: await drawn(page), text: await text(page) };
  },
  async bad(page) {
    await setValue(page, NODE, "points", "0: 0\n0.3 1\n");
    const shown = await drawn(page);
    await page.mouse.dblclick(...await place(page, 0.5, 0.5));
    return { shown, text: await text(page), api: (await both(page)).api };
  },
  async keyframes(page) {
    await setValue(page, NODE, "points", "0: 0\n0.3: 1");
    await page.evaluate(withKeyframes);
    return { drawn: await drawn(page), text: await text(page) };
  },
  async reload(page, { vue }) {
    await setValue(page, NODE, "points", "0: 0, 0.3: 1 # so\nscale 1: 0.5");
    await setValue(page, NODE, "interpolation", "step");
    await setValue(page, NODE, "end", 0.75);
    const first = await both(page);
    const seen = await drawn(page);
    await openGraph(page, first.ui, NODE, { vue });
    return { first, again: await both(page), seen, seenAgain: await drawn(page) };
  },
};

/** Does one of the acts on a fresh node; a screenshot shows how it ended. */
export default async function act(page, { name, vue, screenshot, scale = 1, ...more }) {
  await addNode(page, NODE, { vue, scale });
  const said = await acts[name](page, { vue, ...more });
  if (screenshot) await page.screenshot({ path: screenshot });
  return said;
}
