"""Where optax has the same method: the same numbers, and the documented differences shown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import layout
from optlab.testing import default_params
from optlab.testing.case import random_like

PARAMS = default_params()
GRADS = [random_like(PARAMS, seed=t + 1) for t in range(10)]
MATRICES = jax.tree.map(lambda p: p.ndim > 1, PARAMS)


def trajectory(tx, grads=GRADS, params=PARAMS):
    """Return the parameters after every step, eagerly: nothing here is worth compiling."""
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def apart(ours, theirs):
    """Return the largest difference of two trajectories, over all steps and leaves."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


DECAY = {"weight_decay": 0.1}


def _optax_muon(**changes):
    """Return Muon as optax does it: its momentum, its eps, and NAdam for the other leaves."""
    arguments = {"polar": optlab.polar.keller(eps=1e-8), "nesterov": True, **changes}
    fallback = optax.adamw(0.1, nesterov=arguments["nesterov"], weight_decay=0.0)
    return optlab.muon(0.1, accumulation="debiased", fallback=fallback, **arguments)


# By itself optax takes the leaves of rank 2; it has to be told which axes others reduce.
RANK_2 = layout.rules({"^dense/kernel$": layout.flax}, default=lambda path, leaf: None)
DIMENSIONS = {
    "attn": {"query": {"kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2))}},
    "conv": {"kernel": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)},
    "dense": {"bias": None, "kernel": optax.contrib.MuonDimensionNumbers(0, 1)},
    "norm": {"scale": None},
    "temperature": None,
}
PEERS = {
    "lion": (optlab.lion(0.1, **DECAY), optax.lion(0.1, **DECAY)),
    "lion_masked": (
        optlab.lion(0.1, weight_decay_mask=MATRICES, **DECAY),
        optax.lion(0.1, mask=MATRICES, **DECAY),
    ),
    "lion_scheduled": (
        optlab.lion(lambda t: 0.1 / (1 + t), b1=0.95, b2=0.98),
        optax.lion(lambda t: 0.1 / (1 + t), b1=0.95, b2=0.98, weight_decay=0.0),
    ),
    "lion_b2_zero": (optlab.lion(0.1, b2=0.0), optax.lion(0.1, b2=0.0, weight_decay=0.0)),
    "lion_k_log_cosh": (
        optlab.lion_k(0.1, kappa=optlab.kappa.smooth_sign(1.0)),
        optax.chain(optax.scale_by_lion(mode="smooth", smooth_beta=1.0), optax.scale(-0.1)),
    ),
    "signum": (optlab.signum(0.1), optax.signum(0.1)),
    "sign_sgd": (optlab.signum(0.1, momentum=0), optax.sign_sgd(0.1)),
    "adabelief": (optlab.adabelief(0.1, eps=1e-8), optax.adabelief(0.1, eps=1e-8, eps_root=1e-8)),
    "lamb": (optlab.lamb(0.1, **DECAY), optax.lamb(0.1, **DECAY)),
    "lamb_masked": (
        optlab.lamb(0.1, weight_decay_mask=MATRICES, **DECAY),
        optax.lamb(0.1, mask=MATRICES, **DECAY),
    ),
    "lars": (
        optlab.lars(0.1, trust_coefficient=0.1, norm="of_sum", zero_norm_ratio=1, **DECAY),
        optax.lars(0.1, trust_coefficient=0.1, **DECAY),
    ),
    "lars_nesterov_masked": (
        optlab.lars(
            0.1, trust_coefficient=0.1, norm="of_sum", zero_norm_ratio=1, nesterov=True, eps=1e-3,
            weight_decay_mask=MATRICES, trust_ratio_mask=MATRICES, **DECAY,
        ),
        optax.lars(
            0.1, trust_coefficient=0.1, nesterov=True, eps=1e-3, weight_decay_mask=MATRICES,
            trust_ratio_mask=MATRICES, **DECAY,
        ),
    ),
    "adamp_never_projecting": (optlab.adamp(0.1, delta=0.0, **DECAY), optax.adamw(0.1, **DECAY)),
    "sgdp_never_projecting": (optlab.sgdp(0.1, delta=0.0), optax.sgd(0.1, momentum=0.9)),
    "nap_held_nowhere": (
        optlab.nap(0.1, mask=jax.tree.map(lambda p: False, PARAMS)), optax.adam(0.1)
    ),
    "muon": (_optax_muon(layout=RANK_2), optax.contrib.muon(0.1)),
    "muon_decayed": (
        _optax_muon(layout=RANK_2, scale="moonlight", weight_decay_mask=MATRICES, **DECAY),
        optax.contrib.muon(0.1, consistent_rms=0.2, weight_decay_mask=MATRICES, **DECAY),
    ),
    "muon_of_every_rank": (
        _optax_muon(nesterov=False),
        optax.contrib.muon(0.1, nesterov=False, muon_weight_dimension_numbers=DIMENSIONS),
    ),
    "muon_table": (
        _optax_muon(layout=RANK_2, polar=optlab.polar.you(eps=1e-8)),
        optax.contrib.muon(0.1, ns_coeffs="dion"),
    ),
    "trust_ratio": (
        optax.chain(optlab.scale_by_trust_ratio(0.1, zero_norm_ratio=1), optax.scale(-1.0)),
        optax.chain(optax.scale_by_trust_ratio(trust_coefficient=0.1), optax.scale(-1.0)),
    ),
    "moments": (
        optax.chain(optlab.scale_by_moments(), optax.scale(-0.1)),
        optax.chain(optax.scale_by_adam(), optax.scale(-0.1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_optax_gives_the_same_numbers(name):
    # In float64: in float32 optax takes 1 - 0.999^t from a power that has lost 13 bits.
    # optax.contrib.muon promotes ranks.
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params, *grads = jax.tree.map(lambda x: x.astype(jnp.float64), [PARAMS, *GRADS])
        ours, theirs = (trajectory(tx, grads, params) for tx in PEERS[name])
        assert apart(ours, theirs) <= 1e-12
        assert apart(ours[-1:], [params]) > 0.01, "the peers agree on standing still"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optlab.lion(0.1), optax.lion(0.1)),  # the default decay of optax is 1e-3, the paper's 0
        (optlab.adabelief(0.1, eps=1e-2), optax.adabelief(0.1, eps=1e-2)),  # eps_root follows eps
        (optlab.lars(1.0, **DECAY), optax.lars(1.0, **DECAY)),  # the norm of the sum
        (optlab.adamp(0.1, nesterov=True), optax.nadamw(0.1, weight_decay=0.0)),
    ],
    ids=["lion", "adabelief", "lars", "adamp_nesterov"],
)
def test_documented_differences_are_differences(ours, theirs):
    assert apart(trajectory(ours), trajectory(theirs)) > 1e-4


def test_a_layer_that_starts_at_zero_moves_a_thousand_times_faster_in_optax_lars():
    zero, one = {"w": jnp.zeros(4)}, [{"w": jnp.ones(4)}]
    ours, theirs = (
        trajectory(tx, one, zero)[0]["w"]
        for tx in (optlab.lars(0.1, norm="of_sum"), optax.lars(0.1))
    )
    np.testing.assert_allclose(theirs, 1000 * ours, rtol=1e-6)


def test_optax_lamb_moves_a_leaf_without_gradient_as_ours_does():
    params, none = {"w": jnp.ones(4)}, [{"w": jnp.zeros(4)}]
    ours, theirs = (
        trajectory(lamb(0.1, **DECAY), none, params) for lamb in (optlab.lamb, optax.lamb)
    )
    assert apart(ours, theirs) <= 1e-6
    np.testing.assert_allclose(ours[0]["w"], 0.9, rtol=1e-6)
