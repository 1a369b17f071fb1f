"use strict";
// The brush, and what mouse and pen do in the planes.

function setBrush(kind) {
  const mark = markOf(view.selected);
  view.brush = kind;
  $("brush").setAttribute("aria-pressed", kind === "paint");
  $("erase").setAttribute("aria-pressed", kind === "erase");
  $("drawn").classList.toggle("painting", Boolean(kind));
  if (kind && mark && mark.verdict === "open" && findingOf(view.selected))
    act({ action: "accept", finding: view.selected });
  if (kind)
    say(
      kind === "paint"
        ? "Painting: drag, or Space at the crosshair"
        : "Erasing: drag, or Space at the crosshair",
    );
  draw();
}

// Paints a disc around a place [row, column] of a slice.
function dab(axis, at, [row, column]) {
  const steps = inPlane(view.lattice.spacing, axis),
    radius = Number($("brush-size").value) / 2;
  const reach = steps.map((s) => Math.ceil(radius / s)),
    sizes = inPlane(view.lattice.shape, axis);
  const bits = view.facts.regions,
    bit = bits ? 1 << label() : label() + 1;
  const value = view.brush === "erase" ? (bits ? ~bit : -bit) : bit;
  const r0 = Math.round(row),
    c0 = Math.round(column);
  for (let r = Math.max(0, r0 - reach[0]); r <= Math.min(sizes[0] - 1, r0 + reach[0]); r++)
    for (let c = Math.max(0, c0 - reach[1]); c <= Math.min(sizes[1] - 1, c0 + reach[1]); c++)
      if (Math.hypot((r - r0) * steps[0], (c - c0) * steps[1]) <= radius) {
        const voxel = [r, c];
        voxel.splice(axis, 0, at);
        view.decided.set(voxel, value, bits);
      }
}

function strokeTo(tile, px, py) {
  const here = toPlane(tile, px, py),
    from = view.stroke.last || here;
  const far = Math.max(Math.abs(here[0] - from[0]), Math.abs(here[1] - from[1]));
  for (let k = 0; k <= far; k++) {
    const share = far < 1 ? 1 : k / far;
    dab(
      tile.axis,
      Math.round(view.voxel[tile.axis]),
      here.map((v, i) => from[i] + share * (v - from[i])),
    );
  }
  view.stroke.last = here;
  draw();
}

function keepStroke() {
  const slices = view.decided.takeChanged();
  if (Object.keys(slices).length) act({ action: "brush", slices });
}

function pixelOf(event) {
  const box = $("drawn").getBoundingClientRect(),
    scale = $("drawn").width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

const tileAt = ([px, py]) =>
  view.tiles.find((t) => px >= t.left && px < t.left + t.width && py >= t.top && py < t.top + t.height);

function buildPointer() {
  const canvas = $("drawn");
  canvas.addEventListener("pointerdown", (event) => {
    const tile = tileAt(pixelOf(event));
    if (!tile || !view.brush || !view.decided || event.button !== 0 || isReading()) return;
    if (view.reloading) return say("One moment: the mask is on its way", true);
    canvas.setPointerCapture(event.pointerId);
    view.axis = tile.axis;
    view.stroke = { tile, last: null };
    strokeTo(tile, ...pixelOf(event));
  });
  canvas.addEventListener(
    "pointermove",
    (event) => {
      if (!view.stroke) return;
      // Where the plane lies now: the window may have changed since the stroke began.
      const tile = view.tiles.find((t) => t.axis === view.stroke.tile.axis) || view.stroke.tile;
      strokeTo(tile, ...pixelOf(event));
    },
  );
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => {
      if (!view.stroke) return;
      view.stroke = null;
      keepStroke();
    });
  $("views").addEventListener(
    "pointerdown",
    (event) => {
      const tile = view.tiles && tileAt(pixelOf(event));
      if (tile) view.axis = tile.axis;
    },
    true,
  );
  $("views").addEventListener(
    "dblclick",
    (event) => {
      const tile = view.tiles && tileAt(pixelOf(event));
      if (!tile || view.brush) return;
      Object.assign(view, { axis: tile.axis, large: !view.large });
      layout();
    },
    true,
  );
  $("views").addEventListener(
    "wheel",
    (event) => {
      const tile = view.tiles && tileAt(pixelOf(event));
      if (!tile || event.target.id === "solid") return;
      event.preventDefault();
      event.stopPropagation();
      if (event.ctrlKey) zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
      else nudge(tile.axis, Math.sign(event.deltaY) * (tile.axis === 0 ? -1 : 1));
    },
    { capture: true, passive: false },
  );
}

function zoom(by) {
  const pan = niivue.scene.pan2Dxyzmm,
    now = by ? Math.min(20, Math.max(1, pan[3] * by)) : 1;
  // The crosshair stays where it is on the screen.
  const mm = niivue.frac2mm(niivue.scene.crosshairPos),
    middle = niivue.frac2mm([0.5, 0.5, 0.5]);
  for (let i = 0; i < 3; i++) pan[i] = by && now > 1 ? middle[i] - mm[i] : 0;
  pan[3] = now;
  niivue.drawScene();
  draw();
}
