// The text of a schedule ("0.3: 1", a line each) and how an edit changes it, the rest of the text
// left as it is. Reads what Schedule.parse in diffscaler_core/schedule.py reads. No DOM.

import { INTERPOLATIONS } from "./curve_maths.js";
import { say } from "./texts.js";

/** @typedef {import("./curve_maths.js").Point} Point */
/** @typedef {import("./curve_maths.js").Interpolation} Interpolation */
/** @typedef {"scale" | "shift" | "subspace"} Part */

/**
 * A point as it is written. Part "" stands for all parts without points of their own.
 * @typedef {{part: Part | "", percent: number, factor: number, start: number, end: number}} Entry
 */

/**
 * @typedef {object} Schedule
 * @property {Entry[]} entries In the text's order.
 * @property {Record<Part, Point[]>} parts Each part's points by percent, at least one.
 * @property {Interpolation} interpolation
 */

export const PARTS = /** @type {Part[]} */ (["scale", "shift", "subspace"]);

// Python's line ends and white space; JavaScript's \s differs.
const LINE = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/;
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const ENTRY = new RegExp(
  `^(?:([A-Za-z_]+)[${SPACE}]+)?([^${SPACE}:]+)[${SPACE}]*:[${SPACE}]*([^${SPACE}]+)$`,
);
const DIGITS = "\\d+(?:_\\d+)*";
const NUMBER = new RegExp(
  `^[+-]?(?:${DIGITS}\\.?(?:${DIGITS})?|\\.${DIGITS})(?:[eE][+-]?${DIGITS})?$`,
);
const EDGES = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "g");

/** Python's str.strip. @param {string} text */
export const strip = (text) => text.replace(EDGES, "");

/**
 * Returns what a text says.
 * @param {string} text
 * @param {Interpolation} interpolation Unless the text says.
 * @returns {Schedule}
 * @throws {Error} A line that cannot be read, which the message names, or no point.
 */
export function parse(text, interpolation) {
  /** @type {Entry[]} */
  const entries = [];
  linesOf(text).forEach(({ pieces }, row) => {
    for (const { word, start, end } of pieces) {
      if (Object.hasOwn(INTERPOLATIONS, word)) interpolation = /** @type {Interpolation} */ (word);
      else if (word) entries.push({ ...readEntry(word, say("where", row + 1, word)), start, end });
    }
  });
  if (!entries.length) throw new Error(say("noPoint"));
  const parts = /** @type {Record<Part, Point[]>} */ ({});
  for (const part of PARTS) parts[part] = pointsOf(entries, part);
  return { entries, parts, interpolation };
}

/**
 * Returns the entries written for a part, by percent.
 * @param {Entry[]} entries
 * @param {Part | ""} part
 */
export function entriesOf(entries, part) {
  return entries.filter((entry) => entry.part === part).sort((a, b) => a.percent - b.percent);
}

/**
 * Returns the least and the greatest percent that a point may be moved to without passing another.
 * @param {Entry[]} own The part's entries by percent.
 * @param {number} index
 * @param {number} step The least distance between percents.
 * @returns {[number, number]}
 */
export function limits(own, index, step) {
  const { start } = own[index];
  const [farBefore, before, , after, farAfter] = [-2, -1, 0, 1, 2].map((by) => own[index + by]);
  // at the percent of a neighbour a point makes a jump with it, in the order they are written in
  const joins = (/** @type {Entry | undefined} */ next, /** @type {Entry | undefined} */ far) =>
    next !== undefined && far?.percent !== next.percent;
  const low = !before ? 0
    : joins(before, farBefore) && before.start < start ? before.percent : before.percent + step;
  const high = !after ? 1
    : joins(after, farAfter) && after.start > start ? after.percent : after.percent - step;
  return [low, high];
}

/**
 * Returns the text with a point changed.
 * @param {string} text
 * @param {Entry} entry
 * @param {number} percent
 * @param {number} factor
 */
export function withMoved(text, entry, percent, factor) {
  const written = write(entry.part, percent, factor);
  return text.slice(0, entry.start) + written + text.slice(entry.end);
}

/**
 * Returns the text without a point; its line goes too if nothing else is on it.
 * @param {string} text
 * @param {Entry} entry
 */
export function withRemoved(text, entry) {
  const line = lineAt(text, entry.start);
  const index = line.pieces.findIndex((piece) => piece.start === entry.start);
  const others = line.pieces.filter((piece, i) => i !== index && piece.word);
  const hasComment = line.bodyEnd < line.end;
  if (!others.length && !hasComment) {
    const before = text.slice(0, line.start);
    if (line.next > line.end) return before + text.slice(line.next);
    return before.replace(/\r?\n$/, ""); // it was the last line, and the one before is now
  }
  const following = line.pieces[index + 1];
  if (following) return text.slice(0, line.pieces[index].from) + text.slice(following.from);
  const from = index ? line.pieces[index].from - 1 : line.pieces[index].start;
  return text.slice(0, from) + text.slice(entry.end);
}

/**
 * Returns the text with one more point, written among those of its part.
 * @param {string} text
 * @param {Entry[]} entries The text's.
 * @param {Part | ""} part
 * @param {Point} point
 * @returns {{text: string, start: number}} Where it is written.
 */
export function withAdded(text, entries, part, [percent, factor]) {
  const written = write(part, percent, factor);
  const own = entriesOf(entries, part);
  const next = own.find((entry) => entry.percent > percent);
  const last = own[own.length - 1];
  /** @type {(at: number, before: string, after: string) => {text: string, start: number}} */
  const put = (at, before, after) => ({
    text: text.slice(0, at) + before + written + after + text.slice(at),
    start: at + before.length,
  });
  if (next) return isAlone(text, next) ? put(next.start, "", "\n") : put(next.start, "", ", ");
  if (!last) return put(text.length, text && !/\n$/.test(text) ? "\n" : "", "");
  return isAlone(text, last) ? put(lineAt(text, last.start).end, "\n", "") : put(last.end, ", ", "");
}

/**
 * Returns a point as text.
 * @param {Part | ""} part
 * @param {number} percent
 * @param {number} factor
 */
export function write(part, percent, factor) {
  return `${part && `${part} `}${short(percent)}: ${short(factor)}`;
}

/** @param {number} number */
const short = (number) => String(Math.round(number * 1e6) / 1e6);

/**
 * @param {string} word
 * @param {string} where
 * @returns {{part: Part | "", percent: number, factor: number}}
 */
function readEntry(word, where) {
  const found = ENTRY.exec(word);
  if (!found) throw new Error(say("noEntry", where));
  const part = /** @type {Part | ""} */ (found[1] ?? "");
  if (part && !PARTS.includes(part)) {
    throw new Error(say("noPart", where, part, PARTS.join(", ")));
  }
  const [percent, factor] = [found[2], found[3]].map((told) => {
    const number = NUMBER.test(told) ? Number(told.replaceAll("_", "")) : NaN;
    if (!Number.isFinite(number)) throw new Error(say("noNumber", where, told));
    return number;
  });
  if (!(percent >= 0 && percent <= 1)) {
    throw new Error(say("noPercent", where));
  }
  return { part, percent, factor };
}

/**
 * @param {Entry[]} entries
 * @param {Part} part
 * @returns {Point[]}
 */
function pointsOf(entries, part) {
  const own = entriesOf(entries, part);
  const points = (own.length ? own : entriesOf(entries, "")).map(
    ({ percent, factor }) => /** @type {Point} */ ([percent, factor]),
  );
  const third = points.findIndex(([percent], i) => i > 1 && points[i - 2][0] === percent);
  if (third > 0) throw new Error(say("tooMany", points[third][0], part));
  return points.length ? points : [[0, 1]];
}

/**
 * A stretch between separators (from..to) and the word in it (start..end).
 * @typedef {{word: string, from: number, start: number, end: number}} Piece
 * @typedef {{start: number, bodyEnd: number, end: number, next: number, pieces: Piece[]}} Line
 */

/**
 * @param {string} text
 * @returns {Line[]}
 */
function linesOf(text) {
  const lines = [];
  for (let start = 0; start < text.length;) {
    const found = LINE.exec(text.slice(start));
    const end = found ? start + found.index : text.length;
    const next = found ? end + found[0].length : text.length;
    const hash = text.slice(start, end).indexOf("#");
    const bodyEnd = hash < 0 ? end : start + hash;
    let from = start;
    const pieces = text.slice(start, bodyEnd).split(/[,;]/).map((piece) => {
      const word = strip(piece);
      const at = from + (word ? piece.indexOf(word) : 0);
      const told = { word, from, start: at, end: at + word.length };
      from += piece.length + 1;
      return told;
    });
    lines.push({ start, bodyEnd, end, next, pieces });
    start = next;
  }
  return lines;
}

/**
 * @param {string} text
 * @param {number} at
 */
function lineAt(text, at) {
  const line = linesOf(text).find(({ start, next }) => start <= at && at < next);
  if (!line) throw new RangeError(`nothing is written at ${at}`);
  return line;
}

/**
 * Says whether an entry has its line for itself.
 * @param {string} text
 * @param {Entry} entry
 */
function isAlone(text, entry) {
  return lineAt(text, entry.start).pieces.filter(({ word }) => word).length === 1;
}
