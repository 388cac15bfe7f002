"""What loops written in Flax need: a TrainState that forwards, inputs of layers by their names.

Flax is no dependency of optlab: import this module only where it is installed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import nnx
from flax.training import train_state

from optlab.transforms.input_gram import conv_input_gram, input_gram

_DENSE = (nn.Dense, nnx.Linear)
_CONV = (nn.Conv, nnx.Conv)
Inputs = dict[str, tuple[Any, jax.Array]]


class TrainState(train_state.TrainState):
    """Linen's TrainState whose `apply_gradients` hands extra arguments on to the optimizer.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> from optlab.flax import TrainState
      >>> tx = optlab.sophia(0.1, weight_decay=0.0)
      >>> p = {"w": jnp.ones(1)}
      >>> state = TrainState.create(apply_fn=None, params=p, tx=tx)
      >>> state = state.apply_gradients(grads=p, curvature={"w": jnp.array([8.0])})
      >>> print(state.params["w"])
      [0.9]
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Step; a keyword that is no field of the state is an extra argument of `tx.update`."""
        names = {field.name for field in dataclasses.fields(self)}
        fields = {key: value for key, value in kwargs.items() if key in names}
        extra = {key: value for key, value in kwargs.items() if key not in names}
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **extra)
        bound = optax.GradientTransformation(self.tx.init, update)
        new = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **fields)
        return new.replace(tx=fields.get("tx", self.tx))


def layer_input_gram(layer: Any, x: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Return the second moment of a Flax layer's inputs.

    Args:
      layer: `Dense` or `Conv` of Linen, `Linear` or `Conv` of NNX; its padding, strides, dilations
        and groups are read.
      x: what it is called with.
      axis_name: mapped axis over which the batch is split.

    Returns:
      The leaf's entry of `input_gram=`; see `optlab.input_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optlab.flax import layer_input_gram
      >>> print(layer_input_gram(nn.Dense(3), 2 * jnp.ones((4, 1))))
      [[4.]]
    """
    if isinstance(layer, _DENSE):
        return input_gram(x, axis_name=axis_name)
    if not isinstance(layer, _CONV):
        raise TypeError(
            f"layer_input_gram: layer must be a Dense, Linear or Conv, got {type(layer).__name__}. "
            "Compute optlab.input_gram or optlab.conv_input_gram of its input yourself."
        )
    size = layer.kernel_size
    return conv_input_gram(
        x,
        (size,) if isinstance(size, int) else size,
        strides=layer.strides,
        padding=layer.padding,
        dilation=layer.kernel_dilation,
        input_dilation=layer.input_dilation,
        groups=layer.feature_group_count,
        axis_name=axis_name,
    )


def _record(inputs: Inputs, name: str, layer: Any, x: jax.Array) -> None:
    if name in inputs:
        raise ValueError(
            f"with_input_grams: layer {name!r} is called more than once, so its input is not one. "
            "Average optlab.flax.layer_input_gram of its inputs yourself."
        )
    inputs[name] = layer, x


@contextlib.contextmanager
def _linen(names: tuple[str, ...]) -> Iterator[Inputs]:
    inputs: Inputs = {}

    def intercept(call, args, kwargs, context):
        name = "/".join(context.module.path)
        if context.method_name == "__call__" and name in names:
            _record(inputs, name, context.module, args[0] if args else kwargs["inputs"])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield inputs


# Who is told of the calls of one object, while `_nnx` listens.
_LISTENERS: dict[int, Callable[[jax.Array], None]] = {}


@functools.cache
def _recording(layer_type: type) -> type:
    """Return a layer's class that tells its listener; once, as each class becomes a pytree."""

    def call(self, inputs, *args, **kwargs):
        if id(self) in _LISTENERS:
            _LISTENERS[id(self)](inputs)
        return layer_type.__call__(self, inputs, *args, **kwargs)

    return type(layer_type.__name__, (layer_type,), {"__call__": call})


@contextlib.contextmanager
def _nnx(model: nnx.Module, names: tuple[str, ...]) -> Iterator[Inputs]:
    inputs: Inputs = {}
    found = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(model)}
    layers = {name: found[name] for name in names if name in found}
    types = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            # Python looks a call up on the class; NNX has no interception of its own.
            object.__setattr__(layer, "__class__", _recording(types[name]))
            _LISTENERS[id(layer)] = functools.partial(_record, inputs, name, layer)
        yield inputs
    finally:
        for name, layer in layers.items():
            object.__setattr__(layer, "__class__", types[name])
            _LISTENERS.pop(id(layer), None)


def with_input_grams(
    model: Callable[..., Any], *names: str, axis_name: str | None = None
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Return the model as a function that gives its output and its layers' input Grams.

    Args:
      model: an NNX module, or Linen's `model.apply` or any function that calls it.
      names: paths of Dense, Linear or Conv layers in the model, "encoder/conv1"; each called once,
        and not inside a transformed layer (`remat`, `scan`), whose inputs cannot leave it.
      axis_name: mapped axis of `jax.shard_map` or `jax.pmap` over which the batch is split.

    Returns:
      A function of the model's arguments, to (output, {path of a kernel: Gram}); the latter is
      the extra argument `input_gram` of `optlab.precondition_by_input_gram`. Inside a loss
      function, return it as `aux`.

    Raises:
      ValueError: at the call, a name that is no layer's, or is called twice.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optlab.flax import with_input_grams
      >>> model, x = nn.Sequential([nn.Dense(3), nn.relu]), 2 * jnp.ones((4, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, grams = with_input_grams(model.apply, "layers_0")(variables, x)
      >>> print(grams)
      {'layers_0/kernel': Array([[4.]], dtype=float32)}
    """

    def call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        recorder = _nnx(model, names) if isinstance(model, nnx.Module) else _linen(names)
        with recorder as inputs:
            out = model(*args, **kwargs)
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(
                f"with_input_grams: no layer called {missing[0]!r} was called. "
                "Give paths as in the parameters, without 'kernel'."
            )
        grams = {
            f"{name}/kernel": layer_input_gram(layer, x, axis_name=axis_name)
            for name, (layer, x) in inputs.items()
        }
        return out, grams

    return call
