"""The contract of an optimizer, as checks anyone can run on any optax transformation.

>>> import optax
>>> from optlab.testing import checks_for
>>> len(checks_for({"recipe"})) > len(checks_for(()))
True

`check_transform(make, ...)` runs every check that applies and names the one that fails. A check is
a public function `check_<claim>(case)`; tags say what a method promises and select the checks.
"""

from optlab.testing.case import Case, default_params, random_like
from optlab.testing.run import CHECKS, check_transform, checks_for, run_check

__all__ = [
    "CHECKS",
    "Case",
    "check_transform",
    "checks_for",
    "default_params",
    "random_like",
    "run_check",
]
