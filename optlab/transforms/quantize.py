"""Keep the state of any transformation in few bits."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import divided, partitioned
from optlab.linalg.codecs import Codec, Coded

FIRST_MOMENTS = ("mu", "trace", "ema", "momentum", "exp_avg", "m1", "m2")
SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "exp_avg_sq", "e_g", "e_x")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("codec", "signed", "length", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Scales:
    """What a leaf of codes is read with."""

    arrays: tuple[Any, ...]  # one number per block, of the leaf's rank
    codec: Codec
    signed: bool
    length: int  # of the last axis, which codes of 4 bits halve
    dtype: Any  # of the array that `inner` sees


class QuantizeState(NamedTuple):
    """State of `quantize_state`."""

    count: jax.Array  # int32, (): steps seen
    inner: optax.OptState  # of `inner`, with codes in place of arrays
    scales: Any  # dict of `Scales`, by the path of the codes in `inner`

    def placed(self, shardings: Any) -> Any:
        """Return shardings of this state, those of scales as of the codes that they belong to."""
        codes = dict(_named(shardings.inner))

        def beside(path: str, how: Scales) -> Scales:
            of = codes[path]
            if not isinstance(of, NamedSharding):
                return dataclasses.replace(how, arrays=(of,) * len(how.arrays))
            specs = (divided(of.spec, x.shape, of.mesh) for x in how.arrays)
            return dataclasses.replace(
                how, arrays=tuple(NamedSharding(of.mesh, spec) for spec in specs)
            )

        if not isinstance(self.scales, dict):
            return shardings
        scales = {path: beside(path, how) for path, how in self.scales.items()}
        return shardings._replace(scales=scales)


@_checks.explain_calls
def quantize_state(
    inner: optax.GradientTransformation,
    codec: Codec | Mapping[str, Codec],
    *,
    second_moments: tuple[str, ...] = SECOND_MOMENTS,
    min_size: int = 4096,
    stochastic: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keep the moments of `inner` in 8 or 4 bits between steps.

    At every step: decode, run `inner` on arrays of their own dtypes, encode. The update is computed
    from the new moments before they are rounded.

    For any transformation, chain or wrapper: which leaves are coded is decided by the field of the
    state they are in and by their size. Put it around everything that handles moments by itself,
    such as `in_low_rank` with on_refresh="rotate", and inside `optax.MultiSteps`, whose gradients
    are sums to be kept exactly and whose idle steps would round the moments again.

    On a TPU blocks of 128 are coded where they lie if a device's rows are a multiple of eight, or
    a block is a whole row: AdamW with int8 accesses 35 bytes per parameter, 28 without. Other
    leaves are copied into another order, 98 bytes; 4-bit codes take 76.

    Args:
      inner: the transformation whose state is kept small.
      codec: `codecs.fp8()`, `codecs.int8()` or `codecs.int4()`, for the fields mu, trace, ema,
        momentum, exp_avg, m1, m2 and those of second moments; or a codec for each field by its
        name, {"mu": codecs.int8()}, which leaves the others as they are. (static)
      second_moments: fields that are never negative. Their codes have no sign, and what is above 0
        stays above 0, so that m/eps cannot blow up; nu, nu_max, sum_of_squares, exp_avg_sq, e_g,
        e_x. (static)
      min_size: entries from which on a leaf is coded; bitsandbytes' default. (static)
      stochastic: round up with the probability of the fraction. A slow average moves by less than
        half a step of its code, and rounding to nearest keeps it where it is. Random numbers follow
        from the step's count and the leaf: none are kept. (static)
      seed: of stochastic rounding. (static)

    Returns:
      A transformation with the updates of `inner`, of rounded moments.

    State:
      inner: that of `inner`, with codes in place of large moments: of the same shape, where two
        do not share a byte, and with the same sharding.
      scales: 4 bytes per block, 6 with `fp8`. AdamW has 2.06 bytes per parameter with `int8`, 2.09
        with `fp8` and 1.06 with `int4`.
      count: 4 bytes.

    Raises:
      ValueError: at init, a field named in `codec` that the state does not have.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> from optlab.linalg import codecs
      >>> tx = optlab.quantize_state(optax.adam(1e-3), codecs.int8())
      >>> optlab.state_bytes(tx, {"kernel": jnp.ones((1024, 1024))}) / 1024**2
      2.0625076293945312

    Deviations:
      Blocks run along the last axis, where the authors' run over the flattened tensor: a sharded
      leaf is coded where it is if the part a device holds is cut by whole blocks.

    References:
      Xi et al., COAT, arXiv:2410.19313, 2024. Dettmers et al., 8-bit Optimizers via Block-wise
      Quantization, arXiv:2110.02861, 2021. Li et al., Memory Efficient Optimizers with 4-bit
      States, arXiv:2309.01507, 2023.
    """
    name = "quantize_state"
    _checks.check_transform(name, "inner", inner)
    _checks.check_steps(name, 1, min_size=min_size)
    by_field = _by_field(name, codec, second_moments)
    required = tuple(codec) if isinstance(codec, Mapping) else ()
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        empty = not jax.tree.leaves(params)
        if not empty:
            _check_found(name, state, required)
        scales = {} if empty else _chosen(state, by_field, second_moments, min_size)
        # Or XLA folds the codes of zeros under `jax.jit`: seconds for a leaf of 500,000.
        state = state if empty else jax.lax.optimization_barrier(state)
        coded, scales = _encoded(state, scales, None)
        # `optax.tree.map_params` takes the state of a tree without leaves for a prefix of any.
        none = jnp.zeros([], jnp.int32)
        return QuantizeState(jnp.zeros([], jnp.int32), coded, none if empty else scales)

    def update(updates, state, params=None, **extra_args):
        scales = state.scales if isinstance(state.scales, dict) else {}
        count = _leafwise.increment(state.count)
        updates, new = inner.update(updates, _decoded(state.inner, scales), params, **extra_args)
        key = jax.random.fold_in(jax.random.key(seed), count) if stochastic else None
        coded, new_scales = _encoded(new, scales, key)
        return updates, QuantizeState(count, coded, new_scales if scales else state.scales)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_field(name: str, codec: Any, second_moments: Any) -> Mapping[str, Codec]:
    if not (isinstance(second_moments, tuple) and all(isinstance(x, str) for x in second_moments)):
        must = "a tuple of names"
        raise _checks.refusal(TypeError, name, "second_moments", must, second_moments)
    if isinstance(codec, Codec):
        return MappingProxyType(dict.fromkeys((*FIRST_MOMENTS, *second_moments), codec))
    known = isinstance(codec, Mapping) and all(isinstance(c, Codec) for c in codec.values())
    if not known:
        must, fix = "a codec, or a dict of codecs by field", " Write optlab.codecs.int8()."
        raise _checks.refusal(TypeError, name, "codec", must, codec, fix)
    return MappingProxyType(dict(codec))


def _fields_of(key_path: tuple[Any, ...]) -> list[str]:
    return [key.name for key in key_path if isinstance(key, GetAttrKey)]


def _check_found(name: str, state: Any, required: tuple[str, ...]) -> None:
    """Refuse the name of a field that is nowhere in the state."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    fields = dict.fromkeys(field for key_path, _ in flat for field in _fields_of(key_path))
    for field in required:
        if field not in fields:
            raise ValueError(
                f"{name}: inner's state has no field {field!r}, got {', '.join(fields) or 'none'}. "
                "Name one of these."
            )


def _chosen(
    state: Any, by_field: Mapping[str, Codec], second_moments: tuple[str, ...], min_size: int
) -> dict[str, Scales]:
    """Return how to read each leaf that is to be coded, still without numbers."""
    chosen = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(state):
        field = next((f for f in _fields_of(key_path) if f in by_field), None)
        if field is not None and _codable(leaf, by_field[field], min_size):
            signed = field not in second_moments
            how = Scales((), by_field[field], signed, leaf.shape[-1], jnp.dtype(leaf.dtype))
            chosen[_layout.path_str(key_path)] = how
    return chosen


def _codable(leaf: Any, codec: Codec, min_size: int) -> bool:
    """Tell whether a leaf is large enough, and smaller in codes."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if not floating or not leaf.ndim or leaf.size < min_size:
        return False
    shape = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return _nbytes(jax.eval_shape(codec.encode, shape)) < _nbytes(leaf)


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _decoded(state: Any, scales: dict[str, Scales]) -> Any:
    def read(key_path, leaf):
        how = scales.get(_layout.path_str(key_path))
        if how is None:
            return leaf

        def decode(codes, *arrays):
            x = how.codec.decode(Coded(codes, arrays), how.length, signed=how.signed)
            return x.astype(how.dtype)

        return partitioned(decode, _spec(leaf), leaf, *how.arrays)

    return jax.tree_util.tree_map_with_path(read, state)


def _encoded(
    state: Any, scales: dict[str, Scales], key: jax.Array | None
) -> tuple[Any, dict[str, Scales]]:
    """Return the state with codes, and how to read them now."""
    places = {path: index for index, path in enumerate(scales)}
    new = {}

    def write(key_path, leaf):
        path = _layout.path_str(key_path)
        if path not in scales:
            return leaf
        how = scales[path]
        draw = () if key is None else (jax.random.fold_in(key, places[path]),)

        def encode(x, *draw):
            uniform = jax.random.uniform(draw[0], x.shape) if draw else None
            return how.codec.encode(x, signed=how.signed, uniform=uniform)

        coded = partitioned(encode, _coded_specs(how.codec, leaf), leaf, *draw)
        new[path] = dataclasses.replace(how, arrays=coded.scales)
        return coded.codes

    return jax.tree_util.tree_map_with_path(write, state), new


def _spec(x: Any) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _coded_specs(codec: Codec, x: jax.Array) -> Coded:
    """Return where codes and scales lie: as the leaf, along the axes that the devices divide."""
    where = jax.typeof(x).sharding
    shapes = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return jax.tree.map(lambda coded: divided(where.spec, coded.shape, where.mesh), shapes)


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_layout.path_str(k), x) for k, x in jax.tree_util.tree_leaves_with_path(tree)]
