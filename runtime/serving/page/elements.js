// Small things that every part of the page needs.

export const at = (id) => document.getElementById(id);

export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

/** A button with a name for screen readers. */
export function button(name, onclick, ...children) {
  const made = Object.assign(element("button", ...children), { type: "button", onclick });
  made.setAttribute("aria-label", name);
  return made;
}

/** A picture that is described elsewhere. */
export function picture(src) {
  return Object.assign(new Image(), { src, alt: "", draggable: false, decoding: "async" });
}

export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}

/** Tells a screen reader. */
export function say(text) {
  at("live").textContent = text;
}

/** Shows what went wrong; "" takes it away. */
export function fail(text) {
  at("fault").textContent = text;
  at("fault").hidden = !text;
}
