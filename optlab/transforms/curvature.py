"""Momentum divided by a diagonal of curvature that is refreshed now and then, and clipped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise


class ScaleByClippedCurvatureState(NamedTuple):
    """State of `scale_by_clipped_curvature`."""

    count: jax.Array  # int32, (): updates seen
    mu: optax.Updates  # average of the gradients, in the parameter's shape
    nu: optax.Updates  # average of the curvature, in the parameter's shape
    win_rate: jax.Array  # float32, (): share of entries not clipped at the last refresh

    def metrics(self) -> dict[str, jax.Array]:
        """Return the share of entries that took a Newton step, not a sign's, when last measured."""
        return {"win_rate": self.win_rate}


def _placed(updates: Any, tree: Any) -> Any:
    """Return `tree` with the holes of the updates, such as `optax.masked` makes them."""
    try:
        return jax.tree.map(
            lambda u, x: u if _leafwise.is_hole(u) else x,
            updates,
            tree,
            is_leaf=_leafwise.is_hole,
        )
    except (ValueError, TypeError, KeyError):
        return tree  # the shell says what differs


def _averaged(name: str, b2: ArrayLike, updates: Any, nu: Any, estimate: Any) -> Any:
    """Return b2 nu + (1 - b2) estimate; an entry whose estimate is not finite stays as it is."""

    def leaf(path, u, h, p, new):
        del p
        if getattr(new, "shape", None) != u.shape:
            raise ValueError(
                f"{name}: leaf '{path}' has shape {u.shape} in the updates and "
                f"{getattr(new, 'shape', type(new).__name__)} in curvature. "
                "Estimate the curvature of the very parameters that init was given."
            )
        mean = b2 * h + (1 - b2) * new
        return u, jnp.where(jnp.isfinite(mean), mean, h)

    others = (_placed(updates, estimate),)
    return _leafwise.leafwise(name, leaf, updates, (nu,), others=others)[1]


def _share(updates: Any, mu: Any, divisors: Any) -> jax.Array:
    """Return the share of the entries with a gradient where |mu| is below its divisor."""
    columns = (jax.tree.leaves(x, is_leaf=_leafwise.is_none) for x in (updates, mu, divisors))
    pairs = [(m, d) for u, m, d in zip(*columns, strict=True) if u is not None]
    # Whole numbers: a sum of ones in float32 stops at 2^24.
    inside = [jnp.sum(jnp.abs(m).astype(d.dtype) < d, dtype=jnp.int32) for m, d in pairs]
    total = sum((x.astype(jnp.float32) for x in inside), jnp.zeros([], jnp.float32))
    return total / max(sum(m.size for m, _ in pairs), 1)


@_checks.explain_calls
def scale_by_clipped_curvature(
    b1: ArrayLike = 0.96,
    b2: ArrayLike = 0.99,
    *,
    gamma: ArrayLike = 0.05,
    eps: ArrayLike | None = None,
    every: int = 10,
    official: bool = False,
    seed: int = 0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide an average of gradients by one of a curvature's diagonal, and clip every entry to 1.

    mu <- b1 mu + (1 - b1) g,  nu <- b2 nu + (1 - b2) curvature where one is due,
    u = clip(mu/max(gamma nu, eps), -1, 1). Where nu is 0, negative or small this is sign(mu).

    The extra argument `curvature` is one of
      a function (params, key) -> tree like params, as `gauss_newton_diagonal(predict)` and
        `hutchinson_diagonal(loss)` return it: called at every `every`-th step, inside `lax.cond`,
        so that one compiled step does nothing for it in between;
      a tree like the updates: averaged in at this step, whichever it is;
      None: nu stays. With two compiled steps, one given a tree and one None, the loop decides.

    Under `optax.masked` or `optax.partition` the function is given params with holes: let it close
    over the whole ones, and return a whole tree.

    A gradient that is not finite leaves no trace in mu and comes out as NaN, so that what looks for
    bad steps sees it; a curvature that is not finite is left out, entry by entry.

    Args:
      b1: rate of the average of gradients, in [0, 1).
      b2: rate of the average of curvature, in [0, 1); one application per refresh.
      gamma: factor of the curvature, > 0. A larger one clips less: watch the win rate.
      eps: least divisor, > 0; None for 1e-12, with `official` 1e-15.
      every: steps from one call of the function to the next, the first at step 0. (static)
      official: as the released code: divide by max(gamma nu, 0) + eps, and call the function at
        steps k, 2k, ...; its own place, after steps k - 1, 2k - 1, ..., is the same. (static)
      seed: of the keys that the function is given. (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation whose entries lie in [-1, 1]; needs the extra argument `curvature`.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter. The
      share of entries not clipped, measured at every refresh, is in `state.metrics()`; its authors
      aim at 0.1 to 0.5.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_clipped_curvature(0.0, 0.0, gamma=1.0)
      >>> g, h = jnp.array([1.0, 1.0]), jnp.array([4.0, 0.5])
      >>> u, state = tx.update(g, tx.init(g), curvature=h)
      >>> print(u, state.win_rate)
      [0.25 1.  ] 0.5
    """
    name = "scale_by_clipped_curvature"
    _checks.check_decay(name, b1=b1, b2=b2)
    least = (1e-15 if official else 1e-12) if eps is None else eps
    _checks.check_positive(name, gamma=gamma, eps=least)
    _checks.check_steps(name, 1, every=every)
    _checks.check_steps(name, 0, seed=seed)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def init(params):
        mu = _leafwise.init_slots(name, params, mu_dtype)
        nu = _leafwise.init_slots(name, params, _leafwise.widen)
        count, win_rate = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        return ScaleByClippedCurvatureState(count, mu, nu, win_rate)

    def average(updates, state, params, curvature):
        """Return nu and whether it is new."""
        if curvature is None:
            return state.nu, False
        if not callable(curvature):
            return _averaged(name, b2, updates, state.nu, curvature), True
        _leafwise.require_params(name, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        due = (state.count % every == 0) & (state.count >= (every if official else 0))
        refresh = lambda: _averaged(name, b2, updates, state.nu, curvature(params, key))  # noqa: E731
        return jax.lax.cond(due, refresh, lambda: state.nu), due

    def divisor(nu):
        return jnp.maximum(gamma * nu, 0) + least if official else jnp.maximum(gamma * nu, least)

    def leaf(path, g, mu, p, nu):
        del path, p
        good = jnp.isfinite(g)
        mu = jnp.where(good, b1 * mu + (1 - b1) * g, mu)
        return jnp.where(good, jnp.clip(mu / divisor(nu), -1, 1), jnp.nan), mu

    def update(updates, state, params=None, **extra_args):
        curvature = _leafwise.read(name, extra_args, "curvature")
        nu, new = average(updates, state, params, curvature)
        directions, mu = _leafwise.leafwise(name, leaf, updates, (state.mu,), others=(nu,))
        measure = lambda: _share(updates, mu, jax.tree.map(divisor, nu))  # noqa: E731
        # From mu and nu, at refreshes only: a sum over the directions would have them written out,
        # 8 bytes per parameter and step. The dead measurement, which XLA drops, gives both branches
        # one type inside shard_map.
        keep = lambda: jnp.where(False, measure(), state.win_rate)  # noqa: E731
        win_rate = jax.lax.cond(new, measure, keep)
        count = _leafwise.increment(state.count)
        return directions, ScaleByClippedCurvatureState(count, mu, nu, win_rate)

    return optax.GradientTransformationExtraArgs(init, update)
