"""The benchmarks: each prints one line of JSON, and both of its sides compute the same."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from house import ROOT, run_script

SCRIPTS = (
    *("train_step.py", "fast_quality.py", "sample_step.py", "start_up.py"),
    *("prior_pass.py", "prior_loss.py", "prior_table.py", "convert.py", "web_page.py"),
)
SMALL = ("--size", "64", "64")


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_common", ROOT / "benchmarks/common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_benchmark(script: str, *arguments: str) -> dict[str, Any]:
    """Run on the miniature; return its one line."""
    pytest.importorskip("diffusers")
    result = run_script(f"benchmarks/{script}", *SMALL, *arguments, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring(script: str) -> None:
    result = run_script(f"benchmarks/{script}", "--help")
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"python benchmarks/{script}" in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("train_step.py", ("--size", "64", "100"), "--size"),
        ("sample_step.py", ("--steps", "0"), "--steps"),
        ("fast_quality.py", ("--seeds", "0"), "--seeds"),
        ("prior_pass.py", ("--images", "0"), "--images"),
        ("prior_loss.py", ("--prior", "nowhere.safetensors"), "--prior"),
        ("prior_table.py", ("--prior", "nowhere.safetensors", "--out", "x"), "--prior"),
        ("start_up.py", ("--ckpt", "models/cldm_v15.yaml"), "--diffusers"),
        ("convert.py", ("--ckpt", "nowhere.safetensors"), "--ckpt"),
        ("convert.py", ("--make", "nowhere.yaml"), "--make"),
        ("web_page.py", ("--num", "0"), "--num"),
    ],
)
def test_wrong_arguments_are_refused_and_named(script: str, arguments: tuple[str, ...], names: str) -> None:
    result = run_script(f"benchmarks/{script}", *arguments)
    assert result.returncode == 2
    assert names in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_loading_is_compared_on_rendered_frames() -> None:
    arguments = ("--samples", "2", "--size", "64", "128", "--workers", "1", "--batch", "1", "--steps", "1")
    result = run_script("benchmarks/load_frames.py", *arguments, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout)
    assert set(record["ms_per_sample"]) == {"predecessor", "files", "cache"}
    assert record["frames"] == "streets"


def test_sides_take_turns_and_the_first_one_changes(common: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    sides = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}
    seconds = common.alternate(sides, 2, warmup=1)
    assert calls == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_slower_side_shows_in_the_ratio(common: ModuleType) -> None:
    sides = {"ours": lambda _: time.sleep(0.02), "theirs": lambda _: time.sleep(0.08)}
    seconds = common.alternate(sides, 3)
    assert common.ratio(seconds["theirs"], seconds["ours"])["median"] > 2
    assert common.ratio([6.0, 8.0], [3.0, 2.0]) == {"median": 3.0, "of_minima": 3.0}


def test_memory_of_this_process_grows_by_what_it_takes(common: ModuleType) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc")
    before = common.memory_mib()
    ballast = bytearray(b"\1" * (64 << 20))
    grown = common.memory_mib()["anonymous_mib"] - before["anonymous_mib"]
    assert 60 < grown < 140, len(ballast)


@pytest.mark.slow
def test_a_training_step_is_that_of_diffusers() -> None:
    arguments = ("--batch", "2", "--steps", "1", "--memory", "--peak_tflops", "1")
    record = run_benchmark("train_step.py", *arguments)
    for side in ("", "_cached"):
        assert record[f"relative_error{side}"] < 1e-5
        assert record[f"relative_error_gradient{side}"] < 1e-4
    assert 0 < record["relative_error_fast"] < 0.01
    assert 0 < record["relative_error_gradient_fast"] < 0.05
    assert all(record[name]["median"] > 0 for name in ("ratio", "ratio_cached", "ratio_fast"))
    assert record["cache_fill_s_per_image"] > 0
    for side in ("ours", "ours_cached", "ours_fast", "diffusers"):
        assert record["memory"][side]["peak_rss_mib"] > 100
        assert record[side]["share_of_peak"] > 0
    assert record["ours_cached"]["tflop"] < record["ours"]["tflop"], "nothing is encoded"


@pytest.mark.slow
def test_the_fast_path_is_held_against_the_spread_of_seeds() -> None:
    arguments = ("--batch", "2", "--steps", "2", "--samples", "4", "--held_out", "4", "--seeds", "2")
    record = run_benchmark("fast_quality.py", *arguments)
    assert {len(losses) for losses in record["loss"].values()} == {2}
    for losses in record["loss"].values():
        assert losses == pytest.approx(record["loss"]["plain"], rel=0.02)
    assert record["spread_of_seeds"] > 0


@pytest.mark.slow
def test_a_sampling_step_is_that_of_diffusers() -> None:
    record = run_benchmark("sample_step.py", "--batch", "2", "--steps", "2")
    assert record["relative_error"] < 1e-5
    assert record["relative_error_last"] < 1e-4
    assert record["ratio"]["median"] > 0


@pytest.mark.slow
def test_start_up_measures_both_sides() -> None:
    record = run_benchmark("start_up.py", "--repeat", "1")
    for side in ("ours", "diffusers"):
        stages = sum(record[side][name] for name in ("import_s", "load_s", "step_s"))
        assert stages == pytest.approx(record[side]["total_s"], rel=0.01)
        assert record[side]["peak_anonymous_mib"] < record[side]["peak_rss_mib"]


@pytest.mark.slow
def test_a_conversion_is_measured_there_and_back_and_beside_diffusers(tmp_path: Path) -> None:
    record = run_benchmark("convert.py", "--work", str(tmp_path))
    for side in ("ours", "back", "diffusers"):
        assert record[side]["seconds"] > 0
        assert 100 < record[side]["peak_anonymous_mib"] < record[side]["peak_rss_mib"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_prior_is_measured_by_both_sides_alike() -> None:
    result = run_script(
        "benchmarks/prior_pass.py", *SMALL, "--images", "2", "--batch", "2", "--steps", "1", timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout)
    assert record["relative_error"] < 1e-5
    assert record["ours"]["encodings_per_image"] == 1
    assert record["predecessor"]["encodings_per_image"] == 2 + record["classes_per_image"]
    assert record["ratio"]["median"] > 1
