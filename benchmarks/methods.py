"""What is measured: every recipe, optax's method of the same name, and what each should cost."""

import inspect
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optlab import codecs, kappa, polar, quantize_state, recipes

RATE = 1e-3
WEIGHT_DECAY = 1e-2

BASELINES = ("adamw", "lion", "signum", "adabelief", "lars", "lamb", "contrib.muon")
# What these cost is the products: judged on whole trees, beside optax.contrib.muon.
MATRIX = ("muon", "normuon", "lanton", "scion")
# What these save is memory, and what they risk is the compile time of a decomposition.
LOW_RANK = ("apollo", "conda", "fira", "frugal", "galore", "ldadam", "q_galore")
# GaLore's step on weights of another form.
_DERIVED = ("grad_norm_lorp",)
# Their rank is another by definition: the whole side, and a share of it.
_OWN_RANK = ("conda", "frugal")

# Arrays of the parameters' shape that a method with norms has to read a second time, once it knows
# them: adagrad_norm, sgd_sai (first step) g; allora p; lars g, p; lamb, adamp and nap the two
# moments and p; sgdp the buffer and p; spam g and nu, whose spikes it counts; stable_spam g three
# times, for its largest entry, the count and the norm.
READ_AGAIN = {
    "adagrad_norm": 1, "allora": 1, "sgd_sai": 1, "lars": 2, "sgdp": 2, "lamb": 3, "adamp": 3,
    "nap": 3, "spam": 2, "stable_spam": 3,
}  # fmt: skip
# Arrays of state that are written at refreshes only: Sophia's curvature.
ONLY_READ = {"sophia": 1}
# Two passes may cost a quarter more than their minimum.
SLACK = 1.25

# Kernels launched on the 170-leaf tree: half of optax.lamb's 1145 for a method with numbers about
# leaves or rows, as many for the two that take four products by channel and by matrix. The others,
# and AdaGrad-Norm with its one norm, may launch what optax.adamw does.
_OF_LEAVES = ("allora", "lamb", "lars", "nap", "sgd_sai", "spam", "stable_spam")
MOST_KERNELS = dict.fromkeys(_OF_LEAVES, 1145 // 2)
MOST_KERNELS |= dict.fromkeys(("adamp", "sgdp"), 1145)
# A quarter of optax.contrib.muon's 1564; one more for each of the 97 leaves that have a norm of
# their own, 3 for each of 72 matrices that measure neurons, 6 where their noise is measured.
MOST_KERNELS |= {"muon": 391, "scion": 391 + 97, "normuon": 391 + 3 * 72, "lanton": 488 + 6 * 72}


def _call(make, **arguments) -> optax.GradientTransformation:
    takes = inspect.signature(make).parameters
    if "weight_decay" in takes:
        arguments["weight_decay"] = WEIGHT_DECAY
    if "decoupled" in takes:
        arguments["decoupled"] = True
    return make(RATE, **arguments)


def plain(name: str) -> str:
    """Return "muon" for "optax.contrib.muon" and for "muon[bfloat16]"."""
    return name.split("[")[0].rpartition(".")[2]


def of_matrices(name: str) -> bool:
    """Tell whether a method orthogonalizes."""
    return plain(name) in MATRIX


def of_low_rank(name: str) -> bool:
    """Tell whether a method keeps its state in a subspace."""
    return plain(name) in LOW_RANK + _DERIVED


def low_rank(
    name: str, rank: int, shardings: Any = None, **options: Any
) -> optax.GradientTransformation:
    """Return a recipe of the low-rank family with its own projector, and that rank.

    Q-GaLore's moments stay as they are: what coding them takes is told apart (`aot_state`).
    """
    ranks = {} if name in _OWN_RANK else {"rank": rank}
    options = {"state_codec": None} | options if name == "q_galore" else options
    return getattr(recipes, name)(RATE, shardings=shardings, **ranks, **options)


CODECS: dict[str, codecs.Codec | None] = {
    "-": None,
    "int8": codecs.int8(),
    "int8 linear": codecs.int8(map="linear"),
    "fp8": codecs.fp8(),
    "int4": codecs.int4(),
}


def coded(name: str, codec: str) -> optax.GradientTransformation:
    """Return optax's AdamW or a recipe, its state in a codec where there is one."""
    tx = baseline(name) if name == "adamw" else getattr(recipes, name)(RATE)
    how = CODECS[codec]
    return quantize_state(tx, how) if how else tx


def baseline(name: str) -> optax.GradientTransformation:
    """Return optax's method of that name, with the same decay."""
    return _call(operator.attrgetter(name)(optax))


KAPPAS: dict[str, kappa.Kappa] = {
    "lion_k[quadratic]": kappa.quadratic,
    "lion_k[huber]": kappa.huber(0.1),
    "lion_k[dead_zone]": kappa.dead_zone(1e-3),
    "lion_k[smooth_sign]": kappa.smooth_sign(0.1),
}


POLARS: dict[str, polar.PolarFn] = {
    "muon[bfloat16]": polar.keller(dtype=jnp.bfloat16),
}


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Return every recipe, and the forms of Lion-K and Muon that cost something else."""
    found = {name: _call(getattr(recipes, name)) for name in recipes.__all__}
    found |= {name: _call(recipes.lion_k, kappa=k) for name, k in KAPPAS.items()}
    return found | {name: _call(recipes.muon, polar=p) for name, p in POLARS.items()}


class Bound(NamedTuple):
    """What a recipe may cost."""

    bytes_per_parameter: float
    kernels: int


def least_bytes(name: str, state_arrays: float) -> float:
    """Return the bytes per parameter that a method cannot go below, in float32.

    Parameters, gradient and state are read, parameters and state written: 4 (3 + 2 s) bytes for s
    state arrays; 4 more for each array read again, 4 less for one that is not written.
    """
    return 4 * (3 + 2 * state_arrays + READ_AGAIN.get(name, 0) - ONLY_READ.get(name, 0))


def bound(name: str, state_arrays: float, adamw_kernels: int) -> Bound:
    """Return the bounds on the TPU's bytes and on the GPU's kernels."""
    least = least_bytes(name, state_arrays)
    slack = SLACK if name in READ_AGAIN else 1.0
    return Bound(slack * least, MOST_KERNELS.get(name, adamw_kernels))
