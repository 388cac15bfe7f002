"""Adam that clips its gradient by its own second moment (SPAM)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.linalg.spikes import exceeds
from optlab.transforms.momentum import debias
from optlab.transforms.spikes import count_clipped, finite_square


class ScaleBySpamState(NamedTuple):
    """State of `scale_by_spam`."""

    count: jax.Array  # int32, (): updates seen
    age: jax.Array  # int32, (): updates seen since the moments were zero
    rate: jax.Array  # float32, (): share of all entries that the last step clipped
    spikes: jax.Array  # int32, (): entries clipped so far; stays at the largest int32
    mu: optax.Updates  # first moment, in the parameter's shape
    nu: optax.Updates  # second moment, in the parameter's shape, float32 or wider

    def metrics(self) -> dict[str, jax.Array]:
        """Return the share clipped at the last step, and how many entries were so far."""
        return {"clip_rate": self.rate, "spikes": self.spikes}


@_checks.explain_calls
def scale_by_spam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    threshold: ArrayLike = 5000.0,
    grace: int = 0,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale by Adam's moments, entries clipped first where the second moment says spike.

    g <- sign(g) sqrt(threshold nu)  where g^2 > threshold nu > 0,
    mu <- b1 mu + (1 - b1) g,   nu <- b2 nu + (1 - b2) g^2,   u = mu/c1 / (sqrt(nu/c2) + eps),
    c_i = 1 - b_i^t. nu is the one of the step before, without bias correction.

    An entry that has never seen a gradient is not clipped. One whose square is not finite always
    is, also within `grace`: it becomes sign(g) sqrt(threshold nu), a NaN 0. No state is poisoned.

    Args:
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      threshold: ratio of a squared entry to its average that makes it a spike, > 0.
      grace: updates from zero moments on within which nothing finite is clipped, >= 0. (static)
      official: add eps to sqrt(nu) before the bias correction, as the authors' code does, and take
        one off the grace at the start. (static)
      mu_dtype: dtype of mu; None for the parameter's. (static)

    Returns:
      A transformation whose entries are about 1 in size, and always finite.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter. rate,
      spikes: in `metrics`.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_spam(threshold=1e3)
      >>> state = tx.init(jnp.zeros(2))
      >>> for spike in (1.0, 1e4):
      ...     _, state = tx.update(jnp.array([1.0, spike]), state)
      >>> print(state.mu.round(2), state.spikes)
      [0.19 0.19] 1

    References:
      Huang et al., SPAM, arXiv:2501.06842, 2025, Alg. 1; code: TianjinYellow/StableSPAM at 6a66da1.
    """
    name = "scale_by_spam"
    _checks.check_decay(name, b1=b1, b2=b2)
    _checks.check_nonnegative(name, eps=eps)
    _checks.check_positive(name, threshold=threshold)
    _checks.check_steps(name, 0, grace=grace)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def init(params):
        zero, rate = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        mu = _leafwise.init_slots(name, params, mu_dtype)
        nu = _leafwise.init_slots(name, params, _leafwise.widen)
        return ScaleBySpamState(zero, zero.copy(), rate, zero.copy(), mu, nu)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count, age = _leafwise.increment(state.count), _leafwise.increment(state.age)
        # The released code compares t mod T: 1 at the start, 0 right after a reset.
        active = age - (age < count) >= grace if official else age > grace
        over_c1, over_c2 = debias(b1, count), debias(b2, count)
        in_root, in_front = (1.0, over_c1 / jnp.sqrt(over_c2)) if official else (over_c2, over_c1)
        clipped = []

        def leaf(path, g, mu, nu, p):
            del path, p
            spike = exceeds(g * g, nu, threshold) & (active | ~finite_square(g))
            clipped.append(jnp.sum(spike, dtype=jnp.int32))
            # The product may overflow where nu does not. The root for mu alone: a clipped g that
            # both moments read would be stored, 108 bytes per parameter on CPU, not 68.
            level = jnp.minimum(threshold * nu, jnp.finfo(nu.dtype).max)
            sign = jnp.where(jnp.isnan(g), 0, jnp.sign(g))
            mu = b1 * mu + (1 - b1) * jnp.where(spike, sign * jnp.sqrt(level), g)
            nu = b2 * nu + (1 - b2) * jnp.where(spike, sign * sign * level, g * g)
            return in_front * mu / (jnp.sqrt(in_root * nu) + eps), mu, nu

        new, mu, nu = _leafwise.leafwise(name, leaf, updates, (state.mu, state.nu))
        rate, spikes = count_clipped(state.spikes, clipped, updates)
        return new, ScaleBySpamState(count, age, rate, spikes, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
