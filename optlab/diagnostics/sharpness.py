"""Curvature of a loss along training: its Hessian's largest eigenvalue, spectrum and trace."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from optlab import _checks, _progress
from optlab.diagnostics import products
from optlab.distributed.shardings import partitioned
from optlab.linalg import lanczos
from optlab.linalg.norms import safe_divide


class Trace(NamedTuple):
    """What `hessian_trace` found."""

    value: jax.Array  # float32, ()
    error: jax.Array  # float32, (): standard error of the mean; 0 where the trace is exact
    samples: jax.Array  # float32, (samples,): z^T H z each; or the n diagonal entries


_STATIC = ("loss", "hvp", "ticks")


@partial(jax.jit, static_argnames=(*_STATIC, "steps"))
def _ritz(loss, params, batch, preconditioner, key, *, steps, hvp, ticks):
    def run(params, batch, preconditioner, key):
        matvec, flat = products.flat_hessian(loss, params, batch, preconditioner, hvp, ticks)
        start = jax.random.normal(key, flat.shape, flat.dtype)
        return lanczos.ritz(matvec, start, steps)

    with products.exact():
        places = products.replicated(lanczos.Ritz)
        return partitioned(run, places, params, batch, preconditioner, key)


@_checks.explain_calls
def hessian_spectrum(
    loss: products.Loss,
    params: Any,
    *batch: Any,
    steps: int = 32,
    preconditioner: Any = None,
    hvp: products.Hvp = "forward_over_reverse",
    key: jax.Array | None = None,
    progress: bool = False,
) -> lanczos.Ritz:
    """Estimate the spectrum of the loss's Hessian by Lanczos from a random vector.

    H = d^2 loss / d params^2, or P^-1/2 H P^-1/2 with a preconditioner. One Hessian-vector product
    per step, of two gradients' time. The largest and smallest values converge first: 32 steps found
    the largest to 2e-4 throughout a network's training (`benchmarks.edge_of_stability`, 6,000
    parameters), 20 steps to 1e-3. Weights beside values are a sample of the spectral density;
    average densities over several keys.

    Args:
      loss: `loss(params, *batch)`, a scalar; of any Flax model, in evaluation mode. Pass the same
        function again to reuse its compiled program.
      params: Linen's parameters, an NNX state of `nnx.split(model, nnx.Param, ...)`, any tree of
        floating arrays. Computed in float32 where they are narrower.
      *batch: what else the loss takes: inputs and labels, the rest of an NNX model.
      steps: of Lanczos, >= 1; at most as many as there are parameters are taken. (static)
      preconditioner: a tree like `params` of positive entries, the diagonal P: for Adam
        sqrt(nu_hat) + eps. None for the Hessian itself.
      hvp: reverse_over_reverse if the gradient has no forward derivative. (static)
      key: of the start; `jax.random.key(0)` by default.
      progress: show a bar. (static)

    Returns:
      Ritz: values, rising; weights; errors, an eigenvalue lies within this of each value. float32,
      (steps,) each. Needs memory for `steps` copies of the parameters.

    Raises:
      ImportError: matfree is not installed.
      TypeError: a leaf that is no floating array, by its path.
      ValueError: the loss returns no scalar; a preconditioner of other leaves, by path.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import hessian_spectrum
      >>> loss = lambda p, a: jnp.sum(a * p**2) / 2
      >>> found = hessian_spectrum(loss, jnp.ones(3), jnp.array([-1.0, 2.0, 5.0]))
      >>> print(found.values.round(3))
      [-1.  2.  5.]

    Deviations:
      PyHessian's density takes first rows of eigenvectors of an unsymmetric solver; here `eigh`.

    References:
      Ghorbani et al., "An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density", arXiv:1901.10159, 2019; Yao et al., "PyHessian", arXiv:1912.07145, 2019.
    """
    name = "hessian_spectrum"
    return _spectrum(name, loss, params, batch, steps, preconditioner, hvp, key, progress)


def _spectrum(name, loss, params, batch, steps, preconditioner, hvp, key, progress):
    products.check(name, loss, params, hvp)
    if preconditioner is not None:
        products.check_like(name, "preconditioner", preconditioner, params)
    _checks.check_steps(name, 1, steps=steps)
    key = jax.random.key(0) if key is None else key
    options = {"steps": steps, "hvp": hvp, "ticks": progress}
    total = min(steps, sum(leaf.size for leaf in jax.tree.leaves(params)))
    with _progress.bar(progress, name, total):
        run = partial(_ritz, loss, params, batch, preconditioner, key, **options)
        return products.explained(name, hvp, run)


@_checks.explain_calls
def sharpness(
    loss: products.Loss,
    params: Any,
    *batch: Any,
    steps: int = 32,
    preconditioner: Any = None,
    hvp: products.Hvp = "forward_over_reverse",
    key: jax.Array | None = None,
    progress: bool = False,
) -> jax.Array:
    """Estimate the largest eigenvalue of the loss's Hessian, by algebraic value.

    lambda_max(H), or lambda_max(P^-1/2 H P^-1/2) with a preconditioner. Gradient descent is stable
    where it stays under `stability_limit`. The last value of `hessian_spectrum`, which has all
    values and the arguments' meaning; power iteration would find the largest magnitude instead.

    Args:
      loss: `loss(params, *batch)`, a scalar.
      params: a tree of floating arrays.
      *batch: what else the loss takes.
      steps: of Lanczos, >= 1. (static)
      preconditioner: the diagonal P as a tree like `params`, or None.
      hvp: reverse_over_reverse if the gradient has no forward derivative. (static)
      key: of the start; `jax.random.key(0)` by default.
      progress: show a bar. (static)

    Returns:
      float32, (): a lower bound up to rounding, since Ritz values lie inside the spectrum.

    Raises:
      ImportError, TypeError, ValueError: as `hessian_spectrum`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import sharpness
      >>> print(sharpness(lambda p: p @ p - 5 * p[0] ** 2, jnp.ones(3)).round(4))
      2.0

    Deviations:
      None.

    References:
      Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
      arXiv:2103.00065, 2021; preconditioned: arXiv:2207.14484, 2022.
    """
    found = _spectrum("sharpness", loss, params, batch, steps, preconditioner, hvp, key, progress)
    return found.values[-1]


@partial(jax.jit, static_argnames=(*_STATIC, "samples"))
def _quadratic_forms(loss, params, batch, key, *, samples, hvp, ticks):
    def run(params, batch, key):
        matvec, flat = products.flat_hessian(loss, params, batch, None, hvp, ticks)
        if samples >= flat.size:
            return jax.lax.map(
                lambda i: matvec(jnp.zeros_like(flat).at[i].set(1))[i], jnp.arange(flat.size)
            )

        def sample(key):
            z = jax.random.rademacher(key, flat.shape, flat.dtype)
            return z @ matvec(z)

        return jax.lax.map(sample, jax.random.split(key, samples))

    with products.exact():
        return partitioned(run, PartitionSpec(), params, batch, key)


@_checks.explain_calls
def hessian_trace(
    loss: products.Loss,
    params: Any,
    *batch: Any,
    samples: int = 64,
    hvp: products.Hvp = "forward_over_reverse",
    key: jax.Array | None = None,
    progress: bool = False,
) -> Trace:
    """Estimate the trace of the loss's Hessian by Hutchinson's method.

    mean of z^T H z over `samples` vectors z of random signs. With as many samples as parameters or
    more, the n diagonal entries are added up instead, which is exact. Arguments as in
    `hessian_spectrum`.

    Args:
      loss: `loss(params, *batch)`, a scalar.
      params: a tree of floating arrays.
      *batch: what else the loss takes.
      samples: how many Hessian-vector products, >= 2. (static)
      hvp: reverse_over_reverse if the gradient has no forward derivative. (static)
      key: of the signs; `jax.random.key(0)` by default.
      progress: show a bar. (static)

    Returns:
      Trace: value; error, the standard error, which falls with sqrt(samples); samples.

    Raises:
      TypeError: a leaf that is no floating array, by its path.
      ValueError: the loss returns no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import hessian_trace
      >>> print(hessian_trace(lambda p: jnp.sum(p**4), jnp.array([1.0, 2.0])).value)
      60.0

    Deviations:
      PyHessian stops when the running mean changes little, which is biased: the count is fixed.

    References:
      Hutchinson, 1990; Yao et al., arXiv:1912.07145, 2019.
    """
    name = "hessian_trace"
    products.check(name, loss, params, hvp)
    _checks.check_steps(name, 2, samples=samples)
    key = jax.random.key(0) if key is None else key
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with _progress.bar(progress, name, min(samples, count)):
        options = {"samples": min(samples, count), "hvp": hvp, "ticks": progress}
        run = partial(_quadratic_forms, loss, params, batch, key, **options)
        forms = products.explained(name, hvp, run)
        if samples >= count:
            return Trace(jnp.sum(forms), jnp.zeros_like(forms[0]), forms)
        return Trace(jnp.mean(forms), jnp.std(forms, ddof=1) / samples**0.5, forms)


@partial(jax.jit, static_argnames=_STATIC)
def _along_gradient(loss, params, batch, *, hvp, ticks):
    def run(params, batch):
        matvec, flat = products.flat_hessian(loss, params, batch, None, hvp, ticks)
        unflat = ravel_pytree(products.widened(params))[1]
        g = jax.grad(lambda w: products.scalar_loss(loss, batch)(unflat(w)))(flat)
        g = g / jnp.where(jnp.any(g != 0), jnp.max(jnp.abs(g)), 1)
        return safe_divide(g @ matvec(g), g @ g)

    with products.exact():
        return partitioned(run, PartitionSpec(), params, batch)


@_checks.explain_calls
def gradient_sharpness(
    loss: products.Loss, params: Any, *batch: Any, hvp: products.Hvp = "forward_over_reverse"
) -> jax.Array:
    """Return the curvature along the gradient, g^T H g / |g|^2, both of the same batch.

    Its mean over mini-batches is the batch sharpness, which for SGD hovers at 2 / learning rate as
    the sharpness does for full batches. One Hessian-vector product.

    Args:
      loss: `loss(params, *batch)`, a scalar.
      params: a tree of floating arrays.
      *batch: what else the loss takes: one mini-batch.
      hvp: reverse_over_reverse if the gradient has no forward derivative. (static)

    Returns:
      float32, (); 0 where the gradient is 0.

    Raises:
      TypeError, ValueError: as `hessian_trace`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import gradient_sharpness
      >>> print(gradient_sharpness(lambda p: p[0] ** 2, jnp.ones(2)))
      2.0

    Deviations:
      None.

    References:
      Andreyev and Beneventano, "Edge of Stochastic Stability", arXiv:2412.20553, 2024.
    """
    name = "gradient_sharpness"
    products.check(name, loss, params, hvp)
    run = partial(_along_gradient, loss, params, batch, hvp=hvp, ticks=False)
    return products.explained(name, hvp, run)
