"""Federated rounds over an axis of a mesh, where devices are clients."""

import functools
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from optlab import _checks
from optlab.combine.rounds import Federated, FederatedState

_WHOLE = FederatedState._make([P()] * len(FederatedState._fields))


def _placed(mesh: Mesh, specs: Any, tree: Any) -> Any:
    """Move what lies elsewhere on an Explicit mesh, where `jax.shard_map` refuses to."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
    return jax.tree.map(lambda spec, x: reshard(x, NamedSharding(mesh, spec)), specs, tree)


@_checks.explain_calls
def clients_on_mesh(rule: Federated, mesh: Mesh, axis_name: str) -> Federated:
    """Spread the clients of a federated method over an axis of a mesh.

    The same numbers as on one device, to the rounding of sums. A device holds its clients' data,
    controls and local copies of the parameters; per round one sum over the devices of what the
    clients report crosses the network. The parameters and the server's state lie whole on every
    device.

    Args:
      rule: from `optlab.fedavg_m`, `scaffold_m`, `afa_cd` or `afa_cs`.
      mesh: of any axes; those not named here hold copies.
      axis_name: the axis of the clients; their number is a multiple of its size.

    Returns:
      A `Federated` with the same init and round, for use under `jax.jit` or not. What has an axis
      of clients is split along it: batches, participants, local_steps, start, `state.clients`.

    Raises:
      ValueError: an axis that the mesh lacks; at init, a number of clients that does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optlab
      >>> mesh = jax.make_mesh((1,), ("clients",))
      >>> loss = lambda p, batch: jnp.sum((p - batch) ** 2) / 2
      >>> rule = optlab.clients_on_mesh(optlab.fedavg_m(loss, 0.5, optax.sgd(1.0)), mesh, "clients")
      >>> p, batches = jnp.zeros(1), jnp.array([[[1.0]], [[3.0]]])
      >>> p, state = jax.jit(rule.round)(p, rule.init(p, 2), batches)
      >>> print(p)
      [0.8]
    """
    name = "clients_on_mesh"
    if not isinstance(rule, Federated):
        fix = " Build it first, e.g. optlab.fedavg_m(loss, 0.1, optax.sgd(1.0))."
        raise _checks.refusal(TypeError, name, "rule", "a Federated", rule, fix)
    _checks.check_choice(name, "axis_name", axis_name, mesh.axis_names)
    split, size = P(axis_name), mesh.shape[axis_name]
    specs = _WHOLE._replace(clients=split)

    def init(params: Any, clients: int) -> FederatedState:
        _checks.check_steps(name, 1, clients=clients)
        if clients % size:
            must = f"a multiple of the {size} devices along {axis_name!r}"
            fix = " Add clients that never take part."
            raise _checks.refusal(ValueError, name, "clients", must, clients, fix)
        state = rule.init(params, clients)
        placed = jax.device_put(state.clients, NamedSharding(mesh, split))
        return state._replace(clients=placed)

    def round_(params: Any, state: FederatedState, batches: Any, **given: Any) -> Any:
        given = {key: value for key, value in given.items() if value is not None}

        def local(params, state, batches, given):
            return rule.round(params, state, batches, axis_name=axis_name, **given)

        in_specs = (P(), specs, split, split)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs))
        return mapped(*_placed(mesh, in_specs, (params, state, batches, given)))

    return Federated(init, functools.wraps(rule.round)(round_))
