// What was made in this browser, newest first: in IndexedDB, or in memory where there is none.

const MOST = 40;
let database = null;
export let entries = [];

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const store = (mode) => database.transaction("made", mode).objectStore("made");

/** Reads what earlier visits left. */
export async function open() {
  try {
    const request = indexedDB.open("klein-kv", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("made", { keyPath: "id" });
    database = await done(request);
    entries = [...entries, ...(await done(store("readonly").getAll())).reverse()];
  } catch {
    database = null; // a private window: the entries last as long as the page
  }
}

async function write(...changes) {
  try {
    if (database) for (const change of changes) await done(change(store("readwrite")));
  } catch {
    database = null; // no space left: likewise
  }
}

/** Puts one in front; the oldest goes. */
export function add(entry) {
  entries.unshift(Object.assign(entry, { id: Date.now() }));
  const old = entries.splice(MOST);
  return write((made) => made.put(entry), ...old.map(({ id }) => (made) => made.delete(id)));
}

export function clear() {
  entries = [];
  return write((made) => made.clear());
}
