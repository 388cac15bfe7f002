"""Two processes save together what they hold together, and one process can read it."""

import contextlib
import os
import subprocess
import sys

import checkpoint_two_processes
import jax
import numpy as np
import pytest
from checkpoint_two_processes import DEVICES, PROCESSES, on_host, placed
from test_two_processes import free_port, wait

from optlab import checkpoint


@contextlib.contextmanager
def running(folder):
    """Start the processes; none is left when the block is over."""
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        started = []
        for process in range(PROCESSES):
            log = stack.enter_context((folder / f"log_{process}").open("wb"))
            command = [sys.executable, checkpoint_two_processes.__file__, address, str(process)]
            started.append(
                subprocess.Popen([*command, folder], stdout=log, stderr=log, env=environment)
            )
            stack.callback(started[-1].wait)
            stack.callback(started[-1].kill)
        yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The checkpoints that two processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    with running(folder) as processes:
        codes = wait(processes)
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("log_*")))
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: out of time)\n{logs}"
    return folder / "run"


def test_two_processes_save_restore_and_refuse_together(written):
    assert sorted(path.name for path in written.parent.glob("done_*")) == ["done_0", "done_1"]
    assert checkpoint.steps(written) == [2, 3]
    assert sorted(path.name for path in written.iterdir()) == ["2", "3"]


def test_one_process_restores_what_two_saved(written):
    like = placed((1, 2, 4))
    got = checkpoint.restore(written, like, config={"lr": 0.1})
    for name, want in on_host().items():
        x = jax.random.key_data(got[name]) if name == "key" else got[name]
        np.testing.assert_array_equal(x, want)
        assert got[name].sharding.is_equivalent_to(like[name].sharding, got[name].ndim)
