"use strict";
// Geometry, masks and drawing of the three planes. Voxels are indexed [z, y, x] in LPS order, positions are
// LPS mm. NiiVue has a coarse copy of the scan; its planes are overdrawn with the scan's own voxels.

const AXES = ["axial", "coronal", "sagittal"];
const EDGES = [
  ["A", "P", "R", "L"],
  ["H", "F", "R", "L"],
  ["H", "F", "A", "P"],
]; // top, bottom, left, right
const KEPT_PLANES = 160;

class Lattice {
  constructor(facts) {
    Object.assign(this, facts);
    this.inverse = inverted(this.affine);
  }
  toMm([z, y, x]) {
    return this.affine.slice(0, 3).map((r) => r[0] * z + r[1] * y + r[2] * x + r[3]);
  }
  toVoxel([x, y, z]) {
    return this.inverse.map((r) => r[0] * x + r[1] * y + r[2] * z + r[3]);
  }
  // NiiVue counts in shares of the box, from right, back and foot.
  toShare([z, y, x]) {
    const [nz, ny, nx] = this.shape;
    return [1 - (x + 0.5) / nx, 1 - (y + 0.5) / ny, (z + 0.5) / nz];
  }
  ofShare([fx, fy, fz]) {
    const [nz, ny, nx] = this.shape;
    return [fz * nz - 0.5, (1 - fy) * ny - 0.5, (1 - fx) * nx - 0.5];
  }
  // The nearest place in the scan; its far border belongs to the last voxels.
  within(voxel) {
    return voxel.map((v, i) => Math.min(this.shape[i] - 0.501, Math.max(-0.5, v)));
  }
}

function inverted(m) {
  // Rows of the inverse of a 4 x 4 affine.
  const [[a, b, c, p], [d, e, f, q], [g, h, i, r]] = m;
  const det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g);
  const rows = [
    [(e * i - f * h) / det, (c * h - b * i) / det, (b * f - c * e) / det],
    [(f * g - d * i) / det, (a * i - c * g) / det, (c * d - a * f) / det],
    [(d * h - e * g) / det, (b * g - a * h) / det, (a * e - b * d) / det],
  ];
  return rows.map((row) => [...row, -(row[0] * p + row[1] * q + row[2] * r)]);
}

// A mask that is only shown: runs [start, length, value], none of which leaves its row.
class RunMask {
  constructor(runs, shape) {
    this.runs = runs;
    this.shape = shape;
    this.cached = new Map();
  }
  plane(axis, at) {
    const key = `${axis}/${at}`;
    if (!this.cached.has(key)) {
      if (this.cached.size > KEPT_PLANES) this.cached.clear();
      this.cached.set(key, this.cut(axis, at));
    }
    return this.cached.get(key);
  }
  cut(axis, at) {
    const [nz, ny, nx] = this.shape,
      runs = this.runs,
      area = ny * nx;
    const out = new Int32Array([area, nz * nx, nz * ny][axis]);
    let any = false,
      first = 0;
    if (axis === 0) first = 3 * firstFrom(runs, at * area);
    for (let k = first; k < runs.length; k += 3) {
      const start = runs[k],
        z = Math.floor(start / area),
        inside = start - z * area;
      const y = Math.floor(inside / nx),
        x = inside - y * nx,
        length = runs[k + 1];
      if (axis === 0) {
        if (z > at) break;
        out.fill(runs[k + 2], inside, inside + length);
      } else if (axis === 1) {
        if (y !== at) continue;
        out.fill(runs[k + 2], z * nx + x, z * nx + x + length);
      } else {
        if (at < x || at >= x + length) continue;
        out[z * ny + y] = runs[k + 2];
      }
      any = true;
    }
    return any ? out : null;
  }
}

function firstFrom(runs, start) {
  let low = 0,
    high = runs.length / 3;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (runs[3 * middle] < start) low = middle + 1;
    else high = middle;
  }
  return low;
}

// A mask that is painted on: its axial slices that are not empty.
class PaintedMask {
  constructor(runs, shape) {
    this.shape = shape;
    this.slices = new Map();
    this.changed = new Set();
    const area = shape[1] * shape[2];
    for (let k = 0; k < runs.length; k += 3) {
      const z = Math.floor(runs[k] / area),
        inside = runs[k] - z * area;
      this.slice(z).fill(runs[k + 2], inside, inside + runs[k + 1]);
    }
  }
  slice(z) {
    if (!this.slices.has(z)) this.slices.set(z, new Int32Array(this.shape[1] * this.shape[2]));
    return this.slices.get(z);
  }
  set([z, y, x], value, bits) {
    const slice = this.slice(z),
      place = y * this.shape[2] + x,
      old = slice[place];
    const now = bits
      ? value > 0
        ? old | value
        : old & value
      : value > 0
        ? value
        : old === -value
          ? 0
          : old;
    if (now === old) return;
    slice[place] = now;
    this.changed.add(z);
  }
  plane(axis, at) {
    const [nz, ny, nx] = this.shape;
    if (axis === 0) return this.slices.get(at) || null;
    const out = new Int32Array(axis === 1 ? nz * nx : nz * ny);
    for (const [z, slice] of this.slices) {
      if (axis === 1) out.set(slice.subarray(at * nx, (at + 1) * nx), z * nx);
      else for (let y = 0; y < ny; y++) out[z * ny + y] = slice[y * nx + at];
    }
    return this.slices.size ? out : null;
  }
  // The slices that were changed since the last time, as runs within each.
  takeChanged() {
    const out = {};
    for (const z of this.changed) out[z] = runsOf(this.slice(z), this.shape[2]);
    this.changed.clear();
    return out;
  }
}

function runsOf(slice, nx) {
  const out = [];
  for (let k = 0; k < slice.length;) {
    const value = slice[k],
      start = k,
      end = (Math.floor(k / nx) + 1) * nx;
    while (k < end && slice[k] === value) k++;
    if (value) out.push(start, k - start, value);
  }
  return out;
}

// Adds to a path the borders of where `inside` is, in voxels [column, row] of the plane.
function outline(context, values, width, inside) {
  const height = values.length / width;
  let first = 0,
    last = values.length - 1;
  while (first <= last && !inside(values[first])) first++;
  while (last >= first && !inside(values[last])) last--;
  if (first > last) return false;
  const top = Math.floor(first / width),
    bottom = Math.floor(last / width);
  for (let row = top; row <= bottom + 1 && row <= height; row++) {
    let from = -1; // horizontal borders, joined
    for (let column = 0; column <= width; column++) {
      const here = column < width && row <= bottom && inside(values[row * width + column]);
      const above = column < width && row > top && inside(values[(row - 1) * width + column]);
      if (here !== above && from < 0) from = column;
      if (here === above && from >= 0) {
        context.moveTo(from - 0.5, row - 0.5);
        context.lineTo(column - 0.5, row - 0.5);
        from = -1;
      }
      const left = column > 0 && row <= bottom && inside(values[row * width + column - 1]);
      if (row <= bottom && here !== left) {
        context.moveTo(column - 0.5, row - 0.5);
        context.lineTo(column - 0.5, row + 0.5);
      }
    }
  }
  return true;
}

// The scan's slices, fetched when they are needed, and their neighbours.
class Planes {
  constructor(number, lattice, arrived, failed) {
    Object.assign(this, { number, lattice, arrived, failed, kept: new Map(), asked: new Map() });
  }
  get(axis, at) {
    const key = `${axis}/${at}`,
      found = this.kept.get(key);
    if (found) {
      this.kept.delete(key);
      this.kept.set(key, found);
    } else this.ask(axis, at);
    return found;
  }
  ask(axis, at) {
    const key = `${axis}/${at}`;
    if (at < 0 || at >= this.lattice.shape[axis] || this.kept.has(key) || this.asked.has(key)) return;
    const asked = fetch(`/api/case/${this.number}/plane/${key}`)
      .then((r) => (r.ok ? r.arrayBuffer() : Promise.reject(new Error(r.statusText))))
      .then((buffer) => {
        this.kept.set(key, { values: new Int16Array(buffer), picture: null, window: "" });
        if (this.kept.size > KEPT_PLANES) this.kept.delete(this.kept.keys().next().value);
        this.arrived(axis, at);
      })
      .catch(this.failed)
      .finally(() => this.asked.delete(key));
    this.asked.set(key, asked);
  }
  // A canvas of a slice in a window, rows downwards as in the array; null while it is fetched.
  picture(axis, at, [low, high]) {
    const plane = this.get(axis, at);
    if (!plane) return null;
    const name = `${low}/${high}`;
    if (plane.window !== name) {
      const [height, width] = this.lattice.shape.filter((_, i) => i !== axis);
      plane.picture ||= new OffscreenCanvas(width, height);
      const context = plane.picture.getContext("2d"),
        image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer),
        values = plane.values;
      const { slope, inter } = this.lattice,
        scale = (255 * slope) / (high - low),
        shift = (255 * (inter - low)) / (high - low);
      for (let k = 0; k < values.length; k++) {
        const grey = Math.max(0, Math.min(255, Math.round(values[k] * scale + shift)));
        pixels[k] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
      }
      context.putImageData(image, 0, 0);
      plane.window = name;
    }
    return plane.picture;
  }
  value([z, y, x]) {
    const plane = this.kept.get(`0/${z}`);
    return plane
      ? plane.values[y * this.lattice.shape[2] + x] * this.lattice.slope + this.lattice.inter
      : null;
  }
}

// Where a tile of NiiVue's canvas shows which voxels: column = c0 + cs * px, row = r0 + rs * py.
function tileOf(niivue, number, lattice) {
  const slice = niivue.screenSlices[number],
    axis = slice.axCorSag;
  let [left, top, width, height] = slice.leftTopWidthHeight;
  if (width < 0) [left, width] = [left + width, -width];
  const place = (sx, sy) =>
    lattice
      .ofShare(niivue.screenXY2TextureFrac(left + sx * width, top + sy * height, number, false))
      .filter((_, i) => i !== axis);
  const [[ra, ca], [rb, cb]] = [place(0.25, 0.25), place(0.75, 0.75)];
  const cs = (cb - ca) / (0.5 * width),
    rs = (rb - ra) / (0.5 * height);
  const c0 = ca - cs * (left + 0.25 * width),
    r0 = ra - rs * (top + 0.25 * height);
  return { axis, left, top, width, height, cs, rs, c0, r0 };
}

const toPixel = (tile, [row, column]) => [(column - tile.c0) / tile.cs, (row - tile.r0) / tile.rs];
const toPlane = (tile, px, py) => [tile.r0 + tile.rs * py, tile.c0 + tile.cs * px];
