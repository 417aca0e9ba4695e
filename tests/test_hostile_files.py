"""No file makes a reader fall over, run code, take memory or time; what is refused is in a sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_files import KINDS, calls, make_file, sound, tuple_bomb, word
from hostile_reading import BAIT, faults_of, faults_of_result

from cldm.pickle_scan import scan_pickle
from cldm.tensor_files import CheckpointError, read_shapes, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import recorded_yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see what a process takes")
@pytest.mark.parametrize(
    "count", [300, pytest.param(5000, marks=pytest.mark.soak)], ids=lambda count: f"{count} files"
)
def test_hostile_files_are_read_or_refused_in_a_sentence(count: int) -> None:
    command = [sys.executable, str(ROOT / "tests/hostile_reading.py"), "0", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    lines = done.stdout.splitlines()
    faults = [line for line in lines if line.startswith("FAULT")]
    replay = f"replay NUMBER: PYTHONPATH=. python tests/hostile_reading.py NUMBER 1\n{done.stderr[-2000:]}"
    assert not faults, "\n".join([*faults[:20], replay])
    assert done.returncode == 0, f"status {done.returncode} at file {lines[-1:]}; {replay}"
    tally = json.loads(lines[-1])
    assert tally["files"] == count
    assert tally["kinds"].keys() == {kind.__name__ for kind, _ in KINDS}


def test_a_file_is_a_function_of_its_number(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for seed in (1, 2, 30):
        kinds, contents = set(), set()
        for folder in ("a", "b"):
            (tmp_path / folder / str(seed)).mkdir()
            kind, path = make_file(seed, tmp_path / folder / str(seed))
            kinds.add(kind)
            contents.add(path.read_bytes() if path.is_file() else b"")
        assert len(kinds) == len(contents) == 1


# -- the watch sees what it is for ------------------------------------------------------------------------


def test_the_bait_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = 0
    for call in calls(BAIT):
        try:
            pickle.loads(pickle.dumps(call))  # the ordinary unpickler makes the call
        except ImportError:
            continue
        taken += Path(BAIT).exists()
        Path(BAIT).rmdir() if Path(BAIT).is_dir() else Path(BAIT).unlink(missing_ok=True)
    assert taken >= 7


def test_code_that_ran_a_wrong_sentence_and_made_up_numbers_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    path.write_bytes(sound(random.Random(0)))
    assert list(faults_of("untouched", path)) == []
    Path(BAIT).touch()
    assert list(faults_of("untouched", path)) == ["code in the file was run"]
    Path(BAIT).unlink()
    path.write_bytes(b"hello")
    assert list(faults_of("untouched", path)) == ["a sound file was not read"]
    monkeypatch.setattr("hostile_reading.READERS", (lambda path: {}["lost"],))
    assert list(faults_of("noise", path)) == ["<lambda> raised KeyError: 'lost'"]
    made_up = {"read_tensors": {"w": torch.zeros(100)}, "read_shapes": {"w": (100,)}}
    assert list(faults_of_result(made_up, 40)) == ["400 bytes of numbers in a file of 40"]


# -- what the files found ---------------------------------------------------------------------------------


def safetensors(header: str, data: bytes = bytes(8)) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "a name twice": f'{{"w":{ENTRY},"w":{ENTRY}}}',
    "w has more or fewer bytes": '{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "belongs to two tensors": f'{{"w":{ENTRY},"v":{ENTRY}}}',
    "w is of type F31": '{"w":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}',
    "it holds Infinity": '{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}',
    "the shape or the place of w": '{"w":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}',
    "its notes are not text": f'{{"__metadata__":{{"a":1}},"w":{ENTRY}}}',
    "it is no JSON": '{"w":' + "[" * 100_000,
    "has no dtype, shape": '{"w":{}}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_told_by_its_lie(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(safetensors(HEADERS[what]))
    for read in (read_tensors, read_shapes):
        with pytest.raises(CheckpointError, match="damaged header") as caught:
            read(path)
        assert what in str(caught.value)


def test_a_tuple_that_takes_forever_to_hash_is_a_knot() -> None:
    def scan(body: bytes) -> bool:
        return scan_pickle(io.BytesIO(b"\x80\x02" + body + b".")).is_knotted

    assert scan(b"}" + tuple_bomb(40, 2) + word("x") + b"s")
    assert scan(tuple_bomb(500_000, 1))
    assert not scan(tuple_bomb(5, 2))
    for payload in (
        {"a": (1, (2, (3,)))},
        tuple(range(100_000)),
        [((1, 2),) * 50] * 9,
        {"x": {(1, 2): {3, 4}}},
    ):
        assert not scan(pickle.dumps(payload, 2)[2:-1])
    assert not scan(pickle.dumps({"w": torch.nn.Linear(2, 2), "n": np.zeros(3)}, 2)[2:-1])


def test_a_sentence_is_plain_and_short_whatever_the_names_are() -> None:
    sentence = str(CheckpointError(f"model.pth holds \x1b[2J{'x' * 100_000}\n\ud800; expected weights"))
    assert sentence.isprintable()
    assert len(sentence) < 2100
    assert sentence.startswith("model.pth holds ?[2Jxxx")
    assert sentence.endswith("??; expected weights")


NOTES = {
    "references": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "a knot": "a: &a {b: *a}",
    "depth": "a: " + "[" * 3000,
    "a date that is none": "a: 2020-99-99",
    "a number of many digits": "a: " + "9" * 5000,
    "a call": "a: !!python/object/apply:os.mkdir [was_here]",
    "a name that is none": "2020-01-01: x",
    "an environment variable": "a: ${oc.env:HOME}",
}


@pytest.mark.parametrize("what", NOTES)
def test_a_configuration_in_a_file_is_plain_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tensors("x.safetensors", {"w": torch.ones(1)}, {"model_config": NOTES[what]})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its model_config is no plain") as caught:
        recorded_yaml("x.safetensors", "model_config")
    assert "\n" not in str(caught.value)
    assert not Path(BAIT).exists()
