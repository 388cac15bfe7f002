"""Rules that make one gradient of several tasks' gradients: MGDA, ParetoDA."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab.combine import simplex
from optlab.combine.geometry import geometry, named_leaves, stacked, weighted
from optlab.transforms.aggregate import whole


class Combined(NamedTuple):
    """What a rule made of the tasks' gradients."""

    weights: jax.Array  # (tasks,): the gradient is their weighted sum
    gradient: Any  # a tree without the tasks' axis


def _scales(normalize: str | None, norms: jax.Array, losses: ArrayLike | None) -> jax.Array:
    """Return what the norms of the gradients are divided by."""
    if normalize is None:
        return jnp.ones_like(norms)
    lengths = jnp.where(norms > 0, norms, 1)
    if normalize == "l2":
        return lengths
    values = jnp.broadcast_to(jnp.asarray(losses, norms.dtype), norms.shape)
    return values * lengths if normalize == "loss+" else values


@_checks.explain_calls
def mgda(
    *gradients: Any, normalize: str | None = None, losses: ArrayLike | None = None
) -> Combined:
    """Return the shortest convex combination of the tasks' gradients (MGDA).

    w = argmin |sum_i w_i g_i|^2 over w_i >= 0, sum_i w_i = 1;  d = sum_i w_i g_i.

    To descend along d lowers every task: <d, g_i> >= |d|^2 for all i. Where d = 0 no direction
    does (the point is Pareto-stationary). Tasks of small gradients get large weights, so scales
    matter: `normalize`. Pure, for `jax.jit` and `jax.vmap`; exact to rounding, for any number of
    tasks, by the closed form for two and an active set for more (see Deviations).

    Args:
      gradients: one tree with the tasks along the first axis of every leaf, as from
        `jax.jacrev` of a vector of losses; or a tree per task.
      normalize: find the weights from g_i/|g_i| ("l2"), g_i/L_i ("loss") or g_i/(L_i |g_i|)
        ("loss+"); they are applied to the g_i themselves, as in the authors' code. (static)
      losses: L_i > 0, shape (tasks,); for "loss" and "loss+".

    Returns:
      (weights, gradient): shape (tasks,), and a tree of one task's shapes and dtypes. A task whose
      gradient is not finite gets weight 0 and does not reach the sum; if none is, all is NaN. Of a
      task whose gradient is zero the weight is 1.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> found = optlab.mgda(jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 0.0, 1.0]))
      >>> print(found.weights.round(2), found.gradient.round(2))
      [0.25 0.75] [0.25 0.25 0.25 0.75]

    Deviations:
      The authors' code clamps the weights of two tasks to [0.001, 0.999] and returns nothing when
      Frank-Wolfe does not converge in 250 steps. Where the minimum is not unique, as for more
      tasks than dimensions, these are the weights of one minimizer.

    References:
      Sener, Koltun, Multi-Task Learning as Multi-Objective Optimization, arXiv:1810.04650, 2018,
      Eqs. 3-4; code: isl-org/MultiObjectiveOptimization. SAM-MTL (arXiv:2211.13723) combines the
      gradients and, apart from them, what sharpness adds to each: with s_i the gradient at
      p + rho g_i/|g_i|, mgda(g).gradient + mgda(s - g).gradient.
    """
    name = "mgda"
    if normalize is not None:
        _checks.check_choice(name, "normalize", normalize, ("l2", "loss", "loss+"))
    if (losses is None) == (normalize in ("loss", "loss+")):
        raise ValueError(
            f"{name}: losses belong to normalize='loss' and 'loss+', got normalize={normalize!r} "
            f"and losses {'missing' if losses is None else 'given'}. Give both or neither."
        )
    tree = stacked(name, gradients)
    leaves = [u for _, u in named_leaves(name, tree)]
    if not leaves:
        return Combined(jnp.zeros(0), tree)
    cosines, norms, finite = geometry(leaves)
    norms = norms / _scales(normalize, norms, losses)
    weights = simplex.min_norm_weights(cosines, norms, finite & jnp.isfinite(norms))
    return Combined(weights, weighted(name, tree, weights))


def _constraints(
    gram: jax.Array, toward: jax.Array, balance: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return objective, rows and bounds of the two programs of ParetoDA; -inf bounds nothing."""
    helps = toward > 0
    bounds = jnp.where(helps, -jnp.inf, toward)
    bounds = jnp.where(toward == jnp.max(toward), 0, bounds)
    bounds = jnp.where(jnp.any(helps), bounds, 0)
    last = jnp.where(balance, -jnp.inf, jnp.minimum(jnp.max(toward), 0))
    objective = jnp.where(balance, toward, jnp.sum(gram, axis=0))
    rows = jnp.concatenate([gram, toward[None]])
    return objective, rows, jnp.append(jnp.where(balance, bounds, 0), last)


@_checks.explain_calls
def pareto_da(
    *gradients: Any,
    target_gradient: Any,
    target_loss: ArrayLike,
    eps: ArrayLike = 1e-3,
    preference: ArrayLike | None = None,
) -> Combined:
    """Combine tasks so that a held-out loss falls too (ParetoDA's weights).

    With v the gradient of the held-out loss, c_i = <g_i, v> and C_ij = <g_i, g_j>, over w_i >= 0,
    sum_i w_i = 1. Balance, while target_loss > eps:  max sum_i w_i c_i  with  (C w)_i >= c_i where
    c_i <= 0 and (C w)_i >= 0 for the largest c_i; if all c_i <= 0, C w >= 0. Dominate, after it:
    max sum_i (C w)_i  with  C w >= 0  and  sum_i w_i c_i >= min(max_i c_i, 0).
    d = n sum_i w_i g_i.

    `optlab.mgda` is even-handed; this asks which trade-off serves the loss that matters. The
    linear program is solved by looking at all its vertices, inside `jax.jit`; 7 tasks at most.

    Args:
      gradients: one tree with the tasks along the first axis of every leaf, or a tree per task.
      target_gradient: v, a tree of one task's shapes.
      target_loss: scalar, the held-out loss at these parameters.
      eps: held-out loss at which balancing ends, >= 0; the official code's 1e-3.
      preference: weights >= 0 taken where the program has no solution, shape (tasks,); None for
        equal ones.

    Returns:
      (weights, gradient): weights n w, of sum n as in the official code, and a tree of one task's
      shapes and dtypes. A task whose gradient is not finite gets weight 0; where v is not finite,
      the preference decides.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> g = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> v = jnp.array([0.0, 1.0])
      >>> print(optlab.pareto_da(g, target_gradient=v, target_loss=0.7).weights)
      [1. 1.]

    Deviations:
      Solved on the device in the gradients' precision rather than by GLPK on the host; of several
      optima another may be found. To leave out the last bound of "dominate" (`relax`) is not
      offered.

    References:
      Lv et al., Pareto Domain Adaptation, arXiv:2112.04137, 2021; code: BIT-DA/ParetoDA at 6691766,
      tools/epo_lp_dna.py.
    """
    name = "pareto_da"
    _checks.check_nonnegative(name, eps=eps)
    tree = stacked(name, gradients)
    named = named_leaves(name, tree)
    if not named:
        return Combined(jnp.zeros(0), tree)
    n = len(named[0][1])
    if n > simplex.LARGEST_PROGRAM:
        raise ValueError(
            f"{name}: the gradients must be of at most {simplex.LARGEST_PROGRAM} tasks, got {n}. "
            "Add some of them up, or take optlab.mgda."
        )
    cosines, norms, finite = geometry(_beside(name, tree, target_gradient))
    gram = cosines * norms[:, None] * norms[None, :]
    usable = finite[:n]
    balance = jnp.asarray(target_loss) > eps
    objective, rows, bounds = _constraints(gram[:n, :n], gram[n, :n], balance)
    weights, found = simplex.best_vertex(objective, rows, bounds, usable)
    given = jnp.ones(n) if preference is None else jnp.asarray(preference)
    given = jnp.where(usable, given.astype(weights.dtype), 0)
    weights = jnp.where(found & finite[n], weights, given / jnp.sum(given))
    return Combined(n * weights, weighted(name, tree, n * weights))


def _beside(name: str, tree: Any, target: Any) -> list[jax.Array]:
    """Return the leaves with the held-out gradient as one more task."""

    def leaf(path, u, p, v):
        if jnp.shape(v) != u.shape[1:]:
            raise ValueError(
                f"{name}: target_gradient has shape {jnp.shape(v)} at '{path}', {u.shape[1:]} is "
                "needed. Take the gradient of the held-out loss by the same parameters."
            )
        return (jnp.concatenate([whole(u), v[None].astype(u.dtype)]),)

    (both,) = _leafwise.leafwise(name, leaf, tree, others=(target,), keep_dtype=False)
    return jax.tree.leaves(both)


@_checks.explain_calls
def combine_gradients(
    rule: Callable[..., Combined] = mgda,
) -> optax.GradientTransformationExtraArgs:
    """Make one gradient of the gradients of several tasks, as a link of a chain.

    u = sum_i w_i g_i, the weights by the rule. Pass gradients with the tasks along the first axis
    of every leaf, as to `optlab.median_of_groups`; put it first in a chain.

    Args:
      rule: `optlab.mgda`, `optlab.pareto_da`, either under `functools.partial`, or your own:
        (gradients, **extra arguments) to (weights, gradient). Its keywords are read from the extra
        arguments of update that bear their names. (static)

    Returns:
      A stateless transformation whose output lacks the first axis. On an Explicit mesh a sharded
      axis of tasks is gathered; under `jax.shard_map` average each task's gradient first.

    State:
      None. The incoming gradients take as many times the memory of the parameters as there are
      tasks.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optlab
      >>> losses = lambda p: jnp.stack([jnp.sum((p - 1) ** 2), jnp.sum((p + 1) ** 2)])
      >>> tx, p = optax.chain(optlab.combine_gradients(), optax.sgd(0.1)), jnp.array([3.0, 1.0])
      >>> u, _ = tx.update(jax.jacrev(losses)(p), tx.init(p), p)
      >>> print(u.round(3))
      [-0.4 -0. ]
    """
    name = "combine_gradients"
    if not callable(rule):
        fix = " Pass optlab.mgda itself, or functools.partial(optlab.mgda, normalize='l2')."
        raise _checks.refusal(TypeError, name, "rule", "a function of gradients", rule, fix)
    keywords = _keywords(rule)

    def update(updates, state, params=None, **extra_args):
        named = named_leaves(name, updates)
        if params is not None:
            _check_params(name, updates, params)
        if not named:
            return updates, state
        given = {k: extra_args[k] for k in keywords if k in extra_args}
        needed = (k for k, optional in keywords.items() if not optional)
        given |= {k: _leafwise.read(name, extra_args, k) for k in needed}
        return rule(updates, **given)[1], state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked(name), update)


def _keywords(rule: Callable[..., Any]) -> dict[str, bool]:
    """Return the names of the rule's keywords, and whether each may be left out."""
    parameters = inspect.signature(rule).parameters.values()
    only = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: p.default is not inspect.Parameter.empty for p in only}


def _check_params(name: str, updates: Any, params: Any) -> None:
    def leaf(path, u, _, p):
        if u.shape[1:] != p.shape:
            raise ValueError(
                f"{name}: leaf '{path}' has shape {u.shape} for parameters of {p.shape}; the tasks "
                f"belong in front, (tasks, {', '.join(map(str, p.shape))}). "
                "Take jax.jacrev of the vector of losses."
            )
        return (u,)

    _leafwise.leafwise(name, leaf, updates, others=(params,))
