/** The conversations of this browser: one entry of localStorage each. */

import { read } from "./server.js";

const PREFIX = "gptoss.chat.";

/** A conversation: {id, title, updated, messages}. Messages are the API's, with what the page adds under `page`. */
export class Conversations {
  constructor() {
    this.stored = true; // false: storage is blocked or full
    this.all = new Map();
    for (const name of names()) this.#load(name);
  }

  /** Sorted by last use. */
  get list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  create() {
    const id = Array.from(crypto.getRandomValues(new Uint32Array(2)), (n) => n.toString(36)).join("");
    return { id, title: "New chat", updated: Date.now(), messages: [] };
  }

  save(conversation) {
    conversation.updated = Date.now();
    this.all.set(conversation.id, conversation);
    this.stored = this.#write(conversation);
  }

  rename(conversation, title) {
    conversation.title = title;
    this.stored = this.#write(conversation);
  }

  delete(conversation) {
    this.all.delete(conversation.id);
    try {
      localStorage.removeItem(PREFIX + conversation.id);
    } catch {
      // storage is blocked: it was in memory only
    }
  }

  /** Takes over what another tab wrote; `busy`: the ids that this tab is writing. -> whether it concerned us. */
  changed(name, busy) {
    const id = name?.startsWith(PREFIX) ? name.slice(PREFIX.length) : null;
    if (id === null || busy.has(id)) return false;
    if (read(localStorage, name) === null) this.all.delete(id);
    else this.#load(name);
    return true;
  }

  #load(name) {
    try {
      const conversation = JSON.parse(localStorage.getItem(name));
      for (const { page } of conversation.messages) {
        if (page?.busy) Object.assign(page, { busy: false, ended: "The page was closed before the answer was complete." });
      }
      this.all.set(conversation.id, conversation);
    } catch {
      // damaged: left alone
    }
  }

  /** -> whether there was space for it. */
  #write(conversation) {
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }
}

function names() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  } catch {
    return [];
  }
}
