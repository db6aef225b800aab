// The page: live text, search, the day, a recording to transcribe. What comes from the server is
// put into the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const MOST_LIVE = 400; // lines that are kept on the page
const PARTS = 48; // of a day
let csrf = "";
let isAdmin = false;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  if (answer.status === 401) {
    location.assign("/login");
    throw new Error("Log in first.");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw new Error(found.error?.message || found.error || `The server answered ${answer.status}.`);
  }
  return found;
}

function change(path, content) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(content),
  });
}

const two = (number) => String(number).padStart(2, "0");

function clock(at) {
  const time = new Date(at * 1000);
  return `${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}`;
}

function dayOf(at) {
  const time = new Date(at * 1000);
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`;
}

const minutes = (at) => `${dayOf(at)}T${clock(at).slice(0, 5)}`;

// --- views ---------------------------------------------------------------------------------------

const views = ["live", "search", "day", "file", "admin"];

function show() {
  const [name] = location.hash.slice(1).split("?");
  const chosen = views.includes(name) ? name : "live";
  for (const view of views) {
    $(`view-${view}`).hidden = view !== chosen;
    const link = document.querySelector(`nav a[href="#${view}"]`);
    if (view === chosen) {
      link.setAttribute("aria-current", "page");
    } else {
      link.removeAttribute("aria-current");
    }
  }
  if (chosen === "day") {
    showDay();
  } else if (chosen === "search") {
    $("query").focus({ preventScroll: true });
    refreshNames().catch(() => {});
    if (asked === null) {
      search(); // the latest lines
    }
  } else if (chosen === "file") {
    showModels();
  } else if (chosen === "admin") {
    refreshNames().catch(() => {}); // there may be no journal
  }
}

// --- lines ---------------------------------------------------------------------------------------

function words(query) {
  return [...query.matchAll(/"([^"]*)"|([^\s"]+)/g)]
    .map((found) => (found[1] || found[2] || "").trim())
    .filter((word) => word)
    .sort((one, other) => other.length - one.length);
}

function marked(text, query) {
  const wanted = words(query).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  if (!wanted.length) {
    return [text];
  }
  const parts = text.split(new RegExp(`(${wanted.join("|")})`, "giu"));
  return parts.map((part, number) => (number % 2 ? make("mark", { textContent: part }) : part));
}

function tag(kind, text) {
  return make("span", { className: `tag ${kind}`, textContent: text });
}

function lineRow(line, { query = "", withDay = false } = {}) {
  const day = dayOf(line.at);
  const isOfToday = !withDay && day === dayOf(Date.now() / 1000);
  const when = isOfToday ? clock(line.at) : `${day} ${clock(line.at)}`;
  const button = make(
    "button",
    { type: "button" },
    make("span", { className: "when", textContent: when }),
    make(
      "span",
      { className: "what" },
      make("span", { className: "camera", textContent: line.camera }),
      ...marked(line.text, query),
      line.sentiment ? tag("", line.sentiment) : null,
      ...(line.alerts || []).map((keyword) => tag("alert", `alert: ${keyword}`)),
      line.kind === "sound" ? tag("sound", "sound") : null,
    ),
  );
  button.addEventListener("click", () => play(line));
  return make("li", {}, button);
}

// --- live ----------------------------------------------------------------------------------------

const cards = new Map();
const rows = new Map(); // by camera and id
const nameOf = (line) => `${line.camera}\n${line.id}`;
let pending = [];

function card(name) {
  if (!cards.has(name)) {
    const state = make("span", { className: "state" });
    const numbers = make("p", { className: "numbers" });
    const speaking = make("p", { className: "speaking" });
    const label = make("span", { className: "name", textContent: name });
    const turn = make("button", { type: "button", className: "turn", hidden: !isAdmin });
    turn.addEventListener("click", () => turnCamera(name, turn));
    cards.set(name, { state, numbers, speaking, turn });
    const row = make("li", {}, label, state, speaking, numbers, turn);
    const after = [...cards.keys()].sort().find((other) => other > name);
    $("cameras").insertBefore(row, after ? cards.get(after).row : null);
    cards.get(name).row = row;
    const lists = [$("live-camera"), $("search").elements.camera, $("forget").elements.camera];
    for (const select of lists) {
      addOption(select, name);
    }
  }
  return cards.get(name);
}

function addOption(select, name) {
  if (![...select.options].some((option) => option.value === name)) {
    select.append(make("option", { value: name, textContent: name }));
  }
}

async function turnCamera(name, button) {
  button.disabled = true;
  try {
    await change("/api/turn", { camera: name, on: button.dataset.off === "true" });
  } catch (error) {
    $("connection").textContent = error.message;
  }
  button.disabled = false;
}

function showCameras(cameras) {
  const names = new Set(cameras.map((camera) => camera.name));
  for (const [name, { row }] of cards) {
    if (cameras.length && !names.has(name)) {
      row.remove();
      cards.delete(name);
    }
  }
  for (const camera of cameras) {
    const { state, numbers, turn } = card(camera.name);
    const name = camera.failure ? "ended" : camera.connected ? "connected" : "not connected";
    state.textContent = camera.off ? "off" : camera.live || camera.failure ? name : "recording";
    turn.dataset.off = String(camera.off);
    turn.textContent = camera.off ? "Turn on" : "Turn off";
    turn.setAttribute("aria-label", `${turn.textContent} ${camera.name}`);
    state.className = `state ${camera.live ? (camera.connected ? "on" : "off") : ""}`;
    const parts = [`${camera.lines} lines`];
    if (camera.live && camera.lines) {
      parts.push(`delay ${camera.delay.toFixed(1)} s`);
    }
    if (camera.waiting) {
      parts.push(`${camera.waiting} waiting`);
    }
    if (camera.dropped) {
      parts.push(`${camera.dropped} dropped`);
    }
    numbers.textContent = parts.join(" · ");
    numbers.classList.toggle("off", camera.dropped > 0);
  }
}

function isShown(camera) {
  const chosen = $("live-camera").value;
  return !chosen || chosen === camera;
}

function takeLine(line) {
  card(line.camera).speaking.textContent = "";
  const name = nameOf(line);
  const old = rows.get(name);
  if (old && line.kind === "line") {
    if (!line.text) {
      old.remove();
      rows.delete(name);
    } else {
      const made = lineRow(line);
      made.dataset.camera = line.camera;
      made.dataset.name = name;
      made.hidden = old.hidden;
      old.replaceWith(made);
      rows.set(name, made);
    }
    return;
  }
  if (!line.text) {
    return;
  }
  const row = lineRow(line);
  row.classList.add("new");
  row.dataset.camera = line.camera;
  row.dataset.name = name;
  row.hidden = !isShown(line.camera);
  rows.set(name, row);
  put($("lines"), row, MOST_LIVE);
}

function put(list, row, most) {
  const isAtTop = list.scrollTop < 4;
  list.querySelector(".empty")?.remove();
  list.prepend(row);
  if (isAtTop) {
    list.scrollTop = 0;
  }
  while (list.children.length > most) {
    const last = list.lastElementChild;
    rows.delete(last.dataset.name);
    last.remove();
  }
}

function take(item) {
  if (item.type === "partial") {
    card(item.camera).speaking.textContent = item.text;
  } else if (item.type === "line") {
    takeLine(item);
  } else if (item.type === "alert" || item.type === "sound") {
    put($("alerts"), lineRow(item), 100);
    for (const keyword of item.alerts) {
      rows.get(nameOf(item))?.querySelector(".what").append(tag("alert", `alert: ${keyword}`));
    }
  } else if (item.type === "event") {
    const text = `${item.event}${item.detail ? `: ${item.detail}` : ""}`;
    put($("alerts"), make("li", {}, eventRow(item, text)), 100);
  } else if (item.type === "cameras") {
    showCameras(item.cameras);
  } else if (item.type === "missed") {
    $("connection").textContent = `connected; ${item.count} items were left out for lack of time`;
  }
}

function eventRow(item, text) {
  return make(
    "p",
    { className: "empty" },
    make("span", { className: "when", textContent: `${clock(item.at)} ` }),
    make("span", { className: "camera", textContent: item.camera }),
    text,
  );
}

function follow() {
  const source = new EventSource("/api/live");
  source.addEventListener("open", () => {
    $("connection").textContent = "connected";
  });
  source.addEventListener("error", () => {
    $("connection").textContent = "no connection to the server; trying again";
    if (source.readyState === EventSource.CLOSED) {
      // It answered with something else: the session has ended, or there is no place.
      setTimeout(() => ask("/session").then(follow, () => follow()), 5000);
    }
  });
  source.addEventListener("message", (message) => {
    pending.push(JSON.parse(message.data));
    if (pending.length === 1) {
      // What comes within one frame is put in at once.
      setTimeout(() => requestAnimationFrame(flush), document.hidden ? 1000 : 0);
      if (document.hidden) {
        setTimeout(flush, 1000);
      }
    }
  });
}

function flush() {
  const items = pending;
  pending = [];
  items.forEach(take);
}

async function showLast() {
  const found = await ask("/api/search?limit=100");
  for (const hit of found.hits.reverse()) {
    if (hit.kind === "line") {
      takeLine(hit);
    }
    if (hit.kind === "sound" || hit.alerts.length) {
      put($("alerts"), lineRow(hit), 100);
    }
  }
  for (const list of [$("lines"), $("alerts")]) {
    if (!list.children.length) {
      list.append(make("li", { className: "empty", textContent: "Nothing yet." }));
    }
  }
}

$("live-camera").addEventListener("change", () => {
  for (const row of rows.values()) {
    row.hidden = !isShown(row.dataset.camera);
  }
});

// --- search --------------------------------------------------------------------------------------

let asked = null; // the last search, to go on with
let searches = 0;

async function search(cursor = null) {
  const number = ++searches;
  const form = $("search");
  if (cursor === null) {
    asked = new URLSearchParams();
    for (const [name, value] of new FormData(form)) {
      if (value !== "") {
        const isTime = name === "after" || name === "before";
        asked.set(name, isTime ? String(new Date(value).getTime() / 1000) : value);
      }
    }
    $("results").replaceChildren();
  }
  const query = asked.get("q") || "";
  $("found").textContent = "Searching…";
  $("more").hidden = true;
  try {
    let found;
    let next = cursor;
    let count = 0;
    do {
      const parameters = new URLSearchParams(asked);
      if (next !== null) {
        parameters.set("cursor", next);
      }
      found = await ask(`/api/search?${parameters}`);
      if (number !== searches) {
        return;
      }
      for (const hit of found.hits) {
        $("results").append(lineRow(hit, { query, withDay: true }));
      }
      count += found.hits.length;
      next = found.cursor;
      // A page may come empty-handed in time; its cursor goes on from there.
    } while (next !== null && count < 20);
    const total = $("results").children.length;
    const lines = total === 1 ? "1 line" : `${total} lines`;
    $("found").textContent = next ? `The last ${lines}; there may be more.` : `${lines} found.`;
    $("more").hidden = next === null;
    $("more").onclick = () => search(next);
  } catch (error) {
    $("found").textContent = error.message;
  }
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

async function refreshNames() {
  const names = await ask("/api/names");
  const form = $("search").elements;
  for (const kind of ["camera", "alert", "sentiment", "sound"]) {
    for (const name of names[kind]) {
      addOption(form[kind], name);
      if (kind === "camera") {
        addOption($("forget").elements.camera, name);
      }
    }
  }
}

// --- the day -------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function bar([lines, alerts, sounds], most) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 10 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const add = (y, height, name) => {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("x", "0");
    rect.setAttribute("y", String(y));
    rect.setAttribute("width", "10");
    rect.setAttribute("height", String(height));
    rect.setAttribute("class", name);
    svg.append(rect);
  };
  if (lines) {
    const height = Math.max(2, (14 * lines) / most);
    add(20 - height, height, "lines");
  }
  if (alerts) {
    add(0, 3, "alert");
  }
  if (sounds) {
    add(3, 2, "sound");
  }
  return svg;
}

async function showDay() {
  if (!$("day").value) {
    $("day").value = dayOf(Date.now() / 1000);
  }
  const start = new Date(`${$("day").value}T00:00`);
  if (Number.isNaN(start.getTime())) {
    return;
  }
  const end = new Date(start);
  end.setDate(end.getDate() + 1); // a day may have 23 or 25 hours
  const [after, before] = [start.getTime() / 1000, end.getTime() / 1000];
  $("day-status").textContent = "Loading…";
  try {
    const found = await ask(`/api/timeline?after=${after}&before=${before}&parts=${PARTS}`);
    drawDay(found.cameras, after, (before - after) / PARTS);
  } catch (error) {
    $("day-status").textContent = error.message;
  }
}

function drawDay(cameras, after, width) {
  const names = Object.keys(cameras).sort();
  const most = Math.max(1, ...names.flatMap((name) => cameras[name].map((part) => part[0])));
  const hours = make("div", {}, ...[0, 3, 6, 9, 12, 15, 18, 21].map((h) => make("span", { textContent: `${two(h)}:00` })));
  const head = make("div", { className: "hours", ariaHidden: "true" }, make("span"), hours);
  const tracks = names.map((name) => track(name, cameras[name], after, width, most));
  $("timeline").replaceChildren(...(names.length ? [head, ...tracks] : []));
  $("day-status").textContent = names.length ? "" : "Nothing was transcribed on this day.";
}

function track(name, parts, after, width, most) {
  const row = make("div", { className: "parts", role: "group", ariaLabel: `${name}, half hours of the day` });
  parts.forEach((part, number) => {
    const begin = after + number * width;
    const label = `${clock(begin).slice(0, 5)} to ${clock(begin + width).slice(0, 5)}: ${part[0]} lines, ${part[1]} alerts, ${part[2]} sounds`;
    // One stop of the tab key for each camera; arrows move within it.
    const button = make("button", { type: "button", title: label, tabIndex: number ? -1 : 0 }, bar(part, most));
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => openPart(name, begin, begin + width));
    row.append(button);
  });
  row.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -PARTS, End: PARTS }[event.key];
    if (step === undefined) {
      return;
    }
    event.preventDefault();
    const buttons = [...row.children];
    const now = buttons.indexOf(document.activeElement);
    const next = Math.min(buttons.length - 1, Math.max(0, now + step));
    buttons[now].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
  });
  return make("div", { className: "track" }, make("span", { className: "name", textContent: name }), row);
}

function openPart(camera, after, before) {
  const form = $("search");
  form.reset();
  addOption(form.elements.camera, camera);
  form.elements.camera.value = camera;
  form.elements.after.value = minutes(after);
  form.elements.before.value = minutes(before);
  $("filters").open = true;
  location.hash = "#search";
  search();
}

function move(days) {
  const day = new Date(`${$("day").value}T12:00`);
  day.setDate(day.getDate() + days);
  $("day").value = dayOf(day.getTime() / 1000);
  showDay();
}

$("day-before").addEventListener("click", () => move(-1));
$("day-after").addEventListener("click", () => move(1));
$("day").addEventListener("change", showDay);
$("day-form").addEventListener("submit", (event) => event.preventDefault());

// --- the player ----------------------------------------------------------------------------------

const audio = $("audio");
let peaks = [];
let span = [0, 0]; // of the line, in the audio
let plays = 0;
let opener = null;

async function play(line) {
  const number = ++plays;
  opener = document.activeElement;
  $("player").hidden = false;
  document.body.classList.add("playing");
  $("player-title").textContent = `${line.camera}, ${dayOf(line.at)} ${clock(line.at)}`;
  $("player-text").textContent = line.text;
  $("player-status").textContent = "Loading…";
  audio.pause();
  audio.hidden = $("waveform").hidden = true;
  const where = new URLSearchParams({ camera: line.camera, id: line.id, at: String(line.at) });
  try {
    const moment = await ask(`/api/moment?${where}`);
    if (number !== plays) {
      return;
    }
    peaks = moment.peaks;
    span = [moment.start, moment.end];
    audio.hidden = $("waveform").hidden = false;
    audio.src = `/api/audio?${where}`;
    audio.addEventListener("loadedmetadata", begin, { once: true });
    $("player-status").textContent = "";
    draw();
  } catch (error) {
    $("player-status").textContent = error.message;
  }
  $("player-close").focus({ preventScroll: true });
}

function begin() {
  audio.currentTime = span[0];
  audio.play().catch(() => {
    $("player-status").textContent = "Press play.";
  });
}

function draw() {
  const canvas = $("waveform");
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  const seconds = audio.duration || 1;
  context.fillStyle = style.getPropertyValue("--mark");
  context.fillRect((width * span[0]) / seconds, 0, (width * (span[1] - span[0])) / seconds, height);
  peaks.forEach((peak, number) => {
    const x = (width * number) / peaks.length;
    const played = x / width < audio.currentTime / seconds;
    context.fillStyle = style.getPropertyValue(played ? "--accent" : "--quiet");
    const high = Math.max(1, peak * height);
    context.fillRect(x, (height - high) / 2, Math.max(1, width / peaks.length - 1), high);
  });
}

for (const event of ["timeupdate", "loadedmetadata", "seeked"]) {
  audio.addEventListener(event, draw);
}
window.addEventListener("resize", draw);
$("waveform").addEventListener("click", (event) => {
  audio.currentTime = (event.offsetX / $("waveform").clientWidth) * (audio.duration || 0);
});

function closePlayer() {
  plays += 1;
  audio.pause();
  audio.removeAttribute("src");
  $("player").hidden = true;
  document.body.classList.remove("playing");
  opener?.focus();
}

$("player-close").addEventListener("click", closePlayer);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("player").hidden) {
    closePlayer();
  } else if (event.key === "/" && !event.target.closest("input, select, textarea")) {
    event.preventDefault();
    location.hash = "#search";
    $("query").focus();
  }
});

// --- a recording ---------------------------------------------------------------------------------

let sending = null;

async function showModels() {
  if ($("model").options.length) {
    return;
  }
  try {
    const found = await ask("/v1/models");
    for (const { id } of found.data) {
      addOption($("model"), id);
    }
    $("file-status").textContent = found.data.length ? "" : "No model is served.";
  } catch (error) {
    $("file-status").textContent = error.message;
  }
}

async function send(file) {
  sending?.abort();
  await showModels();
  const form = new FormData();
  form.append("model", $("model").value);
  form.append("stream", "true");
  form.append("file", file);
  const request = new XMLHttpRequest();
  sending = request;
  const text = $("file-text");
  const progress = $("progress");
  text.textContent = "";
  text.hidden = $("save").hidden = true;
  progress.hidden = $("cancel").hidden = false;
  progress.value = 0;
  $("file-status").textContent = `Sending ${file.name}…`;
  request.upload.addEventListener("progress", (event) => {
    if (event.lengthComputable) {
      progress.value = event.loaded / event.total;
      progress.setAttribute("aria-valuetext", `${Math.round(100 * progress.value)} % sent`);
    }
  });
  request.upload.addEventListener("load", () => {
    progress.removeAttribute("value"); // how long the recording is only the server knows
    $("file-status").textContent = `Transcribing ${file.name}…`;
  });
  let done = 0;
  const takeEvents = () => {
    const received = request.responseText;
    let end = received.indexOf("\n\n", done);
    while (request.status === 200 && end >= 0) {
      const line = received.slice(done, end).replace(/^data: /, "");
      done = end + 2;
      end = received.indexOf("\n\n", done);
      takeEvent(JSON.parse(line), text);
    }
  };
  request.addEventListener("progress", takeEvents);
  request.addEventListener("loadend", () => {
    if (sending !== request) {
      return;
    }
    takeEvents();
    progress.hidden = $("cancel").hidden = true;
    finish(request, file, text);
  });
  request.open("POST", "/v1/audio/transcriptions");
  request.setRequestHeader("X-CSRF-Token", csrf);
  request.send(form);
}

function takeEvent(event, text) {
  if (event.type === "transcript.text.delta") {
    text.hidden = false;
    text.textContent += event.delta;
  } else if (event.error) {
    $("file-status").textContent = event.error.message;
    text.dataset.failed = "true";
  }
}

function finish(request, file, text) {
  if (request.status === 0) {
    $("file-status").textContent = "Stopped.";
  } else if (request.status !== 200) {
    let why = `The server answered ${request.status}.`;
    try {
      why = JSON.parse(request.responseText).error.message || why;
    } catch {
      // it answered no JSON
    }
    $("file-status").textContent = why;
  } else if (!text.dataset.failed) {
    $("file-status").textContent = text.textContent
      ? `${file.name} is transcribed.`
      : `There is no speech in ${file.name}.`;
    URL.revokeObjectURL($("save").href);
    $("save").href = URL.createObjectURL(new Blob([text.textContent], { type: "text/plain" }));
    $("save").download = `${file.name}.txt`;
    $("save").hidden = !text.textContent;
  }
  delete text.dataset.failed;
}

$("cancel").addEventListener("click", () => sending?.abort());
$("file").addEventListener("change", () => {
  if ($("file").files.length) {
    send($("file").files[0]);
  }
});
$("file-form").addEventListener("submit", (event) => event.preventDefault());
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if ([...event.dataTransfer.types].includes("Files")) {
      event.preventDefault();
      location.hash = "#file";
      $("drop").classList.add("over");
    }
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) {
    $("drop").classList.remove("over");
  }
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) {
    location.hash = "#file";
    send(event.dataTransfer.files[0]);
  }
});

// --- the microphone ------------------------------------------------------------------------------

const PIECE_S = 0.1; // of audio that is sent at once
let listening = null; // what ends it

async function listen() {
  await showModels();
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const context = new AudioContext();
  await context.audioWorklet.addModule("/static/microphone.js");
  const source = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
  context.createMediaStreamSource(stream).connect(source);
  const address = new URL("/v1/listen", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.search = new URLSearchParams({
    model: $("model").value,
    encoding: "linear16",
    sample_rate: String(context.sampleRate),
    interim_results: "true",
  });
  const socket = new WebSocket(address);
  const text = $("file-text");
  const done = document.createTextNode("");
  const speaking = make("em");
  text.replaceChildren(done, speaking);
  text.hidden = false;
  let waiting = [];
  let size = 0;
  source.port.addEventListener("message", ({ data }) => {
    waiting.push(data);
    size += data.length;
    if (size < PIECE_S * context.sampleRate || socket.readyState !== WebSocket.OPEN) {
      return;
    }
    socket.send(samples(waiting, size));
    waiting = [];
    size = 0;
  });
  source.port.start();
  socket.addEventListener("message", (message) => {
    const found = JSON.parse(message.data);
    if (found.type === "Results") {
      const words = found.channel.alternatives[0].transcript;
      if (found.is_final && words) {
        done.data += `${done.data ? " " : ""}${words}`;
      }
      speaking.textContent = found.is_final ? "" : `${done.data ? " " : ""}${words}`;
    }
  });
  const stop = () => {
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    if (socket.readyState === WebSocket.OPEN) {
      socket.send(samples(waiting, size));
      socket.send(JSON.stringify({ type: "CloseStream" }));
    }
    listening = null;
    $("listen").textContent = "Use the microphone";
  };
  socket.addEventListener("close", (event) => {
    const isOver = listening === null;
    if (!isOver) {
      stop();
    }
    speaking.textContent = "";
    $("file-status").textContent = isOver ? "Stopped." : event.reason || "The server ended it.";
  });
  listening = stop;
  $("listen").textContent = "Stop";
  $("file-status").textContent = "Listening…";
}

function samples(parts, size) {
  const made = new Int16Array(size);
  let at = 0;
  for (const part of parts) {
    part.forEach((value, number) => {
      made[at + number] = Math.max(-1, Math.min(1, value)) * 32767;
    });
    at += part.length;
  }
  return made;
}

$("listen").addEventListener("click", async () => {
  if (listening) {
    listening();
    return;
  }
  try {
    await listen();
  } catch (error) {
    $("file-status").textContent = `The microphone cannot be used: ${error.message}`;
  }
});
$("listen").hidden = !navigator.mediaDevices; // browsers have it over HTTPS and on this machine

// --- admins --------------------------------------------------------------------------------------

function whatToForget() {
  const form = $("forget").elements;
  const asked = {};
  if (form.text.value) {
    asked.text = form.text.value;
  }
  if (form.camera.value) {
    asked.camera = form.camera.value;
  }
  if (form.before.value) {
    asked.before = new Date(form.before.value).getTime() / 1000;
  }
  return asked;
}

let counted = ""; // what the confirmation is about

async function forget(isDry) {
  const asked = whatToForget();
  $("forget-now").hidden = true;
  try {
    const found = await change("/api/forget", { ...asked, dry_run: isDry });
    const parts = `${found.lines} lines, ${found.events} alerts, sounds and other events, ${found.clips} clips`;
    $("forget-status").textContent = isDry ? `This would remove ${parts}.` : `Removed ${parts}.`;
    counted = JSON.stringify(asked);
    $("forget-now").hidden = !isDry || !(found.lines + found.events + found.clips);
  } catch (error) {
    $("forget-status").textContent = error.message;
  }
}

$("forget").addEventListener("submit", (event) => {
  event.preventDefault();
  forget(true);
});
$("forget").addEventListener("input", () => {
  $("forget-now").hidden = true;
});
$("forget-now").addEventListener("click", () => {
  if (counted === JSON.stringify(whatToForget())) {
    forget(false);
  }
});
$("reload").addEventListener("click", async () => {
  try {
    $("reload-status").textContent = (await change("/api/reload", {})).changes;
  } catch (error) {
    $("reload-status").textContent = error.message;
  }
});

// --- begin ---------------------------------------------------------------------------------------

$("log-out").addEventListener("click", async () => {
  await ask("/logout", { method: "POST", headers: { "X-CSRF-Token": csrf } });
  location.assign("/login");
});

$("filters").open = matchMedia("(min-width: 40rem)").matches;
window.addEventListener("hashchange", show);

async function start() {
  const session = await ask("/session");
  csrf = session.csrf;
  isAdmin = session.role === "admin";
  document.querySelector('nav a[href="#admin"]').hidden = !isAdmin;
  $("log-out").hidden = !csrf;
  show();
  await showLast().catch((error) => {
    $("connection").textContent = error.message;
  });
  follow();
}

start();
