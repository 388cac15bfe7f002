"""Rows of the catalogue: schedules, and what gives leaves rates of their own."""

from functools import partial

import optax
from rows import ALL, ELEMENTWISE, MATRICES, fed, link

import optlab
from optlab.testing import Case

_MILLION = 1_000_000


def _schedule(name: str, make, *arguments, joints=(1, 2, 3), **given) -> Case:
    """A row of a schedule stretched over 3 million steps; joints in millions."""
    facts = {"total": 3 * _MILLION, "joints": tuple(int(j * _MILLION) for j in joints)}
    return Case(name, partial(make, *arguments, **given), frozenset({"schedule"}), facts=facts)


def _branched(at_step: int, decay_steps: int, **given) -> optax.Schedule:
    return optlab.branch(optax.constant_schedule(1.0), at_step, decay_steps, **given)


SCHEDULES = (
    *(
        _schedule(
            f"wsd[{decay}]", optlab.wsd, 1.0, _MILLION, _MILLION, _MILLION,
            end_value=0.1, decay=decay,
        )
        for decay in ("linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional")
    ),
    # The ends of cycles jump, but for the last one.
    _schedule(
        "wsd_s", optlab.wsd_s, 1.0, _MILLION // 2, [_MILLION, 3 * _MILLION],
        joints=(0.5, 0.9, 2.7, 3),
    ),
    *(
        _schedule(
            f"infinite[{cooldown}]", optlab.infinite, 1.0, 0.5, _MILLION // 2, _MILLION // 2,
            _MILLION, _MILLION, end_value=0.1, cooldown=cooldown, joints=(0.5, 1, 2, 3),
        )
        for cooldown in ("cosine", "inv_sqrt", "linear")
    ),
    _schedule(
        "warmup_linear_decay", optlab.warmup_linear_decay, 1.0, _MILLION, 3 * _MILLION,
        joints=(1, 3),
    ),
    _schedule(
        "damped_cosine", optlab.damped_cosine, 1.0, 3 * _MILLION, warmup_steps=_MILLION,
        joints=(1, 3),
    ),
    _schedule(
        "cyclic_cosine[same]", optlab.cyclic_cosine, 1.0, _MILLION, warmup_steps=_MILLION,
        joints=(1, 1.5),
    ),
    _schedule(
        "cyclic_cosine[longer]", optlab.cyclic_cosine, 1.0, _MILLION, warmup_steps=_MILLION,
        cycle_mult=1.5, peak_decay=0.5, joints=(1, 1.5),
    ),
    _schedule(
        "slanted_triangular", optlab.slanted_triangular, 1.0, 3 * _MILLION, joints=(0.3, 3)
    ),
    _schedule("inverse_power", optlab.inverse_power, 1.0),
    _schedule(
        "refined[linear]", optlab.refined, [1, 0.8, 0.5, 0.25, 0], total_steps=3 * _MILLION
    ),
    _schedule(
        "refined[previous]", optlab.refined, [1 - i / 999 for i in range(1000)],
        interpolation="previous", total_steps=3 * _MILLION,
    ),
    _schedule("branch", _branched, _MILLION, 2 * _MILLION, joints=(1, 3)),
)  # fmt: skip

_RULE = partial(optlab.layerwise_rates, rule={"kernel": 0.5, "scale": 0.0, "": 0.25})
_SCALED = {"stateless", *ELEMENTWISE}
# Every group but the top one is frozen at first: the top one has no leaf in the standard tree, so
# that the updates differ from the inner transformation's.
_GROUPS = {"groups": ["kernel", "bias|scale|temperature", "head"], "steps_per_stage": 1}

RATES = (
    link("scale_by_rates", multipliers=_RULE, tags=_SCALED, facts={"state_bytes": 0.0}),
    # Factors that come with every update.
    Case(
        "scale_by_rates[fed]",
        fed(optlab.scale_by_rates, multipliers=_RULE),
        frozenset(_SCALED),
        hits=ALL,
        facts={"state_bytes": 0.0},
    ),
    link(
        "progressive_unfreeze",
        optlab.scale_by_moments,
        inner=optlab.scale_by_moments(),
        tags=ELEMENTWISE,
        facts={"state_bytes": 8.0},
        **_GROUPS,
    ),
    # Without states of its own per group the inner transformation sees the whole tree.
    link(
        "progressive_unfreeze",
        optlab.scale_by_moments,
        inner=optlab.scale_by_moments(),
        tag="warm",
        freeze_state=False,
        groups=_GROUPS["groups"],
        steps_per_stage=[1, 9],
        hits=MATRICES,
        tags={"wrapper", *ELEMENTWISE},
        facts={"state_bytes": 8.0},
    ),
)
