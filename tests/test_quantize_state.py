"""State in few bits: which leaves, what `inner` sees, beside other wrappers and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import coat

import optlab
from optlab.linalg import codecs
from optlab.testing.sharding import mesh_of
from optlab.transforms.quantize import QuantizeState, quantize_state

CODECS = {
    "fp8": codecs.fp8(),
    "int8": codecs.int8(),
    "linear": codecs.int8(map="linear"),
    "int4": codecs.int4(),
}
ADAM = optax.scale_by_adam()


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (64, 128), "bias": (128,)}, "head": {"kernel": (128, 64)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=is_shape
    )


def after(tx, steps=2):
    state, update = tx.init(params()), jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(params(t + 1), state, params())
    return updates, state


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "most"), [("fp8", 2.2), ("int8", 2.1), ("int4", 1.1)])
def test_adamw_takes_the_stated_bytes_per_parameter(name, most):
    tree = {"kernel": jnp.zeros((512, 512)), "attn": {"kernel": jnp.zeros((512, 8, 64))}}
    tx = quantize_state(optax.adamw(1e-3), CODECS[name])
    real = nbytes(tx.init(tree))
    assert real == optlab.state_bytes(tx, tree)
    assert real / sum(x.size for x in jax.tree.leaves(tree)) <= most


def test_large_moments_are_coded_and_the_rest_is_as_it_was():
    state = quantize_state(optax.adam(1e-3), CODECS["int8"]).init(params())
    assert isinstance(state, QuantizeState)
    adam = state.inner[0]
    assert adam.mu["dense"]["kernel"].dtype == jnp.int8
    assert adam.nu["dense"]["kernel"].dtype == jnp.uint8
    assert adam.mu["dense"]["bias"].dtype == jnp.float32
    assert adam.count.dtype == jnp.int32
    assert sorted(state.scales) == [
        f"0/{field}/{leaf}/kernel" for field in ("mu", "nu") for leaf in ("dense", "head")
    ]


def test_each_field_has_the_codec_it_is_given():
    tx = quantize_state(ADAM, {"nu": CODECS["fp8"]}, min_size=1)
    adam = tx.init(params()).inner
    assert adam.mu["dense"]["kernel"].dtype == jnp.float32
    assert adam.nu["dense"]["bias"].dtype == jnp.float8_e4m3fn
    mine = quantize_state(optax.scale_by_adan(), {"n": CODECS["int8"]}, second_moments=("n",))
    assert mine.init(params()).inner.n["dense"]["kernel"].dtype == jnp.uint8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inner_sees_arrays_of_its_own_dtypes(dtype):
    seen = []

    def spied(updates, state, params=None):
        seen.append(jax.tree.map(lambda x: (x.shape, x.dtype), state))
        return inner.update(updates, state, params)

    inner = optax.scale_by_adam(mu_dtype=dtype)
    tx = quantize_state(optax.GradientTransformation(inner.init, spied), CODECS["int4"])
    state = tx.init(params())
    jax.eval_shape(tx.update, params(1), state, params())
    assert seen == [jax.tree.map(lambda x: (x.shape, x.dtype), inner.init(params()))]


@pytest.mark.parametrize("name", CODECS)
def test_the_first_update_is_that_of_inner_and_the_second_of_its_rounded_moments(name):
    tx, tree = quantize_state(ADAM, CODECS[name]), params()
    got, state = after(tx, 1)
    want, plain = after(ADAM, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)

    def rounded(x, signed):
        if x.size < 4096:
            return x
        coded = CODECS[name].encode(x, signed=signed)
        return CODECS[name].decode(coded, x.shape[-1], signed=signed)

    plain = plain._replace(
        mu=jax.tree.map(lambda x: rounded(x, True), plain.mu),
        nu=jax.tree.map(lambda x: rounded(x, False), plain.nu),
    )
    got, want = (t.update(params(2), s, tree)[0] for t, s in ((tx, state), (ADAM, plain)))
    # A rounding of the moments may be another code.
    off = np.abs(got["head"]["kernel"] - want["head"]["kernel"])
    assert np.median(off) <= 1e-6
    np.testing.assert_allclose(got["dense"]["bias"], want["dense"]["bias"], rtol=1e-5)


def test_coat_adamw_is_the_reference():
    rng = np.random.default_rng(0)
    p, gs = rng.normal(size=128), rng.normal(size=(6, 128))
    h = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    want = coat.adamw(p, gs, lr=1e-2, wd=1e-2, **h)
    tx = quantize_state(optax.adamw(1e-2, weight_decay=1e-2, **h), CODECS["fp8"], min_size=1)
    q = jnp.asarray(p, jnp.float32)
    state, update = tx.init(q), jax.jit(tx.update)
    for t, g in enumerate(gs):
        updates, state = update(jnp.asarray(g, jnp.float32), state, q)
        q = optax.apply_updates(q, updates)
        # A code may be its neighbour; 1e-2 a step is what a step of e4m3 in both moments makes.
        np.testing.assert_allclose(q, want[t], rtol=0, atol=1e-2 * 2e-2 * t or 1e-6)


def largest_update(codec):
    scale = 10.0 ** -jnp.linspace(0, 6, 128)[None]  # gradients of seven decades in one block
    tree, largest = jnp.ones((32, 128)), 0.0
    tx = quantize_state(optax.scale_by_adam(eps=1e-20), codec)
    state, update = tx.init(tree), jax.jit(tx.update)
    for t in range(3):
        g = scale * jnp.sign(jax.random.normal(jax.random.key(t), tree.shape))
        # In the last step only what was kept is left to divide by.
        updates, state = update(g if t < 2 else 0 * g, state, tree)
        largest = max(largest, float(jnp.max(jnp.abs(updates))))
    return largest


@pytest.mark.parametrize("name", CODECS)
def test_small_second_moments_do_not_blow_updates_up(name):
    # In float32 1: half a step of the codes of m, over the least code of v above 0, adds to it.
    assert largest_update(CODECS[name]) <= 2


def test_a_plain_cast_does_blow_updates_up():
    assert largest_update(codecs.fp8(expand=False)) > 1e6


def test_stochastic_rounding_moves_what_nearest_leaves():
    def average(stochastic):
        tx = quantize_state(
            optax.ema(0.999, debias=False), CODECS["linear"], min_size=1, stochastic=stochastic
        )
        state, update = tx.init(jnp.zeros(256)), jax.jit(tx.update)
        g = jnp.full(256, 0.5).at[::128].set(1.0)
        for t in range(40):
            _, state = update(g if t else 2 * (1 - g), state)
        how = state.scales["ema"]
        coded = codecs.Coded(state.inner.ema, how.arrays)
        return how.codec.decode(coded, how.length)[1:128]

    want = 0.999**39 * 1e-3 + 0.5 * (1 - 0.999**39)
    assert jnp.abs(jnp.mean(average(True)) - want) <= 0.02 * want


def test_random_numbers_follow_from_step_leaf_and_seed():
    def codes(seed, steps=1):
        tx = quantize_state(ADAM, CODECS["int4"], stochastic=True, seed=seed)
        return after(tx, steps)[1].inner.mu

    first = codes(0)
    np.testing.assert_array_equal(first["head"]["kernel"], codes(0)["head"]["kernel"])
    assert np.any(first["head"]["kernel"] != codes(1)["head"]["kernel"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.masked(tx, {"dense": True, "head": False}),
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.partition({"a": tx}, {"dense": "a", "head": "a"}),
    ],
    ids=["chain", "masked", "MultiSteps", "partition"],
)
def test_outside_or_inside_a_wrapper_is_the_same(wrap):
    inside = after(wrap(quantize_state(ADAM, CODECS["int8"])))
    outside = after(quantize_state(wrap(ADAM), CODECS["int8"]))
    for a, b in zip(*map(jax.tree.leaves, (inside[0], outside[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert (
        nbytes(inside[1]) == nbytes(outside[1]) < nbytes(jax.eval_shape(wrap(ADAM).init, params()))
    )


def test_the_inside_of_a_subspace_is_coded():
    low = optlab.in_low_rank(
        quantize_state(ADAM, CODECS["int8"], min_size=64), rank=8, layout=optlab.layout.by_ndim
    )
    updates, state = after(low)
    assert state.inner.inner.mu["dense"]["kernel"].dtype == jnp.int8
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


def test_missing_parameters_and_empty_leaves_are_no_matter():
    tx = quantize_state(ADAM, CODECS["int8"])
    tree = params() | {"hole": None, "empty": jnp.zeros((0, 4))}
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates["hole"] is None
    assert updates["empty"].shape == (0, 4)


@pytest.mark.parametrize("spec", [P("data", "model"), P(("data", "model"), None), P(None, "model")])
def test_codes_lie_where_the_parameter_does_and_nothing_is_gathered(spec):
    mesh = mesh_of(AxisType.Auto)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    p, g = (place(params(i)["dense"]["kernel"].repeat(4, axis=1)) for i in range(2))
    for name in ("fp8", "int4"):
        tx = quantize_state(ADAM, CODECS[name])
        state = tx.init(p)
        compiled = jax.jit(tx.update).lower(g, state, p).compile()
        text = compiled.as_text()
        assert not any(f" {op}" in text for op in ("all-gather", "all-to-all", "all-reduce"))
        _, state = compiled(g, state, p)
        for x in (state.inner.mu, state.inner.nu, *state.scales["mu"].arrays):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_state_is_told_where_it_lies(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", "model")))  # noqa: E731
        p, g = (place(params(i)["dense"]["kernel"].repeat(4, axis=1)) for i in range(2))
        for codec in CODECS.values():
            tx = quantize_state(ADAM, codec)
            told = optlab.state_sharding(tx, p)
            state = jax.jit(tx.init, out_shardings=told)(p)
            _, after = jax.jit(tx.update)(g, state, p)
            assert told.scales["mu"].arrays[0].spec == P("data", "model")
            for where, x in zip(*map(jax.tree.leaves, (told, after)), strict=True):
                assert x.sharding.is_equivalent_to(where, x.ndim), (codec, x.shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": 8}, "codec must be a codec, or a dict of codecs by field, got 8"),
        ({"codec": {"nu": 8}}, "codec must be a codec, or a dict of codecs by field"),
        ({"codec": CODECS["int8"], "min_size": 0}, "min_size must be a whole number >= 1, got 0"),
        ({"codec": CODECS["int8"], "second_moments": "nu"}, "second_moments must be a tuple"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"quantize_state: {message}"):
        quantize_state(ADAM, **arguments)


def test_a_field_that_is_not_there_is_refused():
    tx = quantize_state(ADAM, {"mu": CODECS["int8"], "momentum": CODECS["int8"]})
    with pytest.raises(ValueError, match="inner's state has no field 'momentum', got count, mu"):
        tx.init(params())


@pytest.mark.parametrize("name", CODECS)
def test_a_small_network_trains_as_in_float32(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
    y = jnp.sin(x @ jnp.asarray(rng.normal(size=(32, 8)) / 4, jnp.float32))
    start = {
        "a": jnp.asarray(rng.normal(size=(32, 128)) / 6, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(128, 8)) / 11, jnp.float32),
    }

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2) + 0.1

    def train(tx):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (p, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=300)
        return loss(p)

    adam = optax.adam(optax.cosine_decay_schedule(1e-2, 300))
    plain, small = (jax.jit(lambda tx=tx: train(tx))() for tx in (adam, wrapped(adam, name)))
    assert plain < 0.2 * loss(start) + 0.1
    assert small <= 1.01 * plain, (small, plain)


def wrapped(adam, name):
    return quantize_state(adam, CODECS[name], min_size=1024)


def test_q_galore_keeps_its_moments_in_eight_bits():
    tree = {"dense": {"kernel": (256, 512)}, "embed": {"embedding": (64, 128)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)

    def moments(**options):
        tx = optlab.q_galore(0.1, rank=16, **options)
        parts = optlab.state_fields(tx, tree)
        return {(p.field, p.dtype): p.size for p in parts if p.field in ("mu", "nu")}

    size = 16 * 512 + 64 * 128  # coordinates, and the embedding's
    assert moments() == {("mu", "int8"): size, ("nu", "uint8"): size}
    assert moments(state_codec=None) == {("mu", "float32"): size, ("nu", "float32"): size}
    with pytest.raises(TypeError, match="q_galore: state_codec must be a codec or None, got 8"):
        optlab.q_galore(0.1, state_codec=8)
