import collections
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from tensor_samples import assert_same, some_tensors

from cldm.digests import fingerprint, sha256_of
from cldm.tensor_files import (
    CheckpointError,
    read_metadata,
    read_shapes,
    read_tensors,
)
from cldm.tensor_writing import write_tensors

MIB = 1 << 20


def refusal(path: Path) -> str:
    """Every reader refuses the file with the same kind of sentence; return it."""
    sentences = set()
    for read in (read_tensors, read_shapes):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        sentences.add(str(caught.value))
    assert len(sentences) == 1
    sentence = sentences.pop()
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


def test_reads_what_the_safetensors_library_wrote(tmp_path):
    tensors = {name: tensor.clone().contiguous() for name, tensor in some_tensors().items()}
    path = tmp_path / "odd_name.ckpt"  # the suffix lies
    safetensors.torch.save_file(tensors, path, metadata={"made": "here"})
    found = read_tensors(path)
    assert_same({name: found[name] for name in tensors}, tensors)
    assert set(found) == set(tensors)
    assert read_metadata(path) == {"made": "here"}
    assert read_shapes(path) == {name: tuple(tensors[name].shape) for name in found}


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("module",), ("state_dict", "module")])
@pytest.mark.parametrize("is_zip", [True, False])
def test_reads_what_torch_saved(tmp_path, nest, is_zip):
    tensors = some_tensors()
    payload = tensors | {"note": "not a tensor"}
    for name in reversed(nest):
        payload = {"epoch": 3, name: payload}
    path = tmp_path / "weights.safetensors"  # the suffix lies
    torch.save(payload, path, _use_new_zipfile_serialization=is_zip)
    assert_same(read_tensors(path), tensors)
    assert read_shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert read_metadata(path) == {}


def test_a_mapped_tensor_can_change_without_changing_the_file(tmp_path):
    for name in ("a.safetensors", "a.ckpt"):
        path = tmp_path / name
        write_tensors(path, {"x": torch.ones(4)})
        read_tensors(path)["x"].zero_()
        assert torch.equal(read_tensors(path)["x"], torch.ones(4))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_files_are_memory_mapped(tmp_path, name):
    path = tmp_path / name
    write_tensors(path, {"x": torch.ones(100_000)})
    tensors = read_tensors(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert tensors["x"].sum() == 100_000


def fake_module(monkeypatch, dotted: str, name: str, **members) -> type:
    """Give Python a class under a foreign dotted name, so that the real pickler writes that name."""
    for depth in range(1, dotted.count(".") + 2):
        parent = ".".join(dotted.split(".")[:depth])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    made = type(name, members.pop("bases", ()), {"__module__": dotted, **members})
    monkeypatch.setattr(sys.modules[dotted], name, made, raising=False)
    return made


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_lightning_checkpoint_gives_its_weights(tmp_path, monkeypatch, is_zip):
    weights = {"model.w": torch.arange(3.0), "p": torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / "v1-5.ckpt"
    with monkeypatch.context() as patch:
        callback = fake_module(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        attributes = fake_module(patch, "pytorch_lightning.utilities.parsing", "AttributeDict", bases=(dict,))
        hparams = attributes(lr=1e-4)
        payload = {
            "epoch": 1,
            "callbacks": {callback: {"best_model_score": np.float64(0.25), "dir": Path("runs")}},
            "hyper_parameters": OmegaConf.create({"unet": {"channels": [1, 2]}, "lr": 1e-4}),
            "hparams": hparams,
            "optimizer_states": [{"state": collections.defaultdict(dict, {0: {"step": 1}})}],
            "loops": callback(),
            "state_dict": collections.OrderedDict(weights),
        }
        torch.save(payload, path, _use_new_zipfile_serialization=is_zip)
    # The oracle for "a plain safe load would refuse this": torch itself.
    with pytest.raises(pickle.UnpicklingError, match="Unsupported"):
        torch.load(path, weights_only=True)
    before, admitted = set(sys.modules), set(torch.serialization.get_safe_globals())
    found = read_tensors(path)
    assert_same(found, weights)
    assert not found["p"].requires_grad
    assert not any(name.startswith("pytorch_lightning") for name in set(sys.modules) - before)
    assert set(torch.serialization.get_safe_globals()) == admitted  # nothing stays admitted afterwards


class Evil:
    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def save_variants(payload, path: Path):
    """Write a payload in every pickled form that a checkpoint may have."""
    torch.save(payload, path)
    yield "zip"
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    yield "legacy"
    torch.save(payload, path, pickle_protocol=4)
    yield "zip, protocol 4"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(payload, protocol=protocol))
        yield f"pickle {protocol}"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [(os.system, "touch {}", f"{os.name}.system"), (exec, "open('{}', 'w')", "builtins.exec")],
)
def test_code_in_a_pickle_is_named_and_never_runs(tmp_path, function, argument, name):
    bait = tmp_path / "was_here"
    path = tmp_path / "evil.ckpt"
    payload = {"state_dict": {"w": torch.ones(1)}, "x": Evil(function, argument.format(bait))}
    for variant in save_variants(payload, path):
        sentence = refusal(path)
        assert name in sentence, variant
        assert not bait.exists(), variant
    path.write_bytes(pickle.dumps(payload))
    pickle.loads(path.read_bytes())  # the bait is live: the ordinary unpickler takes it
    assert bait.exists()


def test_a_name_that_a_pickle_abbreviates_is_still_told(tmp_path):
    # Protocol 4 writes a repeated string once and refers back to it, here the module of exec.
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([exec.__module__, "between", Evil(exec, "1")], protocol=4))
    assert path.read_bytes().count(b"builtins") == 1
    assert "asks to run builtins.exec;" in refusal(path)


def test_admitted_names_are_not_imported_but_stood_in_for(tmp_path, monkeypatch):
    """A package on the allow-list gives no way in: its functions are called as empty stand-ins."""
    called = []
    path = tmp_path / "a.ckpt"
    function = fake_module(monkeypatch, "pytorch_lightning.evil", "run", __init__=lambda *a: called.append(a))
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Evil(function, "rm")}, path)
    assert torch.equal(read_tensors(path)["w"], torch.ones(1))
    assert called == []


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "a.pt")


def write_zip(path: Path, names: list[str], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02}." * 50)


NOT_WEIGHTS = {
    "is empty": lambda path: path.write_bytes(b""),
    "is a web page": lambda path: path.write_bytes(b"\n <!DOCTYPE html><html><body>404</body></html>"),
    "is a web page,": lambda path: path.write_bytes(b"<HTML><head>"),
    "git-lfs pointer": lambda path: path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    ),
    "is JSON text": lambda path: path.write_bytes(b'{"error": "Invalid credentials"}'),
    "is a gzip archive": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00" + b"\x00" * 40),
    "is a tar archive": lambda path: tarfile.open(path, "w").close() or make_tar(path),
    "is a numpy array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "unknown format (it starts with b'hello": lambda path: path.write_bytes(b"hello world, I am a file"),
    "not a torch file (it holds readme.txt)": lambda path: write_zip(path, ["readme.txt"]),
    "not a torch file (it is empty)": lambda path: write_zip(path, []),
    "compressed again": lambda path: write_zip(path, ["a/data.pkl"], zipfile.ZIP_DEFLATED),
    "TorchScript": lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path),
    "is a folder": lambda path: path.mkdir(),
    "is a diffusers folder": lambda path: path.mkdir() or (path / "model_index.json").write_text("{}"),
    "does not exist": lambda path: None,
    "is not a regular file": lambda path: os.mkfifo(path),
    "holds an optimizer state": lambda path: torch.save({"state": {}, "param_groups": []}, path),
    "holds no tensors, only epoch": lambda path: torch.save({"epoch": 1}, path),
    "holds a Tensor": lambda path: torch.save(torch.ones(2), path),
    "a plain Python pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
}


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "test.py")


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning"
)  # TorchScript is on its way out, its files are not
@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_refuses_in_one_sentence_what_is_not_a_weight_file(tmp_path, what):
    path = tmp_path / "model.safetensors"
    NOT_WEIGHTS[what](path)
    sentence = refusal(path)
    assert what in sentence
    assert "expected" in sentence or "again" in sentence or "torch.save" in sentence


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "legacy"])
def test_a_file_cut_anywhere_is_refused(tmp_path, name):
    whole, cut = tmp_path / name, tmp_path / f"cut_{name}"
    tensors = {f"t{i}": torch.full((40,), float(i)) for i in range(5)}
    if name == "legacy":
        torch.save(tensors, whole, _use_new_zipfile_serialization=False)
    else:
        write_tensors(whole, tensors, {"a": "b"})
    content = whole.read_bytes()
    for size in {*range(0, len(content), 37), *range(12), len(content) - 1}:
        cut.write_bytes(content[:size])
        assert str(cut) in refusal(cut), size
    cut.write_bytes(content)
    assert_same(read_tensors(cut), tensors)


def test_a_damaged_safetensors_header_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, size in [
        ({"x": entry | {"data_offsets": [0, 4]}}, 4),  # 2 floats in 4 bytes
        ({"x": entry, "y": entry}, 8),  # two tensors over one another
        ({"x": {"dtype": "F32"}}, 8),
        ({"x": entry | {"dtype": "F31"}}, 8),
    ]:
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\x00" * size)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path)
    raw = json.dumps({"x": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\x00" * 12)  # 4 bytes that belong to nobody
    assert f"{8 + len(raw) + 12} bytes, its header promises {8 + len(raw) + 8}" in refusal(path)
    path.write_bytes(struct.pack("<Q", 8) + b"{not js}")
    assert "damaged header" in refusal(path)


def test_sha256_of_more_than_one_piece(tmp_path):
    content = os.urandom((1 << 20) + 12345)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def marked(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return fingerprint(path)


@pytest.mark.parametrize("size", [0, 1000, MIB, MIB + 1, 5 * MIB + 7])
def test_a_fingerprint_is_of_the_length_and_of_64_pieces(tmp_path, size):
    content, piece = random.Random(0).randbytes(size), 64 * 1024
    starts = [(max(0, size - piece) * i) // 63 for i in range(64)]
    expected = hashlib.sha256(
        str(size).encode() + b"".join(content[s : s + piece] for s in starts)
    ).hexdigest()
    mark = marked(tmp_path / "a", content)
    assert len(mark) == 16
    assert expected.startswith(mark)
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == mark


def test_a_fingerprint_sees_a_run_of_changed_bytes_anywhere(tmp_path):
    # Models that share header and ends differ over whole tensors; a gap between pieces is a 63rd of the file.
    content = random.Random(0).randbytes(20 * MIB)
    marks = {marked(tmp_path / "a", content)}
    for start in range(0, 20, 2):
        changed = bytearray(content)
        changed[start * MIB : (start + 1) * MIB] = bytes(MIB)
        marks.add(marked(tmp_path / "a", bytes(changed)))
    assert len(marks) == 11
    for change_at in (0, -1):
        changed = bytearray(content)
        changed[change_at] ^= 1
        marks.add(marked(tmp_path / "a", bytes(changed)))
    assert len(marks) == 13


def test_a_fingerprint_tells_files_apart_by_their_length_alone(tmp_path):
    marks = {marked(tmp_path / "a", bytes(MIB + count)) for count in (0, 1, 2)}
    assert len(marks) == 3


def test_of_two_pickles_in_a_zip_neither_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, b"\x80\x02}.")  # an empty dict; torch would read this one
    with pytest.raises(CheckpointError, match="two entries of one name"):
        read_tensors(path)
