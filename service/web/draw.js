// Making elements. Text is only ever set as text: nothing that others wrote becomes markup.

import { thumbnail } from "./ask.js";
import * as key from "./key.js";

const SVG = "http://www.w3.org/2000/svg";
export const $ = (id) => document.getElementById(id);

export const MARKS = {
  open: "M8 4H5a1 1 0 0 0-1 1v10a1 1 0 0 0 1 1h10a1 1 0 0 0 1-1v-3M12 4h4v4M16 4l-7 7",
  more: "M10 4.5v11M4.5 10h11",
  less: "M4.5 10h11",
  close: "m6 6 8 8M14 6l-8 8",
  remove: "M4 6h12M8 6V4.5h4V6M6 6l.7 9.5h6.6L14 6M8.7 9v4M11.3 9v4",
};

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") made.className = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const drawing = (path) => svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: path }));

/** The small picture of an item, or its id where there is none. */
export function thumb(item) {
  const frame = element("span", { class: "thumb" });
  const blank = () => {
    frame.replaceChildren(item.id);
    frame.classList.add("blank");
  };
  const address = thumbnail(item.image);
  if (!address) {
    blank();
    return frame;
  }
  const image = element("img", { alt: "", draggable: "false", decoding: "async" });
  image.addEventListener("error", blank);
  key.show(image, address);
  frame.append(image);
  return frame;
}

/** A word that can be taken away again. */
export function chip(text, { remove, spoken, picture = null }) {
  const button = element("button", { class: "chip-remove", type: "button", "aria-label": spoken }, drawing(MARKS.close));
  button.addEventListener("click", remove);
  return element("li", { class: picture ? "chip pictured" : "chip" }, picture, element("span", { class: "chip-text" }, text), button);
}

/** Tell who does not see the page what changed on it. */
export function say(text) {
  $("live").textContent = text;
}

/** A fingerprint by its beginning; what is called otherwise, as it is. */
export const short = (model, digits) => (/^[0-9a-f]{32,}$/.test(model) ? model.slice(0, digits) : model);

export const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

export const pictures = (count) => plural(count, "picture", "pictures");

export function size(bytes) {
  if (bytes >= 1024 ** 3) return `${(bytes / 1024 ** 3).toFixed(1)}\u00a0GB`;
  if (bytes < 1024 ** 2) return `${Math.max(1, Math.round(bytes / 1024))}\u00a0KB`;
  return `${(bytes / 1024 ** 2).toFixed(bytes % 1048576 ? 1 : 0)}\u00a0MB`;
}

export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en")}\u00a0ms`;

/** Call `act` once the calls have stopped for a while. */
export function settled(act, pause = 250) {
  let waiting;
  return (...given) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => act(...given), pause);
  };
}
