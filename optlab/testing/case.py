"""What a check is given: a transformation, the trees it runs on, and what it promises."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.layout import path_str

Tree = Any
Make = Callable[..., Any]

# No two leaves of one size: a state leaf can be told by its shape, a mixed-up leaf by its values.
_SHAPES = {
    "attn": {"query": {"kernel": (8, 2, 4)}},
    "conv": {"kernel": (3, 3, 2, 8)},
    "dense": {"bias": (16,), "kernel": (8, 16)},
    "norm": {"scale": (8,)},
    "temperature": (),
}


def random_like(shapes: Tree, seed: int, dtype: Any = np.float32) -> Tree:
    """Return normal values for a tree of arrays or shapes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731

    def draw(x):
        shape = x if is_shape(x) else jnp.shape(x)
        return jnp.asarray(np.asarray(rng.normal(size=shape)), getattr(x, "dtype", dtype))

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def default_params() -> Tree:
    """Return the standard tree: Flax names, ranks 0, 1, 2, 3 (attention) and 4 (convolution)."""
    return random_like(_SHAPES, seed=0)


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree under their paths."""
    return {path_str(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass(eq=False)
class Case:
    """One transformation under test.

    Args:
        name: what error messages call it.
        make: builds the transformation; called without arguments, or with hyperparameters to
            change. With the tag `schedule` it builds a schedule instead.
        tags: what the method is and promises; they select the checks (see `checks_for`).
        params: builds the parameters to run on.
        hits: paths of the leaves the method really transforms, or a predicate of the path.
        facts: numbers a check compares with, by its name: `state_bytes`, `constant_gradient`...
            A fact also acts as a tag.
        fallback: builds what leaves off the method's path get: the inner transformation of a
            wrapper, plain SGD. The default leaves the gradient as it is.
        xfail: checks known to fail, each with the reason. A check listed here has to fail.
    """

    name: str
    make: Make
    tags: frozenset[str] = frozenset()
    params: Callable[[], Tree] = default_params
    hits: Iterable[str] | Callable[[str], bool] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    fallback: Callable[[], Any] = optax.identity
    xfail: Mapping[str, str] = field(default_factory=dict)
    traces: int = field(default=0, init=False)

    @functools.cached_property
    def selectors(self) -> frozenset[str]:
        """Tags, facts, and `hits` where leaves are claimed: what `checks_for` is asked."""
        claimed = {"hits"} if callable(self.hits) or tuple(self.hits) else set()
        return frozenset(self.tags) | frozenset(self.facts) | claimed

    @property
    def rounding(self) -> float:
        """Relative difference between two programs of one step.

        The fact `amplification` says how much larger it is than a few roundings: a decomposition
        amplifies them, and a batched one is another algorithm.
        """
        return 1e-6 * self.facts.get("amplification", 1)

    @functools.cached_property
    def tx(self) -> Any:
        """The transformation with its defaults, built once."""
        return self.make()

    @functools.cached_property
    def step(self) -> Any:
        """`(grads, state, params) -> (updates, state)` under jit, compiled once per tree."""

        def step(grads, state, params):
            self.traces += 1
            return self.tx.update(grads, state, params)

        return jax.jit(step)

    @functools.cached_property
    def tree(self) -> Tree:
        """The parameters, built once; checks that donate or mutate copy them."""
        return self.params()

    @functools.cached_property
    def in_float64(self) -> "Case":
        """The same with parameters, and so gradients and iterations, in float64."""
        wide = lambda: jax.tree.map(lambda x: x.astype("float64"), self.params())  # noqa: E731
        return replace(self, params=wide)

    def grads(self, index: int = 0, params: Tree = None) -> Tree:
        """Return the gradient of step `index`, for another tree where one is given."""
        return random_like(self.tree if params is None else params, seed=index + 1)

    def hit(self, path: str) -> bool:
        """Tell whether the method claims to transform the leaf at `path`."""
        return self.hits(path) if callable(self.hits) else path in tuple(self.hits)

    def hit_leaves(self, tree: Tree) -> dict[str, Any]:
        """Return the claimed leaves of a tree, by path."""
        return {path: x for path, x in leaves_by_path(tree).items() if self.hit(path)}

    def fact(self, name: str) -> Any:
        """Return a stated number; a law without it cannot be checked."""
        if name not in self.facts:
            raise AssertionError(f"{self.name}: state facts[{name!r}] so that it can be checked.")
        return self.facts[name]

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The hyperparameters of `make`."""
        return inspect.signature(self.make)


def default_of(case: Case, name: str) -> Any:
    """Return the default of a hyperparameter of `make`, None where there is none."""
    parameter = case.signature.parameters.get(name)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return parameter.default
