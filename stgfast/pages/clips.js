const at = id => document.getElementById(id);

// A clip that can be shown at any place from 0 to 1, whatever it is a file of.
class Player {
  constructor(clip, eager) {
    this.box = make("div", undefined, "media");
    this.frames = clip.frames;
    if (!clip.frames.length) { this.box.textContent = clip.status; this.element = null; return; }
    const still = !clip.name.toLowerCase().endsWith(".mp4");
    this.element = document.createElement(still ? "img" : "video");
    this.element[still ? "alt" : "ariaLabel"] = clip.prompt.slice(0, 200);
    if (still) { this.element.loading = eager ? "eager" : "lazy"; }
    else { Object.assign(this.element, {muted: true, loop: true, playsInline: true, controls: !eager, preload: eager ? "auto" : "none"}); }
    if (still || eager) this.element.src = clip.frames[0]; else near.observe(this.element);
    this.element.dataset.source = clip.frames[0];
    this.box.append(this.element);
  }
  get video() { return this.element instanceof HTMLVideoElement; }
  // In seconds; pictures by themselves have no time of their own, and are shown as 24 in a second.
  get length() { return this.video ? this.element.duration || 0 : this.frames.length / 24; }
  show(place) {
    if (this.video) { if (this.length) this.element.currentTime = Math.min(place * this.length, this.length - 1e-3); }
    else if (this.frames.length > 1) { this.element.src = this.frames[Math.min(Math.floor(place * this.frames.length), this.frames.length - 1)]; }
  }
}
// A video is read when it comes near to what is seen.
const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    entry.target.preload = "metadata"; entry.target.src = entry.target.dataset.source; near.unobserve(entry.target);
  }
}, {rootMargin: "300px"});

const described = part => `${part.kind} at ${part.layers}, scale ${part.scale}`;

// A clip and how it was made, with buttons for what can be done with it.
function card(clip, ...buttons) {
  const article = make("article"), about = make("div", undefined, "about");
  article.dataset.name = clip.name;
  about.append(make("p", clip.prompt || "(no prompt)", "prompt"));
  if (clip.negative) about.append(make("p", `negative prompt: ${clip.negative}`, "small"));
  const list = make("ul", undefined, "chips");
  const chips = [`seed ${clip.seed}`, ...clip.guidance.map(described), ...Object.entries(clip.settings).map(([name, value]) => `${name} ${value}`)];
  for (const text of chips) list.append(make("li", text));
  about.append(list);
  const times = Object.entries(clip.seconds).map(([stage, seconds]) => `${stage} ${seconds} s`).join(", ");
  const state = clip.attempts > 1 ? `${clip.status} at attempt ${clip.attempts}` : clip.status;
  about.append(make("p", [clip.name, state, times].filter(Boolean).join(" · "), "small"));
  if (clip.error) about.append(make("p", clip.line ? `line ${clip.line}: ${clip.error}` : clip.error, "small bad"));
  const row = make("div", undefined, "row");
  if (clip.frames.length) {
    const pick = make("button", "Compare", undefined, row), link = make("a", "file", undefined, row);
    pick.setAttribute("aria-pressed", isChosen(clip));
    pick.addEventListener("click", () => choose(clip));
    link.href = clip.frames[0];
  }
  row.append(...buttons);
  if (row.childElementCount) about.append(row);
  article.append(new Player(clip, false).box, about);
  return article;
}

// Two clips, in step.
let chosen = [], players = [], playing = false, place = 0, last = 0;
const isChosen = clip => chosen.some(one => one.name === clip.name);
function choose(clip) {
  chosen = isChosen(clip) ? chosen.filter(one => one.name !== clip.name) : [...chosen, clip].slice(-2);
  mark();
  if (chosen.length === 2) compare(); else shut();
}
function mark() {
  for (const button of document.querySelectorAll("article button[aria-pressed]")) {
    button.setAttribute("aria-pressed", isChosen({name: button.closest("article").dataset.name}));
  }
}
function compare() {
  players = chosen.map(clip => new Player(clip, true));
  at("pair").replaceChildren(...chosen.map((clip, side) => {
    const one = make("div");
    one.append(players[side].box, make("p", [clip.prompt, `seed ${clip.seed}`, ...clip.guidance.map(described)].join(" · "), "small"));
    return one;
  }));
  at("compare").hidden = false; move(0);
}
function shut() { at("compare").hidden = true; at("pair").replaceChildren(); players = []; playing = false; at("play").textContent = "Play"; }
function move(to) { place = to; at("place").value = Math.round(to * 1000); for (const player of players) player.show(to); }
function tick(now) {
  if (!playing) return;
  const length = Math.max(...players.map(player => player.length), 0.1);
  move((place + Math.max(0, Math.min(now - last, 200)) / 1000 / length) % 1); last = now;
  requestAnimationFrame(tick);
}
at("play").addEventListener("click", () => {
  playing = !playing; at("play").textContent = playing ? "Pause" : "Play";
  if (playing) { last = performance.now(); requestAnimationFrame(tick); }
});
at("place").addEventListener("input", () => { playing = false; at("play").textContent = "Play"; move(at("place").value / 1000); });
at("close").addEventListener("click", () => { chosen = []; shut(); mark(); });
