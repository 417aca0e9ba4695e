"""The story of the demo in pictures: what each section of its page shows, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cldm.pictures import Rgb, overlay, write_png
from datasets.files import read_image
from datasets.streets.dataset import StreetsDataset
from datasets.streets.tree import CARD
from metrics.demo_inputs import (
    Frame,
    Steps,
    cut,
    frames_of,
    one_of_each,
    read_card,
    sample_of,
)
from metrics.judge_figures import CONTROLS, class_bars, score_table
from metrics.page import Html, command, gallery, missing, page, picture, tag
from metrics.training_figures import curves, read_lines, verdict

TITLE = "SceneControl: from label maps to street scenes"
DEMO = "make demo"


class Story(NamedTuple):
    """What the sections share."""

    at: Mapping[str, Path]  # the parts by the flags of tool_demo_page.py
    folder: Path  # of the pictures, beside the page
    steps: Steps

    def show(self, name: str, image: Rgb, caption: str) -> Html:
        """Write a picture and put it on the page."""
        write_png(self.folder / f"{name}.png", image)
        return picture(f"{self.folder.name}/{name}.png", caption, caption)

    def commands(self, section: str) -> list[Html]:
        """What was run for a section, and how long each command took."""
        return [
            command(text, "" if seconds is None else f"took {duration(seconds)}")
            for text, seconds in self.steps.get(section, ())
        ]


def tell(story: Story) -> str:
    """The whole page; writes its pictures."""
    sections = [
        ("data", "The data", data_section(story)),
        ("training", "The training", training_section(story)),
        ("samples", "The samples", samples_section(story)),
        ("judge", "The judge", judge_section(story)),
        ("prompts", "The prompts", prompts_section(story)),
        ("next", "What next", next_section()),
    ]
    total = sum(seconds or 0 for steps in story.steps.values() for _, seconds in steps)
    made = f" Everything below was made on this machine in {duration(total)}." if total else ""
    lead = (
        "A label map says what is where: road, car, tree, sky. ControlNet makes a picture of it, in the "
        "weather that the prompt names. This page shows each step of that on Streets, a small rendered world "
        f"in which everything can be tried on a CPU, without downloads.{made}"
    )
    return page(TITLE, [tag("p", lead), *hero(story)], sections)


def duration(seconds: float) -> str:
    """Such as 40 s, or 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def hero(story: Story) -> list[Html]:
    """The picture that says it all: a map, and what became of it under five prompts."""
    pairs = prompted(story)
    if not pairs:
        return []
    shown = [story.show("hero_map", pairs[0][0].colours(), "a label map")]
    shown += [story.show(f"hero_{f.condition}", read_image(sample), f.condition) for f, sample in pairs]
    return [gallery(shown, 3, wraps=True)]


def prompted(story: Story) -> list[tuple[Frame, Path]]:
    """The scene under each condition, with the sample that its caption led to."""
    frames = one_of_each(frames_of(story.at["scene"]))
    found = [(frame, sample_of(story.at["prompts"], frame)) for frame in frames]
    return [(frame, sample) for frame, sample in found if sample is not None]


# -- the data ---------------------------------------------------------------------------------------------


def data_section(story: Story) -> list[Html]:
    """Maps, photos and captions: five conditions, two domains."""
    root = story.at["data"]
    frames = frames_of(root)
    if not frames:
        return [missing(f"rendered frames in {root}", f"python tool_make_streets.py --out {root}")]
    columns = one_of_each(frames)
    games = {game.scene: game for game in frames_of(story.at["game"])}
    played = [games[frame.scene] for frame in columns if frame.scene in games]
    rows = [story.show(f"map_{f.condition}", f.colours(), f"map, {f.condition}") for f in columns]
    for name, some in (("camera", columns), ("game", played)):
        rows += [story.show(f"{name}_{f.condition}", read_image(f.photo), f.caption) for f in some]
    return [tag("p", describe(root, len(frames))), gallery(rows, len(columns)), *story.commands("data")]


def describe(root: Path, validation: int) -> str:
    """What the frames are."""
    training = len(StreetsDataset.find_photos(root, "train"))
    card = json.loads((root / CARD).read_text(encoding="utf-8"))
    height, width = card["size"]
    return (
        f"{training} frames to train on and {validation} to validate, {height} by {width} pixels, each drawn "
        f"from a seed by renderer {card['renderer']}. Where things are is one matter, how they look another: "
        "the same layout can be seen by a camera or in a game, on a clear day or at night, and its labels "
        "are exact. The captions are the prompts of the training."
    )


# -- the training -----------------------------------------------------------------------------------------


def training_section(story: Story) -> list[Html]:
    """The curves, the line that was printed, and the sample grid before, during and after."""
    run = story.at["run"]
    training, validation = (read_lines(run / name) for name in ("training.jsonl", "validation.jsonl"))
    text = (
        "The base draws streets and knows nothing of maps. A copy of its encoder, joined to it by "
        "convolutions that start at zero, learns to read them, while the base stays as it is. Adherence is "
        "the part of the loss that is gone because the map is the right one and not that of another scene; "
        "it is 0 as long as maps are ignored."
    )
    shown = curves(training, validation) if training or validation else missing(f"curves in {run}", DEMO)
    return [
        tag("p", text),
        shown,
        *verdict(validation),
        *progress(story),
        *story.commands("training"),
    ]


def progress(story: Story) -> list[Html]:
    """What the model made of the same maps from the same noise as it learned."""
    grids = sorted((story.at["run"] / "image_log").glob("step=*.png"))
    frames = frames_of(story.at["data"])
    if not grids or not frames:
        return [missing(f"sample grids in {story.at['run']}", DEMO)]
    chosen = [grids[i] for i in sorted({0, len(grids) // 2, len(grids) - 1})]
    cells = [cut(read_image(path), frames[0].colours().shape[:2]) for path in chosen]
    shown = []
    for i, (colours, _, _, photo) in enumerate(cells[0]):
        images = {"map": colours}
        images |= {f"step {int(path.stem[5:])}": grid[i][1] for path, grid in zip(chosen, cells, strict=True)}
        images["photo"] = photo
        shown += [story.show(f"grid{i}_{j}", image, name) for j, (name, image) in enumerate(images.items())]
    title = tag("h3", "The same maps, prompts and noise before, during and after")
    return [title, gallery(shown, len(chosen) + 2)]


# -- the samples ------------------------------------------------------------------------------------------


def samples_section(story: Story) -> list[Html]:
    """Fresh control and shipped control on the same maps."""
    shown = []
    for frame in one_of_each(frames_of(story.at["data"]), number=1):
        fresh, shipped = (sample_of(story.at[name], frame) for name in ("fresh", "shipped"))
        if fresh is not None and shipped is not None:
            shown += sample_row(story, frame, read_image(fresh), read_image(shipped))
    if not shown:
        return [missing("samples of both controls for the same validation maps", DEMO)]
    text = (
        "Maps that no training has seen. The fresh control is the one that was trained above for some "
        "minutes, the shipped one was trained for longer. The photo is the renderer's own: a sample need not "
        "look like it, but must show the same things in the same places, in the weather of the prompt."
    )
    return [tag("p", text), gallery(shown, 5), *story.commands("samples")]


def sample_row(story: Story, frame: Frame, fresh: Rgb, shipped: Rgb) -> list[Html]:
    """Map, both samples, how the better one lies under the map, and the photo."""
    colours = frame.colours()
    row = [
        (colours, f"map, {frame.condition}"),
        (fresh, "fresh control"),
        (shipped, "shipped control"),
        (overlay(shipped, colours), "shipped, under the map"),
        (read_image(frame.photo), "photo"),
    ]
    return [story.show(f"sample_{frame.condition}_{i}", *cell) for i, cell in enumerate(row)]


# -- the judge --------------------------------------------------------------------------------------------


def judge_section(story: Story) -> list[Html]:
    """A segmenter's figures on samples and photos."""
    cards = {name: read_card(story.at["cards"] / f"{name}.json") for name in CONTROLS}
    text = (
        "A small segmenter, trained on photos alone, is asked what it sees in a sample. The more of the map "
        "it finds again, the better the sample follows it: the mean of the classes' intersection over union, "
        "mIoU, is 1 when every pixel is as the map says. Photos are the ceiling; maps of other scenes show "
        "what chance gives. It is also asked for the weather, and how far what it sees is from what it sees "
        "in photos."
    )
    absent = [
        missing(
            f"the judge's card of the {name} control",
            f"python tool_judge_streets.py --images {story.at[name]} --labels {story.at['data']} "
            f"--out {story.at['cards'] / f'{name}.json'}",
        )
        for name, card in cards.items()
        if not card
    ]
    known = {name: card for name, card in cards.items() if card}
    figures = [score_table(known), class_bars(known)] if known else []
    return [tag("p", text), *figures, *absent, *story.commands("judge")]


# -- the prompts ------------------------------------------------------------------------------------------


def prompts_section(story: Story) -> list[Html]:
    """One map under the prompts of five conditions."""
    pairs = prompted(story)
    if not pairs:
        return [missing("samples of one map under five prompts", DEMO)]
    frames = [frame for frame, _ in pairs]
    shown = [story.show(f"prompt_{f.condition}", read_image(sample), f.caption) for f, sample in pairs]
    shown += [
        story.show(f"prompt_{f.condition}_photo", read_image(f.photo), f"photo, {f.condition}")
        for f in frames
    ]
    text = (
        "One map, one seed, the shipped control: only the words change. Below each sample its prompt, and in "
        "the second row what the renderer draws for it."
    )
    return [tag("p", text), gallery(shown, len(frames)), *story.commands("prompts")]


def next_section() -> list[Html]:
    """Where to go from here."""
    steps = [
        ("paint or choose a map and see its picture, in the browser", "python gradio_seg2image.py"),
        ("train a control on Streets for as long as you like", "python tutorial_train.py --dataset streets"),
        ("the same on Cityscapes, once its files and weights are here", "python tool_doctor.py"),
    ]
    parts = [Html(tag("p", what[0].upper() + what[1:] + ":") + command(text)) for what, text in steps]
    read = "README.md has the four real commands, docs/architecture.md shows where things are in the code."
    return [*parts, tag("p", read)]
