"""Replays the golden cases of robust means: winsorized gradients, M3 and RM3.

The first two feed gradients per example or group in the place of their mean.
"""

from typing import Any

import golden_cases
import jax
import numpy as np
import optax

from optlab.transforms.aggregate import median_of_groups, rolling_median, winsorize

# Absolute, float32, elementwise.
TOLERANCE = 2e-6


def _replay(h: golden_cases.Hyper, link: Any, case: Any, arrays: Any, gradients: str) -> None:
    """Check the parameters of every step of descent along what the link makes of `gradients`."""
    tx = optax.chain(link, optax.sgd(h.pop("lr")))
    if h:
        raise NotImplementedError(f"unknown hyperparameters {sorted(h)}")
    start = params = golden_cases.group(arrays, "param.")
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(case["steps"]):
        updates, state = step(golden_cases.group(arrays, f"{gradients}.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        wanted = golden_cases.group(arrays, f"out.{t}.")
        assert params.keys() == wanted.keys()
        for name, want in wanted.items():
            what = f"step {t}, {name}"
            np.testing.assert_allclose(params[name], want, rtol=0, atol=TOLERANCE, err_msg=what)
    moved = max(np.abs(params[name] - start[name]).max() for name in start)
    assert moved > 100 * TOLERANCE, "the case does not move: it proves nothing"


def _rows(arrays: Any, gradients: str) -> int:
    (rows,) = {len(x) for name, x in arrays.items() if name.startswith(gradients)}
    return rows


def winsorized(case: Any, arrays: Any) -> None:
    """Check winsorized gradient descent on per-example gradients."""
    h = golden_cases.Hyper(case["hyperparameters"])
    h.fixed(n_examples=_rows(arrays, "extra.per_example."))
    _replay(h, winsorize(h.pop("c")), case, arrays, "extra.per_example")


def m3(case: Any, arrays: Any) -> None:
    """Check descent along medians of group means."""
    h = golden_cases.Hyper(case["hyperparameters"])
    _replay(h, median_of_groups(h.pop("groups")), case, arrays, "extra.group_grad")


def rm3(case: Any, arrays: Any) -> None:
    """Check descent along medians of the last three gradients."""
    h = golden_cases.Hyper(case["hyperparameters"])
    _replay(h, rolling_median(warmup=h.pop("warmup")), case, arrays, "grad")


CASES = {"winsorized": winsorized, "m3": m3, "rm3": rm3}
