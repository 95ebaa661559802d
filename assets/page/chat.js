/** The chat: sends a conversation, streams the answer into it, and shows the conversation that is open. */

import { $, element, iconButton } from "./elements.js";
import { Failure, streamChat } from "./server.js";
import { turn } from "./turns.js";

const MAX_TOOL_ROUNDS = 4;
const TITLE_LENGTH = 60;
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather for a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const TOOL_RESULT = JSON.stringify({ temperature: 21, condition: "sunny" });
const WITH_TOOL = { tool: "get_weather" };
const EXAMPLES = {
  nano: [
    ["What can you do?"], ["What is 47 - 18?"], ["Count down from 10 to 1."],
    ["Reverse the word planet."], ["List five animals."], ["What is the weather in Oslo?", WITH_TOOL],
  ],
  other: [
    ["Explain in three sentences what a KV cache is."], ["Compare bfloat16, float16 and MXFP4 in a table."],
    ["Write a Python function that returns the primes below n."], ["What is the weather in Oslo?", WITH_TOOL],
  ],
};
const INTRODUCTION = {
  nano: "A tiny demonstration model: it adds, counts, spells, lists, fills JSON and calls tools, and knows nothing else.",
  other: "Ask a question, or start with one of these.",
};

/** The messages as the API takes them: without what the page adds, and without answers that hold nothing. */
function wire(messages) {
  return messages
    .filter((m) => m.role !== "assistant" || m.content || m.tool_calls)
    .map(({ page, ...message }) => message);
}

/** Adds a chunk's delta to a message. */
function apply(message, delta) {
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content || "") + delta.reasoning_content;
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls || []) {
    message.tool_calls ||= [];
    if (part.id) message.tool_calls[part.index] = { id: part.id, type: "function", function: { name: part.function.name, arguments: "" } };
    message.tool_calls[part.index].function.arguments += part.function.arguments || "";
  }
}

export class Chat {
  /** `onChange`: the list of conversations changed; `onUnauthorized`: the server asked for a key. */
  constructor(conversations, { onChange, onUnauthorized }) {
    Object.assign(this, { conversations, onChange, onUnauthorized, model: null, running: new Map(), views: new Map(), due: new Set(), pause: 0 });
    $("form").addEventListener("submit", (event) => this.#submit(event));
    $("input").addEventListener("input", () => this.#grow());
    $("input").addEventListener("keydown", (event) => this.#key(event));
    $("stop").addEventListener("click", () => this.stop());
    this.open(conversations.create());
  }

  /** Shows a conversation; answers go on in those that are not shown. */
  open(conversation) {
    this.current = conversation;
    this.views.clear();
    $("log").replaceChildren();
    if (!conversation.messages.length) this.#welcome();
    for (const message of conversation.messages) this.#show(message);
    this.#refresh();
    $("log").scrollTop = $("log").scrollHeight;
  }

  /** Called when the server's model is known. */
  setModel(id, size) {
    if (this.model?.id === id) return;
    this.model = { id, size };
    if (!this.current.messages.length) this.#welcome();
  }

  /** Saves what was answered so far. What follows is the end of the page, not an error. */
  close() {
    for (const id of this.running.keys()) this.conversations.save(this.conversations.all.get(id));
    this.closed = true;
  }

  stop(conversation = this.current) {
    this.running.get(conversation.id)?.abort();
  }

  #welcome() {
    const kind = this.model?.size === "nano" ? "nano" : "other";
    const buttons = EXAMPLES[kind].map(([text, { tool } = {}]) => {
      const button = element("button", { type: "button", className: "example" }, element("span", { textContent: text }));
      if (tool) button.append(element("small", { textContent: `calls ${tool}` }));
      button.addEventListener("click", () => {
        if (tool) $("tool").value = tool;
        this.#ask(text);
      });
      return button;
    });
    const heading = element("h2", { textContent: this.model ? `Chat with ${this.model.id}` : "Chat" });
    const text = element("p", { textContent: this.model ? INTRODUCTION[kind] : "" });
    $("log").replaceChildren(element("div", { className: "welcome" }, heading, text, element("div", { className: "examples" }, ...(this.model ? buttons : []))));
  }

  #show(message) {
    const view = turn(message);
    this.views.set(message, view);
    $("log").append(view.root);
  }

  /** Redraws a message in the next frame, if its conversation is open. Keeps the end in view unless the user scrolled up. */
  #redraw(message) {
    if (!this.due.size) setTimeout(() => requestAnimationFrame(() => this.#draw()), this.pause);
    this.due.add(message);
  }

  #draw() {
    const started = performance.now();
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    for (const changed of this.due) this.views.get(changed)?.update();
    this.due.clear();
    if (atEnd) log.scrollTop = log.scrollHeight;
    this.pause = 3 * (performance.now() - started); // a very long answer is drawn less often
  }

  #refresh() {
    const busy = this.running.has(this.current.id);
    const hadFocus = document.activeElement === $("stop") || document.activeElement === $("send");
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    if (hadFocus) $(busy ? "stop" : "input").focus();
    $("retry")?.remove();
    const last = this.current.messages.at(-1);
    if (busy || last?.role !== "assistant") return;
    const button = iconButton("retry", "Try again", () => this.#retry());
    button.id = "retry";
    const actions = this.views.get(last).actions;
    actions.insertBefore(button, actions.lastElementChild);
  }

  #grow() {
    const input = $("input");
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight + 2}px`;
  }

  #key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.#submit(event);
    if (event.key === "Escape") this.stop();
  }

  #submit(event) {
    event.preventDefault();
    const text = $("input").value.trim();
    if (!text || this.running.has(this.current.id)) return;
    $("input").value = "";
    this.#grow();
    this.#ask(text);
  }

  #ask(text) {
    const conversation = this.current;
    if (!conversation.messages.length) {
      conversation.title = text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
      $("log").replaceChildren();
    }
    this.#add(conversation, { role: "user", content: text });
    this.#run(conversation);
  }

  #retry() {
    const { messages } = this.current;
    messages.length = messages.findLastIndex((message) => message.role === "user") + 1;
    this.open(this.current);
    this.#run(this.current);
  }

  #add(conversation, message) {
    conversation.messages.push(message);
    this.#save(conversation);
    if (conversation !== this.current) return;
    this.#show(message);
    $("log").scrollTop = $("log").scrollHeight;
  }

  #save(conversation) {
    if (conversation.deleted || this.closed) return;
    this.conversations.save(conversation);
    this.onChange();
  }

  /** Answers a conversation, and goes on after tool calls. */
  async #run(conversation) {
    const stopper = new AbortController();
    this.running.set(conversation.id, stopper);
    if (conversation === this.current) this.#refresh();
    $("announce").textContent = "Answering";
    for (let round = 0; round < MAX_TOOL_ROUNDS; round++) {
      const message = { role: "assistant", content: "", page: { busy: true } };
      const messages = wire(conversation.messages);
      this.#add(conversation, message);
      await this.#answer(messages, message, stopper.signal);
      delete message.page.busy;
      this.#redraw(message);
      this.#save(conversation);
      if (!message.tool_calls) break;
      for (const { id } of message.tool_calls) this.#add(conversation, { role: "tool", tool_call_id: id, content: TOOL_RESULT });
    }
    this.running.delete(conversation.id);
    this.onChange();
    if (conversation !== this.current) return;
    this.#refresh();
    const { error, ended } = conversation.messages.at(-1).page || {};
    $("announce").textContent = error || ended || "Answer complete";
  }

  /** Streams one answer into `message`; errors become a note in it. */
  async #answer(messages, message, signal) {
    const body = { model: this.model?.id || "gpt-oss", messages, stream: true, stream_options: { include_usage: true } };
    if ($("effort").value) body.reasoning_effort = $("effort").value;
    if ($("profile").value) body.profile = $("profile").value;
    if ($("tool").value) body.tools = [WEATHER];
    const started = performance.now();
    const seconds = () => (performance.now() - started) / 1000;
    try {
      for await (const chunk of streamChat(body, signal)) {
        const choice = chunk.choices[0];
        if (choice && Object.keys(choice.delta).some((name) => name !== "role")) message.page.first_s ??= seconds();
        if (choice) apply(message, choice.delta);
        if (choice?.finish_reason === "length") message.page.ended = "The answer reached its token limit.";
        if (chunk.usage) Object.assign(message.page, { tokens: chunk.usage.completion_tokens, total_s: seconds() });
        this.#redraw(message);
      }
    } catch (error) {
      delete message.tool_calls; // perhaps incomplete
      if (error.name === "AbortError") message.page.ended = "Stopped.";
      else this.#failed(message, error);
    }
  }

  #failed(message, error) {
    const known = error instanceof Failure;
    Object.assign(message.page, { error: known ? error.message : "The page had an error.", detail: known ? error.detail : String(error) });
    if (error.status === 401) this.onUnauthorized();
  }
}
