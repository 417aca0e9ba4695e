"""Protocols, the table of weights, and the comparison of cards."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import write_protocol
from house import ROOT

import evaluate as script
from datasets import DATASETS
from metrics.compare import compare, differences
from metrics.local_weights import WEIGHTS, MissingWeights, find_weights
from metrics.protocol import (
    FILTERS,
    METRICS,
    SEGMENTERS,
    Least,
    frozen_part,
    load_protocol,
    names_of_protocols,
    track_of,
    with_few,
)

DOCUMENT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", names_of_protocols())
def test_a_shipped_protocol_fits_its_data_sets(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    for dataset in protocol.data:
        track = track_of(protocol, dataset)
        assert track.label_space == DATASETS[dataset].label_space
        assert all(side % 64 == 0 for side in track.size)
        assert track.segmenter.weights is None or track.segmenter.weights in WEIGHTS
    assert set(vars(Least())) == set(METRICS)
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"resize": "cubic"},
            "resize: unknown value 'cubic': expected one of bicubic,.* did you mean 'bicubic'",
        ),
        ({"metrics": "[fid, miou]"}, "metrics: unknown value 'miou'"),
        ({"kid_subsets": "0"}, "kid_subsets: expected 1 or more, found 0"),
        ({"kid_subsets": "many"}, "could not be converted to Integer"),
        ({"least": "{fud: 3}"}, "expected a protocol such as configs/protocols/native.yaml.*fud"),
        ({"name": "[1"}, "expected a protocol"),
    ],
)
def test_a_wrong_protocol_gets_one_sentence(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_protocol(write_protocol(tmp_path / "p.yaml", **changes))
    assert "\n" not in str(caught.value)


def test_a_data_set_that_a_protocol_does_not_know_is_named() -> None:
    with pytest.raises(
        ValueError, match="protocol streets says nothing of data set 'ade20k', only of streets"
    ):
        track_of(load_protocol("streets"), "ade20k")


def test_few_images_make_another_protocol() -> None:
    protocol = load_protocol("native")
    few = with_few(protocol)
    assert set(vars(few.least).values()) == {2}
    assert frozen_part(few, "ade20k") != frozen_part(protocol, "ade20k")
    assert vars(few) | {"least": protocol.least} == vars(protocol)
    assert {"size": [512, 512], "dataset": "ade20k"}.items() <= frozen_part(few, "ade20k").items()


def test_the_document_has_the_table_of_weights_and_names_what_protocols_may_say() -> None:
    for row in WEIGHTS.values():
        assert f"`{row.path}`" in DOCUMENT
        assert row.sha256 is None or row.sha256 in DOCUMENT
        assert row.licence in DOCUMENT
    assert [word for word in (*FILTERS, *METRICS, *SEGMENTERS) if f"`{word}`" not in DOCUMENT] == []


def test_weights_that_are_missing_or_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metrics.local_weights.project_path", lambda name: tmp_path / Path(name).name)
    with pytest.raises(
        MissingWeights, match=r"found no models/weights-inception.*obtain it from https://.*put it"
    ):
        find_weights("inception")
    (tmp_path / Path(WEIGHTS["inception"].path).name).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"expected the file with sha256 6726825d0af5\.\.\., found"):
        find_weights("inception")
    with pytest.raises(MissingWeights, match="--alexnet nowhere does not exist"):
        find_weights("alexnet", Path("nowhere"))
    assert find_weights("alexnet", tmp_path) == tmp_path


# -- comparison ----------------------------------------------------------------------------------------------

CARD: dict[str, Any] = {
    "protocol": {"name": "native", "version": 1, "size": [512, 1024]},
    "measured_by": {"fid": {"weights": "a" * 64}, "segmentation": {"size": [512, 1024]}},
    "real": {"count": 500, "sha256": "b" * 64},
    "maps": {"count": 500, "sha256": "c" * 64, "keys_sha256": "d" * 64},
    "generated": {"samples_of_a_map": [1]},
    "generation": {"steps": 20},
    "leaks": {"status": "clean"},
    "metrics": {
        "fid": {"distance": 12.345},
        "segmentation": {
            "samples": {"miou": 0.5, "intervals": {"miou": [0.4, 0.6]}, "pixel_accuracy": 0.9},
            "ceiling": {"miou": 0.8},
            "ratio": {"miou": 0.625, "interval": None},
        },
    },
}


def write_cards(folder: Path, *cards: dict[str, Any]) -> list[Path]:
    paths = [folder / f"run_{i}" / "card.json" for i in range(len(cards))]
    for path, card in zip(paths, cards, strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps(card))
    return paths


def changed(path: str, value: Any) -> dict[str, Any]:
    card = copy.deepcopy(CARD)
    *folders, last = path.split(".")
    place = card
    for name in folders:
        place = place[name]
    place[last] = value
    return card


def test_cards_of_one_protocol_become_a_table(tmp_path: Path) -> None:
    better = changed("metrics.fid.distance", 9.0)
    del better["metrics"]["segmentation"], better["measured_by"]["segmentation"]
    better["generation"]["steps"] = 50
    paths = write_cards(tmp_path, CARD, better)
    assert compare(paths, "markdown").splitlines() == [
        "|  | FID | mIoU | ceiling | ratio | pixel acc. |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| run_0 | 12.35 | 0.500 (0.400 to 0.600) | 0.800 | 0.625 | 0.900 |".replace(
            "12.35", f"{12.345:.2f}"
        ),
        "| run_1 | 9.00 | - | - | - | - |",
    ]


def test_latex_is_escaped_and_has_a_cell_for_each_column(tmp_path: Path, capsys: Any) -> None:
    paths = write_cards(tmp_path, CARD, CARD)
    script.main(["compare", *map(str, paths), "--format", "latex"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrr}"
    rows = [line for line in lines if line.endswith(r"\\")]
    assert all(line.count("&") == 5 for line in rows)
    assert rows[1].startswith(r"run\_0 & ")
    assert not re.search(r"(?<!\\)[_%#]", "".join(rows))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("protocol.size", [256, 512], r"protocol\.size is \[512, 1024\] and \[256, 512\]"),
        ("real.sha256", "e" * 64, r'real\.sha256 is "bbbbbbbbbbbb\.\.\. and "eeeeeeeeeeee\.\.\.'),
        ("maps.count", 250, r"maps\.count is 500 and 250"),
        ("generated.samples_of_a_map", [5], r"samples_of_a_map is \[1\] and \[5\]"),
        ("measured_by.fid.weights", "f" * 64, r"measured_by\.fid\.weights is"),
        ("leaks.status", "leaked", "leaks is false and true"),
    ],
)
def test_cards_that_do_not_compare_are_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, value: Any, said: str
) -> None:
    paths = write_cards(tmp_path, CARD, changed(path, value))
    with pytest.raises(SystemExit) as left:
        script.main(["compare", *map(str, paths)])
    assert left.value.code == 2
    assert re.search(f"do not compare: {said}", capsys.readouterr().err)


def test_how_images_were_generated_may_differ(tmp_path: Path) -> None:
    assert differences(CARD, changed("generation.steps", 7)) == []
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json: expected a card of evaluate\.py, found other JSON"):
        compare([tmp_path / "x.json"], "markdown")
