/** Requests to the server: the API key, health and statistics, streamed answers, errors in plain words. */

const BASE = new URL(".", location.href); // the page also works behind a path prefix
const KEY = "key";

let key = read(sessionStorage, KEY) || "";

export function read(storage, name) {
  try {
    return storage.getItem(name);
  } catch {
    return null;
  }
}

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // storage is blocked: kept in memory
  }
}

/** An error with a text for the user; `detail` is the server's own message. */
export class Failure extends Error {
  constructor(text, { status = 0, detail = "" } = {}) {
    super(text);
    this.status = status;
    this.detail = detail === text ? "" : detail;
  }
}

const LOST = "No connection to the server. Check that it is running, then try again.";
const BROKEN = "The model's engine failed before the answer was complete. Try again in a moment.";
const CUT = "The connection was lost before the answer was complete.";

function inSeconds(response) {
  const seconds = Number(response.headers.get("retry-after"));
  return seconds > 0 ? `in ${seconds} s` : "in a moment";
}

/** What happened, in plain words, and what to do. */
function explain(status, error, when) {
  if (status === 401) return hasKey() ? "The server did not accept the API key." : "This server requires an API key.";
  if (status === 429) {
    const limit = /^Limit|tokens per|requests per|limit of/i.test(error.message || "");
    return limit ? `The limit of this API key is reached. Try again ${when}.` : `The server is busy. Try again ${when}.`;
  }
  if (error.code === "draining") return "The server is shutting down.";
  if (error.code === "engine_dead") return "The model's engine has failed. If it is not back in a minute, look into the server's log.";
  if (status === 503 || error.code === "overloaded") return `The model is not available yet. Try again ${when}.`;
  if (status >= 500 && !error.message) return `The server or a proxy before it answered with status ${status}.`;
  if (status >= 500) return "The server had an internal error. Its log has the details.";
  return error.message || `The server answered with status ${status}.`;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error || {};
  } catch {
    // not JSON: a proxy's own page
  }
  const text = explain(response.status, error, inSeconds(response));
  return new Failure(text, { status: response.status, detail: error.message || "" });
}

async function request(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  try {
    return await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(LOST);
  }
}

/** The server's health, also with status 503. */
export async function health() {
  const response = await request("health");
  try {
    return await response.json();
  } catch {
    throw new Failure(LOST);
  }
}

export async function stats() {
  const response = await request("stats");
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** Yields the `data` of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

/** Yields the chunks of a streamed chat completion. Throws Failure, or AbortError after `signal`. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const { message, code } = chunk.error;
        throw new Failure(code === "request_cancelled" ? message : BROKEN, { status: 500, detail: message });
      }
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure(CUT);
  }
  throw new Failure(CUT);
}
