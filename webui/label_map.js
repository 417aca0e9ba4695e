// A map of ids, what the tools do to it, and how it travels.
// A box is half open: left <= x < right, top <= y < bottom.

const LONGEST = 256; // pixels of a run, as in label_editor.py

class LabelMap {
  constructor(height, width, ids) {
    this.height = height;
    this.width = width;
    this.ids = ids;
  }

  at(cell) {
    return this.ids[cell.y * this.width + cell.x];
  }

  whole() {
    return { left: 0, top: 0, right: this.width, bottom: this.height };
  }

  clip(box) {
    return {
      left: Math.max(0, box.left),
      top: Math.max(0, box.top),
      right: Math.min(this.width, box.right),
      bottom: Math.min(this.height, box.bottom),
    };
  }

  // The pixel under a point; beside the map it is the nearest one.
  cellAt(point) {
    const inside = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value)));
    return { x: inside(point.x, this.width), y: inside(point.y, this.height) };
  }

  holds(point) {
    return point.x >= 0 && point.y >= 0 && point.x < this.width && point.y < this.height;
  }

  crop(box) {
    const width = box.right - box.left;
    const patch = new Uint8Array(width * (box.bottom - box.top));
    for (let y = box.top, to = 0; y < box.bottom; y++, to += width) {
      const from = y * this.width + box.left;
      patch.set(this.ids.subarray(from, from + width), to);
    }
    return patch;
  }

  paste(box, patch) {
    const width = box.right - box.left;
    for (let y = box.top, from = 0; y < box.bottom; y++, from += width) {
      this.ids.set(patch.subarray(from, from + width), y * this.width + box.left);
    }
  }

  // The smallest box around all pixels that differ from `before`; null if there are none.
  changedSince(before, within) {
    const box = { left: this.width, top: this.height, right: 0, bottom: 0 };
    for (let y = within.top; y < within.bottom; y++) {
      for (let x = within.left, i = y * this.width + x; x < within.right; x++, i++) {
        if (this.ids[i] === before[i]) continue;
        if (x < box.left) box.left = x;
        if (x >= box.right) box.right = x + 1;
        if (y < box.top) box.top = y;
        box.bottom = y + 1;
      }
    }
    return box.right ? box : null;
  }
}

// Where a round brush sits, in half pixels: an odd one on the middle of a pixel, an even one on a corner.
function snapBrush(point, size) {
  const snap = (value) => (size % 2 ? 2 * Math.floor(value) + 1 : 2 * Math.round(value));
  return { x: snap(point.x), y: snap(point.y) };
}

// Paint every pixel whose middle is within size / 2 of the segment. In half pixels all numbers are integers
// below 2^53, so nothing is rounded and a stroke is the same on every machine.
function paintSegment(map, from, to, size, id) {
  const box = map.clip({
    left: Math.floor((Math.min(from.x, to.x) - size) / 2),
    top: Math.floor((Math.min(from.y, to.y) - size) / 2),
    right: Math.ceil((Math.max(from.x, to.x) + size) / 2),
    bottom: Math.ceil((Math.max(from.y, to.y) + size) / 2),
  });
  const dx = to.x - from.x;
  const dy = to.y - from.y;
  const length = dx * dx + dy * dy;
  const near = size * size;
  for (let y = box.top; y < box.bottom; y++) {
    for (let x = box.left; x < box.right; x++) {
      const px = 2 * x + 1 - from.x;
      const py = 2 * y + 1 - from.y;
      const along = px * dx + py * dy;
      const cross = px * dy - py * dx;
      const hit =
        along <= 0 || length === 0
          ? px * px + py * py <= near
          : along >= length
            ? (px - dx) ** 2 + (py - dy) ** 2 <= near
            : cross * cross <= near * length;
      if (hit) map.ids[y * map.width + x] = id;
    }
  }
  return box;
}

function boxOf(a, b) {
  return {
    left: Math.min(a.x, b.x),
    top: Math.min(a.y, b.y),
    right: Math.max(a.x, b.x) + 1,
    bottom: Math.max(a.y, b.y) + 1,
  };
}

function paintBox(map, box, id) {
  for (let y = box.top; y < box.bottom; y++) {
    map.ids.fill(id, y * map.width + box.left, y * map.width + box.right);
  }
}

// Span by span: a stack of single pixels would outgrow the map.
function fillArea(map, cell, id) {
  const { ids, width, height } = map;
  const old = map.at(cell);
  if (old === id) return;
  const waiting = [cell];
  while (waiting.length) {
    const { x, y } = waiting.pop();
    const row = y * width;
    if (ids[row + x] !== old) continue;
    let left = x;
    let right = x + 1;
    while (left > 0 && ids[row + left - 1] === old) left--;
    while (right < width && ids[row + right] === old) right++;
    ids.fill(id, row + left, row + right);
    for (const other of [y - 1, y + 1]) {
      if (other < 0 || other >= height) continue;
      for (let i = left; i < right; i++) {
        const starts = i === left || ids[other * width + i - 1] !== old;
        if (starts && ids[other * width + i] === old) waiting.push({ x: i, y: other });
      }
    }
  }
}

function replaceClass(map, cell, id) {
  const old = map.at(cell);
  for (let i = 0; i < map.ids.length; i++) {
    if (map.ids[i] === old) map.ids[i] = id;
  }
}

function encodeRuns(ids) {
  const bytes = [];
  for (let i = 0; i < ids.length; ) {
    const end = Math.min(ids.length, i + LONGEST);
    let next = i + 1;
    while (next < end && ids[next] === ids[i]) next++;
    bytes.push(next - i - 1, ids[i]);
    i = next;
  }
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.slice(i, i + 8192));
  return btoa(text);
}

function decodeRuns(runs, pixels) {
  const text = atob(runs);
  const ids = new Uint8Array(pixels);
  for (let i = 0, at = 0; i < text.length; i += 2) {
    const end = at + text.charCodeAt(i) + 1;
    ids.fill(text.charCodeAt(i + 1), at, end);
    at = end;
  }
  return ids;
}
