"""Adam in a subspace that turns a little at every step (LDAdam)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import everywhere, mesh_of
from optlab.transforms import projection
from optlab.transforms.found import found_metrics
from optlab.transforms.lens import Kept, Lens, check_kept, kept_before, zero_coordinates
from optlab.transforms.momentum import correction, debias
from optlab.transforms.projection import Rank, Reading
from optlab.transforms.refresh import refreshed
from optlab.transforms.subspace import Projector, power_projector
from optlab.transforms.turn import turner


class ScaleByLdadamState(NamedTuple):
    """State of `scale_by_ldadam`."""

    count: jax.Array  # int32, (): updates seen
    kept: tuple[Kept, ...]  # the bases, one stack per shape
    mu: optax.Updates  # in coordinates
    nu: optax.Updates  # in coordinates
    error: Any  # what the subspaces left out, in the parameters' shapes; None without feedback

    def metrics(self) -> dict[str, jax.Array]:
        """Return the mean share of the subspaces before in the last ones, and how many there were.

        One count per matrix and step.
        """
        return found_metrics(self.kept)


@_checks.explain_calls
def scale_by_ldadam(
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    rank: Rank = 0.25,
    rho: ArrayLike = 0.908,
    error_feedback: bool = True,
    projector: Projector | None = None,
    side: Any = "short",
    seed: int = 0,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam on coordinates in a basis that one power iteration renews at every step (LDAdam).

    G <- g + e;  B <- orthonormal(T T^T B_old), T = rho B_old mu_hat + (1 - rho) G;  C = B^T B_old;
    mu <- C mu,  nu <- |(C * C)(nu_hat - mu_hat^2) + (C mu_hat)^2| c_2, then Adam on R = B^T G;
    e <- G - B R + b1/(1 - b1) (B_old mu_old - B C mu_old),  u = B adam(R).

    Args:
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      rank: as in `in_low_rank`. (static)
      rho: weight of the momentum in what the basis follows, in [0, 1].
      error_feedback: keep what the subspace leaves out and add it to the next gradient. (static)
      projector: None for `power_projector(1, oversample=0)`. (static)
      side: as in `in_low_rank`. (static)
      seed: of the random start. (static)
      layout: which axes are inputs and outputs. (static)
      shardings: as in `in_low_rank`. (static)

    Returns:
      A transformation whose coordinates are about 1 in size. Other leaves get Adam.

    State:
      basis: a r numbers per matrix; mu, nu: r b numbers; error: the parameter's shape, 4 bytes per
      float32 parameter of a projected leaf.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_ldadam(rank=1)
      >>> p = {"kernel": jnp.ones((4, 8))}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.mu["kernel"].shape, u["kernel"][0, 0].round(3))
      (1, 8) 0.5

    References:
      Robert et al., LDAdam, arXiv:2410.16103, 2024, Alg. 1.
    """
    name = "scale_by_ldadam"
    _checks.check_decay(name, b1=b1, b2=b2)
    _checks.check_nonnegative(name, eps=eps)
    _checks.check_range(name, "a number in [0, 1]", lambda x: 0 <= x <= 1, rho=rho)
    projector = power_projector(1, oversample=0) if projector is None else projector
    projection.check(name, projector, rank, side, seed, layout)
    reader = partial(
        projection.read, name, rank=rank, side=side, layout=layout, shardings=shardings
    )

    def init(params):
        _leafwise.check_tree(name, params)
        reading, mesh = reader(params), mesh_of(params)
        before = kept_before(reading, projector, params)
        kept = jax.tree.map(lambda x: everywhere(x, mesh), before)
        low = zero_coordinates(reading, params)
        mu = jax.tree.map(_leafwise.zeros_like, low)
        nu = jax.tree.map(lambda x: _leafwise.zeros_like(x, _leafwise.widen(x.dtype)), low)
        error = _no_errors(reading, params) if error_feedback else None
        return ScaleByLdadamState(jnp.zeros([], jnp.int32), kept, mu, nu, error)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.check_tree(name, updates)
        if params is not None:
            _leafwise.aligned(name, updates, ("the parameters", params))
        reading = reader(updates if params is None else params)
        check_kept(name, reading, state.kept)
        before = Lens(reading, projector, state.kept)
        whole = _with_errors(reading, updates, state.error)
        momentum = before.raised(state.mu)
        targets = _targets(momentum, projection.projected(reading, whole), state.count, b1, rho)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        due = jnp.ones((reading.sides,), bool)
        now = refreshed(before, targets, due, key)
        mu, nu = _turned(now, before, state, b1, b2)
        low = now.lower(whole)
        count = _leafwise.increment(state.count)
        out, new_mu, new_nu = _adam(name, low, mu, nu, count, b1, b2, eps)
        error = state.error
        if error_feedback:
            lost = momentum, now.raised(mu)
            error = _errors(reading, error, whole, now.raised(low), lost, b1)
        raised = projection.with_projected(reading, out, now.raised(out), updates)
        return raised, ScaleByLdadamState(count, now.kept, new_mu, new_nu, error)

    return optax.GradientTransformationExtraArgs(init, update)


def _no_errors(reading: Reading, params: Any) -> Any:
    """Return zeros for projected leaves only."""
    zeros = [_leafwise.zeros_like(p) for p in projection.projected(reading, params)]
    return projection.only_projected(reading, params, zeros)


def _with_errors(reading: Reading, updates: Any, error: Any) -> Any:
    """Return the gradients with what was left out before added to them."""
    if error is None:
        projection.checked(reading, updates)
        return updates
    gs, errors = projection.checked(reading, updates), projection.projected(reading, error)
    sums = [g if g is None else (g + e).astype(g.dtype) for g, e in zip(gs, errors, strict=True)]
    return projection.with_projected(reading, updates, sums, updates)


def _targets(momentum, gs, count, b1, rho) -> list[Any]:
    """Return rho mu_hat + (1 - rho) G for every projected leaf; G at the first step."""
    later = count > 0
    share = jnp.where(later, rho * debias(b1, jnp.maximum(count, 1)), 0)
    rest = jnp.where(later, 1 - rho, 1)
    pairs = zip(momentum, gs, strict=True)
    return [g if g is None or m is None else share * m + rest * g for m, g in pairs]


def _turned(now: Lens, before: Lens, state: ScaleByLdadamState, b1, b2) -> tuple[Any, Any]:
    """Return both moments in the new basis: the second by the variance about the first."""
    if not now.reading.lows:
        return state.mu, state.nu
    into, get = turner(now, before.kept), partial(projection.projected, now.reading)
    steps = jnp.maximum(state.count, 1)
    over_c1, c2 = debias(b1, steps), correction(b2, steps)
    square = lambda m: _squared(over_c1 * m.astype(_leafwise.widen(m.dtype)))  # noqa: E731
    pairs = list(zip(get(state.mu), get(state.nu), strict=True))
    variances = [v / c2 - square(m) for m, v in pairs]
    mu = into(state.mu)
    turned = get(into(projection.with_projected(now.reading, state.nu, variances), squares=True))
    nu = [
        (c2 * jnp.abs(v + square(m))).astype(old.dtype)
        for m, v, (_, old) in zip(get(mu), turned, pairs, strict=True)
    ]
    return mu, projection.with_projected(now.reading, state.nu, nu)


def _squared(x: jax.Array) -> jax.Array:
    """Return x^2, finite: differences of squares are taken."""
    return jnp.minimum(x * x, jnp.finfo(x.dtype).max / 8)


def _adam(name, low, mu, nu, count, b1, b2, eps) -> tuple[Any, Any, Any]:
    over_c1, over_c2 = debias(b1, count), debias(b2, count)

    def leaf(path, g, mu, nu, p):
        del path, p
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * _squared(g)
        return over_c1 * mu / (jnp.sqrt(over_c2 * nu) + eps), mu, nu

    return _leafwise.leafwise(name, leaf, low, (mu, nu))


def _errors(reading: Reading, error: Any, whole: Any, inside: list, lost: tuple, b1) -> Any:
    """Return G - B R, and what the momentum lost when its basis turned, seen over all steps."""
    columns = zip(
        projection.projected(reading, error),
        projection.projected(reading, whole),
        inside,
        *lost,
        strict=True,
    )
    new = [
        e if g is None else ((g - r) + b1 / (1 - b1) * (m - turned)).astype(e.dtype)
        for e, g, r, m, turned in columns
    ]
    return projection.with_projected(reading, error, new)
