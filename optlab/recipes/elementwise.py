"""Elementwise recipes beyond Adam: diffGrad, AdaBelief, AdaGrad-Norm."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms.adaptive import scale_by_belief, scale_by_friction
from optlab.transforms.decay import add_decay
from optlab.transforms.momentum import with_previous_updates
from optlab.transforms.tree_norm import scale_by_adagrad_norm


@_checks.explain_calls
def diffgrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    decoupled: bool = False,
    official: bool = False,
    amsgrad: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam, damped where the gradient has changed little since the last step (diffGrad).

    g <- g + weight_decay p;  xi = sigmoid(|g_{t-1} - g_t|), g_0 = 0;
    p <- p - lr xi mu_hat/(sqrt(nu_hat + eps_root) + eps), the moments Adam's.
    xi lies in [1/2, 1): where gradients are well below 1 this is close to Adam at half the rate, so
    compare with that too.

    Args:
      learning_rate: step size, >= 0, or a schedule; the paper's default is 1e-3.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under the root, >= 0.
      weight_decay: L2 term in the gradient, and in the one remembered, >= 0, or a schedule. Above 0
        and not decoupled, XLA on CPU copies the weights to remember it; else nothing is copied.
      weight_decay_mask: leaves that decay. (static)
      decoupled: decay the weights instead, p <- p - lr weight_decay p. (static)
      official: add eps to sqrt(nu) before the bias correction, as the authors' code does. (static)
      amsgrad: divide by the largest second moment so far, from a third-party port. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)

    Returns:
      An optimizer; updates lie between half of Adam's and Adam's.

    State:
      previous, mu, nu: the parameter's shape, nu in float32 or wider; 12 bytes per float32
        parameter, 16 with amsgrad.
      Where a step would make a parameter non-finite, 0 is remembered in place of its gradient.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.diffgrad(0.1)
      >>> p = jnp.zeros(2)
      >>> u, state = tx.update(jnp.array([1e-4, 100.0]), tx.init(p), p)
      >>> print(u.round(3))
      [-0.05 -0.1 ]

    Deviations:
      The first released code kept a reference to the gradient, so that xi was always 1/2; the
      authors' second version and this do not.

    References:
      Dubey et al., diffGrad: an optimization method for convolutional neural networks,
      arXiv:1909.11015, 2019, eq. 9-11; code: shivram1987/diffGrad at 73233ba, diffGrad_v2.py.
    """
    _checks.check_nonnegative(
        "diffgrad", learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    decay = add_decay("diffgrad", weight_decay, weight_decay_mask)
    friction = scale_by_friction(
        b1, b2, eps, eps_root=eps_root, official=official, amsgrad=amsgrad, mu_dtype=mu_dtype
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if decoupled:
        return with_previous_updates(optax.chain(friction, decay, rate), last=True)
    return optax.chain(decay, with_previous_updates(optax.chain(friction, rate), last=True))


@_checks.explain_calls
def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-16,
    eps_root: ArrayLike | None = None,
    accumulate_eps: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    decoupled: bool = True,
    amsgrad: bool = False,
    rectify: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Step far where the gradient is what its average predicted (AdaBelief).

    mu <- b1 mu + (1 - b1) g,   s <- b2 s + (1 - b2)(g - mu)^2 + eps_root,
    p <- p - lr (mu_hat/(sqrt(s_hat) + eps) + weight_decay p).
    eps plays the part of Adam's eps squared: 1e-16 for transformers and reinforcement learning,
    1e-8 for convolutional nets, 1e-12 for GANs. Do not clip gradients entry by entry before it: a
    constant entry is divided by sqrt(eps/(1 - b2)).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the average, in [0, 1).
      b2: rate of the deviation, in [0, 1).
      eps: added to the root, >= 0.
      eps_root: added under the root, >= 0; None for eps.
      accumulate_eps: add eps_root to the state at every step, as the authors' code and optax do;
        False adds it to s_hat anew. (static)
      weight_decay: decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      decoupled: decay the weights; False adds the L2 term to the gradient. (static)
      amsgrad: divide by the largest s so far; without effect under rectify, as in the authors'
        code. (static)
      rectify: RAdam's rectification, and a momentum step while it is undefined; the authors' code
        has it on by default, the paper has not. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      An optimizer; entries of about lr for noisy gradients, more for steady ones.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter, 12 with
      amsgrad.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.adabelief(0.1, eps=1e-8)
      >>> p = jnp.zeros(1)
      >>> u, state = tx.update(jnp.array([1.0]), tx.init(p), p)
      >>> print(f"{u[0]:.3f}")
      -0.111

    Deviations:
      None from the authors' code with rectify=True; the paper's algorithm has no rectification.
      `optax.adabelief(eps=e, eps_root=e)` gives the same numbers as eps=e here; with only eps set
      it does not.

    References:
      Zhuang et al., AdaBelief optimizer: adapting stepsizes by the belief in observed gradients,
      arXiv:2010.07468, 2020, Alg. 2; code: juntang-zhuang/Adabelief-Optimizer at 2855178.
    """
    _checks.check_nonnegative(
        "adabelief", learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    decay = add_decay("adabelief", weight_decay, weight_decay_mask)
    belief = scale_by_belief(
        b1,
        b2,
        eps,
        eps_root,
        accumulate_eps=accumulate_eps,
        amsgrad=amsgrad,
        rectify=rectify,
        mu_dtype=mu_dtype,
    )
    links = (belief, decay) if decoupled else (decay, belief)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


@_checks.explain_calls
def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b0: ArrayLike = 0.1,
    per_leaf: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent whose rate falls with the gradients it has seen (AdaGrad-Norm).

    b_t^2 = b_{t-1}^2 + |g_t|^2,   p <- p - lr (g/b_t + weight_decay p); one b for the whole tree.

    It converges for any lr and b0 on smooth problems: no rate to tune, and the gradient's
    direction.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b0: initial b, >= 0.
      per_leaf: one b for every leaf. (static)
      weight_decay: decoupled decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)

    Returns:
      An optimizer whose updates have norm at most lr, plus the decay.

    State:
      sum_of_squares: one float32, or one per leaf; 0 bytes per parameter.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.adagrad_norm(1.0, b0=4.0)
      >>> p = jnp.zeros(1)
      >>> u, state = tx.update(jnp.array([3.0]), tx.init(p), p)
      >>> print(u)
      [-0.6]

    Deviations:
      None; weight decay is an addition.

    References:
      Ward et al., AdaGrad stepsizes: sharp convergence over nonconvex landscapes, arXiv:1806.01811,
      2018, Alg. 1.
    """
    _checks.check_nonnegative(
        "adagrad_norm", learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    return optax.chain(
        scale_by_adagrad_norm(b0, per_leaf=per_leaf),
        add_decay("adagrad_norm", weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
