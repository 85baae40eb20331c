// Filters from what the items carry: text becomes choices, numbers and dates become ranges. Nobody has to declare fields.
//
// A sample of items names the fields and most of their values. The rest is asked for as it is needed: items whose value
// is none of those known, until there are none left.

import { ask, place } from "./ask.js";
import { $, element, settled } from "./draw.js";

const FEW = 10; // choices that stand open; more have a box to type in
const MOST = 200; // choices that are known of
const ROUNDS = 12;
const DEEPEST = 3; // objects within objects
const DAY = /^\d{4}-\d\d-\d\d([T ][\d:.,]+(Z|[+-]\d\d:?\d\d)?)?$/;

let open = []; // the fields of the collection that is shown
let chosen = new Map(); // path -> Set of values, or {gte, lte} as typed
let changed = () => {};

/** @param listener called with nothing, when the filter is another one. */
export function listenToFilters(listener) {
  changed = listener;
  $("refine").addEventListener("toggle", () => $("refine").open && open.forEach(complete));
}

// What there is to filter by

/** The values at every path of these items: path -> {values: Map of value -> how many items, kind}. */
function gather(items) {
  const found = new Map();
  for (const item of items) {
    for (const [path, value] of leaves(item.payload ?? {}, "", 0)) {
      if (!found.has(path)) found.set(path, new Map());
      const values = found.get(path);
      values.set(value, (values.get(value) ?? 0) + 1);
    }
  }
  return found;
}

function* leaves(value, path, depth) {
  if (value === null || value === undefined) return;
  if (Array.isArray(value)) {
    for (const entry of value) {
      if (entry !== null && typeof entry === "object") {
        if (!Array.isArray(entry) && depth < DEEPEST) yield* leaves(entry, `${path}[]`, depth);
      } else if (entry !== null) yield [path, entry];
    }
  } else if (typeof value === "object") {
    if (depth >= DEEPEST) return;
    for (const [name, below] of Object.entries(value)) {
      const step = stepOf(name);
      if (step) yield* leaves(below, path ? `${path}.${step}` : step, depth + 1);
    }
  } else yield [path, value];
}

/** A name as a step of a path; null for one that cannot be asked for. */
function stepOf(name) {
  if (!name || /["\\\u0000-\u001f]/.test(name)) return null;
  return /[.[\]]/.test(name) ? `"${name}"` : name;
}

function fieldOf(path, values, items) {
  const all = [...values.keys()];
  const texts = all.filter((value) => typeof value === "string");
  if (all.every((value) => typeof value === "number")) {
    return all.length > 1 ? { path, kind: "number", low: Math.min(...all), high: Math.max(...all) } : null;
  }
  if (texts.length === all.length && all.length > 1 && all.every((text) => DAY.test(text))) {
    const sorted = texts.sort();
    return { path, kind: "date", low: sorted[0].slice(0, 10), high: sorted.at(-1).slice(0, 10) };
  }
  const own = items > FEW && all.length >= items * 0.9; // a name of every single item is nothing to choose from
  if (own || all.some((value) => String(value).length > 80)) return null;
  return { path, kind: "choice", values, whole: false };
}

/** Find out what the items of a collection can be filtered by, and offer it. */
export function offerFilters(collection, items, { able }) {
  chosen = new Map();
  open = [];
  if (able) {
    const fields = [...gather(items)].map(([path, values]) => fieldOf(path, values, items.length));
    open = fields.filter((field) => field !== null).map((field) => ({ ...field, collection }));
  }
  const rank = { choice: 0, number: 1, date: 2 };
  open.sort((one, other) => rank[one.kind] - rank[other.kind] || (other.path === "label") - (one.path === "label"));
  $("fields").replaceChildren(...open.map(draw));
  if ($("refine").open) open.forEach(complete);
}

/** Ask for the values of a field that the sample did not show. */
async function complete(field) {
  if (field.kind !== "choice" || field.whole) return;
  field.whole = true;
  try {
    for (let round = 0; round < ROUNDS && field.values.size < MOST; round += 1) {
      const others = { must: [{ key: field.path, match: { except: [...field.values.keys()] } }] };
      const query = new URLSearchParams({ limit: 200, filter: JSON.stringify(others) });
      const { items } = await ask(`${place(field.collection, "items")}?${query}`);
      const news = gather(items).get(field.path) ?? new Map();
      const fresh = [...news].filter(([value]) => !field.values.has(value));
      if (!fresh.length) break;
      for (const [value, count] of fresh) field.values.set(value, count);
    }
  } catch {
    return; // the choices that are known are of use as they are
  }
  if (open.includes(field) && !field.frame.contains(document.activeElement)) redraw(field);
}

// Drawing

const nameOf = (path) => path.replaceAll(/"|\[\]/g, "").replaceAll(".", " · ").replaceAll("_", " ");

function draw(field) {
  field.frame = element("fieldset", { class: "field" }, element("legend", {}, nameOf(field.path)));
  field.frame.dataset.path = field.path;
  field.frame.append(...(field.kind === "choice" ? choices(field) : [range(field)]));
  return field.frame;
}

function redraw(field) {
  const old = field.frame;
  if (old.isConnected) old.replaceWith(draw(field));
}

const wordOf = (value) => ({ true: "yes", false: "no" })[value] ?? String(value);

function choices(field) {
  const picked = chosen.get(field.path) ?? new Set();
  const common = [...field.values].sort((one, other) => other[1] - one[1]).map(([value]) => value);
  const many = common.length > FEW;
  const shown = many ? [...new Set([...common.slice(0, FEW - 2), ...picked])] : common;
  shown.sort((one, other) => String(one).localeCompare(String(other), "en", { numeric: true }));
  const pills = shown.map((value) => {
    const pill = element("button", { class: "pill", type: "button", "aria-pressed": String(picked.has(value)) }, wordOf(value));
    pill.addEventListener("click", () => {
      pick(field, value);
      pill.setAttribute("aria-pressed", String(chosen.get(field.path)?.has(value) ?? false));
    });
    return pill;
  });
  const parts = [element("div", { class: "pills" }, ...pills)];
  if (many) parts.push(...finder(field, common));
  return parts;
}

/** A box to type one of many values into. */
function finder(field, values) {
  const list = `values-${open.indexOf(field)}`;
  const box = element("input", {
    class: "box", type: "text", list, placeholder: `${values.length >= MOST ? "More than " : ""}${values.length} values`,
    "aria-label": `Another value of ${nameOf(field.path)}`, autocomplete: "off", spellcheck: "false",
  });
  const known = new Map(values.map((value) => [wordOf(value), value]));
  box.addEventListener("change", () => {
    const text = box.value.trim();
    if (!text) return;
    box.value = "";
    const value = known.get(text) ?? text; // a value that was not seen yet may be there all the same
    if (!field.values.has(value)) field.values.set(value, 0);
    if (!chosen.get(field.path)?.has(value)) pick(field, value);
    redraw(field);
    field.frame.querySelector("input")?.focus();
  });
  return [box, element("datalist", { id: list }, ...values.map((value) => element("option", { value: wordOf(value) })))];
}

function range(field) {
  const now = chosen.get(field.path) ?? {};
  const type = field.kind;
  const input = (end, word, hint) => {
    const box = element("input", {
      class: "box", type, "aria-label": `${nameOf(field.path)} ${word}`, value: now[end] ?? "",
      ...(type === "number" ? { placeholder: String(hint), step: "any", inputmode: "decimal" } : { min: field.low, max: field.high }),
    });
    const read = () => {
      const bounds = { ...chosen.get(field.path), [end]: box.validity.valid || type === "date" ? box.value : "" };
      if (bounds.gte || bounds.lte) chosen.set(field.path, bounds);
      else chosen.delete(field.path);
      changed();
    };
    box.addEventListener("input", settled(read, 400));
    return box;
  };
  return element("div", { class: "ends" }, input("gte", "from", field.low), element("span", { "aria-hidden": "true" }, "to"), input("lte", "to", field.high));
}

function pick(field, value) {
  const picked = chosen.get(field.path) ?? new Set();
  if (!picked.delete(value)) picked.add(value);
  if (picked.size) chosen.set(field.path, picked);
  else chosen.delete(field.path);
  changed();
}

// What was chosen

/** The filter for the service; null for none. `without` is an id that must not be among the hits. */
export function filterNow(without = null) {
  const must = [];
  for (const { path, kind } of open) {
    const picked = chosen.get(path);
    if (!picked) continue;
    if (kind === "choice") must.push({ key: path, match: { any: [...picked] } });
    else must.push({ key: path, range: boundsOf(kind, picked) });
  }
  const filter = { ...(must.length ? { must } : {}), ...(without === null ? {} : { must_not: [{ has_id: [without] }] }) };
  return Object.keys(filter).length ? filter : null;
}

function boundsOf(kind, { gte, lte }) {
  const bounds = {};
  if (kind === "number") {
    if (gte) bounds.gte = Number(gte);
    if (lte) bounds.lte = Number(lte);
  } else {
    if (gte) bounds.gte = gte;
    if (lte) bounds.lt = dayAfter(lte); // the whole of the last day
  }
  return bounds;
}

function dayAfter(day) {
  const date = new Date(`${day}T00:00:00Z`);
  date.setUTCDate(date.getUTCDate() + 1);
  return date.toISOString().slice(0, 10);
}

/** What was chosen, in words: [{text, remove}]. */
export function chosenNow() {
  return open.filter(({ path }) => chosen.has(path)).map((field) => {
    const picked = chosen.get(field.path);
    const { gte, lte } = picked;
    const what = field.kind === "choice" ? [...picked].map(wordOf).join(" or ") : [gte && `from ${gte}`, lte && `to ${lte}`].filter(Boolean).join(" ");
    return {
      text: `${nameOf(field.path)}: ${what}`,
      remove() {
        chosen.delete(field.path);
        redraw(field);
        changed();
      },
    };
  });
}

export function clearFilters() {
  chosen = new Map();
  open.forEach(redraw);
}

/** The values of a field that are known, in order: for suggestions. */
export function valuesOf(path) {
  const field = open.find((other) => other.path === path && other.kind === "choice");
  return field ? [...field.values.keys()].map(String).sort() : [];
}
