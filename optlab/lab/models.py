"""Parameter trees of well-known models: shapes only, under the names that Flax gives them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from optlab import layout
from optlab.lab.config import BadInput
from optlab.lab.optimizers import nearest

DTYPES = ("float32", "bfloat16", "float16")
Shape = tuple[int, ...]


class Model(NamedTuple):
    """The shapes of a model: what stands outside its layers, one layer, how many there are."""

    width: int
    outside: dict[str, Any]
    block: dict[str, Any]
    layers: int


def _linear(rows: Shape, cols: Shape, *, bias: bool) -> dict[str, Shape]:
    return {"kernel": (*rows, *cols), **({"bias": cols} if bias else {})}


def _norm(width: int, *, bias: bool) -> dict[str, Shape]:
    return {"scale": (width,), **({"bias": (width,)} if bias else {})}


def _attention(width: int, heads: int, kv_heads: int, *, bias: bool) -> dict[str, Any]:
    """Multi-head attention as `flax.nnx.MultiHeadAttention` keeps it: heads are an axis."""
    size = width // heads
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    maps = {name: _linear((width,), (n, size), bias=bias) for name, n in counts.items()}
    return maps | {"out": _linear((heads, size), (width,), bias=bias)}


def _llama(width: int, hidden: int, layers: int, heads: int, kv_heads: int | None = None) -> Model:
    """LLaMA (2302.13971): no biases, gated MLP, the head a matrix of its own."""
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return Model(
        width,
        {
            "embed": {"embedding": (32000, width)},
            "norm": _norm(width, bias=False),
            "lm_head": _linear((width,), (32000,), bias=False),
        },
        {
            "attention": _attention(width, heads, kv_heads or heads, bias=False),
            "attention_norm": _norm(width, bias=False),
            "mlp_norm": _norm(width, bias=False),
            **{name: _linear((m,), (n,), bias=False) for name, (m, n) in sizes.items()},
        },
        layers,
    )


def _block(width: int, heads: int) -> dict[str, Any]:
    """One layer of GPT-2 and of ViT: biases everywhere, an MLP of four times the width."""
    return {
        "attention": _attention(width, heads, heads, bias=True),
        "attention_norm": _norm(width, bias=True),
        "mlp_norm": _norm(width, bias=True),
        "up": _linear((width,), (4 * width,), bias=True),
        "down": _linear((4 * width,), (width,), bias=True),
    }


def _gpt2(width: int, layers: int, heads: int) -> Model:
    """GPT-2: the head is the embedding, so it is no leaf; query, key and value apart."""
    outside = {
        "token": {"embedding": (50257, width)},
        "position": {"embedding": (1024, width)},
        "norm": _norm(width, bias=True),
    }
    return Model(width, outside, _block(width, heads), layers)


def _vit(width: int, layers: int, heads: int) -> Model:
    """ViT (2010.11929) with patches of 16 x 16 on 224 x 224 pixels and 1000 classes."""
    outside = {
        "patch_conv": {"kernel": (16, 16, 3, width), "bias": (width,)},
        "cls_token": (1, 1, width),
        "position_embedding": (1, 1 + 14 * 14, width),
        "norm": _norm(width, bias=True),
        "head": _linear((width,), (1000,), bias=True),
    }
    return Model(width, outside, _block(width, heads), layers)


# The LLaMAs up to 1b are those of GaLore (2403.03507), the others Meta's; 70b has 8 key and value
# heads for its 64.
MODELS: dict[str, Callable[[], Model]] = {
    "llama-60m": partial(_llama, 512, 1376, 8, 8),
    "llama-130m": partial(_llama, 768, 2048, 12, 12),
    "llama-350m": partial(_llama, 1024, 2736, 24, 16),
    "llama-1b": partial(_llama, 2048, 5461, 24, 32),
    "llama-7b": partial(_llama, 4096, 11008, 32, 32),
    "llama-13b": partial(_llama, 5120, 13824, 40, 40),
    "llama-70b": partial(_llama, 8192, 28672, 80, 64, 8),
    "gpt2": partial(_gpt2, 768, 12, 12),
    "gpt2-medium": partial(_gpt2, 1024, 24, 16),
    "gpt2-large": partial(_gpt2, 1280, 36, 20),
    "gpt2-xl": partial(_gpt2, 1600, 48, 25),
    "vit-b": partial(_vit, 768, 12, 12),
    "vit-l": partial(_vit, 1024, 24, 16),
}
STACKED = layout.stacked("^layers/")


def model(name: str) -> Model:
    """Return the model of that name."""
    if name not in MODELS:
        raise BadInput(
            f"memory: --model must be one of {', '.join(MODELS)}, got {name!r}."
            f"{nearest(name, list(MODELS))} For a model of your own write --file PATH."
        )
    return MODELS[name]()


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that parameters do not have."""
    if dtype not in DTYPES:
        raise BadInput(f"memory: --dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def tree(shapes: Model, dtype: str = "float32", *, stacked: bool = False) -> Any:
    """Return the shapes of all parameters; `stacked`: all layers in one leaf, as `scan` has them.

    Read stacked ones with the policy `STACKED`, the others with `layout.flax`.
    """
    check_dtype(dtype)

    def structs(part: Any, stack: Shape = ()) -> Any:
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct((*stack, *shape), dtype),
            part,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    count = shapes.layers
    layers = structs(shapes.block, (count,)) if stacked else [structs(shapes.block)] * count
    return structs(shapes.outside) | {"layers": layers}
