"""Named scalars out of the state of any optimizer."""

import collections
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optlab.state import walk
from optlab.state.walk import Path


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Collect what a state can tell about training: flat names, scalar values.

    Found at any depth, in chains, `optax.partition`, masks, `optax.MultiSteps`,
    `optax.inject_hyperparams` and wrappers of any kind:

    - the step count of every link that has one;
    - all scalars of optax's own states: `mini_step`, `notfinite_count`, `estim_lr`, ...;
    - injected hyperparameters, `learning_rate` among them, and scalars of `optax.snapshot` and
      `optax.monitor`;
    - what a state's own method `metrics()` returns. Links of optlab have one where there is
      something to watch: `subspace_overlap`, `gsnr_min`, ... Give your NamedTuple one, and it is
      found too.

    What no state holds, such as the size of the gradients or the rate of a plain schedule,
    `optlab.watch` records. Works inside `jax.jit`, and on the state of `nnx.Optimizer`.

    Args:
        opt_state: the state of any optax transformation.

    Returns:
        A dict from names to arrays of shape (). A name that occurs several times gets the parts of
        the way to it that tell them apart, the label of a partition or the place in a chain:
        "muon/count" and "adam/count".

    Raises:
        TypeError: a state's own `metrics` returns no dict.
        ValueError: one of its values is no scalar.

    Example:
        >>> import jax.numpy as jnp, optax, optlab
        >>> tx = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(0.5), 2)
        >>> found = optlab.metrics(tx.init(jnp.zeros(3)))
        >>> print(found["learning_rate"], found["gradient_step"])
        0.5 0
    """
    found = [
        (path, name, value)
        for path, node in walk.states(walk.unboxed(opt_state))
        for name, value in _of_state(node).items()
    ]
    named: dict[str, jax.Array] = {}
    for (_, _, value), name in zip(found, _told_apart(found), strict=True):
        # A label with a slash in it can still meet another name: nothing is lost.
        named[f"{name}#{len(named)}" if name in named else name] = value
    return named


def _of_state(node: Any) -> dict[str, jax.Array]:
    """Return the scalars of one state, not of those inside it."""
    # Every injected schedule counts the steps once more.
    if type(node).__name__ == "WrappedScheduleState":
        return {}
    fields = node._asdict()
    from_optax = type(node).__module__.split(".")[0] == "optax"
    known = fields if from_optax else {k: v for k, v in fields.items() if k == "count"}
    own = getattr(node, "metrics", None)
    return dict(_scalars(known)) | (_own(node, own()) if callable(own) else {})


def _scalars(fields: Mapping[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    for name, value in fields.items():
        if name in ("hyperparams", "measurement", "measurements"):
            yield from _scalars(value)
        elif _is_scalar(value):
            yield name, jnp.asarray(value)


def _is_scalar(x: Any) -> bool:
    if isinstance(x, numbers.Number):
        return True
    dtype = getattr(x, "dtype", None)
    return dtype is not None and x.ndim == 0 and not jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _own(node: Any, values: Any) -> dict[str, jax.Array]:
    """Return what a state says of itself, checked."""
    name = type(node).__name__
    if not isinstance(values, Mapping):
        raise TypeError(
            f"metrics: {name}.metrics() must return a dict of scalars, got "
            f"{type(values).__name__}. Return {{'name': value}}."
        )
    for key, value in values.items():
        if not _is_scalar(value):
            raise ValueError(
                f"metrics: {name}.metrics() must return scalars, got shape {jnp.shape(value)} for "
                f"{key!r}. Return its mean or largest entry."
            )
    return {str(key): jnp.asarray(value) for key, value in values.items()}


def _told_apart(found: list[tuple[Path, str, Any]]) -> Iterator[str]:
    """Yield a name for each: of the way there, the steps at which namesakes part."""
    nexts: dict[tuple[str, Path], set[str | None]] = collections.defaultdict(set)
    for path, name, _ in found:
        for i, key in enumerate((*path, None)):
            nexts[name, path[:i]].add(key)
    for path, name, _ in found:
        kept = [key for i, key in enumerate(path) if len(nexts[name, path[:i]]) > 1]
        yield "/".join((*kept, name))
