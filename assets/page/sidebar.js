/** The list of conversations: open, rename, delete. */

import { $, ask, element, iconButton } from "./elements.js";

export class Sidebar {
  constructor(conversations, chat, { onOpen }) {
    Object.assign(this, { conversations, chat, onOpen });
    $("new").addEventListener("click", () => this.#open(conversations.create()));
    this.draw();
  }

  draw() {
    if ($("conversations").querySelector("input")) return; // a title is being edited
    const focused = document.activeElement?.dataset?.focus;
    $("conversations").replaceChildren(...this.conversations.list.map((conversation) => this.#item(conversation)));
    if (focused) $("conversations").querySelector(`[data-focus="${focused}"]`)?.focus();
    $("storage").textContent = this.conversations.stored
      ? "Conversations are stored in this browser only."
      : "This browser's storage is full or blocked: new messages are lost when the page is closed.";
  }

  #item(conversation) {
    const { id, title } = conversation;
    const open = element("button", { type: "button", className: "open", textContent: title });
    open.dataset.focus = id;
    if (conversation === this.chat.current) open.setAttribute("aria-current", "true");
    if (this.chat.running.has(id)) open.append(element("i", { className: "busy", title: "answering" }));
    open.addEventListener("click", () => this.#open(conversation));
    const silent = { silent: true };
    const item = element("li", {}, open);
    item.append(
      iconButton("rename", `Rename ${title}`, () => this.#rename(conversation, item), silent),
      iconButton("delete", `Delete ${title}`, () => this.#delete(conversation), silent),
    );
    return item;
  }

  #open(conversation) {
    this.chat.open(conversation);
    this.draw();
    this.onOpen();
  }

  #rename(conversation, item) {
    const input = element("input", { value: conversation.title, ariaLabel: "Title", maxLength: 100 });
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      if (keep && input.value.trim()) this.conversations.rename(conversation, input.value.trim());
      item.replaceChildren();
      this.draw();
      $("conversations").querySelector(`[data-focus="${conversation.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
    });
    input.addEventListener("blur", () => finish(true));
    item.replaceChildren(input);
    input.select();
  }

  async #delete(conversation) {
    $("delete-text").textContent = conversation.title;
    if (!(await ask($("delete-dialog")))) return;
    conversation.deleted = true;
    this.chat.stop(conversation);
    this.conversations.delete(conversation);
    if (conversation === this.chat.current) this.chat.open(this.conversations.create());
    this.draw();
    $("new").focus();
  }
}
