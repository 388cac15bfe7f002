"""`describe`: the table says what the policy and the transform do, in exact bytes."""

import jax
import jax.numpy as jnp
import models
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optlab import layout
from optlab.layout import MatrixView

POLICIES = {"linen_scan": layout.stacked("^layers/")}
SMALL = {
    "attn": {"query": {"kernel": jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)}},
    "bias": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
    "embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32),
}
TABLE = """
leaf               shape      dtype     role       view               method  state             state bytes
attn/query/kernel  (8, 2, 4)  float32   matrix     in(0) -> out(1,2)  matrix  ScaleByAdamState          512
bias               (8,)       bfloat16  vector     -                  rest    TraceState                 16
embedding          (16, 8)    float32   embedding  in(0) -> out(1)    matrix  ScaleByAdamState        1,024

3 leaves, 200 parameters, 784 bytes
state: 1,556 bytes = 1,552 in leaves (7.76 per parameter) + 4 shared
"""  # noqa: E501


def label(params):
    return layout.map_with_view(
        lambda view, *_: "matrix" if view else "rest", params, policy=layout.flax
    )


def states(routing):
    return {row.path: row.states for row in routing.leaves}


def real_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_table_is_aligned_and_complete():
    tx = optax.partition({"matrix": optax.adam(1e-3), "rest": optax.sgd(0.1, 0.9)}, label)
    assert str(layout.describe(SMALL, tx)) == TABLE.strip()


def test_without_a_transform_there_are_no_state_columns():
    text = str(layout.describe(SMALL))
    assert "state" not in text
    assert text.endswith("3 leaves, 200 parameters, 784 bytes")


@pytest.mark.parametrize("name", models.NAMES)
def test_adam_costs_eight_bytes_per_parameter_in_every_model(name):
    params, tx = models.params(name), optax.adam(1e-3)
    routing = layout.describe(params, tx, layout=POLICIES.get(name, layout.flax))
    assert routing.size == sum(x.size for x in jax.tree.leaves(params))
    assert all(row.state_bytes == 8 * row.size for row in routing.leaves)
    assert all(row.states == ("ScaleByAdamState",) for row in routing.leaves)
    assert routing.shared_bytes == 4
    assert routing.state_bytes == real_bytes(tx.init(params)) == 8 * routing.size + 4


WRAPPED = {
    "chain": (
        optax.chain(optax.trace(0.9), optax.scale_by_rss()),
        ("TraceState", "ScaleByRssState"),
    ),
    "multi_steps": (
        optax.MultiSteps(optax.lion(1e-3), 4).gradient_transformation(),
        ("MultiStepsState", "ScaleByLionState"),
    ),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(1e-3), ("ScaleByAdamState",)),
    "adafactor": (optax.adafactor(1e-3), ("FactoredState",)),
    "stateless": (optax.sgd(0.1), ()),
}


@pytest.mark.parametrize(("tx", "classes"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("name", ["nnx_transformer", "linen_boxed", "equinox"])
def test_states_are_found_through_wrappers_and_bytes_are_exact(name, tx, classes):
    params = models.params(name)
    routing = layout.describe(params, tx)
    assert all(set(row.states) == set(classes) for row in routing.leaves)
    assert routing.state_bytes == real_bytes(tx.init(params))


@pytest.mark.parametrize("name", ["nnx_conv", "linen_transformer", "plain"])
def test_masked_and_partitioned_leaves_show_the_branch_they_are_in(name):
    params = models.params(name)
    masked = optax.masked(
        optax.lion(1e-3), lambda p: jax.tree.map(lambda x: x == "matrix", label(p))
    )
    parts = optax.partition({"matrix": optax.lion(1e-3), "rest": optax.adam(1e-3)}, label)
    for routing, other in (
        (layout.describe(params, masked), ()),
        (layout.describe(params, parts), ("ScaleByAdamState",)),
    ):
        for row in routing.leaves:
            assert row.states == (("ScaleByLionState",) if row.view else other)


def test_hyperparameters_named_like_leaves_are_not_taken_for_their_state():
    params = {"b1": jnp.ones(3), "eps": jnp.ones(2)}
    routing = layout.describe(params, optax.inject_hyperparams(optax.adam)(1e-3))
    assert [row.state_bytes for row in routing.leaves] == [24, 16]


def test_abstract_parameters_give_the_table_of_concrete_ones():
    params, tx = models.params("linen_transformer"), optax.adam(1e-3)
    abstract = jax.eval_shape(lambda: params)
    assert str(layout.describe(abstract, tx)) == str(layout.describe(params, tx))


def test_nothing_is_allocated_or_computed():
    huge = {"kernel": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    routing = layout.describe(huge, optax.adam(1e-3, mu_dtype=jnp.float32))
    assert routing.state_bytes == 6 * 2**40 + 4


def test_the_state_of_a_running_nnx_optimizer_is_described_from_its_model():
    model = models.nnx_module(models.Adapted)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    routing = layout.describe(nnx.state(model, nnx.LoRAParam), optimizer.tx)
    assert [row.path for row in routing.leaves] == [
        "linear/lora/lora_a", "linear/lora/lora_b", "standalone/lora_a", "standalone/lora_b"
    ]  # fmt: skip
    assert routing.state_bytes == real_bytes(nnx.to_pure_dict(nnx.state(optimizer.opt_state)))


def test_sharding_is_shown_where_there_is_one():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P(None, "x")))
    abstract = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    routing = layout.describe({"w": sharded, "b": abstract, "s": jnp.ones(())}, optax.adam(1e-3))
    assert [row.sharding for row in routing.leaves] == ["P('x')", "", "P(None, 'x')"]
    assert str(routing).splitlines()[2].endswith("8  -")


def test_the_layout_argument_decides_the_views():
    params = {"kernel": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)}
    row = layout.describe(params, layout=layout.by_ndim).leaves[0]
    assert (row.view, row.view_text) == (MatrixView((1,), (2,)), "batch(0) in(1) -> out(2)")
    with pytest.raises(ValueError, match="leaf 'kernel' has shape"):
        layout.describe(params)


def test_an_empty_tree_has_an_empty_table():
    assert str(layout.describe({}, optax.adam(1e-3))).splitlines() == [
        "leaf  shape  dtype  role  view  state  state bytes",
        "",
        "0 leaves, 0 parameters, 0 bytes",
        "state: 4 bytes = 0 in leaves (0 per parameter) + 4 shared",
    ]
