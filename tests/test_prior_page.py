"""The page of a prior: what its pictures and figures are, and that it is one file."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prior_samples import C, K, random_moments, write_random_prior

import noise_prior
from cldm.cldm import ControlLDM
from cldm.prior_file import read_prior
from cldm.prior_pass import FirstStage, decoder
from cldm.tensor_writing import write_tensors
from datasets.label_space import LabelSpace
from datasets.streets.tree import Plan, make_tree
from metrics.prior_page import prior_page, rising_colours, signed_colours, swatches


def pictures_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_page_shows_places_classes_and_counts(tiny_model: ControlLDM, tmp_path: Path) -> None:
    moments = random_moments()
    moments.classes_by_image.count[4] = moments.classes.count[4] = 0
    moments.classes.mean[4] = moments.classes.m2[4] = 0
    moments.classes_by_image.mean[4] = moments.classes_by_image.m2[4] = 0
    write_random_prior(tmp_path / "p.safetensors", tiny_model, moments)
    prior = read_prior(tmp_path / "p.safetensors")
    page = prior_page(prior, decoder(FirstStage(tiny_model.first_stage_model, tiny_model.scale_factor)))
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    shown = pictures_of(page)
    assert len(shown) == 2 * C + K - 1
    place = shown[0][16::32, 16::32]  # cells of 32 pixels
    np.testing.assert_array_equal(place, signed_colours(moments.places.mean[..., 0]))
    np.testing.assert_array_equal(
        shown[C + 1][16::32, 16::32], rising_colours(moments.places.variance[..., 1] ** 0.5)
    )
    names = LabelSpace.load("cityscapes").names
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", page)
    order = [next(k for k, name in enumerate(names) if f">{name}</span>" in row) for row in rows]
    assert order == sorted(range(K), key=lambda k: (-moments.classes.count[k], k))
    for k, row in zip(order, rows, strict=True):
        assert f"<td>{moments.classes_by_image.count[k]}</td>" in row
        assert f"<td>{moments.classes.count[k]}</td>" in row
        assert ("<img" in row) == (k != 4)


def test_a_swatch_is_the_decoded_mean(tiny_model: ControlLDM) -> None:
    means = np.random.default_rng(0).normal(size=(3, C))
    decode = decoder(FirstStage(tiny_model.first_stage_model, tiny_model.scale_factor))
    latent = torch.from_numpy(means[1]).float().view(1, C, 1, 1).expand(1, C, 8, 8)
    with torch.no_grad():
        image = tiny_model.decode_first_stage(latent)[0].permute(1, 2, 0)
    expected = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[16:48, 16:48]
    assert np.abs(swatches(means, decode)[1].astype(int) - expected).max() <= 1


def test_colours_say_what_is_below_and_above(tmp_path: Path) -> None:
    values = np.array([[-2.0, 0, 1], [2, 0.5, -1]])
    colours = signed_colours(values).astype(int)
    assert (colours[0, 1] > 240).all()
    assert colours[0, 0, 2] > colours[0, 0, 0]
    assert colours[1, 0, 0] > colours[1, 0, 2]
    assert signed_colours(np.zeros((2, 2))).min() > 240
    brightness = rising_colours(values).sum(axis=-1)
    assert (np.argsort(values.ravel()) == np.argsort(brightness.ravel())).all()


def test_the_script_draws_what_it_measured(
    tiny_model_once: ControlLDM, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "streets", Plan("camera", size=(64, 128), train=2, val=1), workers=1)
    write_tensors(tmp_path / "model.safetensors", tiny_model_once.state_dict())
    words = ["--dataset", "streets", "--root", tmp_path / "streets", "--ckpt", tmp_path / "model.safetensors"]
    words += ["--config", tiny_yaml, "--resolution", 64, 128, "--save_dir", tmp_path, "--device", "cpu"]
    noise_prior.main([*map(str, words), "--show", str(tmp_path / "new" / "page.html")])
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "2 images of streets, split train" in page
    noise_prior.main([*map(str, words), "--show", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    assert "is there already" in capsys.readouterr().out
