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


def _refuse(name: str, argument: str, must: str, value: Any) -> ValueError:
    return ValueError(f"{name}: {argument} must be {must}, got {value!r}.")


def check_takes(name: str, argument: str, what: str, value: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with one argument, `what`."""
    try:
        inspect.signature(value).bind(what)
    except TypeError as error:
        raise TypeError(
            f"{name}: {argument} must be a function of {what}, got {value!r} ({error}). "
            f"Write it as lambda {what}: ..."
        ) from None
    except ValueError:
        pass  # a builtin without a signature


def _number(
    name: str, argument: str, must: str, value: Any, *, schedule: bool = False
) -> float | None:
    """Return a Python number to check, or None for what is known only inside jit."""
    if isinstance(value, jax.Array) and value.ndim == 0:
        return None  # an injected hyperparameter
    if hasattr(value, "shape") and value.shape:
        raise TypeError(f"{name}: {argument} must be {must}, got an array of shape {value.shape}.")
    if schedule and callable(value):
        return check_takes(name, argument, "step", value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {argument} must be {must}, got {value!r}.")
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
            raise _refuse(name, argument, must, value)


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
            raise TypeError(f"{name}: {argument} must be {must}, got {value!r}.") from error
        if not good:
            raise _refuse(name, argument, must, value)


def check_choice(name: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices, and say the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        raise ValueError(
            f"{name}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )


def check_steps(name: str, least: int = 0, **arguments: Any) -> None:
    """Refuse what is not a whole number of steps."""
    for argument, value in arguments.items():
        must = f"a whole number >= {least}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: {argument} must be {must}, got {value!r}.")
        if value < least:
            raise _refuse(name, argument, must, value)


def check_callable(name: str, **arguments: Any) -> None:
    """Refuse what cannot be called, where a function or None is needed."""
    for argument, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}: {argument} must be a function or None, got {value!r}.")


def check_transform(name: str, argument: str, value: Any) -> None:
    """Refuse what is not an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(
            f"{name}: {argument} must be an optax.GradientTransformation, got {value!r}. "
            "Build it first, e.g. optax.scale_by_adam()."
        )


def explain_keywords(fn: F) -> F:
    """Make a wrong call of `fn` name the function, the argument and the word to use."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs:
            if key not in signature.parameters:
                known = list(signature.parameters)
                near = difflib.get_close_matches(key, known, 1)
                hint = _TORCH_WORDS.get(key) or (near[0] if near else None)
                raise TypeError(
                    f"{fn.__name__}: unknown keyword {key!r}."
                    + (f" Did you mean {hint}?" if hint else "")
                    + f" It takes {', '.join(known)}."
                )
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            plain = signature.replace(
                parameters=[
                    p.replace(annotation=inspect.Parameter.empty)
                    for p in signature.parameters.values()
                ],
                return_annotation=inspect.Signature.empty,
            )
            raise TypeError(f"{fn.__name__}: {error}. Call {fn.__name__}{plain}.") from None
        return fn(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
