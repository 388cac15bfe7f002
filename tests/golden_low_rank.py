"""Builds the low-rank family's golden cases from their hyperparameters and injected bases.

Their leaves are in PyTorch's layout: the first axis is the output.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from optlab import layout
from optlab.transforms.subspace import Projector

OUTPUT_FIRST = layout.output_first
_SIDES = {"std": "short", "reverse_std": "long"}


class Recorded(dict):
    """What the recorded projectors kept, by the shape of the matrix: one entry per refresh.

    Matrices of a case differ in shape, and a projector sees no other name of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], what: str, order: Any):
        super().__init__()
        for key in (k for k in arrays if k.startswith("param.")):
            name = key.removeprefix("param.")
            steps = sorted(int(k.split(".")[2]) for k in arrays if k.endswith(f".{name}.{what}"))
            found = [order(arrays[f"extra.proj.{t}.{name}.{what}"], arrays[key]) for t in steps]
            self[tuple(sorted(arrays[key].shape))] = jnp.asarray(np.stack(found))


def _columns(basis: np.ndarray, param: np.ndarray) -> np.ndarray:
    """Return a basis with its vectors as columns: those of the right side are recorded as rows."""
    side = min(param.shape)
    return basis if basis.shape[0] == side and basis.shape[1] < side else basis.T


def _indices(chosen: np.ndarray, param: np.ndarray) -> np.ndarray:
    del param
    return chosen.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Given(Projector):
    """The recorded bases in the order of their refreshes."""

    recorded: Mapping[tuple[int, ...], jax.Array] = dataclasses.field(default_factory=dict)

    def init(self, batch, a, rank, dtype):
        return super().init(batch, a, rank, dtype), jnp.zeros(batch, jnp.int32)

    def find(self, x, old, rank, key, first):
        del rank, key, first
        bases = self.recorded[tuple(sorted(x.shape[-2:]))]
        return bases[old[1]], old[1] + 1

    def basis(self, stored, a, rank):
        return stored[0]


class GivenCoordinates(Given):
    """The recorded coordinates."""

    def init(self, batch, a, rank, dtype):
        chosen = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.int32), (*batch, rank))
        return chosen, jnp.zeros(batch, jnp.int32)

    def basis(self, stored, a, rank):
        return jax.nn.one_hot(stored[0], a, axis=-2)


def _bases(arrays: Mapping[str, np.ndarray]) -> Given:
    return Given(recorded=Recorded(arrays, "P", _columns))


def _projector(variant: str, arrays: Mapping[str, np.ndarray]) -> Projector:
    return _bases(arrays) if "injected" in variant else optlab.svd_projector()


def _adam(h: Any) -> dict[str, Any]:
    return h.move(weight_decay="weight_decay", eps="eps") | h.betas()


def _galore(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    arguments = _adam(h) | h.move(rank="rank", every="update_proj_gap", scale="scale")
    side, rate = _SIDES[h.pop("proj_type")], h.pop("lr")
    projector = _projector(variant, arrays)
    if side == "short":
        return optlab.galore(rate, projector=projector, layout=OUTPUT_FIRST, **arguments)
    h.fixed()
    b1, b2, eps = (arguments.pop(key) for key in ("b1", "b2", "eps"))
    decay = arguments.pop("weight_decay")
    moments = optlab.scale_by_moments(b1, b2, eps, bias_correction=False)
    low = optlab.in_low_rank(moments, projector, side=side, layout=OUTPUT_FIRST, **arguments)
    corrections = optax.scale_by_schedule(
        lambda t: jnp.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
    )
    rated = optax.scale_by_learning_rate(rate)
    return optax.chain(low, corrections, rated, optlab.decay_after_update(rate, decay))


def _fira(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(proj_type="std")
    arguments = _adam(h) | h.move(rank="rank", every="update_proj_gap", scale="alpha")
    arguments |= h.move(growth="limiter_gamma")
    projector, rate = _projector(variant, arrays), h.pop("lr")
    return optlab.fira(rate, official=True, projector=projector, layout=OUTPUT_FIRST, **arguments)


def _apollo(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(proj="random", proj_type="std", scale_front=False, disable_nl=False)
    arguments = _adam(h) | h.move(rank="rank", every="update_proj_gap", scale="scale")
    per = {"channel": "column", "tensor": "matrix"}[h.pop("scale_type")]
    projector, rate = _bases(arrays), h.pop("lr")
    return optlab.apollo(rate, per=per, projector=projector, layout=OUTPUT_FIRST, **arguments)


def _conda(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(proj_type="std")
    arguments = _adam(h) | h.move(every="update_proj_gap", scale="scale")
    projector, rate = optlab.svd_projector(), h.pop("lr")
    return optlab.conda(rate, projector=projector, layout=OUTPUT_FIRST, **arguments)


def _ldadam(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(proj_method="power_iteration", proj_type="std")
    arguments = _adam(h) | h.move(rank="rank", rho="rho", error_feedback="error_feedback")
    # The outputs of a square, and one iteration from an exact start.
    side = lambda inputs, outputs: "rows" if outputs > inputs else "cols"  # noqa: E731
    projector = optlab.power_projector(1, oversample=0, start="svd")
    rate = h.pop("lr")
    return optlab.ldadam(rate, side=side, projector=projector, layout=OUTPUT_FIRST, **arguments)


def _grad_norm_lorp(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(proj_type="std")
    arguments = _adam(h) | h.move(rank="rank", every="update_proj_gap", scale="scale")
    projector, rate = optlab.svd_projector(), h.pop("lr")
    return optlab.grad_norm_lorp(
        rate, official=True, projector=projector, layout=OUTPUT_FIRST, **arguments
    )


def _frugal(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(correct_bias=True, reset_statistics=True, proj_params_lr_scale=1.0)
    h.fixed(inactive_update_rule="sign_sgd")
    h.pop("torch_seed")  # of choices that are recorded
    arguments = _adam(h) | h.move(rank="density", every="update_gap", factor="inactive_lr_scale")
    if "coord_choice" in h:
        h.fixed(coord_choice="columns")
        given = GivenCoordinates(recorded=Recorded(arrays, "idx", _indices))
        density = arguments.pop("rank")
        # The released code truncates the number of columns.
        ranks = {
            k.removeprefix("param."): int(density * v.shape[1])
            for k, v in arrays.items()
            if k.startswith("param.")
        }
        arguments |= {"rank": ranks, "projector": given}
    else:
        h.fixed(proj_type="svd", proj_side="std")
        arguments |= {"side": "short", "projector": optlab.svd_projector()}
    return optlab.frugal(h.pop("lr"), layout=OUTPUT_FIRST, **arguments)


def _q_galore(h: Any, variant: str, arrays: Any) -> optax.GradientTransformation:
    h.fixed(quant=True)
    rule = optlab.lazy_refresh(
        h.pop("update_proj_gap"),
        threshold=h.pop("cos_threshold"),
        queue=h.pop("queue_size"),
        growth=h.pop("gamma_proj"),
        official=True,
    )
    bits, size = h.pop("quant_n_bit"), h.pop("quant_group_size")
    rank, scale = h.pop("rank"), h.pop("scale")

    def low(by: str) -> optax.GradientTransformation:
        projector = optlab.quantized(optlab.svd_projector(), bits, block=size, by=by)
        arguments = {"rank": rank, "scale": scale, "every": rule, "layout": OUTPUT_FIRST}
        return optlab.in_low_rank(optax.identity(), projector, **arguments)

    # A basis of the right side is recorded, and cut into blocks, vector by vector.
    parts = {"vector": low("vector"), "entry": low("entry")}
    split = lambda params: {  # noqa: E731
        name: "vector" if p.shape[0] >= p.shape[1] else "entry" for name, p in params.items()
    }
    rated = optax.scale_by_learning_rate(h.pop("lr"))
    return optax.chain(optax.partition(parts, split), rated)


TRAJECTORIES = {
    "apollo": _apollo,
    "conda": _conda,
    "fira": _fira,
    "frugal": _frugal,
    "galore": _galore,
    "gradnormlorp": _grad_norm_lorp,
    "ldadam": _ldadam,
    "qgalore": _q_galore,
}


def check_internals(case: Any, arrays: Any, state: Any) -> None:
    """Compare what a case records beside its parameters: intervals, and norms of residuals."""
    if case["method"] == "qgalore":
        _check_intervals(case, arrays, state)
    norms = {k: v for k, v in arrays.items() if k.startswith("extra.resnorm.")}
    if norms:
        last = f"extra.resnorm.{case['steps'] - 1}."
        names = sorted(k.removeprefix(last) for k in norms if k.startswith(last))
        found = state.inner_states["matrix"].inner_state[0].residual.norms
        np.testing.assert_allclose(found, [norms[last + n] for n in names], rtol=1e-4)


def _check_intervals(case: Any, arrays: Any, state: Any) -> None:
    h, last = case["hyperparameters"], f"extra.gap.{case['steps'] - 1}."
    recorded = {k.removeprefix(last): int(v) for k, v in arrays.items() if k.startswith(last)}
    found = []
    for by in ("vector", "entry"):
        longer = state[0].inner_states[by].inner_state.refresh.longer
        found += [h["update_proj_gap"] * h["gamma_proj"] ** int(n) for n in longer]
    assert sorted(found) == sorted(recorded.values())
