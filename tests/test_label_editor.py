"""The label-map editor: each of its tools in a browser, against the same tool in numpy."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from datasets.label_space import LabelSpace

gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
gradio_client = pytest.importorskip("gradio_client")

from webui.label_editor import HERE, LabelEditor, read_asset  # noqa: E402 - after the skip

SPACE, MANY = LabelSpace.load("cityscapes"), LabelSpace.load("ade20k")
H, W = 64, 128
CAR, SKY, VOID = 13, 10, 255
Point = tuple[float, float]  # x, y in pixels of the map


def random_map(seed: int, block: int = 8) -> np.ndarray:
    """Areas of every class and void."""
    draw = np.random.default_rng(seed).integers(0, 20, (H // block, W // block))
    ids = np.append(np.arange(19), VOID).astype(np.uint8)[draw]
    return np.kron(ids, np.ones((block, block), np.uint8))


def test_the_component_shows_what_it_refuses_and_writes_no_file() -> None:
    editor = LabelEditor(SPACE, random_map(0), max_pixels=8, render=False)
    with pytest.raises(gr.Error, match="at most 8 pixels") as caught:
        editor.preprocess({"height": 8, "width": 8, "runs": ""})
    assert caught.value.print_exception is False
    for wrong in (np.full((2, 2), 40, np.uint8), np.zeros((2, 2, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"^the label map: expected"):
            editor.postprocess(wrong)
    with pytest.raises(ValueError, match=r"^the photo: expected uint8"):
        editor.postprocess((random_map(0), np.zeros((H, W, 3))))
    assert not list(HERE.glob("*.pyi")), "Gradio's metaclass writes a stub beside a component"


def test_the_templates_hold_nothing_that_the_browser_would_compile() -> None:
    for name in ("label_editor.html", "label_editor.css"):
        assert not [mark for mark in ("`", "\\", "${", "{{") if mark in read_asset(name)], name


# -- the tools in numpy -----------------------------------------------------------------------------------


def stroke(ids: np.ndarray, points: Sequence[Point], size: int, k: int) -> np.ndarray:
    """Every pixel whose middle is within size / 2 of the line through the points, as the brush sits."""
    sit = (lambda v: np.floor(v) + 0.5) if size % 2 else (lambda v: np.floor(v + 0.5))
    path = [np.array([sit(x), sit(y)], float) for x, y in points]
    middles = np.stack(np.meshgrid(np.arange(ids.shape[1]), np.arange(ids.shape[0])), -1) + 0.5
    out = ids.copy()
    for a, b in zip(path, [*path[1:], path[-1]], strict=True):
        along = ((middles - a) @ (b - a) / max((b - a) @ (b - a), 1e-12)).clip(0, 1)
        away = np.linalg.norm(middles - a - along[..., None] * (b - a), axis=-1)
        out[away <= size / 2 + 1e-9] = k
    return out


def fill(ids: np.ndarray, x: int, y: int, k: int) -> np.ndarray:
    out, waiting, seen = ids.copy(), [(x, y)], {(x, y)}
    while waiting:
        x, y = waiting.pop()
        out[y, x] = k
        for u, v in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            inside = 0 <= u < ids.shape[1] and 0 <= v < ids.shape[0]
            if inside and (u, v) not in seen and ids[v, u] == ids[y, x]:
                seen.add((u, v))
                waiting.append((u, v))
    return out


# -- a browser --------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A page with an editor, and what Python sends to it and receives from it."""

    url: str
    send: list[Any]
    asked: queue.Queue[np.ndarray]
    heard: queue.Queue[np.ndarray]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from webui.server import serving

    send, asked, heard = [], queue.Queue(), queue.Queue()
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(analytics_enabled=False) as page:
        editor = LabelEditor(SPACE, random_map(9), elem_id="map")
        LabelEditor(MANY, np.zeros((2, 4), np.uint8), elem_id="many")
        load, ask = gr.Button("load", elem_id="load"), gr.Button("ask", elem_id="ask")
        size = gr.Textbox(visible=False)
        load.click(send.pop, None, editor, **quiet).then(asked.put, editor, None, **quiet)
        ask.click(asked.put, editor, None, **quiet)
        editor.input(heard.put, editor, None, trigger_mode="always_last", **quiet)
        ask.click(lambda ids: str(ids.shape), editor, size, api_name="size")
        for name, visible in (("hide", False), ("show", True)):
            button = gr.Button(name, elem_id=name)
            button.click(lambda visible=visible: gr.update(visible=visible), None, editor, **quiet)
    with serving(page, tmp_path_factory.mktemp("page")) as url:
        yield Bench(url.rstrip("/"), send, asked, heard)


class Hand:
    """A visitor before the editor."""

    def __init__(self, bench: Bench, context: Any) -> None:
        self.bench, self.tab, self.complaints, self.bodies = bench, context.new_page(), [], []
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", self.watch)
        self.tab.goto(bench.url)
        self.tab.wait_for_selector("#map canvas")
        self.stage = self.tab.locator("#map .stage")

    def watch(self, request: Any) -> None:
        if not request.url.startswith((self.bench.url, "data:", "blob:")):
            self.complaints.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data or "")

    def load(self, value: Any) -> np.ndarray:
        """Send a map from Python; what comes back."""
        self.bench.send.append(value)
        self.tab.click("#load")
        return self.bench.asked.get(timeout=10)

    def ids(self) -> np.ndarray:
        """The map as a click on a button sends it."""
        self.tab.click("#ask")
        return self.bench.asked.get(timeout=10)

    def choose(self, tool: str = "", k: int | None = None, size: int | None = None) -> None:
        if tool:
            self.tab.click(f"#map button[data-tool={tool}]")
        if k is not None:
            self.tab.click(f"#map [data-id='{k}']")
        if size is not None:
            self.tab.fill("#map [data-part=size]", str(size))

    def at(self, point: Point) -> Point:
        self.stage.scroll_into_view_if_needed()
        box = self.tab.locator("#map canvas").bounding_box()
        return box["x"] + point[0] * box["width"] / W, box["y"] + point[1] * box["height"] / H

    def draw(self, *points: Point) -> None:
        self.tab.mouse.move(*self.at(points[0]))
        self.tab.mouse.down()
        for point in points[1:]:
            self.tab.mouse.move(*self.at(point))
        self.tab.mouse.up()

    def keys(self, *names: str) -> None:
        for name in names:
            self.tab.keyboard.press(name)


@pytest.fixture(scope="module")
def visitor(bench: Bench, browser: Any) -> Hand:
    return Hand(bench, browser.new_context(viewport={"width": 1280, "height": 900}))


@pytest.fixture
def hand(visitor: Hand) -> Iterator[Hand]:
    visitor.tab.mouse.move(2, 2)
    visitor.load(np.zeros((H, W), np.uint8))
    visitor.choose("brush", CAR, 5)
    yield visitor
    assert visitor.complaints == []


def test_a_map_comes_back_untouched_and_a_new_one_replaces_it(hand: Hand) -> None:
    assert (hand.load(random_map(2, 1)) == random_map(2, 1)).all()
    everything = np.append(np.arange(19), VOID).astype(np.uint8)[None].repeat(3, 0)
    assert (hand.load(everything) == everything).all()
    assert "20 \u00d7 3" in hand.tab.inner_text("#map [data-part=place]")
    assert (hand.ids() == everything).all()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_stroke_is_every_pixel_near_its_line(hand: Hand, size: int) -> None:
    strokes = {
        SKY: [(40.2, 20.2)],
        0: [(3.2, 3.2), (120.8, 60.2)],  # in one move
        1: [(10.8, 50.2), (90.2, 48.8), (91.2, 5.8), (20.2, 40.8)],
        VOID: [(0.2, 0.2), (127.8, 0.2)],  # along the border
        2: [(100.2, 20.2), (140.2, -6.2), (150.2, 30.8), (60.8, 50.8)],  # out of the map, and back
    }
    expected = random_map(8)
    hand.load(expected)
    hand.choose(size=size)
    for k, points in strokes.items():
        hand.choose(k=k)
        hand.draw(*points)
        expected = stroke(expected, points, size, k)
    assert (hand.ids() == expected).all()


def test_the_areal_tools_do_as_numpy_does(hand: Hand) -> None:
    start = random_map(3)
    hand.load(start)
    hand.choose("rectangle", VOID)
    hand.draw((90.5, 40.5), (60.5, 20.5), (70.5, 80.5))  # back past its start, and out at the bottom
    expected = start.copy()
    expected[40:, 70:91] = VOID
    assert (hand.ids() == expected).all()

    hand.choose("fill", SKY)
    for x, y in ((80, 50), (3, 3), (125, 60)):
        hand.draw((x + 0.5, y + 0.5))
        expected = fill(expected, x, y, SKY)
    assert (hand.ids() == expected).all()

    hand.choose("replace", CAR)
    hand.draw((80.5, 50.5))
    expected[expected == SKY] = CAR
    assert (hand.ids() == expected).all()


def test_a_winding_area_is_filled_through_and_no_further(hand: Hand) -> None:
    maze = (np.random.default_rng(5).random((H, W)) < 0.35).astype(np.uint8)
    maze[32, 64] = 0
    hand.load(maze)
    hand.choose("fill", SKY)
    hand.draw((64.5, 32.5))
    expected = fill(maze, 64, 32, SKY)
    assert 1000 < (expected == SKY).sum() < (maze == 0).sum(), "a maze with islands"
    assert (hand.ids() == expected).all()


def test_a_class_is_picked_and_painted_with(hand: Hand) -> None:
    start = random_map(4)
    hand.load(start)
    hand.choose("pick")
    hand.draw((50.5, 30.5))
    assert hand.tab.get_attribute(f"#map [data-id='{start[30, 50]}']", "aria-pressed") == "true"
    assert hand.tab.get_attribute("#map button[data-tool=brush]", "aria-pressed") == "true"
    hand.draw((9.2, 9.2))
    expected = stroke(start, [(9.2, 9.2)], 5, start[30, 50])
    assert (hand.ids() == expected).all()
    hand.choose("fill")
    hand.tab.keyboard.down("Alt")
    hand.draw((100.5, 50.5))
    hand.tab.keyboard.up("Alt")
    assert hand.tab.get_attribute(f"#map [data-id='{start[50, 100]}']", "aria-pressed") == "true"
    assert hand.tab.get_attribute("#map button[data-tool=fill]", "aria-pressed") == "true"
    assert (hand.ids() == expected).all()


def test_edits_are_undone_and_redone_and_each_is_told_once(hand: Hand) -> None:
    def heard() -> np.ndarray:
        return hand.bench.heard.get(timeout=5)

    while not hand.bench.heard.empty():
        hand.bench.heard.get()
    states = [np.zeros((H, W), np.uint8)]
    hand.choose(k=0)
    hand.draw((20.2, 20.2), (60.2, 20.2))  # road on road: no edit
    hand.choose(k=CAR)
    around = [(64.2, 32.2), (90.2, 50.2), (110.2, 10.2), (30.2, 12.2), (60.2, 30.2), (62.2, 31.2)]
    for points in (around, [(100.2, 58.2)], [(0.2, 63.2), (127.2, 0.2)]):
        hand.draw(*points)
        states.append(stroke(states[-1], points, 5, CAR))
        assert (heard() == states[-1]).all()
    for state in states[2::-1]:
        hand.tab.click("#map [data-action=undo]")
        assert (heard() == state).all()
    assert hand.tab.get_attribute("#map [data-action=undo]", "aria-disabled") == "true"
    hand.tab.click("#map [data-action=undo]", force=True)  # nothing more to undo
    hand.keys("Control+Shift+z")
    assert (heard() == states[1]).all()
    hand.keys("Control+y")
    assert (heard() == states[2]).all()
    hand.keys("Control+z")
    assert (heard() == states[1]).all()
    hand.choose("rectangle", SKY)
    hand.draw((2.5, 2.5), (4.5, 6.5))
    states[1][2:7, 2:5] = SKY
    assert (heard() == states[1]).all()
    assert hand.tab.get_attribute("#map [data-action=redo]", "aria-disabled") == "true"
    assert hand.bench.heard.empty()


def test_the_keyboard_alone_paints(hand: Hand) -> None:
    hand.stage.focus()
    hand.keys("ArrowRight", "Shift+ArrowUp", "[", "]", " ")  # from the middle
    expected = stroke(np.zeros((H, W), np.uint8), [(65.5, 22.5)], 5, CAR)
    hand.keys("r", "Shift+ArrowRight", "Enter", "ArrowDown", "Escape")
    hand.keys("Enter", "ArrowLeft", "Shift+ArrowDown", "Enter")
    expected[23:34, 74:76] = CAR
    assert (hand.ids() == expected).all()
    hand.stage.focus()
    hand.keys("f", " ")
    assert hand.tab.get_attribute("#map button[data-tool=fill]", "aria-pressed") == "true"
    hand.keys(*["Shift+ArrowLeft"] * 20, "b", "]", " ")
    assert hand.tab.inner_text("#map [data-part=under]") == "car"
    assert (hand.ids() == stroke(expected, [(0.5, 33.5)], 6, CAR)).all()


@pytest.mark.slow
def test_a_hundred_steps_back_and_forth(hand: Hand) -> None:
    hand.choose(size=1)
    press = """async (stage, keys) => {
        for (const [key, ctrlKey] of keys) {
            stage.dispatchEvent(new KeyboardEvent("keydown", {key, ctrlKey, bubbles: true}));
            await new Promise(done => setTimeout(done));  // not faster than a hand that holds a key
        }
    }"""
    moves = [*["ArrowRight"] * 60, "ArrowDown", *["ArrowLeft"] * 40]  # from the middle, (64, 32)
    hand.stage.evaluate(press, [(key, False) for move in moves for key in (move, " ")])
    expected = np.zeros((H, W), np.uint8)
    expected[32, 65:125] = expected[33, 84:125] = CAR
    assert (hand.ids() == expected).all()
    hand.stage.evaluate(press, [("z", True)] * 101)
    assert (hand.ids() == 0).all()
    hand.stage.evaluate(press, [("y", True)] * 101)
    assert (hand.ids() == expected).all()


def test_a_photo_lies_under_the_map_and_stays_in_the_browser(hand: Hand) -> None:
    slider, image = hand.tab.locator("#map [data-part=opacity]"), hand.tab.locator("#map img")
    assert not slider.is_visible()
    start, photo = random_map(6), np.full((H, W, 3), 90, np.uint8)
    assert (hand.load((start, photo)) == start).all()
    assert slider.is_visible()
    assert image.get_attribute("src").startswith("data:image/jpeg;base64,")
    assert image.evaluate("photo => [photo.naturalHeight, photo.naturalWidth]") == [H, W]
    slider.fill("30")
    assert hand.tab.locator("#map canvas").evaluate("canvas => canvas.style.opacity") == "0.3"
    hand.bodies.clear()
    hand.draw((30.2, 30.2), (70.2, 30.2))
    assert (hand.ids() == stroke(start, [(30.2, 30.2), (70.2, 30.2)], 5, CAR)).all()
    assert image.is_visible(), "an edit does not take it away"
    sent = [body for body in hand.bodies if "runs" in body]
    assert sent
    assert not [body for body in sent if "photo" in body or "data:image" in body]
    hand.load(start)
    assert not slider.is_visible()
    assert not image.is_visible()


def test_the_canvas_shows_the_colours_of_the_ids(hand: Hand) -> None:
    start = random_map(7)
    hand.load(start)
    hand.draw((30.2, 30.2), (70.2, 30.2))
    pixels = hand.tab.locator("#map canvas").evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
    )
    shown = np.array(pixels, np.uint8).reshape(H, W, 4)
    expected = stroke(start, [(30.2, 30.2), (70.2, 30.2)], 5, CAR)
    assert (shown[..., :3] == SPACE.paint(expected)).all()
    assert (shown[..., 3] == 255).all()


def test_every_class_has_its_button_and_is_painted_with_after_the_editor_was_hidden(hand: Hand) -> None:
    buttons = hand.tab.locator("#map [data-part=palette] button span")
    assert buttons.all_inner_texts() == [*SPACE.names, "void"]
    start = hand.load(random_map(7))
    for button, count in (("#hide", 0), ("#show", 1)):
        hand.tab.click(button)
        hand.tab.wait_for_function(f"document.querySelectorAll('#map canvas').length === {count}")
    assert buttons.count() == 20
    hand.choose(k=VOID, size=4)
    hand.draw((30.2, 30.2), (70.2, 30.2))
    assert (hand.ids() == stroke(start, [(30.2, 30.2), (70.2, 30.2)], 4, VOID)).all()


def test_many_classes_are_found_by_name_and_what_is_typed_is_no_shortcut(hand: Hand) -> None:
    assert not hand.tab.locator("#map [data-part=filter]").is_visible()
    hand.tab.locator("#many [data-part=filter]").press_sequentially("Tree")
    found = hand.tab.locator("#many [data-part=palette] button:visible span").all_inner_texts()
    assert found == [name for name in MANY.names if "tree" in name]
    assert hand.tab.get_attribute("#many button[data-tool=brush]", "aria-pressed") == "true"


def test_a_finger_paints_and_a_second_one_does_not(bench: Bench, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    hand = Hand(bench, context)
    assert hand.tab.evaluate("document.documentElement.scrollWidth") <= 400
    hand.load(np.zeros((H, W), np.uint8))
    hand.choose(k=CAR, size=5)
    hand.tab.touchscreen.tap(*hand.at((20.5, 20.5)))
    expected = stroke(np.zeros((H, W), np.uint8), [(20.5, 20.5)], 5, CAR)
    assert (hand.ids() == expected).all()
    cdp = context.new_cdp_session(hand.tab)

    def touch(kind: str, *points: Point) -> None:
        places = [dict(zip("xy", hand.at(point), strict=True), id=i) for i, point in enumerate(points)]
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    touch("touchStart", (40.5, 30.5))
    touch("touchStart", (40.5, 30.5), (100.5, 50.5))
    touch("touchMove", (80.5, 40.5), (110.5, 10.5))
    # A second finger that leaves first, which Chromium's own test input cannot do.
    hand.stage.evaluate("stage => stage.dispatchEvent(new PointerEvent('pointerup', {pointerId: 999}))")
    touch("touchMove", (60.5, 55.5))
    touch("touchEnd")
    expected = stroke(expected, [(40.5, 30.5), (80.5, 40.5), (60.5, 55.5)], 5, CAR)
    assert (hand.ids() == expected).all()
    assert hand.complaints == []


def test_a_bad_map_from_the_api_is_answered_with_the_sentence(bench: Bench) -> None:
    client = gradio_client.Client(bench.url, verbose=False)
    good = {"height": 2, "width": 3, "runs": "BQE="}  # six pixels of class 1
    assert client.predict(good, api_name="/size") == "(2, 3)"
    with pytest.raises(gradio_client.exceptions.AppError, match=r"^the label map: .* found 256 pixels; rel"):
        client.predict({**good, "runs": "/wE="}, api_name="/size")
    assert client.predict(good, api_name="/size") == "(2, 3)"
