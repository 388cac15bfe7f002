"""Every recipe through the real compilers of TPU and GPU, for machines that are only described.

A target is skipped where its compiler is not installed: `pip install -e ".[tpu-aot]"`, and in
another environment `".[gpu-aot]"`. The compilers read their settings while jax is imported, so they
run in a process of their own: `python -m benchmarks.aot`, whose bounds are asserted here.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from optlab import recipes

ROOT = pathlib.Path(__file__).parent.parent
# Of a leaf of 64 MiB the compiler copies what the second pass reads into on-chip memory while the
# first one runs, and counts the copy at both ends.
PREFETCHED = {"adagrad_norm", "adamp", "allora", "nap", "sgd_sai", "sgdp"}
ONE_PASS = ("adabelief", "diffgrad", "lion", "lion_k", "signum")


def _installed(*modules):
    found = ""
    for module in modules:
        found = f"{found}.{module}" if found else module
        if importlib.util.find_spec(found) is None:
            return False
    return True


def _compile_all(target, directory):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    out = directory / target
    command = [sys.executable, "-W", "error", "-m", "benchmarks.aot", "--target", target]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    return {(row["method"], row["tree"]): row for row in rows}


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    if not _installed("libtpu"):
        pytest.skip("libtpu is not installed")
    return _compile_all("tpu", tmp_path_factory.mktemp("aot"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    if not _installed("jax_plugins", "xla_cuda13"):
        pytest.skip("jax-cuda13-plugin is not installed")
    return _compile_all("gpu", tmp_path_factory.mktemp("aot"))


@pytest.mark.parametrize("name", recipes.__all__)
def test_tpu_moves_no_more_bytes_than_promised(tpu, name):
    large, row = tpu[name, "large_matrix"], tpu[name, "one_matrix"]
    assert large["least"] <= large["bytes/param"] <= large["bound"]
    assert row["without prefetch"] <= row["bound"]
    assert name in PREFETCHED or row["bytes/param"] <= row["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("tree", ["one_matrix", "large_matrix"])
def test_tpu_reads_and_writes_everything_once(tpu, name, tree):
    assert tpu[name, tree]["bytes/param"] == tpu[name, tree]["least"]
    assert tpu[name, tree]["temp %"] < 1


@pytest.mark.parametrize("name", recipes.__all__)
def test_gpu_launches_no_more_kernels_than_promised(gpu, name):
    row = gpu[name, "gpt170"]
    assert 0 < row["kernels"] <= row["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
def test_gpu_keeps_no_copies(gpu, name):
    row = gpu[name, "gpt170"]
    assert row["kernels"] <= gpu["optax.adamw", "gpt170"]["kernels"]
    assert row["temp %"] < 1


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_the_train_step_of_the_race_compiles(request, target):
    rows = request.getfixturevalue(target)
    assert rows["race (adamw)", "quick"]["instructions"] > 1000


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_one_device_needs_no_collective(request, target):
    assert not any(row["collectives"] for row in request.getfixturevalue(target).values())
