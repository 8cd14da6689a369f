// What a task file says of itself, for people to choose by. No DOM, no network.

import { say } from "./texts.js";

/**
 * @typedef {object} TaskFacts
 * @property {string} file As the node's input names it.
 * @property {string} title
 * @property {string} family The base it was made for; "" if the file does not say.
 * @property {string} description
 * @property {string} words Its trigger, stored prompts or kind of control; "" without any.
 * @property {string} size "" if unknown.
 * @property {string} picture A data URI; "" without one.
 * @property {string} problem Why there are no facts; "" if there are.
 */

const PICTURE = /^data:image\/(?:jpeg|png|webp);base64,[A-Za-z0-9+/=\s]+$/;
const SHOWN_PROMPTS = 6;

/**
 * Returns the facts in a file's header. Whatever is missing or not as it should be is left out.
 * @param {string} file
 * @param {Record<string, string> | null} metadata Null: the header could not be had.
 * @param {number} [bytes] The file's size.
 * @returns {TaskFacts}
 */
export function factsOf(file, metadata, bytes) {
  const config = asObject(metadata?.["diffscaler.config"]);
  const name = file.replace(/\.safetensors$/, "");
  const picture = text(metadata?.["modelspec.thumbnail"]);
  return {
    file,
    title: text(metadata?.["modelspec.title"]) || text(config.name) || name,
    family: text(config.base?.family),
    description: text(metadata?.["modelspec.description"]),
    words: wordsOf(config),
    size: bytes === undefined ? "" : sizeOf(bytes),
    picture: PICTURE.test(picture) ? picture : "",
    problem: problemOf(metadata),
  };
}

/**
 * Says whether a task has all the words of a search, and the base.
 * @param {TaskFacts} facts
 * @param {string} search
 * @param {string} family "": any.
 */
export function matches(facts, search, family) {
  if (family && facts.family !== family) return false;
  const { file, title, description, words } = facts;
  const all = [file, title, facts.family, description, words].join("\n").toLowerCase();
  return search.toLowerCase().split(/\s+/).every((word) => all.includes(word));
}

/** @param {Record<string, string> | null} metadata */
function problemOf(metadata) {
  if (!metadata) return say("noHeader");
  return metadata["diffscaler.format"] ? "" : say("noTask");
}

/** @param {Record<string, any>} config */
function wordsOf(config) {
  if (text(config.trigger)) return say("trigger", config.trigger);
  if (text(config.control?.kind)) return say("control", config.control.kind);
  const prompts = Array.isArray(config.prompts) ? config.prompts.map(text).filter(Boolean) : [];
  if (!prompts.length) return "";
  const more = prompts.length - SHOWN_PROMPTS;
  const shown = prompts.slice(0, SHOWN_PROMPTS).join(", ");
  return more > 0 ? say("promptsMore", shown, more) : say("prompts", shown);
}

/** @param {number} bytes */
function sizeOf(bytes) {
  if (bytes >= 2 ** 20) return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  return bytes >= 1024 ? `${(bytes / 1024).toFixed(0)} KiB` : `${bytes} bytes`;
}

/** @param {unknown} value */
const text = (value) => (typeof value === "string" ? value : "");

/** @param {string | undefined} json @returns {Record<string, any>} */
function asObject(json) {
  try {
    const value = JSON.parse(json ?? "");
    return value && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}
