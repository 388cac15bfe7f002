"""Laws of `select_blocks`: who moves, in which order, and what becomes of the inner state."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference.select_blocks import select_blocks as reference
from stepping import steps

import optlab
from benchmarks import hlo
from optlab.linalg.largest import largest_entries
from optlab.testing.case import random_like
from optlab.transforms.select_blocks import select_blocks

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 2, 3)}
NAMES = list(SHAPES)
LEAVES = [[name] for name in NAMES]
PAIRS = {"a": 1, "b": 0, "c": 1, "d": 0}
CONSTANTS = {"a": 9.0, "b": 0.5, "c": 2.0, "d": 4.0}
DIAGONAL = {name: np.abs(x) + 0.1 for name, x in random_like(SHAPES, seed=90).items()}
STEPS = 7
# Absolute, on parameters of size 1: a few roundings.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def _grads(number=STEPS):
    return [random_like(SHAPES, seed=t + 1) for t in range(number)]


GRADS = _grads()


class Row:
    """The same rule in our words and in the reference's."""

    def __init__(self, rule, k=1, *, blocks=LEAVES, bound=None, order=None, **arguments):
        self.rule, self.k, self.blocks, self.bound = rule, k, blocks, bound
        self.groups = {"groups": PAIRS} if blocks is not LEAVES else {}
        self.sign = arguments.pop("sign", 0.0)
        self.arguments = arguments

    def tx(self):
        others = optax.chain(optlab.apply_kappa(), optax.scale(self.sign)) if self.sign else None
        return select_blocks(
            optax.scale_by_adam(),
            self.rule,
            self.k,
            bound=self.bound,
            others=others,
            **self.groups,
            **self.arguments,
        )

    def reference(self, params, grads, rate):
        bound = list(self.bound.values()) if self.rule == "gsl" else self.bound
        return reference(
            params,
            grads,
            rate,
            rule=self.rule,
            k=self.k,
            blocks=self.blocks,
            bound=bound,
            sign=self.sign,
            **self.arguments,
        )


ROWS = {
    "gs": Row("gs"),
    "gs-normalized-every": Row("gs", 2, normalize=True, every=3),
    "gs-pairs": Row("gs", blocks=[["b", "d"], ["a", "c"]], normalize=True),
    "gsl": Row("gsl", 2, bound=CONSTANTS, inner_state="follow"),
    "gsd": Row("gsd", bound=DIAGONAL, sign=0.5),
    "top_k": Row("top_k", 9),
    "top_k-bound-every": Row("top_k", 9, bound=DIAGONAL, every=2, inner_state="restart", sign=2.0),
    "ascending-restart": Row("ascending", every=3, inner_state="restart", sign=1.0),
    "descending-pairs": Row("descending", blocks=[["b", "d"], ["a", "c"]], every=2),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ROWS)
def test_trajectory_is_the_references(name, dtype):
    row, rate = ROWS[name], 0.1
    start = random_like(SHAPES, seed=0)
    exact = [{k: np.asarray(x, np.float64) for k, x in tree.items()} for tree in (start, *GRADS)]
    expected = row.reference(exact[0], exact[1:], rate)
    with jax.enable_x64(dtype == "float64"):
        tx = optax.chain(row.tx(), optax.scale_by_learning_rate(rate))
        params, *grads = [{k: jnp.asarray(x, dtype) for k, x in tree.items()} for tree in exact]
        state, step = tx.init(params), jax.jit(tx.update)
        for t, (g, (want, masks)) in enumerate(zip(grads, expected, strict=True)):
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
            for i, leaf in enumerate(NAMES):
                chosen = state[0].chosen[leaf if row.rule == "top_k" else i]
                np.testing.assert_array_equal(
                    np.broadcast_to(chosen, SHAPES[leaf]), masks[leaf], f"step {t}, {leaf}"
                )
                np.testing.assert_allclose(
                    params[leaf], want[leaf], rtol=0, atol=TOLERANCE[dtype], err_msg=f"{t}, {leaf}"
                )


def _choices(tx, grads, params=None):
    params = grads[0] if params is None else params
    state, step, out = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        _, state = step(g, state, params)
        out.append(np.asarray(state.chosen))
    return out


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rule", ["ascending", "descending", "random"])
def test_every_block_has_its_turn_in_a_sweep(rule, k):
    tree = {f"{i}": jnp.ones(1) for i in range(5)}
    turns = math.ceil(5 / k)
    chosen = _choices(select_blocks(optax.identity(), rule, k), [tree] * (3 * turns))
    assert {int(c.sum()) for c in chosen} == {k}
    for sweep in range(3):
        assert np.any(chosen[sweep * turns : (sweep + 1) * turns], axis=0).all()


def test_ascending_closes_to_a_ring_and_descending_is_its_mirror():
    tree = {f"{i}": jnp.ones(1) for i in range(5)}
    up, down = (
        _choices(select_blocks(optax.identity(), rule, 2), [tree] * 5)
        for rule in ("ascending", "descending")
    )
    assert [np.flatnonzero(c).tolist() for c in up] == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]
    np.testing.assert_array_equal(down, np.flip(up, axis=1))


def test_random_draws_anew_for_every_sweep_and_seed():
    tree = {f"{i}": jnp.ones(1) for i in range(5)}

    def orders(seed):
        tx = select_blocks(optax.identity(), "random", seed=seed)
        return np.argmax(_choices(tx, [tree] * 20), axis=1).reshape(4, 5)

    assert len(np.unique(orders(0), axis=0)) > 1
    assert not np.array_equal(orders(0), orders(1))
    np.testing.assert_array_equal(orders(1), orders(1))


def test_a_choice_stays_until_the_next():
    chosen = np.stack(_choices(select_blocks(optax.identity(), "gs", every=3), GRADS))
    free = np.stack(_choices(select_blocks(optax.identity(), "gs", normalize=True), GRADS))
    assert (np.diff(free[:3], axis=0)).any(), "another choice at every step would not show"
    np.testing.assert_array_equal(chosen[0:3], chosen[[0, 0, 0]])
    np.testing.assert_array_equal(chosen[3:6], chosen[[3, 3, 3]])


def test_groups_are_a_tree_a_prefix_or_a_function():
    tree = {
        "layers": [{"w": jnp.full(2, x), "b": jnp.ones(1)} for x in (1.0, 5.0)],
        "z": jnp.ones(3),
    }
    names = {"layers": ["first", "second"], "z": "first"}
    full = {"layers": [{"w": n, "b": n} for n in names["layers"]], "z": "first"}
    by_path = lambda path, leaf: "second" if path.startswith("layers/1") else "first"  # noqa: E731
    for groups in (names, full, by_path):
        tx = select_blocks(optax.identity(), "gs", groups=groups)
        np.testing.assert_array_equal(_choices(tx, [tree])[0], [False, False, True, True, False])


def test_blocks_come_in_the_order_of_their_labels():
    tree = {f"{i}": jnp.ones(1) for i in range(12)}  # as text, "10" comes before "2"
    tx = select_blocks(optax.identity(), "ascending", groups=lambda path, leaf: int(path))
    found = [sorted(tree)[int(np.argmax(c))] for c in _choices(tx, [tree] * 12)]
    assert found == [f"{i}" for i in range(12)]


def test_a_tie_goes_to_the_first_block():
    tree = {"a": jnp.zeros(2), "b": jnp.ones(4), "c": -jnp.ones(4), "d": jnp.ones(4)}
    np.testing.assert_array_equal(
        _choices(select_blocks(optax.identity(), "gs", 2), [tree])[0], [False, True, True, False]
    )


def test_a_fraction_is_of_the_blocks_and_at_least_one():
    tree = {f"{i}": jnp.ones(1) for i in range(6)}
    for fraction, number in ((0.5, 3), (0.01, 1), (1.0, 6)):
        assert _choices(select_blocks(optax.identity(), "gs", fraction), [tree])[0].sum() == number
    tx = select_blocks(optax.identity(), "top_k", 0.25)
    _, state = tx.update(GRADS[0], tx.init(GRADS[0]))
    assert sum(int(m.sum()) for m in jax.tree.leaves(state.chosen)) == round(0.25 * 30)


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("k", [4, 99, 1.0])
@pytest.mark.parametrize("inner_state", ["freeze", "follow"])
@pytest.mark.parametrize("rule", ["gs", "top_k", "random"])
def test_all_blocks_are_the_inner_transformation(rule, inner_state, k):
    k = 30 if rule == "top_k" and k == 4 else k
    tx = select_blocks(optax.scale_by_adam(), rule, k, inner_state=inner_state)
    _equal(steps(tx, GRADS[:3], GRADS[0]), steps(optax.scale_by_adam(), GRADS[:3], GRADS[0]))


def _masked(tree, chosen):
    return {name: jnp.where(yes, tree[name], 0) for name, yes in zip(NAMES, chosen, strict=True)}


def test_follow_is_the_inner_transformation_behind_a_mask():
    tx = select_blocks(optax.scale_by_adam(), "random", 2, inner_state="follow")
    chosen = _choices(tx, GRADS)
    plain = steps(optax.scale_by_adam(), GRADS, GRADS[0])
    expected = [_masked(u, c) for u, c in zip(plain, chosen, strict=True)]
    _equal(steps(tx, GRADS, GRADS[0]), expected)


def test_restart_is_a_fresh_run_at_every_choice():
    tx = select_blocks(optax.scale_by_adam(), "random", 2, every=3, inner_state="restart")
    grads = _grads(9)
    found, chosen = steps(tx, grads, grads[0]), _choices(tx, grads)
    for first in (0, 3, 6):
        fresh = steps(optax.scale_by_adam(), grads[first : first + 3], grads[0])
        _equal(found[first : first + 3], [_masked(u, chosen[first]) for u in fresh])


def test_restart_starts_from_the_parameters_of_that_step():
    def update(updates, state, params=None):
        return jax.tree.map(jnp.subtract, state, updates), state

    start = optax.GradientTransformation(lambda p: jax.tree.map(jnp.copy, p), update)
    tx = select_blocks(start, "ascending", every=1, inner_state="restart")
    zeros = jnp.zeros(2)
    _, state = tx.update(zeros, tx.init(zeros), zeros)
    updates, _ = tx.update(zeros, state, zeros + 3)
    np.testing.assert_array_equal(updates, [3, 3])


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_adam(),
        optax.chain(optax.trace(0.9), optax.scale_by_rms()),
        optax.masked(optax.scale_by_adam(), {"a": True, "b": True, "c": False, "d": True}),
        optax.partition(
            {"x": optax.trace(0.9), "y": optax.scale_by_adam()},
            {"a": "x", "b": "y", "c": "y", "d": "x"},
        ),
        optax.MultiSteps(optax.trace(0.9), 2),
    ],
    ids=["adam", "chain", "masked", "partition", "multi_steps"],
)
def test_freeze_leaves_the_state_of_the_others_as_it_was(inner):
    tx, params = select_blocks(inner, "ascending"), random_like(SHAPES, seed=0)
    state, moved = tx.init(params), 0
    for t, g in enumerate(GRADS[:5]):
        _, new = tx.update(g, state, params)
        chosen = NAMES[t % 4]
        paths = jax.tree_util.tree_leaves_with_path(new.inner)
        for (path, after), before in zip(paths, jax.tree.leaves(state.inner), strict=True):
            keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            if set(keys) & (set(NAMES) - {chosen}):
                np.testing.assert_array_equal(after, before, f"step {t}, {keys}")
            elif chosen in keys:
                moved += not np.array_equal(after, before)
        state = new
    assert moved, "nothing moved: the state is not looked into"


def test_entries_frozen_one_by_one():
    tx = select_blocks(optax.trace(0.9), "top_k", 5)
    state = tx.init(GRADS[0])
    for g in GRADS[:3]:
        _, new = tx.update(g, state)
        stays = jax.tree.map(lambda m: ~m, new.chosen)
        for before, after, mask, d in zip(
            *map(jax.tree.leaves, (state.inner.trace, new.inner.trace, stays, g)), strict=True
        ):
            np.testing.assert_allclose(after, jnp.where(mask, before, 0.9 * before + d), rtol=1e-6)
        state = new


def test_state_of_another_shape_is_new_where_an_entry_moves():
    rows = optax.GradientTransformation(
        functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape[0])),
        lambda u, s, p=None: (u, jax.tree.map(lambda x, n: n + jnp.sum(x, 1), u, s)),
    )
    g = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), 5.0)}
    tx = select_blocks(rows, "top_k", 1)
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(state.inner["a"], [0, 0])
    np.testing.assert_array_equal(state.inner["b"], [5, 0])


@pytest.mark.parametrize("inner_state", ["freeze", "restart"])
def test_gradients_of_the_others_are_not_seen(inner_state):
    poison = GRADS[0] | {"b": jnp.full((5,), jnp.nan)}
    tx = select_blocks(
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
        "ascending",
        inner_state=inner_state,
    )
    updates, state = tx.update(poison, tx.init(poison), poison)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert np.abs(updates["a"]).min() > 0.5


def test_a_late_first_step_of_adam_is_the_docstrings():
    tx = select_blocks(optax.scale_by_adam(), "descending")
    state = tx.init(GRADS[0])
    late = state.inner._replace(count=jnp.asarray(10**6, jnp.int32))
    updates, _ = tx.update(GRADS[0], state._replace(inner=late))
    np.testing.assert_allclose(np.abs(updates["d"]), 3.2, atol=0.05)


@pytest.mark.parametrize("rule", ["gs", "top_k", "ascending"])
def test_zero_gradients_move_nothing(rule):
    zeros = jax.tree.map(jnp.zeros_like, GRADS[0])
    for updates in steps(
        select_blocks(optax.scale_by_adam(), rule, others=optlab.apply_kappa()), [zeros] * 2, zeros
    ):
        _equal(updates, zeros)


@pytest.mark.parametrize("rule", ["gs", "ascending", "random"])
def test_missing_and_empty_leaves_are_never_chosen(rule):
    holes = {"a": None, "b": jnp.ones(2), "c": optax.MaskedNode(), "d": jnp.ones((0, 3)), "e": None}
    tx = select_blocks(optax.scale_by_adam(), rule)
    for chosen in _choices(tx, [holes] * 3):
        np.testing.assert_array_equal(chosen, [False, True, False, False])
    full = holes | {"a": jnp.ones(7)}
    for chosen in _choices(select_blocks(optax.identity(), rule), [holes] * 3, full):
        np.testing.assert_array_equal(chosen, [False, True, False, False])


def test_a_missing_gradient_keeps_its_state():
    tx = select_blocks(optax.identity(), "top_k", 1)
    _, state = tx.update(
        {"a": None, "b": jnp.ones(2)}, tx.init({"a": jnp.ones(3), "b": jnp.ones(2)})
    )
    np.testing.assert_array_equal(state.chosen["a"], [False] * 3)
    np.testing.assert_array_equal(state.chosen["b"], [True, False])


LISTS = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, 2.0, 1e-45, float("inf")]), st.floats(0, 2.0**100, width=32)
    ),
    min_size=10,
    max_size=10,
)
_largest = jax.jit(largest_entries, static_argnums=1)


@hypothesis.given(LISTS, st.sampled_from([1, 4, 9, 10, 11]))
def test_the_largest_entries_are_those_of_a_stable_sort(values, k):
    x = np.asarray(values, np.float32)
    found = _largest([jnp.asarray(x[:6].reshape(2, 3)), jnp.zeros((0, 2)), jnp.asarray(x[6:])], k)
    expected = np.isin(np.arange(10), np.argsort(-x, kind="stable")[:k])
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in found]), expected)


def test_the_largest_entries_of_float64_and_of_bfloat16():
    with jax.enable_x64(True):
        x = [jnp.asarray([1.0, 1.0 + 1e-15]), jnp.ones(3, jnp.bfloat16)]
        a, b = largest_entries(x, 2)
    np.testing.assert_array_equal(a, [True, True])
    np.testing.assert_array_equal(b, [False] * 3)
    (found,) = largest_entries([jnp.asarray([1.0, jnp.nan, jnp.inf])], 1)
    np.testing.assert_array_equal(found, [False, True, False])


SHARDED = {"a": ((8, 16), ("x", "y")), "b": ((16,), ("y",)), "c": ((4, 8), (None, "x"))}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("rule", ["gs", "top_k"])
def test_sharded_choice_is_that_of_one_device_without_gathering(rule, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    tree = random_like({name: shape for name, (shape, _) in SHARDED.items()}, seed=0)
    # Whole numbers: many ties, cut through by k.
    tree = jax.tree.map(jnp.round, tree)
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*SHARDED[name][1])))
        for name, x in tree.items()
    }
    tx = select_blocks(optax.scale_by_adam(), rule, 2 if rule == "gs" else 77)
    want, state = tx.update(tree, tx.init(tree))
    fresh = tx.init(placed)
    update = jax.jit(tx.update).lower(placed, fresh).compile()
    found, sharded = update(placed, fresh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(found), want
    )
    _equal(jax.device_get(sharded.chosen), state.chosen)
    assert set(hlo.collective_counts(update.as_text())) <= {"all-reduce"}


adam = optax.scale_by_adam
WRONG = {
    "inner": (lambda: select_blocks(adam), "an optax.GradientTransformation"),
    "rule": (lambda: select_blocks(adam(), "gsq"), "one of 'gs', 'gsl'"),
    "k-zero": (lambda: select_blocks(adam(), k=0), "a whole number >= 1, or a fraction"),
    "k-fraction": (lambda: select_blocks(adam(), k=1.5), "a whole number >= 1, or a fraction"),
    "k-bool": (lambda: select_blocks(adam(), k=True), "a whole number >= 1, or a fraction"),
    "every": (lambda: select_blocks(adam(), every=0), "a whole number >= 1"),
    "inner_state": (lambda: select_blocks(adam(), inner_state="keep"), "one of 'freeze'"),
    "others": (lambda: select_blocks(adam(), others=0.5), "an optax.GradientTransformation"),
    "seed": (lambda: select_blocks(adam(), seed=0.5), "a whole number"),
    "normalize": (lambda: select_blocks(adam(), "random", normalize=True), "False for rule"),
    "groups": (lambda: select_blocks(adam(), "top_k", groups={}), "None for rule"),
    "gsl": (lambda: select_blocks(adam(), "gsl"), "a mapping from blocks to constants"),
    "gsl-zero": (lambda: select_blocks(adam(), "gsl", bound={"a": 0.0}), "a number > 0"),
    "gsd": (lambda: select_blocks(adam(), "gsd"), 'a tree for rule "gsd"'),
    "bound": (lambda: select_blocks(adam(), bound={"a": 1.0}), "None for rule 'gs'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_refused_at_construction(name):
    build, must = WRONG[name]
    argument = {"gsl": "bound", "gsl-zero": "bound", "gsd": "bound"}.get(name, name.split("-")[0])
    with pytest.raises((ValueError, TypeError), match=f"select_blocks: {argument} must be {must}"):
        build()


def _step(tx, grads=GRADS[0], params=GRADS[0]):
    return tx.update(grads, tx.init(params))


WRONG_USE = {
    "constants": (
        lambda: _step(select_blocks(adam(), "gsl", bound={"a": 1.0})),
        "no constant for .'b', 'c', 'd'.*Give one for every block",
    ),
    "labels": (
        lambda: _step(select_blocks(adam(), groups={"a": 1, "b": "x", "c": 1, "d": 1})),
        "labels that can be sorted",
    ),
    "groups": (lambda: _step(select_blocks(adam(), groups={"a": 1})), "groups is no prefix"),
    "prefix": (
        lambda: _step(select_blocks(adam(), "gsd", bound={"a": 1.0})),
        "bound is no prefix of the tree",
    ),
    "shape": (
        lambda: _step(select_blocks(adam(), "top_k", bound=DIAGONAL | {"b": np.ones(4)})),
        r"bound of leaf 'b' has shape \(4,\), the leaf \(5,\)",
    ),
    "params": (
        lambda: _step(select_blocks(adam(), inner_state="restart")),
        "needs the current parameters",
    ),
    "leaves": (
        lambda: _step(select_blocks(adam()), params={"a": jnp.ones(3)}),
        "the updates have 4 leaves, init saw 1",
    ),
    "integers": (lambda: _step(select_blocks(adam()), params={"n": jnp.arange(3)}), "leaf 'n'"),
    "entries": (
        lambda: jax.eval_shape(
            functools.partial(_step, select_blocks(optax.identity(), "top_k")),
            *[{"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}] * 2,
        ),
        "counts up to 2\\^31 - 1 entries, got 2147483648",
    ),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use_is_refused_by_name(name):
    call, text = WRONG_USE[name]
    with pytest.raises((ValueError, TypeError), match=f"select_blocks: .*{text}"):
        call()
