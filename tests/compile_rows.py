"""Compile every row of the catalogue for a described TPU or GPU: python compile_rows.py tpu.

Prints a JSON object: how many instructions the program of each row has.
"""

import json
import os
import sys

from benchmarks.aot import ENVIRONMENT

os.environ |= ENVIRONMENT[sys.argv[1]]

import catalog
import jax
import jax.numpy as jnp

from benchmarks import described


def job(case, where):
    """Return one step of a row, or its schedule, as a function and shapes."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    if "schedule" in case.tags:
        return case.tx, (jax.ShapeDtypeStruct((), jnp.int32, sharding=where),)
    params = jax.tree.map(place, case.tree)
    state = jax.tree.map(place, jax.eval_shape(case.tx.init, params))
    return case.tx.update, (params, state, params)


def main(target):
    """Compile one row after the other."""
    where, found = described.sharding(target), {}
    for case in catalog.CASES:
        function, arguments = job(case, where)
        compiled = jax.jit(function).lower(*arguments).compile()
        found[case.name] = compiled.as_text().count(" = ")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
