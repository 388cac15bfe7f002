"""`orthogonalize` as it is used on a mesh: dtypes, chunks, jit or none, shard_map, mixed meshes."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax.sharding import PartitionSpec as P
from sharded import AUTO, EXPLICIT, SHORT, equal

import optlab
from benchmarks import hlo
from optlab.distributed import apply, cost, options, plan

LINE, GRID = {"x": 8}, {"x": 4, "y": 2}
ROWS, COLS, BOTH = P("x", None), P(None, "x"), P("x", "y")
each_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)

# --- dtypes ---------------------------------------------------------------------------------------


HALF = 2 * 2 * 32 * 64  # of eight whole matrices that come to eight devices and go back


def moved(done):
    """Return the elements of what the program sends, as it was before the compiler.

    On a CPU the compiler widens to float32 what is exchanged in bfloat16.
    """
    return re.findall(r"all_to_all.* -> tensor<[\dx]*x(\w+)>", done.lowered)


NARROW = {
    "comm_dtype": ("float32", SHORT, {"comm_dtype": jnp.bfloat16}, 2e-2),
    "iteration": ("float32", optlab.polar.keller(3, dtype=jnp.bfloat16), {}, 2e-2),
    # Entries are below 1: a last bit is half of eps.
    "leaves": ("bfloat16", SHORT, {}, 2**-8),
}


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_on_the_way_halves_the_bytes(name):
    dtype, iteration, given, tolerance = NARROW[name]
    leaves = equal(8, (32, 64), ROWS)
    tree = sharded.place(leaves, sharded.mesh_of(LINE, AUTO), dtype)
    done = sharded.run(tree, iteration, **given)
    assert moved(done) == ["bf16"] * 2
    assert done.plan.nbytes == {"all-to-all": HALF}
    sharded.check_numbers(done.out, sharded.unsharded(leaves, SHORT, dtype), tolerance)


@pytest.mark.parametrize(
    ("dtype", "given", "tolerance"),
    [("float32", {"comm_dtype": "float16"}, 5e-3), ("float16", {}, 2**-11)],
)
def test_float16_on_the_way_halves_the_bytes_of_the_compiled_program(dtype, given, tolerance):
    leaves = equal(8, (32, 64), ROWS)
    tree = sharded.place(leaves, sharded.mesh_of(LINE, EXPLICIT), dtype)
    done = sharded.run(tree, SHORT, **given)
    assert hlo.collective_bytes(done.text) == {"all-to-all": HALF}
    sharded.check_costs(done)
    sharded.check_numbers(done.out, sharded.unsharded(leaves, SHORT, dtype), tolerance)


@pytest.mark.parametrize("scheme", ["all_to_all", "gram"])
def test_float64_agrees_to_1e_12(scheme):
    leaves = equal(3, (16, 64), COLS)
    with jax.enable_x64(True):
        tree = sharded.place(leaves, sharded.mesh_of(LINE, AUTO), "float64")
        done = sharded.run(tree, scheme=scheme)
        want = sharded.unsharded(leaves, "keller", "float64")
    sharded.check_numbers(done.out, want, 1e-12)
    sharded.check_costs(done)


# --- memory ---------------------------------------------------------------------------------------

MATRIX = 4 * 64 * 64
# Leaves, matrices at a time, loops, and the share of the memory that is left. The compiler for CPUs
# drops what makes one stack wait for another, so several share less there than they could.
CHUNKED = {
    "many leaves": (equal(8, (64, 64), P()), 2, 0, 0.85),
    "one leaf": ((("layers/kernel", (24, 64, 64), P()),), 4, 1, 0.5),
    "one leaf, an odd number": ((("layers/kernel", (7, 64, 64), P()),), 3, 1, 0.7),
}


def loops(done):
    return hlo.launched(done.text)["while"]


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_take_less_memory_for_the_same_numbers(name):
    leaves, most, expected, share = CHUNKED[name]
    tree = sharded.draw({name: shape for name, shape, _ in leaves})
    tree = {key: jnp.asarray(x) for key, x in tree.items()}
    whole = sharded.run(tree, SHORT, shardings=None)
    less = sharded.run(tree, SHORT, shardings=None, chunk_bytes=most * MATRIX)
    sharded.check_numbers(less.out, whole.out)
    assert (loops(whole), loops(less)) == (0, expected)
    taken = [done.update.memory_analysis().temp_size_in_bytes for done in (whole, less)]
    assert taken[1] < share * taken[0], taken
    groups = len(less.plan.groups)
    # One where a group waits for another, one where its leaves are taken apart.
    several = sum(len(planned.group.blocks) > 1 for planned in less.plan.groups)
    assert less.lowered.count("optimization_barrier") == groups - 1 + several
    dots = [done.text.count(" dot(") for done in (whole, less)]
    assert dots[1] == dots[0] * groups


def test_what_a_device_owns_of_a_mesh_is_processed_in_chunks():
    leaves = (("layers/kernel", (64, 64, 64), P(None, "x", None)),)
    tree = sharded.place(leaves, sharded.mesh_of(LINE, AUTO))
    whole = sharded.run(tree, SHORT)
    less = sharded.run(tree, SHORT, chunk_bytes=2 * MATRIX)
    sharded.check_numbers(less.out, sharded.unsharded(leaves, SHORT))
    sharded.check_costs(less)
    assert (loops(whole), loops(less)) == (0, 1)
    taken = [done.update.memory_analysis().temp_size_in_bytes for done in (whole, less)]
    assert taken[1] < 0.9 * taken[0], taken


# --- contexts -------------------------------------------------------------------------------------


def unit(x):
    """As cheap a function of whole matrices as there is: without jit every step is compiled."""
    return x / jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)


@each_kind
def test_without_jit_and_with_one_trace_for_all_steps(kind):
    leaves = (*equal(3, (16, 32), BOTH), ("norm/scale", (16,), P("x")))
    tree = sharded.place(leaves, sharded.mesh_of(GRID, kind))
    tx = optlab.orthogonalize(unit, shardings=sharded.known(tree))
    want = sharded.unsharded(leaves, unit)
    eager, _ = tx.update(tree, tx.init(tree))
    sharded.check_numbers(eager, want)
    sharded.check_places(eager, tree)
    traces = 0

    @jax.jit
    def step(tree):
        nonlocal traces
        traces += 1
        return tx.update(tree, ())[0]

    found = tree
    for _ in range(3):
        found = jax.block_until_ready(step(found))
    assert traces == 1
    sharded.check_places(found, tree)


@pytest.mark.parametrize("told", [True, False])
def test_a_mesh_of_which_one_axis_is_explicit(told):
    leaves = (*equal(3, (16, 32), BOTH), ("free/kernel", (16, 32), P(None, "x")))
    tree = sharded.place(leaves, sharded.mesh_of(GRID, AUTO, EXPLICIT))
    done = sharded.run(tree, SHORT, shardings=optlab.shardings_of(tree) if told else None)
    sharded.check_numbers(done.out, sharded.unsharded(leaves, SHORT))
    for name, leaf in tree.items():
        assert jax.typeof(done.out[name]) == jax.typeof(leaf)
    spread = {planned.group.shards for planned in done.plan.groups}
    assert spread == ({8, 4} if told else {2, 1})
    if told:
        sharded.check_costs(done)
        sharded.check_places(done.out, tree)


@each_kind
def test_inside_a_shard_map_over_all_axes_every_device_works_on_its_own(kind):
    leaves = (("a/kernel", (8 * 16, 32), P("x")),)
    tree = sharded.place(leaves, sharded.mesh_of(LINE, kind))
    tx = optlab.orthogonalize(SHORT, shardings=sharded.known(tree))
    mapped = jax.shard_map(
        lambda tree: tx.update(tree, ())[0],
        mesh=sharded.mesh_of(LINE, kind),
        in_specs=P("x"),
        out_specs=P("x"),
    )
    update = sharded.compiled(mapped, tree)
    assert hlo.collectives(update.as_text()) == 0
    check_parts(update(tree), tree, 8)


@each_kind
def test_inside_a_shard_map_over_one_axis_the_other_one_shares_the_work(kind):
    leaves = (("a/kernel", (4 * 16, 32), BOTH),)
    mesh = sharded.mesh_of(GRID, kind)
    tree = sharded.place(leaves, mesh)
    tx = optlab.orthogonalize(SHORT, shardings=sharded.known(tree), scheme="all_to_all")
    mapped = jax.shard_map(
        lambda tree: tx.update(tree, ())[0],
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
    )
    update = sharded.compiled(mapped, tree)
    # On an Explicit mesh JAX 0.10.2 itself gathers what such a shard_map takes and gives.
    by_jax = Counter({"all-gather": 2} if kind == EXPLICIT else {})
    assert hlo.collective_counts(update.as_text()) - by_jax == {"all-to-all": 2}
    check_parts(update(tree), tree, 4)


def check_parts(out, tree, count):
    """Compare with each device's part as a matrix of its own."""
    stack = np.asarray(tree["a/kernel"]).reshape(count, 16, 32)
    want = sharded.compiled(SHORT, jnp.asarray(stack))(stack)
    np.testing.assert_allclose(out["a/kernel"], np.concatenate(want), rtol=0, atol=1e-5)


# --- numbers instead of matrices ------------------------------------------------------------------

VALUES = {
    "columns": (LINE, COLS, "all_to_all"),
    "replicas": (GRID, P(None, "x"), "all_to_all"),
    "replicated": (LINE, P(), "split"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_number_per_matrix_costs_half_the_way_and_comes_to_every_device(name):
    mesh, spec, scheme = VALUES[name]
    leaves = (*equal(3, (16, 64), spec), ("layers/kernel", (6, 16, 64), P(None, *spec)))
    tree = sharded.place(leaves, sharded.mesh_of(mesh, AUTO))
    asked = options.matrix_options("test", SHORT, sharded.LAYOUT, scheme=scheme)
    known = optlab.shardings_of(tree)

    norms = partial(jnp.linalg.norm, axis=(-2, -1))

    def values(tree):
        return apply.matrix_values("test", norms, plan.named_leaves(tree), known, asked)

    update = sharded.compiled(values, tree)
    for found, leaf in zip(update(tree), tree.values(), strict=True):
        np.testing.assert_allclose(found, np.linalg.norm(leaf, axis=(-2, -1)), rtol=1e-6)
        assert found.sharding.is_fully_replicated
    (planned,) = plan.make("test", plan.named_leaves(tree), known, asked).groups
    work = cost.work_of(planned.group, SHORT, 4, returns_matrices=False)
    (step,) = cost.choose(work, 9, scheme, cost.Costs())
    counted = {c.kind: c.count for c in step.collectives}
    assert hlo.collective_counts(update.as_text()) == counted
    assert hlo.collective_bytes(update.as_text()) == {c.kind: c.nbytes for c in step.collectives}
