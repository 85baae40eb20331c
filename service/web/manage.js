// Adding pictures and deleting items. Nothing is ever replaced: a picture whose id is taken gets another one.

import { ask, place, upload, Problem } from "./ask.js";
import { $, element, pictures, say, size } from "./draw.js";
import { valuesOf } from "./filters.js";

const AT_ONCE = 2;
const DENIED = new Set(["forbidden", "read-only"]);

let context = { collection: null, most: Infinity, changed() {}, denied() {} };
let queue = []; // {file, row, bar, word, state: "waits" | "goes" | "done" | "failed"}
let giving = null; // AbortController while pictures are sent

/**
 * @param listeners changed(collection): it holds something else now; denied(problem): this visitor may not write.
 */
export function listenToManaging(listeners) {
  Object.assign(context, listeners);
  $("add-open").addEventListener("click", openAdding);
  $("add-file").addEventListener("change", () => {
    stage([...$("add-file").files]);
    $("add-file").value = "";
  });
  $("add-choose").addEventListener("click", () => $("add-file").click());
  $("add-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (queue.some((entry) => entry.state === "waits")) send();
    else $("add").close();
  });
  $("add-cancel").addEventListener("click", () => (giving ? giving.abort() : $("add").close()));
  $("add").addEventListener("cancel", (event) => giving && event.preventDefault());
  $("add").addEventListener("close", () => (queue = []));
}

/** The collection that pictures go to, and how large a file may be. */
export function manage(collection, most) {
  Object.assign(context, { collection, most });
}

// Adding

function openAdding() {
  queue = [];
  $("add-list").replaceChildren();
  $("add-problem").hidden = true;
  $("add-label").value = "";
  $("add-labels").replaceChildren(...valuesOf("label").map((value) => element("option", { value })));
  $("add-where").textContent = context.collection;
  $("add").showModal();
  tell();
}

export const adding = () => $("add").open;

/** Put files on the list of what is to be added. */
export function stage(files) {
  if (giving) return;
  const images = files.filter((file) => file.type.startsWith("image/") || !file.type);
  for (const file of images) {
    const bar = element("progress", { max: 1, value: 0, "aria-label": `Progress of ${file.name}` });
    const word = element("span", { class: "add-word" }, size(file.size));
    const row = element("li", { class: "add-row" }, element("span", { class: "add-name" }, file.name), word, bar);
    const entry = { file, row, bar, word, state: "waits" };
    if (file.size > context.most) fail(entry, `larger than ${size(context.most)}`);
    queue.push(entry);
    $("add-list").append(row);
  }
  tell();
}

function fail(entry, why) {
  entry.state = "failed";
  entry.word.textContent = why;
  entry.row.classList.add("failed");
  entry.bar.hidden = true;
}

/** The state of the list, in the buttons and in one line. */
function tell() {
  const count = (state) => queue.filter((entry) => entry.state === state).length;
  const [waits, done, failed] = [count("waits"), count("done"), count("failed")];
  const ended = queue.length > 0 && !waits && !giving;
  $("add-submit").disabled = Boolean(giving) || !queue.length;
  $("add-submit").textContent = ended ? "Done" : waits ? `Add ${pictures(waits)}` : "Add";
  $("add-cancel").textContent = giving ? "Stop" : "Cancel";
  $("add-cancel").hidden = ended;
  $("add-choose").disabled = $("add-label").disabled = Boolean(giving);
  const parts = [giving || ended ? `${done} of ${queue.length} added` : "", failed ? `${failed} could not be` : ""];
  $("add-status").textContent = parts.filter(Boolean).join(" · ");
}

async function send() {
  giving = new AbortController();
  const { signal } = giving;
  const { collection } = context;
  const label = $("add-label").value.trim();
  $("add-problem").hidden = true;
  tell();
  try {
    const waiting = queue.filter((entry) => entry.state === "waits");
    const ids = await freeIds(collection, waiting.map(({ file }) => idOf(file.name, label)));
    waiting.forEach((entry, position) => (entry.id = ids[position]));
    const worker = async () => {
      for (let entry = waiting.shift(); entry && !signal.aborted; entry = waiting.shift()) await one(collection, entry, label, signal);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  } catch (error) {
    if (error.name !== "AbortError") refuse(error);
  } finally {
    giving = null;
    tell();
    const added = queue.filter((entry) => entry.state === "done").length;
    if (added) context.changed(collection);
    if (!queue.some((entry) => entry.state === "waits")) $("add-submit").focus();
  }
}

async function one(collection, entry, label, signal) {
  entry.state = "goes";
  entry.row.scrollIntoView({ block: "nearest" });
  const form = new FormData();
  form.append("file", entry.file, entry.file.name);
  form.append("payload", JSON.stringify(label ? { label } : {}));
  try {
    const progress = (share) => (entry.bar.value = 0.9 * share);
    await upload(place(collection, "items", entry.id), form, { signal, progress, headers: { "If-None-Match": "*" } });
    entry.state = "done";
    entry.bar.value = 1;
    entry.word.textContent = "added";
    entry.row.classList.add("done");
  } catch (error) {
    if (error.name === "AbortError" || DENIED.has(error.slug)) {
      entry.state = "waits";
      entry.bar.value = 0;
      throw error;
    }
    fail(entry, error.message);
  }
  tell();
}

/** Nothing can be added: said in the dialog, and the controls go. */
function refuse(error) {
  giving?.abort();
  $("add-problem-title").textContent = error instanceof Problem ? error.title : "The page failed";
  $("add-problem-detail").textContent = error.message;
  $("add-problem").hidden = false;
  if (DENIED.has(error.slug)) context.denied(error);
}

function idOf(name, label) {
  const plain = name.replaceAll(/[^\p{L}\p{N}\p{P}\p{S} ]/gu, "").trim().slice(-200) || "picture";
  return label ? `${label.slice(0, 200)}/${plain}` : plain;
}

/** These ids, with a number where an item has one already: nobody's picture is replaced by chance. */
async function freeIds(collection, ids) {
  const taken = new Set();
  const numbered = (id, number) => (number < 2 ? id : id.replace(/(\.[^./]*)?$/, ` (${number})$1`));
  const free = [];
  let open = ids.map((id, position) => ({ id, position, number: 1 }));
  while (open.length) {
    for (const entry of open) while (taken.has(numbered(entry.id, entry.number))) entry.number += 1;
    const asked = [...new Set(open.map((entry) => numbered(entry.id, entry.number)))];
    for (const id of await existing(collection, asked)) taken.add(id);
    const next = [];
    for (const entry of open) {
      const id = numbered(entry.id, entry.number);
      if (taken.has(id)) next.push(entry);
      else {
        free[entry.position] = id;
        taken.add(id);
      }
    }
    open = next;
  }
  return free;
}

async function existing(collection, ids) {
  const found = [];
  for (let start = 0; start < ids.length; start += 20) { // an address has its limits
    const query = new URLSearchParams({ limit: 20, filter: JSON.stringify({ must: [{ has_id: ids.slice(start, start + 20) }] }) });
    found.push(...(await ask(`${place(collection, "items")}?${query}`)).items.map((item) => item.id));
  }
  return found;
}

// Deleting

/** Ask whether an item is to go, and delete it; whether it is gone. */
export async function confirmDelete(collection, item, picture) {
  const dialog = $("remove");
  $("remove-name").textContent = item.id;
  $("remove-picture").replaceChildren(picture);
  $("remove-problem").hidden = true;
  dialog.returnValue = "";
  dialog.showModal();
  $("remove-cancel").focus();
  return new Promise((resolve) => {
    const ended = new AbortController();
    const listening = { signal: ended.signal };
    let gone = false;
    $("remove-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      $("remove-submit").disabled = true;
      try {
        await ask(place(collection, "items", item.id), { method: "DELETE" });
        gone = true;
      } catch (error) {
        if (error.slug === "unknown-item") gone = true; // somebody else was quicker
        else {
          $("remove-problem").textContent = error.message;
          $("remove-problem").hidden = false;
          if (DENIED.has(error.slug)) context.denied(error);
        }
      } finally {
        $("remove-submit").disabled = false;
      }
      if (gone) dialog.close();
    }, listening);
    $("remove-cancel").addEventListener("click", () => dialog.close(), listening);
    dialog.addEventListener("close", () => {
      ended.abort();
      if (gone) {
        say(`${item.id} was deleted`);
        context.changed(collection);
      }
      resolve(gone);
    }, listening);
  });
}
