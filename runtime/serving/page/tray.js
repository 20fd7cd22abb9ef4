// The reference pictures, in their order: added, moved by drag or arrow keys, removed.

import { at, element, fail, say } from "./elements.js";
import { url } from "./stage.js";

const MOST = 4;
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

/** The file, or a PNG of it where the server would not read its format. */
async function readable(file) {
  const bitmap = await createImageBitmap(file);
  if (SENT_AS_THEY_ARE.includes(file.type)) return file;
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob();
}

export class Tray {
  #list;
  #add;
  #pictures = []; // {blob, item}
  #dragged = null;

  #changed;

  /** `changed` is called after every change. */
  constructor(list, changed) {
    this.#list = list;
    this.#changed = changed;
    const button = Object.assign(element("button", "Add"), { type: "button" });
    this.#add = Object.assign(element("li", button), { className: "add" });
    button.setAttribute("aria-label", "Add reference pictures");
    button.onclick = () => at("files").click();
    this.#add.append(button);
    list.addEventListener("keydown", (event) => this.#key(event));
    list.addEventListener("pointerdown", (event) => this.#grab(event));
    list.addEventListener("pointermove", (event) => this.#drag(event));
    for (const end of ["pointerup", "pointercancel"]) {
      list.addEventListener(end, () => this.#release());
    }
    this.#draw();
  }

  get blobs() {
    return this.#pictures.map((picture) => picture.blob);
  }

  /** Adds image files, as many as there is room for. */
  async add(files) {
    const images = files.filter((file) => file.type.startsWith("image/"));
    if (images.length < files.length) fail("Only pictures can be references.");
    for (const file of images) {
      if (this.#pictures.length === MOST) {
        fail(`There is room for ${MOST} references: remove one first.`);
        break;
      }
      try {
        this.#pictures.push(this.#picture(await readable(file)));
      } catch {
        fail(`This browser cannot read ${file.name}. Save it as PNG or JPEG first.`);
      }
    }
    this.#draw();
    this.#changed();
  }

  /** Puts these in place of what is there. */
  set(blobs) {
    this.#pictures = blobs.map((blob) => this.#picture(blob));
    this.#draw();
    this.#changed();
  }

  #picture(blob) {
    const image = Object.assign(new Image(), { src: url(blob), alt: "", draggable: false });
    const remove = Object.assign(element("button", "×"), { type: "button" });
    const item = element("li", image, remove);
    const picture = { blob, item: Object.assign(item, { className: "tile", tabIndex: 0 }) };
    remove.onclick = () => this.#remove(picture);
    return picture;
  }

  #draw() {
    for (const [index, { item }] of this.#pictures.entries()) {
      item.dataset.number = index + 1;
      item.setAttribute("aria-label", `Reference ${index + 1} of ${this.#pictures.length}`);
      item.lastChild.setAttribute("aria-label", `Remove reference ${index + 1}`);
    }
    const items = this.#pictures.map((picture) => picture.item);
    this.#list.replaceChildren(...items, ...(items.length < MOST ? [this.#add] : []));
  }

  #remove(picture) {
    const index = this.#pictures.indexOf(picture);
    this.#pictures.splice(index, 1);
    this.#draw();
    say(`Reference ${index + 1} removed.`);
    (this.#pictures[index]?.item ?? this.#add.firstChild).focus();
    this.#changed();
  }

  #move(picture, to) {
    const from = this.#pictures.indexOf(picture);
    if (to < 0 || to >= this.#pictures.length || to === from) return;
    this.#pictures.splice(to, 0, ...this.#pictures.splice(from, 1));
    this.#draw();
    picture.item.focus();
    say(`Now reference ${to + 1} of ${this.#pictures.length}.`);
    this.#changed();
  }

  #of(element) {
    const item = element?.closest?.(".tile");
    return this.#pictures.find((picture) => picture.item === item);
  }

  #key(event) {
    const picture = this.#of(event.target);
    if (!picture || event.target !== picture.item) return;
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (step) this.#move(picture, this.#pictures.indexOf(picture) + step);
    else if (event.key === "Delete" || event.key === "Backspace") this.#remove(picture);
    else return;
    event.preventDefault();
  }

  #grab(event) {
    if (event.button || event.target.closest("button")) return;
    const picture = this.#of(event.target);
    if (picture) this.#dragged = { picture, x: event.clientX, y: event.clientY, moving: false };
  }

  #drag(event) {
    const dragged = this.#dragged;
    if (!dragged) return;
    if (!dragged.moving) {
      if (Math.hypot(event.clientX - dragged.x, event.clientY - dragged.y) < 6) return;
      dragged.moving = true;
      this.#list.setPointerCapture(event.pointerId);
      dragged.picture.item.classList.add("dragged");
    }
    const over = this.#of(document.elementFromPoint(event.clientX, event.clientY));
    if (over && over !== dragged.picture) this.#move(dragged.picture, this.#pictures.indexOf(over));
  }

  #release() {
    this.#dragged?.picture.item.classList.remove("dragged");
    this.#dragged = null;
  }
}
