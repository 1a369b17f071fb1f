"use strict";
// The page: its start, the cases and the controls. Everything has a key (keys.js).

const $ = (id) => document.getElementById(id);
const CT_WINDOWS = [
  ["Lung", -1350, 150],
  ["Mediastinum", -160, 240],
  ["Bone", -450, 1050],
]; // HU
const CHEST = [-1000, 700]; // HU of the colours in 3-D
const LAYERS = [
  ["truth", "Truth", "T"],
  ["prediction", "Prediction", "Y"],
  ["decided", "My mask", "U"],
];
const COLOURS = { truth: "#4dd964", prediction: "#ff9f1c", decided: "#ff5fd2", mark: "#4cc9f0" };
const SOFTWARE_WAIT = 250; // ms after the last change until 3-D is drawn again
const LARGEST_PICTURE = 1.5; // device pixels a CSS pixel at most: a slice has no more to show

const view = {
  cases: [],
  facts: null,
  lattice: null,
  planes: null,
  truth: null,
  prediction: null,
  probability: null,
  decided: null,
  voxel: [0, 0, 0],
  selected: "",
  threshold: 0,
  window: [0, 1],
  axis: 0,
  large: false,
  shown3d: true,
  on: { truth: true, prediction: true, decided: true },
  brush: "",
  stroke: null,
  reloading: 0,
  reading: true, // another case: until it is there nothing is decided
  number: -1,
  opened: 0,
  queue: Promise.resolve(),
};
window.voxelscale = view; // for tests and the curious

const SOFTWARE = isSoftware();

function isSoftware() {
  const gl = document.createElement("canvas").getContext("webgl2"),
    facts = gl && gl.getExtension("WEBGL_debug_renderer_info");
  return !facts || /swiftshader|llvmpipe|software/i.test(gl.getParameter(facts.UNMASKED_RENDERER_WEBGL));
}

const niivue = new globalThis.niivue.Niivue({
  isRadiologicalConvention: true,
  sagittalNoseLeft: true,
  multiplanarShowRender: 0,
  isAntiAlias: false,
  viewModeHotKey: "",
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  dragMode: globalThis.niivue.DRAG_MODE.pan,
  dragAndDropEnabled: false,
  isOrientationTextVisible: false,
  crosshairWidth: 0,
  backColor: [0, 0, 0, 1],
  logLevel: "error",
  loadingText: "",
  forceDevicePixelRatio: Math.min(devicePixelRatio, LARGEST_PICTURE),
});
const solid = new globalThis.niivue.Niivue({
  viewModeHotKey: "",
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  sliceType: 4,
  isAntiAlias: false,
  dragAndDropEnabled: false,
  show3Dcrosshair: false,
  crosshairWidth: 1,
  backColor: [0, 0, 0, 1],
  logLevel: "error",
  loadingText: "",
  forceDevicePixelRatio: SOFTWARE ? 0.5 : 1,
  meshXRay: 0.5,
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
  solid.addColormap("chest", {
    min,
    max,
    R: [0, 40, 120, 90, 200, 255],
    G: [0, 90, 150, 60, 185, 250],
    B: [0, 130, 170, 60, 150, 235],
    A: [0, 0, 16, 0, 0, 120],
    I: [0, 52, 82, 112, 175, 255],
  });
  const drawScene = niivue.drawScene.bind(niivue);
  niivue.drawScene = () => {
    drawScene();
    draw();
  };
  niivue.onLocationChange = () => {
    view.voxel = view.lattice.within(view.lattice.ofShare(niivue.scene.crosshairPos));
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
  const options = line
    ? { method: "POST", body: JSON.stringify(line), headers: { "content-type": "application/json" } }
    : {};
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

function isReading() {
  const failed = document.body.classList.contains("failed");
  if (view.reading && !failed) say("One moment: the case is being read", true);
  return view.reading;
}

// Cases

function listCases() {
  const signs = { finished: "✓ ", begun: "… ", "": "" };
  $("case").replaceChildren(...view.cases.map((c, n) => new Option(`${signs[c.state]}${c.name}`, n)));
  $("case").value = view.number;
}

async function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)),
    name = asked.get("case"),
    number = view.cases.findIndex((c) => c.name === name);
  if (number < 0 || number !== view.number) await open(Math.max(0, number), asked.get("finding") || "1");
  else select(asked.get("finding") || "1");
  if (name && number < 0) say(`There is no case ${name}: this is the first one`, true);
}

async function open(number, finding = "1") {
  if (number < 0 || number >= view.cases.length) return;
  const turn = ++view.opened;
  Object.assign(view, { reading: true, ready: false });
  await view.queue;
  if (turn !== view.opened) return;
  view.number = number;
  $("loading").hidden = false;
  $("case").value = number;
  say("");
  const began = performance.now(),
    base = `/api/case/${number}`;
  const [facts, overview] = await Promise.all([ask(base), ask(`${base}/overview.nii`)]).catch((error) => [
    error,
    null,
  ]);
  if (turn !== view.opened) return;
  document.body.classList.toggle("failed", !overview);
  if (!overview) {
    $("loading").hidden = true;
    return say(facts.message, true);
  }
  view.times = { asked: performance.now() - began };
  Object.assign(view, {
    facts,
    lattice: new Lattice(facts.lattice),
    truth: null,
    prediction: null,
    probability: null,
    decided: null,
    selected: "",
    brush: "",
  });
  view.planes = new Planes(number, view.lattice, draw, (error) =>
    say(`A slice was not read: ${error.message}`, true),
  );
  view.windows = facts.lattice.ct ? CT_WINDOWS : [["Window", ...facts.lattice.range]];
  showFacts();
  await showVolumes(overview);
  if (turn !== view.opened) return;
  view.times.shown = performance.now() - began;
  view.reading = false;
  $("loading").hidden = true;
  select(finding);
  await Promise.all(["prediction", "truth", "decided", "probability"].map(loadMask));
  if (turn !== view.opened) return;
  view.times.masks = performance.now() - began;
  view.ready = true;
  draw();
  if (view.shown3d) setTimeout(() => turn === view.opened && showSolid(overview), SOFTWARE_WAIT);
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
  const { facts } = view;
  if (what === "truth" && !facts.has_truth) return;
  if (what === "probability" && !facts.has_probability) return;
  const runs = new Int32Array(await ask(`/api/case/${facts.number}/${what}`));
  if (facts !== view.facts) return;
  const kind = what === "decided" ? PaintedMask : RunMask;
  view[what] = new kind(runs, view.lattice.shape);
  draw();
}

function showFacts() {
  const { facts } = view;
  document.title = `${facts.name} – Voxelscale viewer`;
  $("patient").textContent = facts.patient;
  $("notes").replaceChildren(...facts.warnings.map((text) => element("div", "", text)));
  const least = facts.threshold ?? 0.5,
    highest = Math.max(0, ...facts.findings.map((f) => f.probability));
  view.threshold = facts.findings.length ? Math.min(least, 0.01 * Math.floor(100 * highest)) : least;
  $("threshold").value = view.threshold;
  $("class").hidden = facts.classes.length < 2;
  $("class").replaceChildren(...facts.classes.map((name, n) => new Option(name, n)));
  $("windows").replaceChildren(
    ...view.windows.map(([name], n) => button(name, String(n + 1), () => setWindow(n))),
  );
  document.querySelector('[data-layer="truth"]').hidden = !facts.has_truth;
  list();
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
  for (const one of document.querySelectorAll("[data-act]"))
    one.addEventListener("click", () => !isReading() && ACTS[one.dataset.act]());
  for (const [text, key] of [
    ["▲", "PageUp"],
    ["▼", "PageDown"],
    ["+", "+"],
    ["−", "-"],
    ["⤢", "Z"],
  ]) {
    const [, what, act] = KEYS.find(([name]) => name === key),
      out = element("button", "", text);
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

// Once the other scripts are there, too.
addEventListener("DOMContentLoaded", () => start().catch((error) => say(error.message, true)));
