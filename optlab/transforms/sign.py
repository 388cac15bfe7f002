"""Sign momentum and the Lion-K family: the gradient of a convex function in place of the step."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms import kappa as _kappa
from optlab.transforms.momentum import interpolate_momentum


@_checks.explain_calls
def apply_kappa(kappa: _kappa.Kappa | str = "l1") -> optax.GradientTransformationExtraArgs:
    """Replace every leaf by a (sub)gradient of the convex function kappa at it.

    Norms are taken leaf by leaf; the Lion-K paper writes kappa of one long vector.

    Args:
      kappa: a name of `optlab.kappa.by_name` ("l1", "l2", "quadratic", "nuclear"), what a factory
        of `optlab.kappa` returns (`huber(0.1)`, `lp(1.5)`, `dead_zone(1e-3)`, `top_k(64)`,
        `smooth_sign(0.1)`), or any function of one leaf. (static)

    Returns:
      A stateless transformation; the output norm is kappa's own: entries in [-1, 1] for "l1",
      smooth_sign, huber and dead_zone, norm 1 for "l2", dual norm 1 for lp.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.apply_kappa("l1")
      >>> u, _ = tx.update(jnp.array([-3.0, 0.0, 0.5]), tx.init(None))
      >>> print(u)
      [-1.  0.  1.]
    """
    gradient = _kappa.resolve("apply_kappa", kappa)

    def leaf(path, u, p):
        del p
        new = gradient(u)
        if getattr(new, "shape", None) != u.shape:
            raise TypeError(
                f"apply_kappa: kappa must keep the shape {u.shape} of leaf '{path}', got {new!r}. "
                "Give a function of one leaf; what makes one is called first: kappa.huber(0.1)."
            )
        return new

    return _leafwise.stateless("apply_kappa", leaf)


@_checks.explain_calls
def scale_by_lion_k(
    kappa: _kappa.Kappa | str = "l1",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    *,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Emit a (sub)gradient of kappa at Lion's momentum.

    u = dkappa(b1 mu + (1 - b1) g),  mu <- b2 mu + (1 - b2) g.

    Args:
      kappa: see `apply_kappa`. (static)
      b1: rate of the interpolation, in [0, 1).
      b2: rate of the average, in [0, 1).
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      A transformation; output norm as in `apply_kappa`.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_lion_k(optlab.kappa.huber(0.5))
      >>> u, _ = tx.update(jnp.array([1.0, 100.0]), tx.init(jnp.zeros(2)))
      >>> print(u)
      [0.2 1. ]

    References:
      Chen et al., Lion secretly solves constrained optimization, arXiv:2310.05898, 2023.
    """
    return optax.chain(interpolate_momentum(b1, b2, mu_dtype=mu_dtype), apply_kappa(kappa))


@_checks.explain_calls
def scale_by_sign_momentum(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.99, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Emit the sign of Lion's momentum; with b1 = b2, Signum's.

    u = sign(b1 mu + (1 - b1) g),  mu <- b2 mu + (1 - b2) g,  sign(0) = 0.

    Args:
      b1: rate of the interpolation, in [0, 1).
      b2: rate of the average, in [0, 1).
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      A transformation with entries -1, 0 or 1.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter, half of Adam's.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_sign_momentum()
      >>> u, _ = tx.update(jnp.array([-2.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> print(u)
      [-1.  0.]
    """
    return scale_by_lion_k("l1", b1, b2, mu_dtype=mu_dtype)
