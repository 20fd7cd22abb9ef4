// The reference pictures, in their order: added, moved by drag or arrow keys, removed.

import { at, button, element, fail, picture, say } from "./elements.js";
import { url } from "./stage.js";

const MOST = 4;
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
const list = at("tray");
const adding = button("Add reference pictures", () => at("files").click(), "Add");
const addItem = Object.assign(element("li", adding), { className: "add" });
let tiles = []; // list items, each with its `blob`
let dragged = null; // {tile, x, y, moving}

export const blobs = () => tiles.map((tile) => tile.blob);

/** Adds image files, as many as there is room for. */
export async function add(files) {
  fail("");
  for (const file of files) {
    if (tiles.length === MOST) {
      fail(`There is room for ${MOST} references: remove one first.`);
      break;
    }
    try {
      tiles.push(tileOf(await readable(file)));
    } catch {
      fail(`This browser cannot read ${file.name}. Save it as PNG or JPEG first.`);
    }
  }
  changed();
}

/** Puts these in place of what is there. */
export function set(pictures) {
  tiles = pictures.map(tileOf);
  changed();
}

/** The file, or a PNG of it where the server would not read its format. */
async function readable(file) {
  const bitmap = await createImageBitmap(file);
  if (SENT_AS_THEY_ARE.includes(file.type)) return file;
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob();
}

function tileOf(blob) {
  const tile = element("li", picture(url(blob)), button("", () => remove(tile), "×"));
  return Object.assign(tile, { className: "tile", tabIndex: 0, blob });
}

function changed() {
  for (const [index, tile] of tiles.entries()) {
    tile.dataset.number = index + 1;
    tile.setAttribute("aria-label", `Reference ${index + 1} of ${tiles.length}`);
    tile.lastChild.setAttribute("aria-label", `Remove reference ${index + 1}`);
  }
  list.replaceChildren(...tiles, ...(tiles.length < MOST ? [addItem] : []));
  at("count").textContent = tiles.length ? `${tiles.length} of ${MOST}` : "up to four";
  list.dispatchEvent(new Event("change"));
}

function remove(tile) {
  const index = tiles.indexOf(tile);
  tiles.splice(index, 1);
  fail("");
  changed();
  say(`Reference ${index + 1} removed.`);
  (tiles[index] ?? adding).focus();
}

function move(tile, to) {
  if (!(to in tiles)) return;
  tiles.splice(to, 0, ...tiles.splice(tiles.indexOf(tile), 1));
  changed();
  tile.focus();
  say(`Now reference ${to + 1} of ${tiles.length}.`);
}

list.onkeydown = (event) => {
  const tile = tiles.find((each) => each === event.target);
  if (!tile) return;
  if (event.key in STEPS) move(tile, tiles.indexOf(tile) + STEPS[event.key]);
  else if (event.key === "Delete" || event.key === "Backspace") remove(tile);
  else return;
  event.preventDefault();
};
list.onpointerdown = ({ button: which, target, clientX: x, clientY: y }) => {
  const tile = target.closest(".tile");
  if (tile && !which && !target.closest("button")) dragged = { tile, x, y, moving: false };
};
list.onpointermove = ({ pointerId, clientX: x, clientY: y }) => {
  if (!dragged) return;
  if (!dragged.moving) {
    if (Math.hypot(x - dragged.x, y - dragged.y) < 6) return;
    dragged.moving = true;
    list.setPointerCapture(pointerId);
    dragged.tile.classList.add("dragged");
  }
  const over = document.elementFromPoint(x, y)?.closest(".tile");
  if (over && over !== dragged.tile) move(dragged.tile, tiles.indexOf(over));
};
list.onpointerup = list.onpointercancel = () => {
  dragged?.tile.classList.remove("dragged");
  dragged = null;
};
changed();
