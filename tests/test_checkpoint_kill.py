"""Whenever a process that saves is killed, the last complete step is what is restored."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_writer import KEEP, step_of, tree_of

from optlab import checkpoint
from optlab.state import folders

KILLS = 50


def complete(root):
    """Restore the last step, look at every entry of it, and return its number."""
    for step in checkpoint.steps(root):
        assert checkpoint.read(root, step=step).step == step
    found = checkpoint.read(root)
    number = found.values
    got, want = checkpoint.restore(root, tree_of(0)), tree_of(number)
    assert found.step == step_of(number)
    jax.tree.map(
        lambda a, b: (
            np.testing.assert_array_equal(*(jax.random.key_data(x) for x in (a, b)))
            if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
            else np.testing.assert_array_equal(a, b)
        ),
        got,
        want,
    )
    return number


@pytest.fixture
def server():
    """Start the process that forks writers, and stop it."""
    started = []

    def start(root):
        script = Path(__file__).with_name("checkpoint_writer.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, script, root], text=True, **pipes))
        return started[0]

    yield start
    for process in started:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


def returned(root):
    """Return the number of the last save that returned."""
    path = root.with_suffix(".returned")
    return int(path.read_text() or 0) if path.exists() else 0


def kill_one(process, root, after):
    """Start a writer, let it save once, kill it some time later, and wait until it is gone."""
    before = returned(root)
    print(file=process.stdin, flush=True)
    writer = int(process.stdout.readline())
    deadline = time.monotonic() + 60
    while returned(root) == before and time.monotonic() < deadline:
        time.sleep(0.002)
    assert returned(root) > before, "the writer does not save"
    time.sleep(after)
    os.kill(writer, signal.SIGKILL)
    assert int(process.stdout.readline()) == signal.SIGKILL


def test_a_kill_at_any_moment_leaves_the_last_complete_step(tmp_path, server):
    root, moments = tmp_path / "run", random.Random(0)
    process, left = server(root), set()
    for _ in range(KILLS):
        # A save takes some 40 ms.
        kill_one(process, root, moments.uniform(0.0, 0.1))
        left |= {path.suffix for path in root.iterdir()}
        # A writer that was killed may have named a step and not yet told us so.
        assert complete(root) - returned(root) in (0, 1)
    assert ".part" in left, "no kill came while a step was being written"
    number = complete(root) + 1
    step = step_of(number)
    checkpoint.save(root, tree_of(number), step=step, values=number, keep=KEEP, overwrite=True)
    names = sorted(path.name for path in root.iterdir())
    assert names == sorted(map(str, checkpoint.steps(root))), "what kills left is tidied up"
    assert len(names) == KEEP


class Killed(BaseException):
    """The process ends here, as far as the disk is concerned."""


class Disk:
    """Counts what changes the disk, and stops before or in the middle of the n-th change."""

    def __init__(self, monkeypatch):
        self.left = 0
        for owner, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "write_text"),
            (Path, "write_bytes"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        # What has not reached the disk when a process dies is still in the system's hands.
        monkeypatch.setattr(folders, "_flush", lambda path: None)
        self.rmtree = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", self._half)

    def _tick(self):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def _counted(self, change):
        def changes(*args, **kwargs):
            self._tick()
            return change(*args, **kwargs)

        return changes

    def _half(self, folder, **kwargs):
        """Delete files one by one, each a change."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self._tick()
                path.unlink()
        self._tick()
        self.rmtree(folder, **kwargs)


def test_no_change_of_the_disk_loses_a_step(tmp_path, monkeypatch):
    start, root = tmp_path / "start", tmp_path / "run"
    for earlier in (1, 2):
        checkpoint.save(start, tree_of(earlier), step=earlier, values=earlier)
    with monkeypatch.context() as patch:
        disk, seen = Disk(patch), []
        for changes in range(1, 1000):
            disk.left = 0
            disk.rmtree(root, ignore_errors=True)
            shutil.copytree(start, root, copy_function=shutil.copyfile)
            disk.left = changes
            try:
                # It takes the place of step 2, and step 1 goes.
                checkpoint.save(root, tree_of(3), step=2, values=3, keep=1, overwrite=True)
            except Killed:
                seen.append(complete(root))
            else:
                break
    assert set(seen) == {2, 3}
    assert seen == sorted(seen), "once it is there it stays"
    assert len(seen) > 30, seen
    assert complete(root) == 3
    assert checkpoint.steps(root) == [2]
