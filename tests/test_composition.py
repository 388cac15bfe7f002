"""Every primitive with every other: momentum x geometry x scale x decay and wrapper.

Each combination trains a small model, keeps every type (its training is traced as one `lax.scan`,
which refuses a carry that changes), and is laid out by the lists below alone. Policies see
scan-stacked layers as they see each layer.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import kappa, layout
from optlab.testing.case import random_like

MOMENTA = {
    "none": optax.identity,
    "interpolate": optlab.interpolate_momentum,
    "ema_from_first": functools.partial(optlab.ema_from_first, 0.9),
    "trace": functools.partial(optax.trace, 0.9),
    "moments": optlab.scale_by_moments,
    "diffgrad": optlab.scale_by_diffgrad,
    "belief": functools.partial(optlab.scale_by_belief, eps=1e-8),
}
GEOMETRIES = {
    "none": optax.identity,
    "sign": functools.partial(optlab.apply_kappa, "l1"),
    "nuclear": functools.partial(optlab.apply_kappa, "nuclear"),
    "smooth_sign": functools.partial(optlab.apply_kappa, kappa.smooth_sign(1e-2)),
    "radial": optlab.remove_radial,
    "radial_rows": functools.partial(optlab.remove_radial, layout=layout.flax),
}
SCALES = {
    "none": optax.identity,
    "trust_ratio": optlab.scale_by_trust_ratio,
    "adagrad_norm": optlab.scale_by_adagrad_norm,
    "row_norm": optlab.scale_by_inverse_row_norm,
    "initial_snr": optlab.scale_by_initial_snr,
}
RATE = 0.02


def _whole(direction):
    return optax.chain(direction, optax.scale_by_learning_rate(RATE))


# What closes a chain: forms of decay, and the wrappers, which see the direction or the whole step.
CLOSINGS = {
    "plain": _whole,
    "cautious": lambda d: _whole(optax.chain(d, optlab.add_cautious_decay(0.01))),
    "decay_after": lambda d: optax.chain(_whole(d), optlab.decay_after_update(RATE, 0.01)),
    "project_radial": lambda d: _whole(optlab.project_radial(d, weight_decay=0.01)),
    "nap": lambda d: optlab.normalize_and_project(_whole(d)),
    "previous": lambda d: optlab.with_previous_updates(_whole(d), last=True),
    "blocks": lambda d: _whole(optlab.select_blocks(d, "gs", normalize=True)),
    "low_rank": lambda d: _whole(optlab.in_low_rank(d, rank=2, every=2)),
}
PARAMS = random_like({"dense": {"bias": (4,), "kernel": (6, 4)}}, seed=0)
TARGET = random_like({"dense": {"bias": (4,), "kernel": (6, 4)}}, seed=1)
INPUTS = jnp.asarray(np.random.default_rng(2).normal(size=(16, 6)), jnp.float32)


def _predict(params):
    return jnp.tanh(INPUTS @ params["dense"]["kernel"] + params["dense"]["bias"][None])


@jax.jit
def loss_and_grads(params):
    return jax.value_and_grad(lambda p: jnp.mean((_predict(p) - _predict(TARGET)) ** 2))(params)


def build(momentum, geometry, scale, closing):
    links = (MOMENTA[momentum](), GEOMETRIES[geometry](), SCALES[scale]())
    return CLOSINGS[closing](optax.chain(*links))


def train(tx, params, steps):
    """Train in one scan: a state, update or parameter that changes type does not trace."""

    def body(carry, _):
        params, state = carry
        loss, grads = loss_and_grads(params)
        updates, state = tx.update(grads, state, params)
        kept = jax.tree.map(lambda u, g: u.shape == g.shape and u.dtype == g.dtype, updates, grads)
        assert all(jax.tree.leaves(kept)), "the update has another type than its gradient"
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(body, (params, tx.init(params)), None, length=steps)
    return losses, params


@pytest.mark.parametrize("closing", CLOSINGS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_combination_keeps_every_type(momentum, closing):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    for geometry, scale in itertools.product(GEOMETRIES, SCALES):
        tx = build(momentum, geometry, scale, closing)
        _, params = jax.eval_shape(lambda p, tx=tx: train(tx, p, 3), narrow)
        assert jax.tree.map(lambda p: p.dtype, params) == jax.tree.map(lambda p: p.dtype, narrow)


def losses_of(tx, steps):
    """Train eagerly: compiling a thousand chains would take an hour, dispatching them a minute."""
    params, state, losses = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        loss, grads = loss_and_grads(params)
        with jax.disable_jit():  # lax.cond takes its branch in Python
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return [*losses, float(loss_and_grads(params)[0])]


# The other closings touch no direction: they train on the diagonal below.
@pytest.mark.parametrize("closing", ["plain", "project_radial", "nap"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_combination_trains(momentum, closing):
    for geometry, scale in itertools.product(GEOMETRIES, SCALES):
        losses = losses_of(build(momentum, geometry, scale, closing), steps=2)
        assert losses[-1] < losses[0], f"{geometry}, {scale}: {losses}"


def _diagonal():
    """Few combinations in which every primitive occurs."""
    kinds = (MOMENTA, GEOMETRIES, SCALES, CLOSINGS)
    return list(zip(*(itertools.islice(itertools.cycle(kind), 8) for kind in kinds), strict=True))


@pytest.mark.parametrize("combination", _diagonal(), ids="-".join)
def test_compiled_training_is_eager_training(combination):
    tx = build(*combination)
    losses, _ = jax.jit(lambda params: train(tx, params, 8))(PARAMS)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses[:3], losses_of(tx, 2), rtol=1e-5)


def test_the_diagonal_holds_every_primitive():
    for at, kind in enumerate((MOMENTA, GEOMETRIES, SCALES, CLOSINGS)):
        assert {combination[at] for combination in _diagonal()} == set(kind)


LAYERS = 3
STACKED = random_like(
    {
        "layers": {
            "attn": {"query": {"kernel": (LAYERS, 6, 2, 3)}},
            "dense": {"kernel": (LAYERS, 6, 4)},
        }
    },
    seed=3,
)
SCAN = layout.stacked("^layers/")
LAYOUT_AWARE = {
    "adamp": functools.partial(optlab.adamp, 0.1, weight_decay=0.1, delta=1.5),
    "sgdp": functools.partial(optlab.sgdp, 0.1, weight_decay=0.1, delta=1.5),
    "allora": functools.partial(optlab.allora, 0.1),
    "lars": functools.partial(optlab.lars, 0.1, trust_coefficient=0.1, weight_decay=0.1),
    "lamb": functools.partial(optlab.lamb, 0.1, weight_decay=0.1),
    "remove_radial": optlab.remove_radial,
    "project_radial": functools.partial(optlab.project_radial, optax.identity(), delta=1.5),
    "scale_by_inverse_row_norm": optlab.scale_by_inverse_row_norm,
    "scale_by_trust_ratio": optlab.scale_by_trust_ratio,
}


def _run(tx, params, grads):
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


@pytest.mark.parametrize("name", LAYOUT_AWARE)
def test_scan_stacked_layers_are_treated_one_by_one(name):
    grads = [random_like(STACKED, seed=t + 4) for t in range(3)]
    # Layers of very different size, so that one norm for all of them would show.
    size = jnp.asarray([0.1, 1.0, 10.0])
    params = jax.tree.map(lambda p: p * size.reshape(-1, *[1] * (p.ndim - 1)), STACKED)
    together = _run(LAYOUT_AWARE[name](layout=SCAN), params, grads)
    for layer in range(LAYERS):
        own = jax.tree.map(lambda x, at=layer: x[at], (params["layers"], grads, together))
        alone = _run(LAYOUT_AWARE[name](layout=layout.flax), own[0], [g["layers"] for g in own[1]])
        for found, expected in zip(own[2], alone, strict=True):
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_nuclear_lion_k_treats_stacked_matrices_one_by_one():
    stack = STACKED["layers"]["dense"]["kernel"]
    together, _ = optlab.apply_kappa("nuclear").update(stack, optax.EmptyState())
    for layer in range(LAYERS):
        alone, _ = optlab.apply_kappa("nuclear").update(stack[layer], optax.EmptyState())
        np.testing.assert_allclose(together[layer], alone, atol=1e-5)
