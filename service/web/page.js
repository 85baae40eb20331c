// The search page. No framework and no build: the browser's own modules, and text only ever set as text.
//
// A search is a step: an uploaded picture, or an item of the collection. Steps form a trail; going back in the browser
// goes back along it. Addresses are relative, so that the page also works below a prefix of a proxy.

import * as key from "./key.js";

const PAGE = 24;
const SAMPLES = 24;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

const state = {
  collections: new Map(),
  collection: null,
  trail: [],
  at: -1, // the step that is shown; -1 is the start
  shown: 0,
  most: 16 * 1024 * 1024,
  asking: null, // AbortController of the request under way
};

// Asking the service

class Problem extends Error {
  constructor(members) {
    super(members.detail);
    Object.assign(this, { title: "The service could not answer", type: null, request_id: null }, members);
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await key.send(path, { headers: { Accept: "application/json" }, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "The service cannot be reached", detail: "Is it still running? Try again in a moment." });
  }
  let body = null;
  try {
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && body !== null) return body;
  throw new Problem(body ?? { detail: `It answered ${response.status} with something this page cannot read.` });
}

const place = (...parts) => ["v1/collections", ...parts.map(encodeURIComponent)].join("/");

const local = (address) => address.replace(/^\//, ""); // relative to the page, whatever the prefix

function thumbnail(address) {
  return address ? `${local(address)}&size=thumb` : null;
}

// Drawing

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawing(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

function thumb(item) {
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
  button.addEventListener("click", () => follow({ kind: "item", id: item.id, label: item.label, image: item.image }));
  const entry = element("li", { class: "card" }, button);
  entry.style.setProperty("--place", Math.min(position, 24));
  if (scored && item.image) {
    const open = element("a", { class: "open", href: local(item.image), target: "_blank", rel: "noopener", "aria-label": `Open the picture of ${name}` });
    key.follow(open, local(item.image));
    open.append(drawing("M8 4H5a1 1 0 0 0-1 1v10a1 1 0 0 0 1 1h10a1 1 0 0 0 1-1v-3M12 4h4v4M16 4l-7 7"));
    entry.append(open);
  }
  return entry;
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

function showEmpty(title, detail) {
  $("empty-title").textContent = title;
  $("empty-detail").textContent = detail;
  $("empty").hidden = false;
  $("grid").replaceChildren();
}

function clear() {
  $("problem").hidden = true;
  $("empty").hidden = true;
  $("more").hidden = true;
}

const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

function size(bytes) {
  return bytes < 1024 * 1024 ? `${Math.max(1, Math.round(bytes / 1024))}\u00a0KB` : `${(bytes / 1024 / 1024).toFixed(bytes % 1048576 ? 1 : 0)}\u00a0MB`;
}

// Steps

/** Begin a request that the next one cancels, and show bones if it takes longer than a blink. */
function begin(bones, waits = () => {}) {
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  clear();
  $("grid").setAttribute("aria-busy", "true");
  const asked = {
    signal: asking.signal,
    waited: false,
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

async function search(step, offset, signal) {
  const params = { limit: PAGE, offset };
  if (step.kind === "item") {
    const query = new URLSearchParams(params);
    return ask(`${place(state.collection, "items", step.id, "similar")}?${query}`, { signal });
  }
  const form = new FormData();
  form.append("file", step.file, step.name);
  form.append("params", JSON.stringify(params));
  return ask(place(state.collection, "search", "image"), { method: "POST", body: form, signal });
}

/**
 * A new step after the one that is shown; what came after that is forgotten. It joins the trail when it is answered: a
 * picture that cannot be read leaves everything as it was, and a message.
 */
async function follow(step) {
  const asked = begin(PAGE, () => drawStep(step));
  try {
    const found = await search(step, 0, asked.signal);
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
  if (address) key.show(picture, address);
  else picture.removeAttribute("src");
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
  document.body.dataset.view = "results";
  $("query").hidden = false;
  $("results-title").textContent = "";
  $("facts").textContent = "Looking…";
  describe(step);
  drawTrail();
  window.scrollTo({ top: 0, behavior: "instant" });
}

/** Search again for the step that the trail is at. */
async function showStep() {
  const step = state.trail[state.at];
  const asked = begin(PAGE);
  drawStep(step);
  try {
    const found = await search(step, 0, asked.signal);
    asked.end();
    showHits(found);
  } catch (error) {
    asked.end();
    if (error.name !== "AbortError") $("grid").replaceChildren();
    showProblem(error);
  }
}

function showHits(found) {
  state.shown = found.hits.length;
  const took = found.took_ms < 10 ? found.took_ms.toFixed(1) : Math.round(found.took_ms);
  $("facts").textContent = `${took} ms · ${found.approximate ? "approximate" : "exact"} search`;
  $("results-title").textContent = found.hits.length ? `Nearest of ${plural(found.total, "picture", "pictures")}` : "";
  if (!found.hits.length) {
    showEmpty("Nothing to compare with", "This collection has no other picture yet.");
    return;
  }
  $("grid").replaceChildren(...found.hits.map(card));
  $("more").hidden = found.hits.length < PAGE || state.shown >= found.total;
}

async function showMore() {
  const step = state.trail[state.at];
  const asking = (state.asking = new AbortController());
  $("more").disabled = true;
  try {
    const found = await search(step, state.shown, asking.signal);
    const cards = found.hits.map(card);
    state.shown += found.hits.length;
    $("grid").append(...cards);
    $("more").hidden = found.hits.length < PAGE || state.shown >= found.total;
    cards[0]?.querySelector("button").focus({ preventScroll: true });
  } catch (error) {
    showProblem(error);
  } finally {
    $("more").disabled = false;
  }
}

async function showStart() {
  state.at = -1;
  document.body.dataset.view = "start";
  $("query").hidden = true;
  $("results-title").textContent = "";
  const asked = begin(SAMPLES);
  try {
    const found = await ask(`${place(state.collection, "items")}?limit=500`, { signal: asked.signal });
    asked.end();
    if (!found.items.length) {
      showEmpty("This collection is empty", "Add a picture with PUT /v1/collections/" + state.collection + "/items/{id}, and it can be found at once.");
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
  if (!file || !state.collection) return;
  if (file.size > state.most) {
    showProblem(new Problem({
      title: "The file is too large",
      detail: `“${file.name}” has ${size(file.size)}; the service takes ${size(state.most)}. A smaller copy is found just as well.`,
    }));
    return;
  }
  follow({ kind: "upload", file, name: file.name || "Pasted picture", url: URL.createObjectURL(file) });
}

// Collections

async function choose(name) {
  state.collection = name;
  state.trail = [];
  $("collection").value = name;
  about(name);
}

async function about(name) {
  const known = state.collections.get(name);
  const parts = [plural(known.count, "picture", "pictures")];
  try {
    const { index, measured_recall: recall, model_fingerprint: model, dim } = await ask(place(name));
    parts.push(`${dim} dimensions`, `${index.kind ?? "unknown"} index`);
    if (recall !== null && recall < 1) parts.push(`recall@10 ${recall.toFixed(3)}`);
    parts.push(`encoder ${model.slice(0, 8)}`);
  } catch {
    // The line is an extra: what went wrong shows where it matters.
  }
  if (state.collection === name) $("about").textContent = parts.join(" · ");
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
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((entry) => entry.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    take(file);
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
    restart(state.collection);
  });
  $("collection").addEventListener("change", (event) => restart(event.target.value));
  $("grid").addEventListener("keydown", move);
  window.addEventListener("popstate", (event) => arrive(event.state));
}

/** Begin anew, as a place of its own in the browser's history. */
function restart(name) {
  choose(name);
  state.at = -1;
  history.pushState({ at: -1 }, "", addressOf(null));
  showStart();
}

/** Show what the address and the history say: after a reload, a shared link, or a step back. */
function arrive(past) {
  const [name, id] = location.hash.slice(1).split("/").map(decodeURIComponent);
  if (name !== state.collection && state.collections.has(name)) choose(name);
  if (past && past.at >= 0 && state.trail[past.at]) {
    state.at = past.at;
    showStep();
  } else if (id) {
    showItem(id);
  } else {
    state.at = -1;
    showStart();
  }
}

async function showItem(id) {
  try {
    const item = await ask(place(state.collection, "items", id));
    state.trail = [{ kind: "item", id, label: item.label, image: item.image }];
    state.at = 0;
    history.replaceState({ at: 0 }, "", addressOf(state.trail[0]));
    showStep();
  } catch (error) {
    await showStart();
    showProblem(error);
  }
}

async function main() {
  listen();
  try {
    const [{ items }, { limits }] = await Promise.all([ask("v1/collections?limit=1000"), ask("v1")]);
    state.most = limits.max_body_bytes - 64 * 1024; // the form around the file has bytes of its own
    $("most").textContent = size(limits.max_body_bytes);
    if (!items.length) {
      showEmpty("Nothing is served here yet", "Start the service with a collection: dml serve COLLECTION");
      return;
    }
    state.collections = new Map(items.map((item) => [item.name, item]));
    $("collection").replaceChildren(...items.map((item) => element("option", { value: item.name }, item.name)));
    $("collection").disabled = items.length < 2;
    $("switcher").hidden = false;
    const asked = decodeURIComponent(location.hash.slice(1).split("/")[0]);
    choose(state.collections.has(asked) ? asked : items[0].name);
    arrive(null);
  } catch (error) {
    showProblem(error);
  }
}

main();
