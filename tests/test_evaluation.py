"""The evaluation as a whole: the script on a small tree, against the engines' own figures of these files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_samples import JUDGE, SIZE, VALIDATION, SmallEvaluation, write_protocol
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import evaluate as script
import tool_judge_streets
from datasets.files import read_image
from datasets.streets.dataset import StreetsDataset
from metrics.judge import StreetsJudge

Evaluated = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallEvaluation:
    return SmallEvaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def evaluated(small: SmallEvaluation) -> Evaluated:
    out = small.folder / "whole"
    return out, small.card(out)


def files_of(small: SmallEvaluation) -> tuple[list[Path], list[Path], list[np.ndarray]]:
    """Return generated images, their photos and their maps."""
    photos, maps = (
        StreetsDataset.find_photos(small.tree, "val"),
        StreetsDataset.label_maps(small.tree, "val"),
    )
    fakes = sorted(path for path in small.fake.rglob("*_seed*.png"))
    keys = [path.name.partition("_gtFine")[0] for path in fakes]
    truth = [StreetsDataset.read_train_ids(maps[key]) for key in keys]
    return fakes, [photos[key] for key in keys], truth


def test_fid_and_kid_are_those_of_torch_fidelitys_own_command(
    small: SmallEvaluation, evaluated: Evaluated, tmp_path: Path
) -> None:
    import torch_fidelity

    fakes, photos, _ = files_of(small)
    for name, paths in (("fake", fakes), ("real", dict.fromkeys(photos))):
        (tmp_path / name).mkdir()
        for i, path in enumerate(paths):
            shutil.copy(path, tmp_path / name / f"{i:03d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "real"),
        input2=str(tmp_path / "fake"),
        cuda=False,
        fid=True,
        kid=True,
        kid_subsets=10,
        kid_subset_size=5,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor_weights_path=str(small.inception),
        cache=False,
        verbose=False,
    )
    found = evaluated[1]["metrics"]
    assert expected["frechet_inception_distance"] > 1e-3
    assert found["fid"]["distance"] == pytest.approx(expected["frechet_inception_distance"], abs=1e-6)
    assert (found["fid"]["real"], found["fid"]["generated"]) == (VALIDATION, 2 * VALIDATION)
    assert found["kid"]["mean"] == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert found["kid"]["deviation"] == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)


def test_scores_are_those_of_torchmetrics_on_the_judges_maps(
    small: SmallEvaluation, evaluated: Evaluated
) -> None:
    fakes, _, truth = files_of(small)
    predicted = StreetsJudge.load(JUDGE)(np.stack([read_image(path) for path in fakes]))
    p, t = torch.from_numpy(predicted).long(), torch.from_numpy(np.stack(truth)).long()
    found = evaluated[1]["metrics"]["segmentation"]["samples"]
    present = sorted(set(t.unique().tolist()) - {255})
    jaccard = MulticlassJaccardIndex(19, ignore_index=255, average="none")(p, t)
    recall = MulticlassAccuracy(19, ignore_index=255, average="none")(p, t)
    assert found["miou"] == pytest.approx(jaccard[present].mean().item(), abs=1e-6)
    assert found["miou_absent_as_zero"] == pytest.approx(jaccard[present].sum().item() / 19, abs=1e-6)
    assert found["class_accuracy"] == pytest.approx(recall[present].mean().item(), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx((p == t)[t != 255].double().mean().item())
    assert found["pixel_accuracy_with_void"] == pytest.approx((p == t).double().mean().item())
    assert len(found["absent"]) == 19 - len(present)
    assert (found["images"], found["maps"]) == (2 * VALIDATION, VALIDATION)


def test_scores_ceiling_and_feature_distance_are_those_of_the_judges_own_script(
    small: SmallEvaluation, evaluated: Evaluated, tmp_path: Path
) -> None:
    words = [
        "--images",
        small.fake,
        "--labels",
        small.tree,
        "--judge",
        JUDGE,
        "--out",
        tmp_path / "card.json",
    ]
    tool_judge_streets.main([str(word) for word in words])
    expected = json.loads((tmp_path / "card.json").read_text())
    found = evaluated[1]["metrics"]
    assert found["segmentation"]["samples"]["miou"] == pytest.approx(expected["segmentation"]["miou"])
    assert found["segmentation"]["ceiling"]["iou"] == pytest.approx(expected["ceiling"]["iou"])
    assert found["segmentation"]["ratio"]["miou"] == pytest.approx(expected["ratio"]["miou"])
    distance = expected["feature_distance"]["distance"]
    assert found["streets_features"]["distance"] == pytest.approx(distance, rel=1e-4)


def test_the_card_says_what_decides_the_figures(small: SmallEvaluation, evaluated: Evaluated) -> None:
    out, card = evaluated
    assert card["protocol"]["size"] == list(SIZE)
    assert card["generation"]["steps"] == 20
    assert card["generation"]["checkpoint"] == "control.safetensors"
    assert card["generation"]["seed"]["different"] == 2
    assert card["generation"]["prompt"]["different"] == VALIDATION
    assert card["generated"]["samples_of_a_map"] == [2]
    assert card["leaks"] == {"status": "clean", "against": "streets, split train", "maps": 3, "leaked": []}
    assert card["renderer"]["size"] == list(SIZE)
    assert card["real"]["count"] == card["maps"]["count"] == VALIDATION
    assert len(card["measured_by"]["fid"]["weights"]) == 64
    assert card["left_out"] == {}
    assert str(small.folder) not in json.dumps(card), "a card tells nothing of the machine"
    page = (out / "index.html").read_text()
    assert "http" not in page.replace("https://github.com", "")
    for name in ("Figures", "Classes", "Best and worst", "Confusion", "motorcycle"):
        assert name in page
    shown = [line.partition('"')[0] for line in page.split('src="')[1:]]
    assert all((out / path).is_file() for path in shown)
    assert len(shown) > 10


@pytest.mark.slow
def test_shards_and_a_resumed_run_give_the_card_of_one_pass(
    small: SmallEvaluation,
    evaluated: Evaluated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metrics.blocks.BLOCK", 3)
    cache = ("--cache", tmp_path / "cache")
    script.main(small.words(tmp_path / "a", *cache, "--shard", "2/2"))
    assert not (tmp_path / "a").exists()
    computed = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    script.main(small.words(tmp_path / "a", *cache, "--shard", "1/2"))
    victim = sorted(computed)[0]
    victim.write_bytes(victim.read_bytes()[:-7])  # as a full disk leaves behind
    card = small.card(tmp_path / "a", *cache)
    kept = [path for path, time in computed.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == len(computed) - 1
    ours, whole = card["metrics"], evaluated[1]["metrics"]
    for name, figure in (("fid", "distance"), ("streets_features", "distance"), ("diversity", "lpips")):
        assert ours[name][figure] == pytest.approx(whole[name][figure], rel=1e-5)
    assert ours["segmentation"] == whole["segmentation"]
    assert ours["kid"]["mean"] == pytest.approx(whole["kid"]["mean"], abs=1e-6)


def test_nothing_is_computed_twice(
    small: SmallEvaluation, evaluated: Evaluated, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a block that is in the cache was read again")

    monkeypatch.setattr("metrics.blocks.read_block", fail)
    assert small.card(tmp_path / "again")["metrics"] == evaluated[1]["metrics"]


def test_without_weights_the_rest_is_computed_and_the_file_is_named(
    small: SmallEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = small.card(tmp_path, weights=False)
    assert set(card["left_out"]) == {"fid", "kid", "diversity"}
    assert set(card["metrics"]) == {"segmentation", "streets_features"}
    said = capsys.readouterr().out
    assert "models/weights-inception-2015-12-05-6726825d.pth" in said
    assert "obtain it from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said


@pytest.mark.slow
def test_one_sample_of_a_map_counts_where_the_protocol_says_so(
    small: SmallEvaluation, tmp_path: Path
) -> None:
    protocol = write_protocol(tmp_path / "one.yaml", samples=1)
    card = small.card(tmp_path / "out", "--protocol", protocol)
    assert card["generated"]["count"] == card["metrics"]["fid"]["generated"] == VALIDATION
    assert card["generated"]["samples_for_diversity"] == [2]
    assert card["metrics"]["diversity"]["maps"] == VALIDATION
