"""Two processes that hold a mesh together train as one process does that holds all of it."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import two_processes
from mesh_problem import off
from two_processes import DEVICES, PROCESSES, RECIPES

LIMIT = 120  # seconds; on two free cores both are done in a tenth of that


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(folder):
    """Start the processes, each writing into a log; none is left when the block is over."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    address, started = f"127.0.0.1:{free_port()}", []
    try:
        for process in range(PROCESSES):
            command = [sys.executable, two_processes.__file__, address, str(process), str(folder)]
            with (folder / f"log_{process}").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait(processes):
    """Return when all are done, one has failed, or the time is over."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.1)
    return [process.poll() for process in processes]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> pathlib.Path:
    """The folder with what the two processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    with running(folder) as processes:
        codes = wait(processes)
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("log_*")))
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: out of time)\n{logs}"
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(results, name):
    want = jax.tree.leaves(two_processes.trained(name))
    for process in range(PROCESSES):
        with np.load(results / f"{name}_{process}.npz") as found:
            got = [found[f"arr_{i}"] for i in range(len(found.files))]
        assert [x.shape for x in got] == [x.shape for x in want]
        assert off(got, want) < 1e-5, f"process {process}"
        print(off(got, want))
