// The page: what is asked for on the left, what came of it on the right.

import * as api from "./api.js";
import { History } from "./history.js";
import { Tray } from "./tray.js";

const at = (id) => document.getElementById(id);
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
const history = new History();
let running = null; // AbortController of the image being made
let set = null; // {abort, ready: Promise of the answer} of the references as they stand
let shown = null; // entry of the history on the stage
let compared = 0; // number of the reference behind the divider, from 1; 0 for none
const urls = new Map(); // blob of the history -> object URL

function say(text) {
  at("live").textContent = text;
}

function fail(error) {
  const text = typeof error === "string" ? error : error.message;
  at("fault").textContent = text;
  at("fault").hidden = !text;
  if (error.status === 401) askForKey();
}

function url(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The server

function askForKey() {
  at("key-form").hidden = false;
  at("change-key").hidden = false;
  at("key").focus();
}

async function connect() {
  try {
    const model = await api.model();
    at("model").textContent = model.id;
    showLoras(model.loras ?? []);
  } catch (error) {
    if (error.status === 401) {
      at("model").textContent = "A key is needed";
      askForKey();
    } else {
      at("model").textContent = error.status === 503 ? "The model is loading…" : error.message;
      setTimeout(connect, 3000);
    }
  }
}

function showLoras(names) {
  const known = Object.fromEntries(loras());
  at("loras").hidden = !names.length;
  at("loras").replaceChildren(at("loras").firstElementChild, ...names.map((name) => {
    const slider = element("input", {
      type: "range", min: -4, max: 4, step: 0.05, value: known[name] ?? 0, name });
    const output = element("output", {});
    slider.oninput = () => {
      output.textContent = Number(slider.value) ? Number(slider.value).toFixed(2) : "off";
      summarize();
    };
    slider.oninput();
    return element("label", {}, element("span", { textContent: name }), output, slider);
  }));
}

function loras() {
  const sliders = [...at("loras").querySelectorAll("input")];
  return sliders.map((x) => [x.name, Number(x.value)]).filter(([, weight]) => weight);
}

// References go up while the prompt is still being typed, so that an edit finds them known

const tray = new Tray(at("tray"), { changed: referencesChanged, say, fail });
let waiting;

function referencesChanged() {
  const { length } = tray.blobs;
  at("count").textContent = length ? `${length} of 4` : "up to four";
  set?.abort.abort();
  set = null;
  clearTimeout(waiting);
  status(length ? "Sending…" : "", "");
  if (length) waiting = setTimeout(prepare, 200);
  compared = length === 1 ? 1 : 0;
  if (!running) stage(null);
}

function status(text, state) {
  at("tray-status").textContent = text;
  at("tray").dataset.state = state;
}

function prepare() {
  clearTimeout(waiting);
  const abort = new AbortController();
  const started = performance.now();
  status("Reading the references…", "busy");
  const mine = { abort, ready: api.upload(tray.blobs, abort.signal) };
  set = mine;
  mine.ready.then(
    (answer) => {
      const took = answer.known ? "" : ` (${seconds((performance.now() - started) / 1000)})`;
      if (set === mine) status(`References known${took}. Edits start at once.`, "ready");
    },
    (error) => {
      if (set !== mine) return;
      set = null;
      status("", "");
      fail(error);
    },
  );
  return mine;
}

// An image

function wanted() {
  const size = new FormData(at("composer")).get("size");
  if (!at("seed").value || at("lock").getAttribute("aria-pressed") === "false") {
    at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  }
  const fields = {
    prompt: at("prompt").value.trim(),
    size: size === "custom" ? `${at("width").value}x${at("height").value}` : size,
    seed: Number(at("seed").value),
    num_inference_steps: Number(at("steps").value),
  };
  if (loras().length) fields.loras = Object.fromEntries(loras());
  return fields;
}

async function ask(fields, abort, retry = true) {
  const id = tray.blobs.length ? (await (set ?? prepare()).ready).id : "";
  try {
    return await api.make(fields, id, abort.signal, (blob, index) => {
      at("progress").value = (index + 1) / 4;
      place(blob, true);
    });
  } catch (error) {
    if (!retry || error.code !== "reference_not_found") throw error;
    prepare(); // the server forgot them meanwhile
    return ask(fields, abort, false);
  }
}

async function run() {
  if (running) return;
  const abort = (running = new AbortController());
  const [fields, references, started] = [wanted(), tray.blobs, performance.now()];
  fail("");
  stage(null);
  busy(true);
  const clock = setInterval(() => {
    at("headline").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  }, 100);
  try {
    const stopped = new Promise((_, reject) => {
      abort.signal.onabort = () => reject(new DOMException("", "AbortError"));
    });
    const done = await Promise.race([ask(fields, abort), stopped]);
    const entry = {
      fields, references, image: done.image, known: done.references_known,
      timings: done.timings ?? {}, total: (performance.now() - started) / 1000,
    };
    await history.add(entry);
    drawHistory();
    stage(entry);
    say("The image is ready.");
  } catch (error) {
    stage(null);
    if (error.name === "AbortError") say("Cancelled.");
    else fail(error);
  } finally {
    clearInterval(clock);
    running = null;
    busy(false);
  }
}

function busy(yes) {
  at("run").hidden = yes;
  at("cancel").hidden = !yes;
  at("progress").hidden = !yes;
  at("progress").removeAttribute("value");
  at("frame").classList.toggle("busy", yes);
  if (!yes) return;
  at("frame").hidden = false;
  at("empty").hidden = true;
  at("cancel").focus();
  at("frame").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

// The stage

function place(blob, soft = false) {
  const image = at("image");
  image.src = url(blob);
  image.classList.toggle("soft", soft);
  image.onload = () => {
    if (!soft) at("frame").style.setProperty("--natural", image.naturalWidth);
    at("frame").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  };
}

/** Shows an entry of the history; without one, the first reference, as it waits for its edit. */
function stage(entry) {
  shown = entry;
  const blob = entry?.image ?? tray.blobs[0];
  at("empty").hidden = Boolean(blob);
  at("frame").hidden = !blob;
  at("frame").classList.toggle("waits", !entry);
  at("actions").hidden = !entry;
  at("headline").textContent = "";
  at("stages").replaceChildren();
  if (blob) place(blob);
  at("image").alt = entry ? `Result: ${entry.fields.prompt}` : "The first reference";
  if (entry) describe(entry);
  compare(entry ? compared : 0);
  for (const item of at("strip").children) {
    item.firstChild.setAttribute("aria-current", item.entry === entry);
  }
}

function compare(number) {
  const blob = shown?.references[number - 1];
  at("before").hidden = at("divider").hidden = !blob;
  if (blob) at("before").src = url(blob);
  for (const [index, button] of [...at("compare").children].entries()) {
    button.setAttribute("aria-pressed", index + 1 === number);
  }
}

function describe(entry) {
  const kind = entry.image.type.split("/")[1];
  const name = entry.fields.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  Object.assign(at("save"), { href: url(entry.image), download: `${name}.${kind}` });
  at("headline").replaceChildren(element("strong", { textContent: seconds(entry.total) }));
  if (entry.references.length) {
    const text = entry.known ? "references known" : "references new";
    at("headline").append(element("span", { className: `badge ${entry.known}`, textContent: text }));
  }
  at("headline").append(element("span", { textContent: `seed ${entry.fields.seed}` }));
  at("compare").replaceChildren(...entry.references.map((blob, index) => {
    const button = element("button", { type: "button" }, element("img", { src: url(blob), alt: "" }));
    button.setAttribute("aria-label", `Compare with reference ${index + 1}`);
    button.onclick = () => compare((compared = compared === index + 1 ? 0 : index + 1));
    return button;
  }));
  const parts = stagesOf(entry.timings);
  const bar = element("div", { className: "bar" }, ...parts.map(([, value], index) => {
    const piece = element("i", { className: `part${index}` });
    piece.style.flexGrow = value;
    return piece;
  }));
  bar.setAttribute("aria-hidden", "true");
  const list = element("ul", {}, ...parts.map(([label, value], index) => element(
    "li", {}, element("i", { className: `part${index}` }), `${label} `,
    element("b", { textContent: seconds(value) }))));
  at("stages").replaceChildren(...(parts.length ? [bar, list] : []));
}

/** Names and seconds of the stages that took any. */
function stagesOf(timings) {
  const sum = (name) => [timings[name] ?? 0].flat().reduce((all, value) => all + value, 0);
  const count = (name) => [timings[name] ?? []].flat().length;
  const parts = [
    ["queue", sum("queued")],
    ["prompt", sum("text")],
    ["references", sum("vae_encode") + sum("encode_references")],
    ["first step", sum("first_step")],
    [`${count("cached_steps")} cached steps`, sum("cached_steps")],
    [`${count("plain_steps")} steps`, sum("plain_steps")],
    ["decoding", sum("vae_decode")],
  ];
  return parts.filter(([, value]) => value >= 0.0005);
}

// History

function drawHistory() {
  at("history").hidden = !history.entries.length;
  at("strip").replaceChildren(...history.entries.map((entry) => {
    const image = element("img", { src: url(entry.image), alt: "", loading: "lazy" });
    const button = element("button", { type: "button", title: entry.fields.prompt }, image);
    button.setAttribute("aria-label", `Bring back: ${entry.fields.prompt}`);
    button.onclick = () => bringBack(entry);
    return element("li", { entry }, button);
  }));
}

function bringBack(entry) {
  if (running) return;
  const { prompt, size, seed, num_inference_steps: steps, loras: weights = {} } = entry.fields;
  at("prompt").value = prompt;
  at("seed").value = seed;
  at("steps").value = steps;
  lock(true);
  const preset = at("shapes").querySelector(`[value="${size}"]`);
  (preset ?? at("shapes").querySelector("[value=custom]")).checked = true;
  if (!preset) [at("width").value, at("height").value] = size.split("x");
  for (const slider of at("loras").querySelectorAll("input")) {
    slider.value = weights[slider.name] ?? 0;
    slider.oninput();
  }
  const same = entry.references.every((blob, index) => tray.blobs[index] === blob);
  if (!same || entry.references.length !== tray.blobs.length) tray.set(entry.references);
  compared = entry.references.length === 1 ? 1 : 0;
  fail("");
  summarize();
  stage(entry);
}

// Controls

function lock(yes) {
  at("lock").setAttribute("aria-pressed", yes);
}

function summarize() {
  const size = new FormData(at("composer")).get("size");
  const own = size === "custom";
  at("custom").hidden = !own;
  at("width").disabled = at("height").disabled = !own;
  const parts = [own ? `${at("width").value} × ${at("height").value}` : size.replace("x", " × ")];
  parts.push(`${at("steps").value} steps`, ...loras().map(([name, weight]) => `${name} ${weight}`));
  at("summary").textContent = parts.join(" · ");
}

function theme(change) {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  let now = localStorage.getItem("klein-kv-theme");
  if (change) localStorage.setItem("klein-kv-theme", now = (now ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark");
  if (now) root.dataset.theme = now;
}

at("composer").onsubmit = (event) => {
  event.preventDefault();
  run();
};
at("composer").oninput = summarize;
at("composer").addEventListener("invalid", (event) => {
  if (at("settings").contains(event.target)) at("settings").open = true;
}, true);
at("cancel").onclick = () => running?.abort();
at("lock").onclick = () => lock(at("lock").getAttribute("aria-pressed") === "false");
at("seed").onchange = () => lock(at("seed").value !== "");
at("theme").onclick = () => theme(true);
at("divider").oninput = () => at("frame").style.setProperty("--at", `${at("divider").value}%`);
at("further").onclick = () => {
  tray.set([shown.image]);
  at("prompt").select();
};
at("forget").onclick = async () => {
  await history.clear();
  drawHistory();
};
at("change-key").onclick = askForKey;
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  api.key.set(at("key").value);
  at("key-form").hidden = true;
  fail("");
  connect();
  if (tray.blobs.length) prepare();
};
at("files").onchange = () => {
  tray.add([...at("files").files]);
  at("files").value = "";
};

document.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("composer").requestSubmit();
  if (event.key === "Escape") running?.abort();
};
document.onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  tray.add(event.clipboardData.files);
};
document.ondragover = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  at("curtain").hidden = false;
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) at("curtain").hidden = true;
};
document.ondrop = (event) => {
  event.preventDefault();
  at("curtain").hidden = true;
  tray.add(event.dataTransfer.files);
};

theme(false);
at("settings").open = matchMedia("(min-width: 60rem)").matches;
referencesChanged();
summarize();
connect();
await history.open();
drawHistory();
