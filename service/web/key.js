// The API key, where the service asks for one. It is kept for this tab only (sessionStorage), and sent in a header, never
// in an address. An <img> sends no headers, so with a key pictures are fetched, and shown from memory.

const KEPT = "dml.key";
const SHOWN = new Set(["image/jpeg", "image/png", "image/gif", "image/webp", "image/bmp", "image/avif"]);
const $ = (id) => document.getElementById(id);

let question = null; // one for all requests that wait for its answer

const key = () => sessionStorage.getItem(KEPT);

/** The headers that carry the key; none where there is none. */
export const headers = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

/** fetch, with the key; when the service wants one, or another, the visitor is asked and the request sent again. */
export async function send(path, options = {}) {
  for (;;) {
    const used = key();
    const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    if (key() === used) {
      question ??= answer(used !== null).finally(() => (question = null));
      if (!(await question)) return response;
    }
  }
}

/** Ask for a key; whether one was given. */
function answer(wrong) {
  sessionStorage.removeItem(KEPT);
  const dialog = $("key");
  $("key-wrong").hidden = !wrong;
  $("key-text").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const ended = new AbortController();
    const end = (given) => {
      ended.abort();
      if (given) sessionStorage.setItem(KEPT, given);
      dialog.close();
      resolve(Boolean(given));
    };
    const listening = { signal: ended.signal };
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const given = $("key-text").value.trim();
      if (/^[\x21-\x7e]+$/.test(given)) end(given); // what a header can carry
      else $("key-wrong").hidden = false;
    }, listening);
    $("key-cancel").addEventListener("click", () => end(null), listening);
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      end(null);
    }, listening);
  });
}

/** Have an <img> show what is at an address of the service. */
export async function show(image, address) {
  image.dataset.address = address;
  if (!key() || address.startsWith("blob:")) {
    image.src = address;
    return;
  }
  try {
    const made = await inMemory(address);
    if (image.dataset.address !== address) return; // it was to show something else meanwhile
    image.addEventListener("load", () => URL.revokeObjectURL(made), { once: true });
    image.src = made;
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

/** A link to a picture, which then opens with the key as well. */
export function follow(link, address) {
  link.addEventListener("click", async (event) => {
    if (!key()) return;
    event.preventDefault();
    window.open(await inMemory(address), "_blank");
  });
}

async function inMemory(address) {
  const response = await send(address);
  const blob = await response.blob();
  if (!response.ok || !SHOWN.has(blob.type)) throw new Error(`${address} is no picture that is shown here`);
  return URL.createObjectURL(blob);
}
