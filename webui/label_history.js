// Undo and redo. A step holds one patch: what was there before it, or once it is undone what was there after.

const HISTORY_BYTES = 64 << 20;
const HISTORY_STEPS = 1000; // a step of one pixel costs more than its byte

class EditHistory {
  constructor() {
    this.steps = [];
    this.done = 0; // steps that can be undone; those after it can be redone
    this.bytes = 0;
  }

  add(box, patch) {
    for (const step of this.steps.splice(this.done)) this.bytes -= step.patch.length;
    this.steps.push({ box, patch });
    this.bytes += patch.length;
    while (this.bytes > HISTORY_BYTES || this.steps.length > HISTORY_STEPS) {
      this.bytes -= this.steps.shift().patch.length;
    }
    this.done = this.steps.length;
  }

  canUndo() {
    return this.done > 0;
  }

  canRedo() {
    return this.done < this.steps.length;
  }

  // Both return the box that changed.
  undo(map) {
    return this.swap(map, this.steps[--this.done]);
  }

  redo(map) {
    return this.swap(map, this.steps[this.done++]);
  }

  swap(map, step) {
    const now = map.crop(step.box);
    map.paste(step.box, step.patch);
    step.patch = now;
    return step.box;
  }
}
