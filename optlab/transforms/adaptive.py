"""Second-moment scalings that optax lacks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms.momentum import correction, debias, with_previous_updates


class ScaleByMomentsState(NamedTuple):
    """State of `scale_by_moments`, `scale_by_belief` and `scale_by_friction`."""

    count: jax.Array  # int32, (): updates seen
    mu: optax.Updates  # first moment, in the parameter's shape
    nu: optax.Updates  # second moment, in the parameter's shape, float32 or wider


class ScaleByMaxMomentsState(NamedTuple):
    """The same with AMSGrad's maximum."""

    count: jax.Array  # int32, (): updates seen
    mu: optax.Updates  # first moment, in the parameter's shape
    nu: optax.Updates  # second moment, in the parameter's shape, float32 or wider
    nu_max: optax.Updates  # largest second moment so far, likewise


def _check_adam(name, b1, b2, mu_dtype, **nonnegative) -> None:
    _checks.check_decay(name, b1=b1, b2=b2)
    _checks.check_nonnegative(name, **nonnegative)
    _checks.check_dtype(name, mu_dtype=mu_dtype)


def _moments(name, make_leaf, mu_dtype, *, amsgrad=False, reads=()):
    state_type = ScaleByMaxMomentsState if amsgrad else ScaleByMomentsState
    # In bfloat16 0.999 nu is nu again: a second moment kept in it would never fall.
    dtypes = (mu_dtype, _leafwise.widen, *(_leafwise.widen,) * amsgrad)
    return _leafwise.stateful(name, state_type, dtypes, make_leaf, reads=reads)


def _lerp(decay: ArrayLike, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.add(decay * old, (1 - decay) * new)


@_checks.explain_calls
def scale_by_moments(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale by Adam's moments, in the two forms that `optax.scale_by_adam` does not have.

    mu <- b1 mu + (1 - b1) g,   nu <- b2 nu + (1 - b2) g^2,
    u = mu/c1 / (sqrt(nu/c2) + eps),   c_i = 1 - b_i^t with bias_correction, else 1.
    With nesterov, (b1 mu + (1 - b1) g)/c1 replaces mu/c1: one correction for both terms, as in
    AdamP's code, not NAdam's.

    Args:
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      bias_correction: divide by c_1 and c_2; without it this is LAMB's first code. (static)
      nesterov: look one step ahead. (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation whose entries are about 1 in size.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_moments()
      >>> u, _ = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> print(u)
      [1.]
    """
    name = "scale_by_moments"
    _check_adam(name, b1, b2, mu_dtype, eps=eps)

    def make_leaf(count):
        over_c1, over_c2 = (debias(b, count) if bias_correction else 1.0 for b in (b1, b2))

        def leaf(path, g, mu, nu, p):
            del path, p
            # ((1 - b2) g) g: where a wrapper sums g^2 too, as AdamP's, XLA on CPU would store g^2
            # for both.
            mu, nu = _lerp(b1, mu, g), b2 * nu + (1 - b2) * g * g
            ahead = _lerp(b1, mu, g) if nesterov else mu
            return over_c1 * ahead / (jnp.sqrt(over_c2 * nu) + eps), mu, nu

        return leaf

    return _moments(name, make_leaf, mu_dtype)


def rectification(b2: ArrayLike, count: jax.Array, *, threshold: float = 5.0):
    """Return RAdam's variance rectification r_t and whether the variance is tractable.

    N_inf = 2/(1 - b2) - 1,  N_t = N_inf - 2 t b2^t/(1 - b2^t);  where N_t >= threshold,
    r_t = sqrt((N_t - 4)(N_t - 2) N_inf / ((N_inf - 4)(N_inf - 2) N_t)), else 1 and False.
    """
    n_inf, remaining = 2 / (1 - b2) - 1, correction(b2, count)
    n = n_inf - 2 * count * (1 - remaining) / remaining
    tractable = n >= threshold
    safe = jnp.where(tractable, n, threshold)
    r2 = (safe - 4) * (safe - 2) * n_inf / ((n_inf - 4) * (n_inf - 2) * safe)
    # A b2 under 0.6 has N_inf < 4 and never becomes tractable; its r2 may be anything.
    return jnp.sqrt(jnp.where(tractable, r2, 1.0)), tractable


@_checks.explain_calls
def scale_by_belief(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-16,
    eps_root: ArrayLike | None = None,
    *,
    accumulate_eps: bool = True,
    amsgrad: bool = False,
    rectify: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale by the deviation of the gradient from its average (AdaBelief).

    mu <- b1 mu + (1 - b1) g,   s <- b2 s + (1 - b2)(g - mu)^2 + eps_root,
    u = mu/c1 / (sqrt(s/c2) + eps),   c_i = 1 - b_i^t.
    `optax.scale_by_belief` is this form; it has none of the keywords below.

    Args:
      b1: rate of the average, in [0, 1).
      b2: rate of the deviation, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under the root, >= 0; None for `eps`. A constant gradient is divided by
        sqrt(eps_root/(1 - b2)), so the default makes enormous steps on it.
      accumulate_eps: add eps_root to s itself, so that it gathers to eps_root/(1 - b2), as the
        authors' code does; False adds it to s/c2 at every step anew. (static)
      amsgrad: divide by the largest s so far; ignored by rectify. (static)
      rectify: RAdam's factor on s without c2, and u = mu/c1 while the variance is intractable.
        (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation whose entries are about 1 in size for a noisy gradient, larger for a steady
      one.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter, 12 with
      amsgrad.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_belief(eps=1e-8)
      >>> u, _ = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
      >>> print(f"{u[0]:.3f}")
      1.111
    """
    name = "scale_by_belief"
    eps_root = eps if eps_root is None else eps_root
    _check_adam(name, b1, b2, mu_dtype, eps=eps, eps_root=eps_root)

    def make_leaf(count):
        over_c1, over_c2 = debias(b1, count), debias(b2, count)
        r, tractable = rectification(b2, count)

        def direction(mu, s):
            if not accumulate_eps:
                s = s + eps_root / over_c2
            if not rectify:
                return over_c1 * mu / (jnp.sqrt(over_c2 * s) + eps)
            rectified = r / jnp.sqrt(over_c2) / (jnp.sqrt(s) + eps)
            return jnp.where(tractable, rectified, 1.0) * over_c1 * mu

        def leaf(path, g, mu, s, *rest):
            del path
            mu = _lerp(b1, mu, g)
            # eps_root inside the last sum: XLA computes x + eps twice, and then has to copy the old
            # s on CPU (100 % of its bytes, three times the time).
            s = b2 * s + ((1 - b2) * (g - mu) ** 2 + (eps_root if accumulate_eps else 0))
            if not amsgrad:
                return direction(mu, s), mu, s
            s_max = jnp.maximum(rest[0], s)
            return direction(mu, s if rectify else s_max), mu, s, s_max

        return leaf

    return _moments(name, make_leaf, mu_dtype, amsgrad=amsgrad)


@_checks.explain_calls
def scale_by_friction(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_root: ArrayLike = 0.0,
    official: bool = False,
    amsgrad: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale as `scale_by_diffgrad`, reading the last gradient from `previous_updates`.

    The same rule without its memory: put the whole chain into `with_previous_updates`, as the
    recipe `diffgrad` does, and the memory is overwritten in place.

    Args:
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under the root, >= 0.
      official: see `scale_by_diffgrad`. (static)
      amsgrad: divide by the largest second moment so far. (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation that needs the extra argument `previous_updates`.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter, 12 with
      amsgrad.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.with_previous_updates(optlab.scale_by_friction())
      >>> u, _ = tx.update(jnp.array([100.0]), tx.init(jnp.zeros(1)))
      >>> print(u.round(3))
      [1.]
    """
    name = "scale_by_friction"
    _check_adam(name, b1, b2, mu_dtype, eps=eps, eps_root=eps_root)

    def make_leaf(count):
        over_c1, over_c2 = debias(b1, count), debias(b2, count)
        # Official: eps beside the uncorrected root, the corrections in front of the quotient.
        in_root, in_front = (1.0, over_c1 / jnp.sqrt(over_c2)) if official else (over_c2, over_c1)

        def leaf(path, g, mu, nu, *rest):
            del path
            *nu_max, _, previous = rest
            mu, nu = _lerp(b1, mu, g), _lerp(b2, nu, g * g)
            nu_max = [jnp.maximum(nu, old) for old in nu_max]
            friction = jax.nn.sigmoid(jnp.abs(previous - g))
            root = jnp.sqrt(in_root * (nu_max or [nu])[0] + eps_root)
            return in_front * friction * mu / (root + eps), mu, nu, *nu_max

        return leaf

    return _moments(name, make_leaf, mu_dtype, amsgrad=amsgrad, reads=("previous_updates",))


@_checks.explain_calls
def scale_by_diffgrad(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_root: ArrayLike = 0.0,
    official: bool = False,
    amsgrad: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Damp Adam's step where the gradient has changed little since the last one (diffGrad).

    xi = sigmoid(|g_{t-1} - g_t|), g_0 = 0;   u = xi mu/c1 / (sqrt(nu/c2 + eps_root) + eps),
    mu, nu and c_i = 1 - b_i^t as in Adam. xi lies in [1/2, 1): gradients well below 1 give about
    Adam at half the rate.

    Args:
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under the root, >= 0.
      official: add eps to sqrt(nu) before the bias correction, as the authors' code does; the
        effective eps is then eps/sqrt(c2). (static)
      amsgrad: divide by the largest second moment so far, an extension of a third-party port.
        (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation whose entries are at most Adam's.

    State:
      previous, mu, nu: the parameter's shape, nu in float32 or wider; 12 bytes per float32
        parameter, 16 with amsgrad.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_diffgrad()
      >>> u, _ = tx.update(jnp.array([1e-3]), tx.init(jnp.zeros(1)))
      >>> print(f"{u[0]:.3f}")
      0.500
    """
    friction = scale_by_friction(
        b1, b2, eps, eps_root=eps_root, official=official, amsgrad=amsgrad, mu_dtype=mu_dtype
    )
    return with_previous_updates(friction)
