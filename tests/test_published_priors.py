"""SCP-Diff's statistics: read as numpy would read them, with nothing in them executed."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cldm.published_priors import read_object_array, read_published
from cldm.tensor_files import CheckpointError

K, C, H, W = 19, 4, 2, 3


def write_npy(path: Path, value: Any, protocol: int = 3) -> None:
    """As np.save writes an object, in the protocols that it has used, with the module names of numpy 1."""
    array = np.empty((), object)
    array[()] = value
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    content = pickle.dumps(array, protocol=protocol)
    if protocol < 4:  # names of protocol 4 carry their length
        content = content.replace(b"numpy._core", b"numpy.core")
    path.write_bytes(header.getvalue() + content)


def write_statistics(folder: Path, ids: range) -> tuple[Path, dict[str, Any]]:
    """The three files, with statistics of some ids."""
    rng = np.random.default_rng(0)
    spatial = {name: rng.uniform(0.1, 1, (C, H, W)).astype(np.float32) for name in ("mean", "std")}
    by_class = {i: {n: rng.uniform(0.1, 1, C).astype(np.float32) for n in ("mean", "std")} for i in ids}
    joint = {name: rng.uniform(0.1, 1, (256, C, H, W)).astype(np.float32) for name in ("mean", "std")}
    joint["count"] = np.zeros((256, 1, H, W), np.float32)
    joint["count"][list(ids)] = rng.integers(1, 50, (len(ids), 1, H, W))
    found = {"spatial_mean_std": spatial, "categorical_mean_std": by_class, "spatial_class_mean_std": joint}
    for name, value in found.items():
        write_npy(folder / f"cs_{name}.npy", value)
    return folder / "cs", found


def test_statistics_become_moments(tmp_path: Path) -> None:
    prefix, written = write_statistics(tmp_path, range(10))
    written["categorical_mean_std"][3]["std"][:] = np.nan  # n - 1 of a class that was seen once
    written["spatial_class_mean_std"]["count"][3] = [[[1, 0, 0], [0, 0, 0]]]
    for name, value in written.items():
        np.save(f"{prefix}_{name}.npy", value)  # as numpy of today writes it
    found = read_published(prefix, range(K), images=100)
    moments, joint = found.moments, written["spatial_class_mean_std"]
    assert found.phantoms == {}
    assert moments.images == 100
    np.testing.assert_allclose(moments.places.mean, written["spatial_mean_std"]["mean"].transpose(1, 2, 0))
    np.testing.assert_allclose(
        moments.places.variance**0.5, written["spatial_mean_std"]["std"].transpose(1, 2, 0), rtol=1e-6
    )
    np.testing.assert_array_equal(moments.joint.count, joint["count"][:K, 0])
    np.testing.assert_allclose(moments.joint.mean[2], joint["mean"][2].transpose(1, 2, 0))
    assert (moments.joint.mean[3, 1] == 0).all()  # where the count is 0 there is nothing
    for k, count in ((2, joint["count"][2].sum()), (3, 1), (12, 0)):
        assert moments.classes.count[k] == count
    np.testing.assert_allclose(moments.classes.mean[2], written["categorical_mean_std"][2]["mean"])
    assert (moments.classes.variance[3] == 0).all()
    assert moments.classes_by_image.count[2] == joint["count"][2].max()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_protocol_is_read_as_numpy_reads_it(tmp_path: Path, protocol: int) -> None:
    value = {"a": np.arange(6, dtype=">f4").reshape(2, 3).T, 1: [np.int64(3), 2.5, None, True, "text"]}
    write_npy(tmp_path / "x.npy", value, protocol)
    found = read_object_array(tmp_path / "x.npy")
    np.testing.assert_array_equal(found["a"], value["a"])
    assert found[1] == value[1]


def test_phantom_classes_are_named(tmp_path: Path) -> None:
    prefix, _ = write_statistics(tmp_path, range(256))
    found = read_published(prefix, range(K), images=100)
    assert [len(ids) for ids in found.phantoms.values()] == [256 - 19 - 1] * 2  # 255 is void
    said = "\n".join(found.sentences())
    assert "categorical_mean_std: contaminated by 236 phantom classes (19, 20, 21, 22, 23, ...)" in said
    assert "100 images, which no file says" in said
    # ADE20K's files are by file id 0..150, where 0 is its "other"
    ade = read_published(prefix, range(1, 151), images=100)
    assert ade.moments.num_classes == 150
    assert ade.phantoms["categorical_mean_std"] == [0, *range(151, 255)]


class Bait:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, protocol: int
) -> None:
    bait = tmp_path / "bait"
    write_npy(tmp_path / "x.npy", {"mean": np.zeros(2), "std": Bait(bait)}, protocol)
    with pytest.raises(CheckpointError, match=r"it asks for (posix|nt|os)\.mkdir, which may run code"):
        read_object_array(tmp_path / "x.npy")
    assert not bait.exists()
    pickle.loads(pickle.dumps(Bait(bait)))  # the bait is live
    assert bait.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no numpy", r"is no \.npy file"),
        (b"", r"is no \.npy file"),
        (None, r"its header says .*'<f8'"),
        (np.zeros(2, "datetime64[s]"), "array of type <M8"),
        (np.zeros(2, [("a", "f4")]), "array of type .V4"),
        (np.array([{}, 1], object), r"array of objects of shape \(2,\)"),
        (eval, r"asks for \w+\.eval"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.npy"
    if content is None:
        np.save(path, np.zeros(3))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_npy(path, {"mean": content})
    with pytest.raises(CheckpointError, match=message):
        read_object_array(path)


def test_missing_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    prefix, _ = write_statistics(tmp_path, range(19))
    cut = tmp_path / "cs_spatial_mean_std.npy"
    whole = cut.read_bytes()
    for size in (100, 140, len(whole) - 30):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="was not read"):
            read_published(prefix, range(K), images=10)
    write_npy(cut, {"mean": np.zeros((C, H, W + 1)), "std": np.ones((C, H, W + 1))})
    with pytest.raises(CheckpointError, match="hold no statistics of SCP-Diff"):
        read_published(prefix, range(K), images=10)
    write_npy(cut, {"other": 1})
    with pytest.raises(CheckpointError, match="hold no statistics of SCP-Diff: KeyError 'mean'"):
        read_published(prefix, range(K), images=10)
    cut.unlink()
    with pytest.raises(CheckpointError, match="found nothing"):
        read_published(prefix, range(K), images=10)
