"""Multipliers of the width: their table, what makes two forms one, and activations that stay."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import mup_transfer
from optlab import layout
from optlab.diagnostics import coordinate_check as coordinates
from optlab.schedules.layerwise import scale_by_rates
from optlab.schedules.mup import depth_factors, mup_multipliers

NARROW, WIDE = 8, 32
GROWTH = WIDE / NARROW
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
TARGETS = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)


def shapes(width, inputs=4):
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return {
        "first": {"kernel": leaf(inputs, width), "bias": leaf(width)},
        "hidden": {"kernel": leaf(width, width)},
        "head": {"kernel": leaf(width, 3), "bias": leaf(3)},
    }


def activations(params):
    first = jnp.tanh(INPUTS @ params["first"]["kernel"] + params["first"]["bias"][None])
    hidden = jnp.tanh(first @ params["hidden"]["kernel"])
    return {"hidden": hidden, "out": hidden @ params["head"]["kernel"]}


def loss(params, step=None):
    return jnp.mean((activations(params)["out"] - TARGETS) ** 2)


def initial(key, width):
    leaves, treedef = jax.tree.flatten(shapes(width))
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, s: jax.random.normal(k, s.shape) / math.sqrt(s.shape[0])  # noqa: E731
    drawn = [
        draw(k, s) if s.ndim > 1 else jnp.zeros(s.shape) for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def times(a, b):
    return jax.tree.map(jnp.multiply, a, b)


# Rates of (input bias and weights, hidden, readout in either form), with growth 4.
TABLE = {
    ("adam", "forward"): (1, 1 / GROWTH, 1),
    ("adam", "rate"): (1, 1 / GROWTH, 1 / GROWTH),
    ("lion", "forward"): (1, 1 / GROWTH, 1),
    ("sgd", "forward"): (GROWTH, 1, GROWTH),
    ("sgd", "rate"): (GROWTH, 1, 1 / GROWTH),
    ("muon", "forward"): (1, 1, 1),
    ("muon", "rate"): (1, 1, 1 / GROWTH),
}


@pytest.mark.parametrize(("optimizer", "readout"), TABLE)
def test_rates_are_those_of_the_table(optimizer, readout):
    found = mup_multipliers(shapes(WIDE), shapes(NARROW), optimizer=optimizer, readout=readout)
    given, hidden, head = TABLE[optimizer, readout]
    rates = found.rates
    assert rates["first"] == {"kernel": given, "bias": given}
    assert rates["hidden"]["kernel"] == hidden
    assert rates["head"] == {"kernel": head, "bias": 1}
    products = jax.tree.leaves(times(rates, found.decay))
    assert products == [1] * 5
    in_model = 1 / GROWTH if readout == "forward" else 1
    assert found.forward["head"]["kernel"] == in_model
    assert found.init["head"]["kernel"] * in_model == GROWTH**-0.5
    others = [tree[k] for tree in (found.forward, found.init) for k in ("first", "hidden")]
    assert set(jax.tree.leaves(others)) == {1}


@pytest.mark.parametrize("optimizer", ["adam", "lion", "sgd", "muon"])
def test_the_base_model_is_left_as_it_is(optimizer):
    found = mup_multipliers(shapes(NARROW), shapes(NARROW), shapes(WIDE), optimizer=optimizer)
    assert set(jax.tree.leaves(found)) == {1}


def test_an_axis_that_the_third_model_does_not_grow_is_finite():
    wide, narrow = shapes(WIDE, inputs=12), shapes(NARROW)
    guessed = mup_multipliers(wide, narrow).rates["first"]["kernel"]
    told = mup_multipliers(wide, narrow, shapes(2 * NARROW)).rates["first"]["kernel"]
    assert (guessed, told) == (1 / 3, 1)


def test_attention_and_embeddings_are_read_through_the_layout():
    def leaves(heads, vocab=16):
        shapes = {
            "token/embedding": (vocab, 4 * heads),
            "attention/query/kernel": (4 * heads, heads, 4),
            "attention/out/kernel": (heads, 4, 4 * heads),
            "attention/query/bias": (heads, 4),
        }
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}

    found = mup_multipliers(leaves(6), leaves(2))
    rates = {"token/embedding": 1, "attention/query/bias": 1}
    rates |= {"attention/query/kernel": 1 / 3, "attention/out/kernel": 1 / 3}
    assert found.rates == rates
    # Flax draws embeddings ever smaller.
    assert found.init == dict.fromkeys(rates, 1) | {"token/embedding": math.sqrt(3)}
    torch = mup_multipliers(
        {"w": jnp.zeros((3, 32))}, {"w": jnp.zeros((3, 8))}, layout=layout.output_first
    )
    assert torch.forward == {"w": 0.25}


@pytest.mark.parametrize(
    ("mode", "wanted"), [("keller", 1), ("spectral", 1), ("moonlight", GROWTH**-0.5)]
)
def test_muon_is_corrected_by_what_its_own_factor_lacks(mode, wanted):
    found = mup_multipliers(shapes(WIDE), shapes(NARROW), optimizer="muon", shape_mode=mode)
    assert found.rates["hidden"]["kernel"] == pytest.approx(wanted)


def test_depth_scales_hidden_weights_alone():
    depth = depth_factors(16, 4)
    trees = shapes(NARROW), shapes(NARROW), shapes(WIDE)
    rates = mup_multipliers(*trees, depth=depth).rates
    assert depth == (0.5, 0.5)
    assert rates["hidden"]["kernel"] == 0.5
    assert rates["first"] == {"kernel": 1, "bias": 1}
    assert depth_factors(16, 4, alpha=1.0) == (0.25, 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _trained(params, optimizer, kind):
    """Return the outputs of a wide model after three steps, in both forms of its readout."""
    found = []
    for readout in ("forward", "rate"):
        mup = mup_multipliers(shapes(WIDE), shapes(NARROW), optimizer=kind, readout=readout)
        tx = optax.chain(optimizer, scale_by_rates(mup.rates))

        def step(carry, _, tx=tx, mup=mup):
            weights, state = carry
            grads = jax.grad(lambda p: loss(times(p, mup.forward)))(weights)
            updates, state = tx.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        start = times(params, mup.init)
        (end, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=3)
        found.append(activations(times(end, mup.forward))["out"])
    return found


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("adam", optax.adam(0.02, eps=0.0)), ("sgd", optax.sgd(0.1, 0.9))],
)
def test_both_forms_of_the_readout_train_the_same_function(kind, optimizer):
    start = initial(jax.random.key(0), WIDE)
    in_model, in_rate = _trained(start, optimizer, kind)
    np.testing.assert_allclose(in_model, in_rate, atol=2e-6)
    assert np.abs(in_model - activations(start)["out"]).max() > 0.1


def _problem(wide_as_narrow):
    """Return width -> problem, with multipliers or, told that nothing grows, without."""

    def make(width):
        mup = mup_multipliers(shapes(width), shapes(width if wide_as_narrow else 16))
        in_model = lambda params: times(params, mup.forward)  # noqa: E731
        return coordinates.CoordinateProblem(
            init=lambda key: times(initial(key, width), mup.init),
            tx=optax.chain(optax.adam(0.02), scale_by_rates(mup.rates)),
            loss=lambda params, step: loss(in_model(params)),
            activations=lambda params: activations(in_model(params)),
        )

    return make


@pytest.fixture(scope="module")
def checked():
    """Coordinate checks of one model with multipliers, and without."""
    make = {"muP": _problem(False), "standard": _problem(True)}
    widths = (16, 256)
    return {
        name: coordinates.coordinate_check(build, widths, steps=3, seeds=2)
        for name, build in make.items()
    }


def test_activations_move_as_much_at_every_width_with_multipliers_and_not_without(checked):
    with_them, without = (checked[name].slopes("change") for name in ("muP", "standard"))
    assert max(map(abs, with_them.values())) < 0.1
    assert min(without.values()) > 0.2
    assert max(map(abs, checked["muP"].slopes().values())) < 0.15


def test_what_is_measured_is_the_mean_size_and_the_mean_change(checked):
    for run, name in itertools.product(checked.values(), ("hidden", "out")):
        assert run.size[name].shape == run.change[name].shape == (2, 4)
        assert (run.change[name][:, 0] == 0).all()
    # Nothing is multiplied at the base width: there both are one run.
    np.testing.assert_array_equal(
        checked["muP"].change["out"][0], checked["standard"].change["out"][0]
    )
    keys = [jax.random.key(seed) for seed in (0, 1)]
    sizes = [jnp.abs(activations(initial(key, 16))["out"]).mean() for key in keys]
    np.testing.assert_allclose(checked["muP"].size["out"][0, 0], np.mean(sizes), rtol=1e-5)


def test_an_activation_that_does_not_move_has_no_slope():
    still = coordinates.Coordinates((2, 4), {"x": np.ones((2, 2))}, {"x": np.zeros((2, 2))})
    assert still.slopes() == {"x": pytest.approx(0)}
    assert math.isnan(still.slopes("change")["x"])


def test_the_best_rate_lies_where_the_parabola_is_lowest():
    losses = {str(e): (e + 6.3) ** 2 for e in range(-9, -3)}
    assert mup_transfer.best_exponent(losses) == pytest.approx(-6.3)
    assert mup_transfer.best_exponent({"-6": 1.0, "-5": None}) == -6
    shifted = {str(e): (e + 8.3) ** 2 for e in range(-11, -5)}
    found = mup_transfer.moves({"muP": {"64": losses, "512": shifted}})
    assert found == {"muP": pytest.approx(4)}


def test_the_picture_is_written_whatever_diverged(checked, tmp_path):
    wild = np.array([[0.0, 1.0], [0.0, np.nan]])
    diverged = coordinates.Coordinates((16, 256), {"out": wild}, {"out": wild})
    runs = checked | {"too fast": diverged}
    coordinates.draw_coordinates(runs, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "who", "fix"),
    [
        (lambda: mup_multipliers(shapes(8), {}), "mup_multipliers", "'first/bias' has shape (8,)"),
        (lambda: mup_multipliers(shapes(8), shapes(8), optimizer="adan"), "mup_multipliers",
         "Did you mean 'adam'?"),
        (lambda: mup_multipliers(shapes(8), shapes(8), readout="logits"), "mup_multipliers",
         "one of 'forward', 'rate'"),
        (lambda: mup_multipliers(shapes(8), shapes(8), shape_mode="muon"), "mup_multipliers",
         "one of 'keller'"),
        (lambda: mup_multipliers(shapes(8), shapes(8), depth=2), "mup_multipliers",
         "Write depth_factors(layers, base_layers)"),
        (lambda: mup_multipliers(shapes(8), shapes(8), depth=depth_factors(2, 1)),
         "mup_multipliers", "It tells which weights are hidden"),
        (lambda: mup_multipliers(*[shapes(8)] * 3, optimizer="sgd", depth=depth_factors(2, 1)),
         "mup_multipliers", "only Adam's rule is known"),
        (lambda: depth_factors(0, 1), "depth_factors", "a whole number >= 1"),
        (lambda: depth_factors(2, 1, alpha=1.5), "depth_factors", "a number in [0, 1]"),
        (lambda: coordinates.coordinate_check(_problem(True), (8,)), "coordinate_check",
         "two or more different widths"),
        (lambda: coordinates.coordinate_check(_problem(True), (8, 16), steps=0),
         "coordinate_check", "a whole number >= 1"),
    ],
)  # fmt: skip
def test_a_wrong_call_says_who_and_the_fix(call, who, fix):
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    assert str(refused.value).startswith(who + ":")
    assert fix in str(refused.value)
