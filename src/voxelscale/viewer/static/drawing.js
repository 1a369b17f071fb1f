"use strict";
// Where the crosshair is, what is drawn over NiiVue's planes, and 3-D.

// Where the crosshair is

function place() {
  view.voxel = view.lattice.within(view.voxel);
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
  const [low, high] = view.window,
    middle = (low + high) / 2 + level * (high - low),
    half = ((high - low) / 2) * width;
  for (const one of $("windows").children) one.setAttribute("aria-pressed", "false");
  showWindow(middle - half, middle + half);
}

// Drawing

function layout() {
  const box = $("views").getBoundingClientRect(),
    ratio = niivue.opts.forceDevicePixelRatio || 1;
  $("drawn").width = Math.round(box.width * ratio);
  $("drawn").height = Math.round(box.height * ratio);
  const four = [
    [0, [0, 0, 0.5, 0.5]],
    [1, [0.5, 0, 0.5, 0.5]],
    [2, [0, 0.5, 0.5, 0.5]],
  ];
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
    const canvas = $("drawn"),
      context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    view.tiles = niivue.screenSlices
      .map((s, n) => [s, n])
      .filter(([s]) => s.axCorSag <= 2)
      .map(([, n]) => tileOf(niivue, n, view.lattice));
    for (const tile of view.tiles) drawTile(context, tile);
    tellWhere();
  });
}

function drawTile(context, tile) {
  const { axis } = tile,
    at = Math.round(view.voxel[axis]),
    scale = niivue.opts.forceDevicePixelRatio || 1;
  const width = view.lattice.shape[axis === 2 ? 1 : 2];
  const inVoxels = () =>
    context.setTransform(1 / tile.cs, 0, 0, 1 / tile.rs, -tile.c0 / tile.cs, -tile.r0 / tile.rs);
  context.save();
  context.beginPath();
  context.rect(tile.left, tile.top, tile.width, tile.height);
  context.clip();
  const picture = view.planes.picture(axis, at, view.window);
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
  for (const [layer, rules, source = layer] of layers()) {
    const values = view.on[layer] && view[source] && view[source].plane(axis, at);
    if (!values) continue;
    if (fill > 0) paintFill(context, values, width, rules[0].inside, COLOURS[layer], fill, inVoxels);
    for (const { inside, line, dash, colour } of rules)
      paint(values, inside, colour || COLOURS[layer], line, dash);
  }
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.setLineDash([]);
  drawMeasures(context, tile, at, scale);
  drawCross(context, tile, at, scale);
  context.restore();
}

// Each layer with what of it is drawn and how, and whose voxels these are; the first rule is also filled.
// Where the voxels' probabilities are known, the prediction is what reaches the threshold.
function layers() {
  const chosen = Number(view.selected) || 0,
    marks = view.facts.marks;
  const rejected = new Set(marks.filter((m) => m.verdict === "rejected").map((m) => Number(m.finding)));
  const visible = (v) => v !== 0 && !(v > 0 && (rejected.has(v) || !shows(String(v))));
  const sure = { inside: (v) => v > 0 && v >= 255 * view.threshold, line: 1.5 };
  const all = { inside: visible, line: 1.5 },
    none = { inside: () => false, line: 1 };
  return [
    ["truth", [{ inside: (v) => v > 0, line: 1.5 }]],
    ...(view.probability ? [["prediction", [sure], "probability"]] : []),
    [
      "prediction",
      [
        view.probability ? none : all,
        { inside: (v) => v > 0 && rejected.has(v), line: 1, dash: [3, 4] },
        { inside: (v) => v === chosen && visible(v), line: 2.5 },
      ],
    ],
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
    if (!inside(values[k])) {
      k++;
      continue;
    }
    const start = k,
      end = (Math.floor(k / width) + 1) * width;
    while (k < end && inside(values[k])) k++;
    context.rect((start % width) - 0.5, Math.floor(start / width) - 0.5, k - start, 1);
  }
  context.fill();
  context.restore();
}

const inPlane = (voxel, axis) => voxel.filter((_, i) => i !== axis);

function drawMeasures(context, tile, at, scale) {
  const name = view.selected,
    f = lesionOf(name) || findingOf(name);
  const mm = name && placeOf(name);
  if (!mm) return;
  const centre = view.lattice.toVoxel(mm),
    mark = markOf(name);
  context.strokeStyle = context.fillStyle = COLOURS.mark;
  context.lineWidth = 1.5 * scale;
  if (Math.abs(centre[tile.axis] - at) <= 1 && (!f || !f.voxels)) {
    const diameter = mark?.diameter_mm ?? f?.diameter_mm ?? 6;
    const [px, py] = toPixel(tile, inPlane(centre, tile.axis));
    const axis = tile.axis === 2 ? 1 : 2,
      radius = Math.abs(diameter / 2 / view.lattice.spacing[axis] / tile.cs);
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
  const { left, top, width, height, axis } = tile,
    [px, py] = toPixel(tile, inPlane(view.voxel, axis));
  const gap = 14 * scale,
    right = left + width,
    bottom = top + height;
  context.strokeStyle = "#4cc9f0b0";
  context.lineWidth = scale;
  context.beginPath();
  for (const [ax, ay, bx, by] of [
    [left, py, px - gap, py],
    [px + gap, py, right, py],
    [px, top, px, py - gap],
    [px, py + gap, px, bottom],
  ]) {
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
  write(
    context,
    `${AXES[axis]} ${at + 1} / ${view.lattice.shape[axis]}`,
    left + 8 * scale,
    top + 17 * scale,
    scale,
  );
  const active = axis === view.axis;
  context.strokeStyle = active ? "#4cc9f0" : "#2a3542";
  context.lineWidth = (active ? 2 : 1) * scale;
  context.strokeRect(left + 1, top + 1, width - 2, height - 2);
  if (view.brush && active) {
    context.strokeStyle = view.brush === "erase" ? "#ffffff" : COLOURS.decided;
    context.beginPath();
    const steps = inPlane(view.lattice.spacing, axis),
      radius = Number($("brush-size").value) / 2;
    context.ellipse(
      px,
      py,
      Math.abs(radius / steps[1] / tile.cs),
      Math.abs(radius / steps[0] / tile.rs),
      0,
      0,
      7,
    );
    context.stroke();
  }
}

function tellWhere() {
  const mm = view.lattice.toMm(view.voxel),
    value = view.planes.value(view.voxel.map(Math.round));
  const words = mm.map((v, i) => `${"xyz"[i]} ${v.toFixed(1)}`).join("  ");
  const unit = view.facts.lattice.ct ? " HU" : "",
    [low, high] = view.window.map(Math.round);
  $("where").textContent = `${words} mm (LPS)${value == null ? "" : `   ${Math.round(value)}${unit}`}`;
  $("window").textContent = `${low} to ${high}${unit}`;
}

// 3-D

// Of findings, of lesions and of added ones: without a GPU 3000 balls take 20 s, at every move of the crosshair.
const MOST_BALLS = 200;

function ball(mm, radius, into) {
  // A sphere as 16 x 10 facets, RAS mm where NiiVue has that place: it shows very oblique scans as if upright.
  const [x, y, z] = solid.frac2mm(view.lattice.toShare(view.lattice.toVoxel(mm)), 0, true);
  const first = into.points.length / 3,
    wide = 16,
    high = 10;
  for (let i = 0; i <= high; i++)
    for (let j = 0; j < wide; j++) {
      const a = (Math.PI * i) / high,
        b = (2 * Math.PI * j) / wide;
      into.points.push(
        x + radius * Math.sin(a) * Math.cos(b),
        y + radius * Math.sin(a) * Math.sin(b),
        z + radius * Math.cos(a),
      );
    }
  for (let i = 0; i < high; i++)
    for (let j = 0; j < wide; j++) {
      const p = first + i * wide + j,
        q = first + i * wide + ((j + 1) % wide);
      into.triangles.push(p, p + wide, q, q, p + wide, q + wide);
    }
}

function draw3d() {
  if (!solid.volumes.length || $("solid-box").hidden) return;
  for (const old of solid.meshes) old.unloadMesh(solid.gl);
  solid.meshes = []; // addMesh and removeMesh would make the volume's textures again
  const groups = {
    prediction: [255, 159, 28, 255],
    truth: [77, 217, 100, 255],
    decided: [255, 95, 210, 255],
    mark: [76, 201, 240, 255],
  };
  for (const [group, colour] of Object.entries(groups)) {
    const into = { points: [], triangles: [] };
    for (const name of names()) {
      const mark = markOf(name),
        truth = name.startsWith("t");
      const kind =
        name === view.selected ? "mark" : truth ? "truth" : name.startsWith("a") ? "decided" : "prediction";
      if (
        kind !== group ||
        (kind !== "mark" && Number(name.replace(/\D/, "")) > MOST_BALLS) ||
        (mark && mark.verdict === "rejected") ||
        (!truth && !shows(name)) ||
        (truth && !view.on.truth)
      )
        continue;
      const f = lesionOf(name) || findingOf(name);
      ball(placeOf(name), Math.max(2, (f ? f.diameter_mm : mark.diameter_mm) / 2), into);
    }
    if (group === "mark") ball(view.lattice.toMm(view.voxel), 2, into);
    if (!into.points.length) continue;
    const mesh = new globalThis.niivue.NVMesh(
      new Float32Array(into.points),
      new Uint32Array(into.triangles),
      group,
      colour,
      1,
      true,
      solid.gl,
    );
    solid.meshes.push(mesh);
  }
  solid.scene.crosshairPos = view.lattice.toShare(view.voxel);
  solid.drawScene();
}
