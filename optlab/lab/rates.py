"""Default learning rates: the best of the recorded sweep, benchmarks/results/lr_sweep.json."""

RATES: dict[str, float] = {
    "adabelief": 0.003,
    "adagrad_norm": 10,
    "adamp": 0.003,
    "adamw": 0.003,
    "allora": 0.3,
    "diffgrad": 0.01,
    "lamb": 0.003,
    "lanton": 0.01,
    "lars": 3,
    "lion": 0.0003,
    "lion_k": 0.0003,
    "muon": 0.01,
    "nap": 0.003,
    "normuon": 0.003,
    "scion": 0.0003,
    "sgd": 0.1,
    "sgd_sai": 0.1,
    "sgdp": 0.1,
    "signum": 0.001,
}
