// Asking the service: problems as errors, addresses relative to the page, and how long searches took.

import * as key from "./key.js";

export class Problem extends Error {
  constructor(members) {
    super(members.detail);
    Object.assign(this, { title: "The service could not answer", type: null, request_id: null }, members);
  }

  /** The last part of its type: "forbidden", "read-only", "cursor-expired". */
  get slug() {
    return this.type?.split("/").pop() ?? null;
  }
}

const unreachable = () => new Problem({ title: "The service cannot be reached", detail: "Is it still running? Try again in a moment." });
const unreadable = (status) => new Problem({ detail: `It answered ${status} with something this page cannot read.` });

/** Searches of this page, the last ones: {at, collection, embed, search, rest} in milliseconds. */
export const timings = [];
const KEPT = 60;

export async function ask(path, options = {}) {
  const { timed = null, ...fetching } = options;
  const started = performance.now();
  let response;
  try {
    response = await key.send(path, { ...fetching, headers: { Accept: "application/json", ...fetching.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  let body = null;
  try {
    body = response.status === 204 ? {} : await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (!response.ok || body === null) throw new Problem(body ?? { detail: unreadable(response.status).message });
  if (timed) note(timed, response.headers.get("Server-Timing"), performance.now() - started);
  return body;
}

export const askWith = (path, content, options = {}) =>
  ask(path, { method: "POST", body: JSON.stringify(content), ...options, headers: { "Content-Type": "application/json" } });

function note(collection, header, whole) {
  const stages = Object.fromEntries(
    [...(header ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, duration]) => [name, Number(duration)]),
  );
  const embed = (stages.decode ?? 0) + (stages.inference ?? 0);
  const search = (stages.search ?? 0) + (stages.payload ?? 0);
  timings.push({ at: Date.now(), collection, embed, search, rest: Math.max(0, whole - embed - search) });
  if (timings.length > KEPT) timings.shift();
}

/**
 * Send a form, and hear how much of it has gone out; fetch cannot tell.
 *
 * @param progress called with a share from 0 to 1.
 */
export async function upload(path, form, { method = "PUT", headers = {}, signal, progress = () => {} } = {}) {
  for (let again = true; ; again = false) {
    const { status, body } = await transfer(path, form, { method, headers, signal, progress });
    if (status === 401 && again) {
      await ask("v1"); // asks for a key, and throws when none is given
      continue;
    }
    if (status >= 200 && status < 300 && body !== null) return body;
    throw new Problem(body ?? { detail: unreadable(status).message });
  }
}

function transfer(path, form, { method, headers, signal, progress }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    request.setRequestHeader("Accept", "application/json");
    for (const [name, value] of Object.entries({ ...headers, ...key.headers() })) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    });
    request.addEventListener("load", () => {
      let body = null;
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // told by its status below
      }
      resolve({ status: request.status, body });
    });
    request.addEventListener("error", () => reject(unreachable()));
    request.addEventListener("abort", () => reject(new DOMException("given up", "AbortError")));
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    if (signal?.aborted) reject(new DOMException("given up", "AbortError"));
    else request.send(form);
  });
}

export const place = (...parts) => ["v1/collections", ...parts.map(encodeURIComponent)].join("/");

export const local = (address) => address.replace(/^\//, ""); // relative to the page, whatever the prefix

export const thumbnail = (address) => (address ? `${local(address)}&size=thumb` : null);
