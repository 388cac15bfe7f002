"""Run a transformation in a subspace that follows the gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import everywhere, mesh_of
from optlab.transforms import projection
from optlab.transforms.found import found_metrics
from optlab.transforms.lens import Kept, Lens, check_kept, kept_before, zero_coordinates
from optlab.transforms.projection import Reading
from optlab.transforms.refresh import Refresh, refreshed
from optlab.transforms.residual import Residual
from optlab.transforms.subspace import Projector, power_projector
from optlab.transforms.turn import TURNS, Turn, check_choice, check_turn, turner


class InLowRankState(NamedTuple):
    """State of `in_low_rank`."""

    count: jax.Array  # int32, (): steps seen
    kept: tuple[Kept, ...]  # one per shape of a projected side, outside the parameters' tree
    refresh: Any  # of the rule; nothing for a number of steps
    inner: optax.OptState  # of `inner`, for coordinates in place of projected leaves
    residual: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the mean share of the subspaces before in the last ones, and how many there were.

        One count per matrix and refresh.
        """
        return found_metrics(self.kept)


@_checks.explain_calls
def in_low_rank(
    inner: optax.GradientTransformation,
    projector: Projector | None = None,
    *,
    rank: projection.Rank = 0.25,
    side: Any = "short",
    every: int | Refresh = 200,
    stagger: bool = False,
    scale: ArrayLike = 1.0,
    on_refresh: str | Turn = "keep",
    residual: Residual | None = None,
    project: tuple[str, ...] = (),
    seed: int = 0,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in a subspace of r dimensions that follows the gradient of every matrix.

    With B (a, r) for the projected side of a matrix, found from its gradient G at every so many
    steps:  R = B^T G,   N = inner(R),   u = scale B N + residual(G, B R, N).

    `inner` sees a tree of the same structure with R in place of every matrix, and coordinates of
    the parameters likewise: its state is that much smaller, and any optax transformation does. R
    has the rank of its leaf, so that a layout reads both alike: r in the last of the projected
    axes, 1 in the others. Leaves that are no matrix, and those whose r is not below min(m, n), are
    left whole: then this is `inner` itself.

    Args:
      inner: what runs on the coordinates; its decay acts within the subspace only.
      projector: what finds the subspace; None for `power_projector()`. (static)
      rank: r, as a number, a fraction of the projected side, a function (path, leaf) -> r, or a
        tree of these such as `rank_by_energy` returns; None leaves a leaf whole. "full": a rotation
        by all min(m, n) directions. (static)
      side: "short", "long", "rows" (inputs), "cols", "both", or a function (m, n) -> "rows" or
        "cols". A square is projected on its inputs. (static)
      every: steps from one refresh to the next, >= 1, or a rule such as `lazy_refresh`. (static)
      stagger: spread the refreshes evenly over the steps between, instead of all at once; the first
        is at step 0 for all. (static)
      scale: factor of the part inside the subspace; 0 drops it.
      on_refresh: what becomes of inner's state: "keep", as GaLore; "reset", as FRUGAL; "rotate":
        moments are turned into the new basis, as LDAdam; or a function (state, turn). (static)
      residual: what is done with the rest of the gradient, such as `sign_residual()`. (static)
      project: names of extra arguments of update, trees like the updates, that `inner` is to see in
        coordinates too. (static)
      seed: of random projectors and of the random starts of others. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      shardings: `optlab.shardings_of(params)`. On an Auto mesh the state is then spread over the
        devices; types say so on an Explicit mesh. (static)

    Returns:
      A wrapper; updates of a projected leaf have rank r, plus the residual.

    State:
      basis: a r numbers of the leaf's dtype per projected side; found, overlap: 8 bytes per matrix;
      inner: inner's for coordinates, r b in place of a b numbers.
      A basis stays where the gradient is zero or not finite; before the first it is coordinates.

    Raises:
      ValueError: on_refresh="reset" with refreshes at different steps; a state whose fields
        "rotate" does not know; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.in_low_rank(optax.scale_by_adam(), rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> print(tx.init(p).inner.mu["kernel"].shape)
      (1, 8)

    References:
      Zhao et al., GaLore, arXiv:2403.03507, 2024, Alg. 2, and the recipes of this family.
    """
    name = "in_low_rank"
    projector = power_projector() if projector is None else projector
    _checks.check_transform(name, "inner", inner)
    projection.check(name, projector, rank, side, seed, layout)
    _check(name, residual, scale, project)
    check_choice(name, on_refresh)
    rule = _as_rule(name, every, stagger, on_refresh)
    inner = optax.with_extra_args_support(inner)
    reader = partial(projection.read, name, rank=rank, side=side, layout=layout)

    def init(params):
        _leafwise.check_tree(name, params)
        reading = reader(params, shardings=shardings)
        state = inner.init(zero_coordinates(reading, params))
        check_turn(name, on_refresh, state, reading)
        beside = kept_before(reading, projector, params), rule.init(reading.sides)
        kept, learned = jax.tree.map(lambda x: everywhere(x, mesh_of(params)), beside)
        then = _only(reading, params)
        then = residual.then.init(then) if residual else optax.EmptyState()
        return InLowRankState(jnp.zeros([], jnp.int32), kept, learned, state, then)

    def update(updates, state, params=None, **extra_args):
        _leafwise.check_tree(name, updates)
        if params is not None:
            _leafwise.aligned(name, updates, ("the parameters", params))
        reading = reader(updates if params is None else params, shardings=shardings)
        check_kept(name, reading, state.kept)
        due = rule.due(state.refresh, state.count, _offsets(rule, reading, stagger))
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        g = projection.checked(reading, updates)
        before = Lens(reading, projector, state.kept)
        lens = refreshed(before, g, due, key, rule.measure)
        low = lens.lower(updates)
        coordinates = None if params is None else lens.lower(params)
        turned = _turned(on_refresh, inner, lens, state, low, jnp.any(due))
        for argument in project:
            extra_args[argument] = lens.lower(_leafwise.read(name, extra_args, argument))
        new, inner_state = inner.update(low, turned, coordinates, **extra_args)
        out, then = _joined(lens, updates, low, new, scale, residual, state.residual, params)
        learned = _learned(rule, state, lens, due)
        count = _leafwise.increment(state.count)
        return out, InLowRankState(count, lens.kept, learned, inner_state, then)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(name, residual, scale, project) -> None:
    if residual is not None and not isinstance(residual, Residual):
        must, fix = "a residual handler or None", " Write optlab.sign_residual()."
        raise _checks.refusal(TypeError, name, "residual", must, residual, fix)
    _checks.check_nonnegative(name, scale=scale)
    if not (isinstance(project, tuple) and all(isinstance(word, str) for word in project)):
        raise _checks.refusal(TypeError, name, "project", "a tuple of names", project)


def _as_rule(name: str, every: Any, stagger: bool, on_refresh: Any) -> Refresh:
    """Return the rule of a number of steps, or the rule itself."""
    if not isinstance(every, Refresh):
        _checks.check_steps(name, 1, every=every)
        every = Refresh(every)
    if on_refresh == "reset" and (stagger or type(every) is not Refresh):
        must = 'a number of steps, without stagger, for on_refresh="reset"'
        fix = (
            " It restarts the step count, which all leaves share, so they have to be refreshed "
            "together."
        )
        raise _checks.refusal(ValueError, name, "every", must, every, fix)
    return every


def _offsets(rule: Refresh, reading: Reading, stagger: bool) -> np.ndarray:
    places = np.arange(reading.sides, dtype=np.int32)
    return places * rule.every // max(reading.sides, 1) if stagger else 0 * places


def _turned(on_refresh, inner, lens, state, low, due) -> optax.OptState:
    """Return inner's state in the basis of now."""
    if on_refresh == "keep" or not lens.reading.lows:
        return state.inner
    if on_refresh == "reset":
        fresh = inner.init(jax.tree.map(_leafwise.zeros_like, low))
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, state.inner)
    turn = TURNS.get(on_refresh, on_refresh)
    return jax.lax.cond(
        due,
        lambda inner: turn(inner, turner(lens, state.kept)),
        lambda inner: inner,
        state.inner,
    )


def _joined(lens, updates, low, new, scale, residual, state, params) -> tuple[Any, Any]:
    """Return the updates of all leaves, and the state of the residuals' transformation."""
    reading, get = lens.reading, partial(projection.projected, lens.reading)
    inside: list[Any] = [None] * len(reading.lows)
    if not (isinstance(scale, int | float) and scale == 0):
        pairs = zip(reading.lows, get(new), strict=True)
        inside = [n if n is None else scale * lens.up(at, n) for at, n in pairs]
    if residual is None:
        return projection.with_projected(reading, new, inside, updates), state
    rest = [
        g if g is None else lens.residual(at, residual.rule, g, r, n)
        for at, g, r, n in zip(reading.lows, get(updates), get(low), get(new), strict=True)
    ]
    given = None if params is None else _only(reading, params)
    rest, state = residual.then.update(
        projection.only_projected(reading, updates, rest), state, given
    )
    both = [s if u is None else u + s for u, s in zip(inside, get(rest), strict=True)]
    return projection.with_projected(reading, new, both, updates), state


def _only(reading: Reading, tree: Any) -> Any:
    return projection.only_projected(reading, tree, projection.projected(reading, tree))


def _learned(rule, state, lens, due) -> Any:
    """Return the state of the rule, which sees one number per side: means over its matrices."""
    if not lens.reading.sides:
        return state.refresh
    over = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    pairs = zip(state.kept, lens.kept, strict=True)
    again = [jnp.any(over((new.found > old.found) & (old.found > 0)), 1) for old, new in pairs]
    shares = [jnp.mean(over(new.overlap), 1) for new in lens.kept]
    return rule.learn(state.refresh, due, jnp.concatenate(again), jnp.concatenate(shares))
