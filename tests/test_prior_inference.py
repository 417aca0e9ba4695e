"""noise_prior_inference.py on rendered streets: images against plain loops, its tree, resume, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prior_samples import (
    ABAR,
    SIZE,
    K,
    ddim_by_loops,
    decoded,
    files_below,
    joint_by_loops,
    noise_of,
    random_moments,
    write_random_prior,
)

import cldm.prior_sampling
import noise_prior_inference as script
from cldm.cldm import ControlLDM
from cldm.pictures import read_settings
from cldm.prior_file import read_prior, write_prior
from cldm.sample_tree import image_seed, plan, shard_of
from cldm.tensor_writing import write_tensors
from datasets.label_space import resize_labels
from datasets.streets.dataset import StreetsDataset
from datasets.streets.tree import Plan, make_tree
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.priors.prior import KINDS, SHRINKAGE

FRAMES, T = 4, 401


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streets") / "streets"
    make_tree(root, Plan("camera", size=SIZE, train=1, val=FRAMES), workers=1)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: ControlLDM) -> tuple[Path, Path]:
    """Weights, and a prior that fits them."""
    folder = tmp_path_factory.mktemp("files")
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_random_prior(folder / "prior.safetensors", model)
    return folder / "model.safetensors", folder / "prior.safetensors"


@pytest.fixture
def call(tree: Path, files: tuple[Path, Path], tiny_yaml: Path, tmp_path: Path) -> Any:
    """Run the script; returns the folder that it says it wrote to."""

    def run(*flags: Any, kind: str = "spatial-class-joint", t: Any = T, out: str = "out") -> Path:
        argv = ["--dataset", "streets", "--root", tree, "--ckpt", files[0], "--config", tiny_yaml]
        argv += ["--prior", files[1], "--prior_type", kind, "--diffusion_steps", t, "--resolution", *SIZE]
        argv += ["--save_dir", tmp_path / out, "--device", "cpu", "--steps", 5, "--scale", 3, "--seed", 7]
        argv += ["sample.strength=1"]  # of ddim_by_loops
        script.main([*map(str, argv), *map(str, flags)])
        (found,) = (tmp_path / out / "streets").iterdir()
        return found

    return run


def image(folder: Path, number: int, kind: str = "sample") -> np.ndarray:
    return np.array(Image.open(folder / kind / f"{number:06d}.png"))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def lines_of(folder: Path, name: str = "manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# -- the images --------------------------------------------------------------------------------------------


def test_images_are_those_of_the_plain_loop(
    call: Any, tree: Path, model: ControlLDM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = call("--batch_size", 3)
    assert folder.name == f"streets_{FRAMES}_{T}_spatial-class-joint"
    timesteps = [401, 201, 1]  # of 801, 601, 401, 201, 1
    assert "by 3 network evaluations from timestep 401: 401, 201, 1" in caplog.text
    source = StreetsDataset(tree, "val", SIZE)
    samples = {source.key_of(i): source[i] for i in range(FRAMES)}
    moments = random_moments()
    lines = lines_of(folder)
    assert [line["image"] for line in lines] == [f"sample/{n:06d}.png" for n in range(FRAMES)]
    assert {line["key"] for line in lines} == set(samples)
    for number, line in enumerate(lines):
        frame = samples[line["key"]]
        mean, variance = joint_by_loops(moments, resize_labels(frame["label"], (8, 16)), SHRINKAGE)
        start = ABAR[T] ** 0.5 * mean + (ABAR[T] * variance + 1 - ABAR[T]) ** 0.5 * noise_of(line["seed"])
        hint = torch.from_numpy(frame["hint"]).permute(2, 0, 1)[None]
        expected = ddim_by_loops(model, start, timesteps, hint, frame["txt"], 3.0)
        assert expected.std() > 20, "a grey image would agree with anything"
        assert difference(image(folder, number), expected) <= 1
        assert line["prompt"] == frame["txt"]
        assert (line["timesteps"], line["evaluations"], line["sampler"]) == (timesteps, 3, "ddim")


def test_x0_at_the_lowest_level_is_the_photo_after_the_autoencoder(
    call: Any, tree: Path, model: ControlLDM
) -> None:
    folder = call("--sample_size", 1, kind="x0", t=0)
    (line,) = lines_of(folder)
    source = StreetsDataset(tree, "val", SIZE)
    photo = torch.from_numpy(source[line["frame"]]["jpg"]).permute(2, 0, 1)[None]
    with torch.no_grad():
        z = model.encode_first_stage(photo).mode().double().numpy() * model.scale_factor
    # A step from level abar[0] to abar[0] changes nothing.
    start = ABAR[0] ** 0.5 * z + (1 - ABAR[0]) ** 0.5 * noise_of(line["seed"])
    assert difference(image(folder, 0), decoded(model, start)) <= 1
    assert line["prior"] is None
    assert "photo_fingerprint" in line


def test_noise_needs_no_file_and_is_what_generate_draws(call: Any, model: ControlLDM, tree: Path) -> None:
    folder = call("--sample_size", 1, "--prior", "nowhere.safetensors", kind="normal", t=801)
    (line,) = lines_of(folder)
    frame = StreetsDataset(tree, "val", SIZE)[line["frame"]]
    hint = torch.from_numpy(frame["hint"]).permute(2, 0, 1)[None]
    expected = ddim_by_loops(model, noise_of(line["seed"]), [801, 601, 401, 201, 1], hint, frame["txt"], 3.0)
    assert difference(image(folder, 0), expected) <= 1
    assert line["prior"] is None


def test_every_kind_and_sampler_makes_an_image_of_its_own(call: Any) -> None:
    assert {*script.UNMEASURED, *script.MEASURED_PRIORS} == set(KINDS)
    made = [
        image(call("--sample_size", 1, "--sampler", sampler, kind=kind, out=f"{kind}-{sampler}"), 0)
        for kind in KINDS
        for sampler in (("ddim", "dpm++2m") if kind == "class" else ("ddim",))
    ]
    for i, one in enumerate(made):
        assert all(difference(one, other) > 1 for other in made[:i])


@pytest.mark.parametrize(
    "flags",
    [
        ("--undivided",),
        ("--spatial_scale", 0.1),
        ("--class_scale", 5),
        ("--shrinkage", 0),
        ("--weighting", "images"),
    ],
    ids=str,
)
def test_each_option_of_the_prior_takes_effect(call: Any, flags: tuple) -> None:
    plain = call("--sample_size", 1, kind="spatial-class", out="plain")
    changed = call("--sample_size", 1, *flags, kind="spatial-class", out="changed")
    assert difference(image(plain, 0), image(changed, 0)) > 1
    assert read_settings(changed / "sample/000000.png")["prior"] != lines_of(plain)[0]["prior"]


def test_so_many_steps_from_the_start_are_walked(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = call("--steps_after_start", 5, "--sample_size", 1, t=9)
    assert lines_of(folder)[0]["timesteps"] == [9, 7, 5, 4, 2]  # numpy.linspace(0, 9, 6), rounded
    with pytest.raises(SystemExit):
        call("--steps_after_start", 11, t=9, out="other")
    assert "expected 1..10 steps, as there are timesteps from 9 down, found 11" in capsys.readouterr().err


def test_a_start_is_chosen_where_its_loss_is_small(
    call: Any, tree: Path, model: ControlLDM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = call(t="auto", kind="spatial")
    found = re.search(r"start at timestep (\d+): loss (\S+) nats a value on 4 frames", caplog.text)
    assert found is not None
    t, loss = int(found[1]), float(found[2])
    assert folder.name == f"streets_{FRAMES}_{t}_spatial"
    source, moments = StreetsDataset(tree, "val", SIZE), random_moments()
    m, v = moments.places.mean, moments.places.variance

    def expected(t: int) -> float:
        total = 0.0
        for i in range(FRAMES):
            photo = torch.from_numpy(source[i]["jpg"]).permute(2, 0, 1)[None]
            posterior = model.encode_first_stage(photo)
            z = posterior.mean[0].permute(1, 2, 0).double().numpy() * model.scale_factor
            own = posterior.var[0].permute(1, 2, 0).double().numpy() * model.scale_factor**2
            p, q = ABAR[t] * v + 1 - ABAR[t], ABAR[t] * own + 1 - ABAR[t]
            total += (0.5 * (np.log(p / q) + (q + ABAR[t] * (z - m) ** 2) / p - 1)).mean()
        return total / FRAMES

    with torch.no_grad():
        assert loss == pytest.approx(expected(t), rel=1e-2)
        assert expected(t) <= 0.01 < expected(t - 1)


# -- shards, batches, resume -------------------------------------------------------------------------------


def test_shards_and_batches_change_no_image(call: Any) -> None:
    whole = call("--sample_size", 6, "--batch_size", 4, out="whole")
    for number in (2, 1, 3):
        parts = call("--sample_size", 6, "--shard", f"{number}/3", "--batch_size", 1, out="parts")
    assert len(set(files_below(parts))) == 3 * 6 + 3
    for number in range(6):
        assert difference(image(whole, number), image(parts, number)) <= 1
        assert difference(image(whole, number), image(whole, (number + 1) % 6)) > 5
    found = [line for i in (1, 2, 3) for line in lines_of(parts, f"manifest-{i}-of-3.jsonl")]
    assert found == lines_of(whole)
    again = call("--sample_size", 6, out="parts")  # all are there: a manifest of all, and nothing made
    assert lines_of(again) == lines_of(whole)
    maps = [line["key"] for line in found]
    assert maps[:2] == maps[4:]
    assert len(set(maps)) == FRAMES
    assert len({line["seed"] for line in found}) == 6


def test_an_image_that_is_there_is_not_made_again(
    call: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    generate = cldm.prior_sampling.generate
    monkeypatch.setattr(
        cldm.prior_sampling, "generate", lambda *a, **k: made.append(len(a[3])) or generate(*a, **k)
    )
    folder = call("--batch_size", 3)
    assert made == [3, 1]
    before = {n: image(folder, n) for n in range(FRAMES)}
    (folder / "sample/000001.png").unlink()
    (folder / "gt_label/000002.png").unlink()
    damaged = folder / "sample/000003.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    call()
    assert made == [3, 1, 3]
    assert all(difference(image(folder, n), before[n]) <= 1 for n in range(FRAMES))
    call()
    assert made == [3, 1, 3]
    with pytest.raises(SystemExit):
        call("--scale", 4)
    said = capsys.readouterr().err
    assert "is there with other settings (scale 3.0, now 4.0); choose another --save_dir" in said
    call("--scale", 4, "--overwrite")
    assert made == [3, 1, 3, 4]
    assert {line["scale"] for line in lines_of(folder)} == {4.0}


def test_an_interruption_keeps_what_was_made(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, calls = cldm.prior_sampling.generate, []

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(cldm.prior_sampling, "generate", interrupted)
    with pytest.raises(SystemExit) as exit_:
        call("--batch_size", 3)
    assert exit_.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    (folder,) = (tmp_path / "out" / "streets").iterdir()
    assert len(lines_of(folder)) == 3
    call()
    assert len(calls) == 3
    assert len(lines_of(folder)) == FRAMES


def test_each_prompt_is_encoded_once(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple] = []
    encode = FrozenCLIPEmbedder.encode_tokens

    def counting(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        encoded.extend(map(tuple, tokens.tolist()))
        return encode(self, tokens)

    monkeypatch.setattr(FrozenCLIPEmbedder, "encode_tokens", counting)
    folder = call("--sample_size", 2 * FRAMES, "--batch_size", 2)
    prompts = {line["prompt"] for line in lines_of(folder)}
    assert len(encoded) == len(set(encoded)) == len(prompts) + 1  # and the negative one
    encoded.clear()
    call("--prompt", "a street", out="other")
    assert len(encoded) == 2


def test_long_and_short_prompts_do_not_meet_in_a_batch(call: Any, tree: Path, model: ControlLDM) -> None:
    folder = call("--prompt", "{words}", f"data.words={{words: [short, {'long ' * 100}]}}", "train.seed=0")
    lines = lines_of(folder)
    assert len({line["prompt"] for line in lines}) == 2
    alone = call(
        *("--prompt", "{words}", f"data.words={{words: [short, {'long ' * 100}]}}", "train.seed=0"),
        *("--batch_size", 1),
        out="alone",
    )
    for number in range(FRAMES):
        assert difference(image(folder, number), image(alone, number)) <= 1


# -- the tree ----------------------------------------------------------------------------------------------


def test_maps_are_lossless_and_photos_linked_or_copied(call: Any, tree: Path) -> None:
    source = StreetsDataset(tree, "val", SIZE)
    folder = call("--sample_size", 2)
    copied = call("--sample_size", 2, "--copy_real", out="copied")
    for number, line in enumerate(lines_of(folder)):
        np.testing.assert_array_equal(image(folder, number, "gt_label"), source[line["frame"]]["label"])
        link = folder / f"real/{number:06d}.png"
        assert link.is_symlink()
        assert link.resolve() == source.files(line["frame"])[0].resolve()
        copy_ = copied / f"real/{number:06d}.png"
        assert not copy_.is_symlink()
        assert copy_.read_bytes() == link.read_bytes()


def test_photos_keep_the_suffix_of_their_content(tmp_path: Path) -> None:
    from cldm.sample_tree import Job, SampleTree

    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    picture.save(tmp_path / "photo.png", format="JPEG")
    tree, job = SampleTree(tmp_path / "run"), Job(3, 0, 0, 1, {"a": 1})
    for _ in range(2):  # a link that is there is no obstacle
        tree.write(
            job, np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255), tmp_path / "photo.png", copy=False
        )
    assert list(files_below(tree.root)) == ["gt_label/000003.png", "real/000003.jpg", "sample/000003.png"]
    assert tree.missing([job], overwrite=False) == []


def test_of_centre_crops_the_part_that_is_shown_is_the_real_one(call: Any, tree: Path) -> None:
    folder = call("data.crop=random", "--sample_size", 1, "--resolution", 64, 64, kind="normal")
    (line,) = lines_of(folder)
    shown = StreetsDataset(tree, "val", (64, 64), crop="centre")[line["frame"]]
    np.testing.assert_array_equal(image(folder, 0, "real"), (shown["jpg"] * 127.5 + 127.5).round())
    np.testing.assert_array_equal(image(folder, 0, "gt_label"), shown["label"])


def test_which_image_is_of_which_map_does_not_depend_on_how_many_there_are() -> None:
    keys = [f"frame {i}" for i in range(100)]
    jobs = plan(keys, 250, 7)
    assert plan(keys, 30, 7) == jobs[:30]
    for start in (0, 100):
        assert sorted(job.frame for job in jobs[start : start + 100]) == list(range(100))
    assert [job.frame for job in jobs[:100]] == [job.frame for job in jobs[100:200]]
    assert [job.frame for job in plan(keys, 250, 8)] == [job.frame for job in jobs]
    assert len({job.seed for job in jobs} | {job.seed for job in plan(keys, 250, 8)}) == 500
    assert all(job.seed == image_seed(7, job.frame, job.repeat) < 2**32 for job in jobs)
    assert [job for i in (1, 2, 3) for job in shard_of(jobs, i, 3)] == jobs
    assert plan(keys, None, 7) == jobs[:100]


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "citiscapes"], "unknown data set 'citiscapes'.* Did you mean 'cityscapes'"),
        (["--dataset", "fill50k", "--prompt", "x"], "expected .*prompt.json|expected a data set with label"),
        (["--ckpt", "nowhere.safetensors"], "expected weights at nowhere.safetensors"),
        (["--prior", "nowhere.safetensors"], "expected a noise prior at nowhere.safetensors, found nothing"),
        (["--prior_type", "joint"], "invalid choice: 'joint'"),
        (["--diffusion_steps", "1000"], r"expected a timestep in 0\.\.999 to start from, found 1000"),
        (["--diffusion_steps", "-5"], r"auto or in 0\.\.999, found -5|expected one argument"),
        (["--diffusion_steps", "half"], r"--diffusion_steps must be auto or in 0\.\.999, found half"),
        (["--diffusion_steps", "auto", "--prior_type", "x0"], "auto has no answer for x0"),
        (["--steps_after_start", "0"], "expected 1..402 steps"),
        (["--shard", "4/3"], "--shard must be I/N"),
        (["--sample_size", "0"], "--sample_size must be 1 or more"),
        (["--split", "holdout"], "expected .*holdout"),
        (["--resolution", "64", "64"], "a prior of size 64x64, found one of 64x128"),
        (["--shrinkage", "-1"], "expected a shrinkage of 0 or more"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
        (["data.crop=middle"], "unknown crop"),
        (["sample.stepz=3"], "unknown key sample.stepz; did you mean sample.steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_answered_in_a_sentence_and_with_status_2(
    call: Any, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(*flags)
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_stage": "ab12"}, "expected a prior of first_stage [0-9a-f]+, found one of ab12"),
        ({"scale_factor": 0.13025}, "expected a prior of scale_factor 0.18215, found one of 0.13025"),
        ({"classes": tuple(f"c{i}" for i in range(K))}, r"classes 19 \(road, .*\), found one of 19 \(c0, c1"),
        ({"covered": ((0, 49),)}, "a part of a prior, 49 of 50 images|damaged prior"),
    ],
)
def test_a_prior_of_something_else_is_refused(
    call: Any,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    card, moments = read_prior(files[1])
    path = tmp_path / "other.safetensors"
    write_prior(path, type(read_prior(files[1]))(type(card)(**{**vars(card), **change}), moments))
    with pytest.raises(SystemExit):
        call("--prior", path)
    assert re.search(message, capsys.readouterr().err)


def test_another_resolution_is_taken_on_request(
    call: Any, files: tuple[Path, Path], model: ControlLDM, tmp_path: Path
) -> None:
    small = tmp_path / "small.safetensors"
    write_random_prior(small, model, random_moments(latent=(4, 8)), size=(32, 64))
    with pytest.raises(SystemExit):
        call("--prior", small)
    folder = call("--prior", small, "--resample_prior", "--sample_size", 1)
    assert image(folder, 0).shape == (*SIZE, 3)


def test_a_prior_of_the_frames_that_are_sampled_is_remarked(
    call: Any, model: ControlLDM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_random_prior(tmp_path / "p.safetensors", model, split="val")
    call("--prior", tmp_path / "p.safetensors", "--sample_size", 1)
    assert "was measured on the frames that are sampled now" in caplog.text
