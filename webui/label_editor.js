// The editor: pointers and keys become edits, and each finished edit is sent.
// `element`, `props`, `trigger` and `watch` are what gr.HTML hands to a component's script; `palette` is from
// label_editor.py.

const TOOL_KEYS = { b: "brush", r: "rectangle", f: "fill", c: "replace", i: "pick" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MOST_BRUSH = 128;

class LabelEditor {
  constructor(view, first, send) {
    this.view = view;
    this.send = send;
    this.tool = "brush";
    this.painting = "brush"; // the tool to return to after a pick
    this.current = first;
    this.size = 0; // not chosen yet
    this.gesture = null; // what began and is not finished: a stroke, or a rectangle
    this.hover = null; // the point under the pointer
    this.cursor = null; // the pixel under the keyboard's cursor
    view.showTool(this.tool);
    view.showClass(this.current);
  }

  load(map) {
    this.map = map;
    this.history = new EditHistory();
    this.gesture = null;
    this.cursor = null;
    this.view.open(map);
    this.setSize(this.size || Math.max(1, Math.round(Math.min(map.height, map.width) / 16)));
    this.refresh();
  }

  refresh() {
    this.view.showHistory(this.history);
    this.view.showShares(this.map.ids);
    this.point();
  }

  // -- settings

  setTool(tool) {
    this.cancel();
    if (tool !== "pick") this.painting = tool;
    this.tool = tool;
    this.view.showTool(tool);
    this.point();
  }

  setClass(id) {
    this.current = id;
    this.view.showClass(id);
  }

  setSize(size) {
    const most = Math.max(1, Math.min(MOST_BRUSH, this.map.height, this.map.width));
    this.size = Math.min(most, Math.max(1, size));
    this.view.showSize(this.size, most);
    this.point();
  }

  // The step grows with the size, so that large brushes are reached too.
  stepSize(sign) {
    this.setSize(this.size + sign * Math.max(1, Math.round(this.size / 6)));
  }

  // -- edits; points are in pixels of the map and may lie beside it

  press(point, picks) {
    this.cancel();
    const cell = this.map.cellAt(point);
    const tool = picks ? "pick" : this.tool;
    if (tool === "pick") {
      this.setClass(this.map.at(cell));
      if (!picks) this.setTool(this.painting);
    } else if (tool === "rectangle") {
      this.gesture = { from: cell, to: cell };
    } else if (tool === "brush") {
      const at = snapBrush(point, this.size);
      const nothing = { left: this.map.width, top: this.map.height, right: 0, bottom: 0 };
      this.gesture = { before: this.map.ids.slice(), dirty: nothing, at };
      this.stroke(at);
    } else {
      const before = this.map.ids.slice();
      (tool === "fill" ? fillArea : replaceClass)(this.map, cell, this.current);
      this.commit(before, this.map.whole());
    }
  }

  drag(point) {
    if (!this.gesture) return;
    if (this.gesture.before) this.stroke(snapBrush(point, this.size));
    else this.gesture.to = this.map.cellAt(point);
  }

  stroke(to) {
    const { gesture, map } = this;
    const box = paintSegment(map, gesture.at, to, this.size, this.current);
    this.view.draw(map, box);
    gesture.at = to;
    if (box.left >= box.right || box.top >= box.bottom) return;
    const { dirty } = gesture;
    dirty.left = Math.min(dirty.left, box.left);
    dirty.top = Math.min(dirty.top, box.top);
    dirty.right = Math.max(dirty.right, box.right);
    dirty.bottom = Math.max(dirty.bottom, box.bottom);
  }

  release() {
    const { gesture, map } = this;
    this.gesture = null;
    if (!gesture) return;
    if (gesture.before) {
      this.commit(gesture.before, gesture.dirty);
    } else {
      const box = boxOf(gesture.from, gesture.to);
      const before = map.ids.slice();
      paintBox(map, box, this.current);
      this.commit(before, box);
    }
  }

  cancel() {
    const { gesture, map } = this;
    this.gesture = null;
    if (gesture?.before) {
      map.ids.set(gesture.before);
      this.view.draw(map, map.whole());
    }
    this.point();
  }

  commit(before, within) {
    const box = this.map.changedSince(before, within);
    if (box) {
      this.history.add(box, new LabelMap(this.map.height, this.map.width, before).crop(box));
      this.view.draw(this.map, box);
      this.send(this.map);
    }
    this.refresh();
  }

  travel(action) {
    const able = action === "undo" ? this.history.canUndo() : this.history.canRedo();
    if (!able || this.gesture?.before) return;
    this.cancel();
    this.view.draw(this.map, this.history[action](this.map));
    this.send(this.map);
    this.refresh();
    this.view.say(action === "undo" ? "Undone" : "Redone");
  }

  // -- where it would happen

  hoverAt(point) {
    this.hover = point;
    if (point) this.cursor = null;
    this.point();
  }

  moveCursor([dx, dy], step) {
    if (this.gesture?.before) return; // a pointer is at work
    const { map, view } = this;
    const from = this.cursor ?? map.cellAt(this.hover ?? { x: map.width / 2, y: map.height / 2 });
    this.cursor = map.cellAt({ x: from.x + dx * step, y: from.y + dy * step });
    this.hover = null;
    this.drag(this.middle());
    this.point();
    view.say(`${view.nameOf(map.at(this.cursor))}, x ${this.cursor.x}, y ${this.cursor.y}`);
  }

  // A rectangle needs two presses, one at each corner; the other tools one.
  useCursor() {
    if (this.gesture?.before) return;
    this.moveCursor([0, 0], 0); // shows the cursor if there was none
    const finishes = this.gesture || this.tool !== "rectangle";
    if (!this.gesture) this.press(this.middle(), false);
    if (finishes) this.release();
    else this.view.say("First corner set");
    this.point();
  }

  middle() {
    return { x: this.cursor.x + 0.5, y: this.cursor.y + 0.5 };
  }

  // Show where the tool would work.
  point() {
    const { map, gesture, cursor, tool } = this;
    const at = cursor ? this.middle() : this.hover;
    const cell = at && (gesture || map.holds(at)) ? map.cellAt(at) : null;
    this.view.showPlace(map, cell);
    let path = "";
    if (gesture?.from) path = boxPath(boxOf(gesture.from, gesture.to));
    else if (cell && tool === "brush") path = circlePath(snapBrush(at, this.size), this.size);
    else if (cell) path = boxPath(boxOf(cell, cell));
    if (cursor) path += crossPath(cursor, Math.max(3, map.width / 40));
    this.view.mark(path);
  }
}

function listenToPointer(stage, canvas, editor) {
  let active = null; // the pointer that is down; others are ignored meanwhile
  const pointOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const { width, height } = editor.map;
    return {
      x: ((event.clientX - box.left) / box.width) * width,
      y: ((event.clientY - box.top) / box.height) * height,
    };
  };
  const finish = (event) => {
    if (event.pointerId !== active) return;
    active = null;
    editor.release();
    if (event.pointerType !== "mouse") editor.hoverAt(null);
  };
  stage.addEventListener("pointerdown", (event) => {
    if (active !== null || event.button !== 0 || !event.isPrimary) return;
    event.preventDefault();
    stage.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    active = event.pointerId;
    editor.hoverAt(pointOf(event));
    editor.press(pointOf(event), event.altKey);
  });
  stage.addEventListener("pointermove", (event) => {
    if (active !== null && event.pointerId !== active) return;
    if (active !== null) {
      // The browser joins fast moves into one event; the stroke follows the whole way.
      const way = event.getCoalescedEvents?.() ?? [];
      for (const step of way.length ? way : [event]) editor.drag(pointOf(step));
    }
    editor.hoverAt(pointOf(event));
  });
  const ends = ["pointerup", "pointercancel", "lostpointercapture"];
  for (const name of ends) stage.addEventListener(name, finish);
  stage.addEventListener("pointerleave", () => active === null && editor.hoverAt(null));
}

function listenToKeys(root, stage, editor) {
  const act = (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if ((key === "[" || key === "]") && !event.metaKey) {
      editor.stepSize(key === "]" ? 1 : -1); // many keyboards type these with Alt or AltGr
      return true;
    }
    if ((event.ctrlKey || event.metaKey) && !event.altKey) {
      if (key !== "z" && key !== "y") return false;
      editor.travel(key === "z" && !event.shiftKey ? "undo" : "redo");
      return true;
    }
    if (event.altKey || event.ctrlKey || event.metaKey) return false;
    if (key in TOOL_KEYS) editor.setTool(TOOL_KEYS[key]);
    else if (key === "Escape" && editor.gesture) editor.cancel();
    else if (event.target !== stage) return false;
    else if (key in ARROWS) editor.moveCursor(ARROWS[key], event.shiftKey ? 10 : 1);
    else if (key !== " " && key !== "Enter") return false;
    else if (!event.repeat) editor.useCursor();
    return true;
  };
  stage.addEventListener("focus", () => stage.matches(":focus-visible") && editor.moveCursor([0, 0], 0));
  root.addEventListener("keydown", (event) => {
    if (event.target.type === "search") return; // what is typed there is text
    if (act(event)) event.preventDefault();
  });
}

function listenToControls(root, view, editor) {
  root.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { tool, action, id } = button.dataset;
    if (tool) editor.setTool(tool);
    else if (action) editor.travel(action);
    else if (id) editor.setClass(Number(id));
  });
  view.part("size").addEventListener("input", (event) => editor.setSize(event.target.valueAsNumber));
  view.part("opacity").addEventListener("input", () => view.showOpacity());
  view.part("filter").addEventListener("input", (event) => view.filterClasses(event.target.value));
}

// What Python sends has a photo, perhaps an empty one; what the editor sends has none.
function listenToPython(view, editor) {
  const receive = () => {
    if (!props.value?.runs) return;
    const { height, width, runs, photo } = props.value;
    const map = editor.map;
    const same = map?.height === height && map.width === width && encodeRuns(map.ids) === runs;
    if (!same) editor.load(new LabelMap(height, width, decodeRuns(runs, height * width)));
    if (photo === undefined) return;
    view.showPhoto(photo);
    props.value = { height, width, runs }; // the photo need not travel back with each event
  };
  watch("value", receive);
  receive();
}

const view = new LabelView(element, palette);
const editor = new LabelEditor(view, palette[0].id, ({ height, width, ids }) => {
  props.value = { height, width, runs: encodeRuns(ids) };
  trigger("input");
});
listenToPython(view, editor);
listenToPointer(view.part("stage"), view.part("canvas"), editor);
listenToKeys(element, view.part("stage"), editor);
listenToControls(element, view, editor);
