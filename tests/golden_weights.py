"""Checks the golden case of weights on an 8-bit grid: codes, scales, zeros and values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab.transforms import round_weights

VALUES = 5e-6  # absolute, float32, on weights of size 1 to 3


def _unknown(case: Any) -> None:
    unknown = case["hyperparameters"].keys() - {"n_bit", "q_group_size"}
    if unknown or case["variant"] != "official" or case["steps"]:
        raise NotImplementedError(f"unknown: {sorted(unknown)}, {case['variant']}, {case['steps']}")


def rounded_weights(case: Any, arrays: Any) -> None:
    """Compare what is rounded to nearest and by the recorded numbers; every leaf of the case."""
    _unknown(case)
    h, names = case["hyperparameters"], [k[6:] for k in arrays if k.startswith("param.")]
    assert len(names) > 1
    for name in names:
        x = jnp.asarray(arrays[f"param.{name}"])
        uniform = jnp.asarray(arrays[f"extra.uniform.{name}"]).reshape(x.shape)
        pack = jax.jit(lambda x, u: round_weights.pack(x, h["n_bit"], h["q_group_size"], u))
        nearest, drawn = pack(x, None), pack(x, uniform)
        for packed, key in ((nearest, "nearest_q"), (drawn, "sr_q")):
            codes = packed.codes.codes.reshape(x.shape)
            np.testing.assert_array_equal(codes, arrays[f"extra.{key}.{name}"], key)
        scale, zero = drawn.codes.scale.reshape(-1, 1), drawn.codes.zero.reshape(-1, 1)
        np.testing.assert_allclose(scale, arrays[f"extra.scales.{name}"], rtol=1e-6)
        np.testing.assert_array_equal(zero, arrays[f"extra.zeros.{name}"])
        values, want = round_weights.unpack(drawn), arrays[f"out.0.{name}"]
        np.testing.assert_allclose(values, want, rtol=0, atol=VALUES)
        assert np.abs(want - x).max() > 100 * VALUES, "the case does not round: it proves nothing"


CASES = {"qgalore": rounded_weights}
