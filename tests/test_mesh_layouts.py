"""One leaf that holds many matrices is trained as if each were a leaf, wherever its parts lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mesh_problem import RATES, mesh_of, off, recipe, shardings_on, train, trees

from optlab import layout

TOGETHER = {
    "attn/qkv/kernel": ((8, 3, 2, 4), P("fsdp", None, "model", None)),
    "heads/query/kernel": ((8, 4, 4), P("fsdp", "model", None)),
    "moe/experts/kernel": ((4, 8, 16), P(("data", "model"), "fsdp", None)),
    "layers/up/kernel": ((3, 8, 16), P(None, "fsdp", "model")),
    "layers/attn/out/kernel": ((2, 2, 4, 8), P("data", "model", None, "fsdp")),
}
# The axis along which each leaf holds its matrices, and what one of them is called.
APART = {
    "attn/qkv/kernel": (1, "attn{}/value/kernel"),
    "heads/query/kernel": (1, "head{}/dense/kernel"),
    "moe/experts/kernel": (0, "expert{}/kernel"),
    "layers/up/kernel": (0, "up{}/kernel"),
    "layers/attn/out/kernel": (0, "attn{}/out/kernel"),
}
POLICY = layout.rules(
    {"heads/query": layout.per_head, "experts": layout.stacked(".")},
    default=layout.stacked("^layers/"),
)


def split(tree):
    """Return the leaves of `APART` from those of `TOGETHER`."""
    return {
        name.format(i): np.take(tree[key], i, axis)
        for key, (axis, name) in APART.items()
        for i in range(tree[key].shape[axis])
    }


def joined(tree):
    """Return the leaves of `TOGETHER` from those of `APART`."""
    return {
        key: np.stack([tree[name.format(i)] for i in range(shape[axis])], axis)
        for (key, (shape, _)), (axis, name) in zip(TOGETHER.items(), APART.values(), strict=True)
    }


@pytest.mark.parametrize("name", RATES)
def test_matrices_of_one_leaf_are_trained_as_leaves_of_their_own(name):
    # The scheme of each stack differs from that of the single matrices, and so does its rounding,
    # which Newton-Schulz raises: in float32 up to 2e-5.
    mesh = mesh_of(AxisType.Explicit)
    with jax.enable_x64(True):
        with jax.set_mesh(mesh):
            problem = trees(shardings_on(mesh, TOGETHER), TOGETHER)
            together = train(recipe(name, layout=POLICY), problem, 4)
        alone = type(problem)(*(split(jax.device_get(tree)) for tree in problem))
        apart = train(recipe(name), alone, 4)
    (start, _), (got, _), (want, _) = together.at[0], together.at[4], apart.at[4]
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, joined(want))
    assert off(got, joined(want), start) < 1e-12
