"""Replays the golden cases of updates held to a set, and of ranks: DOGE, GBLM-Pruner, WeLore.

Their leaves are in PyTorch's layout: the first axis is the output.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_cases import Hyper

from optlab import layout
from optlab.compress import gblm_scores, importance_mask, rank_by_energy, shared_basis
from optlab.linalg.ranks import factorize
from optlab.transforms.constrain import keep_sparsity, project_onto_subspace
from optlab.transforms.importance import accumulate_importance

# Absolute, float32: of elementwise methods, with a given basis, with a decomposition of our own.
TOLERANCE, GIVEN_BASIS_TOLERANCE, OWN_BASIS_TOLERANCE = 2e-6, 5e-6, 2e-5
# Relative, of sums over five samples and of scores, which are products of them.
SCORE_TOLERANCE = 2e-6


def _group(arrays: Any, prefix: str, dtype: Any = "float32") -> dict[str, jax.Array]:
    cut = {key[len(prefix) :]: x for key, x in arrays.items() if key.startswith(prefix)}
    return {key: jnp.asarray(x, dtype) for key, x in cut.items()}


def _finished(h: Hyper) -> None:
    if h:
        raise NotImplementedError(f"unknown hyperparameters {sorted(h)}")


def _adam(h: Hyper) -> optax.GradientTransformation:
    return optax.scale_by_adam(**h.betas(), eps=h.pop("eps"))


def _replay(tx: Any, case: Any, arrays: Any, params: Any, bound: float = TOLERANCE) -> None:
    """Check the parameters of every step."""
    start, state, step = params, tx.init(params), jax.jit(tx.update)
    for t in range(case["steps"]):
        updates, state = step(_group(arrays, f"grad.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        wanted = _group(arrays, f"out.{t}.")
        assert params.keys() == wanted.keys()
        for name, want in wanted.items():
            what = f"step {t}, {name}"
            np.testing.assert_allclose(params[name], want, rtol=0, atol=bound, err_msg=what)
    moved = max(np.abs(params[name] - start[name]).max() for name in start)
    assert moved > 100 * bound, "the case does not move: it proves nothing"


def doge_projection(case: Any, arrays: Any) -> None:
    """Check the shared subspace, the rates of the tasks, and Adam on projected gradients."""
    h = Hyper(case["hyperparameters"])
    taus = [arrays[f"extra.task_vector.{i}"] for i in range(h.pop("n_tasks"))]
    norms = np.asarray([np.linalg.norm(tau) for tau in taus])
    np.testing.assert_allclose(h.pop("lamda") / norms, arrays["extra.lam"], rtol=1e-6)
    rank = min(taus[0].shape) // h.pop("subspace")
    # The first axis, the outputs, is what a kernel has as its columns.
    own = shared_basis([jnp.asarray(tau.T, "float32") for tau in taus], rank)
    np.testing.assert_allclose(own @ own.T, arrays["extra.UUt"], rtol=0, atol=OWN_BASIS_TOLERANCE)
    away, links = h.pop("away"), (_adam(h), optax.scale_by_learning_rate(h.pop("lr")))
    _finished(h)
    bounds = ((arrays["extra.U"], GIVEN_BASIS_TOLERANCE), (own, OWN_BASIS_TOLERANCE))
    for basis, bound in bounds:
        projection = project_onto_subspace(
            {"delta": basis}, away=away, side="cols", layout=layout.output_first
        )
        tx = optax.chain(projection, *links)
        _replay(tx, case, arrays, _group(arrays, "param."), bound)


def _accumulated(case_sums: Any, samples: Any, p: int) -> Any:
    """Return what the samples, one gradient each, sum up to; checked."""
    tx = accumulate_importance(p)
    state = tx.init(case_sums)
    for i in range(len(next(iter(samples.values())))):
        _, state = tx.update({name: x[i] for name, x in samples.items()}, state)
    for name, want in case_sums.items():
        found = state.sums[name] if p == 1 else jnp.sqrt(state.sums[name])
        np.testing.assert_allclose(found, want, rtol=SCORE_TOLERANCE, err_msg=name)
    return state.sums


def sparse_training(case: Any, arrays: Any) -> None:
    """Check the sums, scores and masks of GBLM-Pruner, and AdamW on what it leaves."""
    h = Hyper(case["hyperparameters"])
    p, ratio, pattern = h.pop("grad_norm_p"), h.pop("ratio"), h.pop("n_m")
    unpruned, samples = _group(arrays, "param."), _group(arrays, "extra.calib.")
    sums = _accumulated(_group(arrays, "extra.gagg."), samples, p)
    given = {name: sums.get(name) for name in unpruned}
    norms = _group(arrays, "extra.xnorm.")
    scores = gblm_scores(
        unpruned,
        given,
        {name: norms.get(name) for name in unpruned},
        alpha=h.pop("alpha"),
        p=p,
        layout=layout.output_first,
    )
    for name, want in _group(arrays, "extra.score.").items():
        np.testing.assert_allclose(scores[name], want, rtol=SCORE_TOLERANCE, err_msg=name)
    shape = {"ratio": ratio} if pattern is None else {"pattern": tuple(pattern)}
    masks = importance_mask(scores, **shape, layout=layout.output_first)
    wanted = _group(arrays, "extra.mask.", bool)
    for name, mask in masks.items():
        full = np.ones(unpruned[name].shape, bool) if mask is None else mask
        np.testing.assert_array_equal(full, wanted[name], name)
    params = {name: jnp.where(wanted[name], x, 0) for name, x in unpruned.items()}
    decay, rate = h.pop("weight_decay"), h.pop("lr")
    links = (_adam(h), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))
    _finished(h)
    for mask in (masks, None):
        tx = optax.chain(*links, keep_sparsity(mask, layout=layout.output_first))
        _replay(tx, case, arrays, params)


def welore_rank(case: Any, arrays: Any) -> None:
    """Check ranks and labels exactly, and the truncated matrices."""
    h, params = Hyper(case["hyperparameters"]), _group(arrays, "param.")
    threshold, min_ratio = h.pop("rank_threshold"), h.pop("min_ratio")
    _finished(h)
    found, by_rule = (
        rank_by_energy(params, threshold=threshold, min_ratio=least, layout=layout.output_first)
        for least in (min_ratio, 0.0)
    )
    for name, w in params.items():
        values = np.linalg.svd(w, compute_uv=False)
        np.testing.assert_allclose(values, arrays[f"extra.singular_values.{name}"], rtol=1e-5)
        rank, low = found.ranks[name], found.labels[name] == "lrc"
        assert rank == arrays[f"extra.kept_rank.{name}"], name
        assert min(w.shape) - by_rule.ranks[name] == arrays[f"extra.pruned_rank.{name}"], name
        assert low == arrays[f"extra.is_lrc.{name}"], name
        left, right = factorize(w, rank)
        out = left @ right if low else w
        want = arrays[f"out.0.{name}"]
        np.testing.assert_allclose(out, want, rtol=0, atol=OWN_BASIS_TOLERANCE, err_msg=name)
    assert "lrc" in found.labels.values(), "no matrix is cut: the case proves nothing"


CASES = {
    "doge_projection": doge_projection,
    "keep_sparsity": sparse_training,
    "welore_rank": welore_rank,
}
