"""Sign momentum: Lion, Lion-K, Signum."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms.decay import add_decay
from optlab.transforms.kappa import Kappa
from optlab.transforms.sign import apply_kappa, scale_by_lion_k


def _finish(
    name: str,
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: _leafwise.Mask,
) -> optax.GradientTransformationExtraArgs:
    _checks.check_nonnegative(
        name, learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    return optax.chain(
        direction,
        add_decay(name, weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@_checks.explain_calls
def lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Step by the sign of an interpolated momentum (Lion).

    u = sign(b1 mu + (1 - b1) g),   mu <- b2 mu + (1 - b2) g,   p <- p - lr (u + weight_decay p).
    Every entry moves by lr: take a rate 3 to 10 times below AdamW's and a decay as many times
    above. For language models the paper uses b1 = 0.95, b2 = 0.98.

    Args:
      learning_rate: step size, >= 0, or a schedule; the paper's default is 1e-4.
      b1: rate of the interpolation, in [0, 1).
      b2: rate of the average, in [0, 1).
      weight_decay: decoupled decay, >= 0, or a schedule. For a decay that follows the rate's
        shape but not its peak, as in lion-pytorch's decoupled form, give weight_decay/peak.
      weight_decay_mask: leaves that decay: a bool tree or prefix, or a function of params. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      An optimizer whose updates have entries of size lr, plus the decay.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter, half of Adam's.

    Raises:
      ValueError: a rate outside its range.
      TypeError: a keyword or dtype that does not exist.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.lion(0.1)
      >>> p = jnp.array([1.0, -1.0])
      >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(p), p)
      >>> print(optax.apply_updates(p, u))
      [ 0.9 -0.9]

    Deviations:
      The default decay is 0, as in the paper; `optax.lion` has 1e-3. Otherwise the same numbers up
      to rounding: u is computed from the new average, see `interpolate_momentum`.

    References:
      Chen et al., Symbolic discovery of optimization algorithms, arXiv:2302.06675, 2023, Alg. 2;
      code: google/automl at 6a54c87.
    """
    return _finish(
        "lion",
        scale_by_lion_k("l1", b1, b2, mu_dtype=mu_dtype),
        learning_rate,
        weight_decay,
        weight_decay_mask,
    )


@_checks.explain_calls
def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    *,
    kappa: Kappa | str = "l1",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Step by the gradient of a convex function at Lion's momentum (Lion-K).

    u = dkappa(b1 mu + (1 - b1) g),   mu <- b2 mu + (1 - b2) g,   p <- p - lr (u + weight_decay p).
    With decay w it minimizes f(p) + kappa*(w p)/w, kappa* the conjugate: "l1" (Lion) holds
    |p|_inf <= 1/w, "l2" holds |p|_2 <= 1/w, `kappa.lp(p)` holds |p|_q <= 1/w.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      kappa: a name or function, see `apply_kappa`; norms are taken per leaf. (static)
      b1: rate of the interpolation, in [0, 1).
      b2: rate of the average, in [0, 1).
      weight_decay: decoupled decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      An optimizer; the output norm is kappa's own, times lr.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter.

    Raises:
      ValueError: an unknown kappa, with the nearest name, or a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.lion_k(1.0, kappa="l2", b1=0.0)
      >>> p = jnp.zeros(2)
      >>> u, state = tx.update(jnp.array([3.0, 4.0]), tx.init(p), p)
      >>> print(optax.apply_updates(p, u))
      [-0.6 -0.8]

    Deviations:
      The paper takes kappa of all parameters as one vector, here it is taken leaf by leaf. Of the
      table of kappas, l1 and lp were confirmed against the paper, the rest derived.

    References:
      Chen et al., Lion secretly solves constrained optimization: as Lyapunov predicts,
      arXiv:2310.05898, 2023, eq. 2. No code by the authors was found.
    """
    return _finish(
        "lion_k",
        scale_by_lion_k(kappa, b1, b2, mu_dtype=mu_dtype),
        learning_rate,
        weight_decay,
        weight_decay_mask,
    )


@_checks.explain_calls
def signum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Step by the sign of the averaged gradient (Signum; signSGD without momentum).

    mu <- momentum mu + (1 - momentum) g,   p <- p - lr (sign(mu) + weight_decay p).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      momentum: rate of the average, in [0, 1); the number 0 is signSGD and keeps no state.
      weight_decay: decoupled decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      An optimizer whose updates have entries of size lr, plus the decay.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter; none for momentum 0.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.signum(0.5)
      >>> p = jnp.zeros(2)
      >>> u, state = tx.update(jnp.array([3.0, -4.0]), tx.init(p), p)
      >>> print(optax.apply_updates(p, u))
      [-0.5  0.5]

    Deviations:
      None from the paper's Signum; `optax.signum` has no weight decay.

    References:
      Bernstein et al., signSGD: compressed optimisation for non-convex problems, arXiv:1802.04434,
      2018, Alg. 2.
    """
    _checks.check_decay("signum", momentum=momentum)
    no_memory = isinstance(momentum, int | float) and momentum == 0
    direction = (
        apply_kappa("l1")
        if no_memory
        else scale_by_lion_k("l1", momentum, momentum, mu_dtype=mu_dtype)
    )
    return _finish("signum", direction, learning_rate, weight_decay, weight_decay_mask)
