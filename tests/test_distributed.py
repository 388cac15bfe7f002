"""Every scheme on every kind of mesh: one device's numbers, at the price that the plan names."""

from typing import Any, NamedTuple

import pytest
import sharded
from jax.sharding import PartitionSpec as P
from sharded import AUTO, EXPLICIT, SHORT, equal

import optlab
from benchmarks import hlo
from optlab.distributed import cost

LINE, GRID = {"x": 8}, {"x": 4, "y": 2}
ROWS, COLS, BOTH = P("x", None), P(None, "x"), P("x", "y")
each_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)


class Case(NamedTuple):
    """Leaves on a mesh, the scheme asked for, and the forms that the plan should take."""

    mesh: dict[str, int]
    leaves: sharded.Leaves
    scheme: str
    forms: set[tuple[str, int, int, bool]]


def case(mesh: dict[str, int], count: int, spec: P, scheme: str, *forms: Any) -> Case:
    """Return a case of equal matrices; a form is written (scheme, parts, replicas, scatter)."""
    whole = {(name, 1, 1, False) for name in forms if isinstance(name, str)}
    others = {form for form in forms if not isinstance(form, str)}
    return Case(mesh, equal(count, (32, 64), spec), scheme, whole | others)


MIXED = (
    ("attn/out/kernel", (4, 16, 32), P("y", None, "x")),
    ("attn/query/kernel", (64, 4, 8), P(None, "x", None)),
    ("conv/kernel", (2, 2, 16, 32), P(None, None, "x", "y")),
    ("down/kernel", (64, 32), P("y", "x")),
    ("experts/kernel", (8, 32, 64), P("x", None, "y")),
    ("heads/query/kernel", (64, 8, 32), P("x", "y", None)),
    ("layers/kernel", (3, 32, 64), P(None, "x", "y")),
    ("norm/scale", (32,), P("x")),
    ("up/kernel", (32, 64), P("x", "y")),
)
SQUARES = (
    ("key/kernel", (128, 128), P("x", "y")),
    ("out/kernel", (128, 128), P("y", "x")),
    ("query/kernel", (128, 128), P("x", "y")),
)
TRANSPOSES = tuple((f"up{i}/kernel", (32, 64), ROWS) for i in range(4)) + tuple(
    (f"down{i}/kernel", (64, 32), COLS) for i in range(4)
)
EXPERTS = (("experts/up/kernel", (16, 32, 64), P("x", None, None)),)
CASES = {
    "rows, 3": case(LINE, 3, ROWS, "hybrid", ("hybrid", 2, 1, False)),
    "rows, 8": case(LINE, 8, ROWS, "all_to_all", "all_to_all"),
    "rows, 20": case(LINE, 20, ROWS, "auto", "all_to_all"),
    "columns, 3": case(LINE, 3, COLS, "gram", ("gram", 8, 1, False)),
    "columns, 9": case(LINE, 9, COLS, "hybrid", ("hybrid", 2, 1, False)),
    "columns, 20": case(LINE, 20, COLS, "all_to_all", "all_to_all"),
    "both, 9": case(GRID, 9, BOTH, "all_to_all", "all_to_all"),
    "both turned, 3": case(GRID, 3, P("y", "x"), "gram", ("gram", 8, 1, False)),
    "two axes on rows, 9": case(GRID, 9, P(("x", "y"), None), "all_to_all", "all_to_all"),
    "two axes on columns, 3": case(GRID, 3, P(None, ("y", "x")), "gram", ("gram", 8, 1, False)),
    "replicas, 8": case(GRID, 8, ROWS, "all_to_all", "all_to_all"),
    "replicated, 3": case(LINE, 3, P(), "local", "local"),
    "replicated, 20": case(GRID, 20, P(), "split", ("split", 1, 8, False)),
    "experts": Case(LINE, EXPERTS, "auto", {("local", 1, 1, False)}),
    "transposes": Case(LINE, TRANSPOSES, "all_to_all", {("all_to_all", 1, 1, False)}),
    "squares": Case(GRID, SQUARES, "all_to_all", {("all_to_all", 1, 1, False)}),
    "mixed": Case(GRID, MIXED, "all_to_all", {("all_to_all", 1, 1, False)}),
}


@each_kind
@pytest.mark.parametrize("name", CASES)
def test_a_scheme_gives_one_devices_numbers_at_the_price_of_the_plan(name, kind):
    mesh, leaves, scheme, forms = CASES[name]
    tree = sharded.place(leaves, sharded.mesh_of(mesh, kind))
    done = sharded.run(tree, scheme=scheme)
    assert sharded.forms(done) == forms
    sharded.check_numbers(done.out, sharded.unsharded(leaves, "keller"))
    sharded.check_places(done.out, tree)
    sharded.check_costs(done)
    # Products outweigh all else by 20 from a short side of 32 on; of a square from 128.
    assert 1 <= sharded.flops_ratio(done) < 1.05


SHARDED_BY_8 = {("all_to_all", 1, 1, False), ("gram", 8, 1, False), ("gram", 8, 1, True)}
SHARDED_BY_8 |= {("hybrid", parts, 1, scatter) for parts in (2, 4) for scatter in (False, True)}
SHARDED_BY_4 = {("gram", 4, 1, False), ("gram", 4, 1, True)}
SHARDED_BY_4 |= {("hybrid", 2, 1, False), ("hybrid", 2, 1, True)}
SHARDED_BY_4 |= {("all_to_all", 1, replicas, False) for replicas in (1, 2)}
FORMS = {
    "rows": (LINE, ROWS, SHARDED_BY_8),
    "columns": (LINE, COLS, SHARDED_BY_8),
    "both": (GRID, BOTH, SHARDED_BY_8),
    "both turned": (GRID, P("y", "x"), SHARDED_BY_8),
    "two axes on rows": (GRID, P(("x", "y"), None), SHARDED_BY_8),
    "two axes on columns": (GRID, P(None, ("y", "x")), SHARDED_BY_8),
    "replicas, rows": (GRID, ROWS, SHARDED_BY_4),
    "replicas, columns": (GRID, COLS, SHARDED_BY_4),
    "replicas": (GRID, P(), {("local", 1, 1, False), ("split", 1, 8, False)}),
}
COUNTS = (3, 9, 8, 20)


def leaves_for(forms: set, spec: P) -> sharded.Leaves:
    """Return a bucket for every form: 64, 128, ... long, of varying numbers of matrices."""
    return tuple(
        (f"layers/{k}", (COUNTS[k % 4], 16, 64 * (k + 1)), P(None, *spec))
        for k in range(len(forms))
    )


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_every_scheme_does_what_the_plan_says(name, monkeypatch):
    mesh, spec, forms = FORMS[name]

    def choose(work, count, scheme, costs):
        return (list(cost.candidates(work, 0, count))[work.cols // 64 - 1],)

    monkeypatch.setattr(cost, "choose", choose)
    leaves = leaves_for(forms, spec)
    tree = sharded.place(leaves, sharded.mesh_of(mesh, EXPLICIT))
    done = sharded.run(tree, SHORT)
    assert sharded.forms(done) == forms
    monkeypatch.undo()
    sharded.check_numbers(done.out, sharded.unsharded(leaves, SHORT))
    sharded.check_places(done.out, tree)
    sharded.check_costs(done)


@each_kind
def test_eight_matrices_on_eight_devices_cost_two_collectives_and_an_eighth_of_the_work(kind):
    leaves = equal(8, (256, 1024), P("fsdp", None))
    tree = sharded.place(leaves, sharded.mesh_of({"fsdp": 8}, kind))
    done = sharded.run(tree)
    assert hlo.collective_counts(done.text) == {"all-to-all": 2}
    assert hlo.collective_bytes(done.text).total() <= 2.05 * 2**20
    sharded.check_costs(done)
    total = 8 * optlab.polar.keller().flops(256, 1024, "float32")
    assert done.update.cost_analysis()["flops"] <= 1.05 * total / 8
    sharded.check_numbers(done.out, sharded.unsharded(leaves, "keller"))
