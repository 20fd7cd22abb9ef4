// A mask on the first reference: what is painted may change, the rest stays as it is.

import { at } from "./elements.js";

const canvas = at("mask");
const pen = canvas.getContext("2d");
const PAINT = "#e0592a";
let picture = null; // blob of the reference that is painted on
let ready = Promise.resolve(); // when the canvas has the picture's size
let painting = false;
let last = null; // where the brush was

/** Makes this the picture that the mask is for; a mask of another one is forgotten. */
export function on(blob) {
  if (blob === picture) return ready;
  picture = blob;
  paint(false);
  at("masking").hidden = !blob;
  marked(false);
  ready = blob ? empty(blob) : Promise.resolve();
  return ready;
}

async function empty(blob) {
  const { width, height } = await createImageBitmap(blob);
  if (blob === picture) Object.assign(canvas, { width, height }); // which empties it
}

/** Starts painting, or ends it. */
export function paint(yes) {
  painting = yes;
  at("frame").classList.toggle("painting", yes);
  at("brush").parentElement.hidden = !yes;
  if (yes) at("frame").scrollIntoView({ block: "nearest", behavior: "smooth" });
  name();
}

export const isPainting = () => painting;

function marked(yes) {
  at("unmask").hidden = !yes;
  name();
}

function name() {
  const other = at("unmask").hidden ? "Paint a mask" : "Change the mask";
  at("paint").textContent = painting ? "Done" : other;
}

/** The mask as a file of the picture's size, transparent where it may change; null for none. */
export function file() {
  return at("unmask").hidden ? null : inverse(canvas).convertToBlob();
}

/** Puts an earlier `file`, or none, in place of the mask. */
export async function restore(blob) {
  if (!blob) return clear();
  const bitmap = await createImageBitmap(blob);
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  pen.drawImage(inverse(bitmap), 0, 0);
  marked(true);
}

/** Opaque where `image` is transparent, and the other way round. */
function inverse(image) {
  const made = new OffscreenCanvas(image.width, image.height);
  const context = made.getContext("2d");
  context.fillStyle = PAINT;
  context.fillRect(0, 0, made.width, made.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(image, 0, 0);
  return made;
}

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = null;
  draw(event);
};
canvas.onpointermove = (event) => {
  if (event.buttons) draw(event);
};

function draw({ offsetX, offsetY }) {
  const scale = canvas.width / canvas.clientWidth;
  const here = [offsetX * scale, offsetY * scale];
  Object.assign(pen, { lineWidth: at("brush").value * scale, lineCap: "round", strokeStyle: PAINT });
  pen.beginPath();
  pen.moveTo(...(last ?? here));
  pen.lineTo(...here);
  pen.stroke();
  last = here;
  marked(true);
}

function clear() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  marked(false);
}

at("unmask").onclick = clear;
