"""Replays the golden cases of curvature: Sophia with given estimates, TrAct with given inputs.

Their leaves are in PyTorch's layout: the first axis is the output.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_cases import Hyper, group

from optlab import layout
from optlab.recipes.curvature import sophia
from optlab.transforms.input_gram import conv_input_gram, input_gram, precondition_by_input_gram

# Absolute, float32; of systems solved in float32, relative to the largest entry. The cases' own
# note allows a thousandth, since the recorded side inverts in float32.
TOLERANCE, SOLVED_TOLERANCE = 2e-6, 3e-5


def _finished(h: Hyper) -> None:
    if h:
        raise NotImplementedError(f"unknown hyperparameters {sorted(h)}")


def _replay(tx: Any, case: Any, arrays: Any, extra: Any, bound: float) -> list[Any]:
    """Check the parameters of every step, with `extra(t)` as its extra arguments."""
    start = params = group(arrays, "param.")
    state, states = tx.init(params), []
    step = jax.jit(lambda g, s, p, extra: tx.update(g, s, p, **extra))
    for t in range(case["steps"]):
        updates, state = step(group(arrays, f"grad.{t}."), state, params, extra(t))
        params = optax.apply_updates(params, updates)
        states.append(state)
        wanted = group(arrays, f"out.{t}.")
        assert params.keys() == wanted.keys()
        for name, want in wanted.items():
            what = f"step {t}, {name}"
            np.testing.assert_allclose(params[name], want, rtol=0, atol=bound, err_msg=what)
    moved = max(np.abs(params[name] - start[name]).max() for name in start)
    assert moved > 100 * bound, "the case does not move: it proves nothing"
    return states


def _sophia(tx: Any, case: Any, arrays: Any, prefix: str, later: int, factor: float, used: int):
    """Check a run; estimate t is averaged in before step t + later."""

    def extra(t):
        given = group(arrays, f"extra.{prefix}.{t - later}.")
        used_now = {name: factor * x for name, x in given.items()}
        return {"curvature": used_now or None}

    states = _replay(tx, case, arrays, extra, TOLERANCE)
    given = sum(extra(t)["curvature"] is not None for t in range(case["steps"]))
    assert given == used, f"{given} estimates, {used} expected"
    return [state[0] for state in states]


def sophia_g(case: Any, arrays: Any) -> None:
    """The authors' code: squared sampled gradients, B in the divisor, refreshed after steps."""
    h = Hyper(case["hyperparameters"])
    batch, every = h.pop("bs"), h.pop("hessian_interval")
    rate, gamma, decay = h.pop("lr"), h.pop("rho"), h.pop("weight_decay")
    tx = sophia(rate, gamma=gamma, weight_decay=decay, every=every, official=True, **h.betas())
    _finished(h)
    squared = {k: x**2 if k.startswith("extra.") else x for k, x in arrays.items()}
    used = (case["steps"] - 1) // every
    states = _sophia(tx, case, squared, "hess_grad", 1, batch, used)
    noted = next(q for q in case["quirks"] if q.startswith("unclipped fraction"))
    wanted = [float(x) for x in noted.split("[")[1].rstrip("]").split(",")]
    for state, want in zip(states, wanted, strict=True):
        inside = [jnp.abs(state.mu[k]) < gamma * state.nu[k] + 1e-15 for k in state.mu]
        # Theirs is a mean over leaves, ours over entries.
        np.testing.assert_allclose(np.mean([x.mean() for x in inside]), want, atol=5e-4)
        if (int(state.count) - 1) % every == 0 and want:
            # Ours is measured at refreshes.
            share = np.mean(np.concatenate([x.ravel() for x in inside]))
            np.testing.assert_allclose(state.metrics()["win_rate"], share, atol=1e-6)


def sophia_h(case: Any, arrays: Any) -> None:
    """The paper's first version, clip(m/max(h, eps), -p, p): gamma is p, and the rate p lr."""
    h = Hyper(case["hyperparameters"])
    h.fixed(fixed_decay=False, num_samples=1, weight_decouple=True)
    p, every = h.pop("p"), h.pop("update_period")
    tx = sophia(
        p * h.pop("lr"),
        estimator="hutchinson",
        gamma=p,
        eps=p * h.pop("eps"),
        weight_decay=h.pop("weight_decay") / p,
        every=every,
        **h.betas(),
    )
    _finished(h)
    _sophia(tx, case, arrays, "hessian", 0, 1.0, -(-case["steps"] // every))


def tract(case: Any, arrays: Any) -> None:
    """Check the preconditioned gradients and the run of plain descent by them."""
    h = Hyper(case["hyperparameters"])
    h.fixed(inv_type="inverse")
    link = precondition_by_input_gram(h.pop("l"), layout=layout.output_first)
    tx = optax.chain(link, optax.sgd(h.pop("lr")))
    count, kind = h.pop("n"), h.pop("kind")
    window = arrays["param.weight"].shape[2:]
    options = h.move(strides="stride", padding="padding") if kind == "conv" else {}
    _finished(h)

    def gram(t):
        x = jnp.asarray(arrays[f"extra.x.{t}"])
        assert len(x) == count
        if kind == "linear":
            return input_gram(x)
        found = conv_input_gram(jnp.moveaxis(x, 1, -1), window, **options)
        # Flax's order of a patch is (window, channels), PyTorch's (channels, window).
        channels = x.shape[1]
        order = np.arange(found.shape[-1]).reshape(-1, channels).T.ravel()
        return found[jnp.ix_(order, order)]

    extra = lambda t: {"input_gram": {"weight": gram(t)}}  # noqa: E731
    for t in range(case["steps"]):
        found, _ = link.update(group(arrays, f"grad.{t}."), (), **extra(t))
        for name, want in group(arrays, f"extra.tract_grad.{t}.").items():
            bound = SOLVED_TOLERANCE * np.abs(want).max()
            np.testing.assert_allclose(found[name], want, rtol=0, atol=bound, err_msg=name)
    _replay(tx, case, arrays, extra, TOLERANCE)


CASES = {"sophia_g": sophia_g, "sophia_h": sophia_h, "tract": tract}
