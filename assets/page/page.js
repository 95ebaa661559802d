"use strict";

const $ = (id) => document.getElementById(id);
const HISTORY = 120; // points of a plot, one a second
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather for a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const TOOL_RESULT = { temperature: 21, condition: "sunny" };

// --- figures ---

const ms = (s) => (s === null || s === undefined ? "-" : s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(2)} s`);
const percent = (x) => `${Math.round(x * 100)} %`;
let previous = null;

/** Tokens per second between two polls. */
function rate(stats, key) {
  if (!previous) return 0;
  const seconds = stats.uptime_s - previous.uptime_s;
  return seconds > 0 ? Math.max(0, (stats.tokens[key] - previous.tokens[key]) / seconds) : 0;
}

const TILES = [
  ["Running", (s) => s.engine.num_running, String],
  ["Waiting", (s) => s.requests.waiting, String],
  ["Answered", (s) => s.requests.ok, String],
  ["Failed", (s) => s.requests.failed, String],
  ["Output tokens / s", (s) => rate(s, "output"), (v) => v.toFixed(0)],
  ["Prompt tokens / s", (s) => rate(s, "prompt"), (v) => v.toFixed(0)],
  ["First token, p95", (s) => s.latency.ttft_s.p95, ms],
  ["Whole answer, p95", (s) => s.latency.e2e_s.p95, ms],
  ["Between tokens, p50", (s) => s.latency.inter_token_s.p50, ms],
  ["KV cache in use", (s) => s.engine.kv_usage, percent],
  ["Prompt cache hits", (s) => s.prompt_cache.hit_rate, percent],
  ["Prefix cache hits", (s) => s.prefix_cache.hit_rate, percent],
];
const plots = TILES.map(([title]) => {
  const tile = document.createElement("div");
  tile.className = "tile";
  const heading = document.createElement("h2");
  heading.textContent = title;
  const output = document.createElement("output");
  output.textContent = "-";
  const canvas = document.createElement("canvas");
  tile.append(heading, output, canvas);
  $("tiles").append(tile);
  return { output, canvas, points: [] };
});

function draw({ canvas, points }) {
  const width = (canvas.width = canvas.clientWidth * devicePixelRatio);
  const height = (canvas.height = canvas.clientHeight * devicePixelRatio);
  const pen = canvas.getContext("2d");
  const top = Math.max(...points, 1e-9);
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  pen.lineWidth = 1.5 * devicePixelRatio;
  pen.beginPath();
  points.forEach((value, i) => {
    const x = ((HISTORY - points.length + i) / (HISTORY - 1)) * width;
    const y = height - 2 - (value / top) * (height - 5);
    i ? pen.lineTo(x, y) : pen.moveTo(x, y);
  });
  pen.stroke();
}

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function say(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function poll() {
  try {
    const health = await (await fetch("/health")).json();
    const response = await fetch("/stats", { headers: headers() });
    if (response.status === 401) throw new Error("needs the API key");
    const stats = await response.json();
    say([health.status, ...health.reasons].join(": "), health.status !== "ok");
    $("tags").textContent = `${stats.model_id} · ${stats.dtype} · ${stats.gpu_mode} · ${stats.profile}`;
    TILES.forEach(([, read, show], i) => {
      const value = read(stats);
      plots[i].output.textContent = show(value);
      plots[i].points = [...plots[i].points, Number(value) || 0].slice(-HISTORY);
      draw(plots[i]);
    });
    showGpus(stats.gpus);
    previous = stats;
  } catch (error) {
    say(error.message, true);
  }
  setTimeout(poll, 1000);
}

function showGpus(gpus) {
  $("gpus").hidden = !gpus.length;
  const gb = (n) => (n / 1e9).toFixed(1);
  $("gpus").tBodies[0].replaceChildren(
    ...gpus.map((gpu) => {
      const row = document.createElement("tr");
      for (const text of [
        `${gpu.index} ${gpu.name}`,
        `${gb(gpu.used_bytes)} / ${gb(gpu.total_bytes)} GB`,
        gpu.utilization === null ? "-" : percent(gpu.utilization),
        gpu.temperature_c === null ? "-" : `${gpu.temperature_c} °C`,
      ]) row.insertCell().textContent = text;
      return row;
    }),
  );
}

// --- chat ---

let messages = [];
let running = null;

function turn(who) {
  const box = document.createElement("div");
  box.className = "turn";
  const name = document.createElement("div");
  name.className = "who";
  name.textContent = who;
  const text = document.createElement("div");
  text.className = "text";
  box.append(name, text);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, text };
}

/** The JSON of each event of a response, as it arrives. */
async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of response.body) {
    rest += decoder.decode(chunk, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function reasoningBox(box, text) {
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Reasoning";
  const body = document.createElement("div");
  details.append(summary, body);
  box.insertBefore(details, text);
  return body;
}

async function answer() {
  const { box, text } = turn("assistant");
  const body = { model: (previous && previous.model_id) || "gpt-oss-nano", messages, stream: true };
  if ($("effort").value) body.reasoning_effort = $("effort").value;
  if ($("profile").value) body.profile = $("profile").value;
  if ($("tool").value) body.tools = [WEATHER];
  const message = { role: "assistant", content: "" };
  const calls = [];
  let thinking = null;
  running = new AbortController();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices.length ? event.choices[0].delta : {};
      if (delta.reasoning_content) {
        thinking = thinking || reasoningBox(box, text);
        thinking.textContent += delta.reasoning_content;
        message.reasoning_content = (message.reasoning_content || "") + delta.reasoning_content;
      }
      if (delta.content) {
        message.content += delta.content;
        text.textContent = message.content;
      }
      for (const part of delta.tool_calls || []) {
        if (part.id) {
          const shown = document.createElement("div");
          shown.className = "call";
          box.append(shown);
          calls[part.index] = { id: part.id, type: "function", function: { name: part.function.name, arguments: "" }, shown };
        }
        const call = calls[part.index];
        call.function.arguments += part.function.arguments || "";
        call.shown.textContent = `${call.function.name}(${call.function.arguments})`;
      }
      $("log").scrollTop = $("log").scrollHeight;
    }
  } catch (error) {
    box.classList.add("error");
    text.textContent += error.name === "AbortError" ? " [stopped]" : ` ${error.message}`;
    running = null;
    return false;
  }
  running = null;
  if (calls.length) message.tool_calls = calls.map(({ shown, ...call }) => call);
  messages.push(message);
  for (const call of message.tool_calls || []) {
    const result = JSON.stringify(TOOL_RESULT);
    messages.push({ role: "tool", tool_call_id: call.id, content: result });
    turn("tool (a made-up result)").text.textContent = result;
  }
  return calls.length > 0;
}

async function send(event) {
  event.preventDefault();
  const content = $("input").value.trim();
  if (!content || running) return;
  $("input").value = "";
  messages.push({ role: "user", content });
  turn("you").text.textContent = content;
  $("send").hidden = true;
  $("stop").hidden = false;
  for (let i = 0; i < 4 && (await answer()); i++);
  $("send").hidden = false;
  $("stop").hidden = true;
  $("input").focus();
}

$("form").addEventListener("submit", send);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) send(event);
});
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  messages = [];
  $("log").replaceChildren();
});
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => sessionStorage.setItem("key", $("key").value));
poll();
