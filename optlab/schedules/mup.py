"""Maximal update parametrization: what to multiply, leaf by leaf, so that rates carry over."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from optlab import _checks
from optlab import layout as _layout
from optlab.schedules.layerwise import named_leaves
from optlab.transforms.shape_scale import ShapeMode, resolve_shape_mode

_NAME = "mup_multipliers"


class MupMultipliers(NamedTuple):
    """Trees of numbers, one per leaf, from the base model to this one."""

    rates: Any  # of the learning rate
    decay: Any  # of the weight decay that is multiplied by the rate
    init: Any  # of the first weights, as Flax's default initializers make them
    forward: Any  # of the weights where the model uses them


class DepthFactors(NamedTuple):
    """Factors of `depth_factors`."""

    branch: float  # of every residual branch where it is added
    rate: float  # of Adam's rate, for hidden weights


@_checks.explain_calls
def depth_factors(layers: int, base_layers: int, *, alpha: float = 0.5) -> DepthFactors:
    """Return the factors with which a rate carries over in depth as well.

    branch = (L/L0)^-alpha, of what every residual branch adds;  rate = (L/L0)^(alpha - 1), of
    Adam's rate for hidden weights. alpha = 1/2 is Depth-muP, 1 is CompleteP, which also multiplies
    Adam's eps by (L/L0)^-1. Unconfirmed: no primary source was checked.

    Args:
      layers: L.
      base_layers: L0, where the rate was found.
      alpha: 1/2 to 1.

    Returns:
      (branch, rate); give it to `mup_multipliers`, and multiply the branches in the model.

    Example:
      >>> import optlab
      >>> print(optlab.depth_factors(16, 4))
      DepthFactors(branch=0.5, rate=0.5)

    References:
      Yang et al., Tensor Programs VI (Depth-muP), arXiv:2310.02244, 2023.
      Dey et al., CompleteP, arXiv:2505.01618, 2025.
    """
    _checks.check_steps("depth_factors", 1, layers=layers, base_layers=base_layers)
    _checks.check_range("depth_factors", "a number in [0, 1]", lambda x: 0 <= x <= 1, alpha=alpha)
    ratio = layers / base_layers
    return DepthFactors(ratio**-alpha, ratio ** (alpha - 1))


class _Growth(NamedTuple):
    """How one leaf grows from the base model: the ratio of each side, and whether it grows."""

    inputs: float
    outputs: float
    inputs_grow: bool
    outputs_grow: bool
    role: str
    dims: tuple[int, int]
    base_dims: tuple[int, int]

    @property
    def is_readout(self) -> bool:
        return self.inputs_grow and not self.outputs_grow

    @property
    def is_hidden(self) -> bool:
        return self.inputs_grow and self.outputs_grow


def _shapes(path: str, leaf: Any, base: Any, delta: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one leaf in the three models."""
    for what, tree in (("base_shapes", base), ("delta_shapes", delta)):
        if tree is None:
            continue
        if path not in tree or np.ndim(tree[path]) != np.ndim(leaf):
            found = f"shape {np.shape(tree[path])}" if path in tree else "no such leaf"
            raise ValueError(
                f"{_NAME}: leaf '{path}' has shape {np.shape(leaf)}, {what} has {found}. "
                "Build all models alike, of the same depth: their widths alone differ."
            )
    shape, narrow = np.shape(leaf), np.shape(base[path])
    return shape, narrow, shape if delta is None else np.shape(delta[path])


def _growth(path: str, leaf: Any, base: Any, delta: Any, layout: _layout.Policy) -> _Growth:
    """Compare one leaf with the base model's; what has no view, biases and gains, is an output."""
    shape, narrow, other = _shapes(path, leaf, base, delta)
    grows = [a != b for a, b in zip(narrow, other, strict=True)]
    ratios = [a / max(b, 1) if g else 1.0 for a, b, g in zip(shape, narrow, grows, strict=True)]
    view = _layout.view_of(path, leaf, layout)
    rows, cols = ((), tuple(range(len(shape)))) if view is None else (view.rows, view.cols)
    product = lambda axes: math.prod(ratios[i] for i in axes)  # noqa: E731
    either = lambda axes: any(grows[i] for i in axes)  # noqa: E731
    dims = (0, 0) if view is None else view.dims(shape)
    base_dims = (0, 0) if view is None else view.dims(narrow)
    role = "vector" if view is None else view.role
    return _Growth(product(rows), product(cols), either(rows), either(cols), role, dims, base_dims)


def _adam(g: _Growth, mode: Callable) -> float:
    del mode
    return 1 / g.inputs


def _sgd(g: _Growth, mode: Callable) -> float:
    del mode
    return g.outputs / g.inputs


def _muon(g: _Growth, mode: Callable) -> float:
    """Spectral norm sqrt(n/m), less what Muon's own factor of the shape does already."""
    if g.role != "matrix" or not all(g.dims):
        return _adam(g, mode)
    return math.sqrt(g.outputs / g.inputs) * mode(*g.base_dims) / mode(*g.dims)


# Of a readout without a factor in the model. A factor c in the model makes the step of the product
# c times as large, and its gradient as well, which SGD alone sees: hence the powers.
_RULES: dict[str, tuple[Callable[[_Growth, Callable], float], int]] = {
    "adam": (_adam, 1),
    "lion": (_adam, 1),
    "muon": (_muon, 1),
    "sgd": (_sgd, 2),
}


def _init(g: _Growth, readout: str) -> float:
    if g.is_readout:
        return math.sqrt(g.inputs) if readout == "forward" else 1 / math.sqrt(g.inputs)
    # Flax draws embeddings with a deviation of 1/sqrt(features): their size must not shrink.
    return math.sqrt(g.outputs) if g.role == "embedding" else 1.0


def _check_depth(depth: Any, delta_shapes: Any, optimizer: str) -> None:
    if depth is None:
        return
    if not isinstance(depth, DepthFactors):
        must, fix = "the result of depth_factors", " Write depth_factors(layers, base_layers)."
        raise _checks.refusal(TypeError, _NAME, "depth", must, depth, fix)
    if delta_shapes is None:
        must, fix = "a tree of shapes where depth is given", " It tells which weights are hidden."
        raise _checks.refusal(ValueError, _NAME, "delta_shapes", must, delta_shapes, fix)
    if optimizer not in ("adam", "lion"):
        must, fix = "None: only Adam's rule is known", ""
        raise _checks.refusal(ValueError, _NAME, "depth", must, depth, fix)


@_checks.explain_calls
def mup_multipliers(
    shapes: Any,
    base_shapes: Any,
    delta_shapes: Any = None,
    *,
    optimizer: str = "adam",
    readout: str = "forward",
    decoupled_decay: bool = False,
    shape_mode: ShapeMode = "keller",
    depth: DepthFactors | None = None,
    layout: _layout.Policy = _layout.flax,
) -> MupMultipliers:
    """Return what to multiply so that a rate found on a narrow model is right for a wide one.

    With m, n the ratios of the input and of the output side of a leaf to the base model's, 1 where
    a side does not grow, the rate is multiplied by

      | leaf                                     | grows  | adam, lion | sgd |
      |------------------------------------------|--------|------------|-----|
      | input weights, embeddings, biases, gains | n      | 1          | n   |
      | hidden weights                           | m, n   | 1/m        | n/m |
      | readout, times 1/m in the model          | m      | 1          | m   |
      | the rest                                 | none   | 1          | 1   |

    as microsoft/mup has it. Muon's matrices get sqrt(n/m) over the growth of its own factor of the
    shape: 1 for matrices that keep their proportions, what it hands to Adam gets Adam's row. The
    rates of all methods of signs are Lion's.

    Four trees are returned, all 1 for the base model itself:
      rates    for `scale_by_rates`, placed last;
      decay    1/rates, for a decay that is multiplied by the rate, so that their product stays; 1
               with `decoupled_decay`. `scale_by_rates` placed before `optax.add_decayed_weights`
               does the same without it;
      init     for the first weights: sqrt(m) for the readout, and sqrt(n) for embeddings, whose
               size Flax lets shrink; PyTorch does not, and `layout.output_first` sees none;
      forward  for weights where the model uses them: 1/m for the readout. In a model whose readout
               is tied to the embedding multiply the logits by 1/m yourself.
    The readout may as well start at zero, which the paper advises: a random one is most of what a
    narrow model's logits move by, and fades with the width.
    With readout="rate" the model is left as it is (forward is 1) and the readout gets 1/m times the
    rate, also SGD's, and 1/sqrt(m) times the weights (Table 3 of the paper): the same function and
    training, but for Adam's eps.

    Two things no tree can say: logits of attention are to be divided by the size of a head, not by
    its root, where heads grow; and Adam's eps should shrink like 1/m for hidden weights
    (unconfirmed).

    Args:
      shapes: arrays or shapes of the model to be trained, e.g. of `nnx.eval_shape`.
      base_shapes: those of the narrow model, on which the rate was found.
      delta_shapes: those of a third width: an axis of which it differs from the base grows. None:
        an axis in which `shapes` differs does, which is wrong where, say, the vocabulary differs.
      optimizer: "adam", "lion", "sgd" or "muon".
      readout: "forward" (the authors' code) or "rate".
      decoupled_decay: weight decay is not multiplied by the rate.
      shape_mode: the factor of the shape in Muon's updates: "keller", "moonlight", "spectral" or a
        function, as given to `muon(scale=...)`.
      depth: factors of `depth_factors`, for the hidden weights; for "adam" and "lion".
      layout: which axes are inputs and outputs.

    Returns:
      MupMultipliers(rates, decay, init, forward), trees like `shapes` of numbers.

    Raises:
      ValueError: a leaf that the base has not, or in another rank; it is named.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optlab
      >>> from flax import nnx
      >>> class Net(nnx.Module):
      ...     def __init__(self, width):
      ...         rngs = nnx.Rngs(0)
      ...         self.first = nnx.Linear(3, width, rngs=rngs)
      ...         self.hidden = nnx.Linear(width, width, rngs=rngs)
      ...         self.head = nnx.Linear(width, 2, use_bias=False, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.head(jnp.tanh(self.hidden(jnp.tanh(self.first(x)))))
      >>> def shapes(width):
      ...     return nnx.state(nnx.eval_shape(lambda: Net(width)), nnx.Param)
      >>> mup = optlab.mup_multipliers(shapes(64), shapes(8))
      >>> print(mup.rates.hidden.kernel.get_value(), mup.forward.head.kernel.get_value())
      0.125 0.125
      >>> times = lambda a, b: jax.tree.map(jnp.multiply, a, b)
      >>> structure, params = nnx.split(Net(64), nnx.Param)
      >>> params = times(params, mup.init)
      >>> tx = optax.chain(optax.adam(0.1), optlab.scale_by_rates(mup.rates))
      >>> def loss(params, x):
      ...     return jnp.sum(nnx.merge(structure, times(params, mup.forward))(x) ** 2)
      >>> grads = jax.grad(loss)(params, jnp.ones((1, 3)))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(round(float(jnp.abs(updates.hidden.kernel[...]).max()), 4))
      0.0125

    References:
      Yang & Hu, Feature learning in infinite-width neural networks, arXiv:2011.14522, 2020.
      Yang et al., Tensor Programs V, arXiv:2203.03466, 2022 (Tables 3 and 8); microsoft/mup.
    """
    _checks.check_choice(_NAME, "optimizer", optimizer, tuple(_RULES))
    _checks.check_choice(_NAME, "readout", readout, ("forward", "rate"))
    _checks.check_callable(_NAME, layout=layout)
    _check_depth(depth, delta_shapes, optimizer)
    mode = resolve_shape_mode(_NAME, "shape_mode", shape_mode)
    base = named_leaves(base_shapes)
    delta = None if delta_shapes is None else named_leaves(delta_shapes)
    rule, power = _RULES[optimizer]

    def one(key_path: Any, leaf: Any) -> MupMultipliers:
        g = _growth(_layout.path_str(key_path), leaf, base, delta, layout)
        in_model = g.inputs if g.is_readout and readout == "forward" else 1.0
        rate = rule(g, mode) * in_model**power
        rate *= depth.rate if depth is not None and g.is_hidden else 1.0
        decay = 1.0 if decoupled_decay else 1 / rate
        return MupMultipliers(rate, decay, _init(g, readout), 1 / in_model)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    columns = zip(*(one(*leaf) for leaf in leaves), strict=True) if leaves else ((),) * 4
    return MupMultipliers(*(jax.tree.unflatten(treedef, list(column)) for column in columns))
