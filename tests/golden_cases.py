"""Builds what a golden case names from its `method`, `variant` and `hyperparameters` alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_low_rank
import golden_orthogonal
import golden_schedules
import golden_stable
import jax
import numpy as np
import optax

import optlab
from optlab import layout
from optlab.linalg import polar


class Hyper(dict):
    """Hyperparameters that must all be used; a constant one must have the value we implement."""

    def fixed(self, **values: Any) -> None:
        for key, value in values.items():
            found = self.pop(key, value)
            if found != value:
                raise NotImplementedError(f"hyperparameter {key}={found!r}: only {value!r} exists")

    def move(self, **names: str) -> dict[str, Any]:
        """Pop each value and return it under our name; b1, b2 stand for the pair `betas`."""
        return {ours: self.pop(theirs) for ours, theirs in names.items()}

    def betas(self) -> dict[str, float]:
        if "betas" not in self:
            return self.move(b1="b1", b2="b2")
        b1, b2 = self.pop("betas")
        return {"b1": b1, "b2": b2}


def _lion(h: Hyper, variant: str) -> optax.GradientTransformation:
    rate, decay = h.pop("lr"), h.pop("weight_decay")
    # lion-pytorch's decoupled decay is divided by the initial rate.
    decay = decay / rate if h.pop("decoupled_weight_decay", False) else decay
    return optlab.lion(rate, weight_decay=decay, **h.betas())


def _lion_k(h: Hyper, variant: str) -> optax.GradientTransformation:
    name, arguments = h.pop("kappa"), h.pop("kappa_args")
    kappa = getattr(optlab.kappa, name)(**arguments) if arguments else name
    return optlab.lion_k(h.pop("lr"), kappa=kappa, weight_decay=h.pop("wd"), **h.betas())


def _signum(h: Hyper, variant: str) -> optax.GradientTransformation:
    h.fixed(weight_decouple=True)
    return optlab.signum(
        h.pop("lr"), momentum=h.pop("momentum"), weight_decay=h.pop("weight_decay")
    )


_PROJECTION = {k: k for k in ("delta", "wd_ratio", "eps", "weight_decay", "nesterov")}


def _adamp(h: Hyper, variant: str) -> optax.GradientTransformation:
    arguments = h.move(**_PROJECTION) | h.betas()
    return optlab.adamp(h.pop("lr"), layout=layout.output_first, **arguments)


def _sgdp(h: Hyper, variant: str) -> optax.GradientTransformation:
    arguments = h.move(momentum="momentum", dampening="dampening", **_PROJECTION)
    official = variant == "official"
    return optlab.sgdp(h.pop("lr"), layout=layout.output_first, official=official, **arguments)


def _nap(h: Hyper, variant: str) -> optax.GradientTransformation:
    return optlab.nap(h.pop("lr"), every_k=h.pop("every"), eps=h.pop("eps"), **h.betas())


def _diffgrad(h: Hyper, variant: str) -> optax.GradientTransformation:
    h.fixed(rectify=False)
    port = variant == "pytorch_optimizer"  # it adds 1e-15 under the root and AMSGrad
    return optlab.diffgrad(
        h.pop("lr"),
        eps=h.pop("eps"),
        eps_root=1e-15 if port else 0.0,
        weight_decay=h.pop("weight_decay"),
        decoupled=h.pop("weight_decouple", False),
        amsgrad=h.pop("ams_bound", False),
        official=variant in ("official", "pytorch_optimizer"),
        **h.betas(),
    )


def _adabelief(h: Hyper, variant: str) -> optax.GradientTransformation:
    h.fixed(fixed_decay=False, degenerated_to_sgd=True)
    arguments = h.move(eps="eps", amsgrad="amsgrad", rectify="rectify", weight_decay="weight_decay")
    decoupled = h.pop("weight_decouple")
    return optlab.adabelief(h.pop("lr"), decoupled=decoupled, **arguments, **h.betas())


def _adagrad_norm(h: Hyper, variant: str) -> optax.GradientTransformation:
    return optlab.adagrad_norm(h.pop("lr"), b0=h.pop("b0"))


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _lars(h: Hyper, variant: str) -> optax.GradientTransformation:
    h.fixed(dampening=0.0)
    arguments = h.move(momentum="momentum", weight_decay="weight_decay", nesterov="nesterov")
    rate = h.pop("lr")
    if variant == "timm":
        larc, adapts = h.pop("trust_clip"), h.pop("always_adapt")
        if not adapts and not arguments["weight_decay"]:
            raise NotImplementedError("timm turns the ratio off without weight decay")
        arguments |= h.move(trust_coefficient="trust_coeff", eps="eps") | {"larc": larc}
    else:  # pytorch_optimizer leaves vectors alone
        masks = {"weight_decay_mask": _matrices, "trust_ratio_mask": _matrices}
        arguments |= h.move(trust_coefficient="trust_coefficient") | masks
    return optlab.lars(rate, zero_norm_ratio=1.0, lr_in_momentum=False, **arguments)


def _lamb(h: Hyper, variant: str) -> optax.GradientTransformation:
    arguments = h.move(bias_correction="bias_correction", eps="eps") | h.betas()
    if variant == "paper":
        left_out = h.pop("no_adapt")
        mask = lambda params: {name: name not in left_out for name in params}  # noqa: E731
        arguments |= {"phi": (h.pop("phi_lo"), h.pop("phi_hi")), "weight_decay": h.pop("wd")}
        return optlab.lamb(h.pop("lr"), weight_decay_mask=mask, trust_ratio_mask=mask, **arguments)
    decay, adapts, clip = h.pop("weight_decay"), h.pop("always_adapt"), h.pop("max_grad_norm")
    if not adapts and not decay:
        raise NotImplementedError("timm turns the ratio off without weight decay")
    h.fixed(caution=False, corrected_weight_decay=False, decoupled_decay=False, grad_averaging=True)
    max_ratio = 1.0 if h.pop("trust_clip") else None
    tx = optlab.lamb(h.pop("lr"), weight_decay=decay, max_ratio=max_ratio, **arguments)
    return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)


def _sgd_sai(h: Hyper, variant: str) -> optax.GradientTransformation:
    decay = h.pop("wd") if variant == "paper" else h.pop("weight_decay")
    h.fixed(ddof=1)
    official = not h.pop("normalize", variant == "paper")
    arguments = h.move(momentum="momentum", eps="eps")
    return optlab.sgd_sai(h.pop("lr"), weight_decay=decay, official=official, **arguments)


def _allora(h: Hyper, variant: str) -> optax.GradientTransformation:
    base = {"sgd": optax.identity, "adam": optax.scale_by_adam}[h.pop("base")]()
    arguments = {"base": base, "after_base": False, "layout": layout.output_first}
    return optlab.allora(h.pop("lr"), eta=h.pop("eta"), **arguments)


TRAJECTORIES: dict[str, Callable[[Hyper, str], optax.GradientTransformation]] = {
    "adabelief": _adabelief,
    "adagrad_norm": _adagrad_norm,
    "adamp": _adamp,
    "allora": _allora,
    "diffgrad": _diffgrad,
    "lamb": _lamb,
    "lars": _lars,
    "lion": _lion,
    "lion_k": _lion_k,
    "nap": _nap,
    "sgd_sai": _sgd_sai,
    "sgdp": _sgdp,
    "signum": _signum,
    **golden_orthogonal.TRAJECTORIES,
    **golden_stable.TRAJECTORIES,
}


def _newton_schulz(h: Hyper, form: str) -> polar.NewtonSchulz:
    arguments = {"eps": h.pop("eps"), "safety": h.pop("norm_safety", 1.0), "form": form}
    if "precond" in h:
        h.fixed(precond="aol")
        # It clamps the row sum, we its root.
        arguments |= {"normalization": "aol", "guard": "max", "eps": arguments["eps"] ** 0.5}
    return polar.NewtonSchulz(h.pop("coeffs"), **arguments)


# Cases of several schedules of an iteration: each has its own hyperparameters.
ITERATIONS: dict[str, Callable[[Hyper, str], polar.NewtonSchulz]] = {
    "polar_express": _newton_schulz,
}

# A schedule's JSON uses our own words: it is called with its parameters as they are.
SCHEDULES = golden_schedules.SCHEDULES


def _lookup(table: dict[str, Any], method: str) -> Any:
    if method not in table:
        raise NotImplementedError(f"method {method!r} has no replay; it knows {sorted(table)}")
    return table[method]


def replay(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[list[Any], Any]:
    """Run the trajectory; return the parameters after each step and the last state."""
    hyper = Hyper(case["hyperparameters"])
    known = TRAJECTORIES | golden_low_rank.TRAJECTORIES
    injected = (arrays,) if case["method"] in golden_low_rank.TRAJECTORIES else ()
    tx = _lookup(known, case["method"])(hyper, case["variant"], *injected)
    if hyper:
        raise NotImplementedError(f"unknown hyperparameters {sorted(hyper)}")
    params = group(arrays, "param.")
    state, step, found = tx.init(params), jax.jit(tx.update), []
    for t in range(case["steps"]):
        updates, state = step(group(arrays, f"grad.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


def iterations(case: dict[str, Any], form: str) -> dict[str, polar.NewtonSchulz]:
    """Build every schedule of a case in the direct or the Gram form."""
    build, found = _lookup(ITERATIONS, case["method"]), {}
    for name, given in case["hyperparameters"].items():
        hyper = Hyper(given)
        found[name] = build(hyper, form)
        if hyper:
            raise NotImplementedError(f"{name}: unknown hyperparameters {sorted(hyper)}")
    return found


def schedule(case: dict[str, Any]) -> optax.Schedule:
    """Build the schedule of a JSON case."""
    return _lookup(SCHEDULES, case["method"])(**case["params"])


def group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, jax.Array]:
    """Collect the arrays of one prefix as float32 (the cases' own precision or below it)."""
    cut = len(prefix)
    return {
        k[cut:]: jax.numpy.asarray(v, "float32") for k, v in arrays.items() if k.startswith(prefix)
    }


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a case and its arrays; a schedule has none."""
    arrays = path.with_suffix(".npz")
    case = json.loads(path.read_text())
    return case, dict(np.load(arrays)) if arrays.exists() else {}
