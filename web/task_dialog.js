// A dialog with a card for every task, to choose one. Knows no ComfyUI.

import { matches } from "./task_facts.js";
import { say } from "./texts.js";

/** @typedef {import("./task_facts.js").TaskFacts} TaskFacts */

/**
 * Lets a user choose a task.
 * @param {string[]} files All there are.
 * @param {string} chosen The one chosen now.
 * @param {(file: string) => Promise<TaskFacts>} factsOf Asked once for each file.
 * @returns {Promise<string | null>} Null if nothing was chosen.
 */
export function chooseTask(files, chosen, factsOf) {
  const dialog = make("dialog", "diffscaler-browser");
  dialog.setAttribute("aria-label", say("tasks"));
  const search = make("input", "diffscaler-search");
  Object.assign(search, { type: "search", placeholder: say("search") });
  const family = make("select", "diffscaler-family");
  family.setAttribute("aria-label", say("base"));
  family.append(new Option(say("allBases"), ""));
  const close = make("button", "diffscaler-close", "✕");
  close.setAttribute("aria-label", say("close"));
  const count = make("span", "diffscaler-count");
  const head = make("div", "diffscaler-head");
  head.append(search, family, count, close);
  const grid = make("div", "diffscaler-cards");
  dialog.append(head, grid);
  /** @type {Map<string, {card: HTMLElement, facts: TaskFacts | null}>} */
  const cards = new Map();

  const filter = () => {
    let shown = 0;
    for (const { card, facts } of cards.values()) {
      card.hidden = facts !== null && !matches(facts, search.value, family.value);
      shown += Number(!card.hidden);
    }
    count.textContent = shown === files.length ? say("count", shown)
      : say("countSome", shown, files.length);
    if (!files.length) count.textContent = say("noFile");
  };

  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue || null);
    });
    dialog.addEventListener("keydown", (event) => event.stopPropagation()); // ComfyUI's shortcuts
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(""); // the space round it
    });
    close.addEventListener("click", () => dialog.close(""));
    search.addEventListener("input", filter);
    family.addEventListener("change", filter);
    for (const file of files) {
      const card = make("button", "diffscaler-card", file);
      card.dataset.file = file;
      card.setAttribute("aria-pressed", String(file === chosen));
      card.addEventListener("click", () => dialog.close(file));
      cards.set(file, { card, facts: null });
      grid.append(card);
    }
    filter();
    document.body.append(dialog);
    dialog.showModal();
    search.focus();
    cards.get(chosen)?.card.scrollIntoView({ block: "nearest" });
    void fillAll(files, async (file) => {
      const facts = await factsOf(file);
      const entry = cards.get(file);
      if (!entry) return;
      entry.facts = facts;
      fill(entry.card, facts);
      offer(family, facts.family);
      filter();
    }, () => dialog.open);
  });
}

/** Does a few files at a time until all are done, or nobody looks any more. @param {string[]} files @param {(file: string) => Promise<void>} work @param {() => boolean} goesOn */
async function fillAll(files, work, goesOn) {
  const left = [...files];
  const one = async () => {
    for (let file = left.shift(); file !== undefined && goesOn(); file = left.shift()) await work(file);
  };
  await Promise.all([one(), one(), one(), one()]);
}

/** @param {HTMLElement} card @param {TaskFacts} facts */
function fill(card, facts) {
  const picture = make("div", "diffscaler-picture");
  if (facts.picture) {
    const image = new Image();
    image.alt = "";
    image.decoding = "async";
    image.src = facts.picture;
    picture.append(image);
  } else {
    picture.textContent = facts.title.slice(0, 1).toUpperCase();
  }
  const lines = [
    make("div", "diffscaler-title", facts.title),
    make("div", "diffscaler-file", facts.file),
    make("div", "diffscaler-facts", [facts.family, facts.size].filter(Boolean).join(" · ")),
    make("div", "diffscaler-words", facts.problem || facts.words || facts.description),
  ];
  card.title = facts.description;
  card.classList.toggle("diffscaler-problem", Boolean(facts.problem));
  card.replaceChildren(picture, ...lines);
}

/** Adds a base to the choice, in order. @param {HTMLSelectElement} select @param {string} family */
function offer(select, family) {
  const options = [...select.options];
  if (!family || options.some(({ value }) => value === family)) return;
  const next = options.find(({ value }) => value > family);
  select.add(new Option(family, family), next ?? null);
}

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {string} name
 * @param {string} [said] Never read as HTML: it may come from somebody's file.
 * @returns {HTMLElementTagNameMap[K]}
 */
function make(tag, name, said = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = said;
  if (element instanceof HTMLButtonElement) element.type = "button";
  return element;
}
