"""How a leaf is read as a matrix: views, policies that choose them, functions applied through them.

A policy is a function ``(path, leaf) -> MatrixView | None``. Every method that speaks of rows,
columns, channels, neurons or layers asks the policy it was given; none guesses on its own.
"""

from optlab.layout.apply import on_matrix
from optlab.layout.policies import by_ndim, flax, output_first, per_head, rules, stacked
from optlab.layout.routing import LeafRow, Routing, describe
from optlab.layout.view import MatrixView, Policy, map_with_view, path_str, paths, role, view_of

__all__ = [
    "LeafRow",
    "MatrixView",
    "Policy",
    "Routing",
    "by_ndim",
    "describe",
    "flax",
    "map_with_view",
    "on_matrix",
    "output_first",
    "path_str",
    "paths",
    "per_head",
    "role",
    "rules",
    "stacked",
    "view_of",
]
