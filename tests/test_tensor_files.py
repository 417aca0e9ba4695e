import collections
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import textwrap
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from cldm import tensor_files
from cldm.tensor_files import (
    CheckpointError,
    read_metadata,
    read_shapes,
    read_tensors,
    sha256_of,
    write_tensors,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Three elements each, so that narrow types put the next one off its boundary.
        str(dtype): (torch.rand(3, generator=generator) * 100).to(dtype)
        for dtype in reversed(DTYPES)
    }
    base = torch.arange(12.0)
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "shared.a": base,
        "shared.b": base[3:7],
        "expanded": torch.tensor([1.0]).expand(5),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


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


# ---- reading


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
    before, admitted = set(sys.modules), torch.serialization.get_safe_globals()
    found = read_tensors(path)
    assert_same(found, weights)
    assert not found["p"].requires_grad
    assert not any(name.startswith("pytorch_lightning") for name in set(sys.modules) - before)
    assert torch.serialization.get_safe_globals() == admitted  # nothing stays admitted afterwards


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
        ({"x": entry}, 12),  # bytes that belong to nobody
        ({"x": {"dtype": "F32"}}, 8),
        ({"x": entry | {"dtype": "F31"}}, 8),
    ]:
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\x00" * size)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path)
    path.write_bytes(struct.pack("<Q", 8) + b"{not js}")
    assert "damaged header" in refusal(path)


# ---- writing


def test_the_safetensors_library_reads_what_we_wrote(tmp_path):
    tensors, path = some_tensors(), tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"made": "here", "unicode": "\u00e9"})
    found = safetensors.torch.load_file(path)
    assert_same({name: found[name] for name in tensors}, tensors)
    assert set(found) == set(tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "here", "unicode": "\u00e9"}
    assert read_metadata(path) == {"made": "here", "unicode": "\u00e9"}
    assert_same(read_tensors(path), tensors)  # in the order in which they were given


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, some_tensors())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2} | dict.fromkeys(
        ("I8", "U8", "BOOL"), 1
    )
    header = json.loads(raw[8 : 8 + length])
    assert header
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".CKPT"])
def test_torch_reads_what_we_wrote_and_the_tensors_are_independent(tmp_path, suffix):
    tensors, path = some_tensors(), tmp_path / f"a{suffix}"
    write_tensors(path, tensors, {"made": "here"})
    found = torch.load(path, weights_only=True)["state_dict"]
    assert_same(found, tensors)
    found["shared.a"].zero_()
    assert torch.equal(found["shared.b"], torch.arange(3.0, 7.0))
    assert found["shared.b"].untyped_storage().nbytes() == 16
    assert read_metadata(path) == {"made": "here"}


def test_a_file_can_be_rewritten_from_its_own_mapped_tensors(tmp_path):
    for name in ("a.safetensors", "a.ckpt"):
        path = tmp_path / name
        write_tensors(path, some_tensors())
        tensors = read_tensors(path)
        write_tensors(path, tensors)
        assert_same(read_tensors(path), some_tensors())
        assert_same(tensors, some_tensors())  # the old mapping still holds


class Interrupting(dict):
    """A mapping whose fifth tensor is the user's Ctrl-C, once the file has begun."""

    armed = False

    def __getitem__(self, name):
        if self.armed and name == "t4":
            raise KeyboardInterrupt
        return super().__getitem__(name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / name
    write_tensors(path, {"old": torch.ones(1)})
    tensors = Interrupting({f"t{i}": torch.ones(1000) for i in range(6)})
    opened = Path.open

    def open_and_arm(self, *args, **kwargs):
        tensors.armed = True
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_and_arm)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, tensors)
    assert tensors.armed
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert list(read_tensors(path)) == ["old"]


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "cldm.tensor_files._verify"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_step_leaves_no_partial_file(tmp_path, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is CheckpointError else None):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_a_killed_write_leaves_the_target_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"old": torch.ones(1)})
    code = textwrap.dedent("""
        import os, signal, sys, torch
        from cldm.tensor_files import write_tensors
        os.replace = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        write_tensors(sys.argv[1], {"new": torch.ones(1)})
    """)
    done = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -9
    assert list(read_tensors(path)) == ["old"]


def test_what_the_disk_changed_is_noticed_before_the_old_file_goes(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"old": torch.ones(1)})

    def write_another(file, tensors, notes):
        file.write(safetensors.torch.save({"x": torch.ones(2)}))

    monkeypatch.setattr(tensor_files, "_write_safetensors", write_another)
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        write_tensors(path, {"x": torch.ones(3)})
    assert list(read_tensors(path)) == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**10, 10**10, 3_000_000))
    with pytest.raises(CheckpointError, match=r"needs 0\.005 GB .* 0\.003 GB free"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1_000_000)})
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(100)})


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({}, None, "no tensors"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, None, "complex64"),
        ({"x": torch.ones(2).to_sparse()}, None, "sparse"),
        ({"x": torch.ones(2, device="meta")}, None, "meta device"),
        ({"__metadata__": torch.ones(2)}, None, "__metadata__"),
        ({"x": torch.ones(2)}, {"steps": 3}, "'steps' is int"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_what_cannot_be_written_is_refused_first(tmp_path, tensors, metadata, match, name):
    with pytest.raises(CheckpointError, match=match):
        write_tensors(tmp_path / name, tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_and_not_made(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder"):
        write_tensors(tmp_path / "nowhere" / "a.ckpt", {"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="is a folder"):
        write_tensors(tmp_path, {"x": torch.ones(1)})


def test_a_link_to_the_target_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.safetensors"
    link.symlink_to(tmp_path / "disk" / "real.safetensors")
    write_tensors(link, {"x": torch.ones(1)})
    assert link.is_symlink()
    assert list(safetensors.torch.load_file(tmp_path / "disk" / "real.safetensors")) == ["x"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
def test_a_written_file_has_the_usual_mode(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_sha256_of_more_than_one_piece(tmp_path):
    content = os.urandom((1 << 20) + 12345)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the peak of a process")
@pytest.mark.parametrize(("name", "limit"), [("a.safetensors", 40), ("a.ckpt", 60)])
def test_writing_needs_the_memory_of_about_one_tensor(tmp_path, name, limit):
    # VmHWM is of this program alone; ru_maxrss would inherit the peak of the test process.
    code = textwrap.dedent("""
        import re, sys, torch
        from pathlib import Path
        from cldm.tensor_files import write_tensors
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        folder, name = Path(sys.argv[1]), sys.argv[2]
        write_tensors(folder / ("warm_" + name), {"x": torch.ones(10)})
        tensors = {f"t{i}": torch.ones(5000, 1000).T for i in range(10)}  # 20 MB each, none contiguous
        before = peak()
        write_tensors(folder / name, tensors)
        print(peak() - before)
    """)
    command = [sys.executable, "-c", code, tmp_path, name]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert (tmp_path / name).stat().st_size > 200e6
    assert float(done.stdout) < limit
