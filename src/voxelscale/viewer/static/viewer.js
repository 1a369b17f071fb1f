"use strict";
// The page: cases, findings, windows, judging and the brush. Everything has a key.

const $ = (id) => document.getElementById(id);
const CT_WINDOWS = [["Lung", -1350, 150], ["Mediastinum", -160, 240], ["Bone", -450, 1050]]; // HU
const CHEST = [-1000, 700]; // HU of the colours in 3-D
const LAYERS = [["truth", "Truth", "T"], ["prediction", "Prediction", "Y"], ["decided", "My mask", "U"]];
const COLOURS = { truth: "#4dd964", prediction: "#ff9f1c", decided: "#ff5fd2", mark: "#4cc9f0" };
const SOFTWARE_WAIT = 250; // ms after the last change until 3-D is drawn again
const LARGEST_PICTURE = 1.5; // device pixels a CSS pixel at most: a slice has no more to show

const view = {
  cases: [], facts: null, lattice: null, planes: null, truth: null, prediction: null, decided: null,
  voxel: [0, 0, 0], selected: "", threshold: 0, window: [0, 1], axis: 0, large: false, shown3d: true,
  on: { truth: true, prediction: true, decided: true }, brush: "", stroke: null, reloading: 0, number: -1, queue: Promise.resolve(),
};
window.voxelscale = view; // for tests and the curious

const SOFTWARE = isSoftware();

function isSoftware() {
  const gl = document.createElement("canvas").getContext("webgl2"), facts = gl && gl.getExtension("WEBGL_debug_renderer_info");
  return !facts || /swiftshader|llvmpipe|software/i.test(gl.getParameter(facts.UNMASKED_RENDERER_WEBGL));
}

const niivue = new globalThis.niivue.Niivue({
  isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarShowRender: 0, isAntiAlias: false,
  viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", dragMode: globalThis.niivue.DRAG_MODE.pan, dragAndDropEnabled: false, isOrientationTextVisible: false, crosshairWidth: 0,
  backColor: [0, 0, 0, 1], logLevel: "error", loadingText: "", forceDevicePixelRatio: Math.min(devicePixelRatio, LARGEST_PICTURE),
});
const solid = new globalThis.niivue.Niivue({
  viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", sliceType: 4, isAntiAlias: false, dragAndDropEnabled: false, show3Dcrosshair: false, crosshairWidth: 1, backColor: [0, 0, 0, 1],
  logLevel: "error", loadingText: "", forceDevicePixelRatio: SOFTWARE ? 0.5 : 1, meshXRay: 0.5,
});
solid.scene.renderAzimuth = 180;
solid.scene.renderElevation = 10;
view.niivue = niivue;
view.solid = solid;

async function start() {
  // The token stays out of the address bar, the history and screenshots.
  history.replaceState(null, "", location.pathname + location.hash);
  buildControls();
  await Promise.all([niivue.attachTo("planes"), solid.attachTo("solid")]);
  const [min, max] = CHEST;
  solid.addColormap("chest", { min, max, R: [0, 40, 120, 90, 200, 255], G: [0, 90, 150, 60, 185, 250], B: [0, 130, 170, 60, 150, 235],
    A: [0, 0, 16, 0, 0, 120], I: [0, 52, 82, 112, 175, 255] });
  const drawScene = niivue.drawScene.bind(niivue);
  niivue.drawScene = () => {
    drawScene();
    draw();
  };
  niivue.onLocationChange = () => {
    view.voxel = view.lattice.ofShare(niivue.scene.crosshairPos);
    moved();
  };
  new ResizeObserver(layout).observe($("views"));
  const listed = await ask("/api/cases");
  view.cases = listed.cases;
  $("reader").textContent = `Reader: ${listed.reader}`;
  listCases();
  await fromAddress();
  addEventListener("hashchange", fromAddress);
}

async function ask(path, line) {
  const options = line ? { method: "POST", body: JSON.stringify(line), headers: { "content-type": "application/json" } } : {};
  const response = await fetch(path, options);
  if (!response.ok) {
    const fault = await response.json().catch(() => ({ error: response.statusText }));
    throw new Error([fault.error, fault.hint].filter(Boolean).join("; "));
  }
  const json = (response.headers.get("content-type") || "").includes("json");
  return json ? response.json() : response.arrayBuffer();
}

function say(text, error = false) {
  $("said").textContent = text;
  $("said").className = error ? "error" : "";
}

// Cases

function listCases() {
  const signs = { finished: "✓ ", begun: "… ", "": "" };
  $("case").replaceChildren(...view.cases.map((c, n) => new Option(`${signs[c.state]}${c.name}`, n)));
  $("case").value = view.number;
}

async function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = Math.max(0, view.cases.findIndex((c) => c.name === asked.get("case")));
  if (number !== view.number) await open(number, asked.get("finding") || "1");
  else select(asked.get("finding") || "1");
}

async function open(number, finding = "1") {
  if (number < 0 || number >= view.cases.length) return;
  await view.queue;
  view.number = number;
  view.ready = false;
  $("loading").hidden = false;
  $("case").value = number;
  say("");
  const began = performance.now(), base = `/api/case/${number}`;
  const [facts, overview] = await Promise.all([ask(base), ask(`${base}/overview.nii`)]).catch((error) => [error, null]);
  if (number !== view.number) return;
  if (!overview) {
    $("loading").hidden = true;
    return say(facts.message, true);
  }
  view.times = { asked: performance.now() - began };
  Object.assign(view, { facts, lattice: new Lattice(facts.lattice), truth: null, prediction: null, decided: null, brush: "" });
  view.planes = new Planes(number, view.lattice, draw, (error) => say(`A slice was not read: ${error.message}`, true));
  view.windows = facts.lattice.ct ? CT_WINDOWS : [["Window", ...facts.lattice.range]];
  showFacts();
  await showVolumes(overview);
  view.times.shown = performance.now() - began;
  $("loading").hidden = true;
  select(view.facts.findings.length ? finding : "");
  await Promise.all(["prediction", "truth", "decided"].map(loadMask));
  view.times.masks = performance.now() - began;
  view.ready = true;
  draw();
  if (view.shown3d) setTimeout(() => number === view.number && showSolid(overview), SOFTWARE_WAIT);
}

async function showVolumes(overview) {
  const [, low, high] = view.windows[0];
  for (const one of [niivue, solid]) for (const old of [...one.volumes]) one.removeVolume(old);
  niivue.addVolume(await globalThis.niivue.NVImage.new(overview, "scan.nii", "gray", 1, null, low, high));
  setWindow(0);
  layout();
  view.voxel = view.lattice.shape.map((n) => (n - 1) / 2);
  place();
}

// 3-D comes last: without a GPU it takes seconds.
async function showSolid(overview) {
  const range = view.facts.lattice.ct ? ["chest", ...CHEST] : ["gray", ...view.facts.lattice.range];
  const [colours, low, high] = range;
  solid.addVolume(await globalThis.niivue.NVImage.new(overview, "scan.nii", colours, 1, null, low, high));
  draw3d();
}

async function loadMask(what) {
  if (what === "truth" && !view.facts.has_truth) return;
  const number = view.number, runs = new Int32Array(await ask(`/api/case/${number}/${what}`));
  if (number !== view.number) return;
  const kind = what === "decided" ? PaintedMask : RunMask;
  view[what] = new kind(runs, view.lattice.shape);
  draw();
}

function showFacts() {
  const { facts } = view;
  document.title = `${facts.name} – Voxelscale viewer`;
  $("patient").textContent = facts.patient;
  $("notes").replaceChildren(...facts.warnings.map((text) => element("div", "", text)));
  view.threshold = Math.min(facts.threshold ?? 0.5, ...[0.01 * Math.floor(100 * Math.max(0, ...facts.findings.map((f) => f.probability)))]);
  $("threshold").value = view.threshold;
  $("class").hidden = facts.classes.length < 2;
  $("class").replaceChildren(...facts.classes.map((name, n) => new Option(name, n)));
  $("windows").replaceChildren(...view.windows.map(([name], n) => button(name, String(n + 1), () => setWindow(n))));
  document.querySelector('[data-layer="truth"]').hidden = !facts.has_truth;
  list();
}

// Findings

const markOf = (name) => view.facts.marks.find((m) => m.finding === name);
const findingOf = (name) => view.facts.findings[Number(name) - 1];
const shows = (name) => !findingOf(name) || findingOf(name).probability >= view.threshold;

function names() {
  const lesions = view.facts.lesions.map((_, n) => `t${n + 1}`);
  return [...view.facts.marks.map((m) => m.finding), ...lesions];
}

function placeOf(name) {
  if (name.startsWith("t")) return at(view.facts.lesions[Number(name.slice(1)) - 1]);
  return markOf(name)?.mm;
}

const at = (f) => f && [f.x, f.y, f.z];

function list() {
  const { facts } = view, rows = [];
  rows.push(element("h3", "", `Findings by confidence (${facts.findings.length})`));
  facts.findings.forEach((f, n) => rows.push(row(String(n + 1), f)));
  const added = facts.marks.filter((m) => m.finding.startsWith("a"));
  if (added.length) rows.push(element("h3", "", "Added by you"), ...added.map((m) => row(m.finding, null)));
  if (facts.has_truth) {
    rows.push(element("h3", "", `Truth (${facts.lesions.length})`));
    facts.lesions.forEach((lesion, n) => rows.push(row(`t${n + 1}`, lesion)));
  }
  $("findings").replaceChildren(...rows);
  $("threshold-value").textContent = view.threshold.toFixed(2);
  $("finish").setAttribute("aria-pressed", facts.finished);
  $("finish").firstChild.data = facts.finished ? "Finished – reopen " : "Finish case ";
  document.querySelector("[data-act=undo]").disabled = !facts.can_undo;
  summarise();
}

function row(name, f) {
  const mark = markOf(name), truth = name.startsWith("t"), verdict = mark && mark.verdict;
  const out = element("div", "finding");
  out.id = `finding-${name}`;
  out.setAttribute("role", "option");
  out.setAttribute("aria-selected", name === view.selected);
  out.classList.toggle("below", !truth && !shows(name));
  out.classList.toggle("rejected", verdict === "rejected");
  out.append(element("span", "number", name.toUpperCase()));
  const what = element("span", "what");
  if (f && !truth) {
    const meter = element("span", "meter"), bar = element("i");
    bar.style.width = `${100 * f.probability}%`;
    meter.append(bar);
    what.append(meter, `${f.probability.toFixed(3)}${f.label ? ` ${f.label}` : ""}`);
  } else if (truth) what.append(f.label || "lesion");
  else what.append(`${mark.diameter_mm.toFixed(1)} mm${mark.class ? ` ${mark.class}` : ""}`);
  out.append(what);
  const measures = f ? measured(f) : `at ${mark.mm.map((v) => v.toFixed(1)).join(", ")} mm`;
  out.append(element("span", "measures", measures + (mark && mark.moved ? " · moved" : "")));
  const tags = element("span", "tags"), words = { hit: "hit", false: "false positive", ignored: "ignored" };
  if (verdict && verdict !== "open") tags.append(element("span", `tag ${verdict}`, verdict), " ");
  if (f && f.truth) tags.append(element("span", `tag ${f.truth}`, words[f.truth]));
  if (truth && !f.hits.some((n) => shows(String(n + 1)))) tags.append(element("span", "tag missed", "missed"));
  out.append(tags);
  out.addEventListener("click", () => select(name));
  return out;
}

function measured(f) {
  const hu = f.mean_hu == null ? "" : ` · ${Math.round(f.mean_hu)} HU`;
  return `${lengths(f)} · ${Math.round(f.volume_mm3).toLocaleString("en")} mm³${hu}`;
}

function summarise() {
  const { facts } = view, left = facts.findings.filter((f) => f.probability >= view.threshold);
  const parts = [`<b>${left.length}</b> of ${facts.findings.length} findings`];
  if (facts.has_truth) {
    const hit = facts.lesions.filter((l) => l.hits.some((n) => facts.findings[n].probability >= view.threshold)).length;
    const wrong = left.filter((f) => f.truth === "false").length;
    parts.push(`<b>${hit}</b> of ${facts.lesions.length} lesions found`, `<b>${wrong}</b> false positive${wrong === 1 ? "" : "s"}`);
  }
  $("summary").innerHTML = parts.join(" · "); // numbers only
  $("summary").title = "Whole findings and their masks are filtered; the probabilities of single voxels are not kept.";
}

function select(name) {
  if (!names().includes(name)) return;
  view.selected = name;
  const asked = new URLSearchParams({ case: view.facts.name, finding: name });
  history.replaceState(null, "", `${location.pathname}#${asked}`);
  view.voxel = view.lattice.toVoxel(placeOf(name));
  list();
  $(`finding-${name}`).scrollIntoView({ block: "nearest" });
  $("findings").setAttribute("aria-activedescendant", `finding-${name}`);
  place();
}

function step(by) {
  const all = names().filter((n) => n.startsWith("t") || shows(n));
  if (all.length) select(all[(all.indexOf(view.selected) + by + all.length) % all.length]);
}

function setThreshold(value) {
  view.threshold = Math.min(1, Math.max(0, Math.round(100 * value) / 100));
  $("threshold").value = view.threshold;
  list();
  draw();
  draw3d();
}

// Where the crosshair is

function place() {
  view.voxel = view.voxel.map((v, i) => Math.min(view.lattice.shape[i] - 0.5, Math.max(-0.5, v)));
  niivue.scene.crosshairPos = view.lattice.toShare(view.voxel);
  niivue.drawScene();
  moved();
}

function moved() {
  draw();
  const voxel = view.voxel.map(Math.round);
  for (const ahead of [1, -1, 2, -2]) view.planes.ask(0, voxel[0] + ahead);
  clearTimeout(view.later);
  view.later = setTimeout(draw3d, SOFTWARE_WAIT);
}

function nudge(axis, steps) {
  view.voxel = view.voxel.map((v, i) => (i === axis ? Math.round(v) + steps : v));
  place();
}

function setWindow(number) {
  if (!view.windows[number]) return;
  const [, low, high] = view.windows[number];
  showWindow(low, high);
  [...$("windows").children].forEach((b, n) => b.setAttribute("aria-pressed", n === number));
}

function showWindow(low, high) {
  view.window = [low, high];
  if (!SOFTWARE) {
    // What is seen until the scan's own slice is there; without a GPU it takes longer than that.
    Object.assign(niivue.volumes[0], { cal_min: low, cal_max: high });
    niivue.updateGLVolume();
  }
  draw();
}

// Moves and widens the window by shares of its width.
function changeWindow(level, width) {
  const [low, high] = view.window, middle = (low + high) / 2 + level * (high - low), half = ((high - low) / 2) * width;
  for (const one of $("windows").children) one.setAttribute("aria-pressed", "false");
  showWindow(middle - half, middle + half);
}

// Drawing

function layout() {
  const box = $("views").getBoundingClientRect(), ratio = niivue.opts.forceDevicePixelRatio || 1;
  $("drawn").width = Math.round(box.width * ratio);
  $("drawn").height = Math.round(box.height * ratio);
  const four = [[0, [0, 0, 0.5, 0.5]], [1, [0.5, 0, 0.5, 0.5]], [2, [0, 0.5, 0.5, 0.5]]];
  const tiles = view.large ? [[view.axis, [0, 0, 1, 1]]] : four;
  niivue.setCustomLayout(tiles.map(([sliceType, position]) => ({ sliceType, position })));
  $("solid-box").hidden = view.large || !view.shown3d;
  if (view.lattice) draw();
}

let waiting = false;
function draw() {
  if (waiting || !view.lattice) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const canvas = $("drawn"), context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    view.tiles = niivue.screenSlices.map((s, n) => [s, n]).filter(([s]) => s.axCorSag <= 2).map(([, n]) => tileOf(niivue, n, view.lattice));
    for (const tile of view.tiles) drawTile(context, tile);
    tellWhere();
  });
}

function drawTile(context, tile) {
  const { axis } = tile, at = Math.round(view.voxel[axis]), scale = niivue.opts.forceDevicePixelRatio || 1;
  const width = view.lattice.shape[axis === 2 ? 1 : 2];
  const inVoxels = () => context.setTransform(1 / tile.cs, 0, 0, 1 / tile.rs, -tile.c0 / tile.cs, -tile.r0 / tile.rs);
  context.save();
  context.beginPath();
  context.rect(tile.left, tile.top, tile.width, tile.height);
  context.clip();
  const picture = view.planes.picture(axis, Math.min(Math.max(at, 0), view.lattice.shape[axis] - 1), view.window);
  if (picture) {
    inVoxels();
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, -0.5, -0.5);
  }
  const paint = (values, inside, colour, line, dash = []) => {
    context.beginPath();
    inVoxels();
    const any = outline(context, values, width, inside);
    context.setTransform(1, 0, 0, 1, 0, 0);
    if (!any) return;
    context.setLineDash(dash);
    context.lineWidth = line * scale;
    context.strokeStyle = colour;
    context.stroke();
  };
  const fill = Number($("fill").value);
  for (const [layer, rules] of layers()) {
    const values = view.on[layer] && view[layer] && view[layer].plane(axis, at);
    if (!values) continue;
    if (fill > 0) paintFill(context, values, width, rules[0].inside, COLOURS[layer], fill, inVoxels);
    for (const { inside, line, dash, colour } of rules) paint(values, inside, colour || COLOURS[layer], line, dash);
  }
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.setLineDash([]);
  drawMeasures(context, tile, at, scale);
  drawCross(context, tile, at, scale);
  context.restore();
}

// Each layer with what of it is drawn and how; the first rule is also filled.
function layers() {
  const chosen = Number(view.selected) || 0, marks = view.facts.marks;
  const rejected = new Set(marks.filter((m) => m.verdict === "rejected").map((m) => Number(m.finding)));
  const visible = (v) => v !== 0 && !(v > 0 && (rejected.has(v) || !shows(String(v))));
  return [
    ["truth", [{ inside: (v) => v > 0, line: 1.5 }]],
    ["prediction", [
      { inside: visible, line: 1.5 },
      { inside: (v) => v > 0 && rejected.has(v), line: 1, dash: [3, 4] },
      { inside: (v) => v === chosen && visible(v), line: 2.5 },
    ]],
    ["decided", [{ inside: (v) => v > 0, line: 1.5, dash: [] }]],
  ];
}

function paintFill(context, values, width, inside, colour, opacity, inVoxels) {
  context.save();
  inVoxels();
  context.globalAlpha = opacity;
  context.fillStyle = colour;
  context.beginPath();
  for (let k = 0; k < values.length;) {
    if (!inside(values[k])) { k++; continue; }
    const start = k, end = (Math.floor(k / width) + 1) * width;
    while (k < end && inside(values[k])) k++;
    context.rect((start % width) - 0.5, Math.floor(start / width) - 0.5, k - start, 1);
  }
  context.fill();
  context.restore();
}

const inPlane = (voxel, axis) => voxel.filter((_, i) => i !== axis);

function drawMeasures(context, tile, at, scale) {
  const name = view.selected, f = name.startsWith("t") ? view.facts.lesions[Number(name.slice(1)) - 1] : findingOf(name);
  const mm = name && placeOf(name);
  if (!mm) return;
  const centre = view.lattice.toVoxel(mm), mark = markOf(name);
  context.strokeStyle = context.fillStyle = COLOURS.mark;
  context.lineWidth = 1.5 * scale;
  if (Math.abs(centre[tile.axis] - at) <= 1 && (!f || !f.voxels)) {
    const diameter = mark?.diameter_mm ?? f?.diameter_mm ?? 6;
    const [px, py] = toPixel(tile, inPlane(centre, tile.axis));
    const axis = tile.axis === 2 ? 1 : 2, radius = Math.abs(diameter / 2 / view.lattice.spacing[axis] / tile.cs);
    context.beginPath();
    context.arc(px, py, Math.max(radius, 5 * scale), 0, 7);
    context.stroke();
  }
  if (!f || tile.axis !== 0 || (mark && mark.moved)) return;
  let right = null; // the rightmost end, beside which the lengths are written
  for (const ends of [f.axial_ends, f.short_axis_ends]) {
    if (!ends) continue;
    const voxels = ends.map((p) => view.lattice.toVoxel(p));
    // Measured in one slice; in the others of the finding it is dashed.
    const away = Math.abs((voxels[0][0] + voxels[1][0]) / 2 - at);
    if (away > 1 + f.diameter_mm / 2 / view.lattice.spacing[0]) continue;
    context.setLineDash(away <= 0.75 ? [] : [4 * scale, 4 * scale]);
    const [first, second] = voxels.map((v) => toPixel(tile, inPlane(v, 0)));
    context.beginPath();
    context.moveTo(...first);
    context.lineTo(...second);
    context.stroke();
    for (const end of [first, second]) if (!right || end[0] > right[0]) right = end;
  }
  context.setLineDash([]);
  if (right) write(context, lengths(f), right[0] + 8 * scale, right[1] + 4 * scale, scale);
}

function lengths(f) {
  const long = f.axial_diameter_mm.toFixed(1);
  return f.short_axis_mm == null ? `${long} mm` : `${long} × ${f.short_axis_mm.toFixed(1)} mm`;
}

// Text that stays readable over bright tissue.
function write(context, text, px, py, scale) {
  context.save();
  context.font = `${12.5 * scale}px system-ui, sans-serif`;
  context.lineWidth = 3.5 * scale;
  context.lineJoin = "round";
  context.strokeStyle = "#000c";
  context.strokeText(text, px, py);
  context.fillText(text, px, py);
  context.restore();
}

function drawCross(context, tile, at, scale) {
  const { left, top, width, height, axis } = tile, [px, py] = toPixel(tile, inPlane(view.voxel, axis));
  const gap = 14 * scale, right = left + width, bottom = top + height;
  context.strokeStyle = "#4cc9f0b0";
  context.lineWidth = scale;
  context.beginPath();
  for (const [ax, ay, bx, by] of [[left, py, px - gap, py], [px + gap, py, right, py], [px, top, px, py - gap], [px, py + gap, px, bottom]]) {
    context.moveTo(ax, ay);
    context.lineTo(bx, by);
  }
  context.stroke();
  context.fillStyle = "#c5d2e0";
  context.textAlign = "center";
  const [above, below, before, behind] = EDGES[axis];
  write(context, above, left + width / 2, top + 15 * scale, scale);
  write(context, below, left + width / 2, bottom - 8 * scale, scale);
  write(context, before, left + 9 * scale, top + height / 2, scale);
  write(context, behind, right - 9 * scale, top + height / 2, scale);
  context.textAlign = "left";
  write(context, `${AXES[axis]} ${at + 1} / ${view.lattice.shape[axis]}`, left + 8 * scale, top + 17 * scale, scale);
  const active = axis === view.axis;
  context.strokeStyle = active ? "#4cc9f0" : "#2a3542";
  context.lineWidth = (active ? 2 : 1) * scale;
  context.strokeRect(left + 1, top + 1, width - 2, height - 2);
  if (view.brush && active) {
    context.strokeStyle = view.brush === "erase" ? "#ffffff" : COLOURS.decided;
    context.beginPath();
    const steps = inPlane(view.lattice.spacing, axis), radius = Number($("brush-size").value) / 2;
    context.ellipse(px, py, Math.abs(radius / steps[1] / tile.cs), Math.abs(radius / steps[0] / tile.rs), 0, 0, 7);
    context.stroke();
  }
}

function tellWhere() {
  const mm = view.lattice.toMm(view.voxel), value = view.planes.value(view.voxel.map(Math.round));
  view.mm = mm;
  const words = mm.map((v, i) => `${"xyz"[i]} ${v.toFixed(1)}`).join("  ");
  const unit = view.facts.lattice.ct ? " HU" : "", [low, high] = view.window.map(Math.round);
  $("where").textContent = `${words} mm (LPS)${value == null ? "" : `   ${Math.round(value)}${unit}`}`;
  $("window").textContent = `${low} to ${high}${unit}`;
}

// 3-D

function ball([x, y, z], radius, into) {
  // A sphere as 16 x 10 facets, RAS mm.
  const first = into.points.length / 3, wide = 16, high = 10;
  for (let i = 0; i <= high; i++)
    for (let j = 0; j < wide; j++) {
      const a = (Math.PI * i) / high, b = (2 * Math.PI * j) / wide;
      into.points.push(-x + radius * Math.sin(a) * Math.cos(b), -y + radius * Math.sin(a) * Math.sin(b), z + radius * Math.cos(a));
    }
  for (let i = 0; i < high; i++)
    for (let j = 0; j < wide; j++) {
      const p = first + i * wide + j, q = first + i * wide + ((j + 1) % wide);
      into.triangles.push(p, p + wide, q, q, p + wide, q + wide);
    }
}

function draw3d() {
  if (!solid.volumes.length || $("solid-box").hidden) return;
  for (const old of solid.meshes) old.unloadMesh(solid.gl);
  solid.meshes = []; // addMesh and removeMesh would make the volume's textures again
  const groups = { prediction: [255, 159, 28, 255], truth: [77, 217, 100, 255], decided: [255, 95, 210, 255], mark: [76, 201, 240, 255] };
  for (const [group, colour] of Object.entries(groups)) {
    const into = { points: [], triangles: [] };
    for (const name of names()) {
      const mark = markOf(name), truth = name.startsWith("t");
      const kind = name === view.selected ? "mark" : truth ? "truth" : name.startsWith("a") ? "decided" : "prediction";
      if (kind !== group || (mark && mark.verdict === "rejected") || (!truth && !shows(name)) || (truth && !view.on.truth)) continue;
      const f = truth ? view.facts.lesions[Number(name.slice(1)) - 1] : findingOf(name);
      ball(placeOf(name), Math.max(2, (f ? f.diameter_mm : mark.diameter_mm) / 2), into);
    }
    if (group === "mark") ball(view.lattice.toMm(view.voxel), 2, into);
    if (!into.points.length) continue;
    const mesh = new globalThis.niivue.NVMesh(new Float32Array(into.points), new Uint32Array(into.triangles), group, colour, 1, true, solid.gl);
    solid.meshes.push(mesh);
  }
  solid.scene.crosshairPos = view.lattice.toShare(view.voxel);
  solid.drawScene();
}

// Judging: one thing after the other, so that the journal has them in the order they were done

function act(line) {
  const number = view.number, reloads = !["brush", "finish"].includes(line.action);
  view.reloading += reloads;
  view.queue = view.queue.then(async () => {
    try {
      const state = await ask(`/api/case/${number}/act`, line);
      view.cases[number].state = state.finished ? "finished" : "begun";
      listCases();
      if (number !== view.number) return;
      Object.assign(view.facts, state);
      if (line.action === "add") view.selected = state.marks[state.marks.length - 1].finding;
      if (!names().includes(view.selected)) view.selected = names()[0] || "";
      list();
      if (reloads) await loadMask("decided");
      draw();
      draw3d();
      say(line.action === "finish" && state.finished ? "Finished: N leads to the next case" : "Saved");
    } catch (error) {
      say(error.message, true);
      if (line.action === "brush" && number === view.number) await loadMask("decided").catch(() => {});
    }
    view.reloading -= reloads;
  });
  return view.queue;
}

const ACTS = {
  accept: () => judge("accept"),
  reject: () => judge("reject"),
  move: () => judge("move"),
  undo: () => act({ action: "undo" }),
  add: () => act({ action: "add", mm: view.lattice.toMm(view.voxel), diameter_mm: Number($("diameter").value), label: label() }),
  finish: () => act({ action: "finish", value: !view.facts.finished }),
  brush: () => setBrush(view.brush === "paint" ? "" : "paint"),
  erase: () => setBrush(view.brush === "erase" ? "" : "erase"),
};
const label = () => Number($("class").value) || 0;

function judge(action) {
  if (!markOf(view.selected)) return say("Select a finding first", true);
  const line = { action, finding: view.selected };
  if (action === "move") line.mm = view.lattice.toMm(view.voxel);
  const done = act(line);
  if (action !== "move") done.then(() => nextOpen());
}

function nextOpen() {
  const open = view.facts.marks.filter((m) => m.verdict === "open" && shows(m.finding));
  if (open.length && !$("said").classList.contains("error")) select(open[0].finding);
}

// The brush

function setBrush(kind) {
  const mark = markOf(view.selected);
  view.brush = kind;
  $("brush").setAttribute("aria-pressed", kind === "paint");
  $("erase").setAttribute("aria-pressed", kind === "erase");
  $("drawn").classList.toggle("painting", Boolean(kind));
  if (kind && mark && mark.verdict === "open" && findingOf(view.selected)) act({ action: "accept", finding: view.selected });
  if (kind) say(kind === "paint" ? "Painting: drag, or Space at the crosshair" : "Erasing: drag, or Space at the crosshair");
  draw();
}

// Paints a disc around a place [row, column] of a slice.
function dab(axis, at, [row, column]) {
  const steps = inPlane(view.lattice.spacing, axis), radius = Number($("brush-size").value) / 2;
  const reach = steps.map((s) => Math.ceil(radius / s)), sizes = inPlane(view.lattice.shape, axis);
  const bits = view.facts.regions, bit = bits ? 1 << label() : label() + 1;
  const value = view.brush === "erase" ? (bits ? ~bit : -bit) : bit;
  const r0 = Math.round(row), c0 = Math.round(column);
  for (let r = Math.max(0, r0 - reach[0]); r <= Math.min(sizes[0] - 1, r0 + reach[0]); r++)
    for (let c = Math.max(0, c0 - reach[1]); c <= Math.min(sizes[1] - 1, c0 + reach[1]); c++)
      if (Math.hypot((r - r0) * steps[0], (c - c0) * steps[1]) <= radius) {
        const voxel = [r, c];
        voxel.splice(axis, 0, at);
        view.decided.set(voxel, value, bits);
      }
}

function strokeTo(tile, px, py) {
  const here = toPlane(tile, px, py), from = view.stroke.last || here;
  const far = Math.max(Math.abs(here[0] - from[0]), Math.abs(here[1] - from[1]));
  for (let k = 0; k <= far; k++) {
    const share = far < 1 ? 1 : k / far;
    dab(tile.axis, Math.round(view.voxel[tile.axis]), here.map((v, i) => from[i] + share * (v - from[i])));
  }
  view.stroke.last = here;
  draw();
}

function keepStroke() {
  const slices = view.decided.takeChanged();
  if (Object.keys(slices).length) act({ action: "brush", slices });
}

function pixelOf(event) {
  const box = $("drawn").getBoundingClientRect(), scale = $("drawn").width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

const tileAt = ([px, py]) => view.tiles.find((t) => px >= t.left && px < t.left + t.width && py >= t.top && py < t.top + t.height);

function buildPointer() {
  const canvas = $("drawn");
  canvas.addEventListener("pointerdown", (event) => {
    const tile = tileAt(pixelOf(event));
    if (!tile || !view.brush || !view.decided) return;
    if (view.reloading) return say("One moment: the mask is on its way", true);
    canvas.setPointerCapture(event.pointerId);
    view.axis = tile.axis;
    view.stroke = { tile, last: null };
    strokeTo(tile, ...pixelOf(event));
  });
  canvas.addEventListener("pointermove", (event) => view.stroke && strokeTo(view.stroke.tile, ...pixelOf(event)));
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => {
      if (!view.stroke) return;
      view.stroke = null;
      keepStroke();
    });
  $("views").addEventListener("pointerdown", (event) => {
    const tile = view.tiles && tileAt(pixelOf(event));
    if (tile) view.axis = tile.axis;
  }, true);
  $("views").addEventListener("dblclick", (event) => {
    const tile = view.tiles && tileAt(pixelOf(event));
    if (!tile || view.brush) return;
    Object.assign(view, { axis: tile.axis, large: !view.large });
    layout();
  }, true);
  $("views").addEventListener("wheel", (event) => {
    const tile = view.tiles && tileAt(pixelOf(event));
    if (!tile || event.target.id === "solid") return;
    event.preventDefault();
    event.stopPropagation();
    if (event.ctrlKey) zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
    else nudge(tile.axis, Math.sign(event.deltaY) * (tile.axis === 0 ? -1 : 1));
  }, { capture: true, passive: false });
}

function zoom(by) {
  const pan = niivue.scene.pan2Dxyzmm, now = by ? Math.min(20, Math.max(1, pan[3] * by)) : 1;
  // The crosshair stays where it is on the screen.
  const mm = niivue.frac2mm(niivue.scene.crosshairPos), middle = niivue.frac2mm([0.5, 0.5, 0.5]);
  for (let i = 0; i < 3; i++) pan[i] = by && now > 1 ? middle[i] - mm[i] : 0;
  pan[3] = now;
  niivue.drawScene();
  draw();
}

// Keys

const pan = (row, column) => (big) => {
  const [a, b] = [0, 1, 2].filter((i) => i !== view.axis), size = big ? 10 : 1;
  view.voxel[a] += row * size * (view.axis === 0 ? 1 : -1);
  view.voxel[b] += column * size;
  place();
};
const KEYS = [
  ["Cases and findings"],
  ["N", "next case", () => open(view.number + 1)],
  ["P", "previous case", () => open(view.number - 1)],
  ["J", "next finding", () => step(1)],
  ["K", "previous finding", () => step(-1)],
  [".", "higher threshold", () => setThreshold(view.threshold + 0.05)],
  [",", "lower threshold", () => setThreshold(view.threshold - 0.05)],
  ["Moving"],
  ["ArrowUp", "crosshair up (Shift: 10)", pan(-1, 0)],
  ["ArrowDown", "crosshair down", pan(1, 0)],
  ["ArrowLeft", "crosshair left", pan(0, -1)],
  ["ArrowRight", "crosshair right", pan(0, 1)],
  ["PageUp", "next slice (Shift: 10)", (big) => nudge(view.axis, big ? 10 : 1)],
  ["PageDown", "previous slice", (big) => nudge(view.axis, big ? -10 : -1)],
  ["X", "other plane", () => { view.axis = (view.axis + 1) % 3; layout(); }],
  ["Z", "this plane alone, or all", () => { view.large = !view.large; layout(); }],
  ["+", "zoom in", () => zoom(1.25)],
  ["-", "zoom out", () => zoom(1 / 1.25)],
  ["0", "whole picture", () => zoom(0)],
  ["Showing"],
  ["1", "lung window", () => setWindow(0)],
  ["2", "mediastinum window", () => setWindow(1)],
  ["3", "bone window", () => setWindow(2)],
  ["W", "wider window (Shift: narrower)", (back) => changeWindow(0, back ? 1 / 1.15 : 1.15)],
  ["L", "higher level (Shift: lower)", (back) => changeWindow(back ? -0.05 : 0.05, 1)],
  ...LAYERS.map(([layer, name, key]) => [key, `${name.toLowerCase()} on or off`, () => toggle(layer)]),
  ["V", "3-D on or off", () => { view.shown3d = !view.shown3d; layout(); draw3d(); }],
  ["Judging"],
  ["A", "accept", ACTS.accept],
  ["R", "reject", ACTS.reject],
  ["M", "move the finding to the crosshair", ACTS.move],
  ["D", "add a nodule at the crosshair", ACTS.add],
  ["Ctrl+Z", "undo", ACTS.undo],
  ["F", "finish the case, or reopen it", ACTS.finish],
  ["Mask"],
  ["B", "brush on or off", ACTS.brush],
  ["E", "eraser on or off", ACTS.erase],
  ["]", "larger brush", () => brushBy(1)],
  ["[", "smaller brush", () => brushBy(-1)],
  ["Space", "paint or erase at the crosshair", stamp],
  ["Escape", "put the brush away", () => setBrush("")],
  ["H", "these keys", () => $("help").showModal()],
];

function brushBy(by) {
  $("brush-size").value = Math.min(60, Math.max(1, Number($("brush-size").value) + by));
  draw();
}

function stamp() {
  if (!view.brush || !view.decided) return;
  // What is pending first: an accepted finding's mask arrives with it.
  view.queue.then(() => {
    dab(view.axis, Math.round(view.voxel[view.axis]), inPlane(view.voxel, view.axis));
    keepStroke();
    draw();
  });
}

function toggle(layer) {
  view.on[layer] = !view.on[layer];
  document.querySelector(`[data-layer="${layer}"]`).setAttribute("aria-pressed", view.on[layer]);
  draw();
  draw3d();
}

const nameOf = (event) => {
  const key = event.key === " " ? "Space" : event.key === "=" ? "+" : event.key;
  return (event.ctrlKey || event.metaKey ? "Ctrl+" : "") + (key.length === 1 ? key.toUpperCase() : key);
};

function onKey(event) {
  const field = event.target.closest("input, select");
  if (!view.facts || view.stroke || $("help").open || (field && !(field.type === "range" && !event.key.startsWith("Arrow"))) || event.altKey) return;
  if ([" ", "Enter"].includes(event.key) && event.target.closest("button:not([data-act])")) return;
  const found = KEYS.find(([key]) => key === nameOf(event));
  if (!found || !found[2]) return;
  event.preventDefault();
  event.stopPropagation();
  found[2](event.shiftKey);
}

// Controls

function element(kind, style = "", text = "") {
  const out = document.createElement(kind);
  if (style) out.className = style;
  if (text) out.textContent = text;
  return out;
}

function button(text, key, pressed) {
  const out = element("button", "", text);
  out.append(element("kbd", "", key));
  out.addEventListener("click", pressed);
  return out;
}

function buildControls() {
  for (const [layer, name, key] of LAYERS) {
    const out = button("", key, () => toggle(layer));
    out.prepend(element("i", layer), name);
    out.dataset.layer = layer;
    out.setAttribute("aria-pressed", "true");
    $("layers").append(out);
  }
  for (const [key, text] of KEYS) {
    const line = element(text ? "div" : "h3", "", text || key);
    if (text) line.append(element("kbd", "", key));
    $("keys").append(line);
  }
  for (const one of document.querySelectorAll("[data-act]")) one.addEventListener("click", () => ACTS[one.dataset.act]());
  for (const [text, key] of [["▲", "PageUp"], ["▼", "PageDown"], ["+", "+"], ["−", "-"], ["⤢", "Z"]]) {
    const [, what, act] = KEYS.find(([name]) => name === key), out = element("button", "", text);
    out.title = `${what} (${key})`;
    out.setAttribute("aria-label", what);
    out.addEventListener("click", () => act(false));
    $("picture").append(out);
  }
  $("previous").addEventListener("click", () => open(view.number - 1));
  $("next").addEventListener("click", () => open(view.number + 1));
  $("case").addEventListener("change", () => open(Number($("case").value)));
  $("threshold").addEventListener("input", () => setThreshold(Number($("threshold").value)));
  $("fill").addEventListener("input", draw);
  $("brush-size").addEventListener("input", draw);
  $("help-button").addEventListener("click", () => $("help").showModal());
  addEventListener("keydown", onKey, true);
  buildPointer();
}

start().catch((error) => say(error.message, true));
