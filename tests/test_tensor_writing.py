import collections
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tensor_samples import assert_same, some_tensors

from cldm import tensor_writing
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors


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
    assert torch.equal(found["shared.whole"], torch.arange(12.0))
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


@pytest.mark.parametrize("where", ["pathlib.Path.replace", "os.fsync", "cldm.tensor_writing._verify"])
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
        from pathlib import Path
        from cldm.tensor_writing import write_tensors
        Path.replace = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        write_tensors(sys.argv[1], {"new": torch.ones(1)})
    """)
    done = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -9
    assert list(read_tensors(path)) == ["old"]


def test_what_the_disk_changed_is_noticed_before_the_old_file_goes(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"old": torch.ones(1)})

    def write_another(file, *_):
        file.write(safetensors.torch.save({"x": torch.ones(2)}))

    monkeypatch.setattr(tensor_writing, "_write_safetensors", write_another)
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        write_tensors(path, {"x": torch.ones(3)})
    assert list(read_tensors(path)) == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


NOT_WHAT_WAS_VERIFIED = {
    "empty": lambda content, other: b"",
    "cut by one byte": lambda content, other: content[:-1],
    "cut in the middle": lambda content, other: content[: len(content) // 2],
    "of another tensor": lambda content, other: other,
}


@pytest.mark.parametrize("damage", NOT_WHAT_WAS_VERIFIED.values(), ids=NOT_WHAT_WAS_VERIFIED)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_the_file_is_opened_again_under_its_name(tmp_path, monkeypatch, name, damage):
    path, other = tmp_path / name, tmp_path / f"other_{name}"
    write_tensors(other, {"y": torch.ones(3)})
    rename = Path.replace

    def rename_badly(self, target):
        content = self.read_bytes()
        assert len(content) == other.stat().st_size  # so that the size alone tells nothing
        rename(self, target)
        target.write_bytes(damage(content, other.read_bytes()))

    monkeypatch.setattr(Path, "replace", rename_badly)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was verified .* write it again"):
        write_tensors(path, {"x": torch.ones(3)})
    assert {entry.name for entry in tmp_path.iterdir()} == {name, other.name}


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the peak of a process")
@pytest.mark.parametrize(("name", "limit"), [("a.safetensors", 60), ("a.ckpt", 60)])
def test_writing_needs_the_memory_of_about_one_tensor(tmp_path, name, limit):
    # VmHWM is of this program alone; ru_maxrss would inherit the peak of the test process.
    code = textwrap.dedent("""
        import re, sys, torch
        from pathlib import Path
        from cldm.tensor_writing import write_tensors
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        folder, name = Path(sys.argv[1]), sys.argv[2]
        write_tensors(folder / ("warm_" + name), {"x": torch.ones(10)})
        # 40 MB each, none contiguous; below 32 MB the C library may keep what was freed.
        tensors = {f"t{i}": torch.ones(10_000, 1000).T for i in range(5)}
        before = peak()
        write_tensors(folder / name, tensors)
        print(peak() - before)
    """)
    command = [sys.executable, "-c", code, tmp_path, name]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert (tmp_path / name).stat().st_size >= 200e6
    assert float(done.stdout) < limit
