"""Coefficient tables of the odd polynomials that orthogonalize, as data.

A table has one row (a, b, c) per step; the step maps every singular value s to a s + b s^3 + c s^5.
"""

from collections.abc import Sequence

Row = tuple[float, float, float]
Table = tuple[Row, ...]

KELLER: Table = ((3.4445, -4.7750, 2.0315),)
"""One row for every step: steep at zero, and content with values of 0.68 to 1.14 (Jordan 2024)."""

YOU: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""A row per step, tuned together (You 2025); optax calls it "dion"."""

POLAR_EXPRESS: Table = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Minimax for values in [1e-3, 1], without safety factors (arXiv:2505.16932, Alg. 1)."""

POLAR_EXPRESS_CUSHION: Table = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""The same method made for exactly five steps, a cushion of 2 and a safety of 2 % built in."""

TURBO: Table = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)
"""Four steps for matrices that AOL has scaled (arXiv:2512.04632)."""

PADE: Table = ((1.875, -1.25, 0.375),)
"""The classical quintic: converges to 1 exactly, slowly from small values."""


def repeated(table: Table, steps: int) -> Table:
    """Return the first `steps` rows, the last one repeated beyond the end."""
    return table[:steps] + table[-1:] * (steps - len(table))


def with_safety(table: Table, safety: float) -> Table:
    """Return p(x / safety) for every row p: room for the values that rounding lifts above 1."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in table)


def cubic_minimax(lower: float, steps: int) -> Table:
    """Return cubic rows, each the best for the interval that the one before leaves (CANS).

    On [u, v] the odd cubic nearest to 1 is p(x) = 2 (q x - x^3) / (2 (q/3)^(3/2) + u v (u + v)),
    q = u^2 + u v + v^2: by equioscillation p(u) = p(v) = 2 - p(sqrt(q/3)). It maps the interval to
    [p(u), 2 - p(u)]. (arXiv:2506.10935, degree 3.)
    """
    rows: list[Row] = []
    u, v = lower, 1.0
    for _ in range(steps):
        q = u * u + u * v + v * v
        scale = 2 / (2 * (q / 3) ** 1.5 + u * v * (u + v))
        rows.append((scale * q, -scale, 0.0))
        u = scale * (q - u * u) * u
        v = 2 - u
    return tuple(rows)


def scalar_map(table: Sequence[Row], x: float) -> float:
    """Return what the iteration makes of the singular value x."""
    for a, b, c in table:
        x = x * (a + x * x * (b + x * x * c))
    return x
