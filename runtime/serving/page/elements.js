// Small things that every part of the page needs.

export const at = (id) => document.getElementById(id);

export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
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
