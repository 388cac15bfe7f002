"""Gradients of a layer's weights, preconditioned by the second moment of the layer's inputs."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec, reshard
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.layout.apply import close_leaf, open_leaf

Ints = int | Sequence[int]
_EXACT = jax.lax.Precision.HIGHEST
_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def _explicit(x: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _everywhere(x: jax.Array) -> jax.Array:
    """Return an array that every device of an Explicit mesh has whole."""
    return reshard(x, PartitionSpec(*[None] * x.ndim)) if _explicit(x) else x


def _moment(rows: jax.Array, axis_name: str | None) -> jax.Array:
    """Return A^T A/N of (..., groups, fan_in), or A/sqrt(N) if that is smaller; squeezed."""
    count, groups, fan_in = math.prod(rows.shape[:-2]), *rows.shape[-2:]
    rows, count = rows.astype(_leafwise.widen(rows.dtype)), max(count, 1)
    # Rows on several devices are some of the batch's, and on an Explicit mesh cannot be merged.
    if count < fan_in and axis_name is None and not _explicit(rows):
        flat = jnp.swapaxes(rows.reshape(-1, groups, fan_in), 0, 1) / math.sqrt(count)
        return flat[0] if groups == 1 else flat
    summed = tuple(range(rows.ndim - 2))
    gram = jax.lax.dot_general(
        rows,
        rows,
        ((summed, summed), ((rows.ndim - 2,), (rows.ndim - 2,))),
        precision=_EXACT,
        out_sharding=PartitionSpec(None, None, None) if _explicit(rows) else None,
    )
    gram = (gram if axis_name is None else jax.lax.pmean(gram, axis_name)) / count
    return gram[0] if groups == 1 else gram


@_checks.explain_calls
def input_gram(x: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Return the second moment A^T A/N of a dense layer's inputs, A its N rows.

    Args:
      x: inputs (..., fan_in); all axes but the last are rows.
      axis_name: mapped axis of `jax.shard_map` or `jax.pmap` over which the rows are split evenly.

    Returns:
      (fan_in, fan_in), or, if N < fan_in and no axis is named, the factor R = A/sqrt(N) of
      R^T R, (N, fan_in), from which `precondition_by_input_gram` solves a system of N unknowns.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> print(optlab.input_gram(jnp.array([[1.0], [3.0]])))
      [[5.]]
    """
    if jnp.ndim(x) < 1:
        raise ValueError("input_gram: x must be inputs (..., fan_in), got a scalar.")
    if x.ndim == 1:
        x = x[None]
    return _moment(jnp.expand_dims(x, -2), axis_name)


def _each(name: str, argument: str, value: Ints | None, dims: int) -> tuple[int, ...]:
    """Return one number per spatial axis."""
    given = (1 if value is None else value,) if isinstance(value, int | None) else tuple(value)
    given = given * dims if len(given) == 1 else given
    if len(given) != dims:
        must = f"a number or one per spatial axis ({dims})"
        raise _checks.refusal(ValueError, name, argument, must, value)
    return given


def _pads(
    x: jax.Array, padding: Any, spans: Sequence[int], strides: Sequence[int]
) -> tuple[jax.Array, list[tuple[int, int]]]:
    """Return x padded as far as zeros will not do, and how many zeros each axis still gets."""
    if padding in _PAD_MODES:
        widths = [(0, 0), *(((k - 1) // 2, k // 2) for k in spans), (0, 0)]
        return jnp.pad(x, widths, mode=_PAD_MODES[padding]), [(0, 0)] * len(spans)
    if padding == "CAUSAL":
        if len(spans) > 1:
            raise ValueError(
                f"conv_input_gram: 'CAUSAL' padding is for one spatial axis, got {len(spans)}. "
                "Give (low, high) pairs."
            )
        return x, [(spans[0] - 1, 0)]
    if isinstance(padding, str):
        return x, list(jax.lax.padtype_to_pads(x.shape[1:-1], spans, strides, padding))
    pairs = (padding,) * len(spans) if isinstance(padding, int) else tuple(padding)
    return x, [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in pairs]


def _patches(
    x: jax.Array,
    window: tuple[int, ...],
    strides: Sequence[int],
    padding: Any,
    dilation: Sequence[int],
    input_dilation: Sequence[int],
) -> jax.Array:
    """Return (batch, positions..., taps, channels): for each tap of the window one strided slice.

    `jax.lax.conv_general_dilated_patches` multiplies by ones, and a 7 x 7 window takes the TPU's
    compiler 60 s, this one 26. With the taps beside each other as channels it takes 6 s, but ten
    times the memory: a TPU pads 3 channels to 128.
    """
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    x, pads = _pads(x, padding, spans, strides)
    wide = [(*p, d - 1) for p, d in zip(pads, input_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *wide, (0, 0, 0)])
    steps = [
        max(size - k, -s) // s for size, k, s in zip(x.shape[1:-1], spans, strides, strict=True)
    ]

    def tap(offsets):
        start = [i * d for i, d in zip(offsets, dilation, strict=True)]
        stop = [i + max(n * s + 1, 0) for i, n, s in zip(start, steps, strides, strict=True)]
        low, high = (0, *start, 0), (x.shape[0], *stop, x.shape[-1])
        return jax.lax.slice(x, low, high, (1, *strides, 1))

    return jnp.stack([tap(offsets) for offsets in np.ndindex(*window)], axis=-2)


@_checks.explain_calls
def conv_input_gram(
    x: jax.Array,
    window: Sequence[int],
    *,
    strides: Ints | None = 1,
    padding: Any = "SAME",
    dilation: Ints | None = 1,
    input_dilation: Ints | None = 1,
    groups: int = 1,
    axis_name: str | None = None,
) -> jax.Array:
    """Return the second moment of a convolution's input patches, as `input_gram` of their rows.

    A patch is ordered as Flax's kernel (space..., in, out) without its last axis. The patches are
    built: prod(window)/prod(strides) times the input's size.

    Args:
      x: inputs (batch..., space..., channels).
      window: the kernel's spatial shape.
      strides: a number or one per spatial axis.
      padding: any of Flax: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", a number, or numbers
        or (low, high) pairs per spatial axis.
      dilation: of the kernel.
      input_dilation: of the input.
      groups: into which the channels are divided (`feature_group_count`).
      axis_name: mapped axis of `jax.shard_map` or `jax.pmap` over which the batch is split evenly.

    Returns:
      (fan_in, fan_in) with fan_in = prod(window) channels/groups, or a factor (N, fan_in) as in
      `input_gram`; with groups > 1 as many of them.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> print(optlab.conv_input_gram(jnp.ones((1, 4, 1)), (2,), padding="VALID"))
      [[1. 1.]
       [1. 1.]]
    """
    name = "conv_input_gram"
    _checks.check_steps(name, 1, groups=groups)
    window, dims = tuple(window), len(window)
    if x.ndim < dims + 1 or x.shape[-1] % groups:
        raise ValueError(
            f"{name}: x must be (batch..., space..., channels) with {dims} spatial axes and "
            f"channels divisible by {groups}, got shape {x.shape}. Give the layer's own input."
        )
    if x.ndim != dims + 2:
        x = x.reshape(-1, *x.shape[-dims - 1 :])
    named = {"strides": strides, "dilation": dilation, "input_dilation": input_dilation}
    each = {key: _each(name, key, value, dims) for key, value in named.items()}
    x = x.astype(_leafwise.widen(x.dtype))
    taps = _patches(x, window, each["strides"], padding, each["dilation"], each["input_dilation"])
    # A group's patch is (window, its channels), as its kernel.
    apart = taps.reshape(*taps.shape[:-1], groups, x.shape[-1] // groups)
    rows = jnp.moveaxis(apart, -2, -3)
    rows = rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
    return _moment(rows, axis_name)


def _factor(x: jax.Array, damping: ArrayLike) -> Any:
    return jax.scipy.linalg.cho_factor(x + damping * jnp.eye(x.shape[-1], dtype=x.dtype))


def _solved(given: jax.Array, g: jax.Array, damping: ArrayLike) -> jax.Array:
    """Return (C + damping I)^-1 g for C, or for R with C = R^T R and fewer rows (Woodbury)."""
    if given.shape[0] == given.shape[1]:
        return jax.scipy.linalg.cho_solve(_factor(given, damping), g)
    inner = _factor(jnp.matmul(given, given.T, precision=_EXACT), damping)
    within = jax.scipy.linalg.cho_solve(inner, jnp.matmul(given, g, precision=_EXACT))
    return (g - jnp.matmul(given.T, within, precision=_EXACT)) / damping


def _check_paths(name: str, updates: Any, grams: dict[str, Any]) -> None:
    """Refuse a Gram of no leaf; leaves masked or without a gradient are leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_leafwise.is_hole)
    named = [(_layout.path_str(path), x) for path, x in flat]
    paths = [path for path, _ in named]
    # A hole may stand for a whole module.
    masked = tuple(f"{path}/" for path, x in named if isinstance(x, optax.MaskedNode))
    for path in grams:
        if path not in paths and not path.startswith(masked):
            near = difflib.get_close_matches(path, paths, 1) or paths[:3]
            raise ValueError(
                f"{name}: input_gram has {path!r}, which is no leaf of the updates. "
                f"Did you mean {', '.join(map(repr, near))}?"
            )


def _preconditioned(
    name: str, path: str, u: jax.Array, given: jax.Array, damping: ArrayLike, policy: Any
) -> jax.Array:
    view = _layout.view_of(path, u, policy)
    if view is None:
        raise ValueError(
            f"{name}: leaf '{path}' of shape {u.shape} has no inputs in this layout. Give its view "
            "with layout=layout.rules({...}), or leave it out of input_gram."
        )
    batch = view.batch(u.ndim)
    opened = open_leaf(u, (*((a,) for a in batch), view.rows, view.cols))
    x = _everywhere(opened.matrices)
    lead, (m, n) = x.shape[:-2], x.shape[-2:]
    stack = given.shape[:-2]
    groups = stack[-1] if len(stack) > len(lead) else 1
    fits = stack in (lead, (*lead, groups)) and given.shape[-1] == m and given.shape[-2] <= m
    if not fits or n % groups:
        raise ValueError(
            f"{name}: leaf '{path}' of shape {u.shape} has {m} inputs, its Gram shape "
            f"{given.shape}. Collect it from that layer's own input, in the layout of the leaf."
        )
    # The outputs of a group are neighbours; each group is a matrix of its own.
    x = jnp.moveaxis(x.reshape(*lead, m, groups, n // groups), -2, len(lead))
    grams = _everywhere(given).astype(x.dtype)
    grams = grams.reshape(-1, *grams.shape[-2:])
    solved = jax.vmap(_solved, (0, 0, None))(grams, x.reshape(-1, m, n // groups), damping)
    out = jnp.moveaxis(solved.reshape(x.shape), len(lead), -2).reshape(*lead, m, n)
    return close_leaf(out, opened)


@_checks.explain_calls
def precondition_by_input_gram(
    damping: ArrayLike = 0.1, *, layout: _layout.Policy = _layout.flax
) -> optax.GradientTransformationExtraArgs:
    """Take the step that moves a layer's activations, not its weights, down their gradient (TrAct).

    u = (C + damping I)^-1 g with g as a matrix (fan_in, fan_out) and C the second moment of the
    layer's inputs: the ridge regression of the desired activations z - dz on the inputs. Made for
    first layers, whose steps would otherwise scale with an image's contrast and brightness; other
    leaves, and biases, pass untouched. Follow it with any optimizer:
    `optax.chain(optlab.precondition_by_input_gram(), optax.adamw(1e-3))`.

    The extra argument `input_gram` maps a leaf's path to what `input_gram`, `conv_input_gram` or
    `optlab.flax.with_input_grams` return for it: {"conv/kernel": ...}. Accumulate gradients and
    Grams apart, and divide after: the Gram is a mean, like the gradient.

    Args:
      damping: added to C, > 0, on the scale of the inputs' mean square: 0.1 suits inputs
        standardized to 1. Large, it makes u = g/damping.
      layout: which axes are inputs. (static)

    Returns:
      A stateless transformation; leaves named in `input_gram` have about 1/(C + damping) times the
      input's size, others keep theirs.

    State:
      None.

    Raises:
      ValueError: at update, a path that is no leaf's, or a Gram that does not fit its leaf.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> x, g = jnp.array([[3.0], [3.0]]), {"dense": {"kernel": jnp.array([[18.2]])}}
      >>> tx = optlab.precondition_by_input_gram(0.1)
      >>> u, _ = tx.update(g, tx.init(g), input_gram={"dense/kernel": optlab.input_gram(x)})
      >>> print(u["dense"]["kernel"].round(3))
      [[2.]]

    Deviations:
      None in exact arithmetic. Systems are solved by Cholesky factors in float32 or wider; the
      authors' code inverts. Dilation and groups, which it ignores, are heeded.

    References:
      Petersen et al., TrAct: making first-layer pre-activations trainable, arXiv:2410.23970, 2024;
      code: Felix-Petersen/tract at 8c04529.
    """
    name = "precondition_by_input_gram"
    _checks.check_positive(name, damping=damping)
    _checks.check_callable(name, layout=layout)

    def update(updates, state, params=None, **extra_args):
        del params
        grams = _leafwise.read(name, extra_args, "input_gram")
        _check_paths(name, updates, grams)

        def leaf(path, u, p):
            del p
            given = grams.get(path) if u.size else None
            return (u if given is None else _preconditioned(name, path, u, given, damping, layout),)

        return *_leafwise.leafwise(name, leaf, updates), state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked(name), update)
