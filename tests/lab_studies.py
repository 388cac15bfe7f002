"""A study whose numbers are known: curves that fall in a straight line, at given speeds."""

import json

from optlab.lab import study

STEPS, START, TARGET = 100, 3.0, 1.0
SIZES = {
    "steps": 4,
    "layers": 1,
    "width": 8,
    "heads": 1,
    "context": 1,
    "batch_size": 4,
    "rounds": 2,
    "eval_windows": 8,
}


def goal(**changes):
    """What targets.json says of a workload."""
    return {
        "sizes": SIZES,
        "target": TARGET,
        "measure": "held-out loss, nats per image",
        "data": "handwritten digits",
        "data_sha256": "",
        "steps": 3,
        "set_by": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup": 0.05, "weight_decay": 0},
        "seeds": {"101": 0.9, "102": 1.0, "103": 1.1},
        "trials": [],
        **changes,
    }


def record(reach, seed=0, rate=1e-3, diverged_at=None):
    """A run that comes to the target at step `reach`, and ends at STEPS."""
    steps = list(range(10, STEPS + 1, 10))
    losses = [START - (START - TARGET) * step / reach for step in steps]
    if diverged_at is not None:
        steps, losses = steps[:1], losses[:1]
    return {
        "choice": study.Choice(rate)._asdict(),
        "seed": seed,
        "step": steps,
        "train": losses,
        "held_out": losses,
        "seconds": [step / 100 for step in steps],
        "diverged_at": diverged_at,
        "step_seconds": 0.01,
        "compile_seconds": 2.0 if seed == 0 else 0.0,
        "optimizer_share": 0.1,
        "state_bytes_per_parameter": 8.0,
    }


def make(reaches, seeds=3, trials=2):
    """Return a study of {workload: {optimizer: the step at which each seed is there}}."""
    names = tuple(dict.fromkeys(name for of in reaches.values() for name in of))
    goals = {workload: goal() for workload in reaches}
    own = tuple(name for name in names if " " not in name)
    plan = study.Plan(own, tuple(reaches), trials, seeds, goals)
    runs = {}
    for workload, of in reaches.items():
        for name, each in of.items():
            for i in range(trials):
                runs[f"{workload}/{name}/trial/{i}"] = record(each[0], 0, 10.0**-i)
            for kind in ("tuned", "default"):
                for seed, reach in enumerate(each, 1):
                    runs[f"{workload}/{name}/{kind}/{seed}"] = record(reach, seed)
    return {"about": json.loads(json.dumps({**plan.about(), "notes": []})), "runs": runs}
