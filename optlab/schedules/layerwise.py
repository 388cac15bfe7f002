"""Rates that differ from leaf to leaf: trees of factors, and the one link that applies them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout

Rule = Mapping[str, Any] | Sequence[str] | Callable[[str, Any], Any]
"""Expressions and their factors; expressions from bottom to top; or (path, leaf) -> factor."""

# ULMFiT's, from one layer to the next below.
_DISCRIMINATIVE = 1 / 2.6
_NORMS = r"norm|(^|/)(ln|bn|gn)(_|\d|/|$)"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, the same in boxes and out of them."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {_layout.path_str(path): leaf for path, leaf in flat}


def compile_groups(name: str, argument: str, groups: Any) -> tuple[re.Pattern[str], ...]:
    """Return the expressions of a list, which must be different ones."""
    must = "a list of regular expressions"
    if isinstance(groups, str) or not isinstance(groups, Sequence) or not groups:
        fix = ' Write for example ["embed", "blocks/0/", "head"].'
        raise _checks.refusal(TypeError, name, argument, must, groups, fix)
    if len(set(groups)) < len(groups):
        raise _checks.refusal(ValueError, name, argument, f"{must}, each once", groups)
    try:
        return tuple(re.compile(group) for group in groups)
    except (re.error, TypeError) as error:
        fix = f" It says: {error}. Escape what is meant literally."
        raise _checks.refusal(ValueError, name, argument, must, groups, fix) from None


def group_of(path: str, groups: tuple[re.Pattern[str], ...]) -> int:
    """Return the index of the first expression found in a path, or their number."""
    found = (i for i, group in enumerate(groups) if group.search(path))
    return next(found, len(groups))


def check_all_matched(name: str, paths: Any, groups: tuple[re.Pattern[str], ...]) -> None:
    """Refuse a leaf without an expression, and an expression without a leaf."""
    taken = {path: group_of(path, groups) for path in paths}
    alone = [path for path, index in taken.items() if index == len(groups)]
    if alone:
        raise ValueError(
            f"{name}: no expression is found in leaf '{alone[0]}'. "
            "Add one, or drop strict=True to leave it as it is."
        )
    idle = [group.pattern for i, group in enumerate(groups) if i not in taken.values()]
    if idle:
        raise ValueError(
            f"{name}: expression {idle[0]!r} has no leaf of its own; the paths are "
            f"{list(taken)[:3]}, .... Correct it, or put it before the one that takes its leaves."
        )


def _factors(name: str, rule: Any, decay: float | None) -> dict[str, Any]:
    """Return the factor of every expression."""
    if isinstance(rule, Mapping):
        if decay is not None:
            must = "None where rule has factors of its own"
            raise _checks.refusal(ValueError, name, "decay", must, decay)
        return dict(rule)
    decay = _DISCRIMINATIVE if decay is None else decay
    _checks.check_positive(name, decay=decay)
    return {group: decay ** (len(rule) - 1 - i) for i, group in enumerate(rule)}


@_checks.explain_calls
def layerwise_rates(
    params: Any, rule: Rule, *, decay: float | None = None, strict: bool = False
) -> Any:
    """Return a tree of factors, one per leaf, for `scale_by_rates`.

    From a mapping {expression: factor} a leaf gets the factor of the first expression found in its
    path, 1 where there is none. From a list of expressions, bottom to top, the n-th from the top
    gets decay^n: discriminative fine-tuning, "layer decay". From a function, what it returns.

    Two methods that are nothing but a call:

    SLCA's slow learner, a pretrained body a hundred times slower than the classifier (0 freezes
    it): `layerwise_rates(params, {"head": 1.0, "": 0.01})`. DePT's two rates, of the soft prompt
    and of the low-rank matrices, all else frozen:
    `layerwise_rates(params, {"prompt": 0.3, "lora_": 5e-4, "": 0.0})` under the rate 1.
    A factor of 0 still keeps optimizer state; `optax.partition` with `optax.set_to_zero` keeps
    none.

    Args:
      params: arrays or shapes, e.g. of `jax.eval_shape` or `nnx.eval_shape`.
      rule: a mapping, a list, or a function (path, leaf) -> factor. A factor is a number >= 0, or
        an array that broadcasts to the leaf, e.g. one number per layer of a stack.
      decay: of a list, from one group to the next below; None for ULMFiT's 1/2.6. Transformers are
        fine-tuned with 0.65 to 0.95.
      strict: refuse a leaf without an expression, and an expression without a leaf.

    Returns:
      A tree like `params` of numbers.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> params = {name: {"kernel": jnp.ones(2)} for name in ("embed", "block", "head")}
      >>> rates = optlab.layerwise_rates(params, ["embed", "block", "head"], decay=0.5)
      >>> print([rates[name]["kernel"] for name in params])
      [0.25, 0.5, 1.0]

    References:
      Howard & Ruder, ULMFiT, arXiv:1801.06146, 2018 (section 3.2).
      Zhang et al., SLCA, arXiv:2303.05118, 2023; GengDavid/SLCA.
      Shi & Lipani, DePT, arXiv:2309.05173, 2023; ZhengxiangShi/DecomposedPromptTuning.
    """
    name = "layerwise_rates"
    if callable(rule):
        map_leaf = lambda path, leaf: rule(_layout.path_str(path), leaf)  # noqa: E731
        return jax.tree_util.tree_map_with_path(map_leaf, params)
    keys = list(rule) if isinstance(rule, Mapping) else rule
    groups = compile_groups(name, "rule", keys)
    factors = [*_factors(name, rule, decay).values(), 1.0]
    if strict:
        check_all_matched(name, named_leaves(params), groups)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: factors[group_of(_layout.path_str(path), groups)], params
    )


def _factor(name: str, path: str, u: jax.Array, factors: dict[str, Any]) -> Any:
    """Return the factor of one leaf, which must broadcast to it."""
    if path not in factors:
        raise ValueError(
            f"{name}: leaf '{path}' has no multiplier. "
            "Build them for these very parameters: layerwise_rates(params, ...)."
        )
    factor = factors[path]
    if not hasattr(factor, "shape"):
        _checks.check_nonnegative(f"{name}: leaf '{path}'", multiplier=factor)
    shape = np.shape(factor)
    if shape and (len(shape) != u.ndim or any(a not in (1, b) for a, b in zip(shape, u.shape))):  # noqa: B905
        raise ValueError(
            f"{name}: the multiplier of leaf '{path}' has shape {shape}, the leaf {u.shape}. "
            "Give a number, or an array of the leaf's rank that broadcasts to it."
        )
    return jnp.asarray(factor, u.dtype)


@_checks.explain_calls
def scale_by_rates(multipliers: Any = None) -> optax.GradientTransformationExtraArgs:
    """Multiply every leaf by its own factor.

    u_i <- m_i u_i. Place it last, after weight decay and the learning rate, and all of a leaf's
    step is scaled, its decay too; placed before `optax.add_decayed_weights` it leaves decay alone.
    Factors that change while training come with each update and compile nothing anew.

    Args:
      multipliers: a tree of factors, such as `layerwise_rates`, `unit_rates` and `mup_multipliers`
        return, or a function from params to one: constants of the compiled program. None reads them
        from the extra argument `multipliers` of update. Leaves are found by their paths. (static)

    Returns:
      A stateless transformation.

    State:
      None.

    Raises:
      ValueError: a leaf has no multiplier, or one that does not broadcast to it; it is named.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> slow = optlab.scale_by_rates(optlab.layerwise_rates(params, {"body": 0.5}))
      >>> tx = optax.chain(optax.sgd(1.0), slow)
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> print(updates["body"], updates["head"])
      [-0.5 -0.5] [-1. -1.]
      >>> tx = optlab.scale_by_rates()
      >>> u, _ = tx.update(params, tx.init(params), multipliers={"body": 0.0, "head": 2.0})
      >>> print(u["body"], u["head"])
      [0. 0.] [2. 2.]
    """
    name = "scale_by_rates"
    if callable(multipliers):
        _checks.check_takes(name, "multipliers", "params", multipliers)

    def factors_of(tree: Any, extra_args: dict[str, Any]) -> dict[str, Any]:
        given = multipliers
        if given is None:
            given = _leafwise.read(name, extra_args, "multipliers")
        return named_leaves(given(tree) if callable(given) else given)

    def scaled(updates: Any, factors: dict[str, Any]) -> Any:
        leaf = lambda path, u, p: (u * _factor(name, path, u, factors),)  # noqa: E731
        return _leafwise.leafwise(name, leaf, updates)[0]

    def init(params):
        _leafwise.check_tree(name, params)
        if multipliers is not None:
            jax.eval_shape(lambda tree: scaled(tree, factors_of(params, {})), params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        return scaled(updates, factors_of(updates if params is None else params, extra_args)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _spread(values: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Return 2 for the least important and 0 for the most, 1 where all are equal."""
    span = high - low
    return jnp.where(span > 0, 2 * (high - values) / jnp.where(span > 0, span, 1), 1.0)


@_checks.explain_calls
def unit_rates(importance: Any, *, norms: str = _NORMS, domain: bool = False) -> Any:
    """Turn the importance of every tensor into a factor of its rate: ADEPT's rule.

    m = 2 (I_max - I)/(I_max - I_min), in [0, 2]: what matters for general ability learns slowly,
    and the most important tensor not at all. Norm layers take I_max and I_min over all tensors, the
    others over those that are no norms; all equal gives 1. ADEPT takes for I the mean of |w g|, g
    averaged over batches of general text:

    >>> import jax, jax.numpy as jnp
    >>> def importance(params, grads):
    ...     return jax.tree.map(lambda w, g: jnp.mean(jnp.abs(w * g)), params, grads)

    Measure it again now and then, and pass the factors as an extra argument to `scale_by_rates()`.

    Args:
      importance: a tree of scalars, one per tensor.
      norms: expression found in the paths of norm layers.
      domain: I was measured on the text to be learned: m = 2 (I - I_min)/(I_max - I_min).

    Returns:
      A tree of float32 scalars; can be called in jit.

    Example:
      >>> import optlab
      >>> rates = optlab.unit_rates({"mlp": 0.1, "attn": 0.3, "norm": 0.2})
      >>> print({name: float(rate) for name, rate in rates.items()})
      {'attn': 0.0, 'mlp': 2.0, 'norm': 1.0}

    References:
      ADEPT, arXiv:2510.10071, 2025; PuppyKnightUniversity/ADEPT.
    """
    name = "unit_rates"
    (pattern,) = compile_groups(name, "norms", [norms])
    named, treedef = named_leaves(importance), jax.tree.structure(importance)
    for path, x in named.items():
        if np.shape(x) != ():
            raise ValueError(
                f"{name}: the importance of leaf '{path}' has shape {np.shape(x)}. "
                "Give one number per tensor: its mean."
            )
    if not named:
        return importance
    values = jnp.stack([jnp.asarray(x, jnp.float32) for x in named.values()])
    is_norm = np.array([bool(pattern.search(path)) for path in named])
    of_norms = _spread(values, values.min(), values.max())
    others = values if is_norm.all() else values[~is_norm]
    rates = jnp.where(is_norm, of_norms, _spread(values, others.min(), others.max()))
    rates = 2 - rates if domain else rates
    return jax.tree.unflatten(treedef, list(rates))
