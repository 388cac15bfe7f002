"""Steps of a transformation, and a tree as one vector."""

import jax
import numpy as np
import optax


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
