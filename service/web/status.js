// The view for who runs the service: what is kept, how it is searched, how quick it was, what is under way.

import { ask, place, timings } from "./ask.js";
import { $, element, milliseconds, pictures, plural, say, short, size, svg } from "./draw.js";

const WIDTH = 640;
const HEIGHT = 96;

const LOOK_AGAIN = 1500; // milliseconds, while a job runs

let watching; // the timer of the next look
const stopping = new Set(); // ids of jobs that were asked to stop

/**
 * @param listed called with the collections that there are now.
 * @param visit called with the name of a collection that is to be searched.
 * @param writable whether this visitor may cancel jobs.
 */
export async function showStatus({ listed, visit, writable }) {
  clearTimeout(watching);
  const [root, models, { items: jobs }, { items: collections }] = await Promise.all([
    ask("v1"), ask("v1/models"), ask("v1/jobs?limit=20"), ask("v1/collections?limit=1000"),
  ]);
  const infos = (await Promise.all(collections.map(({ name }) => about(name)))).filter((info) => info !== null);
  listed(collections);
  const all = infos.reduce((sum, info) => sum + info.count, 0);
  $("status-lead").textContent = `${pictures(all)} in ${plural(infos.length, "collection", "collections")}, served by ${root.name} ${root.version}.`;
  const fitting = (info) => models.items.find((model) => model.fingerprint === info.model_fingerprint);
  const again = () => showStatus({ listed, visit, writable });
  const focused = document.activeElement?.dataset.focus;
  $("status-body").replaceChildren(
    block("Collections", ...infos.map((info) => collectionCard(info, fitting(info), visit))),
    block("Your searches", latency()),
    block("Jobs", jobList(jobs, writable ? again : null)),
  );
  if (focused) ($("status-body").querySelector(`[data-focus="${CSS.escape(focused)}"]`) ?? $("status-title")).focus({ preventScroll: true });
  if (jobs.some(({ ended }) => ended === null)) {
    const look = () => document.body.dataset.view === "status" && again().catch(() => {}); // the next click says what is wrong
    watching = setTimeout(look, LOOK_AGAIN);
  }
}

/** What is known of a collection; null when it was deleted meanwhile. */
async function about(name) {
  try {
    return await ask(place(name));
  } catch (error) {
    if (error.slug !== "unknown-collection") throw error;
    return null;
  }
}

function block(title, ...contents) {
  return element("section", { class: "block" }, element("h2", {}, title), ...contents);
}

function facts(entries) {
  const pairs = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", { class: "facts" }, ...pairs.map(([name, value]) => element("div", { class: String(value).length > 34 ? "wide" : null }, element("dt", {}, name), element("dd", {}, value))));
}

function collectionCard(info, model, visit) {
  const heading = element("h3", {}, info.name);
  const go = element("button", { class: "button", type: "button", "data-focus": `search ${info.name}`, "aria-label": `Search in ${info.name}` }, "Search");
  go.addEventListener("click", () => visit(info.name));
  const { promised, measured, kept } = recall(info);
  const word = kept === null ? (info.index.exact ? "exact" : null) : kept ? "promise kept" : "below its promise";
  const verdict = word && element("span", { class: kept === false ? "verdict broken" : "verdict" }, word);
  return element(
    "article",
    { class: "sheet" },
    element("div", { class: "sheet-head" }, heading, verdict, info.read_only ? element("span", { class: "verdict plain" }, "read-only") : null, go),
    facts([
      ["Pictures", info.count.toLocaleString("en")],
      ["On disk", size(info.bytes_on_disk)],
      ["Index", indexOf(info.index)],
      ["Recall@10 promised", promised],
      ["Recall@10 measured", measured],
      ["Changes not merged yet", info.pending.toLocaleString("en")],
      ["Generation", info.generation.toLocaleString("en")],
      ["Encoder", encoderOf(info, model)],
    ]),
  );
}

function recall({ index, measured_recall: found, promised_recall: target = null }) {
  return {
    promised: target === null ? (index.exact ? "1 (exact)" : "none") : String(target),
    measured: found === null ? (index.exact ? "nothing is missed" : "not measured") : found.toFixed(3),
    kept: target === null || found === null ? null : found >= target,
  };
}

function indexOf(index) {
  const settings = Object.entries(index).filter(([name, value]) => !["kind", "exact", "device"].includes(name) && typeof value !== "object" && value !== "");
  return [index.kind ?? "unknown", ...settings.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)].join(" · ");
}

function encoderOf(info, model) {
  const parts = [short(info.model_fingerprint, 12), `${info.dim} numbers`];
  if (!model) return [...parts, "not loaded: ids and vectors only"].join(" · ");
  if (model.input_size) parts.push(`${model.input_size} px`);
  if (model.loss) parts.push(model.loss);
  if (model.trained_on) parts.push(`trained on ${model.trained_on}`);
  return parts.join(" · ");
}

// How long the searches of this page took

const STAGES = [["embed", "encoder"], ["search", "index"], ["rest", "queue and network"]];

const whole = (timing) => timing.embed + timing.search + timing.rest;

/** The value that a share of the others does not exceed. */
function quantile(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
}

function latency() {
  if (!timings.length) return element("p", { class: "quiet" }, "None yet since this page was opened. Search for something, and come back.");
  const times = timings.map(whole);
  const middle = ([name, word]) => [`Median, ${word}`, milliseconds(quantile(timings.map((timing) => timing[name]), 0.5))];
  return element(
    "div",
    { class: "sheet" },
    facts([
      ["Searches", String(timings.length)],
      ["Median", milliseconds(quantile(times, 0.5))],
      ["95 of 100 within", milliseconds(quantile(times, 0.95))],
      ...STAGES.map(middle),
    ]),
    chart(times),
    element("ul", { class: "legend", "aria-hidden": "true" }, ...STAGES.map(([name, word]) => element("li", { class: name }, word))),
  );
}

/** A bar for each search, the last one at the right, its stages on top of each other. */
function chart(times) {
  const highest = Math.max(...times);
  const step = Math.min(26, WIDTH / timings.length);
  const bars = timings.flatMap((timing, position) => {
    let top = HEIGHT;
    return STAGES.map(([name]) => {
      const height = (timing[name] / highest) * (HEIGHT - 2);
      top -= height;
      return svg("rect", { class: name, x: position * step, y: top, width: Math.max(2, step - 3), height: Math.max(0, height) });
    });
  });
  const spoken = `The last ${plural(times.length, "search", "searches")} took ${milliseconds(Math.min(...times))} to ${milliseconds(highest)}.`;
  return svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken, preserveAspectRatio: "xMinYMax meet" }, ...bars);
}

// Jobs

/** @param again shows the status anew, after a job was asked to stop; null: this visitor may not ask. */
function jobList(jobs, again) {
  if (!jobs.length) return element("p", { class: "quiet" }, "None yet. Rebuilding an index or looking for duplicates shows here.");
  const rows = jobs.map((job) => {
    const name = `${job.kind} · ${job.collection}`;
    const [open, running] = [job.ended === null, job.state === "running"];
    const bar = running && element("progress", { max: 1, value: job.progress, "aria-label": `Progress of ${name}` });
    const word = stopping.has(job.id) && open ? "stopping" : running && job.progress !== null ? `${Math.round(100 * job.progress)} %` : job.state;
    const when = new Date(job.ended ?? job.started ?? job.created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    return element(
      "li",
      { class: `job ${job.state}` },
      element("span", {}, name),
      element("span", { class: "job-state" }, [word, when].join(" · ")),
      open && again && !stopping.has(job.id) ? cancelling(job, name, again) : null,
      job.problem?.detail || job.message ? element("span", { class: "job-message" }, job.problem?.detail ?? job.message) : null,
      bar || null,
    );
  });
  return element("ul", { class: "sheet jobs" }, ...rows);
}

function cancelling(job, name, again) {
  const button = element("button", { class: "link", type: "button", "data-focus": `job ${job.id}`, "aria-label": `Cancel ${name}` }, "Cancel");
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await ask(`v1/jobs/${encodeURIComponent(job.id)}`, { method: "DELETE" });
      stopping.add(job.id);
      say(`${name} was asked to stop`);
      await again();
    } catch (error) {
      button.disabled = false;
      button.after(element("span", { class: "job-message", role: "alert" }, error.message));
    }
  });
  return button;
}
