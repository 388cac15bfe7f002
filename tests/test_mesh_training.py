"""Recipes that orthogonalize train on a mesh as on one device, and resume on another mesh."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from mesh_problem import LEAVES, RATES, mesh_of, off, recipe, shardings_on, train, trained, trees

import optlab

SAME = 1e-12  # of how far a leaf has come, or of its largest value
RECIPES = tuple(RATES)
KINDS = (AxisType.Auto, AxisType.Explicit)
on_a_mesh = pytest.mark.parametrize("kind", KINDS, ids=str)
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def float64():
    """Train in float64: ten steps of Newton-Schulz make float32's roundings up to 3e-5."""
    with jax.enable_x64(True):
        yield


@on_a_mesh
@each_recipe
def test_ten_steps_on_a_mesh_are_those_of_one_device(name, kind):
    one, many = trained(name, None), trained(name, kind)
    (start, _), (want, want_state), (got, state) = one.at[0], one.at[10], many.at[10]
    far = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), want, start)
    assert min(far.values()) > 0.1, far
    assert off(got, want, start) < SAME
    assert off(state, want_state) < SAME


@on_a_mesh
@each_recipe
def test_state_lies_with_its_parameters_from_init_to_the_end(name, kind):
    run, mesh = trained(name, kind), mesh_of(kind)
    assert run.traces == 1
    tx = recipe(name, shardings_on(mesh))
    params, at_init = run.at[0]
    with jax.set_mesh(mesh):
        wanted = optlab.state_sharding(tx, params)
        eager = tx.init(params)
        placed = jax.jit(tx.init, out_shardings=wanted)(params)
    for found in (at_init, run.at[10][1], eager, placed):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.shape, sharding)
    momentum = [x.sharding.spec for x in jax.tree.leaves(at_init) if x.shape == (8, 16)]
    assert len(set(momentum)) == 3, "three shardings of one shape stay apart"
    for leaf, key in zip(run.at[10][0].values(), LEAVES, strict=True):
        assert leaf.sharding.is_equivalent_to(params[key].sharding, leaf.ndim)


@each_recipe
def test_a_checkpoint_of_eight_devices_resumes_on_four_and_on_one(name, tmp_path):
    whole = trained(name, AxisType.Auto)
    (start, _), (want, want_state) = whole.at[0], whole.at[10]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_5", whole.at[5])
        checkpointer.wait_until_finished()
        for mesh in (mesh_of(AxisType.Explicit, (1, 2, 2)), None):
            shardings = shardings_on(mesh)
            problem, tx = trees(shardings), recipe(name, shardings)
            like = jax.eval_shape(lambda p, tx=tx: (p, tx.init(p)), problem.params)
            where = shardings, optlab.state_sharding(tx, problem.params)
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, where
            )
            params, state = checkpointer.restore(tmp_path / "step_5", like)
            with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
                run = train(tx, problem._replace(params=params), 10, state=state, first=5)
            got, got_state = run.at[10]
            assert off(got, want, start) < SAME
            assert off(got_state, want_state) < SAME
