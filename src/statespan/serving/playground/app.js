// The playground: chat and completion over /v1, tokens coloured by what the model does with them, forks at any token.
"use strict";

const $ = (id) => document.getElementById(id);
const session = crypto.getRandomValues(new Uint32Array(4)).join("-"); // keeps our turns on one replica
let facts = null; // of /playground/model
let messages = []; // of the chat
let busy = null; // AbortController of the running request
let at = { side: "a", index: -1 }; // the token that is looked at

// A branch is one text: its tokens, what each adds to the text, and the server's view of them. The `fork` first ones are
// shared with the other branch; the newest reply begins at `reply`.
const newBranch = () => ({ ids: [], texts: [], view: null, fork: 0, reply: 0 });
const branches = { a: newBranch(), b: null };

// --- server

const headers = () => ({
  "Content-Type": "application/json",
  "X-Session-Id": session,
  ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}),
});

async function call(path, body, signal) {
  const options = body === undefined ? { headers: headers(), signal }
    : { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const reply = await response.json().catch(() => null);
  throw new Error(reply && reply.error ? reply.error.message : `The server answered with status ${response.status}.`);
}

async function* events(response) { // the values of a server-sent event stream
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke off.");
    });
    if (done) throw new Error("The server ended the reply too early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function settings() { // the sampling fields that are filled in
  const fields = [...$("settings").querySelectorAll("input")].filter((input) => input.value !== "");
  for (const input of fields) if (!input.checkValidity()) throw new Error(`${input.name}: ${input.validationMessage}`);
  return Object.fromEntries(fields.map((input) => [input.name, Number(input.value)]));
}

// --- generating

async function generate(side, path, request, onText = () => {}) {
  const branch = branches[side], known = [...branch.texts];
  const started = performance.now();
  let first = 0, received = 0, usage = null, frame = 0;
  const show = () => { // at most once a frame: a small model is faster than a screen
    frame = 0;
    if (branches[side] !== branch) return;
    append(side);
    onText(branch.texts.slice(branch.reply).join(""));
    const seconds = (performance.now() - first) / 1000;
    if (received > 1) $("speed").textContent = `${((received - 1) / seconds).toFixed(1)} tokens/s, first after ${((first - started) / 1000).toFixed(2)} s`;
    drawMeters(branch, usage);
  };
  branch.view = null;
  busy = new AbortController();
  showError("");
  showState();
  try {
    const body = { model: facts.name, ...settings(), ...request, stream: true, return_token_ids: true, stream_options: { include_usage: true } };
    for await (const event of events(await call(path, body, busy.signal))) {
      usage = event.usage || usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.prompt_token_ids) {
        branch.ids = [...choice.prompt_token_ids];
        branch.reply = branch.ids.length;
        branch.texts = branch.ids.map((_, i) => known[i] || "");
        if (typeof request.prompt === "string") branch.texts[0] = request.prompt;
        draw(side);
      }
      const text = choice.text ?? choice.delta.content ?? "", ids = choice.token_ids || [];
      if (ids.length) {
        first = first || performance.now();
        received += ids.length;
        branch.ids.push(...ids);
        branch.texts.push(...ids.map((_, i) => (i === ids.length - 1 ? text : "")));
      } else if (text) {
        branch.texts[branch.texts.length - 1] += text;
      }
      frame = frame || requestAnimationFrame(show);
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  }
  cancelAnimationFrame(frame);
  if (branch.ids.length) show();
  busy = null;
  showState();
  await look();
  return received;
}

const withoutEnd = (branch) => { // the tokens that a continuation starts from
  const ids = [...branch.ids];
  while (facts.eos_token_ids.includes(ids[ids.length - 1])) ids.pop();
  return ids;
};

async function send() {
  const text = $("prompt").value;
  if (busy || !facts || text === "") return;
  branches.a = newBranch();
  dropFork();
  if (!$("mode-chat").checked) return generate("a", "/v1/completions", { prompt: text });
  $("prompt").value = "";
  messages.push({ role: "user", content: text });
  const before = [...messages], reply = { role: "assistant", content: "" };
  messages.push(reply);
  drawMessages();
  const received = await generate("a", "/v1/chat/completions", { messages: before }, (content) => {
    reply.content = content;
    $("messages").lastChild.textContent = reply.content;
    $("messages").scrollTop = $("messages").scrollHeight;
  });
  if (received || messages[messages.length - 1] !== reply) return;
  messages = before.slice(0, -1); // nothing came: the message can be sent again
  $("prompt").value = text;
  drawMessages();
}

async function more() { // go on with A where it stands
  const branch = branches.a, { reply, ids } = branch;
  if (busy || !ids.length) return;
  await generate("a", "/v1/completions", { prompt: withoutEnd(branch) });
  branch.reply = Math.min(reply, branch.reply);
  keepReply();
}

async function fork() { // the same beginning, another continuation
  if (busy || at.index < 0 || !branches[at.side]) return;
  const from = branches[at.side], count = at.index + 1;
  branches.a = { ...from, fork: count, reply: branches.a.reply };
  branches.b = { ...newBranch(), ids: from.ids.slice(0, count), texts: from.texts.slice(0, count), fork: count };
  showState();
  draw("a");
  await generate("b", "/v1/completions", { prompt: branches.b.ids });
}

function keep(side) {
  const { fork, ids } = branches[side], { reply } = branches.a;
  branches.a = { ...branches[side], fork: 0, reply: Math.min(reply, ids.length) };
  if (side === "b" && fork < reply) messages = []; // the chat itself was changed: what is left is a text
  dropFork();
  keepReply();
  paint();
}

function dropFork() {
  branches.b = null;
  branches.a.fork = 0;
  at = { side: "a", index: -1 };
  draw("a");
  showState();
}

function keepReply() { // the last message says what branch A says
  const last = messages[messages.length - 1], { texts, reply } = branches.a;
  if (last && last.role === "assistant") last.content = texts.slice(reply).join("");
  drawMessages();
}

// --- tokens

const chosenLayer = () => Number($("layer").value || 0);

async function look() { // ask the server what the chosen layer does with the tokens
  const layer = chosenLayer();
  for (const side of ["a", "b"]) {
    const branch = branches[side];
    if (!branch || !branch.ids.length || (branch.view && branch.view.layer === layer)) continue;
    try {
      const { ids } = branch;
      const view = await (await call("/playground/tokens", { ids, layer })).json();
      const late = busy || branches[side] !== branch || branch.ids.length !== view.texts.length;
      if (late || chosenLayer() !== layer) return; // another look is on its way
      branch.view = { ...view, layer };
      branch.texts = view.texts;
      draw(side);
    } catch (error) {
      showError(error.message);
    }
  }
  paint();
  if (at.index >= 0) point(at.side, at.index);
}

function addSpan(side, i) {
  const branch = branches[side], span = document.createElement("span"), text = branch.texts[i];
  span.textContent = text === "" && branch.view ? "\u00b7" : text;
  span.dataset.index = i;
  span.classList.toggle("fork", i > 0 && i === branch.fork);
  $(side).append(span);
}

function draw(side) {
  $(side).replaceChildren();
  branches[side].ids.forEach((_, i) => addSpan(side, i));
}

function append(side) { // what came since the last time
  const box = $(side), { ids, texts } = branches[side], last = box.lastChild;
  const atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
  if (last) last.textContent = texts[box.childElementCount - 1];
  for (let i = box.childElementCount; i < ids.length; i++) addSpan(side, i);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function values(branch) { // one number a token, or null
  const view = branch && branch.view;
  if (!view) return [];
  if ($("by").value === "logprob") return view.logprobs.map((x) => (x === null ? null : -x / Math.LN2));
  return ($("by").value === "dt" ? view.dt : view.experts && view.experts.map((choices) => choices[0])) || [];
}

function paint() { // both branches on one scale
  const by = $("by").value, hue = by === "dt" ? 210 : 22, place = by === "dt" ? Math.log : (x) => x;
  const all = [...values(branches.a), ...values(branches.b)].filter((x) => x !== null);
  const low = all.reduce((x, y) => Math.min(x, y), Infinity), high = all.reduce((x, y) => Math.max(x, y), -Infinity);
  const share = (x) => (high > low ? (place(x) - place(low)) / (place(high) - place(low)) : 0.5);
  const color = (x) => (by === "expert" ? `hsl(${Math.round((360 * x) / facts.num_experts)} 80% 50% / 0.4)` : `hsl(${hue} 95% 50% / ${(0.65 * share(x)).toFixed(3)})`);
  for (const side of ["a", "b"]) {
    const shown = values(branches[side]);
    for (const span of $(side).children) {
      const x = shown[Number(span.dataset.index)];
      span.style.background = x === null || x === undefined ? "" : color(x);
    }
  }
  $("legend").replaceChildren();
  if (!all.length) return;
  if (by === "expert") return void ($("legend").textContent = `${new Set(all).size} of ${facts.num_experts} experts`);
  const scale = Object.assign(document.createElement("span"), { className: "scale" });
  scale.style.background = `linear-gradient(to right, transparent, hsl(${hue} 95% 50% / 0.65))`;
  $("legend").append(`${short(low)} `, scale, ` ${short(high)}`);
}

const short = (x) => Number(x.toPrecision(3)).toString();

function point(side, index) { // look at one token
  const branch = branches[side];
  if (!branch || !branch.ids.length) return;
  index = Math.max(0, Math.min(branch.ids.length - 1, index));
  document.querySelectorAll(".tokens .here").forEach((span) => span.classList.remove("here"));
  const span = $(side).children[index], { view } = branch;
  span.classList.add("here");
  at = { side, index };
  const told = [`${side.toUpperCase()} ${index}: ${JSON.stringify(branch.texts[index])}, id ${branch.ids[index]}`];
  if (view && view.logprobs[index] !== null) told.push(`${short(-view.logprobs[index] / Math.LN2)} bits`);
  if (view && view.dt && view.dt[index] !== null) told.push(`dt ${short(view.dt[index])}`);
  if (view && view.experts) told.push(`experts ${view.experts[index].join(", ")}`);
  $("facts").textContent = told.join("; ");
  showState();
  return span;
}

function onKey(side, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Enter") fork();
  else if (step) point(side, (at.side === side ? at.index : -1) + step)?.scrollIntoView({ block: "nearest" });
  else return;
  event.preventDefault();
}

function fillLayers() {
  const by = $("by").value, before = $("layer").value;
  const known = by === "logprob" ? [] : facts.layers.filter((l) => (by === "dt" ? l.dt : l.experts));
  $("layer").replaceChildren(...known.map((l) => new Option(`${l.index} ${l.kind}`, l.index)));
  if (known.some((l) => String(l.index) === before)) $("layer").value = before;
  $("layer").disabled = !known.length;
}

// --- meters

const bytes = (n) => {
  const power = n < 1 ? 0 : Math.min(4, Math.floor(Math.log2(n) / 10));
  return `${short(n / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
};

function drawMeters(branch, usage) {
  const count = branch.ids.length, seen = (n) => Math.min(n, facts.window || Infinity);
  const own = (n) => facts.state_bytes + facts.kv_bytes_per_token * seen(n), other = (n) => facts.transformer_bytes_per_token * seen(n);
  const cached = usage && usage.prompt_tokens_details ? usage.prompt_tokens_details.cached_tokens : 0;
  $("context").textContent = `${count} tokens${cached ? `; ${cached} of the prompt from the cache` : ""}`;
  const figures = { state: facts.state_bytes, kv: facts.kv_bytes_per_token * seen(count), other: other(count) };
  for (const [name, value] of Object.entries(figures)) {
    $(`${name}-bytes`).textContent = bytes(value);
    Object.assign($(`${name}-meter`), { max: Math.max(...Object.values(figures), 1), value });
  }
  const end = 2 ** Math.ceil(Math.log2(Math.max(1024, 2 * count))), top = Math.max(own(end), other(end), 1);
  const x = (n) => 1 + (318 * n) / end, y = (size) => 129 - (120 * size) / top;
  const line = (size) => [...Array(65)].map((_, i) => `${x((end * i) / 64)},${y(size((end * i) / 64))}`).join(" ");
  $("line-own").setAttribute("points", line(own));
  $("line-other").setAttribute("points", line(other));
  for (const side of ["x1", "x2"]) $("here").setAttribute(side, x(count));
  $("chart-end").textContent = `${end} tokens, ${bytes(top)}`;
}

// --- the page

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function showState() {
  const { a, b } = branches;
  $("send").disabled = Boolean(busy) || !facts;
  $("stop").disabled = !busy;
  $("more").disabled = Boolean(busy) || !a.ids.length || Boolean(b);
  $("fork").disabled = Boolean(busy) || at.index < 0;
  $("branch-b").hidden = $("keep-a").hidden = !b;
  $("keep-a").disabled = $("keep-b").disabled = Boolean(busy);
}

function drawMessages() {
  $("messages").replaceChildren(...messages.map(({ role, content }) => {
    const box = Object.assign(document.createElement("div"), { className: `message ${role}`, textContent: content });
    box.dataset.role = role;
    return box;
  }));
  $("messages").hidden = !messages.length;
}

function reset() {
  if (busy) busy.abort();
  messages = [];
  branches.a = newBranch();
  $("prompt-label").textContent = $("mode-chat").checked ? "Message" : "Text to continue";
  dropFork();
  drawMessages();
  drawMeters(branches.a);
  paint();
}

async function start() {
  try {
    facts = await (await call("/playground/model")).json();
  } catch (error) {
    return showError(error.message);
  }
  showError("");
  $("name").textContent = facts.name;
  $("mode-chat").disabled = !facts.chat;
  $("mode-chat").checked = facts.chat;
  $("mode-completion").checked = !facts.chat;
  for (const name of ["dt", "experts"]) if (!facts.layers.some((l) => l[name])) $("by").querySelector(`[value=${name.replace("experts", "expert")}]`).disabled = true;
  fillLayers();
  reset();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
$("stop").addEventListener("click", () => busy && busy.abort());
$("more").addEventListener("click", more);
$("new").addEventListener("click", reset);
$("fork").addEventListener("click", fork);
$("modes").addEventListener("change", reset);
$("by").addEventListener("change", () => { fillLayers(); look(); });
$("layer").addEventListener("change", look);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy) busy.abort();
  if (event.key === "Enter" && event.ctrlKey && event.target === $("prompt")) send();
});
for (const side of ["a", "b"]) {
  $(`keep-${side}`).addEventListener("click", () => keep(side));
  $(side).addEventListener("keydown", (event) => onKey(side, event));
  $(side).addEventListener("click", (event) => event.target.dataset.index && point(side, Number(event.target.dataset.index)));
}
start();
