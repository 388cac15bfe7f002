"""Learning-rate schedules: pure functions of the step."""

from optlab.schedules.continual import infinite
from optlab.schedules.cyclic import cyclic_cosine, damped_cosine
from optlab.schedules.decays import inverse_power, slanted_triangular, warmup_linear_decay
from optlab.schedules.plateau import wsd, wsd_s
from optlab.schedules.tables import branch, refined

__all__ = [
    "branch",
    "cyclic_cosine",
    "damped_cosine",
    "infinite",
    "inverse_power",
    "refined",
    "slanted_triangular",
    "warmup_linear_decay",
    "wsd",
    "wsd_s",
]
