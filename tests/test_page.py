"""The page of the demo: what it shows, that it escapes, that it needs nothing from elsewhere; its charts."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import tool_demo_page
from cldm.pictures import sheet, write_png
from datasets.label_space import LabelSpace
from datasets.streets import CONDITIONS
from datasets.streets.tree import Plan, make_tree
from metrics.charts import HEIGHT, WIDTH, Line, line_chart, nice_ticks
from metrics.demo_inputs import cut, read_commands
from metrics.judge_figures import class_bars, score_table
from metrics.page import Html, bars, gallery, page, picture, table, tag

EVIL = "<script>alert('x' & \"y\")</script>"
SIZE = (64, 128)


class Read(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


# -- elements ---------------------------------------------------------------------------------------------


def test_text_is_escaped_wherever_it_is_put() -> None:
    parts = [
        tag("p", EVIL),
        picture(EVIL, EVIL, EVIL),
        gallery([EVIL], 1),
        table([EVIL, EVIL], [[EVIL, EVIL]]),
        bars([(EVIL, EVIL, [0.5])], [(EVIL, 0)]),
        line_chart([Line(EVIL, [(0, 1), (1, 2)], 0)], x_name=EVIL, y_name=EVIL, mark=(0, EVIL)),
    ]
    content = page(EVIL, [EVIL], [(EVIL, EVIL, parts)])
    read = Read(content)
    assert not read.all("script")
    assert read.all("img")[0]["src"] == read.all("img")[0]["alt"] == EVIL
    # title, heading, lead, link, heading of the section, p, caption, gallery, 4 cells, 2 of the bars, and of
    # the chart the line, its legend, the mark and two axes
    assert read.text.count(EVIL) == 19
    assert {"onerror", "onload", "onclick"}.isdisjoint(key for _, found in read.elements for key in found)


def test_markup_of_ours_is_kept_and_what_is_made_of_it_is_text_again() -> None:
    bold = tag("b", "a < b")
    assert tag("p", bold, " & c") == "<p><b>a &lt; b</b> &amp; c</p>"
    assert tag("p", bold + " & c") == "<p>&lt;b&gt;a &amp;lt; b&lt;/b&gt; &amp; c</p>", (
        "a sum is no longer Html"
    )
    assert isinstance(bold, Html)
    assert tag("img", data_x="1 & 2", class_="c") == '<img data-x="1 &amp; 2" class="c"/>'


@pytest.mark.parametrize("value", [0.0, 0.273, 1.0])
def test_a_bar_is_as_long_as_its_value_and_none_is_none(value: float) -> None:
    read = Read(bars([("road", "rgb(1, 2, 3)", [value, None])], [("a", 0), ("b", 2)]))
    lengths = [s["style"] for s in read.all("span") if s.get("class") == "bar"]
    assert lengths == [
        f"width: {100 * value:.1f}%; background: var(--series-0)",
        "width: 0.0%; background: var(--series-2)",
    ]
    assert f"{value:.2f}-" in read.text


# -- charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.352, 0.481), (-2.3, 7.1), (0, 300), (1e-9, 3e-9), (5, 5), (0, 0), (-1e6, 3)]
)
def test_ticks_are_round_even_few_and_enclose(low: float, high: float) -> None:
    ticks = np.array(nice_ticks(low, high))
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert np.allclose(steps, steps[0])
    digit = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert np.isclose(digit, [1, 2, 5]).any()
    assert np.allclose(ticks / steps[0], np.round(ticks / steps[0])), "multiples of the step"
    if high > low:
        assert ticks[1] > low
        assert ticks[-2] < high


def drawn(chart: str) -> ElementTree.Element:
    """Return the SVG of a chart, read as XML."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", chart)[0])


def numbers(text: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])


def test_points_lie_where_the_figures_at_the_axes_say() -> None:
    rng = np.random.default_rng(0)
    points = [(10.0 * i, float(y)) for i, y in enumerate(rng.uniform(-3, 4, 12))]
    svg = drawn(line_chart([Line("a", points, 1), Line("b", [(0, 3.3)], 2)], x_name="step", y_name="loss"))
    pixels = numbers(svg.findall(".//polyline")[0].get("points"))
    labels = [(float(t.get("x")), float(t.get("y")), t.text) for t in svg.findall(".//text")]
    ys = {float(text): y - 4 for x, y, text in labels if x == 50}  # right of them the frame begins, at 58
    xs = {float(text): x for x, y, text in labels if y == HEIGHT - 44 + 18}
    assert len(ys) >= 3
    assert len(xs) >= 3
    for axis, ticks, values in ((0, xs, [p[0] for p in points]), (1, ys, [p[1] for p in points])):
        slope, offset = np.polyfit(list(ticks), list(ticks.values()), 1)
        assert np.allclose(slope * np.array(values) + offset, pixels[:, axis], atol=0.02)
    assert pixels.min() >= 0
    assert (pixels <= (WIDTH, HEIGHT)).all()
    assert np.argmax(pixels[:, 1]) == np.argmin([y for _, y in points]), "up is more"


def test_bars_of_errors_mark_and_what_is_not_finite() -> None:
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0), (float("inf"), 1.0)]
    line = Line("a", points, 1, [0.5, 1, float("nan"), 1])
    svg = drawn(line_chart([line], x_name="x", y_name="y", mark=(2, "here")))
    (polyline,) = svg.findall(".//polyline")
    assert len(numbers(polyline.get("points"))) == 2
    (bar,) = [stroke for stroke in svg.findall(".//line") if stroke.get("stroke-opacity")]
    y = numbers(polyline.get("points"))[:, 1]
    per_unit = (y[0] - y[1]) / 2
    assert float(bar.get("y1")) - float(bar.get("y2")) == pytest.approx(per_unit, abs=0.02)
    (mark,) = [stroke for stroke in svg.findall(".//line") if stroke.get("stroke-dasharray")]
    assert float(mark.get("x1")) == numbers(polyline.get("points"))[1, 0]
    (words,) = [text for text in svg.findall(".//text") if text.text == "here"]
    assert words.get("text-anchor") == "end", "the right half has its words on the left"
    assert "no figures yet" in line_chart([Line("a", [], 1)], x_name="x", y_name="y")


# -- what is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (2, 1)])
def test_cutting_is_the_inverse_of_a_sheet(rows: int, columns: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (rows, columns, *SIZE, 3), np.uint8)
    found = cut(sheet([list(row) for row in pictures]), SIZE)
    assert np.array_equal(np.array(found), pictures)


def test_commands_have_the_time_until_the_next_one(tmp_path: Path) -> None:
    assert read_commands(tmp_path / "none.tsv") == {}
    (tmp_path / "c.tsv").write_text("100\ta\tx\t--y\n107\tb\tz\n110\ta\tw\n", encoding="utf-8")
    assert read_commands(tmp_path / "c.tsv") == {"a": [("x\t--y", 7.0), ("w", None)], "b": [("z", 3.0)]}


# -- the page ---------------------------------------------------------------------------------------------


def card(level: float) -> dict[str, Any]:
    """Return a card of samples as tool_judge_streets.py writes it, as far as the page needs it."""

    def scores(miou: float) -> dict[str, Any]:
        iou = dict.fromkeys(LabelSpace.load("cityscapes").names, miou) | {"train": None}
        return {"miou": miou, "miou_interval": [miou - 0.01, miou + 0.01], "pixel_accuracy": 0.9, "iou": iou}

    return {
        "ceiling": scores(0.8),
        "segmentation": scores(level),
        "shuffled": scores(0.1),
        "ratio": {"miou": level / 0.8},
        "condition": {"accuracy": 0.75},
        "feature_distance": {"distance": 0.321},
    }


def test_the_judges_figures_are_those_of_the_cards() -> None:
    cards = {"shipped": card(0.5), "fresh": {**card(0.2), "condition": None}}
    text = re.sub(r"<[^>]+>", "|", score_table(cards))
    rows = [re.split(r"\|+", row) for row in text.split("control")]
    assert "0.800" in rows[0]
    assert {"0.500", "0.490 to 0.510", "62%", "0.750", "0.321"} <= set(rows[1])
    assert {"0.200", "25%", "-"} <= set(rows[3])
    chart = Read(class_bars(cards))
    lengths = [s["style"] for s in chart.all("span") if s.get("class") == "bar"]
    assert len(lengths) == 19 * 3
    assert lengths[:3] == [
        f"width: {w}%; background: var(--series-{i})" for i, w in enumerate((80.0, 50.0, 20.0))
    ]
    swatches = [str(span["style"]) for span in chart.all("span") if span.get("class") == "swatch"]
    assert swatches[3] == "background: rgb(128, 64, 128)", "road, the first class, has the colour of the maps"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a demo has filled, with photos for samples."""
    folder = tmp_path_factory.mktemp("demo")
    make_tree(folder / "streets", Plan(train=2, val=10, size=SIZE), workers=1)
    make_tree(folder / "streets_game", Plan(domain="game", train=0, val=5, size=SIZE), workers=1)
    for name in CONDITIONS:
        make_tree(folder / "scene", Plan(conditions=(name,), train=0, val=1, size=SIZE, seed=3), workers=1)
    for name, tree in (("fresh", "streets"), ("shipped", "streets"), ("prompts", "scene")):
        for photo in (folder / tree / "leftImg8bit/val").rglob("*.png"):
            stem = photo.name.replace("leftImg8bit.png", "gtFine_labelIds")
            target = folder / name / photo.parent.name / f"{stem}_seed0.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, target)
    run = folder / "lightning_logs/version_0"
    (run / "image_log").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for step in (0, 5, 10, 15):
        cells = rng.integers(0, 256, (2, 4, *SIZE, 3), np.uint8)
        write_png(run / f"image_log/step={step:06d}.png", sheet([list(row) for row in cells]))
    write_lines(run / "training.jsonl", [{"step": s, "loss_simple": 1 / s} for s in (5, 10, 15)])
    write_lines(run / "validation.jsonl", [validation(s) for s in (0, 5, 10, 15)])
    (folder / "cards").mkdir()
    for name, level in (("fresh", 0.2), ("shipped", 0.5)):
        (folder / f"cards/{name}.json").write_text(json.dumps(card(level)), encoding="utf-8")
    steps = [f"100\tdata\tpython render.py {EVIL}", "130\ttraining\tpython t.py", "290\tpage\tpython p.py"]
    (folder / "commands.tsv").write_text("\n".join(steps) + "\n", encoding="utf-8")
    return folder


def validation(step: int) -> dict[str, Any]:
    """Return a line of validation.jsonl."""
    return {
        "step": step,
        "loss_simple": 0.5,
        "loss_shuffled_hint": 0.5 + step / 100,
        "adherence": step / 100,
        "adherence_error": 0.01,
        "follows_since": 5 if step >= 10 else None,
        "news": f"the model follows its hints since step 5: {EVIL}" if step == 10 else None,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def written(folder: Path, *words: str) -> Read:
    """Run the script and read its page; all it shows lies beside it, and nothing else does."""
    tool_demo_page.main([str(folder), *words])
    content = (folder / "index.html").read_text(encoding="utf-8")
    read = Read(content)
    sources = [str(image["src"]) for image in read.all("img")]
    assert len(set(sources)) == len(sources)
    assert {folder / source for source in sources} == set((folder / "pictures").iterdir())
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"<p>.*?</p>", "", content)), (
        "nothing from elsewhere"
    )
    assert {name for name, _ in read.elements}.isdisjoint({"script", "link", "iframe", "object", "base"})
    anchors = {link["href"] for link in read.all("a")}
    assert anchors == {f"#{part['id']}" for part in read.all("section")}
    return read


def test_the_page_tells_the_whole_story(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = written(demo)
    assert capsys.readouterr().out == f"open {demo / 'index.html'}\n"
    assert "Not here yet" not in read.text
    for words in (
        "2 frames to train on and 10 to validate",
        f"python render.py {EVIL}",
        "took 30 s",
        "took 2 min 40 s",
        "in 3 min 10 s",
        f"follows its hints since step 5: {EVIL}",
        "follows its maps since step 5",
        "0.490 to 0.510",
        "at night with",
        "a game picture of",
    ):
        assert words in read.text, words
    captions = json.loads((demo / "scene/captions.json").read_text(encoding="utf-8"))
    assert all(caption in read.text for caption in captions.values())


def test_pictures_are_those_of_the_folders(demo: Path) -> None:
    written(demo)

    def shown(name: str) -> np.ndarray:
        return np.asarray(Image.open(demo / f"pictures/{name}.png").convert("RGB"))

    def there(pattern: str, number: int = 0) -> np.ndarray:
        return np.asarray(Image.open(sorted(demo.glob(pattern))[number]).convert("RGB"))

    for name in CONDITIONS:
        assert np.array_equal(shown(f"camera_{name}"), there(f"streets/leftImg8bit/val/camera-{name}/*.png"))
        assert np.array_equal(shown(f"game_{name}"), there(f"streets_game/leftImg8bit/val/game-{name}/*.png"))
        assert np.array_equal(shown(f"prompt_{name}"), there(f"prompts/camera-{name}/*.png"))
        second = [there(f"{part}/camera-{name}/*.png", 1) for part in ("fresh", "shipped")]
        colours = shown(f"sample_{name}_0")
        assert np.array_equal(shown(f"sample_{name}_1"), second[0])
        assert np.array_equal(shown(f"sample_{name}_2"), second[1])
        assert np.abs(shown(f"sample_{name}_3") - (second[1].astype(float) + colours) / 2).max() <= 0.5
    grids = [there(f"lightning_logs/version_0/image_log/step={s:06d}.png") for s in (0, 10, 15)]
    second_row = slice(SIZE[0] + 4, None)
    for column, grid in enumerate(grids, start=1):
        assert np.array_equal(shown(f"grid1_{column}"), grid[second_row, SIZE[1] + 4 : 2 * SIZE[1] + 4])
    assert np.array_equal(shown("grid1_0"), grids[0][second_row, : SIZE[1]])
    assert np.array_equal(shown("grid1_4"), grids[0][second_row, 3 * (SIZE[1] + 4) :])


def test_a_second_page_holds_nothing_of_the_first(demo: Path) -> None:
    written(demo)
    first = (demo / "index.html").read_text(encoding="utf-8")
    (demo / "pictures/grid9_old.png").touch()
    written(demo)  # looks for pictures that the page does not show
    assert (demo / "index.html").read_text(encoding="utf-8") == first


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("streets", "python tool_make_streets.py --out"),
        ("lightning_logs", "curves in"),
        ("lightning_logs/version_0/image_log", "sample grids in"),
        ("fresh", "samples of both controls"),
        ("prompts", "samples of one map"),
        ("cards/fresh.json", "python tool_judge_streets.py --images"),
        ("cards", "python tool_judge_streets.py --images"),
        ("commands.tsv", None),
        ("streets_game", None),
        ("lightning_logs/version_0/training.jsonl", None),
        ("lightning_logs/version_0/validation.jsonl", None),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_told(
    demo: Path, tmp_path: Path, lost: str, said: str | None
) -> None:
    for part in demo.iterdir():
        if part.name not in ("pictures", "index.html"):
            (shutil.copytree if part.is_dir() else shutil.copy)(part, tmp_path / part.name)
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    read = written(tmp_path)
    assert len(read.all("section")) == 6
    assert (said in read.text) if said else ("Not here yet" not in read.text)


def test_an_empty_folder_gives_a_page_of_commands_and_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = written(tmp_path)
    assert read.text.count("Not here yet") == 7
    for words in ([str(tmp_path / "none")], [str(tmp_path), "--run", str(tmp_path / "none")]):
        with pytest.raises(SystemExit) as exit_info:
            tool_demo_page.main(words)
        assert exit_info.value.code == 2
        assert "none" in capsys.readouterr().err


def test_a_training_that_does_not_follow_yet_says_so(demo: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "validation.jsonl", [{**validation(s), "news": None} for s in (0, 5)])
    assert "not yet clearly above 0 in these 5 steps" in written(demo, "--run", str(tmp_path)).text
