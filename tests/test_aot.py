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
# At default options the compiler moves all 64 MiB that the second pass reads into on-chip memory
# while the first one runs, and counts them at both ends.
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
    return {row["method"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}


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
def test_tpu_kernels_move_no_more_bytes_than_promised(tpu, name):
    row = tpu[name]
    assert row["least"] <= row["without prefetch"] <= row["bound"]


@pytest.mark.parametrize("name", sorted(set(recipes.__all__) - PREFETCHED))
def test_tpu_moves_no_more_bytes_than_promised_at_default_options(tpu, name):
    assert tpu[name]["bytes/param"] <= tpu[name]["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
def test_tpu_reads_and_writes_everything_once(tpu, name):
    assert tpu[name]["bytes/param"] == tpu[name]["least"]
    assert tpu[name]["temp %"] < 1


@pytest.mark.parametrize("name", recipes.__all__)
def test_gpu_launches_no_more_kernels_than_promised(gpu, name):
    assert 0 < gpu[name]["kernels"] <= gpu[name]["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
def test_gpu_keeps_no_copies(gpu, name):
    assert gpu[name]["kernels"] <= gpu["optax.adamw"]["kernels"]
    assert gpu[name]["temp %"] < 1


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_the_train_step_of_the_race_compiles(request, target):
    rows = request.getfixturevalue(target)
    assert rows["race (adamw)"]["instructions"] > 1000


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_one_device_needs_no_collective(request, target):
    assert not any(row["collectives"] for row in request.getfixturevalue(target).values())
