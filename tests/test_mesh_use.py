"""What optax wraps around an optimizer works on a mesh: injection, masks, accumulation, loops."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from mesh_problem import (
    AXES,
    LAYOUT,
    LEAVES,
    RATES,
    loss,
    mesh_of,
    off,
    recipe,
    shardings_on,
    trees,
)

import optlab


def injected(name, shardings):
    """Return the recipe with every number in its state; the rate is one, too, as a schedule."""
    make = optax.inject_hyperparams(getattr(optlab, name), static_args=("layout",))
    rate = optax.constant_schedule(RATES[name])
    return make(rate, fallback_learning_rate=0.1, layout=LAYOUT, shardings=shardings)


def wrapped(name, shardings):
    """Return the recipe as long runs have it."""
    kernels = {key: "kernel" in key for key in LEAVES}
    inner = optax.chain(
        optax.clip_by_global_norm(10.0), recipe(name, shardings), optax.ema(0.5, debias=False)
    )
    every = optax.MultiSteps(optax.apply_if_finite(inner, 3), 2)
    return optax.masked(every, kernels)


def scanned(tx, problem, steps):
    """Return parameters and state after steps in one loop that donates both, and the shardings."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params, *problem[1:])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=steps)[0], donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, problem.params)
    where = optlab.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=where)(params)
    return (*run(params, state), where)


@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [
        (injected, "normuon", AxisType.Explicit),
        (injected, "lanton", AxisType.Explicit),
        (wrapped, "muon", AxisType.Auto),
        (wrapped, "scion", AxisType.Explicit),
    ],
)
def test_a_loop_over_a_wrapped_recipe_on_a_mesh_is_that_of_one_device(make, name, kind):
    problem, mesh = trees(shardings_on(None)), mesh_of(kind)
    want, want_state, _ = scanned(make(name, None), problem, 6)
    shardings = shardings_on(mesh)
    with jax.set_mesh(mesh):
        tx = make(name, shardings if kind == AxisType.Auto else None)
        got, state, where = scanned(tx, trees(shardings), 6)
    assert off(got, want, problem.params) < 1e-5
    assert off(state, want_state) < 1e-5
    leaves = zip(*(jax.tree.leaves(t) for t in ((got, state), (shardings, where))), strict=True)
    for leaf, sharding in leaves:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("name", RATES)
def test_describe_reads_sharded_parameters_and_state_sharding_any_wrapper(name):
    mesh = mesh_of(AxisType.Auto)
    shardings = shardings_on(mesh)
    params = trees(shardings).params
    tx = optax.named_chain(("a", wrapped(name, shardings)), ("b", injected(name, shardings)))
    routing = optlab.describe(params, tx, layout=LAYOUT)
    assert [row.sharding for row in routing.leaves] == [
        f"P({', '.join(map(repr, spec))})" for _, spec in LEAVES.values()
    ]
    shapes = jax.eval_shape(tx.init, params)
    assert routing.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    where = optlab.state_sharding(tx, params)
    assert jax.tree.structure(where) == jax.tree.structure(shapes)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
    found = [sharding.spec for x, sharding in pairs if x.shape == (8, 16)]
    alike = [spec for shape, spec in LEAVES.values() if shape == (8, 16)]
    # A sum of gradients, an average of updates, and the method's own, twice.
    trees_held = {"lanton": 6}.get(name, 4)
    assert found == alike * trees_held


def without(tree, key):
    return {path: x for path, x in tree.items() if path != key}


@pytest.mark.parametrize("name", RATES)
def test_what_does_not_fit_the_parameters_is_refused_with_the_fix(name):
    mesh = mesh_of(AxisType.Auto)
    shardings, (params, grads, _) = shardings_on(mesh), trees(shardings_on(mesh))

    def step(known, grads):
        tx = recipe(name, known)
        jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p), grads, params)

    with pytest.raises(ValueError, match=f"^{name}: .*only in the parameters.*'up/kernel'"):
        step(shardings, without(grads, "up/kernel"))
    with pytest.raises(ValueError, match=r"no leaf 'up/kernel'.* Call optlab\.shardings_of"):
        step(without(shardings, "up/kernel"), grads)
    with pytest.raises(TypeError, match=r"every leaf, got P\(.* Write optlab\.shardings_of"):
        step({key: spec for key, (_, spec) in LEAVES.items()}, grads)
    uneven = shardings | {"up/kernel": shardings["up/kernel"].update(spec=(("data", "fsdp"), None))}
    step(uneven, grads)
    uneven["layers/kernel"] = shardings["layers/kernel"].update(spec=(AXES, None))
    with pytest.raises(ValueError, match=r"axis 0 of leaf 'layers/kernel'.* into 8 parts"):
        step(uneven, grads)
