"""Batches that grow when the gradient's noise asks for it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optlab import _checks
from optlab.controllers._host import Resumable
from optlab.linalg import norms

_TESTS = ("norm", "inner", "augmented")
_MOST = 2**30


class NormTest(NamedTuple):
    """What `norm_test` found: scalars."""

    next_batch: jax.Array  # int32: the batch that would pass, never below this one
    passes: jax.Array  # bool: whether this batch is large enough
    variance: jax.Array  # float: of one example's gradient, summed over coordinates
    squared_norm: jax.Array  # float: of the mean gradient


@_checks.explain_calls
def norm_test(
    grads: Any,
    eta: ArrayLike = 0.1,
    *,
    test: str = "norm",
    theta: ArrayLike = 0.9,
    nu: ArrayLike = 5.84,
    group_size: int = 1,
    max_batch: int = _MOST,
    official: bool = False,
) -> NormTest:
    """Test whether the batch behind a mean gradient is large enough, and say which would be.

    g_i are the gradients of b examples, g their mean, V the variances (ddof 1) of coordinates:
      norm       sum V <= b eta^2 |g|^2, else the batch sum V/(eta^2 |g|^2)
      inner      Var <g_i, g> <= b theta^2 |g|^4
      augmented  inner, and the variance of what of g_i is orthogonal to g <= b nu^2 |g|^2
    Works under `jax.jit`; its result is what `BatchGrowth.observe` takes.

    Args:
      grads: a tree whose leaves have a leading axis of at least 2 examples, as `jax.vmap` of
        `jax.grad` gives, or of groups of examples.
      eta: threshold of "norm", > 0; 0.1 to 0.5 in the paper's code.
      test: "norm", "inner" or "augmented". (static)
      theta: threshold of "inner", > 0; default of Bollapragada et al. as we remember it.
      nu: threshold of "augmented", > 0; the same.
      group_size: examples that each gradient is the mean of: m times the variance of means
        estimates that of one example, with no gradient of a single one at hand. (static)
      max_batch: what `next_batch` is at most, and what it is for a mean gradient of zero. (static)
      official: sum the variances of inner products leaf by leaf, as the authors' code does, in
        place of that of the whole one. (static)

    Returns:
      A `NormTest`. Gradients that are not finite leave the batch as it is, and pass.

    Raises:
      ValueError: leaves without a common leading axis of at least 2: one example has no variance.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> found = optlab.norm_test({"w": jnp.array([[1.0], [2.0], [3.0]])}, eta=0.25)
      >>> print(found.next_batch, found.passes)
      4 False

    Deviations:
      From micro-batches the authors' code adds the mean variance within them to that of their
      means; `group_size` needs the means alone.

    References:
      Lau et al., AdAdaGrad: adaptive batch size schemes for adaptive gradient methods,
      arXiv:2402.11215, 2024. Bollapragada, Byrd and Nocedal, Adaptive sampling strategies for
      stochastic optimization, arXiv:1710.11258, 2017.
    """
    name = "norm_test"
    _checks.check_positive(name, eta=eta, theta=theta, nu=nu)
    _checks.check_choice(name, "test", test, _TESTS)
    _checks.check_steps(name, 1, group_size=group_size, max_batch=max_batch)
    rows, scale = _rows(name, grads)
    variance, inner, squared = _moments(rows, group_size, official)
    # What of g_i is along g has the variance inner/|g|^2; the rest is orthogonal.
    across = jnp.maximum(variance - norms.safe_divide(inner, squared), 0)
    needs = {
        "norm": norms.safe_divide(variance, squared * eta**2, jnp.inf),
        "inner": norms.safe_divide(inner, (squared * theta) ** 2, jnp.inf),
    }
    orthogonal = norms.safe_divide(across, squared * nu**2, jnp.inf)
    needs["augmented"] = jnp.maximum(needs["inner"], orthogonal)
    batch = len(rows[0]) * group_size
    needed = jnp.where(jnp.isnan(needs[test]), batch, needs[test])
    wanted = jnp.clip(jnp.ceil(needed), min(batch, max_batch), max_batch).astype(jnp.int32)
    return NormTest(wanted, needed <= batch, variance * scale**2, squared * scale**2)


def _moments(rows: list[jax.Array], group_size: int, official: bool) -> tuple[jax.Array, ...]:
    """Return sum V, Var <g_i, g> and |g|^2."""
    means = [jnp.mean(x, 0) for x in rows]
    centred = [x - m[None] for x, m in zip(rows, means, strict=True)]
    spread = group_size / (len(rows[0]) - 1)
    variance = spread * _sum(jnp.sum(d * d) for d in centred)
    along = [
        jnp.einsum("ik,k->i", d, m, precision="highest")
        for d, m in zip(centred, means, strict=True)
    ]
    parts = along if official else [_sum(along)]
    inner = spread * _sum(jnp.sum(a * a) for a in parts)
    return variance, inner, _sum(jnp.sum(m * m) for m in means)


def _sum(values: Any) -> jax.Array:
    return jnp.asarray(sum(values))


def _rows(name: str, grads: Any) -> tuple[list[jax.Array], jax.Array]:
    """Return leaves as (examples, coordinates), the largest entry 1, and what that entry was."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(grads)]
    counts = {x.shape[0] if x.ndim else 0 for x in leaves}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{name}: grads must have one leading axis of 2 examples or more in every leaf, got "
            f"lengths {sorted(counts)}. Use jax.vmap(jax.grad(loss), (None, 0))."
        )
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]
    # Tests are quotients of the same power: squares of 1e30 need not leave float32.
    scale = jnp.max(jnp.stack([norms.largest(x) for x in wide]))
    safe = jnp.where(scale > 0, scale, 1)
    return [x.reshape(len(x), -1) / safe for x in wide], safe


class BatchGrowth(Resumable):
    """Grow the batch to what `norm_test` asks for; never shrink it.

    A batch of another size is another program: the step compiles once for every size. `doubling`
    keeps to init_batch 2^k, so to log2(max_batch/init_batch) programs. The paper leaves the
    learning rate as it is; to change it with the batch, see `optlab.scale_rate_to_batch`.

    Args:
      init_batch: first batch size, >= 1.
      max_batch: last one; there is nothing to test from there on.
      multiple: batch sizes are multiples of it, such as the number of devices.
      every: test every so many steps.
      doubling: round up to the next init_batch 2^k.

    Attributes:
      batch_size: the size to use now.

    Raises:
      ValueError: a first or last batch that is no multiple, or a last below the first.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> growth = optlab.BatchGrowth(4, 64, multiple=4)
      >>> noisy = {"w": jnp.array([[1.0], [5.0], [2.0], [0.0]])}
      >>> if growth.due(0):
      ...     grew = growth.observe(optlab.norm_test(noisy, eta=0.5))
      >>> print(growth.batch_size)
      8
    """

    _saved = ("batch_size",)

    def __init__(
        self,
        init_batch: int,
        max_batch: int,
        *,
        multiple: int = 1,
        every: int = 1,
        doubling: bool = False,
    ):
        name = "BatchGrowth"
        sizes = {"init_batch": init_batch, "max_batch": max_batch}
        _checks.check_steps(name, 1, **sizes, multiple=multiple, every=every)
        for argument, size in sizes.items():
            if size % multiple or size < init_batch:
                must = f"a multiple of {multiple}, and not below init_batch"
                raise _checks.refusal(ValueError, name, argument, must, size)
        self.init_batch, self.max_batch, self.multiple = init_batch, max_batch, multiple
        self.every, self.doubling = every, doubling
        self.batch_size = init_batch

    def due(self, step: int) -> bool:
        """Tell whether to test at this step."""
        return self.batch_size < self.max_batch and step % self.every == 0

    def observe(self, found: NormTest) -> bool:
        """Take what a test found and tell whether the batch grew."""
        before = self.batch_size
        wanted = self._rounded(int(found.next_batch))
        self.batch_size = min(max(before, wanted), self.max_batch)
        return self.batch_size > before

    def _rounded(self, size: int) -> int:
        if self.doubling:
            return self.init_batch * 2 ** (math.ceil(size / self.init_batch) - 1).bit_length()
        return self.multiple * math.ceil(size / self.multiple)
