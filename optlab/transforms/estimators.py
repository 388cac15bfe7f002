"""Estimates of a curvature's diagonal: functions (params, key) -> tree for a training loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optlab import _checks, _leafwise

Estimator = Callable[[Any, jax.Array], Any]
"""`(params, key)` to a tree like params, in float32 or wider."""


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = jax.random.categorical(key, logits)
    return jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _bernoulli(key: jax.Array, logits: jax.Array) -> jax.Array:
    chance = jax.nn.sigmoid(logits)
    return chance - (jax.random.uniform(key, logits.shape, logits.dtype) < chance)


def _normal(key: jax.Array, means: jax.Array) -> jax.Array:
    return jax.random.normal(key, means.shape, means.dtype)


# The gradient of -log p(y | output) with respect to the output, y drawn from p.
_RESIDUALS = {"categorical": _categorical, "bernoulli": _bernoulli, "normal": _normal}
_PROBES = {"normal": jax.random.normal, "rademacher": jax.random.rademacher}


def _apart(tree: Any, axis_name: str | None) -> Any:
    """Return the tree as each device's own: gradients by it are not summed over the devices."""
    if axis_name is None:
        return tree
    zero = jax.lax.pcast(jnp.zeros([]), axis_name, to="varying")
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _summed(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_leafwise.widen(x.dtype))


def _mean(draw: Callable[[jax.Array], Any], params: Any, key: jax.Array, samples: int) -> Any:
    """Return the mean of `draw` at as many keys, one after another."""
    if samples == 1:
        return draw(key)
    add = lambda total, k: (jax.tree.map(jnp.add, total, draw(k)), None)  # noqa: E731
    zeros = jax.tree.map(lambda p: _leafwise.zeros_like(p, _leafwise.widen(p.dtype)), params)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(key, samples))
    return jax.tree.map(lambda x: x / samples, total)


@_checks.explain_calls
def gauss_newton_diagonal(
    predict: Callable[[Any], jax.Array],
    *,
    likelihood: str = "categorical",
    weights: jax.Array | None = None,
    samples: int = 1,
    axis_name: str | None = None,
) -> Estimator:
    """Estimate the diagonal of the Gauss-Newton matrix from labels drawn from the model itself.

    h = B g^2, where g is the gradient of the mean loss of the B outputs, each at a label drawn from
    its own predicted distribution (Gauss-Newton-Bartlett). The mean of h is the diagonal of
    1/B sum_i J_i^T S_i J_i, J_i the Jacobian of output i and S_i its loss's Hessian; h is never
    negative. One backward pass, no second derivatives.

    B counts rows of the output: the tokens of a batch, not its sequences. They must be independent
    given the inputs, as those of a language model are.

    Args:
      predict: params to logits (..., classes), or logits or means (..., outputs).
      likelihood: "categorical" (softmax), "bernoulli" (a sigmoid per output) or "normal" (half the
        squared error, summed over outputs).
      weights: of the rows, shape (...): 0 for padding. The loss is the weighted mean.
      samples: draws to average, >= 1.
      axis_name: mapped axis of `jax.shard_map` or `jax.pmap` over which the batch is split; every
        device draws its own labels and B is the whole batch's.

    Returns:
      A function (params, key) -> tree like params in float32 or wider, for `curvature=`.

    Example:
      >>> import jax, jax.numpy as jnp, optlab
      >>> x = jnp.array([[1.0, 2.0]])
      >>> estimate = optlab.gauss_newton_diagonal(lambda p: x * p[None], likelihood="bernoulli")
      >>> print(estimate(jnp.zeros(2), jax.random.key(0)))
      [0.25 1.  ]

    References:
      Liu et al., Sophia, arXiv:2305.14342, 2023, Alg. 2; code: Liuhong99/Sophia at a7e1572, where
      the factor B is left to the divisor.
    """
    name = "gauss_newton_diagonal"
    _checks.check_callable(name, predict=predict)
    _checks.check_choice(name, "likelihood", likelihood, tuple(_RESIDUALS))
    _checks.check_steps(name, 1, samples=samples)

    def cotangent(key, outputs):
        wide = _wide(outputs)
        rows = jnp.ones(outputs.shape[:-1], wide.dtype) if weights is None else weights
        if jnp.shape(rows) != outputs.shape[:-1]:
            raise ValueError(
                f"{name}: weights must be one per row of the outputs {outputs.shape}, got shape "
                f"{jnp.shape(rows)}. Give shape {outputs.shape[:-1]}."
            )
        batch = _summed(jnp.sum(rows), axis_name)
        # Roots: the square of g is to carry the weights once.
        scale = jnp.sqrt(rows) / batch
        # Zeros that lie as the outputs do give the residual their sharding.
        residual = _RESIDUALS[likelihood](key, wide) * scale[..., None] + jnp.zeros_like(wide)
        return residual.astype(outputs.dtype), batch

    def estimate(params, key):
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        outputs, pull = jax.vjp(predict, _apart(params, axis_name))

        def draw(key):
            residual, batch = cotangent(key, outputs)
            (g,) = pull(residual)
            return jax.tree.map(lambda g: batch * _wide(g) ** 2, _summed(g, axis_name))

        return _mean(draw, params, key, samples)

    return estimate


@_checks.explain_calls
def hutchinson_diagonal(
    loss: Callable[[Any], jax.Array],
    *,
    distribution: str = "normal",
    samples: int = 1,
    axis_name: str | None = None,
) -> Estimator:
    """Estimate the diagonal of a loss's Hessian from products with random vectors.

    h = z * (H z), z of independent entries with mean 0 and variance 1; the mean of h is diag(H).
    Entries may be negative. Forward over reverse: about two gradients' work and memory.

    Args:
      loss: params to a scalar; twice differentiable where it matters (a ReLU counts as flat).
      distribution: of z: "normal" as in the paper, or "rademacher", whose variance is smaller and
        zero for a diagonal H.
      samples: probes to average, >= 1.
      axis_name: mapped axis of `jax.shard_map` or `jax.pmap` over which the batch is split; `loss`
        is the mean over the device's own part. Give every device the same key.

    Returns:
      A function (params, key) -> tree like params in float32 or wider, for `curvature=`.

    Example:
      >>> import jax, jax.numpy as jnp, optlab
      >>> loss = lambda p: jnp.sum(jnp.array([1.0, 3.0]) * p**2)
      >>> estimate = optlab.hutchinson_diagonal(loss, distribution="rademacher")
      >>> print(estimate(jnp.zeros(2), jax.random.key(0)))
      [2. 6.]

    References:
      Liu et al., Sophia, arXiv:2305.14342, 2023, Alg. 1; Hutchinson, 1989.
    """
    name = "hutchinson_diagonal"
    _checks.check_callable(name, loss=loss)
    _checks.check_choice(name, "distribution", distribution, tuple(_PROBES))
    _checks.check_steps(name, 1, samples=samples)

    def probe(key, params):
        leaves, treedef = jax.tree.flatten(params)
        drawn = [
            # Zeros that lie as the parameter does give the probe its sharding.
            _PROBES[distribution](k, p.shape, p.dtype) + _leafwise.zeros_like(p)
            for k, p in zip(jax.random.split(key, max(len(leaves), 1)), leaves, strict=False)
        ]
        return jax.tree.unflatten(treedef, drawn)

    def estimate(params, key):
        own = _apart(params, axis_name)

        def draw(key):
            z = probe(key, params)
            along = z if axis_name is None else _apart(z, axis_name)
            product = jax.jvp(jax.grad(loss), (own,), (along,))[1]
            if axis_name is not None:
                product = jax.lax.pmean(product, axis_name)
            return jax.tree.map(lambda z, hz: _wide(z) * _wide(hz), z, product)

        return _mean(draw, params, key, samples)

    return estimate
