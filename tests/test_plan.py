"""`plan`: its table, its totals, and choices never dearer than to let whole matrices travel."""

import collections
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optlab
from optlab import layout
from optlab.distributed import cost
from optlab.linalg import polar

GRID = AbstractMesh((4, 2), ("x", "y"))


def shapes_on(mesh, leaves, dtype=jnp.float32):
    """Return shapes with shardings, of leaves (shape, spec) by path."""
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for path, (shape, spec) in leaves.items()
    }


def planned(tree, **options):
    return optlab.plan(tree, optlab.shardings_of(tree), layout=layout.stacked("^e/"), **options)


def steps(plan):
    return [step for group in plan.groups for step in group.steps]


TREE = shapes_on(
    GRID,
    {
        **{f"up{i}/kernel": ((1024, 4096), P("x", "y")) for i in range(11)},
        "e/kernel": ((8, 512, 1024), P("x", None, None)),
        **{f"free{i}/kernel": ((512, 2048), P()) for i in range(8)},
        "embed/embedding": ((5000, 512), P("x", None)),
        "norm/scale": ((512,), P()),
    },
)
TABLE = """\
matrices  of            spread over  scheme                 GFLOP  MiB  collectives                 busy
       8  (1024, 4096)  x x y        all_to_all             64.42   32  2 all-to-all                100%
       3  (1024, 4096)  x x y        hybrid, 2 to a matrix  47.24   24  2 all-to-all, 2 all-reduce   75%
       8  (512, 2048)   -            split, 8 replicas      8.053   32  1 all-gather                100%
       2  (512, 1024)   -            local                  11.81    0  -                           100%

on one device: 131.5 GFLOP, 88 MiB received; collectives: 1 all-gather, 2 all-reduce, 4 all-to-all"""  # noqa: E501


def test_the_table_shows_what_is_done_where_and_why():
    assert str(planned(TREE)) == TABLE
    assert repr(planned(TREE)) == TABLE


def test_totals_are_the_sums_of_the_rows():
    plan = planned(TREE)
    counts, sizes = collections.Counter(), collections.Counter()
    for step in steps(plan):
        for c in step.collectives:
            counts[c.kind] += c.count
            sizes[c.kind] += c.nbytes
    assert plan.collectives == counts
    assert plan.nbytes == sizes
    assert plan.flops == sum(step.flops for step in steps(plan)) > 0
    assert sum(step.calls for step in steps(plan)) == counts.total()
    assert sum(step.nbytes for step in steps(plan)) == sizes.total()


def test_shapes_are_enough():
    # 800 TB of parameters.
    tree = shapes_on(GRID, {"kernel": ((10_000_000, 20_000_000), P("x", "y"))})
    assert planned(tree).flops > 1e20
    explicit = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    typed = shapes_on(explicit, {"kernel": ((64, 128), P("x", "y"))})
    assert optlab.plan(typed).nbytes == planned(typed).nbytes != {}


def test_leaves_that_are_no_matrices_have_no_part():
    tree = {
        "bias": jnp.ones(4),
        "embed": {"embedding": jnp.ones((8, 4))},
        "lm_head": {"kernel": jnp.ones((4, 8))},
        "missing": {"kernel": None},
        "none": {"kernel": jnp.ones((0, 4))},
    }
    plan = optlab.plan(tree)
    assert (plan.groups, plan.flops, plan.collectives) == ((), 0, {})
    assert "collectives: none" in str(plan)
    view = {"dense": {"kernel": jnp.ones((4, 8))}}
    (group,) = optlab.plan(tree | view).groups
    assert [block.path for block in group.group.blocks] == ["dense/kernel"]


def test_full_rounds_travel_whole_and_a_leftover_is_spread():
    eight = AbstractMesh((8,), ("x",))
    tree = shapes_on(eight, {f"{i}/kernel": ((2048, 8192), P("x", None)) for i in range(10)})
    first, rest = steps(planned(tree, chunk_bytes=2**40))
    assert (first.scheme, first.start, first.stop, first.busy) == ("all_to_all", 0, 8, 1)
    assert (rest.scheme, rest.start, rest.stop) == ("hybrid", 8, 10)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_matrices_than_devices_keep_more_than_half_of_them_busy(count):
    mesh = AbstractMesh((8,), ("x",))
    tree = shapes_on(mesh, {f"{i}/kernel": ((2048, 8192), P("x", None)) for i in range(count)})
    (step,) = steps(planned(tree))
    (whole,) = steps(planned(tree, scheme="all_to_all"))
    assert whole.busy == count / 8
    assert step.busy > 0.5
    assert step.flops < whole.flops


def test_a_narrow_dtype_on_the_way_halves_what_is_exchanged():
    tree = shapes_on(GRID, {f"{i}/kernel": ((64, 128), P("x", "y")) for i in range(8)})
    full, half = planned(tree), planned(tree, comm_dtype=jnp.bfloat16)
    assert half.collectives == full.collectives == {"all-to-all": 2}
    assert 2 * half.nbytes["all-to-all"] == full.nbytes["all-to-all"] == 2 * 4 * 64 * 128
    own = planned(tree, polar=polar.keller(dtype=jnp.bfloat16))
    assert own.nbytes == half.nbytes


def test_groups_stay_under_the_cap_and_come_largest_first():
    tree = {f"{i}/kernel": jnp.ones((64, 64)) for i in range(10)} | {
        f"wide{i}/kernel": jnp.ones((64, 256)) for i in range(3)
    }
    groups = optlab.plan(tree, chunk_bytes=4 * 4 * 64 * 64).groups
    assert [group.group.count for group in groups] == [4, 4, 1, 1, 1, 2]
    assert [group.chunk for group in groups] == [4, 4, 1, 1, 1, 4]


AXES = {"x": 4, "y": 2, "z": 1}
SPECS = [
    P(), P("x", None), P(None, "x"), P("x", "y"), P("y", "x"), P(("x", "y"), None),
    P(None, ("x", "y")), P("z", "x"), P(None, ("x", "z")),
]  # fmt: skip
POLARS = [polar.keller(), polar.polar_express(), polar.keller(form="direct"), polar.svd_polar]


@st.composite
def problems(draw):
    """Equal leaves on a mesh and the options of a plan."""
    sizes = {name: draw(st.sampled_from([1, 2, 4, 8])) for name in AXES}
    rows, cols = (64 * draw(st.integers(1, 40)) for _ in range(2))
    count, spec = draw(st.integers(1, 40)), draw(st.sampled_from(SPECS))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    tree = shapes_on(mesh, {f"{i}/kernel": ((rows, cols), spec) for i in range(count)})
    return tree, count, {"polar": draw(st.sampled_from(POLARS)), "chunk_bytes": 2**40}


@settings(max_examples=200)
@given(problems())
def test_no_choice_is_dearer_than_whole_matrices_and_every_matrix_is_done_once(problem):
    tree, count, options = problem
    plan, price = planned(tree, **options), cost.Costs()
    (group,) = plan.groups
    edges = [(step.start, step.stop) for step in group.steps]
    assert edges[0][0] == 0
    assert edges[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    assert all(0 < step.busy <= 1 for step in group.steps)
    for scheme in ("all_to_all", "local", "split"):
        other = steps(planned(tree, scheme=scheme, **options))
        assert sum(map(price.of, group.steps)) <= sum(map(price.of, other))


@settings(max_examples=50)
@given(problems())
def test_whole_matrices_cost_their_share_of_the_work_and_twice_their_way(problem):
    tree, count, options = problem
    (group,) = planned(tree, scheme="all_to_all", **options).groups
    shards, replicas = group.group.shards, group.group.replicas
    assume(shards > 1)
    (step,) = group.steps
    devices = shards * step.replicas
    each = -(-count // devices)
    one = next(iter(tree.values()))
    assert step.replicas in (1, replicas)
    assert {c.kind: c.nbytes for c in step.collectives}["all-to-all"] == 8 * each * one.size
    assert step.busy == count / (each * devices)
