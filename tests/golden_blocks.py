"""Replays the golden cases of block selection: greedy rules, and FRUGAL's whole leaves.

Leaves are a list in the recorded order, which is the order of the blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_cases import Hyper

import optlab
from optlab.transforms.select_blocks import select_blocks

TOLERANCE = 2e-6  # absolute, float32


def _names(arrays: Any) -> list[str]:
    return [key.removeprefix("param.") for key in arrays if key.startswith("param.")]


def _leaves(arrays: Any, prefix: str, dtype: Any = "float32") -> list[jax.Array]:
    return [jnp.asarray(arrays[prefix + name], dtype) for name in _names(arrays)]


def _divide_by(bound: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.divide, updates, bound))


def _greedy(h: Hyper, arrays: Any) -> optax.GradientTransformation:
    rule = h.pop("rule")
    names = {"GS": "gs", "GSL": "gsl", "GSD": "gsd", "TOPK": "top_k"}
    if rule not in names:
        raise NotImplementedError(f"rule {rule!r}: only {sorted(names)} exist")
    inner, bound = optax.identity(), None
    if rule != "GS":
        constants = _leaves(arrays, "extra.L." if rule == "GSL" else "extra.D.")
        inner = _divide_by(constants)
        # A leaf of a list is named by its number.
        bound = {str(i): float(x) for i, x in enumerate(constants)} if rule == "GSL" else constants
    selected = select_blocks(inner, names[rule], h.pop("k"), bound=bound)
    return optax.chain(selected, optax.scale_by_learning_rate(h.pop("lr")))


def _frugal(h: Hyper) -> optax.GradientTransformation:
    h.fixed(correct_bias=True, reset_statistics=True)
    h.pop("torch_seed")  # nothing is drawn: the order is given
    order = h.pop("block_order")
    if order not in ("ascending", "descending"):
        raise NotImplementedError(f"block_order {order!r}: its numbers are torch's own")
    rules = {"sign_sgd": optlab.apply_kappa, "sgd": optax.identity, "no": optax.set_to_zero}
    others = rules[h.pop("inactive_update_rule")]()
    selected = select_blocks(
        optax.scale_by_adam(**h.betas(), eps=h.pop("eps")),
        order,
        h.pop("density"),
        every=h.pop("update_gap"),
        inner_state="restart",
        others=optax.chain(others, optax.scale(h.pop("inactive_lr_scale"))),
    )
    return optax.chain(
        selected,
        optax.scale(h.pop("proj_params_lr_scale")),
        optax.add_decayed_weights(h.pop("weight_decay")),
        optax.scale_by_learning_rate(h.pop("lr")),
    )


def _replay(tx: Any, case: Any, arrays: Any, check_choice: Any) -> None:
    params = start = _leaves(arrays, "param.")
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(case["steps"]):
        updates, state = step(_leaves(arrays, f"grad.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        check_choice(t, state[0].chosen)
        for name, p in zip(_names(arrays), params, strict=True):
            want, what = arrays[f"out.{t}.{name}"], f"step {t}, {name}"
            np.testing.assert_allclose(p, want, rtol=0, atol=TOLERANCE, err_msg=what)
    moved = max(np.abs(p - s).max() for p, s in zip(params, start, strict=True))
    assert moved > 100 * TOLERANCE, "the case does not move: it proves nothing"


def _finished(h: Hyper) -> None:
    if h:
        raise NotImplementedError(f"unknown hyperparameters {sorted(h)}")


def bcd_greedy(case: Any, arrays: Any) -> None:
    """Check parameters and choice of every step; entries chosen are those that the case moved."""
    h = Hyper(case["hyperparameters"])
    k = h["k"]
    tx = _greedy(h, arrays)
    _finished(h)

    def same_choice(t, chosen):
        if "extra.chosen" in arrays:
            np.testing.assert_array_equal(chosen, arrays["extra.chosen"][t], f"step {t}")
            return
        before = "param." if t == 0 else f"out.{t - 1}."
        for name, mask in zip(_names(arrays), chosen, strict=True):
            changed = arrays[f"out.{t}.{name}"] != arrays[before + name]
            np.testing.assert_array_equal(mask, changed, f"step {t}, {name}")
        assert sum(int(mask.sum()) for mask in chosen) == k

    _replay(tx, case, arrays, same_choice)


def frugal_blocks(case: Any, arrays: Any) -> None:
    """Check parameters and active leaves of every step; for cases that state a `block_order`."""
    h = Hyper(case["hyperparameters"])
    tx = _frugal(h)
    _finished(h)

    def same_choice(t, chosen):
        np.testing.assert_array_equal(chosen, arrays[f"extra.active.{t}"], f"step {t}")

    _replay(tx, case, arrays, same_choice)


CASES = {"bcd_greedy": bcd_greedy}
