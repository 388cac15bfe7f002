"""What is measured: every recipe, optax's method of the same name, and what each should cost."""

import inspect
from typing import NamedTuple

import optax

from optlab import kappa, recipes

RATE = 1e-3
WEIGHT_DECAY = 1e-2

BASELINES = ("adamw", "lion", "signum", "adabelief", "lars", "lamb")

# Arrays of the parameters' shape that a method with norms has to read a second time, once it knows
# them: adagrad_norm, sgd_sai (first step) g; allora p; lars g, p; lamb, adamp and nap the two
# moments and p; sgdp the buffer and p.
READ_AGAIN = {
    "adagrad_norm": 1, "allora": 1, "sgd_sai": 1, "lars": 2, "sgdp": 2, "lamb": 3, "adamp": 3,
    "nap": 3,
}  # fmt: skip
# Two passes may cost a quarter more than their minimum.
SLACK = 1.25

# Kernels launched on the 170-leaf tree: half of optax.lamb's 1145 for a method with norms by leaf
# or by row, as many for the two that take four products by channel and by matrix. The others, and
# AdaGrad-Norm with its one norm, may launch what optax.adamw does.
MOST_KERNELS = dict.fromkeys(("allora", "lamb", "lars", "nap", "sgd_sai"), 1145 // 2)
MOST_KERNELS |= dict.fromkeys(("adamp", "sgdp"), 1145)


def _call(make, **arguments) -> optax.GradientTransformation:
    takes = inspect.signature(make).parameters
    if "weight_decay" in takes:
        arguments["weight_decay"] = WEIGHT_DECAY
    if "decoupled" in takes:
        arguments["decoupled"] = True
    return make(RATE, **arguments)


def baseline(name: str) -> optax.GradientTransformation:
    """Return optax's method of that name, with the same decay."""
    return _call(getattr(optax, name))


KAPPAS: dict[str, kappa.Kappa] = {
    "lion_k[quadratic]": kappa.quadratic,
    "lion_k[huber]": kappa.huber(0.1),
    "lion_k[dead_zone]": kappa.dead_zone(1e-3),
    "lion_k[smooth_sign]": kappa.smooth_sign(0.1),
}


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Return every recipe, and Lion-K with the elementwise functions beside Lion's own sign."""
    found = {name: _call(getattr(recipes, name)) for name in recipes.__all__}
    return found | {name: _call(recipes.lion_k, kappa=k) for name, k in KAPPAS.items()}


class Bound(NamedTuple):
    """What a recipe may cost."""

    bytes_per_parameter: float
    kernels: int


def least_bytes(name: str, state_arrays: float) -> float:
    """Return the bytes per parameter that a method cannot go below, in float32.

    Parameters, gradient and state are read, parameters and state written: 4 (3 + 2 s) bytes for s
    state arrays; then 4 for each array read again.
    """
    return 4 * (3 + 2 * state_arrays + READ_AGAIN.get(name, 0))


def bound(name: str, state_arrays: float, adamw_kernels: int) -> Bound:
    """Return the bounds on the TPU's bytes and on the GPU's kernels."""
    least = least_bytes(name, state_arrays)
    slack = SLACK if name in READ_AGAIN else 1.0
    return Bound(slack * least, MOST_KERNELS.get(name, adamw_kernels))
