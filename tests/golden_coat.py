"""Replays COAT's golden cases: codes of given numbers, and AdamW on moments kept in them.

Their groups are 128 numbers of the flattened leaf, ours of its last axis: a leaf is cut into its
groups beforehand, which changes nothing for elementwise methods.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_cases import Hyper

from optlab.linalg import codecs
from optlab.transforms.quantize import quantize_state

# Relative, after decoding: half a step of e4m3, where float32's powers round to another code.
ONE_STEP = 0.07
SAME_CODES = 0.995
# Of the learning rate, per step: a moment is off by a step of e4m3 where a code is another one.
DRIFT = 2e-2


def _groups(x: Any, dtype: Any = "float32") -> list[np.ndarray]:
    flat = np.asarray(x, dtype).reshape(-1)
    return np.split(flat, range(128, flat.size, 128))


def roundtrip(case: Any, arrays: Any) -> None:
    """Hold codes, powers, scales and decoded numbers to the recorded ones."""
    h = Hyper(case["hyperparameters"])
    h.fixed(dtype="float8_e4m3fn", expand_min=16, fp8_max=448, target_range=100352.0, tiny=1e-30)
    h.fixed(center="sqrt(max)*sqrt(min)", scale="(max/center)^k/448", group=128)
    h.fixed(k="floor(16*log2(100352)/log2(max/min))/16 per group")
    h.fixed(plain_scale="(absmax+1e-20)/448")
    assert not h, f"unknown hyperparameters {sorted(h)}"
    names = [key.removeprefix("in.") for key in arrays if key.startswith("in.")]
    for name in names:
        for mode, codec in (("expand", codecs.fp8()), ("plain", codecs.fp8(expand=False))):
            want = {
                key.split(".")[1]: arrays[key]
                for key in arrays
                if key.startswith(f"{mode}.") and key.endswith(f".{name}")
            }
            _check_codes(codec, _groups(arrays[f"in.{name}"]), want, f"{mode}, {name}")


def _check_codes(codec: Any, groups: list, want: Mapping[str, Any], what: str) -> None:
    coded = [codec.encode(jnp.asarray(x)) for x in groups]
    codes = np.concatenate([np.asarray(c.codes).view(np.uint8) for c in coded])
    same = np.mean(codes == want["codes"].reshape(-1))
    assert same >= SAME_CODES, f"{what}: {same:.4f} of the codes agree"
    out = np.concatenate([codec.decode(c, x.size) for c, x in zip(coded, groups, strict=True)])
    k = np.ones(len(groups)) if "k" not in want else want["k"]
    step = np.concatenate([np.full(x.size, ONE_STEP / n) for x, n in zip(groups, k, strict=True)])
    recorded = want["out"].reshape(-1)
    assert np.all(np.abs(out - recorded) <= step * np.abs(recorded) + 1e-30), what
    largest = np.asarray([c.scales[0].item() for c in coded])
    if "k" in want:
        mine = np.asarray([c.scales[1].item() for c in coded]) / 16
        np.testing.assert_allclose(mine, k, rtol=0, atol=1 / 16, err_msg=what)
        # Their scale and centre say the largest number: centre (448 scale)^(1/k).
        theirs = want["center"] * (448 * want["scale"]) ** (1 / want["k"])
        np.testing.assert_allclose(largest, theirs, rtol=1e-4, err_msg=what)
    else:
        np.testing.assert_allclose(largest, 448 * want["scale"], rtol=1e-6, err_msg=what)


def adamw(case: Any, arrays: Any) -> None:
    """Replay the trajectory: the first step to rounding, then within the drift of the codes."""
    h = Hyper(case["hyperparameters"])
    rate = h.pop("lr")
    tx = quantize_state(
        optax.adamw(rate, **h.betas(), eps=h.pop("eps"), weight_decay=h.pop("wd")),
        codecs.fp8(),
        min_size=1,
    )
    assert not h, f"unknown hyperparameters {sorted(h)}"
    names = [key.removeprefix("param.") for key in arrays if key.startswith("param.")]
    read = lambda prefix: {name: _groups(arrays[prefix + name]) for name in names}  # noqa: E731
    params = jax.tree.map(jnp.asarray, read("param."))
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(case["steps"]):
        updates, state = step(read(f"grad.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        atol = DRIFT * rate * t or 2e-6
        for name in names:
            want = arrays[f"out.{t}.{name}"].reshape(-1)
            got = np.concatenate(params[name])
            np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=f"step {t}, {name}")


CASES: Mapping[str, Callable[[Any, Any], None]] = MappingProxyType(
    {"coat": roundtrip, "coat_adamw": adamw}
)
