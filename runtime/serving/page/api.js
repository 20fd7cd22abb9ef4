// The server's API, as this page uses it. Everything stays on the page's own origin.

const KEY = "klein-kv-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** A refusal: a sentence for people, and the code that the server gave. */
export class Refused extends Error {
  constructor(message, code = "", status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

/** Waits for the network; what a browser says when that fails helps nobody. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", "unreachable");
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await reached(fetch(path, { ...options, headers }));
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const wait = response.headers.get("retry-after");
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refused(
    wait ? `${message} Try again in ${wait} s.` : message, error?.code, response.status);
}

/** What the server runs. */
export async function model() {
  const { data } = await (await call("v1/models")).json();
  return data[0];
}

function form(fields, pictures) {
  const body = new FormData();
  for (const [name, values] of Object.entries(fields)) {
    for (const value of [values].flat()) body.append(name, value);
  }
  for (const [index, picture] of pictures.entries()) body.append("image[]", picture, `${index}`);
  return body;
}

/** Uploads pictures as one ordered set, whose keys and values are made at once for these LoRAs. */
export async function upload(pictures, lora, signal) {
  const body = form({ lora }, pictures);
  return (await call("v1/references", { method: "POST", body, signal })).json();
}

/**
 * Makes an image; `onPartial` gets what it is by now. `references` are ids of sets, `pictures` are
 * sent with it. Aborting the signal cancels it over there.
 */
export async function make(fields, references, pictures, signal, onPartial) {
  const edits = references.length || pictures.length;
  const body = form({ ...fields, references, stream: true, partial_images: 3 }, pictures);
  const path = edits ? "v1/images/edits" : "v1/images/generations";
  const response = await call(path, { method: "POST", body, signal });
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(event.error.message, event.error.code);
    if (event.type.endsWith(".partial_image")) onPartial(picture(event), event.partial_image_index);
    if (event.type.endsWith(".completed")) return { ...event, image: picture(event) };
  }
  throw new Refused("The server ended the answer before the image was done.", "incomplete");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) return;
    const parts = (text + value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((x) => x.startsWith("data:")).map((x) => x.slice(5));
      if (data.length && data[0].trim() !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}

function picture({ b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${output_format ?? "png"}` });
}
