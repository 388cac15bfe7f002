"""Every row of the catalogue keeps every promise of the contract that applies to it."""

import catalog
import pytest

from optlab.testing import checks_for, run_check

ROWS = [
    # One worker per row: the compiled step and the operations of its tree are shared by checks.
    pytest.param(case, check, id=f"{case.name}-{check}", marks=pytest.mark.xdist_group(case.name))
    for case in catalog.CASES
    for check in checks_for(case.selectors)
]


@pytest.mark.parametrize(("case", "check"), ROWS)
def test_contract(case, check):
    run_check(case, check)
