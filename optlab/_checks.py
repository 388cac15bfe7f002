"""Checks of hyperparameters at construction, one sentence for all."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

F = TypeVar("F", bound=Callable[..., Any])

_TORCH_WORDS = {
    "lr": "learning_rate",
    "betas": "b1 and b2",
    "beta1": "b1",
    "beta2": "b2",
    "mask": "weight_decay_mask",
    "trust_coeff": "trust_coefficient",
    "wd": "weight_decay",
}


def refusal(
    kind: type[Exception], name: str, argument: str, must: str, value: Any, fix: str = ""
) -> Exception:
    """Return the one error of a wrong argument; `explain_calls` gives it the name of the call."""
    shape = getattr(value, "shape", ())
    got = f"an array of shape {shape}" if shape else repr(value)
    text = f"{argument} must be {must}, got {got}.{fix}"
    error = kind(f"{name}: {text}")
    error.refused = argument, text  # type: ignore[attr-defined]
    return error


def check_takes(name: str, argument: str, what: str, value: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with one argument, `what`."""
    try:
        inspect.signature(value).bind(what)
    except TypeError as error:
        fix = f" It says: {error}. Write it as lambda {what}: ..."
        must = f"a function of {what}"
        raise refusal(TypeError, name, argument, must, value, fix) from None
    except ValueError:
        pass  # a builtin without a signature


def _number(
    name: str, argument: str, must: str, value: Any, *, schedule: bool = False
) -> float | None:
    """Return a Python number to check, or None for what is known only inside jit."""
    if isinstance(value, jax.Array) and value.ndim == 0:
        return None  # an injected hyperparameter
    if schedule and callable(value):
        return check_takes(name, argument, "step", value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refusal(TypeError, name, argument, must, value)
    return float(value)


def check_range(
    name: str,
    must: str,
    accept: Callable[[float], bool],
    *,
    schedule: bool = False,
    **arguments: Any,
) -> None:
    """Refuse an argument that is no number, nor a schedule where one may be, or out of range."""
    must += " or a schedule" if schedule else ""
    for argument, value in arguments.items():
        number = _number(name, argument, must, value, schedule=schedule)
        if number is not None and not accept(number):
            raise refusal(ValueError, name, argument, must, value)


def check_decay(name: str, **arguments: Any) -> None:
    """Averages forget: their rates lie in [0, 1)."""
    check_range(name, "a number in [0, 1)", lambda x: 0 <= x < 1, **arguments)


def check_nonnegative(name: str, *, schedule: bool = False, **arguments: Any) -> None:
    """Refuse negative, infinite and missing numbers."""
    accept = lambda x: 0 <= x < float("inf")  # noqa: E731
    check_range(name, "a number >= 0", accept, schedule=schedule, **arguments)


def check_positive(name: str, *, schedule: bool = False, **arguments: Any) -> None:
    """Refuse numbers that are not above zero."""
    accept = lambda x: 0 < x < float("inf")  # noqa: E731
    check_range(name, "a number > 0", accept, schedule=schedule, **arguments)


def check_dtype(name: str, **arguments: Any) -> None:
    """Refuse what is not a floating dtype or None."""
    for argument, value in arguments.items():
        must = "a floating dtype or None"
        try:
            good = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError as error:
            raise refusal(TypeError, name, argument, must, value) from error
        if not good:
            raise refusal(ValueError, name, argument, must, value)


def check_choice(name: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices, and say the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        fix = f" Did you mean {near[0]!r}?" if near else ""
        must = f"one of {', '.join(map(repr, choices))}"
        raise refusal(ValueError, name, argument, must, value, fix)


def check_steps(name: str, least: int = 0, **arguments: Any) -> None:
    """Refuse what is not a whole number of steps."""
    for argument, value in arguments.items():
        must = f"a whole number >= {least}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise refusal(TypeError, name, argument, must, value)
        if value < least:
            raise refusal(ValueError, name, argument, must, value)


def check_callable(name: str, **arguments: Any) -> None:
    """Refuse what cannot be called, where a function or None is needed."""
    for argument, value in arguments.items():
        if value is not None and not callable(value):
            raise refusal(TypeError, name, argument, "a function or None", value)


def check_transform(name: str, argument: str, value: Any) -> None:
    """Refuse what is not an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        fix = " Build it first, e.g. optax.scale_by_adam()."
        raise refusal(TypeError, name, argument, "an optax.GradientTransformation", value, fix)


def _check_call(fn: Callable, signature: inspect.Signature, args: tuple, kwargs: dict) -> None:
    known = list(signature.parameters)
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = _TORCH_WORDS.get(key) or (near[0] if near else None)
            text = f"unknown keyword {key!r}." + (f" Did you mean {hint}?" if hint else "")
            raise TypeError(f"{fn.__name__}: {text} It takes {', '.join(known)}.")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        bare = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        plain = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        raise TypeError(f"{fn.__name__}: {error}. Call {fn.__name__}{plain}.") from None


def explain_calls(fn: F) -> F:
    """Make a wrong call of `fn` name `fn`, the argument and the fix.

    An argument that `fn` hands on to a link is refused in the name of `fn`, which the caller knows.
    """
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _check_call(fn, signature, args, kwargs)
        try:
            return fn(*args, **kwargs)
        except (TypeError, ValueError) as error:
            argument, text = getattr(error, "refused", (None, ""))
            if argument not in signature.parameters or str(error).startswith(fn.__name__):
                raise
            named = type(error)(f"{fn.__name__}: {text}")
            named.refused = argument, text  # type: ignore[attr-defined]
            raise named from None

    return wrapper  # type: ignore[return-value]
