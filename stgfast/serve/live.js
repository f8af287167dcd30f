"use strict";
// common.js
// clips.js
const EVERY = 1000, HIDDEN = 10000;  // milliseconds between looks at the folder, and where nobody sees the page
const KINDS = {
  "": ["all", []], next: ["waiting", ["pending"]], now: ["running", ["claimed", "publishing"]],
  done: ["done", ["done"]], failed: ["failed", ["failed"]], gone: ["cancelled", ["cancelled"]],
};
const TALLEST = 30e6;  // pixels, beyond which browsers do not scroll
let kind = "", total = 0, asked = 0, answered = 0, timer = 0, status = null;
const cards = new Map();  // those that are seen, by name

async function ask(path, given, type = "application/json") {
  const body = given === undefined || given instanceof Blob ? given : JSON.stringify(given);
  const request = body === undefined ? {} : {method: "POST", body, headers: {"Content-Type": type}};
  const answer = await fetch(path, request);
  const text = await answer.text();
  let said = {error: text.trim()};
  try { said = JSON.parse(text); } catch (error) { if (answer.ok) throw error; }
  if (!answer.ok) throw new Error(said.error);
  return said;
}
async function act(action, given) {
  try { await ask(`/api/${action}`, given); tell(""); } catch (error) { tell(error.message); }
  look();
}
function tell(text) { at("trouble").textContent = text; at("trouble").hidden = !text; }

// The list: as high as all its jobs, with cards for those alone that are seen.

const rem = () => parseFloat(getComputedStyle(document.documentElement).fontSize);
function layout() {
  const gap = rem(), high = 27 * rem() + gap, inner = at("space").clientWidth - 2 * gap;
  const across = Math.max(1, Math.floor((inner + gap) / (19 * rem() + gap)));
  const rows = Math.min(Math.ceil(total / across), Math.floor(TALLEST / high));
  const above = Math.max(0, window.scrollY - at("space").offsetTop);
  const first = Math.max(0, Math.min(Math.floor(above / high) - 1, rows - 1));
  const seen = Math.ceil(window.innerHeight / high) + 3;
  return {gap, high, rows, first, offset: first * across, limit: Math.min(200, seen * across)};
}
function query(place) {
  const [, statuses] = KINDS[kind];
  return new URLSearchParams({status: statuses.join(","), words: at("words").value.slice(0, 1000), order: at("order").value, offset: place.offset, limit: place.limit});
}
async function look() {
  clearTimeout(timer);
  const number = ++asked;
  try {
    const place = layout();
    const [stands, page] = await Promise.all([ask("/api/status"), ask(`/api/jobs?${query(place)}`)]);
    if (number < answered || pressed) return;  // a later one was quicker; a button that is being pressed stays
    answered = number;
    if (broken) { broken = false; tell(""); }
    total = page.total;
    show(stands); list(page.jobs, place);
  } catch (error) {
    broken = true; tell(error instanceof TypeError ? "The server does not answer." : error.message);
  } finally { if (number === asked) timer = setTimeout(look, document.hidden ? HIDDEN : EVERY); }
}
let broken = false, pressed = false;
addEventListener("pointerdown", () => { pressed = true; }, true);
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => { pressed = false; }, true);

function list(jobs, place) {
  const now = layout();
  at("space").style.height = `${now.rows * now.high + now.gap}px`;
  at("clips").style.top = `${place.first * place.high}px`;
  const there = new Map(cards); cards.clear();
  const wanted = jobs.map(job => {
    const text = JSON.stringify(job), old = there.get(job.name);
    const element = old && old.text === text ? old.element : drawn(job, old);
    cards.set(job.name, {text, element});
    return element;
  });
  const focused = document.activeElement, of = focused.closest("article"), button = of ? [...of.querySelectorAll("button")].indexOf(focused) : -1;
  fit(at("clips"), wanted);
  if (button >= 0 && !of.isConnected && cards.has(of.dataset.name)) cards.get(of.dataset.name).element.querySelectorAll("button")[button]?.focus();
}
// What is in its place already is not touched: it may be playing.
function fit(holder, elements) {
  const keep = new Set(elements);
  for (const element of [...holder.children]) if (!keep.has(element)) element.remove();
  elements.forEach((element, number) => { if (holder.children[number] !== element) holder.insertBefore(element, holder.children[number] || null); });
}

function drawn(job, old) {
  const frames = job.pictures ? Array.from({length: job.pictures}, (_, number) => job.address.replace("?", `/${number}?`)) : job.address ? [job.address] : [];
  const clip = {...job, frames}, buttons = [];
  const button = (text, what) => { const made = make("button", text); made.addEventListener("click", what); buttons.push(made); };
  const named = {names: [job.name]};
  if (["pending", "claimed", "failed"].includes(job.status)) button("Cancel", () => act("cancel", named));
  if (["failed", "cancelled"].includes(job.status)) button("Retry", () => act("retry", named));
  if (job.status === "pending") {
    button(job.paused ? "Resume" : "Pause", () => act(job.paused ? "resume" : "pause", named));
    button("First", () => act("priority", {...named, priority: 1000}));
  }
  button("Again…", () => fill(job));
  if (job.paused) clip.status = `${job.status}, paused`;
  if (job.stage) clip.status = `${job.stage} ${job.steps ? `${job.step}/${job.steps}` : ""}`;
  const element = card(clip, ...buttons);
  if (old && old.element.dataset.address === job.address && job.address) {  // the same clip goes on playing
    element.firstChild.replaceWith(old.element.firstChild);
  }
  element.dataset.address = job.address;
  return element;
}

// What runs, and how the folder stands.

function clock(seconds) {
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), rest = whole % 3600;
  const two = number => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(Math.floor(rest / 60))}:${two(rest % 60)}` : `${Math.floor(rest / 60)}:${two(rest % 60)}`;
}
function show(stands) {
  status = stands;
  const {counts, runs} = stands, finished = counts.done + counts.failed + counts.cancelled;
  const all = Object.values(counts).reduce((one, other) => one + other, 0);
  const parts = [`${finished} of ${all}`];
  if (stands.paused) parts.push("paused");
  parts.push(runs.length ? [...new Set(runs.map(run => run.model))].join(", ") : "no active run");
  if (stands.rate !== null) parts.push(`${stands.rate.toFixed(1)} clips an hour`);
  if (stands.seconds !== null) parts.push(`done in ${clock(stands.seconds)}`);
  document.title = `${finished}/${all} ${stands.folder}`;
  at("folder").textContent = stands.folder;
  at("count").textContent = parts.join(" · ");
  at("pause").textContent = stands.paused ? "Resume" : "Pause";
  at("pause").setAttribute("aria-pressed", stands.paused);
  for (const button of at("statuses").children) {
    const [name, statuses] = KINDS[button.dataset.kind];
    const count = statuses.length ? statuses.reduce((sum, one) => sum + counts[one], 0) : all;
    button.textContent = `${name} ${count}`;
    button.setAttribute("aria-pressed", button.dataset.kind === kind);
  }
  at("cancel-all").hidden = !total || !["next", "now", "failed"].includes(kind);
  at("retry-all").hidden = !total || !["failed", "gone"].includes(kind);
  const lines = new Map([...at("running").children].map(line => [line.dataset.name, line]));
  fit(at("running"), stands.running.map(job => running(job, lines.get(job.file))));
  const {inbox, refused} = stands, text = JSON.stringify([inbox, refused]);
  if (at("added").dataset.text !== text) { at("added").dataset.text = text; at("added").replaceChildren(...added(stands)); }
  at("added").hidden = !at("added").childElementCount;
}
function running(job, old) {
  const line = old || make("div", undefined, "job");
  if (!old) {
    line.dataset.name = job.file;
    const bar = make("progress"), stop = make("button", "Cancel");
    bar.setAttribute("aria-label", `steps of ${job.file}`);
    stop.addEventListener("click", () => act("cancel", {names: [job.file]}));
    line.append(make("span", job.file), bar, make("span", "", "small"), stop);
  }
  const [, bar, state] = line.children;
  if (job.steps) { bar.max = job.steps; bar.value = job.step; } else bar.removeAttribute("value");
  state.textContent = `${job.stage} ${job.steps ? `${job.step}/${job.steps}` : ""} ${clock(job.seconds)}`;
  return line;
}
function added(stands) {
  const lines = [];
  if (stands.inbox) lines.push(make("p", `${stands.inbox} added, not yet read by a run`, "small"));
  for (const [name, why] of stands.refused) lines.push(make("p", `refused: ${name}: ${why}`, "small bad"));
  if (stands.refused.length) {
    const button = make("button", "Dismiss"), row = make("div", undefined, "row");
    button.addEventListener("click", () => act("dismiss", {}));
    row.append(button); lines.push(row);
  }
  return lines;
}

// The form: a new job, or an existing one with changes.

const form = document.querySelector("#form form"), NUMBERS = ["seed", "repeat", "steps", "num_frames", "width", "height", "priority"];
const shownOf = {};  // what the form began with
let original = null;
function fill(job) {
  original = job;
  const settings = job ? job.settings : {};
  const values = {
    prompt: job ? job.prompt : "", negative_prompt: job ? job.negative : "", seed: job ? job.seed + 1 : 0, repeat: 1, name: "",
    priority: job ? job.priority : 0, guidance: job && Object.keys(job.as_data).length ? JSON.stringify(job.as_data) : "",
    pipeline: job && Object.keys(job.pipeline).length ? JSON.stringify(job.pipeline) : "",
  };
  for (const name of ["steps", "num_frames", "width", "height"]) values[name] = settings[name] ?? "";
  const models = status ? status.models : [], options = job ? models : ["", ...models];
  form.elements.model.replaceChildren(...options.map(name => Object.assign(make("option", name || "the model of the run"), {value: name})));
  form.elements.model.closest("label").hidden = options.length < 2;
  values.model = job ? job.model : "";
  for (const [name, value] of Object.entries(values)) { form.elements[name].value = value; shownOf[name] = form.elements[name].value; }
  form.elements.image.value = "";
  at("form-title").textContent = job ? `Again: ${job.name}` : "Add a job";
  at("form-hint").textContent = job ? "Unchanged fields keep the values of that job." : "Empty fields use the settings of the run. {red|blue} is one of both, chosen by the seed.";
  at("form-error").textContent = "";
  at("form").showModal();
}
function read(name) {
  const text = form.elements[name].value;
  if (text.trim() === "") return null;
  if (NUMBERS.includes(name)) return Number(text);
  if (name === "guidance" || name === "pipeline") { try { return JSON.parse(text); } catch { return text.trim(); } }
  return text;
}
form.addEventListener("submit", async event => {
  event.preventDefault();
  at("send").disabled = true;
  try {
    const fields = {};
    for (const name of Object.keys(shownOf)) {
      if (original ? form.elements[name].value !== shownOf[name] || name === "seed" : read(name) !== null) fields[name] = read(name);
    }
    if (original && fields.seed === null) fields.seed = 0;
    const [image] = form.elements.image.files;
    if (image) fields.image = (await ask("/api/images", image, "application/octet-stream")).done;
    await ask(...(original ? ["/api/again", {name: original.name, changes: fields}] : ["/api/add", {job: fields}]));
    at("form").close();
  } catch (error) { at("form-error").textContent = error.message; }
  at("send").disabled = false;
  look();
});
at("leave").addEventListener("click", () => at("form").close());
at("new").addEventListener("click", () => fill(null));

// What is seen is what is meant.
async function all(action, text) {
  const [, statuses] = KINDS[kind];
  if (confirm(`${text} ${total} job${total === 1 ? "" : "s"}?`)) await act(action, {statuses, words: at("words").value.slice(0, 1000)});
}
at("cancel-all").addEventListener("click", () => all("cancel", "Cancel"));
at("retry-all").addEventListener("click", () => all("retry", "Retry"));
at("pause").addEventListener("click", () => act(status && status.paused ? "resume" : "pause", {}));
function anew() { window.scrollTo(0, 0); look(); }
for (const name of Object.keys(KINDS)) {
  const button = make("button", KINDS[name][0], undefined, at("statuses"));
  button.dataset.kind = name;
  button.addEventListener("click", () => { kind = name; anew(); });
}
at("words").addEventListener("input", anew);
at("order").addEventListener("change", anew);
let scrolls = 0;
addEventListener("scroll", () => { cancelAnimationFrame(scrolls); scrolls = requestAnimationFrame(look); }, {passive: true});
addEventListener("resize", look);
document.addEventListener("visibilitychange", look);
if (location.search) history.replaceState(null, "", "/");  // the cookie has the token from here on
look();
