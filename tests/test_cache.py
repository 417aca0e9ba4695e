"""The cache on disk: training from it is bit by bit training without, and what differs is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_runs import IDS, write_block_frames
from torch import Tensor

import tutorial_train
from cldm import cache as writer
from cldm.cache import TextTable, digest_of, encoder_digest, write_samples, write_texts
from cldm.cldm import ControlLDM
from cldm.shelf import Shelf
from cldm.tensor_files import CheckpointError, read_tensors
from cldm.tensor_writing import write_tensors
from datasets.cached import CachedDataset, ViewRows, collate_rows, digest_of_files, identity_of_rows
from datasets.cityscapes import CityscapesDataset
from datasets.framing import Framing, Views
from datasets.label_space import resize_labels
from datasets.rare_classes import draw_rare_classes
from datasets.triples import TriplesDataset

FRAMES, SIZE = 5, (64, 64)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Cityscapes with five frames to train on and two to show, twice as wide as the samples."""
    root = tmp_path / "cityscapes"
    write_block_frames(root, train=FRAMES, val=2)
    return root


def dataset(tree: Path, **options: Any) -> CityscapesDataset:
    return CityscapesDataset(tree, size=SIZE, **options)


def build(
    source: Any, folder: Path, model: ControlLDM, *, crops: int = 1, seed: int = 3, **options: Any
) -> CachedDataset:
    views = Views(source.framing, crops, seed)
    identity, rows = identity_of_rows(source, views, folder), ViewRows(source, views)
    write_samples(folder, rows, collate_rows, model, identity, batch_size=2, **options)
    return CachedDataset(source, views, folder)


def moments_of(model: ControlLDM, jpg: np.ndarray) -> Tensor:
    image = torch.from_numpy(jpg)[None].permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        return model.first_stage_model.encode(image).parameters[0]


# -- samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"crop": "centre"}, {"flip": 0.5}, {"crop": "centre", "flip": 1.0}])
def test_samples_are_those_of_the_data_set_with_moments_for_photos(
    tree: Path, tmp_path: Path, tiny_model: ControlLDM, options: dict[str, Any]
) -> None:
    source = dataset(tree, prompt="a street with {classes}", drop_prompt=0.3, **options)
    cached = build(source, tmp_path / "cache", tiny_model)
    assert len(cached) == len(source) == FRAMES
    for index in range(FRAMES):
        for draw in range(4):
            expected = source.sample(index, np.random.default_rng(draw))
            found = cached.sample(index, np.random.default_rng(draw))
            assert found.keys() == expected.keys() - {"jpg"} | {"moments"}
            for name in ("txt", "key"):
                assert found[name] == expected[name]
            for name in ("hint", "label"):
                np.testing.assert_array_equal(found[name], expected[name], strict=True)
            moments = moments_of(tiny_model, expected["jpg"])
            torch.testing.assert_close(torch.from_numpy(found["moments"]), moments, rtol=1e-4, atol=1e-5)


def test_random_windows_are_a_fixed_number_for_each_frame(
    tree: Path, tmp_path: Path, tiny_model: ControlLDM
) -> None:
    source = dataset(tree, crop="random", zoom=(1.0, 2.0), flip=0.5)
    cached = build(source, tmp_path / "cache", tiny_model, crops=3)
    photo, ids = np.asarray(Image.open(source.pairs[2].image)), source.read_file_ids(source.pairs[2].labels)
    seen = {}
    for draw in range(60):
        sample = cached.sample(2, np.random.default_rng(draw))
        seen[sample["moments"].tobytes()] = sample
        assert set(np.unique(sample["label"])) <= set(np.unique(source.space.to_train_ids(ids, where="")))
    assert len(seen) == 6
    expected = set()
    for view in range(6):
        window = cached.views.window((64, 128), 2, view)
        assert window.mirrored == bool(view % 2)
        expected.add(window.cut(photo).tobytes())
    assert len(expected) == 6
    again = Views(source.framing, 3, seed=4)
    assert again.window((64, 128), 2, 0) != cached.views.window((64, 128), 2, 0)


def test_triples_keep_control_and_label(tmp_path: Path, tiny_model: ControlLDM) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(3):
        for name, array in (
            ("target", rng.integers(0, 256, (64, 64, 3), np.uint8)),
            ("control", rng.integers(0, 256, (64, 64, 3), np.uint8)),
            ("label", rng.choice(IDS, (64, 64))),
        ):
            Image.fromarray(array).save(tmp_path / f"{name}{i}.png")
        rows.append(
            {name: f"{name}{i}.png" for name in ("target", "control", "label")} | {"prompt": f"no {i}"}
        )
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = TriplesDataset(tmp_path, size=SIZE, label_space="cityscapes")
    cached = build(source, tmp_path / "cache", tiny_model)
    for index in range(3):
        found, expected = cached[index], source[index]
        for name in ("hint", "label"):
            np.testing.assert_array_equal(found[name], expected[name], strict=True)
        assert found["txt"] == expected["txt"] == f"no {index}"
    assert cached.texts() == {"", "no 0", "no 1", "no 2"}
    with pytest.raises(ValueError, match=r"expected data.size=\[HEIGHT,WIDTH\] for a cache"):
        build(TriplesDataset(tmp_path), tmp_path / "other", tiny_model)


def test_rare_classes_are_seen_in_cached_windows(tree: Path, tmp_path: Path, tiny_model: ControlLDM) -> None:
    source = dataset(tree, crop="random", zoom=(2.0, 2.0), flip=0.5)
    cached = build(source, tmp_path / "cache", tiny_model, crops=8)
    frames = draw_rare_classes(source, frames=cached, least_pixels=10, temperature=0.01)
    for draw in range(40):
        rng = np.random.default_rng(draw)
        sample = frames.sample(0, rng)
        drawn = int(np.random.default_rng(draw).choice(len(frames.chances), p=frames.chances))
        first = [pair.key for pair in source.pairs].index(sample["key"]) * len(cached.views)
        maps = [cached.view(first + view).ids for view in range(len(cached.views))]
        assert (source.space.file_ids[drawn] in np.stack(maps)) == (drawn in sample["label"])


@pytest.mark.slow
def test_ten_thousand_maps_keep_their_ids_in_a_cache(tmp_path: Path) -> None:
    rng, known = np.random.default_rng(0), np.array([7, 8, 11, 17, 24, 26, 33, 0, 255])
    maps = [rng.choice(rng.choice(known, rng.integers(1, 6)), rng.integers(4, 200, 2)) for _ in range(10_000)]
    chosen = Views(Framing((64, 64), "random", (1.0, 3.0), flip=0.5), 2, 7)
    for start in range(0, len(maps), 1000):
        rows = [
            resize_labels(chosen.window(ids.shape, start + i, i % len(chosen)).cut(ids), (64, 64))
            for i, ids in enumerate(maps[start : start + 1000])
        ]
        path = tmp_path / f"{start}.safetensors"
        write_tensors(path, {"ids": torch.from_numpy(np.stack(rows).astype(np.uint8))})
        for found, ids in zip(read_tensors(path)["ids"].numpy(), maps[start : start + 1000], strict=True):
            assert set(np.unique(found)) <= set(np.unique(ids))


# -- what a cache is of ------------------------------------------------------------------------------------


def test_a_run_that_differs_is_refused_and_says_in_what(
    tree: Path, tmp_path: Path, tiny_model: ControlLDM
) -> None:
    folder = tmp_path / "cache"
    build(dataset(tree), folder, tiny_model)
    for options, said in (
        ({"flip": 1.0}, r"expected a cache of mirrored \[True\], found one of \[False\]"),
        ({"crop": "centre"}, "expected a cache of crop centre, found one of none"),
        ({"hint": "label_colours"}, "expected a cache of void ids True, found one of False"),
    ):
        with pytest.raises(CheckpointError, match=said):
            build(dataset(tree, **options), folder, tiny_model)
    with pytest.raises(
        CheckpointError, match=r"expected a cache of size \[64, 128\], found one of \[64, 64\]"
    ):
        build(CityscapesDataset(tree, size=(64, 128)), folder, tiny_model)
    with pytest.raises(CheckpointError, match="expected a cache of dtype 16, found one of 32"):
        build(dataset(tree), folder, tiny_model, dtype="16")
    with torch.no_grad():
        tiny_model.first_stage_model.decoder.conv_out.weight += 1
        build(dataset(tree), folder, tiny_model)  # decoders make no moments
        tiny_model.first_stage_model.quant_conv.bias += 1
    with pytest.raises(CheckpointError, match="expected a cache of first_stage"):
        build(dataset(tree), folder, tiny_model)
    write_tensors(folder / "samples/00000.safetensors", {"moments": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is no part of a cache"):
        build(dataset(tree), folder, tiny_model)


def test_windows_of_another_seed_are_refused(tree: Path, tmp_path: Path, tiny_model: ControlLDM) -> None:
    build(dataset(tree, crop="random"), tmp_path / "random", tiny_model, crops=2)
    with pytest.raises(CheckpointError, match="expected a cache of seed 4, found one of 3"):
        build(dataset(tree, crop="random"), tmp_path / "random", tiny_model, crops=2, seed=4)
    with pytest.raises(CheckpointError, match="expected a cache of crops 1, found one of 2"):
        build(dataset(tree, crop="random"), tmp_path / "random", tiny_model)
    build(dataset(tree), tmp_path / "whole", tiny_model)
    build(dataset(tree), tmp_path / "whole", tiny_model, seed=4)  # whole frames know no seed
    with pytest.raises(ValueError, match="expected one crop of a frame to keep, as crop 'none' has, found 2"):
        build(dataset(tree), tmp_path / "whole", tiny_model, crops=2)


def test_data_are_known_by_content(tree: Path, tmp_path: Path, tiny_model: ControlLDM) -> None:
    source, folder = dataset(tree), tmp_path / "cache"
    build(source, folder, tiny_model)
    photo = source.pairs[0].image
    before = digest_of_files(source, folder)
    os.utime(photo, (1, 1))  # copied, not changed
    assert digest_of_files(source, folder) == before
    (folder / "files.json").write_text("{damaged")
    assert digest_of_files(source, folder) == before
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    with pytest.raises(CheckpointError, match="expected a cache of data"):
        build(source, folder, tiny_model)


def test_modules_are_known_by_their_weights(tiny_model: ControlLDM) -> None:
    first = encoder_digest(tiny_model.first_stage_model)
    assert first == encoder_digest(tiny_model.first_stage_model)
    assert digest_of(tiny_model.cond_stage_model) != first
    with torch.no_grad():
        next(tiny_model.first_stage_model.encoder.parameters()).view(-1)[0] += 1e-3
    assert encoder_digest(tiny_model.first_stage_model) != first


def test_an_interrupted_cache_goes_on_and_a_bad_frame_is_named(
    tree: Path, tmp_path: Path, tiny_model: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = dataset(tree), tmp_path / "cache"
    last = source.pairs[-1].image
    content = last.read_bytes()
    last.write_bytes(content[:200])
    views = Views(source.framing)
    identity = {"data": "the same"}

    def write() -> None:
        rows = ViewRows(source, views)
        write_samples(folder, rows, collate_rows, tiny_model, identity, batch_size=2, shard_bytes=6000)

    with pytest.raises(ValueError, match=f"{last.name}: expected an image"):
        write()
    shards = sorted((folder / "samples").iterdir())
    assert len(shards) == FRAMES - 1
    assert [len(read_tensors(path)["moments"]) for path in shards] == [1] * len(shards)
    states = [path.stat().st_mtime_ns for path in shards]
    last.write_bytes(content)
    write()
    assert [path.stat().st_mtime_ns for path in shards] == states
    assert len(list((folder / "samples").iterdir())) == FRAMES
    cached = CachedDataset(source, views, folder)
    for index in range(FRAMES):
        moments = moments_of(tiny_model, source[index]["jpg"])
        torch.testing.assert_close(torch.from_numpy(cached[index]["moments"]), moments, rtol=1e-4, atol=1e-5)
    encode = tiny_model.encode_first_stage
    seen = []
    monkeypatch.setattr(tiny_model, "encode_first_stage", lambda x: seen.append(len(x)) or encode(x))
    write()
    assert seen == [1]  # the row that tells the size of a shard


# -- texts -------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_encoder_whatever_their_lengths(
    tmp_path: Path, tiny_model: ControlLDM
) -> None:
    encoder = tiny_model.cond_stage_model
    long = " ".join(["a very long street"] * 60)
    texts = ["a road", "a house in the rain", long]
    table = write_texts(tmp_path, texts, encoder)
    for some in (["a road"], ["a road", long, ""], ["", "a house in the rain", "a road"]):
        with torch.no_grad():
            torch.testing.assert_close(table(some), encoder(some), rtol=1e-5, atol=1e-6)
    shards = list((tmp_path / "texts").iterdir())
    table = write_texts(tmp_path, ["a road", "one more"], encoder)
    assert len(list((tmp_path / "texts").iterdir())) == len(shards) + 1
    assert set(table.rows) == {"", "one more", *texts}
    assert set(TextTable(tmp_path).rows) == set(table.rows)
    write_texts(tmp_path, texts, encoder)
    assert len(list((tmp_path / "texts").iterdir())) == len(shards) + 1
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1
    with pytest.raises(CheckpointError, match="expected a cache of text_encoder"):
        write_texts(tmp_path, texts, encoder)


def test_many_prompts_are_written_in_shards(
    tmp_path: Path, tiny_model: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TEXTS_IN_SHARD", 3)
    monkeypatch.setattr(writer, "TEXTS_AT_ONCE", 2)
    texts = [f"street {i}" for i in range(7)]
    table = write_texts(tmp_path, texts, tiny_model.cond_stage_model)
    assert len(list((tmp_path / "texts").iterdir())) == 3
    with torch.no_grad():
        expected = tiny_model.cond_stage_model(texts)
    torch.testing.assert_close(table(texts), expected, rtol=1e-5, atol=1e-6)


# -- stages out of memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_file", [True, False])
def test_stages_are_in_the_model_while_they_are_lent(tiny_model: ControlLDM, from_file: bool) -> None:
    state = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    image = torch.rand(1, 3, 64, 64)
    expected = tiny_model.encode_first_stage(image).parameters
    shelf = Shelf(tiny_model, (lambda: state) if from_file else None)
    names = set(tiny_model.state_dict())
    assert not any(name.startswith(("first_stage_model.", "cond_stage_model.")) for name in names)
    assert all(p.is_meta == from_file for stage in shelf.stages.values() for p in stage.parameters())
    with pytest.raises(RuntimeError, match="cond_stage_model is not in memory"):
        tiny_model.get_learned_conditioning(["a road"])
    for _ in range(2):
        with tiny_model.lend_stages():
            with tiny_model.lend_stages():
                torch.testing.assert_close(tiny_model.encode_first_stage(image).parameters, expected)
            assert tiny_model.get_learned_conditioning(["a road"]).shape == (1, 77, 32)
            tiny_model.train()
            assert not tiny_model.first_stage_model.training
        assert set(tiny_model.state_dict()) == names
    with pytest.raises(ZeroDivisionError), tiny_model.lend_stages():
        _ = 1 / 0
    assert set(tiny_model.state_dict()) == names


# -- training ----------------------------------------------------------------------------------------------


def test_training_from_a_cache_is_bit_by_bit_training_without(
    tree: Path, tmp_path: Path, tiny_yaml: Path, tiny_model: ControlLDM
) -> None:
    start = tmp_path / "start.safetensors"
    write_tensors(start, tiny_model.state_dict())
    content = {
        "model": {"config": str(tiny_yaml), "checkpoint": str(start)},
        "data": {
            "root": str(tree),
            "size": list(SIZE),
            "prompt": "a street with {classes}",
            "num_workers": 0,
        },
        "train": {
            "batch_size": 2,
            "lr": 1.0e-3,
            "max_steps": 10,
            "logger_freq": 3,
            "val_freq": 3,
            "val_samples": 2,
        },
        "sample": {"steps": 1, "scale": 2.0},
    }
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["data.crop=centre", "data.flip=0.5", "data.drop_prompt=0.3"]

    def run(name: str, *more: str) -> Path:
        folder = tmp_path / name
        tutorial_train.main(["--config", str(recipe), "--default_root_dir", str(folder), *options, *more])
        return folder / "lightning_logs/version_0"

    without = run("without")
    with_cache = [run(name, f"data.cache={tmp_path / 'cache'}") for name in ("written", "read")]
    for folder in with_cache:
        for kind in ("training.jsonl", "validation.jsonl"):
            assert timeless(folder / kind) == timeless(without / kind)
        ours, theirs = (read_tensors(f / "checkpoints/step=000010.safetensors") for f in (folder, without))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for grid in (without / "image_log").iterdir():
            assert (folder / "image_log" / grid.name).read_bytes() == grid.read_bytes()


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_cache_and_latents_kept_in_memory_exclude_each_other(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", "cityscapes", "--resume_path", "random", f"data.root={tree}", "data.size=[64,64]"]
    words += ["train.keep_latents=true", f"data.cache={tmp_path}", f"train.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        tutorial_train.main(words)
    assert "expected one of data.cache and train.keep_latents, found both" in capsys.readouterr().err
