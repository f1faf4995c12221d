// The trace is a list of events for each position, in order of steps; the text at a step is each position's last event.
const $ = id => document.getElementById(id);
const trace = JSON.parse($("trace").textContent);
const unpack = ([type, text]) => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array}[type](bytes.buffer);
};
const [given, count, step, kind, token, sure, rivalToken, rivalP] = trace.columns.map(unpack);
const {words, special, mask, joined, steps, top, board} = trace;
const [REVISED, PROPOSED, COMMITTED, ENDED] = [0, 1, 2, 3];
const isSpecial = new Set(special), length = given.length;
const first = new Uint32Array(length + 1), rival = new Map();  // event -> its place among the rivals
for (let i = 0; i < length; i++) first[i + 1] = first[i] + count[i];
for (let e = 0, n = 0; e < kind.length; e++) if (kind[e] === COMMITTED) rival.set(e, n++);
const UNKNOWN = 255, percent = e => sure[e] === UNKNOWN ? "" : Math.round(sure[e] / 2.54) + " %";
const visible = text => "“" + text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") + "”";

let now = 0, chosen = -1, pinned = false, guesses = false, playing = 0;
const spans = Array.from({length}, (_, i) => {
  const span = document.createElement("span");
  span.dataset.i = i;
  return span;
});
const shown = new Array(length).fill("");
const side = Math.sqrt(board.length), box = Math.round(Math.sqrt(side)), edge = new Array(length).fill("");
const clue = new Map(board.filter(([, digit]) => digit));
const ends = n => n % box === box - 1 && n < side - 1;  // a box, but not the board
board.forEach(([i], n) => {
  edge[i] = (ends(n % side) ? " right" : "") + (ends(Math.floor(n / side)) ? " below" : "");
});
$("text").classList.toggle("board", side > 0);
$("text").style.gridTemplateColumns = `repeat(${side}, auto)`;
$("text").append(...(side ? board.map(([i]) => spans[i]) : spans));
$("slider").max = steps;
$("most").textContent = steps;

// The last event of position i in the first n steps, or first[i] - 1.
function last(i, n) {
  let low = first[i], high = first[i + 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (step[middle] < n) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// [class, text, sureness] of position i after n steps.
function look(i, n) {
  if (clue.has(i)) return ["given", clue.get(i), 1];
  const e = last(i, n), none = e < first[i];
  if (none && given[i] !== mask) return ["given", words[given[i]], 1];
  if (none || kind[e] <= PROPOSED) {
    const back = [e, e - 1].some(k => k >= first[i] && kind[k] === REVISED && step[k] === n - 1);
    const guess = guesses && !none && kind[e] === PROPOSED;
    return [back ? "back" : guess ? "guess" : "hole", guess ? words[token[e]] : "░", 1];
  }
  const level = sure[e] === UNKNOWN ? 1 : sure[e] / 254;
  const type = step[e] === n - 1 && kind[e] === COMMITTED ? "new" : isSpecial.has(token[e]) ? "special" : "written";
  return [type, words[token[e]], level, token[e]];
}

function show(n) {
  now = Math.max(0, Math.min(steps, Math.round(n) || 0));
  const views = spans.map((_, i) => look(i, now));
  for (const [at, size, text, ...ids] of joined)  // letters that take several tokens
    if (ids.every((id, k) => views[at + k][3] === id))
      for (let k = 0; k < size; k++) views[at + k][1] = k ? "" : text;
  let holes = 0;
  views.forEach(([type, text, level], i) => {
    holes += type === "hole" || type === "back" || type === "guess";
    const state = type + " " + level + (i === chosen ? " chosen " : " ") + text;
    if (shown[i] === state) return;
    shown[i] = state;
    spans[i].textContent = text;
    spans[i].className = type + edge[i] + (i === chosen ? " chosen" : "");
    spans[i].style.setProperty("--sure", level);
  });
  $("slider").value = now;
  $("count").textContent = `step ${now} of ${steps} · ${holes} holes left`;
  drawMap();
  tell();
}

// What is known of the chosen position.
function tell() {
  const box = $("told");
  box.replaceChildren();
  const add = (tag, text, style) => {
    const element = box.appendChild(document.createElement(tag));
    element.textContent = text;
    if (style) element.className = style;
    return element;
  };
  if (chosen < 0) return add("span", "Point at a token, or tap it, to see how it came about.", "faint");
  const [type, text] = look(chosen, now);
  add("b", type === "hole" || type === "back" ? "a hole" : visible(text));
  add("span", `  position ${chosen}`, "faint");
  if (type === "given") return add("span", ", given", "faint");
  const e = last(chosen, now), guessed = [], history = [];
  for (let k = first[chosen]; k <= e; k++) {
    if (kind[k] === COMMITTED) history.push(`step ${step[k] + 1}: committed ${visible(words[token[k]])} ${percent(k)}`);
    if (kind[k] === REVISED) history.push(`step ${step[k] + 1}: taken back`);
    if (kind[k] === ENDED) history.push(`step ${step[k] + 1}: after the end of the text`);
    if (kind[k] === PROPOSED) guessed.push(`${visible(words[token[k]])} ${percent(k)} (${step[k] + 1})`);
  }
  if (history.length) add("span", "  " + history.slice(-6).join(", "));
  if (rival.has(e) && top) {
    box.append("\n");
    for (let k = rival.get(e) * top; k < (rival.get(e) + 1) * top; k++) {
      add("b", visible(words[rivalToken[k]]));
      add("span", ` ${(rivalP[k] / 2.54).toFixed(0)} %`);
      add("span", "", "bar").style.width = rivalP[k] / 254 * 5 + "em";
    }
  }
  if (guessed.length) add("span", "\nproposed before (in step): " + guessed.slice(-8).join(" "), "faint");
}

// A dot for every commit, position by step, and a line for now.
function drawMap() {
  const map = $("map"), scale = window.devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
  map.width = map.clientWidth * scale;
  map.height = map.clientHeight * scale;
  const pen = map.getContext("2d"), w = map.width / length, h = map.height / Math.max(1, steps);
  for (let i = 0; i < length; i++) for (let e = first[i]; e < first[i + 1]; e++) {
    if (kind[e] === PROPOSED) continue;
    pen.fillStyle = style.getPropertyValue(kind[e] === REVISED ? "--back" : step[e] < now ? "--new" : "--hole");
    pen.fillRect(i * w, step[e] * h, Math.max(w - 1, scale), Math.max(h, 2 * scale));
  }
  pen.fillStyle = style.getPropertyValue("--accent");
  pen.fillRect(0, now * h - scale / 2, map.width, scale);
}

function choose(i) {
  chosen = i;
  show(now);
}

function play(on) {
  cancelAnimationFrame(playing);
  playing = 0;
  $("play").textContent = on ? "⏸" : "▶";
  $("play").setAttribute("aria-label", on ? "pause" : "play");
  if (!on) return;
  if (now === steps) show(0);
  let at = now, before = performance.now();
  playing = requestAnimationFrame(function tick(time) {
    at += Math.max(0, time - before) / 1000 * $("speed").value;
    before = time;
    if (Math.floor(at) !== now) show(Math.floor(at));
    if (now < steps) playing = requestAnimationFrame(tick); else play(false);
  });
}

function toggleGuesses() {
  guesses = !guesses;
  $("guesses").setAttribute("aria-pressed", guesses);
  show(now);
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  drawMap();
}

const usual = Math.min(60, Math.max(4, Math.ceil(steps / 12)));
for (const rate of [...new Set([2, 5, 15, 40, usual])].sort((a, b) => a - b)) {
  const option = $("speed").appendChild(document.createElement("option"));
  option.value = rate;
  option.textContent = rate + " steps/s";
  option.selected = rate === usual;
}

const jump = by => { play(false); show(now + by); };
const walk = by => { pinned = true; choose(Math.max(0, Math.min(length - 1, chosen + by))); };
const isDark = () => document.documentElement.classList.contains("dark");
const keys = {
  " ": () => play(!playing), ArrowLeft: () => jump(-1), ArrowRight: () => jump(1), PageUp: () => jump(-10),
  PageDown: () => jump(10), Home: () => jump(-steps), End: () => jump(steps), g: toggleGuesses,
  t: () => theme(!isDark()), ",": () => walk(-1), ".": () => walk(1), Escape: () => { pinned = false; choose(-1); },
};
addEventListener("keydown", event => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const busy = event.target.tagName === "SELECT" || (event.target.tagName === "BUTTON" && key === " ");
  if (busy || event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, key)) return;
  event.preventDefault();
  keys[key]();
});
$("play").onclick = () => play(!playing);
$("slider").oninput = event => { play(false); show(+event.target.value); };
$("guesses").onclick = toggleGuesses;
$("theme").onclick = () => theme(!isDark());
$("map").onclick = event => { play(false); show(event.offsetY / $("map").clientHeight * steps); };
$("text").onmouseover = event => { if (!pinned && event.target.dataset.i) choose(+event.target.dataset.i); };
$("text").onclick = event => {
  pinned = !!event.target.dataset.i && !(pinned && chosen === +event.target.dataset.i);
  choose(event.target.dataset.i ? +event.target.dataset.i : -1);
};
addEventListener("resize", drawMap);

// page.html#step=12&dark&guesses&token=5
function obey() {
  const wish = new URLSearchParams(location.hash.slice(1));
  if (wish.has("guesses") !== guesses) toggleGuesses();
  if (wish.has("token")) walk(+wish.get("token") - chosen);
  theme(wish.has("dark") || (!wish.has("light") && matchMedia("(prefers-color-scheme: dark)").matches));
  show(wish.has("step") ? +wish.get("step") : steps);
}
addEventListener("hashchange", obey);
obey();
