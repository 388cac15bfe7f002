"""Running checks: selection by tags, known failures, one error form."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from optlab.testing import composition, functional, laws, sharding, training, trees, types
from optlab.testing.case import Case, Make, Tree, default_params

_GROUPS = (types, functional, trees, composition, sharding, training, laws)

CHECKS: Mapping[str, Any] = {
    name.removeprefix("check_"): getattr(group, name) for group in _GROUPS for name in group.__all__
}
"""Every check by its name."""


def checks_for(tags: Iterable[str]) -> list[str]:
    """Return the names of the checks that apply to something with these tags and facts."""
    tags = frozenset(tags)
    return [name for name, check in CHECKS.items() if check.applies.to(tags)]


def run_check(case: Case, name: str) -> None:
    """Run one check; a known failure has to fail.

    Raises:
        AssertionError: names the case, the check, the claim, and what was found.
    """
    claim = CHECKS[name].__doc__
    known = case.xfail.get(name)
    try:
        _run(CHECKS[name], case)
    except Exception as error:
        if known is None:
            found = str(error) if isinstance(error, AssertionError) else repr(error)
            raise AssertionError(f"{case.name}: {name}: {found}. Claim: {claim}") from error
        return
    if known is not None:
        raise AssertionError(f"{case.name}: {name}: listed in xfail ({known}) and passes.")


def _run(check: Any, case: Case) -> None:
    if "iterated" in case.tags and check.applies.two_programs:
        with jax.enable_x64(True):
            check(case.in_float64)
    else:
        check(case)


def check_transform(
    make: Make,
    *,
    tags: Iterable[str] = (),
    tree: Callable[[], Tree] | Tree | None = None,
    hits: Iterable[str] | Callable[[str], bool] | None = None,
    facts: Mapping[str, Any] | None = None,
    fallback: Callable[[], Any] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> None:
    """Run every check that applies to a transformation and raise at the first that fails.

    Args:
        make: `make(**hyperparameters)` builds the transformation; annotations of its arguments
            say which can be injected.
        tags: what the method promises: `recipe`, `wrapper`, `needs_params`, `stateless`, and the
            roles `sign`, `radial`, `clip`, `trust_ratio`, `elementwise`, `layerwise`, `schedule`.
            With `iterated`, as Newton-Schulz is, which raises a rounding of a small singular value
            by up to 485, two programs of a step are compared in float64.
        tree: parameters to run on, or a function that builds them. The default has leaves of
            rank 0 to 4 under Flax's names.
        hits: paths of the leaves the method really transforms, or a predicate of the path.
        facts: numbers to check the method against, e.g. `{"state_bytes": 4.0}`; see `Case`.
        fallback: builds what other leaves get, for wrappers and routed methods.
        xfail: checks known to fail, each with the reason.

    Raises:
        AssertionError: names the check, the claim, and what was found.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from optlab.testing import check_transform
        >>> tree = {"dense": {"kernel": jnp.ones((8, 8))}}
        >>> check_transform(optax.scale_by_sign, tags={"stateless", "elementwise"}, tree=tree)
    """
    name = getattr(make, "__name__", None) or getattr(make, "func", make).__name__
    given: dict[str, Any] = {"hits": hits, "facts": facts, "fallback": fallback, "xfail": xfail}
    kept = {key: value for key, value in given.items() if value is not None}
    params = default_params if tree is None else tree if callable(tree) else lambda: tree
    case = Case(name, make, frozenset(tags), params, **kept)
    for check in checks_for(case.selectors):
        run_check(case, check)
