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
from typing import NamedTuple

import catalog
import pytest

from benchmarks import methods
from optlab import recipes

# The module that a target's compiler comes as.
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_plugins", "xla_cuda13")}
ROOT = pathlib.Path(__file__).parent.parent
# Of a leaf of 64 MiB the compiler copies what the second pass reads into on-chip memory while the
# first one runs, and counts the copy at both ends.
PREFETCHED = {
    "adagrad_norm", "adamp", "allora", "nap", "sgd_sai", "sgdp", "spam", "stable_spam",
}  # fmt: skip
ONE_PASS = ("adabelief", "diffgrad", "lion", "lion_k", "signum", "sophia")
OF_DEVICE = [name for name in recipes.__all__ if not methods.of_low_rank(name)]
LEAFWISE = sorted(set(OF_DEVICE) - set(methods.MATRIX))
# Conda's coordinates are as large as its matrices.
NARROW = sorted(set(methods.LOW_RANK) - {"conda"})
SHARDED = ("fsdp 8", "fsdp 8 Auto")
# Of one small layer, in percent of its parameters; on a TPU most of it is the compiler's own room.
MOST_TEMP = {
    "tpu": dict.fromkeys(methods.LOW_RANK, 150),
    "gpu": {
        "apollo": 30, "frugal": 75, "galore": 75, "q_galore": 75, "fira": 110, "conda": 150,
        "ldadam": 175,
    },
}  # fmt: skip
# AdamW on a leaf of 64 MiB: bytes per parameter on a TPU, without prefetch, and temporary memory in
# percent of it. What goes through memory is 26: both moments' sources read once more for the
# largest of their blocks, 10, and 16 for the step; the rest are scales, in on-chip memory. In
# bytes, halves of a row of codes of 4 bits lie across a tile's lanes, and have to be moved.
CODED_ON_TPU = {"int8": (36, 1), "int8 linear": (36, 1), "fp8": (56, 61), "int4": (77, 91)}
# Kernels on a GPU, and temporary memory; where decoding is dear, both moments in float32.
CODED_ON_GPU = {"int8": (9, 201), "int8 linear": (9, 4), "fp8": (11, 202), "int4": (11, 29)}
# Matrix methods, beside plain state, in percent of the parameters: Q-GaLore's decoded moments.
MORE_TEMP = {"tpu": {"muon": 1, "q_galore": 12}, "gpu": {"muon": 1, "q_galore": 21}}
# What it would take to gather the gradients of that layer's matrices once.
GRADIENTS_MIB = 3
# Reduced together, with the same bytes: a TPU's and a GPU's compilers do that to neighbours.
COMBINED = {
    "tpu": {("v5e:2x4", "fsdp 8", "gpt34"), ("v5e:16x16", "fsdp 256", "gpt34")},
    "gpu": {("1x1x8", "fsdp 8", "gpt34")},
}


def _installed(*modules):
    found = ""
    for module in modules:
        found = f"{found}.{module}" if found else module
        if importlib.util.find_spec(found) is None:
            return False
    return True


class Tables(NamedTuple):
    """Rows of each part."""

    device: dict
    mesh: list
    low_rank: dict
    state: dict


def _compile_all(target, directory):
    """Compile all parts, in a process each."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-W", "error", "-m", "benchmarks.aot", "--target", target]
    command += ["--without-peers", "--small", "--folder", str(directory), "--part"]
    parts = {
        "device": "aot", "mesh": "aot_mesh", "low_rank": "aot_low_rank", "state": "aot_state",
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [*command, part], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for part in parts
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
    device, mesh, low, state = (
        json.loads((directory / f"{name}_{target}.json").read_text())["rows"]
        for name in parts.values()
    )
    return Tables(
        {(row["method"], row["tree"]): row for row in device},
        mesh,
        {(row["method"], row["on"]): row for row in low},
        {(row["method"], row["codec"]): row for row in state},
    )


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    if not _installed(*COMPILERS["tpu"]):
        pytest.skip("libtpu is not installed")
    return _compile_all("tpu", tmp_path_factory.mktemp("aot"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    if not _installed(*COMPILERS["gpu"]):
        pytest.skip("jax-cuda13-plugin is not installed")
    return _compile_all("gpu", tmp_path_factory.mktemp("aot"))


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_every_row_of_the_catalogue_compiles(target):
    if not _installed(*COMPILERS[target]):
        pytest.skip(f"the compiler for {target} is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["PYTHONPATH"] = str(ROOT)
    script = ROOT / "tests" / "compile_rows.py"
    run = subprocess.run(
        [sys.executable, script, target], cwd=ROOT, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert sorted(found) == sorted(case.name for case in catalog.CASES)
    assert min(found.values()) > 1


@pytest.mark.parametrize("name", LEAFWISE)
def test_tpu_moves_no_more_bytes_than_promised(tpu, name):
    tpu = tpu.device
    large, row = tpu[name, "large_matrix"], tpu[name, "one_matrix"]
    assert large["least"] <= large["bytes/param"] <= large["bound"]
    assert row["without prefetch"] <= row["bound"]
    assert name in PREFETCHED or row["bytes/param"] <= row["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("tree", ["one_matrix", "large_matrix"])
def test_tpu_reads_and_writes_everything_once(tpu, name, tree):
    tpu = tpu.device
    assert tpu[name, tree]["bytes/param"] == tpu[name, tree]["least"]
    assert tpu[name, tree]["temp %"] < 1


@pytest.mark.parametrize("name", OF_DEVICE)
def test_gpu_launches_no_more_kernels_than_promised(gpu, name):
    row = gpu.device[name, "gpt170"]
    assert 0 < row["kernels"] <= row["bound"]


@pytest.mark.parametrize("name", ONE_PASS)
def test_gpu_keeps_no_copies(gpu, name):
    gpu = gpu.device
    row = gpu[name, "gpt170"]
    assert row["kernels"] <= gpu["optax.adamw", "gpt170"]["kernels"]
    assert row["temp %"] < 1


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_the_train_step_of_the_race_compiles(request, target):
    rows = request.getfixturevalue(target).device
    assert rows["race (adamw)", "quick"]["instructions"] > 1000


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_one_device_needs_no_collective(request, target):
    rows = request.getfixturevalue(target).device
    assert not any(row["collectives"] for row in rows.values())


def test_muon_on_a_tpu_keeps_a_third_of_the_parameters_at_most(tpu):
    rows = tpu.device
    assert 0 < rows["muon", "gpt34"]["temp %"] <= 35
    assert 0 < rows["muon[bfloat16]", "gpt34"]["temp %"] <= 35


def test_muon_on_a_gpu_launches_a_quarter_of_optax_kernels_in_a_third_of_the_memory(gpu):
    rows = gpu.device
    optax, ours = rows["optax.contrib.muon", "gpt170"], rows["muon[bfloat16]", "gpt170"]
    assert rows["muon", "gpt170"]["kernels"] <= optax["kernels"] / 4
    assert ours["kernels"] <= optax["kernels"] / 4
    assert 0 < ours["temp %"] <= 35
    # Stacks of float32 are twice as large.
    assert rows["muon", "gpt170"]["temp %"] < optax["temp %"] / 4


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_meshes_send_what_the_plan_says(request, target):
    rows = request.getfixturevalue(target).mesh
    for row in rows:
        said = set(row["as planned"].split(", "))
        allowed = {"equal"}
        if (row["topology"], row["mesh"], row["matrices"]) in COMBINED[target]:
            allowed.add("combined")
        if target == "tpu" and row["precision"] == "default":
            allowed.add("narrower")
        assert said <= allowed, row
    assert {row["precision"] for row in rows} == {"default", "highest"}
    assert {row["matrices"] for row in rows} == {"8", "64", "400", "gpt34"}


def test_few_matrices_keep_most_of_256_chips_busy(tpu):
    rows = tpu.mesh
    busy = {
        row["matrices"]: float(row["busy"].rstrip("%"))
        for row in rows
        if row["topology"] == "v5e:16x16"
    }
    assert busy["8"] > 50
    assert busy["64"] > 50


@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("name", methods.LOW_RANK)
def test_low_rank_steps_compile_within_their_memory(request, target, name):
    rows = request.getfixturevalue(target).low_rank
    alone = rows[name, "one device"]
    assert alone["collectives"] == "none"
    assert 0 < alone["temp %"] <= MOST_TEMP[target][name]
    assert all(rows[name, where]["collectives"] != "none" for where in SHARDED)


@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("where", SHARDED)
@pytest.mark.parametrize("name", NARROW)
def test_low_rank_steps_gather_no_matrix(request, target, where, name):
    row = request.getfixturevalue(target).low_rank[name, where]
    assert 0 < row["whole %"] < 50
    assert 0 < row["MiB"] < GRADIENTS_MIB


@pytest.mark.parametrize("codec", CODED_ON_TPU)
def test_coded_state_stays_in_place_on_a_tpu(tpu, codec):
    row = tpu.state["adamw", codec]
    nbytes, temp = CODED_ON_TPU[codec]
    assert 0 < row["without prefetch"] <= nbytes
    assert row["temp %"] <= temp


@pytest.mark.parametrize("codec", CODED_ON_GPU)
def test_coded_state_takes_few_kernels_on_a_gpu(gpu, codec):
    row = gpu.state["adamw", codec]
    kernels, temp = CODED_ON_GPU[codec]
    assert 0 < row["kernels"] <= kernels
    assert row["temp %"] <= temp


@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("name", ["muon", "q_galore"])
def test_coded_state_of_matrix_methods_compiles(request, target, name):
    rows = request.getfixturevalue(target).state
    codecs = {codec for method, codec in rows if method == name} - {"-"}
    assert codecs == ({"int8"} if name == "q_galore" else set(methods.CODECS) - {"-"})
    for codec in codecs:
        row = rows[name, codec]
        assert row["state B/param"] < 0.3 * rows[name, "-"]["state B/param"]
        assert row["collectives"] == 0
        assert row["temp %"] <= rows[name, "-"]["temp %"] + MORE_TEMP[target][name]
