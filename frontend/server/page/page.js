// The live page: a chat by /v1/chat/completions, and the engine's figures by page/data once a second.
"use strict";

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const INTERVAL_MS = 1000;
const HISTORY = 120;
const PHASES = ["schedule", "launch", "wait", "output"];

// ---- chat

const conversation = [];
let running = null;

function addMessage(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role;
  const body = document.createElement("span");
  body.className = "body";
  body.textContent = text;
  item.append(who, body);
  byId("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}

async function ask(signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      messages: conversation,
      max_tokens: Number(byId("max-tokens").value),
      temperature: Number(byId("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Error(problem.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

async function answer() {
  running = new AbortController();
  const body = addMessage("assistant", "");
  const started = performance.now();
  let first = null;
  let text = "";
  try {
    for await (const data of events(await ask(running.signal))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta?.content;
      if (delta) {
        first ??= performance.now();
        text += delta;
        body.textContent = text;
      }
      if (chunk.usage) showSpeed(chunk.usage.completion_tokens, started, first, performance.now());
    }
    conversation.push({ role: "assistant", content: text });
  } catch (error) {
    if (error.name === "AbortError") {
      conversation.push({ role: "assistant", content: text });
    } else {
      conversation.pop();
      body.parentElement.remove();
      addMessage("error", error.message);
    }
  } finally {
    running = null;
    setBusy(false);
  }
}

function showSpeed(tokens, started, first, ended) {
  if (first === null) return;
  const rate = tokens > 1 ? ((tokens - 1) / (ended - first)) * 1000 : 0;
  byId("speed").textContent = `${tokens} tokens, first after ${Math.round(first - started)} ms, ${rate.toFixed(1)}/s`;
}

function setBusy(busy) {
  byId("send").disabled = busy;
  byId("stop").disabled = !busy;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (running || !text) return;
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  byId("prompt").value = "";
  setBusy(true);
  answer();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  byId("messages").replaceChildren();
  byId("speed").textContent = "";
  byId("prompt").focus();
});

// ---- figures

const rates = [];
let last = null;

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const set = (id, text) => { byId(id).textContent = text; };

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawRates() {
  const most = Math.max(1, ...rates);
  const x = (i) => (240 * (HISTORY - rates.length + i)) / (HISTORY - 1);
  const points = rates.map((rate, i) => `${x(i).toFixed(1)},${(58 - (56 * rate) / most).toFixed(1)}`);
  set("rate-text", `most ${most.toFixed(1)}`);
  byId("rate-chart").replaceChildren(element("polyline", { class: "line", points: points.join(" ") }));
}

function drawSteps(steps) {
  const count = steps.step.length;
  const total = (i) => PHASES.reduce((sum, phase) => sum + steps[`${phase}_us`][i], 0);
  const totals = steps.step.map((_, i) => total(i));
  const sorted = [...totals].sort((a, b) => a - b);
  // A rare long step is cut off at the top, lest the others be flat beside it.
  const most = Math.max(1, 1.25 * (sorted[Math.floor(0.95 * count)] ?? 0));
  const width = 240 / Math.max(count, 60);
  const bars = [];
  for (let i = 0; i < count; i++) {
    let y = 80;
    for (const phase of PHASES) {
      const height = Math.min(y, (80 * steps[`${phase}_us`][i]) / most);
      y -= height;
      bars.push(element("rect", { class: phase, x: i * width, y, width: width * 0.9, height }));
    }
  }
  byId("step-chart").replaceChildren(...bars);
  const ms = (us) => `${(us / 1000).toFixed(2)} ms`;
  set("step-text", count ? `median ${ms(sorted[count >> 1])}, longest ${ms(sorted[count - 1])}` : "none yet");
}

function drawFrontends(frontends) {
  const rows = frontends.map((frontend) => {
    const row = document.createElement("tr");
    for (const value of [`${frontend.name} (${frontend.slot})`, frontend.preparing, frontend.waiting, frontend.running]) {
      const cell = document.createElement("td");
      cell.textContent = value;
      row.append(cell);
    }
    return row;
  });
  byId("frontends").replaceChildren(...rows);
}

function drawQueues(queues) {
  const items = Object.entries(queues).map(([hop, depth]) => {
    const item = document.createElement("div");
    const name = document.createElement("dt");
    const value = document.createElement("dd");
    name.textContent = hop.replaceAll("_", " ");
    value.textContent = depth;
    item.append(name, value);
    return item;
  });
  byId("queues").replaceChildren(...items);
}

function show(data) {
  set("model", data.model);
  set("running", data.running);
  set("waiting", data.waiting);
  set("preemptions", data.preemptions);
  set("kv-text", percent(data.kv_cache_usage));
  byId("kv").value = data.kv_cache_usage;
  set("hit-rate", data.prefix_cache_queries ? percent(data.prefix_cache_hits / data.prefix_cache_queries) : "–");
  if (last && data.time_s > last.time_s && data.generation_tokens >= last.generation_tokens) {
    const seconds = data.time_s - last.time_s;
    const rate = (name) => (data[name] - last[name]) / seconds;
    set("generation-rate", rate("generation_tokens").toFixed(1));
    set("prompt-rate", rate("prompt_tokens").toFixed(1));
    rates.push(rate("generation_tokens"));
    if (rates.length > HISTORY) rates.shift();
    drawRates();
  }
  last = data;
  drawSteps(data.steps);
  drawFrontends(data.frontends);
  drawQueues(data.queues);
}

async function poll() {
  try {
    const response = await fetch("page/data");
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    show(await response.json());
    set("status", "connected");
  } catch (error) {
    set("status", error instanceof TypeError ? "no connection" : error.message);
  }
  setTimeout(poll, INTERVAL_MS);
}

poll();
