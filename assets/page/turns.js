/** How one message of a conversation is shown. A view is updated while its message grows. */

import { copyButton, element } from "./elements.js";
import { MarkdownView } from "./markdown.js";

const call = ({ function: { name, arguments: given } }) => `${name}(${given})`;

function userTurn(message) {
  const bubble = element("div", { className: "bubble", textContent: message.content });
  const actions = element("div", { className: "actions" }, copyButton("Copy", () => message.content));
  return element("article", { className: "turn user", ariaLabel: "You" }, bubble, actions);
}

function toolTurn(message) {
  const text = element("code", { textContent: message.content });
  return element("article", { className: "turn tool", ariaLabel: "Tool result" }, "Result (made up) ", text);
}

/** Tokens, time to the first one, and speed of an answer. */
function meta({ tokens, first_s: first, total_s: total }) {
  if (!tokens) return "";
  const after = total - first;
  const speed = after > 0.02 && tokens > 1 ? ` · ${Math.round((tokens - 1) / after)} tokens/s` : "";
  return `${tokens} tokens · first after ${Math.round(first * 1000)} ms${speed}`;
}

class AssistantTurn {
  constructor(message) {
    this.message = message;
    message.page ||= {};
    this.summary = element("summary");
    this.reasoning = element("div");
    this.details = element("details", { hidden: true }, this.summary, this.reasoning);
    this.answer = element("div", { className: "answer" });
    this.markdown = new MarkdownView(this.answer);
    this.calls = element("div", { className: "calls" });
    this.note = element("p", { className: "note", hidden: true });
    this.waiting = element("span", { className: "waiting", ariaHidden: "true" }, element("i"), element("i"), element("i"));
    this.meta = element("span", { className: "meta" });
    this.actions = element("div", { className: "actions" }, copyButton("Copy", () => message.content), this.meta);
    this.root = element("article", { className: "turn assistant", ariaLabel: "Assistant" });
    this.root.append(this.details, this.answer, this.calls, this.note, this.waiting, this.actions);
    this.update();
  }

  update() {
    const { message } = this;
    const { busy, error, detail, ended } = message.page;
    const thinking = busy && !message.content && !message.tool_calls;
    this.details.hidden = !message.reasoning_content;
    this.summary.textContent = thinking ? "Reasoning …" : "Reasoning";
    this.reasoning.textContent = message.reasoning_content || "";
    this.markdown.update(message.content);
    this.calls.replaceChildren(...(message.tool_calls || []).map((c) => element("code", { className: "call", textContent: call(c) })));
    this.waiting.hidden = !busy;
    this.actions.hidden = Boolean(busy);
    this.actions.firstElementChild.hidden = !message.content;
    this.meta.textContent = meta(message.page);
    this.note.hidden = !(error || ended);
    this.note.classList.toggle("error", Boolean(error));
    this.note.textContent = error || ended || "";
    if (detail) this.note.append(element("small", { textContent: `The server's message: ${detail}` }));
  }
}

/** The element of a message, and what updates it. */
export function turn(message) {
  if (message.role === "assistant") return new AssistantTurn(message);
  return { root: message.role === "user" ? userTurn(message) : toolTurn(message), update() {} };
}
