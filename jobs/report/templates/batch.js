
"use strict";
// Draws the gallery and the charts from the JSON beside it. Text reaches the page through textContent and attributes alone.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE_SIZE = 24;
const byId = (name) => document.getElementById(name);

function element(name, attributes = {}, ...inner) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inner.filter((part) => part !== null));
  return made;
}

function drawn(name, attributes, ...inner) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inner);
  return made;
}

function seconds(value) {
  if (value < 60) return `${value.toFixed(1)}\u00a0s`;
  const minutes = Math.floor(Math.round(value) / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(value) % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---- clips

const clips = Array.from({ length: data.num_clips }, (_, number) => {
  const clip = { number };
  for (const [name, column] of Object.entries(data.clips)) clip[name] = column[number];
  clip.words = `${clip.id}\n${clip.prompt}\n${clip.fingerprint}`.toLowerCase();
  clip.taken_s = clip.denoise_s === null ? null : clip.encode_s + clip.denoise_s + clip.decode_s + clip.write_s;
  return clip;
});

const ORDERS = {
  id: (a, b) => a.number - b.number,
  dear: (a, b) => (b.cost ?? -1) - (a.cost ?? -1) || a.number - b.number,
  cheap: (a, b) => (a.cost ?? 9) - (b.cost ?? 9) || a.number - b.number,
  slow: (a, b) => (b.taken_s ?? -1) - (a.taken_s ?? -1) || a.number - b.number,
};
let found = clips;
let page = 0;
let playing = false;

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (playing && isIntersecting) target.play().catch(() => {});
    else if (!target.paused) target.pause();  // the call alone would load the video
  }
}, { threshold: 0.25 });

function search() {
  const words = byId("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = byId("status").value;
  found = clips.filter((clip) => (!status || clip.status === status) && words.every((word) => clip.words.includes(word)));
  found.sort(ORDERS[byId("order").value]);
  show(0);
}

function show(number) {
  const last = Math.max(0, Math.ceil(found.length / PAGE_SIZE) - 1);
  page = Math.min(Math.max(number, 0), last);
  watcher.disconnect();
  const shown = found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
  byId("gallery").replaceChildren(...shown.map(card));
  const first = page * PAGE_SIZE + 1;
  byId("found").textContent = found.length
    ? `${first} to ${first + shown.length - 1} of ${found.length} clips` : "No clip has these words and this status.";
  byId("page").value = page + 1;
  byId("page").max = last + 1;
  byId("pages").textContent = `of ${last + 1}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === last;
  for (const video of byId("gallery").querySelectorAll("video")) watcher.observe(video);
}

function card(clip) {
  const title = clip.video ? element("a", { href: data.base + encodeURIComponent(clip.video) }, clip.id) : clip.id;
  const made = element("li", { class: "card" },
    picture(clip),
    element("h3", {}, element("bdi", {}, title), element("span", { class: `badge ${clip.status}` }, clip.status)),
    clip.prompt ? element("p", { class: "prompt" }, element("bdi", {}, clip.prompt)) : null);
  if (clip.reasons.length) made.append(element("p", {}, element("bdi", {}, clip.reasons[clip.reasons.length - 1])));
  if (clip.computed_steps !== null) made.append(element("p", { class: "quiet" }, decided(clip)));
  for (const [branch, steps] of data.decisions[clip.decisions]) made.append(strip(branch, steps));
  for (const remark of clip.remarks) made.append(element("p", { class: "remark" }, element("bdi", {}, remark)));
  made.append(details(clip));
  return made;
}

function decided(clip) {
  const steps = clip.computed_steps + clip.skipped_steps;
  const skipped = clip.skipped_steps ? `${clip.computed_steps} of ${steps} steps computed, cost ${(100 * clip.cost).toFixed(0)} %`
    : `${steps} steps, all computed`;
  return clip.taken_s === null ? skipped : `${skipped}, ${seconds(clip.taken_s)}`;
}

function picture(clip) {
  if (!clip.video) return element("div", { class: "none" }, clip.status === "running" ? "being rendered" : "no file");
  const src = data.base + encodeURIComponent(clip.video);
  const text = `clip ${clip.id}${clip.prompt ? `: ${clip.prompt.slice(0, 200)}` : ""}`;
  if (clip.video.endsWith(".png")) {
    return orSaid(element("img", { src, width: clip.width, height: clip.height, loading: "lazy", alt: text }),
      "The picture is not beside this page.");
  }
  if (clip.video.endsWith(".wav") || clip.video.endsWith(".flac")) {
    return orSaid(element("audio", { src, preload: "none", controls: "", "aria-label": text }),
      "This browser cannot play the sound, or it is not beside this page.");
  }
  const video = element("video", {
    src, poster: clip.poster, width: clip.width, height: clip.height, preload: clip.poster ? "none" : "metadata",
    controls: "", loop: "", playsinline: "", "aria-label": text,
  });
  video.muted = true;
  return orSaid(video, "This browser cannot play the video, or it is not beside this page.");
}

function orSaid(media, reason) {
  media.addEventListener("error", () => media.replaceWith(element("div", { class: "none" }, reason)), { once: true });
  return media;
}

function sizeOf(clip) {
  if (clip.seconds) return `${clip.seconds} s`;
  if (!clip.width) return null;
  return clip.video && clip.video.endsWith(".png") ? `${clip.width} x ${clip.height}`
    : `${clip.width} x ${clip.height}, ${clip.frames} frames, ${clip.fps} per second`;
}

function strip(branch, steps) {
  const runs = [];
  for (let begin = 0, end; begin < steps.length; begin = end) {
    for (end = begin + 1; end < steps.length && steps[end] === steps[begin]; end += 1);
    runs.push(drawn("rect", { class: steps[begin], x: begin, y: 0, width: end - begin - 0.08, height: 1 },
      ...(steps[begin] === "." ? [] : [titled(begin, end, steps[begin])])));
  }
  const skipped = [...steps].filter((step) => step === "s").length;
  return drawn("svg", { class: "strip", viewBox: `0 0 ${steps.length} 1`, preserveAspectRatio: "none", role: "img",
    "aria-label": `branch ${branch}: ${skipped} of ${steps.length} steps skipped` }, ...runs);
}

function titled(begin, end, step) {
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  const which = end - begin === 1 ? `step ${begin}` : `steps ${begin} to ${end - 1}`;
  title.textContent = `${which}: ${step === "C" ? "computed" : "skipped"}`;
  return title;
}

function numbers(steps, wanted) {
  return [...steps].flatMap((step, number) => (step === wanted ? [number] : [])).join(" ");
}

function details(clip) {
  const facts = [["fingerprint", clip.fingerprint], ["seed", clip.seed], ["negative", clip.negative_prompt],
    ["size", sizeOf(clip)],
    ["guidance", clip.guidance], ["image", clip.image], ["cache", data.policies[clip.policy]]];
  for (const [branch, steps] of data.decisions[clip.decisions]) facts.push([`${branch} skipped`, numbers(steps, "s") || "none"]);
  facts.push(["gamma", clip.gammas.map(([step, gamma]) => `${step}: ${gamma}`).join(", ")]);
  if (clip.taken_s !== null) {
    facts.push(["seconds", `encode ${clip.encode_s}, denoise ${clip.denoise_s}, decode ${clip.decode_s}, write ${clip.write_s}`]);
  }
  facts.push(["resumed at", clip.resumed_at.join(", ")], ["reasons", clip.reasons.join("\n")]);
  for (const [name, value] of data.provenance[clip.provenance]) if (name !== "cache") facts.push([name, value]);
  const made = element("details", {}, element("summary", {}, "Details"));
  made.addEventListener("toggle", () => {  // filled when it is opened: few of them are
    if (made.children.length > 1) return;
    const rows = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
    made.append(element("dl", { class: "facts" }, ...rows.map(([name, value]) => element("div", {},
      element("dt", {}, name), element("dd", {}, element("bdi", {}, String(value)))))));
  });
  return made;
}

function showClip(which) {
  byId("query").value = typeof which === "number" ? clips[which].id : which;
  byId("status").value = "";
  search();
  if (typeof which === "number") {
    found = [clips[which], ...found.filter((clip) => clip.number !== which)];
    show(0);
  }
  byId("clips").scrollIntoView();
}

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("query").addEventListener("input", search);
byId("status").addEventListener("change", search);
byId("order").addEventListener("change", search);
byId("previous").addEventListener("click", () => show(page - 1));
byId("next").addEventListener("click", () => show(page + 1));
byId("page").addEventListener("change", () => show((Number(byId("page").value) || 1) - 1));
byId("play").hidden = !clips.some((clip) => clip.video && clip.video.endsWith(".mp4"));
byId("play").addEventListener("click", () => {
  playing = !playing;
  byId("play").setAttribute("aria-pressed", String(playing));
  show(page);
});
search();

// ---- what ran when

const MEANING = {
  rendered: "denoised", running: "at work", preempted: "preempted", failed: "failed", lost: "lost with its gang",
  down: "gang lost, not yet back",
};
const LANE = 26, BAR = 16, HEAD = 22;
let session = null, from_s = 0, to_s = 1, chosen = null, bars = [];

function startTimeline() {
  if (!data.sessions.length) return;
  byId("time-controls").addEventListener("submit", (event) => event.preventDefault());
  data.sessions.forEach((one, number) => {
    const began = new Date(one.begin_s * 1000).toISOString().slice(0, 19).replace("T", " ");
    byId("session").append(element("option", { value: number }, `${number + 1}: ${began} UTC, ${seconds(one.span_s)}`));
  });
  byId("session").value = data.sessions.length - 1;
  byId("session").addEventListener("change", showSession);
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => move(button.dataset.move));
  }
  const canvas = byId("lanes");
  canvas.addEventListener("pointermove", (event) => choose(barAt(event)));
  canvas.addEventListener("click", (event) => {
    const bar = barAt(event);
    if (bar && bar.clip !== null) showClip(bar.clip);
  });
  canvas.addEventListener("keydown", onKey);
  new ResizeObserver(draw).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  showSession();
}

function showSession() {
  session = data.sessions[Number(byId("session").value)];
  [from_s, to_s, chosen] = [0, Math.max(session.span_s, 0.001), null];
  bars = session.lanes.flatMap((lane, row) => lane.bars.map(([kind, begin_s, end_s, clip]) =>
    ({ row, lane: lane.name, kind: data.kinds[kind], begin_s, end_s, clip })));
  const kinds = data.kinds.filter((kind) => bars.some((bar) => bar.kind === kind));
  byId("legend").replaceChildren(...kinds.map((kind) => element("li", { class: kind }, element("i"), MEANING[kind])));
  draw();
  drawThroughput();
}

function move(how) {
  const span_s = to_s - from_s, middle_s = (from_s + to_s) / 2;
  const whole_s = Math.max(session.span_s, 0.001);
  const next_s = how === "in" ? span_s / 2 : how === "out" ? Math.min(span_s * 2, whole_s) : span_s;
  const shift_s = how === "left" ? -span_s / 2 : how === "right" ? span_s / 2 : 0;
  from_s = Math.min(Math.max(middle_s + shift_s - next_s / 2, 0), whole_s - next_s);
  to_s = from_s + next_s;
  draw();
}

function edge() {
  return Math.min(110, Math.max(...session.lanes.map((lane) => lane.name.length), 4) * 8 + 12);
}

function draw() {
  if (!session) return;
  const canvas = byId("lanes"), width = canvas.parentElement.clientWidth, left = edge();
  const height = HEAD + Math.max(1, session.lanes.length) * LANE + 6, scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = Math.min(height * scale, 32000);
  canvas.style.height = `${height}px`;
  const paint = canvas.getContext("2d");
  paint.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`);
  paint.font = "12px system-ui, sans-serif";
  paint.textBaseline = "middle";
  const at = (time_s) => left + (time_s - from_s) / (to_s - from_s) * (width - left - 8);
  for (const tick_s of ticks(width < 500 ? 3 : 7)) {
    paint.fillStyle = colour("line");
    paint.fillRect(at(tick_s), HEAD - 4, 1, height);
    paint.fillStyle = colour("quiet");
    paint.fillText(clock(tick_s), Math.min(at(tick_s) + 2, width - 50), HEAD / 2);
  }
  session.lanes.forEach((lane, row) => {
    paint.fillStyle = colour("text");
    paint.fillText(lane.name, 8, HEAD + row * LANE + LANE / 2, left - 12);
  });
  paint.save();
  paint.beginPath();
  paint.rect(left, 0, width - left, height);
  paint.clip();
  for (const bar of bars) {
    if (bar.end_s < from_s || bar.begin_s > to_s) continue;
    const begin = at(bar.begin_s), length = Math.max(at(bar.end_s) - begin - 1, 1.5);
    const top = HEAD + bar.row * LANE + (LANE - BAR) / 2;
    paint.fillStyle = colour(bar.kind);
    paint.fillRect(begin, bar.kind === "down" ? top + BAR / 2 - 2 : top, length, bar.kind === "down" ? 4 : BAR);
    if (bar === chosen) {
      paint.strokeStyle = colour("text");
      paint.lineWidth = 2;
      paint.strokeRect(begin - 1, top - 2, length + 2, BAR + 4);
    }
  }
  paint.restore();
}

function ticks(wanted) {
  const rough = (to_s - from_s) / wanted;
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400]
    .find((one) => one >= rough) ?? Math.ceil(rough / 86400) * 86400;
  const found_s = [];
  for (let time_s = Math.ceil(from_s / step) * step; time_s <= to_s; time_s += step) found_s.push(time_s);
  return found_s;
}

function clock(time_s) {
  if (session.span_s < 60) return `${Math.round(time_s * 10) / 10} s`;
  const whole = Math.round(time_s), two = (number) => String(number).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

function barAt(event) {
  const box = byId("lanes").getBoundingClientRect(), left = edge();
  const time_s = from_s + (event.clientX - box.left - left) / (box.width - left - 8) * (to_s - from_s);
  const near_s = 3 / (box.width - left) * (to_s - from_s);
  const row = Math.floor((event.clientY - box.top - HEAD) / LANE);
  const here = bars.filter((bar) => bar.row === row && bar.begin_s - near_s <= time_s && time_s <= bar.end_s + near_s);
  return here.sort((a, b) => (a.end_s - a.begin_s) - (b.end_s - b.begin_s))[0] ?? null;
}

function choose(bar) {
  if (bar === null || bar === chosen) return;
  chosen = bar;
  const clip = bar.clip === null ? "" : ` clip ${typeof bar.clip === "number" ? clips[bar.clip].id : bar.clip}`;
  byId("told").textContent =
    `${bar.lane}:${clip} ${MEANING[bar.kind]}, ${clock(bar.begin_s)} to ${clock(bar.end_s)} (${seconds(bar.end_s - bar.begin_s)})`;
  draw();
}

function onKey(event) {
  const place = bars.indexOf(chosen);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: bars.length - 1 }[event.key];
  if (next !== undefined) {
    choose(bars[Math.min(Math.max(next, 0), bars.length - 1)] ?? null);
    if (chosen && (chosen.begin_s < from_s || chosen.end_s > to_s)) {
      const span_s = to_s - from_s;
      from_s = Math.min(Math.max(chosen.begin_s - span_s / 4, 0), Math.max(session.span_s - span_s, 0));
      to_s = from_s + span_s;
      draw();
    }
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const row = (chosen ? chosen.row : -1) + (event.key === "ArrowDown" ? 1 : -1);
    choose(bars.find((bar) => bar.row === row) ?? null);
  } else if (event.key === "Enter" && chosen && chosen.clip !== null) {
    showClip(chosen.clip);
  } else {
    return;
  }
  event.preventDefault();
}

function drawThroughput() {
  const counts = session.bins, bin_s = session.span_s / counts.length, most = Math.max(...counts);
  const chart = byId("throughput");
  if (!most || !bin_s) {
    chart.replaceChildren(element("p", {}, "No clip was done in this run."));
    return;
  }
  const perHour = (count) => Math.round(count / bin_s * 3600).toLocaleString("en");
  const columns = counts.map((count, place) => drawn("rect",
    { x: place + 0.08, y: 100 - 100 * count / most, width: 0.84, height: 100 * count / most }));
  const total = counts.reduce((sum, count) => sum + count, 0);
  const told = `${total} clips done in ${seconds(session.span_s)}, ${perHour(total / counts.length)} per hour; `
    + `a column is ${seconds(bin_s)}, the highest one ${most} ${most === 1 ? "clip" : "clips"}`;
  chart.replaceChildren(element("p", {}, element("span", {}, `${told}.`)),
    drawn("svg", { viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": told },
      ...columns, drawn("line", { x1: 0, x2: counts.length, y1: 100, y2: 100, "vector-effect": "non-scaling-stroke" })),
    element("p", {}, element("span", {}, clock(0)), element("span", {}, clock(session.span_s))));
}

startTimeline();
