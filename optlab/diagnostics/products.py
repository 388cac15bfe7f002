"""Hessian-vector products of any loss on flat vectors, and what a loss must be."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from optlab import _checks, _leafwise, _progress
from optlab import layout as _layout

Loss = Callable[..., Any]
"""`loss(params, *batch) -> scalar`; the same function object at every call is compiled once."""
Hvp = Literal["forward_over_reverse", "reverse_over_reverse"]
_HVPS = ("forward_over_reverse", "reverse_over_reverse")

# Products of less than float32, a TPU's default, would end the Lanczos vectors' orthogonality.
exact = partial(jax.default_matmul_precision, "highest")


def replicated(kind: Any) -> Any:
    """Return a NamedTuple of placements everywhere, for `partitioned`."""
    return kind(*[PartitionSpec()] * len(kind._fields))


def check(name: str, loss: Loss, params: Any, hvp: str = _HVPS[0]) -> None:
    """Refuse by name what has no Hessian."""
    _checks.check_callable(name, loss=loss)
    if loss is None or not isinstance(loss, Hashable):
        fix = " A function or a method of a hashable object is compiled once."
        raise _checks.refusal(TypeError, name, "loss", "a hashable function", loss, fix)
    _checks.check_choice(name, "hvp", hvp, _HVPS)
    _leafwise.check_tree(name, params)
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{name}: params must have entries, got none. Pass the model's weights.")


def check_like(name: str, argument: str, tree: Any, params: Any) -> None:
    """Refuse a tree that has other leaves than params, or of other shapes, by path."""
    _leafwise.check_tree(name, tree)
    ours, theirs = _shapes(tree), _shapes(params)
    for path in [*theirs, *ours]:
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"{name}: {argument} must be a tree like params, got {ours.get(path, 'nothing')} "
                f"at '{path}', where params have {theirs.get(path, 'nothing')}. "
                "Take it from the optimizer that holds these params."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_layout.path_str(path): leaf.shape for path, leaf in flat}


def widened(params: Any) -> Any:
    """Return the tree in float32, or wider where it is."""
    return jax.tree.map(lambda p: p.astype(_leafwise.widen(p.dtype)), params)


def scalar_loss(loss: Loss, batch: tuple) -> Callable[[Any], jax.Array]:
    """Return the loss as a function of params alone, which refuses what is no scalar."""

    def of_params(params):
        value = loss(params, *batch)
        if getattr(value, "shape", None) != () and not isinstance(value, float):
            got = value if hasattr(value, "shape") else type(value).__name__
            must, fix = "a function that returns a scalar", " Return the mean over the batch alone."
            raise _checks.refusal(ValueError, "hessian", "loss", must, got, fix)
        return jnp.asarray(value, _leafwise.widen(jnp.result_type(value)))

    return of_params


def flat_hessian(
    loss: Loss, params: Any, batch: tuple, preconditioner: Any, hvp: str, ticks: bool
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Return v -> P^-1/2 H P^-1/2 v on flat vectors, and the flat parameters."""
    flat, unflat = ravel_pytree(widened(params))
    of_params = scalar_loss(loss, batch)
    grad = jax.grad(lambda w: of_params(unflat(w)))
    root = None
    if preconditioner is not None:
        root = jnp.sqrt(ravel_pytree(widened(preconditioner))[0].astype(flat.dtype))

    def product(v):
        if hvp == _HVPS[0]:
            return jax.jvp(grad, (flat,), (v,))[1]
        return jax.grad(lambda w: jnp.vdot(grad(w), v))(flat)

    def matvec(v):
        u = product(v) if root is None else product(v / root) / root
        if ticks:
            jax.debug.callback(_progress.tick, u[0])
        return u

    return matvec, flat


def explained(name: str, hvp: str, run: Callable[[], Any]) -> Any:
    """Run; say the fix where the loss has no forward derivative."""
    try:
        return run()
    except TypeError as error:
        if hvp == _HVPS[0] and "custom_vjp" in str(error):
            raise TypeError(
                f"{name}: the gradient has a jax.custom_vjp, which has no forward derivative. "
                f'Pass hvp="{_HVPS[1]}".'
            ) from error
        raise
