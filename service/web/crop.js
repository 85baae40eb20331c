// The region of the picture that is searched: drawn with a pointer, or moved and sized with the keyboard. The picture is
// cut here, in the browser, so that only the region is sent.

import { $, say, settled } from "./draw.js";

const SMALLEST = 0.05; // of a side
const LONGEST = 1600; // pixels of what is sent; encoders look at a few hundred
const STEP = 0.02;

const within = (value, low, high) => Math.min(high, Math.max(low, value));

/**
 * @param changed called with the region {left, top, width, height} in shares of the picture, or null for all of it.
 */
export function cropping(changed) {
  const stage = $("stage");
  const image = $("query-image");
  const box = $("region");
  let region = null;
  let drag = null;
  // Without a region a finger scrolls, and on a narrow screen the picture is small: the button comes first there.
  const narrow = window.matchMedia("(max-width: 760px)");

  const soon = settled(() => changed(region), 500);

  /** Where the picture itself is on the stage: it keeps its proportions, so that margins may be left. */
  function canvas() {
    const { width, height } = stage.getBoundingClientRect();
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    return { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h };
  }

  function draw() {
    box.hidden = region === null;
    document.body.classList.toggle("cropped", region !== null);
    $("crop").setAttribute("aria-pressed", String(region !== null));
    $("crop-text").textContent = region ? "Whole picture" : "Select a region";
    if (!region || !image.naturalWidth) return;
    const on = canvas();
    box.style.left = `${on.left + region.left * on.width}px`;
    box.style.top = `${on.top + region.top * on.height}px`;
    box.style.width = `${region.width * on.width}px`;
    box.style.height = `${region.height * on.height}px`;
    box.setAttribute("aria-label", `Region to search: ${spoken(region)}`);
  }

  function place(next) {
    const width = within(next.width, SMALLEST, 1);
    const height = within(next.height, SMALLEST, 1);
    region = { width, height, left: within(next.left, 0, 1 - width), top: within(next.top, 0, 1 - height) };
    draw();
  }

  function point(event) {
    const on = canvas();
    const { left, top } = stage.getBoundingClientRect();
    return {
      x: within((event.clientX - left - on.left) / on.width, 0, 1),
      y: within((event.clientY - top - on.top) / on.height, 0, 1),
    };
  }

  function between(one, other) {
    return {
      left: Math.min(one.x, other.x),
      top: Math.min(one.y, other.y),
      width: Math.abs(one.x - other.x),
      height: Math.abs(one.y - other.y),
    };
  }

  /** The corner that stays where it is while the one under the pointer is dragged. */
  function opposite(corner) {
    const { left, top, width, height } = region;
    return { x: corner.includes("w") ? left + width : left, y: corner.includes("n") ? top + height : top };
  }

  stage.addEventListener("pointerdown", (event) => {
    const early = region === null && (event.pointerType === "touch" || narrow.matches);
    if (event.button !== 0 || early || !image.naturalWidth || stage.classList.contains("blank")) return;
    event.preventDefault();
    const at = point(event);
    const corner = event.target.dataset?.corner;
    const held = box.contains(event.target);
    const [kind, from] = corner ? ["size", opposite(corner)] : [held ? "move" : "draw", at];
    drag = { kind, from, start: region, before: region };
    stage.setPointerCapture(event.pointerId);
    if (held) box.focus({ preventScroll: true });
  });
  stage.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const at = point(event);
    if (drag.kind === "move") {
      place({ ...drag.start, left: drag.start.left + at.x - drag.from.x, top: drag.start.top + at.y - drag.from.y });
      return;
    }
    const drawn = between(drag.from, at);
    if (drag.kind === "size" || Math.max(drawn.width, drawn.height) > 0.02) place(drawn);
  });
  const release = () => {
    if (!drag) return;
    const before = drag.before;
    drag = null;
    if (region === before) return; // a click
    say(`Region: ${spoken(region)}`);
    changed(region);
  };
  stage.addEventListener("pointerup", release);
  stage.addEventListener("pointercancel", release);

  box.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key] ?? [0, 0];
    if (dx || dy) {
      event.preventDefault();
      const { left, top, width, height } = region;
      if (event.shiftKey) place({ left, top, width: Math.min(width + dx, 1 - left), height: Math.min(height + dy, 1 - top) });
      else place({ left: left + dx, top: top + dy, width, height });
      say(`Region: ${spoken(region)}`);
      soon();
    } else if (event.key === "Escape" || event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      whole();
    }
  });

  function whole() {
    region = null;
    draw();
    $("crop").focus({ preventScroll: true });
    say("The whole picture is searched");
    changed(null);
  }

  $("crop").addEventListener("click", () => {
    if (region) {
      whole();
      return;
    }
    place({ left: 0.2, top: 0.2, width: 0.6, height: 0.6 });
    box.focus({ preventScroll: true });
    changed(region);
  });
  image.addEventListener("load", () => {
    $("crop").hidden = false;
    draw();
  });
  new ResizeObserver(draw).observe(stage);

  return {
    /** Show the region of another step. */
    show(of) {
      region = of ?? null;
      draw();
    },
  };
}

function spoken({ left, top, width, height }) {
  const [x, y, w, h] = [left, top, width, height].map((share) => Math.round(share * 100));
  return `${w} by ${h} percent of the picture, ${x} from the left and ${y} from the top`;
}

/** The part of a picture, as a JPEG. */
export async function cut(image, { left, top, width, height }) {
  await image.decode();
  const [w, h] = [image.naturalWidth * width, image.naturalHeight * height];
  const scale = Math.min(1, LONGEST / Math.max(w, h));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(w * scale));
  canvas.height = Math.max(1, Math.round(h * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff"; // behind what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, image.naturalWidth * left, image.naturalHeight * top, w, h, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the region could not be cut"))), "image/jpeg", 0.95);
  });
}
