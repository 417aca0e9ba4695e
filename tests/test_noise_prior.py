"""noise_prior.py on rendered streets: each image encoded once, and the same file whatever the way to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import ROOT
from torch import Tensor

import noise_prior
from cldm import prior_parts, prior_pass
from cldm.cache import write_samples
from cldm.cldm import ControlLDM
from cldm.prior_file import (
    Prior,
    check_fits,
    joined,
    missing_of,
    read_card,
    read_prior,
    read_whole,
    write_prior,
)
from cldm.prior_parts import find_parts, split
from cldm.prior_pass import encoder_fingerprint, load_first_stage
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes
from datasets.cached import ViewRows, collate_rows, identity_of_rows
from datasets.framing import Views
from datasets.label_space import resize_labels
from datasets.streets.dataset import StreetsDataset
from datasets.streets.tree import Plan, make_tree
from ldm.models.autoencoder import AutoencoderKL
from ldm.priors.moments import LatentMoments

FRAMES, SIZE = 7, (64, 128)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streets") / "streets"
    make_tree(root, Plan("camera", size=SIZE, train=FRAMES, val=2), workers=1)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_model_once: ControlLDM) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_tensors(path, tiny_model_once.state_dict())
    return path


@pytest.fixture
def call(tree: Path, weights: Path, tiny_yaml: Path, tmp_path: Path) -> Iterator[Any]:
    """Run the script on the tree; returns the path that it names."""

    def run(*flags: Any, out: str = "out", save_name: str = "prior") -> Path:
        argv = ["--dataset", "streets", "--root", tree, "--ckpt", weights, "--config", tiny_yaml]
        argv += ["--resolution", *SIZE, "--batch_size", 2, "--save_dir", tmp_path / out, "--device", "cpu"]
        noise_prior.main([*map(str, argv), "--save_name", save_name, *map(str, flags)])
        return tmp_path / out / "streets" / f"{save_name}.safetensors"

    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of different images of each call of an encoder; a short batch is filled up with copies."""
    sizes: list[int] = []
    encode = AutoencoderKL.encode

    def counting(self: AutoencoderKL, x: Tensor) -> Any:
        sizes.append(len(x.flatten(1).unique(dim=0)))
        return encode(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    return sizes


def assert_same(a: Path, b: Path, rtol: float = 0) -> None:
    """The same moments to rounding, of the same card."""
    (one, ours), (other, theirs) = read_prior(a), read_prior(b)
    assert one == other
    for name, array in ours.arrays().items():
        np.testing.assert_allclose(theirs.arrays()[name], array, rtol=rtol, atol=rtol, err_msg=name)


# -- the pass ----------------------------------------------------------------------------------------------


def test_the_file_holds_the_moments_of_the_training_frames(
    tree: Path, call: Any, encoded: list[int], tiny_model: ControlLDM, capsys: pytest.CaptureFixture[str]
) -> None:
    path = call()
    assert sum(encoded) == FRAMES
    assert "wrote" in capsys.readouterr().out
    encoded.clear()
    call()  # there already: nothing is encoded again
    assert encoded == []
    assert "is there already" in capsys.readouterr().out
    card, moments = read_whole(path)
    assert (card.dataset, card.split, card.total, card.size) == ("streets", "train", FRAMES, SIZE)
    assert card.scale_factor == 0.18215
    assert card.classes[:2] == ("road", "sidewalk")
    assert card.first_stage == encoder_fingerprint(tiny_model.first_stage_model)
    source = StreetsDataset(tree, "train", SIZE)
    means, variances, labels = [], [], []
    for sample in (source[i] for i in range(FRAMES)):
        posterior = tiny_model.encode_first_stage(torch.from_numpy(sample["jpg"]).permute(2, 0, 1)[None])
        means.append(posterior.mean[0].double().numpy() * 0.18215)
        variances.append(posterior.var[0].double().numpy() * 0.18215**2)
        labels.append(resize_labels(sample["label"], (8, 16)))
    z, v, y = np.stack(means), np.stack(variances), np.stack(labels)
    np.testing.assert_allclose(moments.places.mean, z.mean(0).transpose(1, 2, 0), rtol=1e-4, atol=1e-5)
    expected = (z.var(0) + v.mean(0)).transpose(1, 2, 0)
    np.testing.assert_allclose(moments.places.variance, expected, rtol=1e-4)
    road = z.transpose(0, 2, 3, 1)[y == 0]
    assert moments.classes.count[0] == len(road)
    np.testing.assert_allclose(moments.classes.mean[0], road.mean(0), rtol=1e-4, atol=1e-5)
    assert (moments.joint.count == np.stack([(y == k).sum(0) for k in range(19)])).all()


def test_shards_are_merged_to_the_same_file(call: Any, encoded: list[int], tmp_path: Path) -> None:
    whole = call()
    for number in (2, 3, 1):
        call("--shard", f"{number}/3")
    shards = sorted((tmp_path / "out" / "streets").glob("prior.shard-*"))
    assert len(shards) == 3
    assert sum(encoded) == 2 * FRAMES
    with pytest.raises(CheckpointError, match="a part of a prior, 2 of 7 images"):
        read_whole(shards[0])
    noise_prior.main(["merge", str(tmp_path / "a.safetensors"), *map(str, shards[::-1])])
    assert_same(whole, tmp_path / "a.safetensors", rtol=1e-10)
    noise_prior.main(["merge", str(tmp_path / "b.safetensors"), *map(str, shards[::2])])
    assert read_card(tmp_path / "b.safetensors").covered == ((0, 2), (4, 7))
    noise_prior.main(
        ["merge", str(tmp_path / "c.safetensors"), str(tmp_path / "b.safetensors"), str(shards[1])]
    )
    assert_same(whole, tmp_path / "c.safetensors", rtol=1e-10)


def test_an_interrupted_run_goes_on_exactly(
    call: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = call(out="whole")
    take = prior_pass.posteriors

    def interrupted(*given: Any) -> Any:
        if sum(encoded) == FRAMES + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take(*given)

    monkeypatch.setattr(prior_pass, "posteriors", interrupted)
    with pytest.raises(SystemExit) as exit_:
        call()
    assert exit_.value.code == 130
    assert "stopped; what was reached is kept" in capsys.readouterr().err.splitlines()[-1]
    [part] = find_parts(whole.parents[2] / "out" / "streets" / "prior.safetensors")
    assert read_card(part).covered == ((0, 4),)  # the batch is finished first
    monkeypatch.setattr(prior_pass, "posteriors", take)
    path = call()
    assert sum(encoded) == 2 * FRAMES
    assert_same(whole, path)  # bit by bit
    assert find_parts(path) == []


def test_what_several_processes_do_is_merged_and_continued(
    call: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call(out="whole")
    done: list[tuple] = []

    def one_after_another(works: Any, first_stage: Any, report: Any) -> None:
        for work in works:
            if len(done) == 2:
                raise ValueError("a process ended")
            done.append(work.ranges)
            work.run(first_stage, report)

    monkeypatch.setattr(prior_parts, "run_all", one_after_another)
    with pytest.raises(SystemExit):
        call("--processes", 3)
    assert done == [((0, 2),), ((2, 4),)]
    done.clear()
    path = call("--processes", 2)  # fewer than before: each goes on with a part
    assert done == [((4, 5),), ((5, 7),)]
    assert sum(encoded) == 2 * FRAMES
    assert_same(whole, path, rtol=1e-10)


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(call: Any) -> None:
    assert_same(call(), call("--processes", 2, out="two"), rtol=1e-10)


@pytest.mark.slow
def test_what_a_process_meets_is_said_by_the_script(
    call: Any, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "streets"
    shutil.copytree(tree, broken)
    photo = sorted(broken.glob("leftImg8bit/train/*/*.png"))[-1]
    photo.write_bytes(photo.read_bytes()[:100])
    with pytest.raises(SystemExit):
        call("--processes", 2, "--root", broken)
    assert photo.name in capsys.readouterr().err


def test_a_cache_gives_the_same_and_nothing_is_encoded(
    tree: Path, call: Any, encoded: list[int], tiny_model: ControlLDM, tmp_path: Path
) -> None:
    source = StreetsDataset(tree, "train", SIZE)
    views, folder = Views(source.framing), tmp_path / "cache"
    identity, rows = identity_of_rows(source, views, folder), ViewRows(source, views)
    write_samples(folder, rows, collate_rows, tiny_model, identity, batch_size=2)
    encoded.clear()
    cached = call("--cache", folder, out="cached")
    assert encoded == []
    assert_same(call(), cached, rtol=1e-10)
    with pytest.raises(SystemExit):
        call("--cache", folder, "--resolution", 64, 64, out="other")


def test_frames_are_drawn_without_replacement_by_the_seed(call: Any, encoded: list[int]) -> None:
    one, same, other = (
        read_prior(call("--sample_size", 4, "--seed", s, out=str(i))) for i, s in enumerate((1, 1, 3))
    )
    assert sum(encoded) == 12
    assert one.card == same.card
    assert one.card.selection["sample_size"] == one.moments.images == 4
    assert one.card.selection["chosen"] != other.card.selection["chosen"]
    assert sorted(noise_prior.choose_frames(50, 50, 0)) == list(range(50))
    assert len(set(noise_prior.choose_frames(50, 20, 0))) == 20
    assert len(noise_prior.choose_frames(50, 10_000, 0)) == 50  # the predecessor's default


def test_mirrored_frames_are_counted_when_training_shows_them(
    call: Any, encoded: list[int], tree: Path
) -> None:
    card, moments = read_whole(call("data.flip=0.5", "--sample_size", 3, "--covariance"))
    assert sum(encoded) == card.total == 6
    assert card.rows["mirrored"] == [False, True]
    assert moments.has_covariance
    source = StreetsDataset(tree, "train", SIZE)
    shown = [source[i]["label"] for i in noise_prior.choose_frames(FRAMES, 3, 42)]
    both = np.stack([resize_labels(y, (8, 16)) for label in shown for y in (label, label[:, ::-1])])
    np.testing.assert_array_equal(moments.joint.count, [(both == k).sum(0) for k in range(19)])


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "citiscapes"], "unknown data set 'citiscapes'.* Did you mean 'cityscapes'"),
        (["--dataset", "fill50k"], "expected a data set with label maps, found fill50k"),
        (["--ckpt", "nowhere.safetensors"], "expected weights at nowhere.safetensors"),
        (["--split", "holdout"], "expected .*holdout"),
        (["--cache", "nowhere"], "expected a cache in nowhere, found none"),
        (["--resolution", "60", "64"], "multiples of 64, found .60, 64"),
        (["--shard", "4/3"], "--shard must be I/N"),
        (["--shard", "1/8"], "at most as many shards as images, 7, found 8"),
        (["--sample_size", "0"], "--sample_size must be 1 or more"),
        (["--config", "models/cldm_v15.yaml"], "does not hold the autoencoder of the model file"),
        (["data.crop=middle"], "unknown crop 'middle'"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence_and_with_status_2(
    call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    if "fill50k" in flags:
        (tmp_path / "prompt.json").write_text('{"source": "a.png", "target": "a.png", "prompt": "x"}\n')
        flags = [*flags, "--root", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        call(*flags)
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said


def test_a_file_with_other_settings_is_not_overwritten(
    call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = call("--sample_size", 2)
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        call("--sample_size", 3)
    assert "with other settings (sample_size 2 and 3); choose another --save_name" in capsys.readouterr().err
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):
        noise_prior.main(["merge", str(path), str(path)])
    assert "exists; choose another name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        noise_prior.main(["merge", str(tmp_path / "m.safetensors"), str(path), str(path)])
    assert "image 0 is in two parts" in capsys.readouterr().err


# -- the file ----------------------------------------------------------------------------------------------


def test_a_prior_that_does_not_fit_is_refused_with_both_values(call: Any) -> None:
    card = read_card(call("--sample_size", 2))
    check_fits(
        card, "p", first_stage=card.first_stage, scale_factor=0.18215, size=[64, 128], classes=card.classes
    )
    for wanted, message in (
        (
            {"first_stage": "ab12"},
            f"p: expected a prior of first_stage ab12, found one of {card.first_stage}",
        ),
        ({"size": (512, 1024)}, "expected a prior of size 512x1024, found one of 64x128"),
        ({"scale_factor": 0.13025}, "expected a prior of scale_factor 0.13025, found one of 0.18215"),
        ({"classes": ("wall", "floor")}, r"classes 2 \(wall, floor, ...\), found one of 19 \(road, sidewalk"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(card, "p", **wanted)


def test_files_that_are_no_priors_are_refused(call: Any, weights: Path, tmp_path: Path) -> None:
    path = call("--sample_size", 2)
    tensors, card = read_tensors(path), json.loads(read_metadata(path)["prior"])
    target = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="is no noise prior"):
        read_prior(weights)
    for change, message in (
        ({"schema": 2}, "expected a prior of schema 1, found 2"),
        ({"size": [64]}, "damaged prior"),
        ({"size": [60, 128]}, "latent of images of"),
        ({"classes": ["road"]}, "expected classes 1, as the metadata say, found 19"),
        ({"covered": [[0, 3]]}, "expected images 3, as the metadata say, found 2"),
        ({"covered": [[1, 1]]}, "damaged prior"),
        ({"covariance": True}, "expected covariance True"),
        ({"scale_factor": "a"}, "scale_factor of type float, found 'a'"),
        ({"unknown": 1}, "damaged prior: its metadata"),
    ):
        write_tensors(target, tensors, {"prior": json.dumps({**card, **change})})
        with pytest.raises(CheckpointError, match=message):
            read_prior(target)
    write_tensors(target, {**tensors, "joint.m2": -tensors["joint.m2"]}, {"prior": json.dumps(card)})
    with pytest.raises(CheckpointError, match="damaged prior: expected sums of squares of 0 or more"):
        read_prior(target)
    write_tensors(target, {**tensors, "more": torch.zeros(1)}, {"prior": json.dumps(card)})
    with pytest.raises(CheckpointError, match=r"damaged prior: .*others: more"):
        read_prior(target)


def test_parts_of_different_priors_do_not_merge(call: Any, tmp_path: Path) -> None:
    prior = read_prior(call("--sample_size", 2))
    for name, card in (
        ("a", replace(prior.card, covered=((0, 2),), total=4)),
        ("b", replace(prior.card, covered=((2, 4),), total=4, size=(128, 256))),
    ):
        write_prior(tmp_path / f"{name}.safetensors", Prior(card, prior.moments))
    with pytest.raises(SystemExit):
        noise_prior.main(["merge", *(str(tmp_path / f"{name}.safetensors") for name in "cab")])


def test_ranges() -> None:
    assert joined([(4, 6), (0, 2), (2, 3)]) == ((0, 3), (4, 6))
    assert missing_of((0, 8), [(4, 6), (0, 2)]) == ((2, 4), (6, 8))
    assert missing_of((2, 5), [(0, 3), (6, 9)]) == ((3, 5),)
    assert missing_of((2, 5), [(0, 9)]) == ()
    assert split([(2, 4), (6, 9)], 2) == [((2, 4),), ((6, 9),)]
    assert split([(0, 3)], 5) == [(), ((0, 1),), (), ((1, 2),), ((2, 3),)]
    with pytest.raises(ValueError, match="image 2 is in two parts"):
        joined([(0, 3), (2, 4)])


# -- weights -----------------------------------------------------------------------------------------------


def test_the_autoencoder_is_found_in_whole_models_and_in_the_base_of_a_control_file(
    tiny_model: ControlLDM, weights: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    from cldm.model import load_model_config

    config = load_model_config(tiny_yaml)
    expected = encoder_fingerprint(tiny_model.first_stage_model)
    control = {k: v for k, v in tiny_model.state_dict().items() if k.startswith("control_model.")}
    write_tensors(tmp_path / "control.safetensors", control, base_notes(weights, tmp_path))
    write_tensors(tmp_path / "lone.safetensors", control)
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny_model.state_dict().items()}
    write_tensors(tmp_path / "half.safetensors", half)
    for name, base in (("control", None), ("lone", weights), ("half", None)):
        found = load_first_stage(config, tmp_path / f"{name}.safetensors", base, "cpu")
        assert encoder_fingerprint(found.autoencoder) == expected  # in half precision, too
        assert found.scale_factor == 0.18215
    with pytest.raises(CheckpointError, match="no record of its base"):
        load_first_stage(config, tmp_path / "lone.safetensors")
    tiny_model.first_stage_model.encoder.conv_in.weight.data += 0.01
    assert encoder_fingerprint(tiny_model.first_stage_model) != expected


# -- published files ---------------------------------------------------------------------------------------


def test_published_statistics_are_converted(
    call: Any, tmp_path: Path, tree: Path, encoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "cs_spatial_mean_std.npy", {n: rng.uniform(0, 1, (4, 8, 16)) for n in ("mean", "std")})
    ids = (0, 5, 77)
    by_class = {i: {n: rng.uniform(0, 1, 4) for n in ("mean", "std")} for i in ids}
    np.save(tmp_path / "cs_categorical_mean_std.npy", by_class)
    joint = {n: rng.uniform(0, 1, (256, 4, 8, 16)) for n in ("mean", "std")} | {
        "count": np.zeros((256, 1, 8, 16))
    }
    joint["count"][list(ids)] = 3
    np.save(tmp_path / "cs_spatial_class_mean_std.npy", joint)
    prior = read_whole(call("--published", tmp_path / "cs", "--sample_size", 50))
    assert encoded == []
    assert prior.card.size == SIZE
    assert prior.card.origin["phantom classes"]["categorical_mean_std"] == [77]
    assert "contaminated by 1 phantom classes (77)" in caplog.text
    np.testing.assert_allclose(prior.moments.classes.mean[5], by_class[5]["mean"])
    assert isinstance(prior.moments, LatentMoments)


# -- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True])
def test_ctrl_c_stops_all_processes_and_each_keeps_what_it_reached(
    tree: Path, weights: Path, tiny_yaml: Path, tmp_path: Path, to_group: bool
) -> None:
    slow = "import time, cldm.prior_pass as p\ntake = p.posteriors\ndef posteriors(*a):\n"
    slow += "    time.sleep(1)\n    return take(*a)\np.posteriors = posteriors\n"
    (tmp_path / "slow.py").write_text(
        slow + "import noise_prior\nif __name__ == '__main__':\n    noise_prior.main()\n"
    )
    words = [
        "--dataset",
        "streets",
        "--root",
        tree,
        "--ckpt",
        weights,
        "--config",
        tiny_yaml,
        "--device",
        "cpu",
    ]
    words += [
        "--resolution",
        *SIZE,
        "--batch_size",
        1,
        "--processes",
        2,
        "--save_dir",
        tmp_path,
        "--save_name",
        "p",
    ]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    shown = ""
    while not re.search("[1-3]/7", shown):  # of the progress bar
        assert process.stderr is not None
        letter = process.stderr.read(1)
        assert letter, shown
        shown += letter
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped; what was reached is kept" in said
    kept = sum(read_card(part).images for part in find_parts(tmp_path / "streets" / "p.safetensors"))
    assert 1 <= kept < 7
