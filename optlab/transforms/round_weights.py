"""Weights on a grid of few bits: rounded at every step, or held as codes between the steps."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, reshard

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import everywhere, placement_of
from optlab.linalg import blocks
from optlab.transforms.narrow import check_key, random_bits


class RoundWeightsState(NamedTuple):
    """State of `round_weights`."""

    count: jax.Array  # int32, (): updates seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A matrix as codes, with a scale and a zero for every block of them."""

    codes: blocks.Codes
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})


def pack(x: jax.Array, bits: int, block: int, uniform: jax.Array | None = None) -> PackedWeight:
    """Return an array as codes; rounded to nearest, or by `uniform` numbers of its shape.

    Blocks are `block` numbers that follow each other in x, the last axis fastest.
    """
    block = min(block, x.size + x.size % 2)
    axes = _axes(x.shape, block)
    rows = _rows(x.astype(jnp.float32), block, axes)
    drawn = None if uniform is None else _rows(uniform, block, axes)
    return PackedWeight(blocks.encode(rows, bits, drawn), x.shape, str(x.dtype), bits)


def unpack(packed: PackedWeight) -> jax.Array:
    """Return the array of some codes."""
    rows = blocks.decode(packed.codes, packed.bits)
    axes = _axes(packed.shape, rows.shape[-1])
    return blocks.from_blocks(rows, packed.shape, axes).astype(packed.dtype)


def _axes(shape: tuple[int, ...], block: int) -> int:
    """Return how many of the last axes are cut into blocks: one, where blocks are parts of it.

    The blocks are the same; but they leave all other axes, and their shardings, as they are.
    """
    return len(shape) if shape[-1] % block else 1


def _rows(x: jax.Array, block: int, axes: int) -> jax.Array:
    """Return the blocks as rows; gathered first on an Explicit mesh that cuts one of them."""
    placement = placement_of("pack", "", x, None)
    if placement is not None:
        parts = placement.size(placement.spec[-1])
        whole = axes == 1 and (x.shape[-1] // block) % parts == 0
        x = x if whole else everywhere(x)
    return blocks.in_blocks(x, block, axes)


def _draw(key: jax.Array, index: int, like: jax.Array) -> jax.Array:
    """Return float32 numbers in [0, 1), all multiples of 2^-24."""
    return (random_bits(key, index, like) >> 8).astype(jnp.float32) * 2.0**-24


def _check(name: str, bits: Any, block: Any, layout: Any) -> None:
    if isinstance(bits, bool) or bits not in (4, 8):
        raise _checks.refusal(ValueError, name, "bits", "4 or 8", bits)
    _checks.check_steps(name, 2, block=block)
    if block % 2:
        raise _checks.refusal(ValueError, name, "block", "an even number", block)
    _checks.check_callable(name, layout=layout)


def _packs(path: str, leaf: Any, layout: _layout.Policy) -> bool:
    """Tell whether a leaf is a matrix with anything in it."""
    return bool(leaf.size) and _layout.role(path, leaf, layout) == "matrix"


@_checks.explain_calls
def round_weights(
    bits: int = 8,
    *,
    block: int = 256,
    seed: int = 0,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Round the matrices that the updates lead to, at random, to a grid of few bits (Q-GaLore).

    For every block of w + u, with scale = (max - min)/(2^bits - 1) and 0 in its range:
      q = floor(x) or floor(x) + 1, the latter with probability x - floor(x), x = (w + u)/scale,
    and the update is scale q - w. On average a step counts in full, however small it is beside the
    scale; but for the two ends of a block, which may be cut by half a scale. T steps of d scales
    each, d < 1, leave a standard deviation of about sqrt(T d (1 - d)) scales around their sum. The
    grid is made anew in every step: where the ends of a block move, all of it is rounded again.

    This trains as if codes were all that is stored, without storing them: the weights are still
    arrays, as a model, a loss or `optax.apply_updates` wants them. To save the memory hold codes
    with `pack_weights`, which needs no such link.

    Must come last, after the learning rate and decay. The weights arrive on the grid to a rounding
    of their own dtype, and of the updates': give it float32 for both. bfloat16 has the 8 bits of a
    code and no scale; what is rounded to it still moves on average as it should.

    Args:
      bits: of a code, 8 or 4. (static)
      block: weights that share a scale, an even number; they follow each other along the last axis.
        Where block divides it, every device rounds its own. (static)
      seed: of the random numbers; with the step and the number of the leaf, it is all that they
        depend on. (static)
      layout: what is a matrix; all else passes as it is. (static)

    Returns:
      A transformation that makes steps of whole scales, so much longer than the small ones that it
      is given. Needs params.

    State:
      count: int32.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optax.chain(optax.sgd(0.1), optlab.round_weights())
      >>> p = {"kernel": jnp.linspace(0.0, 255.0, 256)[None]}  # a scale of 1
      >>> g = {"kernel": jnp.ones((1, 256)).at[0, jnp.array([0, -1])].set(0)}
      >>> u, _ = tx.update(g, tx.init(p), p)
      >>> print(sorted(set(u["kernel"].ravel().tolist())))  # a tenth of them moves, by a whole one
      [-1.0, 0.0]

    Deviations:
      The range of a block always includes 0: a block of one sign keeps its numbers, which the
      released code cuts. Blocks lie along the last axis: a Flax kernel's outputs, where PyTorch has
      the inputs.

    References:
      Zhang et al., "Q-GaLore", arXiv:2407.08296, 2024, section 3.3; code in
      VITA-Group/Q-GaLore@5bd2f1c5.
    """
    name = "round_weights"
    _check(name, bits, block, layout)
    _checks.check_steps(name, seed=seed)

    def init(params):
        _leafwise.check_tree(name, params)
        return RoundWeightsState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.require_params(name, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        number = itertools.count()  # the shell skips missing gradients

        def leaf(path, u, p):
            index = next(number)
            if not _packs(path, p, layout):
                return (u,)
            rounded = unpack(pack(p + u, bits, block, _draw(key, index, p)))
            return (_like(rounded, p) - p,)

        (updates,) = _leafwise.leafwise(name, leaf, updates, (), params)
        return updates, RoundWeightsState(_leafwise.increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Return x where p lies, on an Explicit mesh."""
    wanted = jax.typeof(p).sharding
    explicit = AxisType.Explicit in wanted.mesh.axis_types
    return reshard(x, wanted) if explicit and jax.typeof(x).sharding != wanted else x


@_checks.explain_calls
def pack_weights(
    params: optax.Params,
    key: jax.Array | None = None,
    *,
    bits: int = 8,
    block: int = 256,
    layout: _layout.Policy = _layout.flax,
) -> Any:
    """Return the parameters with codes for their matrices, to be held between the steps.

    A loop that holds codes only, as Q-GaLore does, with any optimizer:
      params = unpack_weights(packed);  grads, updates as ever;
      packed = pack_weights(optax.apply_updates(params, updates), key).
    Rounding is that of `round_weights`.

    Args:
      params: arrays in any tree.
      key: a key of `jax.random`, a new one for every step; None rounds to nearest, which loses
        every step of less than half a scale: for what will not be trained.
      bits: of a code, 8 or 4. (static)
      block: weights that share a scale, an even number. (static)
      layout: what is a matrix; all else stays as it is. (static)

    Returns:
      The tree with a `PackedWeight` for every matrix: bits/8 bytes per weight and 8 bytes per
      block, 1.03 in all for 8 bits and blocks of 256.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> packed = optlab.pack_weights({"kernel": jnp.ones((4, 256)), "bias": jnp.ones(4)})
      >>> print(packed["kernel"].codes.codes.nbytes, packed["bias"].nbytes)
      1024 16
    """
    name = "pack_weights"
    _check(name, bits, block, layout)
    if key is not None:
        check_key(name, key)
    _leafwise.check_tree(name, params)
    named, _, treedef = _leafwise.aligned(name, params)

    number = itertools.count()

    def leaf(path, p):
        if p is None:
            return None
        index = next(number)
        if not _packs(path, p, layout):
            return p
        return pack(p, bits, block, None if key is None else _draw(key, index, p))

    return treedef.unflatten([leaf(path, p) for path, p in named])


@_checks.explain_calls
def unpack_weights(packed: Any) -> Any:
    """Return the parameters that `pack_weights` was given, on its grid.

    Args:
      packed: what `pack_weights` returned.

    Returns:
      The tree with arrays of the old shapes and dtypes. On an Explicit mesh a matrix that blocks
      were cut across comes back whole.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> packed = optlab.pack_weights({"kernel": jnp.linspace(0.0, 51.0, 256)[None]})
      >>> print(optlab.unpack_weights(packed)["kernel"][0, :3])
      [0.  0.2 0.4]
    """
    is_packed = lambda x: isinstance(x, PackedWeight)  # noqa: E731
    return jax.tree.map(lambda x: unpack(x) if is_packed(x) else x, packed, is_leaf=is_packed)
