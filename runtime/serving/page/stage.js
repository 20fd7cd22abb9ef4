// The result on its stage: the image, its reference behind a divider, and where the time went.

import { at, button, element, picture, seconds } from "./elements.js";

const urls = new WeakMap(); // blob -> object URL

export function url(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** The stages of a call, in their order: what it is called, and which of its timings it sums. */
const STAGES = [
  ["queue", ["queued"]],
  ["prompt", ["text"]],
  ["encoding", ["vae_encode", "encode_references"]],
  ["first step", ["first_step"]],
  ["cached steps", ["cached_steps"]],
  ["steps", ["plain_steps"]],
  ["decoding", ["vae_decode"]],
];

let shown = null; // the entry of the history that is on the stage
let compared = 0; // number of the reference behind the divider, from 1; 0 for none

export const onStage = () => shown;

function place(blob) {
  at("image").src = url(blob);
  at("frame").hidden = false;
  at("empty").hidden = true;
}

/** Shows what an image is by now. */
export function preview(blob) {
  at("image").className = "soft";
  place(blob);
}

/** Shows an entry of the history; without one the first reference, which waits for its edit. */
export function show(entry, reference) {
  shown = entry;
  const blob = entry?.image ?? reference;
  at("empty").hidden = Boolean(blob);
  at("frame").hidden = !blob;
  at("mask").hidden = Boolean(entry);
  at("actions").hidden = !entry;
  at("headline").textContent = "";
  at("stages").replaceChildren();
  at("image").className = "";
  at("image").alt = entry ? `Result: ${entry.fields.prompt}` : blob ? "The first reference" : "";
  if (blob) place(blob);
  else at("image").removeAttribute("src");
  if (entry) describe(entry);
  compare(entry?.references.length === 1 ? 1 : 0);
  for (const item of at("strip").children) {
    item.firstChild.setAttribute("aria-current", item.entry === entry);
  }
}

function compare(number) {
  compared = number;
  const blob = shown?.references[number - 1];
  at("before").hidden = at("divider").hidden = !blob;
  if (blob) at("before").src = url(blob);
  for (const [index, each] of [...at("compare").children].entries()) {
    each.setAttribute("aria-pressed", index + 1 === number);
  }
}

function describe({ fields, image, references, known, timings, total }) {
  const name = fields.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  Object.assign(at("save"), { href: url(image), download: `${name}.${image.type.split("/")[1]}` });
  at("headline").replaceChildren(element("strong", seconds(total)));
  if (references.length) {
    const badge = element("span", known ? "references known" : "references new");
    badge.className = `badge ${known}`;
    at("headline").append(badge);
  }
  at("headline").append(element("span", `seed ${fields.seed}`));
  at("compare").replaceChildren(...references.map((blob, index) => {
    const toggle = () => compare(compared === index + 1 ? 0 : index + 1);
    return button(`Compare with reference ${index + 1}`, toggle, picture(url(blob)));
  }));
  const bar = element("div");
  const list = element("ul");
  bar.className = "bar";
  for (const [index, [label, names]] of STAGES.entries()) {
    const value = names.reduce((sum, each) => sum + (timings[each] ?? 0), 0);
    if (value < total / 100) continue;
    const [piece, dot] = [element("i"), element("i")];
    piece.className = dot.className = `part${index}`;
    piece.style.flexGrow = value * 1000;
    bar.append(piece);
    const all = fields.num_inference_steps;
    const count = label.endsWith("steps") ? `${all - Boolean(timings.first_step)} ` : "";
    list.append(element("li", dot, `${count}${label} `, element("b", seconds(value))));
  }
  at("stages").replaceChildren(...(list.children.length ? [bar, list] : []));
}

at("image").onload = () => {
  const { naturalWidth, naturalHeight, className } = at("image");
  at("frame").style.setProperty("--ratio", naturalWidth / naturalHeight);
  if (className) URL.revokeObjectURL(at("image").src); // a preview is seen once
  else at("frame").style.setProperty("--natural", naturalWidth);
};
at("divider").oninput = () => at("frame").style.setProperty("--at", `${at("divider").value}%`);
