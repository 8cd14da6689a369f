// What the pack's own widgets say, in the user's language. No DOM, no ComfyUI.

/** The English, by key; $1, $2 are filled in. JSON: scripts/make_locales.py reads it. */
const ENGLISH = {
  "part": "part",
  "all": "all",
  "editPart": "edit the points of this part alone: $1",
  "editAll": "edit the points of all parts that have none of their own",
  "editHint": "Drag a point to move it (Shift: finer). Press on the curve, or double-click, for a new one. Right-click a point or drag it off to remove it. With the keyboard: Tab, arrows, Delete.",
  "keyframesCount": "the connected keyframes count",
  "fromAnotherNode": "$1 comes from another node",
  "noise": "noise",
  "picture": "picture",
  "point": "point $1 of $2: $3 at $4",
  "where": "line $1, '$2'",
  "noPoint": "no point: write a line 'percent: factor', such as '0.3: 1'",
  "noEntry": "$1: write 'percent: factor', such as '0.3: 1'",
  "noPart": "$1: no part '$2'; parts are $3",
  "noNumber": "$1: '$2' is no number",
  "noPercent": "$1: a percent is in 0..1 (0 pure noise, 1 the picture)",
  "tooMany": "more than two points at $1 for $2",
  "tasks": "DiffScaler tasks",
  "browse": "browse tasks",
  "browseHint": "Shows all task files with their pictures.",
  "search": "search names, words, descriptions",
  "base": "base",
  "allBases": "all bases",
  "close": "close",
  "count": "$1 tasks",
  "countSome": "$1 of $2 tasks",
  "noFile": "no task file in models/diffscaler or output/diffscaler",
  "noHeader": "its header cannot be read",
  "noTask": "not a task file",
  "trigger": "trigger: $1",
  "control": "control: $1",
  "prompts": "prompts: $1",
  "promptsMore": "prompts: $1 and $2 more"
};

/** @typedef {keyof typeof ENGLISH} Key */

/** @type {Record<string, string>} */
let own = ENGLISH;

/**
 * Says something in the user's language.
 * @param {Key} key
 * @param {...(string | number)} values What $1, $2, … stand for.
 */
export function say(key, ...values) {
  return own[key].replace(/\$(\d)/g, (_, digit) => String(values[Number(digit) - 1]));
}

/**
 * Puts a language in force; what it lacks stays English.
 * @param {unknown} texts Key -> text.
 */
export function setTexts(texts) {
  const known = Object.entries(texts && typeof texts === "object" ? texts : {})
    .filter(([key, value]) => key in ENGLISH && typeof value === "string");
  own = { ...ENGLISH, ...Object.fromEntries(known) };
}
