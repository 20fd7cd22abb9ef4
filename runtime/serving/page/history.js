// What was made in this browser, newest first. Stays in IndexedDB, or in memory where there is none.

const MOST = 40;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class History {
  #database = null;
  entries = [];

  /** Reads what earlier visits left. */
  async open() {
    try {
      const request = indexedDB.open("klein-kv", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("made", { keyPath: "id" });
      this.#database = await done(request);
      this.entries = (await done(this.#store("readonly").getAll())).reverse();
    } catch {
      this.#database = null; // a private window: the entries last as long as the page
    }
  }

  #store(mode) {
    return this.#database.transaction("made", mode).objectStore("made");
  }

  async #write(change) {
    try {
      if (this.#database) await change(this.#store("readwrite"));
    } catch {
      this.#database = null; // no space left: likewise
    }
  }

  /** Puts one in front; the oldest goes. */
  async add(entry) {
    entry.id = Date.now();
    this.entries.unshift(entry);
    await this.#write((store) => done(store.put(entry)));
    for (const old of this.entries.splice(MOST)) {
      await this.#write((store) => done(store.delete(old.id)));
    }
  }

  async clear() {
    this.entries = [];
    await this.#write((store) => done(store.clear()));
  }
}
