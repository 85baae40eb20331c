// The search page. No framework and no build: the browser's own modules, and text only ever set as text.
//
// A search is a step: an uploaded picture, or an item of the collection. Steps form a trail; going back in the browser
// goes back along it. Addresses are relative, so that the page also works below a prefix of a proxy.

import { Problem, ask, askWith, local, place, thumbnail } from "./ask.js";
import { cropping, cut } from "./crop.js";
import { $, MARKS, chip, drawing, element, pictures, plural, say, settled, short, size, thumb } from "./draw.js";
import { chosenNow, clearFilters, filterNow, listenToFilters, offerFilters } from "./filters.js";
import * as key from "./key.js";
import { adding, confirmDelete, listenToManaging, manage, stage } from "./manage.js";
import { showStatus } from "./status.js";

const PAGE = 24;
const SAMPLES = 24;
const KNOWN = 1000; // items that are looked at for fields to filter by
const STATUS = "#/status";

const state = {
  collections: new Map(),
  collection: null, // null: the address names one that is not there
  first: null, // the collection that is meant when the address names none
  about: null, // what the service says about the collection: a promise
  trail: [],
  at: -1, // the step that is shown; -1 is the start
  seen: new Set(), // ids of the hits that are shown
  cursor: null, // where the next page starts, once there was a second one
  threshold: 0, // hits are at least so similar; 0 takes all
  denied: false, // this visitor was refused to write
  most: 16 * 1024 * 1024,
  asking: null, // AbortController of the request under way
};

let crop;

// Drawing

/** The id without the folders down to the one that only repeats the label. */
function shortId(item) {
  const cut = `/${item.id}`.lastIndexOf(`/${item.label}/`);
  return cut < 0 ? item.id : item.id.slice(cut + item.label.length + 1);
}

function card(item, position) {
  const name = item.label ?? item.id;
  const scored = item.score !== undefined;
  const score = scored ? item.score.toFixed(3) : null;
  const button = element(
    "button",
    {
      class: "hit",
      type: "button",
      title: scored ? `${item.id}\nSimilarity ${item.score.toFixed(4)}` : item.id,
      "aria-label": scored ? `${name}, similarity ${score}. More like this` : `More like ${name}`,
    },
    thumb(item),
  );
  button.dataset.id = item.id;
  if (scored) {
    const fill = element("span", { class: "fill" });
    fill.style.setProperty("--score", Math.max(0, Math.min(1, item.score)));
    button.append(
      element("span", { class: "caption" }, element("span", { class: "label" }, name), element("span", { class: "score" }, score)),
      element("span", { class: "track", "aria-hidden": "true" }, fill),
    );
    if (item.label) button.append(element("span", { class: "id" }, shortId(item)));
  }
  button.addEventListener("click", () => follow(stepOf({ kind: "item", id: item.id, label: item.label, image: item.image })));
  const entry = element("li", { class: "card" }, button);
  entry.style.setProperty("--place", Math.min(position, 24));
  if (scored) entry.append(actions(item, name));
  return entry;
}

/** What can be done with a hit besides following it. */
function actions(item, name) {
  const button = (mark, label, act) => {
    const made = element("button", { class: "action", type: "button", "aria-label": label, title: label }, drawing(mark));
    made.addEventListener("click", act);
    return made;
  };
  const row = element(
    "div",
    { class: "actions" },
    button(MARKS.more, `More of this: ${name}`, () => exemplify(item, "positive")),
    button(MARKS.less, `Less of this: ${name}`, () => exemplify(item, "negative")),
  );
  if (item.image) {
    const open = element("a", { class: "action open", href: local(item.image), target: "_blank", rel: "noopener", "aria-label": `Open the picture of ${name}`, title: "Open the picture" });
    key.follow(open, local(item.image));
    open.append(drawing(MARKS.open));
    row.append(open);
  }
  const remove = button(MARKS.remove, `Delete ${name}`, () => discard(item));
  remove.classList.add("writing");
  row.append(remove);
  return row;
}

async function discard(item) {
  const cards = [...document.querySelectorAll(".card")];
  const here = cards.findIndex((entry) => entry.querySelector(".hit").dataset.id === item.id);
  if (!(await confirmDelete(state.collection, item, thumb(item)))) return;
  cards[here]?.remove();
  (cards[here + 1] ?? cards[here - 1])?.querySelector(".hit").focus({ preventScroll: true });
}

function showSkeletons(count) {
  const bones = Array.from({ length: count }, () =>
    element("li", { class: "skeleton", "aria-hidden": "true" }, element("span", { class: "thumb" }), element("span", { class: "bone" })),
  );
  $("grid").replaceChildren(...bones);
}

function showProblem(error) {
  if (error.name === "AbortError") return;
  const known = error instanceof Problem;
  $("problem-title").textContent = known ? error.title : "The page failed";
  $("problem-detail").textContent = known ? error.message : String(error);
  $("problem-type").hidden = !(known && error.type);
  if (known && error.type) $("problem-type").href = local(error.type);
  $("problem-request").textContent = known && error.request_id ? `Request ${error.request_id}` : "";
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" });
  if (!known) throw error;
}

/** @param choices what can be done about it: [text, act]. */
function showEmpty(title, detail, choices = []) {
  const alone = document.body.dataset.view === "unknown"; // nothing else on the page is a heading then
  for (const [name, value] of [["role", "heading"], ["aria-level", "1"]]) {
    if (alone) $("empty-title").setAttribute(name, value);
    else $("empty-title").removeAttribute(name);
  }
  $("empty-title").textContent = title;
  $("empty-detail").textContent = detail;
  const buttons = choices.map(([text, act]) => {
    const button = element("button", { class: "button", type: "button" }, text);
    button.addEventListener("click", act);
    return button;
  });
  $("empty-choices").replaceChildren(...buttons);
  $("empty").hidden = false;
  $("grid").replaceChildren();
}

function clear() {
  $("problem").hidden = $("empty").hidden = $("more").hidden = true;
}

// Steps

/** Begin a request that the next one cancels, and show bones if it takes longer than a blink. */
function begin(bones, waits = () => {}) {
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  const before = ["empty", "more"].filter((id) => !$(id).hidden);
  clear();
  $("grid").setAttribute("aria-busy", "true");
  const asked = {
    signal: asking.signal,
    waited: false,
    /** What was shown stays, for the request came to nothing. */
    restore() {
      for (const id of before) $(id).hidden = false;
    },
    end() {
      clearTimeout(waiting);
      if (state.asking === asking) $("grid").removeAttribute("aria-busy");
    },
  };
  const waiting = setTimeout(() => {
    asked.waited = true;
    waits();
    showSkeletons(bones);
  }, 140);
  return asked;
}

/** The answer to a step, from the first hit on or from a cursor on. */
async function search(step, { limit = PAGE, cursor = null, signal }) {
  const { collection } = state;
  const examples = { positive: step.positive.map(({ id }) => id), negative: step.negative.map(({ id }) => id) };
  const part = step.kind === "item" && step.region; // a part of an item's picture is a picture of its own
  const filter = filterNow(part ? step.id : null);
  const params = {
    limit,
    ...(cursor === null ? {} : { cursor }),
    ...(state.threshold > 0 ? { score_threshold: state.threshold } : {}),
    ...(filter === null ? {} : { filter }),
  };
  const asked = { signal, timed: collection };
  if (step.kind === "item" && !part) return askWith(place(collection, "search"), { ...params, query: { id: step.id, ...examples } }, asked);
  const form = new FormData();
  form.append("file", await pictureOf(step), "picture");
  form.append("params", JSON.stringify({ ...params, query: examples }));
  return ask(place(collection, "search", "image"), { method: "POST", body: form, ...asked });
}

/** What is sent for a step: its file, or the region that was selected. */
async function pictureOf(step) {
  if (!step.region) return step.file;
  if (step.part?.of !== step.region) {
    const image = new Image();
    key.show(image, step.url ?? local(step.image));
    await new Promise((resolve, reject) => {
      image.addEventListener("load", resolve, { once: true });
      image.addEventListener("error", () => reject(new Problem({ title: "The picture cannot be cut", detail: "This browser cannot show it." })), { once: true });
    });
    step.part = { of: step.region, blob: await cut(image, step.region) };
  }
  return step.part.blob;
}

const stepOf = (members) => ({ positive: [], negative: [], region: null, ...members });

/**
 * A new step after the one that is shown; what came after that is forgotten. It joins the trail when it is answered: a
 * picture that cannot be read leaves everything as it was, and a message.
 */
async function follow(step) {
  const asked = begin(PAGE, () => drawStep(step));
  try {
    const found = await search(step, { signal: asked.signal });
    asked.end();
    state.trail = [...state.trail.slice(0, state.at + 1), step];
    state.at = state.trail.length - 1;
    history.pushState({ at: state.at }, "", addressOf(step));
    drawStep(step);
    showHits(found);
  } catch (error) {
    asked.end();
    if (error.name === "AbortError") return;
    if (asked.waited) await (state.at < 0 ? showStart() : showStep());
    else asked.restore();
    showProblem(error);
  }
}

function addressOf(step) {
  const parts = [state.collection];
  if (step?.kind === "item") parts.push(step.id);
  return `#${parts.map(encodeURIComponent).join("/")}`;
}

function describe(step) {
  const upload = step.kind === "upload";
  $("query-kind").textContent = upload ? "Your picture" : "More like";
  $("query-name").textContent = upload ? step.name : (step.label ?? step.id);
  $("query-name").title = upload ? step.name : step.id;
  const picture = $("query-image");
  const frame = picture.parentElement;
  const address = upload ? step.url : step.image && local(step.image);
  frame.classList.toggle("blank", !address);
  picture.onerror = () => frame.classList.add("blank");
  picture.alt = upload ? "The picture that is looked for" : `The picture of ${step.label ?? step.id}`;
  $("crop").hidden = !address;
  if (!address) picture.removeAttribute("src");
  else if (picture.dataset.address !== address || !picture.src) key.show(picture, address);
  crop.show(step.region);
}

/** The examples of a step, each of which can be taken away again. */
function drawExamples(step) {
  for (const [kind, list] of [["positive", "liked"], ["negative", "disliked"]]) {
    const entries = step[kind].map((item) => {
      const name = item.label ?? item.id;
      const remove = () => {
        step[kind] = step[kind].filter((other) => other.id !== item.id);
        say(`${name} is no example any more`);
        again();
        $("results-title").focus({ preventScroll: true });
      };
      return chip(name, { remove, picture: thumb(item), spoken: `Take away the example ${name}` });
    });
    $(list).replaceChildren(...entries);
    $(`${list}-part`).hidden = !entries.length;
  }
  $("examples").hidden = !step.positive.length && !step.negative.length;
}

function exemplify(item, kind) {
  const step = state.trail[state.at];
  const other = kind === "positive" ? "negative" : "positive";
  step[other] = step[other].filter(({ id }) => id !== item.id);
  step[kind] = [...step[kind].filter(({ id }) => id !== item.id), item];
  say(`${kind === "positive" ? "More" : "Less"} of ${item.label ?? item.id}`);
  again();
  $("results-title").focus({ preventScroll: true });
}

/** What narrows the results, above them. */
function drawNarrowed() {
  const entries = chosenNow();
  if (state.threshold > 0) entries.push({ text: `Similarity at least ${state.threshold.toFixed(2)}`, remove: () => limitTo(0) });
  const gone = (remove) => () => {
    remove();
    $("results-title").focus({ preventScroll: true });
  };
  $("narrowed").replaceChildren(...entries.map(({ text, remove }) => chip(text, { remove: gone(remove), spoken: `Remove: ${text}` })));
  $("narrowed").hidden = !entries.length;
}

function limitTo(threshold) {
  state.threshold = threshold;
  $("threshold").value = threshold;
  tellThreshold();
  narrow();
}

function tellThreshold() {
  const value = Number($("threshold").value);
  $("threshold-value").textContent = value > 0 ? value.toFixed(2) : "any";
  $("threshold").setAttribute("aria-valuetext", value > 0 ? value.toFixed(2) : "any");
}

/** The same step under other conditions. */
function narrow() {
  drawNarrowed();
  again();
}

function drawTrail() {
  $("trail").hidden = state.trail.length < 2;
  const entries = state.trail.map((step, position) => {
    const upload = step.kind === "upload";
    const current = position === state.at;
    const button = element("button", {
      class: "step",
      type: "button",
      title: upload ? step.name : step.id,
      "aria-label": `Step ${position + 1}: ${upload ? "your picture" : (step.label ?? step.id)}`,
      "aria-current": current ? "step" : null,
    });
    const address = upload ? step.url : thumbnail(step.image);
    if (address) {
      const image = element("img", { alt: "", draggable: "false" });
      image.addEventListener("error", () => image.remove());
      key.show(image, address);
      button.append(image);
    }
    button.addEventListener("click", () => {
      if (!current) history.go(position - state.at);
    });
    return element("li", {}, button);
  });
  $("steps").replaceChildren(...entries);
}

/** Everything about a step but its results. */
function drawStep(step) {
  mark("results");
  $("status").hidden = true;
  $("results").hidden = $("query").hidden = false;
  $("results-title").textContent = "";
  $("facts").textContent = "Looking…";
  document.title = `${step.kind === "upload" ? step.name : (step.label ?? step.id)} · Visual search`;
  describe(step);
  drawExamples(step);
  drawNarrowed();
  drawTrail();
  window.scrollTo({ top: 0, behavior: "instant" });
}

/** Search again for the step that the trail is at, and show it from the top. */
async function showStep() {
  drawStep(state.trail[state.at]);
  await again();
}

/** Search again for the step that the trail is at. */
async function again() {
  const step = state.trail[state.at];
  if (!step) return;
  const asked = begin(PAGE);
  drawExamples(step);
  try {
    const found = await search(step, { signal: asked.signal });
    asked.end();
    showHits(found);
  } catch (error) {
    asked.end();
    if (error.name === "AbortError") return;
    $("grid").replaceChildren();
    $("facts").textContent = $("results-title").textContent = "";
    showProblem(error);
  }
}

function showHits(found) {
  state.seen = new Set(found.hits.map(({ id }) => id));
  state.cursor = null;
  const took = found.took_ms < 10 ? found.took_ms.toFixed(1) : Math.round(found.took_ms);
  $("facts").textContent = `${took} ms · ${found.approximate ? "approximate" : "exact"} search`;
  const narrowed = !$("narrowed").hidden;
  const all = found.total_is_exact ? `Nearest of ${pictures(found.total)}` : `The nearest ${pictures(found.hits.length)}`;
  $("results-title").textContent = found.hits.length ? all : "No picture";
  if (!found.hits.length) {
    if (narrowed) {
      const why = "No picture meets these conditions. Take one away, or lower the similarity.";
      showEmpty("Nothing like this here", why, [["Take all conditions away", widen]]);
    } else showEmpty("Nothing to compare with", "This collection has no other picture yet.");
    return;
  }
  $("grid").replaceChildren(...found.hits.map(card));
  $("more").hidden = found.hits.length < PAGE || (found.total_is_exact && state.seen.size >= found.total);
}

function widen() {
  clearFilters();
  limitTo(0);
  $("results-title").focus({ preventScroll: true });
}

/**
 * The next page. A walk with a cursor neither repeats nor skips, whatever is written meanwhile; it starts when it is first
 * asked for, behind what is shown already, so that a search that nobody pages through costs nothing more.
 */
async function showMore() {
  const step = state.trail[state.at];
  state.asking?.abort();
  const { signal } = (state.asking = new AbortController());
  $("more").disabled = true;
  try {
    const found = await nextPage(step, signal);
    const fresh = found.hits.filter(({ id }) => !state.seen.has(id));
    const cards = fresh.map(card);
    for (const { id } of fresh) state.seen.add(id);
    state.cursor = found.next_cursor;
    $("grid").append(...cards);
    $("more").hidden = found.next_cursor === null;
    say(`${plural(fresh.length, "more picture", "more pictures")}`);
    cards[0]?.querySelector("button").focus({ preventScroll: true });
  } catch (error) {
    showProblem(error);
  } finally {
    $("more").disabled = false;
  }
}

async function nextPage(step, signal) {
  if (state.cursor !== null) {
    try {
      return await search(step, { cursor: state.cursor, signal });
    } catch (error) {
      if (error.slug !== "cursor-expired") throw error;
    }
  }
  const limit = Math.min(1000, state.seen.size + PAGE);
  const { capabilities = [] } = (await state.about) ?? {};
  if (capabilities.includes("generation_cursor")) return search(step, { cursor: "*", limit, signal });
  const found = await search(step, { limit, signal });
  return { ...found, next_cursor: found.hits.length < limit || limit >= 1000 ? null : "" };
}

async function showStart() {
  state.at = -1;
  mark("start");
  document.title = "What looks like this?";
  $("status").hidden = $("query").hidden = $("narrowed").hidden = true;
  $("results").hidden = false;
  $("results-title").textContent = "";
  const asked = begin(SAMPLES);
  try {
    const found = await ask(`${place(state.collection, "items")}?limit=500`, { signal: asked.signal });
    asked.end();
    if (!found.items.length) {
      const how = $("add-open").hidden ? `Whoever runs the service can add some: dml index add, or PUT /v1/collections/${state.collection}/items/{id}.` : "Add pictures, and they can be found at once.";
      showEmpty("This collection is empty", how);
      return;
    }
    $("results-title").textContent = "Or begin with one of these";
    $("grid").replaceChildren(...spread(found.items, SAMPLES).map(card));
  } catch (error) {
    asked.end();
    if (error.name !== "AbortError") $("grid").replaceChildren();
    showProblem(error);
  }
}

/** `count` of the items, evenly spread over labels first, and over the list then: a sample that shows variety. */
function spread(items, count) {
  const groups = new Map();
  for (const item of items) {
    const key = item.label ?? "";
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  const chosen = [];
  for (let round = 0; chosen.length < Math.min(count, items.length); round += 1) {
    for (const group of groups.values()) if (round < group.length && chosen.length < count) chosen.push(group[round]);
  }
  return chosen;
}

function take(file) {
  if (!file || !state.collections.size) return;
  if (state.collection === null) {
    showProblem(new Problem({ title: "Which collection?", detail: "Choose one first, then bring the picture." }));
    return;
  }
  if (file.size > state.most) {
    showProblem(new Problem({
      title: "The file is too large",
      detail: `“${file.name}” has ${size(file.size)}; the service takes ${size(state.most)}. A smaller copy is found just as well.`,
    }));
    return;
  }
  follow(stepOf({ kind: "upload", file, name: file.name || "Pasted picture", url: URL.createObjectURL(file) }));
}

// Collections

function choose(name) {
  state.collection = name;
  state.trail = [];
  state.about = ask(place(name)).catch(() => null); // what went wrong shows where it matters
  state.threshold = 0;
  $("threshold").value = 0;
  tellThreshold();
  $("collection").value = name;
  $("collection").disabled = state.collections.size < 2;
  $("status-link").href = STATUS;
  manage(name, state.most);
  offerFilters(name, [], { able: false });
  about(name);
  offer(name);
}

/** The line at the foot, and whether pictures can be added here. */
async function about(name) {
  const known = await state.about;
  if (state.collection !== name || !known) return;
  const parts = [pictures(known.count), `${known.dim} dimensions`, `${known.index.kind ?? "unknown"} index`];
  if (known.measured_recall !== null && known.measured_recall < 1) parts.push(`recall@10 ${known.measured_recall.toFixed(3)}`);
  parts.push(`encoder ${short(known.model_fingerprint, 8)}`);
  $("about").textContent = parts.join(" · ");
  const reason = known.read_only ? "read-only" : state.denied ? "your key may search only" : null;
  const writable = reason === null && known.accepts.includes("image");
  $("rights").textContent = reason === null ? "" : ` · ${reason}`;
  $("add-open").hidden = !writable;
  document.body.classList.toggle("writable", reason === null);
}

/** Offer filters for the fields that a sample of the items has. */
async function offer(name) {
  try {
    const [known, { items }] = await Promise.all([state.about, ask(`${place(name, "items")}?limit=${KNOWN}`)]);
    if (state.collection === name) offerFilters(name, items, { able: known?.capabilities.includes("filter") ?? false });
  } catch {
    // searching works without
  }
}

// Going through the grid with the arrow keys

function move(event) {
  const cards = [...document.querySelectorAll(".hit")];
  const here = cards.indexOf(document.activeElement);
  if (here < 0) return;
  const top = cards[0].offsetParent ? cards[0].getBoundingClientRect().top : 0;
  const columns = cards.findIndex((other) => Math.abs(other.getBoundingClientRect().top - top) > 4);
  const row = columns < 0 ? cards.length : columns;
  const goal = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + row, ArrowUp: here - row, Home: 0, End: cards.length - 1 }[event.key];
  if (goal === undefined || !cards[goal]) return;
  event.preventDefault();
  cards[goal].focus();
}

// Dropping, pasting, picking

function listen() {
  crop = cropping((region) => {
    const step = state.trail[state.at];
    if (!step) return;
    step.region = region;
    again();
  });
  listenToFilters(narrow);
  listenToManaging({
    changed: (name) => {
      if (name !== state.collection) return;
      state.about = ask(place(name)).catch(() => null);
      about(name);
      offer(name);
      if (state.at < 0 && document.body.dataset.view === "start") showStart();
    },
    denied: () => {
      state.denied = true;
      about(state.collection);
    },
  });
  $("refine").open = window.matchMedia("(min-width: 761px)").matches;
  const limit = settled(() => limitTo(Number($("threshold").value)), 250);
  $("threshold").addEventListener("input", () => {
    tellThreshold();
    limit();
  });
  let depth = 0;
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    depth += 1;
    document.body.classList.add("dragging");
  });
  window.addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
  });
  window.addEventListener("dragleave", (event) => {
    if (!carries(event)) return;
    depth = Math.max(0, depth - 1);
    if (depth === 0) document.body.classList.remove("dragging");
  });
  window.addEventListener("drop", (event) => {
    depth = 0;
    document.body.classList.remove("dragging");
    if (!carries(event)) return;
    event.preventDefault();
    if (adding()) stage([...event.dataTransfer.files]);
    else if (!document.querySelector("dialog[open]")) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((entry) => entry.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    if (adding()) stage([file]);
    else if (!document.querySelector("dialog[open]")) take(file);
  });
  for (const input of [$("file"), $("camera")]) {
    input.addEventListener("change", () => {
      take(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
  }
  $("drop").addEventListener("click", (event) => {
    if (event.target.id === "photograph") $("camera").click();
    else $("file").click();
  });
  $("again").addEventListener("click", () => $("file").click());
  $("more").addEventListener("click", showMore);
  $("problem-close").addEventListener("click", () => {
    $("problem").hidden = true;
    $("main").focus();
  });
  $("home").addEventListener("click", (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    restart(state.collection ?? state.first);
  });
  $("collection").addEventListener("change", (event) => restart(event.target.value));
  $("grid").addEventListener("keydown", move);
  window.addEventListener("popstate", (event) => arrive(event.state).catch(showProblem));
}

/** Begin anew, as a place of its own in the browser's history. */
function restart(name) {
  choose(name);
  state.at = -1;
  history.pushState({ at: -1 }, "", addressOf(null));
  showStart();
}

/** Mark the view that is shown. */
function mark(view) {
  document.body.dataset.view = view;
  if (view === "status") $("status-link").setAttribute("aria-current", "page");
  else $("status-link").removeAttribute("aria-current");
}

/** What the address asks for: {name, id}, each null when it does not say. */
function addressed() {
  const decoded = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text; // cut off by whoever passed the address on
    }
  };
  const [name = "", id = ""] = location.hash.startsWith("#/") ? [] : location.hash.slice(1).split("/").map(decoded);
  return { name: name || null, id: id || null };
}

/** The collection that a name stands for: its own, or an alias; null when there is none. */
async function meantBy(name) {
  if (state.collections.has(name)) return name;
  try {
    const found = await ask(place(name));
    if (!state.collections.has(found.name)) list([...state.collections.values(), found]); // made since the page was opened
    return found.name;
  } catch (error) {
    if (error.slug !== "unknown-collection") throw error;
    return null;
  }
}

/** Show what the address and the history say: after a reload, a shared link, or a step back. */
async function arrive(past) {
  const { name, id } = addressed();
  const meant = name === null ? (state.collection ?? state.first) : await meantBy(name);
  if (meant === null) {
    showUnknown(name);
    return;
  }
  if (meant !== state.collection) choose(meant);
  if (location.hash.startsWith(STATUS)) {
    showOperation();
  } else if (past && past.at >= 0 && state.trail[past.at]) {
    state.at = past.at;
    showStep();
  } else if (id) {
    showItem(id);
  } else {
    state.at = -1;
    showStart();
  }
}

/** The address names a collection that is not there: say so, and offer those that are. */
function showUnknown(name) {
  state.asking?.abort();
  state.collection = null;
  state.trail = [];
  state.at = -1;
  clear();
  mark("unknown");
  document.title = "No such collection · Visual search";
  $("collection").selectedIndex = -1;
  $("query").hidden = $("status").hidden = $("narrowed").hidden = $("add-open").hidden = true;
  $("results").hidden = false;
  for (const id of ["results-title", "about", "rights"]) $(id).textContent = "";
  const others = [...state.collections.values()].map((known) => [`${known.name} · ${pictures(known.count)}`, () => restart(known.name)]);
  const why = `It may have been deleted, or have another name now. ${others.length === 1 ? "This one is here:" : "These are here:"}`;
  showEmpty(`There is no collection “${name}” here`, why, others);
  say(`There is no collection ${name} here`);
}

/** The view for who runs the service. */
function showOperation() {
  state.asking?.abort();
  clear();
  mark("status");
  document.title = "Status · Visual search";
  $("query").hidden = $("results").hidden = true;
  $("status").hidden = false;
  window.scrollTo({ top: 0, behavior: "instant" });
  $("status-title").focus({ preventScroll: true });
  showStatus({ listed: list, visit: restart, writable: !state.denied }).catch(showProblem);
}

async function showItem(id) {
  try {
    const item = await ask(place(state.collection, "items", id));
    state.trail = [stepOf({ kind: "item", id, label: item.label, image: item.image })];
    state.at = 0;
    history.replaceState({ at: 0 }, "", addressOf(state.trail[0]));
    showStep();
  } catch (error) {
    await showStart();
    showProblem(error);
  }
}

/** Offer these collections. */
function list(collections) {
  state.collections = new Map(collections.map((known) => [known.name, known]));
  $("collection").replaceChildren(...collections.map(({ name }) => element("option", { value: name }, name)));
  $("collection").value = state.collection ?? "";
  $("collection").disabled = collections.length < 2 && state.collection !== null;
}

async function main() {
  listen();
  try {
    const [{ items }, { limits, scope, default_collection }] = await Promise.all([ask("v1/collections?limit=1000"), ask("v1")]);
    state.most = limits.max_body_bytes - 64 * 1024; // the form around the file has bytes of its own
    $("most").textContent = size(limits.max_body_bytes);
    if (!items.length) {
      showEmpty("Nothing is served here yet", "Start the service with a collection: dml serve COLLECTION");
      return;
    }
    list(items);
    state.first = state.collections.has(default_collection) ? default_collection : items[0].name;
    state.denied = scope === "search";
    $("switcher").hidden = $("places").hidden = false;
    await arrive(null);
  } catch (error) {
    showProblem(error);
  }
}

main();
