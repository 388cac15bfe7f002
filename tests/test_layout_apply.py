"""`on_matrix` and `orthogonalize`: exact on every tree, a call per shape, types kept in a mesh."""

import contextlib
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optlab
from optlab import layout
from optlab.layout import MatrixView

POLICIES = {"linen_scan": layout.stacked("^layers/")}


def orthogonalized(fn, policy, shardings=None):
    """Return `orthogonalize` with any function in place of a polar factor, as a map of trees."""
    tx = optlab.orthogonalize(fn, layout=policy, shardings=shardings)
    return lambda tree: tx.update(tree, tx.init(tree))[0]


def only_matrices(policy):
    """Return the policy without embeddings and heads, which `orthogonalize` leaves alone."""

    def views(path, leaf):
        view = policy(path, leaf)
        return view if view is not None and view.role == "matrix" else None

    return views


APPLIERS = {"on_matrix": layout.on_matrix, "orthogonalize": orthogonalized}


def turned(x):
    """2 X minus X turned by 180 degrees: mixes every row and column, exact, and f(X^T) = f(X)^T."""
    return 2 * x - x[..., ::-1, ::-1]


def peaks(x):
    """4 X minus the peaks of each row and column: exact, whatever the order of rows and columns."""
    return 4 * x - (x.max(-1, keepdims=True) + x.max(-2, keepdims=True))


FUNCTIONS = {"on_matrix": turned, "orthogonalize": peaks}
each_applier = pytest.mark.parametrize("name", APPLIERS)


def cubic(x):
    """X X^T X, the term of Newton-Schulz iterations; f(X^T) = f(X)^T."""
    return x @ jnp.swapaxes(x, -1, -2) @ x


def numpy_reference(fn, x, view):
    """`fn` through `view`, one matrix at a time, by loops over the batch."""
    batch = view.batch(x.ndim)
    moved = np.transpose(x, (*batch, *view.rows, *view.cols))
    flat = moved.reshape(-1, *view.dims(x.shape))
    out = np.stack([fn(matrix) for matrix in flat]).reshape(moved.shape)
    return np.transpose(out, np.argsort((*batch, *view.rows, *view.cols)))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", models.NAMES)
def test_on_matrix_is_the_function_of_each_matrix_of_a_real_model(name):
    policy, params = POLICIES.get(name, layout.flax), models.params(name)

    def reference(view, path, x):
        return x if view is None else jnp.asarray(numpy_reference(turned, np.asarray(x), view))

    want = layout.map_with_view(reference, params, policy=policy)
    assert_same(layout.on_matrix(turned, policy)(params), want)


@pytest.mark.parametrize("name", models.NAMES)
def test_on_matrix_of_the_identity_is_the_identity(name):
    policy, params = POLICIES.get(name, layout.flax), models.params(name)
    assert_same(layout.on_matrix(lambda x: x, policy)(params), params)


@pytest.mark.parametrize("name", models.NAMES)
def test_orthogonalize_is_bit_equal_to_on_matrix_on_a_real_model(name):
    policy, params = POLICIES.get(name, layout.flax), models.params(name)
    got = jax.jit(orthogonalized(peaks, policy))(params)
    assert_same(got, layout.on_matrix(peaks, only_matrices(policy))(params))


@pytest.mark.parametrize("name", ["nnx_transformer", "linen_scan"])
def test_stacked_matrix_products_agree_with_on_matrix(name):
    policy, params = POLICIES.get(name, layout.flax), models.params(name)
    got = jax.jit(orthogonalized(cubic, policy))(params)
    want = jax.jit(layout.on_matrix(cubic, only_matrices(policy)))(params)
    # Batched and single products sum in different orders.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@st.composite
def trees(draw):
    """A nested tree of leaves of ranks 0 to 4 and a view, or none, for each of rank >= 2."""
    size, dtype = st.integers(0, 3), st.sampled_from([jnp.float32, jnp.bfloat16])
    leaves, views = [], {}
    for index in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(size, max_size=4)))
        if len(shape) >= 2 and draw(st.integers(0, 4)):
            axes = draw(st.permutations(range(len(shape))))
            first = draw(st.integers(1, len(shape) - 1))
            second = draw(st.integers(first + 1, len(shape)))
            views[index] = MatrixView(tuple(axes[:first]), tuple(axes[first:second]))
        values = np.arange(math.prod(shape)).reshape(shape) + 7 * index
        leaves.append(jnp.asarray(values, draw(dtype)))
    keys = {id(leaf): index for index, leaf in enumerate(leaves)}
    tree = draw(st.sampled_from([nested, list, tuple]))(leaves)
    by_path = {
        layout.path_str(key_path): views.get(keys[id(leaf)])
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    return tree, lambda path, _: by_path[path]


def nested(leaves):
    return {"z": leaves[0], "a": [*leaves[1:3], None], "m": ({"x": tuple(leaves[3:])},)}


@settings(max_examples=40)
@given(trees())
def test_every_applier_is_exact_on_every_tree(drawn):
    tree, policy = drawn

    for name, applier in APPLIERS.items():

        def reference(view, path, x, fn=FUNCTIONS[name]):
            if view is None or not x.size:
                return x
            return jnp.asarray(numpy_reference(fn, np.asarray(x, np.float32), view), x.dtype)

        want = layout.map_with_view(reference, tree, policy=policy)
        assert_same(applier(FUNCTIONS[name], policy)(tree), want)


@each_applier
def test_leaves_without_a_view_and_empty_ones_are_the_same_objects(name):
    tree = {"bias": jnp.ones(3), "x": np.float32(1), "w": jnp.ones((0, 3)), "k": jnp.ones((2, 3))}
    out = APPLIERS[name](FUNCTIONS[name], layout.flax)(tree)
    assert all(out[key] is tree[key] for key in ("bias", "x", "w"))
    assert out["k"] is not tree["k"]


def test_embeddings_heads_and_missing_leaves_stay_as_they_are():
    tree = {
        "embed": {"embedding": jnp.ones((6, 2))},
        "lm_head": {"kernel": jnp.ones((2, 6)), "bias": None},
        "dense": {"kernel": jnp.ones((2, 6)), "bias": None},
    }
    out = orthogonalized(peaks, layout.flax)(tree)
    assert out["embed"]["embedding"] is tree["embed"]["embedding"]
    assert out["lm_head"]["kernel"] is tree["lm_head"]["kernel"]
    assert out["lm_head"]["bias"] is out["dense"]["bias"] is None
    np.testing.assert_array_equal(out["dense"]["kernel"], 2 * np.ones((2, 6)))


def calls_of(policy, tree):
    """Return shape and dtype of every stack that the function is given, sorted."""
    calls = []

    def spy(x):
        calls.append((x.shape, str(x.dtype)))
        return x

    jax.eval_shape(orthogonalized(spy, policy), tree)
    return sorted(calls)


@pytest.mark.parametrize("name", ["nnx_transformer", "linen_scan"])
def test_a_function_is_traced_once_per_shape_whatever_holds_the_matrices(name):
    # Two blocks or three scanned ones of four attention matrices 8 x 8, up 8 x 12 and down 12 x 8.
    blocks = {"nnx_transformer": 2, "linen_scan": 3}[name]
    expected = [((2 * blocks, 8, 12), "float32"), ((4 * blocks, 8, 8), "float32")]
    assert calls_of(POLICIES.get(name, layout.flax), models.params(name)) == sorted(expected)


def test_transposes_join_and_stay_tall_where_all_are_tall():
    wide, tall = jnp.ones((8, 12)), jnp.ones((12, 8))
    assert calls_of(layout.by_ndim, [wide, tall, wide]) == [((3, 8, 12), "float32")]
    assert calls_of(layout.by_ndim, [tall, tall]) == [((2, 12, 8), "float32")]


def test_dtypes_are_not_mixed_in_a_stack():
    tree = [jnp.ones((2, 3), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float32)]
    expected = [((1, 2, 3), "bfloat16"), ((2, 2, 3), "float32")]
    assert calls_of(layout.by_ndim, tree) == expected
    assert_same(orthogonalized(lambda x: x, layout.by_ndim)(tree), tree)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("on_matrix", r"fn must keep the shape .* at leaf 'a/kernel', got \(2, 1\)"),
        ("orthogonalize", r"polar must keep the shape of its matrices, \(1, 2, 3\), got"),
    ],
)
def test_a_function_that_changes_the_shape_is_an_error(name, message):
    apply = APPLIERS[name](lambda x: x[..., :1], layout.flax)
    with pytest.raises(ValueError, match=message):
        apply({"a": {"kernel": jnp.ones((2, 3))}})


# ---- meshes ----


def sharded_tree(axis_type):
    """Leaves sharded on each kind of axis: row, column, major and minor of a merged side, batch."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    leaves = {
        "rows/kernel": ((8, 16), ("x", None)),
        "cols/kernel": ((8, 16), (None, "x")),
        "both/kernel": ((8, 16), ("x", "y")),
        "wide/kernel": ((16, 8), (None, ("x", "y"))),
        "bias": ((8,), ("x",)),
        "attn/query/kernel": ((16, 4, 4), (None, "x", None)),
        "attn/key/kernel": ((16, 4, 4), ("y", None, "x")),
        "attn/out/kernel": ((4, 4, 16), ("x", None, "y")),
        "conv/kernel": ((3, 3, 8, 16), (None, None, "x", "y")),
        "conv1x1/kernel": ((1, 1, 8, 16), (None, None, "x", "y")),
        "layers/kernel": ((2, 8, 16), (None, None, "y")),
        "experts/kernel": ((8, 8, 16), ("x", None, "y")),
        "experts2/kernel": ((8, 8, 16), ("x", None, "y")),
    }
    rng = np.random.default_rng(0)
    return mesh, {
        path: jax.device_put(rng.normal(size=shape).astype("f4"), NamedSharding(mesh, P(*spec)))
        for path, (shape, spec) in leaves.items()
    }


MESH_POLICY = layout.stacked("^(layers|experts)")


@each_applier
@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_types_and_values_are_kept_in_a_mesh(axis_type, in_context, name):
    mesh, tree = sharded_tree(axis_type)
    fn, known = FUNCTIONS[name], {}
    local = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)
    want = layout.on_matrix(fn, MESH_POLICY)(local)
    if name == "orthogonalize" and axis_type == AxisType.Auto:
        known = {"shardings": optlab.shardings_of(tree)}
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = jax.jit(APPLIERS[name](fn, MESH_POLICY, **known))(tree)
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, tree)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), got, want)


def test_a_view_of_single_axes_needs_no_reshape_and_no_collective():
    _, tree = sharded_tree(AxisType.Explicit)
    tree = {path: tree[path] for path in ("rows/kernel", "cols/kernel", "both/kernel")}
    apply = jax.jit(layout.on_matrix(lambda x: 2 * x, layout.output_first))
    assert "reshape" not in str(jax.make_jaxpr(apply)(tree))
    compiled = apply.lower(tree).compile().as_text()
    assert not any(name in compiled for name in ("all-gather", "all-to-all", "all-reduce"))


@each_applier
def test_varying_and_invariant_leaves_keep_their_types_in_shard_map(name):
    fn = FUNCTIONS[name]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"w": P("x"), "v": P()}
    apply = APPLIERS[name](fn, layout.by_ndim)
    body = jax.shard_map(apply, mesh=mesh, in_specs=(specs,), out_specs=specs)
    tree = {"w": jnp.arange(64.0).reshape(16, 4), "v": jnp.arange(8.0).reshape(2, 4)}
    out = jax.jit(body)(tree)
    np.testing.assert_array_equal(out["v"], fn(tree["v"]))
    np.testing.assert_array_equal(out["w"], fn(tree["w"].reshape(8, 2, 4)).reshape(16, 4))


@each_applier
def test_vmap_over_trees_is_the_loop(name):
    apply = APPLIERS[name](FUNCTIONS[name], layout.by_ndim)
    trees_ = {"w": jnp.arange(24.0).reshape(2, 3, 4), "v": jnp.arange(24.0).reshape(2, 4, 3)}
    one = [apply(jax.tree.map(lambda x, i=i: x[i], trees_)) for i in range(2)]
    assert_same(jax.vmap(apply)(trees_), jax.tree.map(lambda *xs: jnp.stack(xs), *one))
