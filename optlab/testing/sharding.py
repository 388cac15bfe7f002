"""Devices: shardings of state, Auto and Explicit meshes, shard_map and pmap."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optlab.testing import compare
from optlab.testing.case import Case, Tree, leaves_by_path
from optlab.testing.select import applies


def mesh_of(kind: AxisType, shape=(4, 2), names=("data", "model")) -> Mesh:
    """Return a mesh of 8 devices, 4 by 2 unless said otherwise."""
    if jax.device_count() < 8:
        raise RuntimeError(
            f"the sharding checks need 8 devices, got {jax.device_count()}. Set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported."
        )
    axis_types = (kind,) * len(names)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices()[:8])


def _spec(shape: tuple[int, ...]) -> P:
    """Shard every axis that divides, the last over 'model', an earlier one over 'data'."""
    spec: list[str | None] = [None] * len(shape)
    free = [("model", 2), ("data", 4)]
    for axis in reversed(range(len(shape))):
        if free and shape[axis] % free[0][1] == 0:
            spec[axis] = free.pop(0)[0]
    return P(*spec)


def _placed(mesh: Mesh, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, _spec(x.shape))), tree)


def _check_state_follows(state: Tree, params: Tree, how: str) -> None:
    found, leaves = 0, leaves_by_path(params)
    for path, leaf in leaves_by_path(state).items():
        for name, p in leaves.items():
            if path.endswith(f"/{name}") and leaf.shape == p.shape and leaf.ndim:
                found += 1
                good = leaf.sharding.is_equivalent_to(p.sharding, leaf.ndim)
                assert good, f"{how}: '{path}' is on {leaf.sharding}, its parameter on {p.sharding}"
    shaped = {p.shape for p in leaves.values() if p.ndim}
    kept_apart = [x for x in jax.tree.leaves(state) if x.shape in shaped]
    assert found or not kept_apart, (
        f"{how}: state leaves of the parameters' shapes have other paths"
    )


@applies(unless=["stateless"])
def check_state_sharding(case: Case) -> None:
    """On an Auto mesh, `init` gives a state leaf of a parameter's shape its sharding."""
    params = _placed(mesh_of(AxisType.Auto), case.tree)
    _check_state_follows(case.tx.init(params), params, "init")


@applies(unless=["stateless"])
def check_state_sharding_under_jit(case: Case) -> None:
    """On an Auto mesh, `jax.jit(init)` does so too, where XLA is free to replicate.

    Equal shapes with other shardings are not mixed up.
    """
    mesh = mesh_of(AxisType.Auto)
    whole = jax.device_put(case.tree, NamedSharding(mesh, P()))
    params = {"sharded": _placed(mesh, case.tree), "whole": whole}
    _check_state_follows(jax.jit(case.tx.init)(params), params, "init under jit")


@applies()
def check_explicit_mesh(case: Case) -> None:
    """On an Explicit mesh, state and updates of sharded leaves keep their types and shardings."""
    mesh = mesh_of(AxisType.Explicit)
    tree = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x.shape))
        ),
        case.tree,
    )

    def two_steps(params, grads):
        state = case.tx.init(params)
        for _ in range(2):
            updates, new_state = case.tx.update(grads, state, params)
            compare.same_types(updates, grads, "updates on an Explicit mesh")
            compare.same_types(new_state, state, "state on an Explicit mesh")
            state = new_state
        return state

    with jax.set_mesh(mesh):
        jax.eval_shape(two_steps, tree, tree)


@applies()
def check_sharded_equals_replicated(case: Case) -> None:
    """Two steps on sharded leaves give the numbers of one device."""
    mesh = mesh_of(AxisType.Auto)
    params, sharded_state, state = _placed(mesh, case.tree), None, case.tx.init(case.tree)
    sharded_state = case.tx.init(params)
    step = jax.jit(lambda g, s, p: case.tx.update(g, s, p))
    for index in range(2):
        grads = case.grads(index)
        got, sharded_state = step(_placed(mesh, grads), sharded_state, params)
        want, state = case.step(grads, state, case.tree)
    # Sums over 8 devices round in another order, and an update near the size of its parameters'
    # rounding shows it.
    compare.close((got, sharded_state), (want, state), "two steps on 8 devices", 1e-4, 1e-5)


def _per_device(case: Case) -> Tree:
    """Return gradients for 8 devices whose mean is that of step 0."""
    offsets = jnp.arange(8.0) - 3.5
    spread = lambda g: g[None] + offsets.reshape(8, *[1] * g.ndim)  # noqa: E731
    return jax.tree.map(spread, case.grads())


def _replicated_step(case: Case):
    """Average the gradients over the axis 'batch' and step, fresh state included."""

    def step(grads, params):
        mean = jax.lax.pmean(grads, "batch")
        return case.tx.update(mean, case.tx.init(params), params)

    return step


def _alone(case: Case, grads: Tree, params: Tree, step: Any = None) -> Tree:
    """Return the update of parameters that differ between the devices, as the gradients do."""
    params = jax.tree.map(lambda p, g: 0.1 * g - p, params, grads)
    return (step or case.tx.update)(grads, case.tx.init(params), params)[0]


@applies()
def check_shard_map(case: Case) -> None:
    """Under `jax.shard_map` averaged gradients give one device's step, own ones each its own."""
    mesh, step = mesh_of(AxisType.Auto, (8,), ("batch",)), _replicated_step(case)

    def both(grads, params):
        grads = jax.tree.map(lambda x: x[0], grads)
        alone = _alone(case, grads, params)
        return step(grads, params), jax.tree.map(lambda x: x[None], alone)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P(), P("batch")))
    grads = _per_device(case)
    averaged, alone = jax.device_get(jax.jit(mapped)(grads, case.tree))
    want = case.step(case.grads(), case.tx.init(case.tree), case.tree)
    compare.close(averaged, jax.device_get(want), "a step under shard_map", 1e-4, 1e-5)
    got, own = (jax.tree.map(lambda x: x[6], tree) for tree in (alone, grads))
    want = _alone(case, own, case.tree, case.step)
    compare.close(got, jax.device_get(want), "device 6 alone under shard_map", 1e-4, 1e-5)


@applies()
def check_pmap(case: Case) -> None:
    """Data parallel under `jax.pmap`: the same numbers on each of the 8 devices."""
    mesh_of(AxisType.Auto)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pmap.*", category=DeprecationWarning)
        mapped = jax.pmap(
            _replicated_step(case), "batch", in_axes=(0, None), devices=jax.devices()[:8]
        )
        got = jax.device_get(mapped(_per_device(case), case.tree))
    want = jax.device_get(case.step(case.grads(), case.tx.init(case.tree), case.tree))
    for device in (0, 7):
        part = jax.tree.map(lambda x, d=device: np.asarray(x[d]), got)
        compare.close(part, want, f"device {device} under pmap", 1e-4, 1e-5)


__all__ = [name for name in dir() if name.startswith("check_")]
