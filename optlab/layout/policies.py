"""Policies: `flax` (default), `per_head`, `by_ndim`, `output_first`; `rules`, `stacked` combine."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optlab.layout.view import MatrixView, Policy, view_of

_VECTOR = re.compile(
    r"(^|_)(bias|scale)$"
)  # of any rank: attention biases have two, stacked ones one more
_NORM = re.compile(r"norm|^(ln|bn|gn)(_|\d|$)", re.IGNORECASE)
_EMBED = re.compile(r"embed|^wte$|^wpe$", re.IGNORECASE)
_HEAD = re.compile(r"^([a-z]+_)?head(_?\d+)?$|unembed|^logits|_logits$", re.IGNORECASE)
_CONV = re.compile(r"conv", re.IGNORECASE)
_ATTENTION = re.compile(r"att|mha", re.IGNORECASE)
_FUSED = re.compile(r"(^|_)(?P<parts>qkv|kv)(_|$)", re.IGNORECASE)
_STACK = re.compile(r"layers|blocks|stack|scan", re.IGNORECASE)
# No attention in use projects d features to more than 8 d; a stack of (d, d) kernels read as
# (d, heads, head_dim) seems to, because its first axis is the number of layers.
_MAX_EXPANSION = 8
_MAX_SPACE = 16


def by_ndim(path: str, leaf: Any) -> MatrixView | None:
    """Plain rule: the last two axes are (in, out), all before them batch; below rank 2 none."""
    del path
    ndim = np.ndim(leaf)
    return MatrixView((ndim - 2,), (ndim - 1,)) if ndim >= 2 else None


def output_first(path: str, leaf: Any) -> MatrixView | None:
    """PyTorch's and Equinox's convention: the first axis is the output, all others the input."""
    del path
    ndim = np.ndim(leaf)
    return MatrixView(tuple(range(1, ndim)), (0,)) if ndim >= 2 else None


def flax(path: str, leaf: Any) -> MatrixView | None:
    """Read a leaf as the layers of Linen and NNX mean it (and `weight` as Equinox and PyTorch do).

    | leaf (by its name and its module's name) | shape | view |
    |---|---|---|
    | bias, scale; all but a kernel of a norm | any rank | none |
    | Dense, Linear, LoRA pairs, any unknown name | (in, out) | in -> out |
    | query, key, value kernel of an attention | (d, heads, head_dim) | d -> heads x head_dim |
    | out kernel of an attention | (heads, head_dim, d) | heads x head_dim -> d |
    | qkv, kv kernel | (d, 3 or 2, heads, head_dim) | a batch of 3 or 2: as if not fused |
    | kernel of a module named conv... | (space..., in, out) | space x in -> out |
    | the same with in = 1 | (space..., 1, out) | the same, role "depthwise" |
    | ConvLocal kernel | (space..., patch, out) | patch -> out, batch over space |
    | embedding | (vocab, d) | rows are the vectors, role "embedding" |
    | kernel of lm_head, head, logits, unembed | (d, vocab) | in -> out, role "head" |
    | weight | (out, in), (out, in, space...) | output first |

    A depthwise kernel is a table of filters, not a linear map from space to channels. Its view
    gives AdamP, LARS and NaP what they mean by a channel and by a layer; its role lets matrix
    methods leave it alone. A first convolution over one channel has the same shape and gets the
    same role.

    What one leaf cannot show has to be said: a scanned stack of convolutions looks like a
    convolution of one more dimension, so name stacks with `stacked`; a grouped convolution looks
    like one with fewer inputs, and is read as one matrix.

    Raises:
        ValueError: a leaf of rank >= 3 without a rule, or of a rank that contradicts its rule.
            The message names it and shows the rule to add.
    """
    return _flax(path, np.shape(leaf), per_head=False)


def per_head(path: str, leaf: Any) -> MatrixView | None:
    """`flax`, but each head of an attention kernel is a matrix of its own (heads are a batch axis).

    Example:
        >>> from optlab import layout
        >>> policy = layout.rules({"attn/(query|key)": layout.per_head})
    """
    return _flax(path, np.shape(leaf), per_head=True)


def _flax(path: str, shape: tuple[int, ...], *, per_head: bool) -> MatrixView | None:
    modules = [part for part in path.split("/") if not part.isdigit()]  # a list index is no name
    name = modules.pop() if modules else ""
    if _is_vector(name, modules, shape):
        return None
    view = _by_name(name, modules, shape, per_head=per_head)
    if view is None:
        raise _ambiguous(path, shape, _suggestion(name, modules, shape))
    return view


def _owner(modules: list[str]) -> str:
    return modules[-1] if modules else ""


def _is_vector(name: str, modules: list[str], shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or _VECTOR.search(name):
        return True
    if name == "kernel":
        return False
    # A token of shape (1, 1, d) has nothing of a matrix; (d, 1) may be a map to one output.
    thin = len(shape) > 2 and sum(size > 1 for size in shape) <= 1
    return thin or bool(_NORM.search(_owner(modules)))


def _is_embedding(name: str, owner: str) -> bool:
    if name == "weight":
        return bool(_EMBED.search(owner)) and "patch" not in owner and not _HEAD.search(owner)
    return bool(_EMBED.search(name)) and not _HEAD.search(name)


def _by_name(
    name: str, modules: list[str], shape: tuple[int, ...], *, per_head: bool
) -> MatrixView | None:
    """View of a leaf of rank >= 2 that is no vector; None: ambiguous."""
    ndim, owner = len(shape), _owner(modules)
    if _is_embedding(name, owner):
        # ViT's position table has the shape (1, length, d).
        fits = all(size == 1 for size in shape[:-2])
        return MatrixView((ndim - 2,), (ndim - 1,), "embedding") if fits else None
    if ndim == 2:
        role = "head" if _HEAD.search(owner) or _HEAD.search(name) else "matrix"
        return MatrixView((1,), (0,), role) if name == "weight" else MatrixView((0,), (1,), role)
    if _CONV.search(owner):
        return _conv(name, owner, shape)
    return _attention(modules, shape, per_head=per_head) if name == "kernel" else None


def _conv(name: str, owner: str, shape: tuple[int, ...]) -> MatrixView:
    ndim = len(shape)
    if "convlocal" in owner.lower():
        return MatrixView((ndim - 2,), (ndim - 1,))
    if name == "weight":
        rows, cols, fan_in = tuple(range(1, ndim)), (0,), shape[1]
    else:
        rows, cols, fan_in = tuple(range(ndim - 1)), (ndim - 1,), shape[-2]
    return MatrixView(rows, cols, "depthwise" if fan_in == 1 else "matrix")


def _attention(modules: list[str], shape: tuple[int, ...], *, per_head: bool) -> MatrixView | None:
    owner, parent = _owner(modules), _owner(modules[:-1])
    if owner in ("query", "key", "value") and len(shape) == 3:
        plausible = math.prod(shape[1:]) <= _MAX_EXPANSION * shape[0]
        return MatrixView((0,), (2,) if per_head else (1, 2)) if plausible else None
    if owner == "out" and _ATTENTION.search(parent) and len(shape) == 3:
        return MatrixView((1,) if per_head else (0, 1), (2,))
    fused = _FUSED.search(owner)
    if fused and len(shape) == 4 and shape[1] == len(fused["parts"]):
        return MatrixView((0,), (3,) if per_head else (2, 3))
    return None


def _suggestion(name: str, modules: list[str], shape: tuple[int, ...]) -> MatrixView:
    """Return the view that the trailing axes would have if the leading ones were a stack."""
    ndim, owner = len(shape), _owner(modules)
    if _is_embedding(name, owner):
        return MatrixView((ndim - 2,), (ndim - 1,), "embedding")
    if name == "kernel" and _FUSED.search(owner):
        return MatrixView((0,), tuple(range(1, ndim)))
    if name == "kernel" and owner in ("query", "key", "value") and ndim > 3:
        return MatrixView((ndim - 3,), (ndim - 2, ndim - 1))
    if name == "kernel" and owner == "out" and _ATTENTION.search(_owner(modules[:-1])):
        return MatrixView((ndim - 3, ndim - 2), (ndim - 1,))
    if name == "weight":
        return MatrixView((ndim - 1,), (ndim - 2,))
    if ndim > 3 and max(shape[:-2]) <= _MAX_SPACE:  # more likely a convolution under another name
        return MatrixView(tuple(range(ndim - 1)), (ndim - 1,))
    return MatrixView((ndim - 2,), (ndim - 1,))


def _ambiguous(path: str, shape: tuple[int, ...], view: MatrixView) -> ValueError:
    parts = path.split("/")
    depth = next((i for i, part in enumerate(parts) if _STACK.search(part)), 0)
    stack = "/".join(parts[: depth + 1]) + ("/" if depth + 1 < len(parts) else "")
    return ValueError(
        f"layout.flax: leaf '{path}' has shape {shape}: a stack of layers, or one tensor? "
        f"Add layout.stacked({_literal(stack)}) or "
        f"layout.rules({{{_literal(path)}: {view.text()}}})."
    )


def _literal(text: str) -> str:
    """Write a regular expression for `text` as Python source in double quotes."""
    return json.dumps(re.escape(text), ensure_ascii=False)


Rule = MatrixView | Policy | None


def rules(table: Mapping[str, Rule], default: Policy = flax) -> Policy:
    """Return a policy that looks for the leaf in a table of your own first.

    Args:
        table: regular expression -> view, policy, or None (no matrix). The first one found in the
            path (`re.search`) decides.
        default: policy for the leaves that no expression matches.

    Raises:
        ValueError: at construction, an expression that does not compile.
        TypeError: at construction, a value that is no view, policy or None.

    Example:
        >>> from optlab import MatrixView, layout
        >>> stem = MatrixView(rows=(0, 1, 2), cols=(3,))
        >>> policy = layout.rules({"stem/kernel": stem, "cls_token": None})
    """
    policies = [
        (_compiled("layout.rules", regex), _as_policy(regex, value))
        for regex, value in table.items()
    ]

    def policy(path: str, leaf: Any) -> MatrixView | None:
        found = (chosen for pattern, chosen in policies if pattern.search(path))
        return view_of(path, leaf, next(found, default))

    return policy


def _as_policy(regex: str, value: Rule) -> Policy:
    if value is None or isinstance(value, MatrixView):
        return lambda path, leaf: value
    if not callable(value):
        raise TypeError(
            f"layout.rules: the value of '{regex}' must be a MatrixView, a policy or None, "
            f"got {value!r}. Write MatrixView(rows=(...), cols=(...))."
        )
    return value


def stacked(regex: str, policy: Policy = flax, axis: int = 0) -> Policy:
    """Return a policy for leaves with one more axis: a stack of layers (by `scan` or `vmap`).

    `policy` sees a matching leaf without that axis, which becomes a batch axis of the view. Other
    leaves go to `policy` as they are.

    Args:
        regex: leaves whose path it is found in (`re.search`) are stacks.
        policy: policy for one layer.
        axis: position of the stack axis; may be negative.

    Raises:
        ValueError: an expression that does not compile; a matching leaf without such an axis,
            which is named.

    Example:
        >>> from optlab import layout
        >>> policy = layout.stacked("^layers/")
    """
    pattern = _compiled("layout.stacked", regex)

    def stacked_policy(path: str, leaf: Any) -> MatrixView | None:
        if not pattern.search(path):
            return policy(path, leaf)
        shape, at = np.shape(leaf), axis % max(np.ndim(leaf), 1)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"layout.stacked: leaf '{path}' of shape {shape} has no stack axis {axis}. "
                f"Narrow the expression '{regex}' to the leaves that are stacks."
            )
        layer = jax.ShapeDtypeStruct(shape[:at] + shape[at + 1 :], jax.dtypes.result_type(leaf))
        try:
            view = view_of(path, layer, policy)
        except ValueError as error:
            raise ValueError(
                f"{error} (That is the shape without stack axis {axis}: "
                "give the rule to layout.stacked as its policy.)"
            ) from None
        return None if view is None else view.insert_axis(at)

    return stacked_policy


def _compiled(name: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name}: '{regex}' is no regular expression ({error}). Escape what is meant literally."
        ) from None
