"""Laws of the roles, chosen by tag: what a sign, a projection, a clip, a schedule must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.testing import compare
from optlab.testing.case import Case, Tree, leaves_by_path
from optlab.testing.select import applies


def _first(case: Case, grads: Tree, params: Tree = None) -> Tree:
    """Return the first update for these gradients."""
    params = case.tree if params is None else params
    return case.step(grads, case.tx.init(params), params)[0]


def _scaled(tree: Tree, factor: float) -> Tree:
    return jax.tree.map(lambda x: factor * x, tree)


def _norm(tree: Tree) -> float:
    return float(optax.tree.norm(tree))


@applies(needs=["scale_invariant"])
def check_scale_invariant(case: Case) -> None:
    """Multiplying every gradient by a positive number changes nothing, up to eps."""
    runs = []
    # Both far above any eps; powers of two, so that nothing else rounds differently.
    for scale in (2.0**6, 2.0**12):
        state = case.tx.init(case.tree)
        for index in range(2):
            updates, state = case.step(_scaled(case.grads(index), scale), state, case.tree)
        runs.append(updates)
    compare.close(runs[1], runs[0], "updates of 64 times the gradients", 1e-3, 1e-4)


@applies(needs=["sign"])
def check_sign_values(case: Case) -> None:
    """A sign is -1, 0 or 1, and is 0 for a zero gradient."""
    for path, leaf in case.hit_leaves(_first(case, case.grads())).items():
        values = np.unique(compare.as_numpy(leaf))
        assert set(values) <= {-1.0, 0.0, 1.0}, f"leaf '{path}' holds {values[:4]}"
    zeros = jax.tree.map(jnp.zeros_like, case.tree)
    compare.close(_first(case, zeros), zeros, "updates of zero gradients")


@applies(needs=["radial"])
def check_radial_orthogonal(case: Case) -> None:
    """The update has no component along the parameters it projects."""
    params = leaves_by_path(case.tree)
    updates = case.hit_leaves(_first(case, case.grads()))
    assert updates, "a radial method states the leaves it hits"
    for path, u in updates.items():
        u, p = (compare.as_numpy(x).astype(np.float64) for x in (u, params[path]))
        cosine = abs(np.sum(u * p)) / (np.linalg.norm(u) * np.linalg.norm(p) + 1e-30)
        assert cosine < 1e-5, f"leaf '{path}' keeps a radial part, cosine {cosine:.2g}"


@applies(needs=["idempotent"])
def check_idempotent(case: Case) -> None:
    """Applied to its own output, the transformation changes nothing."""
    once = _first(case, case.grads())
    twice = case.hit_leaves(_first(case, once))
    assert twice, "an idempotent method states the leaves it hits"
    compare.close(twice, case.hit_leaves(once), "updates transformed twice", 1e-4, 1e-5)


@applies(needs=["fixed_norm"])
def check_fixed_norm(case: Case) -> None:
    """The updated parameters keep the norms the parameters had at init."""
    params, state = case.tree, case.tx.init(case.tree)
    wanted = {k: np.linalg.norm(compare.as_numpy(p)) for k, p in case.hit_leaves(params).items()}
    assert wanted, "a method of fixed norms states the leaves it hits"
    for index in range(3):
        updates, state = case.step(case.grads(index), state, params)
        params = optax.apply_updates(params, updates)
    for path, p in case.hit_leaves(params).items():
        norm = np.linalg.norm(compare.as_numpy(p))
        good = abs(norm - wanted[path]) < 1e-5 * wanted[path]
        assert good, f"leaf '{path}' went from norm {wanted[path]} to {norm}"


@applies(needs=["clip"])
def check_clip(case: Case) -> None:
    """A small gradient passes untouched; a large one is held at a bound, whatever its size."""
    small = _scaled(case.grads(), 1e-6)
    compare.equal(_first(case, small), small, "updates of gradients far below the threshold")
    large, larger = (_norm(_first(case, _scaled(case.grads(), c))) for c in (1e6, 1e9))
    assert abs(larger - large) < 1e-3 * large, f"norms {large} and {larger}: there is no bound"
    threshold = case.facts.get("threshold", large)
    assert larger <= threshold * (1 + 1e-5), f"norm {larger}, above the threshold {threshold}"


@applies(needs=["trust_ratio"])
def check_trust_ratio(case: Case) -> None:
    """Larger parameters get proportionally larger updates; a zero norm gets the ratio 1."""
    want = case.hit_leaves(_scaled(_first(case, case.grads()), 4.0))
    got = case.hit_leaves(_first(case, case.grads(), _scaled(case.tree, 4.0)))
    assert want, "a trust ratio states the leaves it hits"
    compare.close(got, want, "updates of 4 times the parameters", 1e-4)
    zeros = jax.tree.map(jnp.zeros_like, case.tree)
    ones = _first(case, case.grads(), zeros)
    plain, _ = case.fallback().update(case.grads(), case.fallback().init(zeros), zeros)
    compare.close(ones, plain, "updates of zero parameters")
    compare.close(_first(case, zeros), zeros, "updates of zero gradients")


@applies(needs=["momentum"])
def check_momentum_closed_form(case: Case) -> None:
    """A constant gradient g comes out as the stated multiple of g at every step."""
    factor, state = case.fact("constant_gradient"), case.tx.init(case.tree)
    for step in range(1, 6):
        updates, state = case.step(case.grads(), state, case.tree)
        want = _scaled(case.grads(), factor(step))
        compare.close(updates, want, f"step {step} of a constant gradient", 1e-5, 1e-5)


@applies(needs=["momentum"])
def check_momentum_zero_is_identity(case: Case) -> None:
    """With the stated hyperparameters (no memory) the gradient passes unchanged."""
    tx = case.make(**case.fact("no_momentum"))
    state = tx.init(case.tree)
    for index in range(2):
        updates, state = tx.update(case.grads(index), state, case.tree)
        compare.close(updates, case.grads(index), "updates without memory")


@applies(needs=["decay"])
def check_decay(case: Case) -> None:
    """A zero gradient multiplies the claimed leaves by the stated factor."""
    factor, zeros = case.fact("decay_factor"), jax.tree.map(jnp.zeros_like, case.tree)
    params = case.hit_leaves(optax.apply_updates(case.tree, _first(case, zeros)))
    assert params, "a decay states the leaves it hits"
    want = _scaled(case.hit_leaves(case.tree), factor)
    compare.close(params, want, "parameters after a zero gradient")


def _shuffled(tree: Tree) -> Tree:
    """Return every leaf with its elements in another order, the same for equal sizes."""

    def shuffle(x):
        order = np.random.default_rng(x.size).permutation(x.size)
        return x.ravel()[order].reshape(x.shape)

    return jax.tree.map(shuffle, tree)


@applies(needs=["elementwise"])
def check_elementwise(case: Case) -> None:
    """Elements do not see each other: reordering them reorders the update."""
    want = _shuffled(_first(case, case.grads()))
    got = _first(case, _shuffled(case.grads()), _shuffled(case.tree))
    compare.close(got, want, "updates of reordered elements")


@applies(needs=["layerwise"])
def check_leaf_local(case: Case) -> None:
    """Leaves do not see each other: one leaf's gradient and value move that leaf's update only."""
    want = leaves_by_path(_first(case, case.grads()))
    for path in want:
        change = lambda k, x, p=path: 3 * x + 1 if k == p else x  # noqa: E731
        treedef = jax.tree.structure(case.tree)
        grads, params = (
            treedef.unflatten([change(k, x) for k, x in leaves_by_path(tree).items()])
            for tree in (case.grads(), case.tree)
        )
        got = leaves_by_path(_first(case, grads, params))
        others = {k: u for k, u in got.items() if k != path}
        compare.equal(others, {k: want[k] for k in others}, f"updates beside a changed '{path}'")


def _matrix_update(case: Case, grad, params=None, tx=None):
    """Return the update of one (m, n) kernel alone."""
    tx = case.tx if tx is None else tx
    tree = {"dense": {"kernel": jnp.zeros_like(grad) if params is None else params}}
    updates, _ = tx.update({"dense": {"kernel": grad}}, tx.init(tree), tree)
    return compare.as_numpy(updates["dense"]["kernel"]).astype(np.float64)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@applies(needs=["low_rank"])
def check_low_rank(case: Case) -> None:
    """A matrix's update has at most the stated rank."""
    rank, update = case.fact("rank"), _matrix_update(case, jnp.asarray(_normal(8, 16)))
    values = np.linalg.svd(update, compute_uv=False)
    assert values[0] > 0, "the update is zero"
    found = int(np.sum(values > 1e-5 * values[0]))
    assert found <= rank, f"the update has rank {found}, {rank} is stated"


@applies(needs=["low_rank"])
def check_full_rank_is_inner(case: Case) -> None:
    """With the stated hyperparameters (full rank) the update is the fallback's."""
    tx, inner = case.make(**case.fact("full_rank")), case.fallback()
    grad = jnp.asarray(_normal(8, 16))
    got, want = (_matrix_update(case, grad, tx=t) for t in (tx, inner))
    compare.close(got, want, "the full-rank update", 1e-4, 1e-5)


@applies(needs=["orthogonalize"])
def check_orthogonal_band(case: Case) -> None:
    """The singular values of a matrix's update lie in the stated band."""
    low, high = case.fact("band")
    for shape in ((8, 16), (16, 8), (8, 8)):
        update = _matrix_update(case, jnp.asarray(_normal(*shape)))
        values = np.linalg.svd(update, compute_uv=False)
        inside = low <= values[-1] and values[0] <= high
        assert inside, f"shape {shape}: values {values[-1]:.4g} to {values[0]:.4g}"


@applies(needs=["orthogonalize"])
def check_orthogonal_equivariance(case: Case) -> None:
    """Orthogonalization commutes with transposition and with rotations from both sides."""
    grad = _normal(8, 16)
    left, right = (np.linalg.qr(_normal(n, n))[0] for n in (8, 16))
    want = _matrix_update(case, jnp.asarray(grad))
    flipped = _matrix_update(case, jnp.asarray(grad.T))
    compare.close(flipped.T, want, "the update of the transpose", 1e-3, 1e-3)
    turned = _matrix_update(case, jnp.asarray(left @ grad @ right))
    compare.close(turned, left @ want @ right, "the update of a rotated matrix", 1e-3, 1e-3)


@applies(needs=["orthogonalize"])
def check_orthogonal_batch(case: Case) -> None:
    """Two matrices of one shape in a tree get what each gets alone."""
    grads = {name: {"kernel": jnp.asarray(c * _normal(8, 16))} for name, c in (("a", 1), ("b", 5))}
    grads["b"]["kernel"] = grads["b"]["kernel"][::-1]
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = case.tx.update(grads, case.tx.init(params), params)
    for name, leaf in grads.items():
        alone = _matrix_update(case, leaf["kernel"])
        compare.close(updates[name]["kernel"], alone, f"matrix '{name}' in company", 1e-4, 1e-4)


_FAR = 2**31 - 1


@applies(needs=["schedule"])
def check_schedule_types(case: Case) -> None:
    """A schedule gives one float for a Python int, an int32 array, under jit and under vmap."""
    schedule, steps = case.tx, [0, 1, 7, int(case.fact("total")), int(case.fact("total")) + 1]
    plain = [float(schedule(step)) for step in steps]
    arrays = [schedule(jnp.int32(step)) for step in steps]
    for value in arrays:
        assert value.shape == (), f"one step gives the shape {value.shape}"
        assert jnp.issubdtype(value.dtype, jnp.floating), f"one step gives {value.dtype}"
    # An int step is exact in Python; float32 rounds it once.
    for how, values in {
        "an int32 array": arrays,
        "an array under jit": [jax.jit(schedule)(jnp.int32(step)) for step in steps],
        "an array under vmap": list(jax.vmap(schedule)(jnp.array(steps, jnp.int32))),
    }.items():
        got = np.array([float(v) for v in values])
        assert np.allclose(got, plain, rtol=1e-5, atol=1e-8), f"{how}: {got}, for an int {plain}"


@applies(needs=["schedule"])
def check_schedule_finite(case: Case) -> None:
    """A schedule is finite and not negative at 0, 1, its end, beyond, and at the last int32."""
    total = int(case.fact("total"))
    for step in (0, 1, total - 1, total, total + 1, _FAR):
        value = float(case.tx(jnp.int32(step)))
        assert np.isfinite(value), f"step {step} gives {value}"
        assert value >= 0, f"step {step} gives a negative rate {value}"


@applies(needs=["schedule"])
def check_schedule_continuous(case: Case) -> None:
    """No joint jumps: over a long horizon, no step there is a hundredth of the largest value."""
    joints = case.fact("joints")
    top = max(abs(float(case.tx(joint))) for joint in joints)
    for joint in joints:
        values = [float(case.tx(joint + k)) for k in (-1, 0, 1)]
        assert np.max(np.abs(np.diff(values))) < 0.01 * top, f"joint {joint}: {values} jump"


__all__ = [name for name in dir() if name.startswith("check_")]
