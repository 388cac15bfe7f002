"""Replays the golden cases of rates: layers, groups, batch sizes, widths."""

import functools
from typing import Any

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import layout
from optlab.schedules.layerwise import layerwise_rates, unit_rates
from optlab.schedules.mup import mup_multipliers
from optlab.schedules.rates import max_rate_from_spectrum, scale_rate_to_batch
from optlab.schedules.unfreeze import progressive_unfreeze

# Relative; what is computed with Python's numbers, and in float32.
DOUBLE, SINGLE = 1e-12, 2e-6


def _all_used(h: Any) -> None:
    if h:
        raise NotImplementedError(f"unknown parameters {sorted(h)}")


def layerwise_unfreeze(case: Any, arrays: Any) -> None:
    """Check the factors of the groups, and which of them train at every step."""
    del arrays
    h = golden_cases.Hyper(case["params"])
    groups = [f"group{i}" for i in range(h.pop("num_groups"))]
    params = {group: jnp.ones(1) for group in groups}
    rates = layerwise_rates(params, groups, decay=h.pop("decay"), strict=True)
    tx = progressive_unfreeze(optax.identity(), groups, h.pop("steps_per_stage"), strict=True)
    _all_used(h)
    factors = [rates[group] for group in groups]
    np.testing.assert_allclose(factors, case["multipliers_bottom_to_top"], rtol=DOUBLE)

    def step(state, _):
        updates, state = tx.update(params, state)
        return state, jnp.concatenate([updates[group] for group in groups])

    steps = case["steps"]
    assert steps == list(range(len(steps)))
    _, trained = jax.lax.scan(step, tx.init(params), length=len(steps))
    np.testing.assert_array_equal(trained, case["unfrozen_mask_bottom_to_top"])


def adept_lr_multipliers(case: Any, arrays: Any) -> None:
    """Check the factors by importance, and those of equal importance."""
    del arrays
    names = [f"tensor{i}" for i in range(len(case["importance"]))]
    found = unit_rates(dict(zip(names, case["importance"], strict=True)))
    # Of the range: the factors are differences of numbers rounded to float32.
    np.testing.assert_allclose(
        [found[name] for name in names], case["multipliers"], rtol=0, atol=2 * SINGLE
    )
    equal = unit_rates(dict.fromkeys(names, 0.3))
    assert {float(x) for x in equal.values()} == {case["equal_importance_multiplier"]}


def lr_batch_scaling(case: Any, arrays: Any) -> None:
    """Check the rates of every batch size by all three rules."""
    del arrays
    base, batches = golden_cases.Hyper(case["base"]), case["batches"]
    scaled = functools.partial(scale_rate_to_batch, base.pop("lr"), base.pop("batch"))
    _all_used(base)
    for rule in ("linear", "sqrt"):
        found = [scaled(batch, rule) for batch in batches]
        np.testing.assert_allclose(found, case[rule], rtol=DOUBLE)
    h = golden_cases.Hyper(case["rmt"])
    top, mass = h.pop("lambda_1"), h.pop("P_sigma2")
    eigenvalues, most = np.array(h.pop("batch_lambda_1")), np.array(h.pop("max_lr_2_over_lambda"))
    _all_used(h)
    found = [max_rate_from_spectrum(top, mass, batch) for batch in batches]
    np.testing.assert_allclose(found, most, rtol=DOUBLE)
    np.testing.assert_allclose(found, 2 / eigenvalues, rtol=DOUBLE)
    spectrum = {"top_eigenvalue": top, "noise_mass": mass}
    found = [scaled(batch, "random_matrix", **spectrum) for batch in batches]
    at_base = batches.index(case["base"]["batch"])
    np.testing.assert_allclose(found, case["base"]["lr"] * most / most[at_base], rtol=DOUBLE)


# An embedding of PyTorch has the shape of a readout: only its name tells it apart.
_TORCH = layout.rules(
    {r"^emb\.": layout.MatrixView((0,), (1,), "embedding"), "": layout.output_first}
)


_KINDS = (("adam", False, "adam"), ("adam", True, "adamw_decoupled"), ("sgd", False, "sgd"))


def _struct(shape: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)


def mup(case: Any, arrays: Any) -> None:
    """Check the factors of rate and decay of every tensor, and what the readout is multiplied by.

    Base shapes mark what does not grow by None; the third model is made from that.
    """
    del arrays
    h, tensors = golden_cases.Hyper(case["params"]), case["tensors"]
    base_width, width = h.pop("base_width"), h.pop("target_width")
    growth = h.pop("delta_width") / base_width
    h.fixed(base_ffw=h.get("target_ffw"))
    h.pop("target_ffw")
    _all_used(h)
    shapes = {name: _struct(t["shape"]) for name, t in tensors.items()}
    pairs = {
        name: list(zip(t["shape"], t["base_shape"], strict=True)) for name, t in tensors.items()
    }
    base = {name: _struct(b or n for n, b in dims) for name, dims in pairs.items()}
    delta = {name: _struct(int(growth * b) if b else n for n, b in d) for name, d in pairs.items()}
    for kind, decoupled, recorded in _KINDS:
        found = mup_multipliers(
            shapes, base, delta, optimizer=kind, decoupled_decay=decoupled, layout=_TORCH
        )
        for name, tensor in tensors.items():
            wanted = tensor[recorded]
            assert found.rates[name] == wanted["lr_mult"], (recorded, name)
            assert found.decay[name] == wanted["wd_mult"], (recorded, name)
    readout = case["readout"]
    assert readout["init_std_multiplier_vs_SP"] == "sqrt(width_mult)"
    for name, tensor in tensors.items():
        out = name == "out.weight"
        assert found.forward[name] == (readout["forward_input_multiplier"] if out else 1)
        embedding = name == "emb.weight"  # ours: Flax's default deviation shrinks
        root = np.sqrt(width / base_width) if out or embedding else 1
        assert found.init[name] == root, name
        assert not out or tensor["width_mult"] == width / base_width


CASES = {
    "layerwise_unfreeze": layerwise_unfreeze,
    "adept_lr_multipliers": adept_lr_multipliers,
    "lr_batch_scaling": lr_batch_scaling,
    "mup_multipliers": mup,
}
