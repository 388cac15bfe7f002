"""Builds the orthogonal family's golden cases from their hyperparameters: Muon to LANTON.

Their leaves are in PyTorch's layout: the first axis is the output.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from optlab import MatrixView, layout
from optlab.linalg import polar
from optlab.transforms.noise import NoiseAdaptiveState, noise_multipliers

# The authors of Muon and NorMuon merge the axes of a convolution for the iteration, and take
# everything else from the last two axes of the leaf.
LAST_TWO = layout.rules({"": MatrixView(rows=(-1,), cols=(-2,))})


def own_roles(path: str, leaf: Any) -> MatrixView | None:
    """Read the first axis as the output; each leaf has a role of its own name."""
    view = layout.output_first(path, leaf)
    return view and view._replace(role=path)


def _finish(*links: Any, rate: float) -> optax.GradientTransformation:
    return optax.chain(*links, optax.scale_by_learning_rate(rate))


def _average(h: Any) -> optax.GradientTransformation:
    b1 = h.pop("momentum")
    # (1 - b) g + b m with the new m is an interpolation with b^2.
    return optlab.interpolate_momentum(b1**2 if h.pop("nesterov") else b1, b1)


def _sum(h: Any, key: str) -> optax.GradientTransformation:
    return optlab.heavy_ball(h.pop(key), nesterov=h.pop("nesterov"))


def _decay(h: Any) -> optax.GradientTransformation:
    return optax.add_decayed_weights(h.pop("weight_decay"))


def _iteration(h: Any, coefficients: str, eps: str, **options: Any) -> Any:
    table = (tuple(h.pop(coefficients)),) * h.pop("ns_steps")
    iterate = polar.NewtonSchulz(table, eps=h.pop(eps), **options)
    return optlab.orthogonalize(iterate, layout=layout.output_first)


def _muon(h: Any, variant: str) -> optax.GradientTransformation:
    """KellerJordan/Muon, in float32 or bfloat16, and torch.optim.Muon."""
    if variant == "torch":
        h.fixed(adjust_lr_fn="match_rms_adamw")
        iteration = _iteration(h, "ns_coefficients", "eps", guard="max")
        scale = optlab.scale_by_shape("moonlight", layout=LAST_TWO)
    else:
        h.fixed(scale="sqrt(max(1,out/in))")
        dtype = jnp.bfloat16 if "bfloat16" in variant else None
        iteration = _iteration(h, "ns_coeffs", "ns_eps", dtype=dtype, form="direct")
        scale = optlab.scale_by_shape("keller", layout=LAST_TWO)
    return _finish(_average(h), iteration, scale, _decay(h), rate=h.pop("lr"))


def _moonlight_adamw(h: Any) -> optax.GradientTransformation:
    """AdamW that adds eps to the root of the uncorrected second moment."""
    b1, b2 = h.pop("adamw_betas")
    return _finish(
        optlab.scale_by_moments(b1, b2, h.pop("adamw_eps"), bias_correction=False),
        optax.scale_by_schedule(lambda t: jnp.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))),
        optax.add_decayed_weights(h.pop("adamw_wd")),
        rate=h.pop("adamw_lr"),
    )


def _muon_moonlight(h: Any, variant: str) -> optax.GradientTransformation:
    h.fixed(scale="0.2*sqrt(max(out,in))")
    left_out = h.pop("adamw_keys")
    iteration = _iteration(h, "ns_coeffs", "ns_eps")
    scale = optlab.scale_by_shape("moonlight", layout=LAST_TWO)
    matrices = _finish(_sum(h, "momentum"), iteration, scale, _decay(h), rate=h.pop("lr"))
    return optax.partition(
        {True: matrices, False: _moonlight_adamw(h)},
        lambda params: {name: name not in left_out for name in params},
    )


_DION_SCALES = {"spectral_norm": "spectral", "rms_norm": "moonlight"}


def _dion(h: Any, *links: Any, decay: Any) -> optax.GradientTransformation:
    eps = h.pop("epsilon")
    h.fixed(use_polar_express=True)
    iterate = polar.polar_express_cushion(eps=eps)
    return _finish(
        _sum(h, "mu"),
        optlab.orthogonalize(iterate, layout=layout.output_first),
        *links,
        optlab.scale_by_shape(_DION_SCALES[h.pop("adjust_lr")], layout=LAST_TWO),
        decay(h.pop("weight_decay")),
        rate=h.pop("lr"),
    )


def _muon_dion(h: Any, variant: str) -> optax.GradientTransformation:
    cautious = h.pop("cautious_wd")
    return _dion(h, decay=optlab.add_cautious_decay if cautious else optax.add_decayed_weights)


def _normuon(h: Any, variant: str) -> optax.GradientTransformation:
    h.fixed(scale="sqrt(max(1,out/in))")
    return _finish(
        _average(h),
        _iteration(h, "ns_coeffs", "ns_eps"),
        optlab.normalize_neurons(h.pop("beta2"), eps=h.pop("norm_eps"), layout=LAST_TWO),
        optlab.scale_by_shape("keller", layout=LAST_TWO),
        _decay(h),
        rate=h.pop("lr"),
    )


def _normuon_dion(h: Any, variant: str) -> optax.GradientTransformation:
    neurons = optlab.normalize_neurons(h.pop("muon_beta2"), eps=h["epsilon"], layout=LAST_TWO)
    return _dion(h, neurons, decay=optax.add_decayed_weights)


def _rescaled(link: Any, mode: Any) -> optax.GradientTransformation:
    return optax.chain(link, optlab.scale_by_shape(mode, layout=layout.output_first))


def _spectral(max: bool = False, normalized: bool = True) -> optax.GradientTransformation:
    mode = "keller" if max else "spectral" if normalized else lambda m, n: math.sqrt(n)
    return _rescaled(optlab.orthogonalize("keller", layout=layout.output_first), mode)


def _spectral_conv() -> optax.GradientTransformation:
    channels = layout.rules({"": MatrixView(rows=(1,), cols=(0,))})
    window = layout.rules({"": MatrixView(rows=(2, 3), cols=(0,))})
    return optax.chain(
        optlab.orthogonalize("keller", layout=layout.output_first),
        optlab.scale_by_shape("spectral", layout=channels),
        optlab.scale_by_shape(lambda m, n: 1 / m, layout=window),
    )


def _normalized(norm: str, transpose: bool, mode: Any) -> optax.GradientTransformation:
    # Transposed, the rows and columns change sides: what is an input there is an output here.
    read = layout.by_ndim if transpose else layout.output_first
    link = optlab.scale_by_lmo(norm, layout=read)
    return link if mode is None else _rescaled(link, mode)


_LMOS = {
    "Spectral": _spectral,
    "SpectralConv": _spectral_conv,
    "Sign": lambda normalized=True: optlab.scale_by_lmo(
        "sign" if normalized else "max", layout=layout.output_first
    ),
    "ColNorm": lambda normalized=False, transpose=False: _normalized(
        "per_input", transpose, (lambda m, n: 1 / m) if normalized else None
    ),
    "RowNorm": lambda normalized=True, transpose=False: _normalized(
        "per_output", transpose, None if normalized else lambda m, n: math.sqrt(m)
    ),
    "BiasRMS": lambda: optlab.scale_by_lmo("rms"),
}


def scion_lmos(
    hyperparameters: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Return every output `out.<lmo>.<input>` that the case records."""
    found = {}
    for key in arrays:
        kind, *rest = key.split(".")
        if kind == "out":
            name, leaf = rest
            tx = _LMOS[hyperparameters[name]["cls"]](**hyperparameters[name]["kwargs"])
            grads = {leaf: jnp.asarray(arrays[f"in.{leaf}"])}
            found[key] = tx.update(grads, tx.init(grads))[0][leaf]
    return found


# As the recipe names them; Scion's convolution scales by k once more, and is given as it is.
_NORMS = {"Spectral": "spectral", "Sign": "sign", "BiasRMS": "rms"}


def _scion(h: Any, variant: str) -> optax.GradientTransformation:
    balls = {}
    for group in h.pop("groups"):
        name, arguments = group["norm"], group["norm_kwargs"]
        plain = name in _NORMS and not arguments
        norm = _NORMS[name] if plain else _LMOS[name](**arguments)
        balls["vector" if name == "BiasRMS" else group["param"]] = (norm, group["scale"])
    constrained = not h.pop("unconstrained")
    b1 = 1 - h.pop("momentum")
    return optlab.scion(h.pop("lr"), b1=b1, norms=balls, constrained=constrained, layout=own_roles)


_SCALES = {"rms_op": ("spectral", "sign"), "dmuon": ("moonlight", "max")}
_DUAL_SCALES = {"rms_op": ("spectral", "sign"), "none": (None, "max")}


def _lanton(h: Any, variant: str) -> optax.GradientTransformation:
    h.fixed(spectral_orthogonalizer="5 KJ quintic steps, x/(fro+1e-7)", vector_eps=1e-8)
    (scale, sign), (dual_scale, dual_sign) = (
        _SCALES[h.pop("scale")], _DUAL_SCALES[h.pop("dual_scale")],
    )  # fmt: skip
    if sign != dual_sign:
        raise NotImplementedError("the signs and their dual norms are scaled alike or not at all")
    kinds, group_of = h.pop("kinds"), h.pop("group_of")
    norms = {leaf: sign if kind == "sign" else kind for leaf, kind in kinds.items()}
    vectors = {"vector": "rms"} if "rms" in kinds.values() else {}
    return optlab.lanton(
        h.pop("lr"),
        norms={leaf: norm for leaf, norm in norms.items() if norm != "rms"} | vectors,
        groups=lambda path, leaf: group_of[path],
        scale=scale,
        dual_scale=dual_scale,
        exact_noise=h.pop("exact"),
        weight_decay=h.pop("wd"),
        layout=own_roles,
        **h.move(b1="beta1", b2="beta2", alpha="alpha"),
    )


TRAJECTORIES = {
    "lanton": _lanton,
    "muon": _muon,
    "muon_dion": _muon_dion,
    "muon_moonlight": _muon_moonlight,
    "normuon": _normuon,
    "normuon_dion": _normuon_dion,
    "scion": _scion,
}


def noise_of(case: Mapping[str, Any], state: Any) -> dict[str, dict[str, jax.Array]]:
    """Return LANTON's noise `H` and factors `mult` of every leaf, from the last state of a replay.

    They are recorded as `extra.H.<step>.<leaf>` and `extra.mult.<step>.<leaf>`.
    """
    h, is_noise = case["hyperparameters"], lambda x: isinstance(x, NoiseAdaptiveState)
    (found,) = [s for s in jax.tree.leaves(state, is_leaf=is_noise) if is_noise(s)]
    names = sorted(case["shapes"])
    factors = noise_multipliers(found.noise, [h["group_of"][name] for name in names], h["alpha"])
    columns = {"H": found.noise, "mult": factors}
    return {key: dict(zip(names, column, strict=True)) for key, column in columns.items()}


def apart(start: Any, found: Any, expected: Any) -> tuple[float, float]:
    """Return how far two moves from `start` differ: the largest error over the largest move, and
    the smallest cosine of a leaf. The bfloat16 case allows 2e-2 and 0.9995 after its last step.
    """
    move = lambda tree, k: np.asarray(tree[k] - start[k], np.float64)  # noqa: E731
    pairs = [(move(found, k), move(expected, k)) for k in start]
    error = max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
    cosine = min(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs)
    return float(error), float(cosine)
