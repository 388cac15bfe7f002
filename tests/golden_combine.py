"""Replays the golden cases of rules that combine gradients: of tasks, and of clients.

All in float64. The clients' losses are quadratics, (x - c_i)^T A_i (x - c_i)/2.
"""

from typing import Any

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.combine.federated import afa_cd, afa_cs, fedavg_m, scaffold_m
from optlab.combine.multitask import mgda, pareto_da

# Absolute; the weights of MGDA are an exact minimizer's, the recorded ones a solver's to 1e-9.
TASKS_TOLERANCE, CLIENTS_TOLERANCE = 1e-8, 1e-12
_SOLVED = {"G", "weights", "min_norm_sq"}
# Of other solvers, recorded beside the target.
_OTHERS = {"official_weights", "official_norm_sq", "frank_wolfe_official"}
_TWO = "two_task_closed_form_weight_on_first"


def _only(given: Any, known: set[str]) -> None:
    unknown = set(given) - known
    if unknown:
        raise NotImplementedError(f"unknown fields {sorted(unknown)}")


def _near(found: Any, wanted: Any, bound: float, what: str = "") -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound, err_msg=what)


def mgda_min_norm(case: Any, arrays: Any) -> None:
    """Check weights and length of the shortest combination."""
    _only(case, {"method", "source", "cases"})
    with jax.enable_x64(True):
        for index, one in enumerate(case["cases"]):
            _only(one, _SOLVED | _OTHERS | {_TWO})
            found, what = mgda(jnp.asarray(one["G"])), f"case {index}"
            _near(found.weights, one["weights"], TASKS_TOLERANCE, what)
            _near(found.gradient @ found.gradient, one["min_norm_sq"], TASKS_TOLERANCE, what)
            _near(found.weights[0], one.get(_TWO, found.weights[0]), TASKS_TOLERANCE, what)


def paretoda_epo_weights(case: Any, arrays: Any) -> None:
    """Check ParetoDA's weights, which are n times those of the linear program, and its value."""
    _only(case, {"method", "source", "cases"})
    known = {"G", "g_val", "loss_val", "alpha", "mode", "inner_products_with_val"}
    with jax.enable_x64(True):
        for index, one in enumerate(case["cases"]):
            _only(one, known)
            g, v = jnp.asarray(one["G"]), jnp.asarray(one["g_val"])
            found = pareto_da(g, target_gradient=v, target_loss=one["loss_val"])
            weights, wanted = np.asarray(found.weights) / len(g), np.asarray(one["alpha"])
            toward = {"bal": g @ v, "dom": (g @ g.T).sum(axis=0)}[one["mode"]]
            _near(weights @ toward, wanted @ toward, TASKS_TOLERANCE, f"case {index}, objective")
            _near(weights, wanted, TASKS_TOLERANCE, f"case {index}")
            _near(g @ v, one["inner_products_with_val"], TASKS_TOLERANCE)


def _loss(x: jax.Array, batch: Any) -> jax.Array:
    a, c = batch
    return (x - c) @ a @ (x - c) / 2


def _batches(case: Any, steps: int) -> Any:
    """Repeat every client's quadratic for each of its local steps."""
    return tuple(jnp.repeat(jnp.asarray(case[key])[:, None], steps, axis=1) for key in ("A", "c"))


def _check_rounds(
    case: Any, rule: Any, batches: Any, rounds: Any, wanted: dict[str, str], state_of: Any
) -> None:
    """Check parameters and state after every round; `rounds` gives the keywords of each."""
    x = jnp.asarray(case["x0"])
    seen, state, step = [x], rule.init(x, len(case["A"])), jax.jit(rule.round)
    for t in range(len(case[wanted["x"]]) - 1):
        found = {"x": x} | state_of(state)
        for key, recorded in wanted.items():
            _near(found[key], case[recorded][t], CLIENTS_TOLERANCE, f"{key} before round {t}")
        x, state = step(x, state, batches, **rounds(t, seen))
        seen.append(x)
    _near(x, case[wanted["x"]][-1], CLIENTS_TOLERANCE, "the last parameters")
    assert np.abs(x - seen[0]).max() > 0.1, "the case does not move: it proves nothing"


def _momentum(case: Any, make: Any, wanted: dict[str, str]) -> None:
    h = golden_cases.Hyper(case["params"])
    clients, steps = len(case["A"]), h.pop("K")
    if "participants" not in case:
        h.fixed(R=len(case["x"]) - 1)
    everyone = [list(range(clients))] * (len(case["x"]) - 1)
    present = case.get("participants", everyone)
    masks = np.asarray([[i in who for i in range(clients)] for who in present])
    rule = make(_loss, h.pop("eta"), optax.sgd(h.pop("gamma")), beta=h.pop("beta"))
    _only(h, set())
    rounds = lambda t, seen: {"participants": masks[t]}  # noqa: E731
    state_of = lambda state: {"g": state.direction, "control": state.control}  # noqa: E731
    _check_rounds(case, rule, _batches(case, steps), rounds, wanted, state_of)


def fedavg_momentum(case: Any, arrays: Any) -> None:
    """Check parameters and global direction of every round."""
    _only(case, {"method", "source", "verified", "A", "c", "x0", "params", "x", "g"})
    with jax.enable_x64(True):
        _momentum(case, fedavg_m, {"x": "x", "g": "g"})


def scaffold_momentum(case: Any, arrays: Any) -> None:
    """Check parameters, global direction and the server's control of every round."""
    known = {"method", "source", "verified", "A", "c", "x0", "params", "participants"}
    _only(case, known | {"x", "g", "c_global"})
    with jax.enable_x64(True):
        _momentum(case, scaffold_m, {"x": "x", "g": "g", "control": "c_global"})


def anarchic(case: Any, arrays: Any) -> None:
    """Check both averagings: arrivals at will, from parameters of rounds ago."""
    known = {"method", "source", "verified", "A", "c", "x0", "params", "x_cd", "x_cs"}
    _only(case, known | {"arrivals_client_delay_K"})
    arrivals, clients = case["arrivals_client_delay_K"], len(case["A"])
    h = golden_cases.Hyper(case["params"])
    local = h.pop("eta_local")
    server = optax.sgd(h.pop("eta") * local)
    _only(h, set())

    def rounds(t, seen):
        steps, start = np.zeros(clients, "int32"), [seen[t]] * clients
        for client, delay, count in arrivals[t]:
            steps[client], start[client] = count, seen[max(t - delay, 0)]
        return {"local_steps": steps, "start": jnp.stack(start)}

    with jax.enable_x64(True):
        batches = _batches(case, max(count for one in arrivals for _, _, count in one))
        for make, recorded in ((afa_cd, "x_cd"), (afa_cs, "x_cs")):
            rule = make(_loss, local, server)
            _check_rounds(case, rule, batches, rounds, {"x": recorded}, lambda state: {})


CASES = {
    "mgda_min_norm": mgda_min_norm,
    "paretoda_epo_weights": paretoda_epo_weights,
    "fedavg_m": fedavg_momentum,
    "scaffold_m": scaffold_momentum,
    "anarchic_fedavg": anarchic,
}
