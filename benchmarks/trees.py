"""Parameter trees of the benchmarks: shapes under the names that Flax gives them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _linear(rows: int, cols: int, *, bias: bool) -> dict[str, Shape]:
    return {"kernel": (rows, cols), **({"bias": (cols,)} if bias else {})}


def _norm(width: int, *, bias: bool) -> dict[str, Shape]:
    return {"scale": (width,), **({"bias": (width,)} if bias else {})}


def _block(width: int, *, bias: bool, norm_bias: bool) -> dict[str, Any]:
    sizes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    return {name: _linear(*size, bias=bias) for name, size in sizes.items()} | {
        name: _norm(width, bias=norm_bias) for name in ("attention_norm", "mlp_norm")
    }


def gpt34() -> dict[str, Any]:
    """GPT of 34 leaves, 58.7 M parameters: 4 layers of width 1024 without biases."""
    return _gpt(1024, 4, vocab=8192, bias=False)


def gpt170() -> dict[str, Any]:
    """GPT of 170 leaves, 160 M parameters: 12 layers of width 1024, a bias for every matrix."""
    return _gpt(1024, 12, vocab=8192, bias=True)


def gpt196() -> dict[str, Any]:
    """GPT of 196 leaves, 11.8 M parameters: 12 layers of width 256, biases in the norms too."""
    tree = _gpt(256, 12, vocab=8192, bias=True, norm_bias=True)
    return tree | {"position": {"embedding": (1024, 256)}}


def gpt10() -> dict[str, Any]:
    """GPT of 10 leaves, 1.3 M parameters: one layer of width 256 without biases."""
    return _gpt(256, 1, vocab=2048, bias=False)


def one_matrix() -> dict[str, Any]:
    """One (4096, 4096) leaf, on which bytes per parameter are judged."""
    return {"dense": {"kernel": (4096, 4096)}}


def large_matrix() -> dict[str, Any]:
    """One (8192, 8192) leaf: 256 MiB, more than a TPU v5e has on chip."""
    return {"dense": {"kernel": (8192, 8192)}}


def _gpt(
    width: int, layers: int, *, vocab: int, bias: bool, norm_bias: bool = False
) -> dict[str, Any]:
    block = _block(width, bias=bias, norm_bias=norm_bias)
    return {
        "token": {"embedding": (vocab, width)},
        "norm": _norm(width, bias=norm_bias),
        "blocks": [block for _ in range(layers)],
    }


def shapes(tree: dict[str, Any], sharding: Any = None) -> Any:
    """Return the tree as float32 `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        tree,
        is_leaf=_is_shape,
    )


def normal(tree: dict[str, Any], seed: int, scale: float) -> Any:
    """Return the tree filled with normal numbers of standard deviation `scale`."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_shape)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


def size(tree: Any) -> int:
    """Return the number of parameters of a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
