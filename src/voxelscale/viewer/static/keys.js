"use strict";
// Every key and what it does.

const pan = (row, column) => (big) => {
  const [a, b] = [0, 1, 2].filter((i) => i !== view.axis),
    size = big ? 10 : 1;
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
  [
    "X",
    "other plane",
    () => {
      view.axis = (view.axis + 1) % 3;
      layout();
    },
  ],
  [
    "Z",
    "this plane alone, or all",
    () => {
      view.large = !view.large;
      layout();
    },
  ],
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
  [
    "V",
    "3-D on or off",
    () => {
      view.shown3d = !view.shown3d;
      layout();
      draw3d();
    },
  ],
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
  const ctrl = (event.ctrlKey && !event.altKey) || event.metaKey ? "Ctrl+" : "";
  return ctrl + (key.length === 1 ? key.toUpperCase() : key);
};

function onKey(event) {
  const field = event.target.closest("input, select");
  if (
    view.stroke ||
    $("help").open ||
    (field && !(field.type === "range" && !event.key.startsWith("Arrow"))) ||
    (event.altKey && !"[]".includes(event.key)) // which many keyboards have on AltGr or Option
  )
    return;
  if ([" ", "Enter"].includes(event.key) && event.target.closest("button:not([data-act])")) return;
  const found = KEYS.find(([key]) => key === nameOf(event));
  if (!found || !found[2]) return;
  event.preventDefault();
  event.stopPropagation();
  const [key, , act] = found;
  // A key that is held down decides once, and Ctrl+Shift+Z, which redoes elsewhere, undoes nothing.
  if (Object.values(ACTS).includes(act) && (event.repeat || (event.ctrlKey && event.shiftKey))) return;
  if (["N", "P", "H"].includes(key) || !isReading()) act(event.shiftKey);
}
