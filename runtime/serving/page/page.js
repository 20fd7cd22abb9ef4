// The page: what is asked for on the left, what came of it on the right.

import * as api from "./api.js";
import { at, button, element, fail, picture, say, seconds } from "./elements.js";
import * as history from "./history.js";
import * as mask from "./mask.js";
import { onStage, preview, show, url } from "./stage.js";
import * as tray from "./tray.js";

let plain = false; // the model knows no reference resources: pictures go with every edit
let running = null; // {abort, since} of the image that is being made
let sent = null; // {abort, answer: Promise} of the references as they stand
let waiting; // timer: pictures that come together are sent together

// The server

async function connect() {
  try {
    const model = await api.model();
    at("model").textContent = model.id;
    plain = model.variant === "plain";
    showLoras(model.loras ?? []);
  } catch (error) {
    const known = { 401: "Waiting for a key", 503: "The model is loading…" };
    at("model").textContent = known[error.status] ?? error.message;
    if (error.status === 401) askForKey();
    else setTimeout(connect, 3000);
  }
}

function askForKey() {
  at("key-form").hidden = at("change-key").hidden = false;
  at("key").focus();
}

function refused(error) {
  fail(error.message);
  if (error.status === 401) askForKey();
}

// References go up while the prompt is still being typed, so that an edit finds them known

function referencesChanged() {
  sendSoon();
  mask.on(tray.blobs()[0]);
  if (!running) show(null, tray.blobs()[0]);
}

function sendSoon() {
  forgetSent();
  const any = tray.blobs().length > 0 && !plain;
  status(any ? "Sending…" : "");
  if (any) waiting = setTimeout(send, 200);
}

function status(text, state = "") {
  at("tray-status").textContent = text;
  at("tray").dataset.state = state;
}

function forgetSent() {
  clearTimeout(waiting);
  sent?.abort.abort();
  sent = null;
}

/** Sends the references as they stand; what is under way already is left alone. */
function send() {
  clearTimeout(waiting);
  if (sent) return sent;
  const abort = new AbortController();
  const started = performance.now();
  const mine = (sent = { abort, answer: api.upload(tray.blobs(), loras(), abort.signal) });
  status("Reading the references…", "busy");
  mine.answer.then(
    ({ known }) => {
      const took = known ? "" : ` after ${seconds((performance.now() - started) / 1000)}`;
      if (sent === mine) status(`Known${took}: edits run cached steps alone.`, "ready");
    },
    (error) => {
      if (sent !== mine) return;
      sent = null;
      status("");
      refused(error);
    },
  );
  return mine;
}

// An image

function wanted() {
  if (!at("seed").value || !locked()) {
    at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  }
  return {
    prompt: at("prompt").value.trim(),
    size: size(),
    seed: Number(at("seed").value),
    num_inference_steps: Number(at("steps").value),
    lora: loras(),
  };
}

async function make(fields, masked, abort, again = true) {
  try {
    const pictures = plain ? tray.blobs() : [];
    const ids = tray.blobs().length && !plain ? [(await send().answer).id] : [];
    abort.signal.throwIfAborted(); // while they were sent
    const all = masked ? { ...fields, mask: masked } : fields;
    return await api.make(all, ids, pictures, abort.signal, (blob, index) => {
      if (abort.signal.aborted) return;
      at("progress").value = (index + 1) / 4;
      preview(blob);
    });
  } catch (error) {
    if (!again || error.code !== "reference_not_found") throw error;
    forgetSent(); // so did the server
    return make(fields, masked, abort, false);
  }
}

function stopped(signal) {
  return new Promise((_, reject) => {
    signal.onabort = () => reject(signal.reason);
  });
}

async function run() {
  const [fields, references, abort] = [wanted(), tray.blobs(), new AbortController()];
  running = { abort, since: performance.now() };
  mask.paint(false);
  fail("");
  show(null, references[0]);
  busy(true);
  say("Making the image.");
  const elapsed = () => (performance.now() - running.since) / 1000;
  const clock = setInterval(() => {
    at("headline").textContent = `${elapsed().toFixed(1)} s`;
  }, 100);
  try {
    const masked = await mask.file();
    const { image, references_known: known, timings = {} } =
      await Promise.race([make(fields, masked, abort), stopped(abort.signal)]);
    const entry = { fields, references, masked, image, known, timings, total: elapsed() };
    history.add(entry);
    drawHistory();
    show(entry);
    say(`The image is ready after ${seconds(entry.total)}.`);
  } catch (error) {
    show(null, tray.blobs()[0]);
    if (error.name === "AbortError") say("Cancelled.");
    else refused(error);
  } finally {
    clearInterval(clock);
    running = null;
    busy(false);
  }
}

function busy(yes) {
  at("run").classList.toggle("stop", yes);
  at("run").firstChild.data = yes ? "Cancel " : "Make image ";
  at("run").lastChild.textContent = yes ? "Esc" : "Ctrl ↵";
  at("progress").hidden = !yes;
  at("progress").removeAttribute("value");
  at("frame").classList.toggle("busy", yes);
  if (!yes) return;
  at("frame").hidden = false;
  at("empty").hidden = true;
  at("facts").scrollIntoView({ block: "nearest", behavior: "smooth" }); // on telephones
}

// History

function drawHistory() {
  at("history").hidden = !history.entries.length;
  at("strip").replaceChildren(...history.entries.map((entry) => {
    const image = picture(url(entry.image));
    const back = button(`Bring back: ${entry.fields.prompt}`, () => bringBack(entry), image);
    return Object.assign(element("li", back), { entry, title: entry.fields.prompt });
  }));
}

function bringBack(entry) {
  if (running) return;
  const { fields, references } = entry;
  at("prompt").value = fields.prompt;
  at("seed").value = fields.seed;
  at("steps").value = fields.num_inference_steps;
  lock(true);
  const choice = (value) => at("shapes").querySelector(`[value="${value}"]`);
  (choice(fields.size) ?? choice("custom")).checked = true;
  if (size() !== fields.size) [at("width").value, at("height").value] = fields.size.split("x");
  const weights = Object.fromEntries(fields.lora.map((text) => text.split(":")));
  for (const slider of sliders()) {
    slider.value = weights[slider.name] ?? 0;
    slider.oninput();
  }
  tray.set(references);
  mask.on(references[0]).then(() => mask.restore(entry.masked));
  fail("");
  summarize();
  show(entry);
}

// Settings

const locked = () => at("lock").getAttribute("aria-pressed") === "true";
const lock = (yes) => at("lock").setAttribute("aria-pressed", yes);
const sliders = () => [...at("loras").querySelectorAll("input")];
const loras = () => sliders().filter((x) => Number(x.value)).map((x) => `${x.name}:${x.value}`);

function size() {
  const { value } = at("shapes").querySelector(":checked");
  return value === "custom" ? `${at("width").value}x${at("height").value}` : value;
}

function showLoras(names) {
  at("loras").hidden = !names.length;
  at("loras").replaceChildren(at("loras").firstElementChild, ...names.map((name) => {
    const slider = Object.assign(element("input"), {
      type: "range", min: -4, max: 4, step: 0.05, value: 0, name, onchange: sendSoon });
    const output = element("output");
    slider.oninput = () => {
      const weight = Number(slider.value);
      output.textContent = weight ? weight.toFixed(2) : "off";
      slider.style.setProperty("--from", `${Math.min(50, 50 + weight * 12.5)}%`);
      slider.style.setProperty("--to", `${Math.max(50, 50 + weight * 12.5)}%`);
    };
    slider.oninput();
    return element("label", element("span", name), slider, output);
  }));
}

function summarize() {
  const custom = at("shapes").querySelector(":checked").value === "custom";
  at("custom").hidden = !custom;
  at("width").disabled = at("height").disabled = !custom;
  const parts = [size().replace("x", " × "), `${at("steps").value} steps`, ...loras()];
  at("summary").textContent = parts.join(" · ");
}

// What people do

at("tray").addEventListener("change", referencesChanged);
at("composer").onsubmit = (event) => {
  event.preventDefault();
  if (!running) run();
  else if (performance.now() - running.since > 400) running.abort.abort(); // no double click
};
at("composer").oninput = summarize;
at("composer").addEventListener("invalid", (event) => {
  if (at("settings").contains(event.target)) at("settings").open = true;
}, true);
at("paint").onclick = () => {
  show(null, tray.blobs()[0]);
  mask.paint(!mask.isPainting());
};
at("lock").onclick = () => lock(!locked());
at("seed").onchange = () => lock(at("seed").value !== "");
at("further").onclick = () => {
  tray.set([onStage().image]);
  at("prompt").select();
};
at("forget").onclick = () => {
  if (confirm("Remove all images of the history from this browser?")) {
    history.clear();
    drawHistory();
  }
};
at("theme").onclick = () => {
  const { theme } = document.documentElement.dataset;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("klein-kv-theme", dark ? "light" : "dark");
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
at("change-key").onclick = askForKey;
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  api.key.set(at("key").value);
  at("key-form").hidden = true;
  fail("");
  connect();
  sendSoon();
};
at("files").onchange = () => tray.add([...at("files").files]).then(() => (at("files").value = ""));
document.onkeydown = (event) => {
  const enter = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (enter && !running) at("composer").requestSubmit();
  if (event.key === "Escape") running?.abort.abort();
};
document.onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  tray.add([...event.clipboardData.files]);
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
  at("curtain").hidden = true;
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  tray.add([...event.dataTransfer.files]);
};

document.documentElement.dataset.theme = localStorage.getItem("klein-kv-theme") ?? "";
at("settings").open = matchMedia("(min-width: 60rem)").matches;
referencesChanged();
summarize();
connect();
history.open().then(drawHistory);
