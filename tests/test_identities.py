"""Degenerate identities: recipes that are one another at the end of a parameter's range."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import flat, steps

import optlab
from optlab import kappa, layout
from optlab.testing import default_params
from optlab.testing.case import random_like

TREE = default_params()
NOISE = [random_like(TREE, seed=t + 1) for t in range(5)]
DECAY = {"weight_decay": 0.1}
_as_weights = optax.stateless(lambda updates, params: params)
IDENTITIES = {
    "signum is lion with b1 = b2": (
        optlab.signum(0.1, momentum=0.9, **DECAY), optlab.lion(0.1, b1=0.9, b2=0.9, **DECAY)
    ),
    "lion is lion_k of l1": (optlab.lion(0.1, **DECAY), optlab.lion_k(0.1, kappa="l1", **DECAY)),
    "lion with b1 = 0 is sign descent": (optlab.lion(0.1, b1=0.0), optlab.signum(0.1, momentum=0)),
    "a narrow huber is lion": (
        optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.huber(1e-30))
    ),
    "a narrow log cosh is lion": (
        optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.smooth_sign(1e-30))
    ),
    "top_k of everything is lion": (optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.top_k(999))),
    "an empty dead zone is lion": (optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.dead_zone(0))),
    "lp of 2 is l2": (
        optlab.lion_k(0.1, kappa=kappa.lp(2.0)), optlab.lion_k(0.1, kappa="l2")
    ),
    "quadratic lion_k is averaged descent with decay": (
        optlab.lion_k(0.1, kappa="quadratic", b1=0.9, b2=0.9, **DECAY),
        optax.chain(
            optax.ema(0.9, debias=False), optax.add_decayed_weights(0.1), optax.scale(-0.1)
        ),
    ),
    "adamp that never projects is adamw": (
        optlab.adamp(0.1, delta=0.0, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "adamp on vectors alone is adamw": (
        optlab.adamp(0.1, layout=lambda path, leaf: None, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "sgdp that never projects is momentum descent": (
        optlab.sgdp(0.1, delta=0.0, momentum=0.8), optax.sgd(0.1, momentum=0.8)
    ),
    "sgdp that never projects, nesterov": (
        optlab.sgdp(0.1, delta=0.0, momentum=0.8, nesterov=True),
        optax.sgd(0.1, momentum=0.8, nesterov=True),
    ),
    "sgdp that always projects and forgets is remove_radial": (
        optlab.sgdp(0.1, delta=1e9, momentum=0.0),
        optax.chain(optlab.remove_radial(layout=layout.flax), optax.scale(-0.1)),
    ),
    "sgdp's released code is the paper's under nesterov": (
        optlab.sgdp(0.1, delta=1.5, nesterov=True, official=True),
        optlab.sgdp(0.1, delta=1.5, nesterov=True),
    ),
    "lamb without ratio is adamw": (
        optlab.lamb(0.1, trust_ratio_mask=False, eps=1e-8, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "lars without ratio and rate inside is momentum descent": (
        optlab.lars(0.1, trust_ratio_mask=False), optax.sgd(0.1, momentum=0.9)
    ),
    "a constant rate inside or outside of the buffer of lars": (
        optlab.lars(1.0, nesterov=True, **DECAY),
        optlab.lars(1.0, nesterov=True, lr_in_momentum=False, **DECAY),
    ),
    "larc under a small rate is descent at that rate": (
        optlab.lars(1e-3, larc=True, trust_coefficient=1e3), optax.sgd(1e-3, momentum=0.9)
    ),
    "adabelief without memory of the mean is adam around zero": (
        optlab.adabelief(0.1, b1=0.0, b2=0.0, eps=1.0), optax.sgd(0.1 / 2)
    ),
    "diffgrad coupled or decoupled without decay": (
        optlab.diffgrad(0.1, decoupled=True), optlab.diffgrad(0.1)
    ),
    "diffgrad's eps before or after the correction, when it is zero": (
        optlab.diffgrad(0.1, eps=0.0, official=True), optlab.diffgrad(0.1, eps=0.0)
    ),
    "adagrad_norm under a huge b0 is descent": (
        optlab.adagrad_norm(1e5, b0=1e6), optax.sgd(0.1)
    ),
    "allora's factor and a linear base commute": (
        optlab.allora(0.1, base=optax.scale(3.0)),
        optlab.allora(0.1, base=optax.scale(3.0), after_base=False),
    ),
    "nap that holds nothing is adam": (
        optlab.nap(0.1, mask=False), optax.adam(0.1)
    ),
    "nap before its first projection is adam": (
        optlab.nap(0.1, every_k=6), optax.adam(0.1)
    ),
    "decay after the update is decay before it and a smaller step": (
        optax.chain(optax.sgd(0.1), optlab.decay_after_update(0.1, 0.5)),
        optax.chain(optax.scale(0.95), optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    ),
    "cautious decay of weights as gradients is decay": (
        optax.chain(_as_weights, optlab.add_cautious_decay(0.5), optax.scale(-0.1)),
        optax.chain(_as_weights, optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    ),
    "cautious decay of weights against gradients is none": (
        optax.chain(_as_weights, optax.scale(-1), optlab.add_cautious_decay(0.5)),
        optax.chain(_as_weights, optax.scale(-1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_degenerate_identity(name):
    first, second = (steps(tx, NOISE, TREE) for tx in IDENTITIES[name])
    largest = np.abs(flat(second)).max()
    assert largest > 1e-4
    np.testing.assert_allclose(flat(first), flat(second), rtol=2e-4, atol=2e-6 * largest)


@pytest.mark.parametrize("b2", [0.0, 0.01, 0.45, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99])
def test_the_momentum_that_reads_the_new_average_is_the_textbook_one(b1, b2):
    fast = steps(optlab.interpolate_momentum(b1, b2), NOISE, TREE)
    textbook = steps(optlab.interpolate_momentum(jnp.float32(b1), jnp.float32(b2)), NOISE, TREE)
    np.testing.assert_allclose(flat(fast), flat(textbook), rtol=0, atol=4e-6)


def test_at_b2_zero_the_average_is_the_gradient():
    tx = optlab.interpolate_momentum(0.9, 0.0)
    state = tx.init(TREE)
    _, state = tx.update(NOISE[0], state)
    np.testing.assert_array_equal(flat(state.mu), flat(NOISE[0]))
    second, _ = tx.update(NOISE[1], state)
    want = 0.9 * flat(NOISE[0]) + 0.1 * flat(NOISE[1])
    np.testing.assert_allclose(flat(second), want, rtol=0, atol=1e-6)
