"""Steps of a transformation, a tree as one vector, and machine code as users get it."""

import os

import jax
import numpy as np
import optax

# Multiply-adds in one rounding, for bounds of a few roundings: conftest.py's code has more.
FULL = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    FULL["xla_cpu_use_fusion_emitters"] = True


def steps(tx, grads, params):
    """Apply a transformation to a list of gradients and return the updates of every step."""
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


def flat(tree):
    """Return all entries of a tree as one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
