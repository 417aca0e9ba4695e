"""The Streets judge itself: sizes, what it takes and gives, its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles import randomize
from transformers import SegformerModel

from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from metrics.judge import JudgeArch, JudgeNetwork, StreetsJudge, segformer_config, write_judge

TINY = JudgeArch(
    hidden=(32, 64), depths=(0, 1), reductions=(2, 1), widenings=(1, 2), decoder=8, refinements=1, features=4
)


def tiny_network(seed: int = 0) -> JudgeNetwork:
    return randomize(JudgeNetwork(TINY), seed).eval()


def noise_images(count: int, height: int = 16, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


def test_the_shipped_architecture_is_small_and_its_features_are_few(tmp_path: Path) -> None:
    network = JudgeNetwork(JudgeArch())
    write_judge(tmp_path / "judge.safetensors", network, {})
    assert (tmp_path / "judge.safetensors").stat().st_size < 8e6
    assert network.embed.out_features <= 64
    assert network.classify.out_channels == 4 * 19


def test_all_state_is_in_the_parameters_and_training_draws_nothing() -> None:
    # A slice saves parameters alone, and goes on bit by bit only if a step is a function of its batch.
    network, x = tiny_network(), torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    assert list(network.buffers()) == []
    for one, two in zip(network.train()(x), network.eval()(x), strict=True):
        assert torch.equal(one, two)


def test_the_encoder_is_that_of_transformers_on_signed_pixels() -> None:
    network, images = tiny_network(), noise_images(2)
    encoder = SegformerModel(segformer_config(TINY)).eval()
    encoder.load_state_dict(network.encoder.state_dict())
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        stages = encoder(x, output_hidden_states=True).hidden_states
        means = torch.cat([stage.mean(dim=(2, 3)) for stage in stages], dim=1)
        weight, bias = network.embed.weight, network.embed.bias
    expected = means.double().numpy() @ weight.double().detach().numpy().T + bias.double().detach().numpy()
    found = StreetsJudge(network).judge(images).features
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert [tuple(stage.shape[2:]) for stage in stages] == [(8, 16), (4, 8)]


def test_four_channels_of_the_decoder_are_four_pixels_in_reading_order() -> None:
    network = tiny_network()
    torch.nn.init.zeros_(network.classify.weight)
    scores = torch.zeros(19, 4)
    for place, train_id in enumerate((7, 2, 11, 18)):
        scores[train_id, place] = 1
    network.classify.bias.data = scores.flatten()
    labels = StreetsJudge(network)(noise_images(1))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels[0], np.tile([[7, 2], [11, 18]], (8, 16)))


def test_an_image_is_judged_alike_whatever_else_is_asked() -> None:
    judge, images = StreetsJudge(tiny_network()), noise_images(13)
    together = judge.judge(images)
    alone = [judge.judge(images[i : i + 1]) for i in range(13)]
    assert together.labels.shape == (13, 16, 32)
    assert together.conditions.shape == (13,)
    assert np.mean(together.labels == np.concatenate([one.labels for one in alone])) > 0.999
    assert np.array_equal(together.conditions, np.concatenate([one.conditions for one in alone]))
    features = np.concatenate([one.features for one in alone])
    np.testing.assert_allclose(together.features, features, rtol=1e-4, atol=1e-5)


def test_a_file_holds_the_judge_in_half_precision(tmp_path: Path) -> None:
    network, images, path = tiny_network(), noise_images(3), tmp_path / "new" / "judge.safetensors"
    write_judge(path, network, {"renderer": "1.0 abc"})
    assert {value.dtype for value in read_tensors(path).values()} == {torch.float16}
    assert read_metadata(path)["renderer"] == "1.0 abc"
    assert json.loads(read_metadata(path)["judge"])["hidden"] == [32, 64]
    halved = StreetsJudge(network.half().float()).judge(images)
    found = StreetsJudge.load(path).judge(images)
    for one, two in zip(halved, found, strict=True):
        assert np.array_equal(one, two)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is no Streets judge; make one"):
        StreetsJudge.load(path)
    notes = {"judge": json.dumps(vars(TINY))}
    write_tensors(path, {"a": torch.zeros(1)}, notes)
    with pytest.raises(CheckpointError, match="does not fit the network that it names"):
        StreetsJudge.load(path)


@pytest.mark.parametrize(
    "images",
    [
        noise_images(1, 16, 30),
        noise_images(1)[..., :1],
        noise_images(1)[0],
        noise_images(1).astype(np.float32),
        noise_images(1)[:0],
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: NDArray) -> None:
    with pytest.raises(ValueError, match="expected uint8 images"):
        StreetsJudge(tiny_network()).judge(images)
