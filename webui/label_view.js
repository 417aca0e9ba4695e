// What is seen: the map, the marks over it, the palette and the status line.

const FILTERED = 40; // more classes than this get a field to find one

class LabelView {
  constructor(element, palette) {
    const part = (name) => element.querySelector(`[data-part=${name}]`);
    this.element = element;
    this.part = part;
    this.rows = new Map(palette.map((row) => [row.id, row]));
    this.pen = part("canvas").getContext("2d");
    this.colours = new Uint32Array(256);
    const bytes = new Uint8Array(this.colours.buffer);
    for (const { id, colour } of palette) bytes.set([...colour, 255], 4 * id);
    this.buttons = new Map(palette.map((row) => [row.id, this.makeButton(row)]));
    part("palette").replaceChildren(...this.buttons.values());
    part("filter").hidden = palette.length <= FILTERED;
  }

  makeButton(row) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.id = row.id;
    button.title = row.name;
    const share = document.createElement("small");
    button.append(...this.describe(row.id), share);
    return button;
  }

  // A swatch and a name.
  describe(id) {
    const row = this.rows.get(id);
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${row.colour.join(" ")})`;
    const name = document.createElement("span");
    name.textContent = row.name;
    return [swatch, name];
  }

  nameOf(id) {
    return this.rows.get(id).name;
  }

  // A new map, perhaps of another size.
  open(map) {
    Object.assign(this.part("canvas"), { width: map.width, height: map.height });
    this.part("marks").setAttribute("viewBox", `0 0 ${map.width} ${map.height}`);
    this.part("stage").style.setProperty("--sides", `${map.width} / ${map.height}`);
    this.draw(map, map.whole());
  }

  draw(map, box) {
    const width = box.right - box.left;
    const height = box.bottom - box.top;
    if (width <= 0 || height <= 0) return;
    const image = this.pen.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const ids = map.crop(box);
    for (let i = 0; i < ids.length; i++) pixels[i] = this.colours[ids[i]];
    this.pen.putImageData(image, box.left, box.top);
  }

  // The outline of a path in pixels of the map; "" for none.
  mark(path) {
    for (const line of this.part("marks").children) line.setAttribute("d", path);
  }

  showPhoto(url) {
    const photo = this.part("photo");
    photo.hidden = !url;
    this.part("opacity-row").hidden = !url;
    if (url) photo.src = url;
    else photo.removeAttribute("src");
    this.showOpacity();
  }

  showOpacity() {
    const percent = this.part("opacity").value;
    this.part("opacity-shown").textContent = `${percent}%`;
    this.part("canvas").style.opacity = this.part("photo").hidden ? 1 : percent / 100;
  }

  showSize(size, most) {
    Object.assign(this.part("size"), { max: most, value: size });
    this.part("size-shown").textContent = size;
  }

  showTool(tool) {
    this.part("stage").dataset.tool = tool;
    for (const button of this.element.querySelectorAll("[data-tool]")) {
      if (button.localName === "button") button.setAttribute("aria-pressed", button.dataset.tool === tool);
    }
  }

  showClass(current) {
    for (const [id, button] of this.buttons) button.setAttribute("aria-pressed", id === current);
    this.reveal(this.buttons.get(current));
    this.part("current").replaceChildren(...this.describe(current));
    this.part("current").title = `Painting ${this.nameOf(current)}`;
  }

  // Within the palette alone: scrollIntoView would move the page away from the map too.
  reveal(button) {
    const list = this.part("palette");
    const { top, bottom } = list.getBoundingClientRect();
    const box = button.getBoundingClientRect();
    if (box.top < top) list.scrollTop -= top - box.top;
    else if (box.bottom > bottom) list.scrollTop += box.bottom - bottom;
  }

  // aria-disabled and not disabled: a disabled button would lose the focus of who pressed it by key.
  showHistory(history) {
    const able = { undo: history.canUndo(), redo: history.canRedo() };
    for (const [action, can] of Object.entries(able)) {
      this.element.querySelector(`[data-action=${action}]`).setAttribute("aria-disabled", !can);
    }
  }

  showShares(ids) {
    const counts = new Uint32Array(256);
    for (let i = 0; i < ids.length; i++) counts[ids[i]]++;
    for (const [id, button] of this.buttons) {
      const percent = (100 * counts[id]) / ids.length;
      const rounded = percent < 1 ? "<1%" : `${Math.round(percent)}%`;
      button.lastChild.textContent = counts[id] ? rounded : "";
    }
  }

  showPlace(map, cell) {
    this.part("under").replaceChildren(...(cell ? this.describe(map.at(cell)) : []));
    const size = `${map.width} \u00d7 ${map.height}`;
    this.part("place").textContent = cell ? `x ${cell.x}, y ${cell.y} of ${size}` : size;
  }

  filterClasses(text) {
    const wanted = text.trim().toLowerCase();
    for (const [id, button] of this.buttons) {
      button.hidden = !this.nameOf(id).toLowerCase().includes(wanted);
    }
  }

  // For those who hear the page.
  say(sentence) {
    this.part("spoken").textContent = sentence;
  }
}

function circlePath(centre, size) {
  const r = size / 2;
  return `M${centre.x / 2 - r} ${centre.y / 2}a${r} ${r} 0 1 0 ${size} 0a${r} ${r} 0 1 0 ${-size} 0`;
}

function boxPath(box) {
  return `M${box.left} ${box.top}H${box.right}V${box.bottom}H${box.left}Z`;
}

// Four lines that leave the pixel itself free.
function crossPath(cell, length) {
  const { x, y } = cell;
  const across = `M${x - length} ${y + 0.5}h${length}m1 0h${length}`;
  return `${across}M${x + 0.5} ${y - length}v${length}m0 1v${length}`;
}
