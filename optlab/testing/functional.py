"""JAX's transformations: jit, scan, vmap, retracing, purity."""

import jax
import jax.numpy as jnp
import numpy as np

from optlab.testing import compare
from optlab.testing.case import Case, leaves_by_path, random_like
from optlab.testing.select import applies


def _loop(case: Case, step, count: int):
    state, updates = case.tx.init(case.tree), None
    for index in range(count):
        updates, state = step(case.grads(index), state, case.tree)
    return updates, state


@applies(two_programs=True)
def check_jit_equals_eager(case: Case) -> None:
    """A step under `jax.jit` and the same step run op by op agree."""
    want = _loop(case, case.tx.update, 2)
    compare.close(_loop(case, case.step, 2), want, "two steps under jit", atol=case.rounding)


@applies(two_programs=True)
def check_scan_equals_loop(case: Case) -> None:
    """Three steps inside one `lax.scan` are three steps of a loop."""
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *(case.grads(i) for i in range(3)))

    def body(state, grads):
        updates, state = case.tx.update(grads, state, case.tree)
        return state, updates

    state, updates = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(
        case.tx.init(case.tree), stacked
    )
    last = jax.tree.map(lambda u: u[-1], updates)
    want = _loop(case, case.step, 3)
    compare.close((last, state), want, "three steps inside scan", atol=case.rounding)


@applies(two_programs=True)
def check_vmap_equals_loop(case: Case) -> None:
    """`jax.vmap` over seeds gives every seed its own run."""
    params = [case.tree, random_like(case.tree, seed=77)]
    grads = [case.grads(0), case.grads(5)]

    def run(p, g):
        state = case.tx.init(p)
        return case.tx.update(g, state, p)

    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    batched = jax.jit(jax.vmap(run))(stack(params), stack(grads))
    for seed in range(2):
        got = jax.tree.map(lambda x, i=seed: x[i], batched)
        want = case.step(grads[seed], case.tx.init(params[seed]), params[seed])
        compare.close(got, want, f"seed {seed} of two under vmap", atol=case.rounding)


@applies()
def check_no_retrace(case: Case) -> None:
    """The first step compiles; three more, on the state it returned, neither trace nor compile.

    An array that init puts on a device makes the step's results stay there, unlike its inputs: the
    second step would be another program.
    """
    state = case.tx.init(case.tree)
    bound = [path for path, x in leaves_by_path(state).items() if x.committed]
    assert not bound, f"init bound {bound[:3]} to a device"
    _, state = case.step(case.grads(), state, case.tree)
    traces, compiled = case.traces, case.step._cache_size()
    for index in range(1, 4):
        _, state = case.step(case.grads(index), state, case.tree)
    assert case.traces == traces, f"{1 + case.traces - traces} traces in 4 steps"
    more = case.step._cache_size() - compiled
    assert more == 0, f"{1 + more} compilations in 4 steps"


@applies()
def check_pure(case: Case) -> None:
    """The same inputs give the same bits and the same program, and stay as they were."""
    state = case.tx.init(case.tree)
    inputs = jax.tree.map(np.array, (case.grads(), case.tree))
    kept = jax.tree.map(np.copy, inputs)
    call = case.tx.update, case.grads(), state, case.tree
    program = compare.program(*call)
    first = case.tx.update(inputs[0], state, inputs[1])
    second = case.tx.update(inputs[0], state, inputs[1])
    compare.equal(inputs, kept, "(grads, params) after update")
    compare.equal(second, first, "a second update with the same inputs")
    assert compare.program(*call) == program, "the update is another program than before"


__all__ = [name for name in dir() if name.startswith("check_")]
