"""Default learning rates: the best of the recorded sweep, benchmarks/results/lr_sweep.json."""

RATES: dict[str, float] = {
    "adamw": 3e-3,
    "sgd": 3e-1,
}
