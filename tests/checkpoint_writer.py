"""A process that saves as fast as it can until it is killed; started by `test_checkpoint_kill.py`.

Usage: python checkpoint_writer.py ROOT. For each line on stdin it forks a writer, which takes up
the last checkpoint in ROOT and goes on from there, and prints its process id; it prints the signal
that ended it when it is gone. Forked, for the imports take longer than what is tested.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401, imported once for all writers

from optlab import checkpoint

KEEP = 2


def tree_of(number):
    """Arrays of several kinds, each with the number in every entry; nothing is compiled."""
    return {
        "matrix": jnp.asarray(np.full((64, 33), number, np.float32)),
        "codes": jnp.asarray(np.full(500, number % 100, np.int8)),
        "nested": [jnp.asarray(np.full(7, number, jnp.bfloat16)), None, np.full(5, number)],
        "key": jax.random.wrap_key_data(jnp.asarray(np.full(2, number, np.uint32))),
    }


def step_of(number):
    """Every third save replaces the step before it."""
    return number - number // 3


def write_for_ever(root):
    """Save 1, 2, 3, ..., and write into a file beside them the last that returned."""
    number = checkpoint.read(root).values if checkpoint.steps(root) else 0
    returned = os.open(root.with_suffix(".returned"), os.O_WRONLY | os.O_CREAT)
    while True:
        number += 1
        step, replace = step_of(number), number % 3 == 0
        checkpoint.save(
            root, tree_of(number), step=step, values=number, keep=KEEP, overwrite=replace
        )
        os.pwrite(returned, b"%12d" % number, 0)


def main(root):
    """Fork a writer for each line."""
    for _ in sys.stdin:
        writer = os.fork()
        if writer == 0:
            try:
                write_for_ever(root)
            finally:  # with an exception, that is: the parent prints that no signal ended it
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        print(writer, flush=True)
        print(os.waitpid(writer, 0)[1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
