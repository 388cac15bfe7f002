"""Every row of the catalogue keeps every promise of the contract that applies to it."""

import functools

import catalog
import jax
import pytest
from stepping import FULL

from optlab.testing import checks_for, run_check

ROWS = [
    # Row by row: the checks of a row share its compiled step, and xdist hands out neighbours.
    pytest.param(case, check, id=f"{case.name}-{check}")
    for case in catalog.CASES
    for check in checks_for(case.selectors)
]


@pytest.mark.parametrize(("case", "check"), ROWS)
def test_contract(case, check, monkeypatch):
    # Newton-Schulz raises a rounding of a small singular value by up to 3.4445^5 = 485.
    if "iterated" in case.tags:
        monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FULL))
    run_check(case, check)
