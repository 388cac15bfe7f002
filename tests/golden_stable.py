"""Builds SPAM's and Stable-SPAM's golden cases from their hyperparameters.

Their leaves are in PyTorch's layout, but no axis of theirs matters here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.recipes.stable import spam, stable_spam
from optlab.transforms.spikes import ClipSpikesState, NormalizeGradientNormState


def _outside_2d(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim != 2, params)


def _spam(h: Any, variant: str) -> optax.GradientTransformation:
    h.fixed(density_2d=1.0)
    b1, b2 = h.pop("betas")
    return spam(
        h.pop("lr"),
        b1=b1,
        b2=b2,
        official=variant == "official",
        # The released code decays a copy of the leaves that have a density.
        weight_decay_mask=_outside_2d,
        **h.move(
            eps="eps",
            threshold="threshold",
            every="update_proj_gap",
            warmup="warmup_epoch",
            grace="grad_accu_steps",
            weight_decay="weight_decay",
        ),
    )


def _cosine(steps: int, least: float) -> Callable[[Any], Any]:
    """The code's closed form, counted from 1; it rises again in the end."""
    return lambda t: least + (1 - least) * (1 + jnp.cos(jnp.pi * (t + 1) / (steps + 1))) / 2


def _ports_cosine(steps: int, least: float) -> Callable[[Any], Any]:
    """pytorch_optimizer's recursive form, counted from 1; `least` from `steps` on."""

    def scale(t):
        ahead, now = (1 + jnp.cos(jnp.pi * n / (steps + 1)) for n in (t + 2, 1))
        return jnp.where(t + 1 < steps, least + (1 - least) * ahead / now, least)

    return scale


def _stable_spam(h: Any, variant: str) -> optax.GradientTransformation:
    b1, b2 = h.pop("betas")
    official = variant == "official"
    theta, steps, cosine = (
        ("gamma3", "total_T", _cosine) if official else ("theta", "t_max", _ports_cosine)
    )
    steps, least = h.pop(steps), h.pop("eta_min")
    return stable_spam(
        h.pop("lr"),
        b1=b1,
        b2=b2,
        momentum_scale=None if steps is None else cosine(steps, least),
        official=official,
        **h.move(
            eps="eps",
            max_decay=theta,
            norm_decay="gamma1",
            square_decay="gamma2",
            every="update_proj_gap",
            weight_decay="weight_decay",
        ),
    )


TRAJECTORIES = {"spam": _spam, "stable_spam": _stable_spam}

_RECORDED = {
    "m_max_t": (ClipSpikesState, "maxima"),
    "m_norm_t": (NormalizeGradientNormState, "norms"),
    "v_norm_t": (NormalizeGradientNormState, "squares"),
}


def check_internals(case: dict[str, Any], arrays: dict[str, np.ndarray], state: Any) -> int:
    """Compare the recorded `extra.state.<leaf>.<field>` with the last state; return how many."""
    checked = 0
    for field, (kind, ours) in _RECORDED.items():
        nodes = jax.tree.leaves(state, is_leaf=lambda x, kind=kind: isinstance(x, kind))
        found = [node for node in nodes if isinstance(node, kind)]
        for index, leaf in enumerate(sorted(case["shapes"])):
            recorded = arrays.get(f"extra.state.{leaf}.{field}")
            if recorded is not None:
                value = getattr(found[0], ours)[index]
                np.testing.assert_allclose(value, recorded, rtol=2e-6, err_msg=f"{leaf} {field}")
                checked += 1
    for field, ours in {"exp_avg": "mu", "exp_avg_sq": "nu"}.items():
        for leaf in sorted(case["shapes"]):
            recorded = arrays.get(f"extra.state.{leaf}.{field}")
            if recorded is not None:
                value = optax.tree.get(state, ours)[leaf]
                np.testing.assert_allclose(value, recorded, rtol=0, atol=2e-6, err_msg=leaf)
                checked += 1
    return checked
