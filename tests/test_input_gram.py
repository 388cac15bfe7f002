"""TrAct: Grams against the layers they describe, both ways of solving, meshes, Flax loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import curvature as reference

from optlab import layout
from optlab.flax import TrainState, layer_input_gram, with_input_grams
from optlab.testing import random_like
from optlab.testing.sharding import mesh_of
from optlab.transforms.input_gram import conv_input_gram, input_gram, precondition_by_input_gram

DAMPING = 0.1
IMAGES = random_like((3, 7, 6, 4), seed=0)
# Every argument of a Flax convolution that decides what its patches are.
CONVS = {
    "same": {},
    "valid_strided": {"padding": "VALID", "strides": (2, 1)},
    "number": {"padding": 1, "strides": 2},
    "pairs": {"padding": ((0, 2), (1, 0))},
    "dilated": {"kernel_dilation": (1, 2)},
    "input_dilated": {"input_dilation": 2, "padding": 1},
    "circular": {"padding": "CIRCULAR", "strides": 2},
    "reflect": {"padding": "REFLECT", "kernel_dilation": 2},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4, "strides": 2, "padding": "VALID"},
}


def _whole(gram):
    """Return R^T R of a factor, and a Gram itself."""
    square = gram.shape[-1] == gram.shape[-2]
    return gram if square else jnp.swapaxes(gram, -1, -2) @ gram


def _patches_by_the_layer(layer, apply, channels):
    """Return the patches (groups, rows, fan_in): what a kernel that copies them gives out."""
    groups = layer.feature_group_count
    window = tuple(layer.kernel_size)
    fan_in = int(np.prod(window)) * channels // groups
    kernel = np.tile(np.eye(fan_in), (1, groups)).reshape(*window, channels // groups, -1)
    out = apply(jnp.asarray(kernel, jnp.float32), fan_in * groups)
    return jnp.moveaxis(out.reshape(-1, groups, fan_in), 1, 0)


@pytest.mark.parametrize("name", CONVS)
def test_conv_grams_are_those_of_flaxs_own_patches(name):
    options = {"kernel_size": (2, 3), "use_bias": False, **CONVS[name]}

    def apply(kernel, features):
        return nn.Conv(features, **options).apply({"params": {"kernel": kernel}}, IMAGES)

    layer = nn.Conv(8, **options)
    rows = _patches_by_the_layer(layer, apply, 4)
    want = np.einsum("gna,gnb->gab", rows, rows) / rows.shape[1]
    twin = nnx.Conv(4, 8, **options, rngs=nnx.Rngs(0))
    for each in (layer, twin):
        got = _whole(layer_input_gram(each, IMAGES))
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, atol=1e-6)


def test_conv_gram_is_that_of_patches_cut_by_hand():
    got = conv_input_gram(IMAGES, (2, 2), strides=(2, 1), padding="VALID", dilation=(1, 2))
    rows = reference.patches(np.asarray(IMAGES, np.float64), (2, 2), (2, 1), (1, 2))
    np.testing.assert_allclose(_whole(got), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spatial", "padding"), [((9,), "CAUSAL"), ((3, 4, 5), "SAME")])
def test_convolutions_of_other_ranks(spatial, padding):
    x = random_like((2, *spatial, 3), seed=1)
    options = {"kernel_size": (2,) * len(spatial), "padding": padding, "use_bias": False}
    apply = lambda k, f: nn.Conv(f, **options).apply({"params": {"kernel": k}}, x)  # noqa: E731
    (rows,) = _patches_by_the_layer(nn.Conv(5, **options), apply, 3)
    got = _whole(layer_input_gram(nn.Conv(5, **options), x))
    np.testing.assert_allclose(got, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_dense_gram_takes_all_leading_axes_as_rows(lead):
    x = random_like((*lead, 6), seed=2)
    rows = np.asarray(x, np.float64).reshape(-1, 6)
    for layer in (nn.Dense(4), nnx.Linear(6, 4, rngs=nnx.Rngs(0))):
        got = layer_input_gram(layer, x)
        assert got.shape == ((6, 6) if len(rows) >= 6 else (len(rows), 6))
        np.testing.assert_allclose(_whole(got), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_both_ways_of_solving_are_the_papers(rows):
    x, g = random_like((rows, 12), seed=3), {"kernel": random_like((12, 5), seed=4)}
    want = reference.tract(*(np.asarray(a, np.float64) for a in (g["kernel"], x)), DAMPING)
    tx, given = precondition_by_input_gram(DAMPING), input_gram(x)
    assert given.shape == ((12, 12) if rows > 12 else (rows, 12))
    for form in (given, _whole(given)):
        got, _ = tx.update(g, tx.init(g), input_gram={"kernel": form})
        np.testing.assert_allclose(got["kernel"], want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("batch", [1, 8])
def test_groups_are_preconditioned_each_by_its_own_inputs(batch):
    x = random_like((batch, 3, 2, 4), seed=5)
    layer = nn.Conv(6, (2, 2), feature_group_count=2, padding="VALID")
    kernel = random_like((2, 2, 2, 6), seed=6)
    tx = precondition_by_input_gram(DAMPING)
    grams = {"conv/kernel": layer_input_gram(layer, x)}
    got, _ = tx.update({"conv": {"kernel": kernel}}, (), input_gram=grams)
    for group in range(2):
        half, outs = x[..., 2 * group : 2 * group + 2], slice(3 * group, 3 * group + 3)
        rows = reference.patches(np.asarray(half, np.float64), (2, 2), (1, 1), (1, 1))
        want = reference.tract(np.asarray(kernel[..., outs]).reshape(8, 3), rows, DAMPING)
        found = np.asarray(got["conv"]["kernel"][..., outs]).reshape(8, 3)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_stacked_layers_and_torchs_layout():
    rows, g = random_like((2, 9, 5), seed=7), random_like((2, 5, 3), seed=8)
    grams = jnp.stack([input_gram(x) for x in rows])
    stacked = precondition_by_input_gram(DAMPING, layout=layout.stacked("layers"))
    got, _ = stacked.update({"layers": g}, (), input_gram={"layers": grams})
    torch = precondition_by_input_gram(DAMPING, layout=layout.output_first)
    for i in range(2):
        want = reference.tract(np.asarray(g[i]), np.asarray(rows[i]), DAMPING)
        np.testing.assert_allclose(got["layers"][i], want, rtol=1e-4, atol=1e-5)
        turned, _ = torch.update({"w": g[i].T}, (), input_gram={"w": grams[i]})
        np.testing.assert_allclose(turned["w"].T, want, rtol=1e-4, atol=1e-5)


def test_other_leaves_pass_and_what_is_not_finite_stays_in_its_leaf():
    g = random_like({"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"kernel": (3, 2)}}, seed=9)
    tx = precondition_by_input_gram()
    got, _ = tx.update(g, (), input_gram={"b/kernel": jnp.full((3, 3), jnp.nan)})
    assert np.isnan(got["b"]["kernel"]).all(), "seen by what looks for bad steps"
    jax.tree.map(np.testing.assert_array_equal, got["a"], g["a"])
    masked = optax.masked(tx, {"a": True, "b": False})
    got, _ = masked.update(g, masked.init(g), input_gram={"b/kernel": jnp.eye(3)})
    jax.tree.map(np.testing.assert_array_equal, got, g)
    frozen = g | {"b": {"kernel": None}}
    got, _ = tx.update(frozen, (), input_gram={"b/kernel": jnp.eye(3)})
    assert got["b"]["kernel"] is None


def test_bfloat16_gradients_and_inputs_are_solved_in_float32():
    x, g = (random_like(s, seed=i).astype(jnp.bfloat16) for i, s in enumerate([(20, 6), (6, 3)]))
    gram = input_gram(x)
    assert gram.dtype == jnp.float32
    got, _ = precondition_by_input_gram(DAMPING).update({"k": g}, (), input_gram={"k": gram})
    assert got["k"].dtype == jnp.bfloat16
    want = reference.tract(*(np.asarray(a, np.float64) for a in (g, x)), DAMPING)
    np.testing.assert_allclose(np.asarray(got["k"], np.float64), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("checked", [True, False])
def test_rows_split_over_devices_give_the_whole_batchs_gram(checked):
    mesh, x = mesh_of(AxisType.Auto, (8,), ("batch",)), random_like((16, 4, 4, 3), seed=10)

    def part(x):
        conv = conv_input_gram(x, (2, 2), axis_name="batch")
        return conv, input_gram(x, axis_name="batch")

    specs = {"in_specs": P("batch"), "out_specs": P(), "check_vma": checked}
    got = jax.jit(jax.shard_map(part, mesh=mesh, **specs))(x)
    want = conv_input_gram(x, (2, 2)), input_gram(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_and_kernels_give_the_numbers_of_one_device(kind):
    mesh = mesh_of(kind)
    x, g = random_like((8, 4, 4, 4), seed=11), random_like((2, 2, 4, 8), seed=12)
    tx = precondition_by_input_gram(DAMPING)

    def both(x, g):
        grams = {"conv/kernel": conv_input_gram(x, (2, 2)), "dense/kernel": input_gram(x)}
        g = {"conv": {"kernel": g}, "dense": {"kernel": g[0, 0]}}
        return tx.update(g, (), input_gram=grams)[0]

    want = jax.jit(both)(x, g)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        got = jax.jit(both)(place(x, "data"), place(g, None, None, "data", "model"))
        spec = NamedSharding(mesh, P(None, None, "data", "model"))
        if kind is AxisType.Explicit:
            assert got["conv"]["kernel"].sharding.is_equivalent_to(spec, 4)
        got = jax.device_get(got)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.convs[0](x)).mean((1, 2)))


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


PICTURES = 0.3 * random_like((16, 6, 6, 3), seed=13)
LABELS = jnp.argmax(PICTURES.mean((1, 2)) @ random_like((3, 4), seed=14), axis=1)


def _cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def _tract():
    return optax.chain(precondition_by_input_gram(DAMPING), optax.adam(3e-2))


def test_trains_a_first_convolution_through_nnx_optimizer():
    model = ConvNet(nnx.Rngs(0))
    optimizer, kind = nnx.Optimizer(model, _tract(), wrt=nnx.Param), type(model.convs[0])
    traces = 0

    @nnx.jit
    def step(model, optimizer):
        nonlocal traces
        traces += 1

        def loss(model):
            logits, grams = with_input_grams(model, "convs/0")(PICTURES)
            return _cross_entropy(logits), grams

        (value, grams), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, input_gram=grams)
        return value, grams

    values = []
    for _ in range(60):
        value, grams = step(model, optimizer)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0], values
    assert traces == 1
    assert type(model.convs[0]) is kind, "the layer is as it was"
    assert list(grams) == ["convs/0/kernel"]
    want = layer_input_gram(model.convs[0], PICTURES)
    np.testing.assert_allclose(grams["convs/0/kernel"], want, rtol=1e-5, atol=1e-6)


def test_trains_a_first_convolution_through_linens_train_state():
    model = LinenConvNet()
    params = model.init(jax.random.key(0), PICTURES)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=_tract())
    state = state.replace(step=jnp.zeros([], jnp.int32))

    @jax.jit
    def step(state):
        def loss(params):
            run = with_input_grams(state.apply_fn, "conv", "head")
            logits, grams = run({"params": params}, PICTURES)
            return _cross_entropy(logits), grams

        (value, grams), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, input_gram=grams), value, grads, grams

    values, first = [], None
    for _ in range(60):
        before = state.params
        state, value, grads, grams = step(state)
        values.append(float(value))
        first = first or (before, grads, grams)
    assert values[-1] < 0.5 * values[0], values
    assert step._cache_size() == 1
    _, grads, grams = first
    assert set(grams) == {"conv/kernel", "head/kernel"}
    got, _ = precondition_by_input_gram(DAMPING).update(grads, (), input_gram=grams)
    gram = np.asarray(_whole(grams["conv/kernel"]), np.float64) + DAMPING * np.eye(27)
    want = np.linalg.solve(gram, np.asarray(grads["conv"]["kernel"]).reshape(27, 8))
    found = np.asarray(got["conv"]["kernel"]).reshape(27, 8)
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-6)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        same = nn.Dense(3, name="same")
        return nn.LayerNorm(name="norm")(same(same(x)))


def _collect(*names):
    model, x = Twice(), jnp.ones((2, 3))
    return with_input_grams(model.apply, *names)(model.init(jax.random.key(0), x), x)


def _update(grams, g=None):
    g = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}} if g is None else g
    return precondition_by_input_gram().update(g, (), **grams)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: _update({}),
            "precondition_by_input_gram: update needs the extra argument 'input_gram'",
        ),
        (
            lambda: _update({"input_gram": {"dense/kernl": jnp.eye(3)}}),
            "precondition_by_input_gram: input_gram has 'dense/kernl', which is no leaf of the "
            "updates. Did you mean 'dense/kernel'",
        ),
        (
            lambda: _update({"input_gram": {"dense/kernel": jnp.eye(4)}}),
            "leaf 'dense/kernel' of shape (3, 2) has 3 inputs, its Gram shape (4, 4)",
        ),
        (
            lambda: _update({"input_gram": {"dense/kernel": jnp.ones((3, 3, 3))}}),
            "leaf 'dense/kernel' of shape (3, 2) has 3 inputs, its Gram shape (3, 3, 3)",
        ),
        (
            lambda: _update({"input_gram": {"dense/bias": jnp.eye(2)}}),
            "leaf 'dense/bias' of shape (2,) has no inputs in this layout",
        ),
        (lambda: precondition_by_input_gram(0.0), "damping must be a number > 0"),
        (lambda: precondition_by_input_gram(layout=3), "layout must be a function or None"),
        (lambda: input_gram(jnp.ones([])), "input_gram: x must be inputs (..., fan_in)"),
        (lambda: conv_input_gram(IMAGES, (2, 2), groups=3), "channels divisible by 3"),
        (lambda: conv_input_gram(IMAGES[0, 0], (2, 2)), "with 2 spatial axes"),
        (lambda: conv_input_gram(IMAGES, (2, 2), strides=(1, 1, 1)), "one per spatial axis (2)"),
        (lambda: conv_input_gram(IMAGES, (2, 2), padding="CAUSAL"), "'CAUSAL' padding is for one"),
        (lambda: _collect("same"), "layer 'same' is called more than once"),
        (lambda: _collect("other"), "no layer called 'other' was called"),
        (lambda: _collect("norm"), "layer must be a Dense, Linear or Conv, got LayerNorm"),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert says in str(error.value)
