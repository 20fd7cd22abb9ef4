// The reference pictures, in their order: added, moved by drag or arrow keys, removed.

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
  #pictures = []; // {blob, url, item}
  #dragged = null;

  /** `changed` is called after every change, `say` with a sentence for screen readers. */
  constructor(list, { changed, say, fail }) {
    this.#list = list;
    this.changed = changed;
    this.say = say;
    this.fail = fail;
    this.#add = document.createElement("li");
    this.#add.className = "add";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Add";
    button.setAttribute("aria-label", "Add reference pictures");
    button.onclick = () => document.getElementById("files").click();
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

  get urls() {
    return this.#pictures.map((picture) => picture.url);
  }

  /** Adds image files, as many as there is room for. */
  async add(files) {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    if (images.length < files.length) this.fail("Only pictures can be references.");
    for (const file of images) {
      if (this.#pictures.length === MOST) {
        this.fail(`There is room for ${MOST} references: remove one first.`);
        break;
      }
      try {
        this.#pictures.push(this.#picture(await readable(file)));
      } catch {
        this.fail(`This browser cannot read ${file.name}. Save it as PNG or JPEG first.`);
      }
    }
    this.#draw();
    this.changed();
  }

  /** Puts these in place of what is there. */
  set(blobs) {
    for (const picture of this.#pictures) URL.revokeObjectURL(picture.url);
    this.#pictures = blobs.map((blob) => this.#picture(blob));
    this.#draw();
    this.changed();
  }

  #picture(blob) {
    const item = document.createElement("li");
    item.className = "tile";
    item.tabIndex = 0;
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    image.alt = "";
    image.draggable = false;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    const picture = { blob, url: image.src, item };
    remove.onclick = () => this.#remove(picture);
    item.append(image, remove);
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
    URL.revokeObjectURL(picture.url);
    this.#draw();
    this.say(`Reference ${index + 1} removed.`);
    (this.#pictures[index]?.item ?? this.#add.firstChild).focus();
    this.changed();
  }

  #move(picture, to) {
    const from = this.#pictures.indexOf(picture);
    if (to < 0 || to >= this.#pictures.length || to === from) return;
    this.#pictures.splice(to, 0, ...this.#pictures.splice(from, 1));
    this.#draw();
    picture.item.focus();
    this.say(`Now reference ${to + 1} of ${this.#pictures.length}.`);
    this.changed();
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
