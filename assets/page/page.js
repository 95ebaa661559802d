/** The page at /: wires chat, conversations and figures, and asks the server how it is. */

import { Chat } from "./chat.js";
import { Conversations } from "./conversations.js";
import { $, ask } from "./elements.js";
import { Figures } from "./figures.js";
import { hasKey, health, read, setKey, stats } from "./server.js";
import { Sidebar } from "./sidebar.js";

const POLL_MS = 1000;
const POLL_HIDDEN_MS = 5000; // in a tab that is not looked at
const THEMES = ["auto", "light", "dark"];

// --- key ---

let asking = false;
let refused = false; // the user closed the dialog: asked again only when a message is refused

async function askForKey() {
  if (asking) return;
  asking = true;
  $("key-text").textContent = hasKey() ? "The server did not accept the key." : "This server requires an API key.";
  await editKey();
  asking = false;
}

async function editKey() {
  $("key").value = "";
  if (await ask($("key-dialog"))) {
    setKey($("key").value);
    refused = false;
  } else {
    refused = true;
  }
}

// --- view, theme ---

function show(view) {
  document.body.dataset.view = view;
  for (const tab of $("tabs").children) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
}

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  $("theme").lastElementChild.textContent = `Theme: ${theme}`;
  figures.restyle();
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "auto") + 1) % THEMES.length];
  setTheme(theme);
  try {
    if (theme === "auto") localStorage.removeItem("gptoss.theme");
    else localStorage.setItem("gptoss.theme", theme);
  } catch {
    // storage is blocked: until the page is closed
  }
}

// --- status ---

function say(state, text) {
  if ($("status").textContent === text) return;
  $("status").dataset.state = state;
  $("status").textContent = text;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

async function look() {
  const report = await health();
  const tags = [report.model_id, report.dtype, report.gpu_mode, report.profile];
  $("tags").textContent = tags.filter(Boolean).join(" · ");
  chat.setModel(report.model_id, report.model_size);
  figures.add(await stats());
  const states = { ok: "ok", degraded: "wait", unhealthy: "bad" };
  say(states[report.status] || "wait", report.reasons.length ? sentence(report.reasons.join("; ")) : "Ready");
}

async function poll() {
  try {
    await look();
  } catch (error) {
    say("bad", { 401: "API key required", 0: "No connection" }[error.status] || error.message);
    if (error.status === 401 && !refused) askForKey();
  }
  setTimeout(poll, document.hidden ? POLL_HIDDEN_MS : POLL_MS);
}

// --- start ---

const conversations = new Conversations();
const figures = new Figures();
const chat = new Chat(conversations, { onChange: () => sidebar.draw(), onUnauthorized: askForKey });
const sidebar = new Sidebar(conversations, chat, {
  onOpen() {
    show("chat");
    $("input").focus();
  },
});

const last = conversations.all.get(read(sessionStorage, "conversation"));
if (last) chat.open(last);
sidebar.draw();
addEventListener("pagehide", () => {
  chat.close();
  figures.save();
  try {
    sessionStorage.setItem("conversation", chat.current.id);
  } catch {
    // storage is blocked: a new chat after a reload
  }
});
addEventListener("pageshow", () => (chat.closed = false));
addEventListener("storage", (event) => {
  if (!conversations.changed(event.key, chat.running)) return;
  const same = conversations.all.get(chat.current.id);
  if (same && same !== chat.current) chat.open(same);
  sidebar.draw();
});
document.addEventListener("visibilitychange", () => figures.draw());
$("theme").addEventListener("click", nextTheme);
$("key-open").addEventListener("click", () => {
  $("key-text").textContent = hasKey() ? "A key is set. Leave the field empty to forget it." : "For a server that requires one.";
  editKey();
});
$("tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("button");
  if (tab) show(tab.dataset.view);
});
document.querySelector(".skip").addEventListener("click", () => show("chat"));
setTheme(document.documentElement.dataset.theme || "auto");
show("chat");
poll();
