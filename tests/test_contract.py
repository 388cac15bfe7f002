"""Every row of the catalogue keeps every promise of the contract that applies to it."""

import catalog
import pytest

from optlab.testing import checks_for, run_check

ROWS = [
    # Row by row: the checks of a row share its compiled step, and xdist hands out neighbours.
    pytest.param(case, check, id=f"{case.name}-{check}")
    for case in catalog.CASES
    for check in checks_for(case.selectors)
]


@pytest.mark.parametrize(("case", "check"), ROWS)
def test_contract(case, check):
    run_check(case, check)
