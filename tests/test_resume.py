"""Every recipe goes on from a checkpoint as if it had never stopped: bit for bit, on one device."""

import catalog
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import checkpoint, codecs, recipes
from optlab.testing import random_like

SHAPES = {"dense": {"bias": (16,), "kernel": (8, 16)}, "norm": {"scale": (8,)}}
STEPS, SAVED = 4, 2
# A refresh falls into the steps after the checkpoint: what it draws must be the same too.
EVERY = 3
ROWS = {}
for _row in catalog.CASES:
    ROWS.setdefault(_row.name.split("[")[0], _row)


def build(name):
    """Return the recipe of the catalogue's first row, with a refresh at the fourth step."""
    row = ROWS[name]
    return row.make(**({"every": EVERY} if "every" in row.signature.parameters else {}))


def grads(step):
    return random_like(SHAPES, seed=100 + step)


def step_of(tx):
    """One compiled step, the same for both runs."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def started(tx, seed):
    """Fresh parameters and state. On a device that is named: where a sharding is, all is tied to
    the device after the first step, and a second one would be compiled for it.
    """
    params = random_like(SHAPES, seed=seed)
    return jax.device_put((params, tx.init(params)), jax.devices()[0])


def bits(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = [(path, jax.random.key_data(x) if is_key(x) else x) for path, x in flat]
    return {jax.tree_util.keystr(k): (x.dtype, np.asarray(x).tobytes()) for k, x in plain}


def resumed(tx, path):
    """Train, save halfway, and return the end of that run and of one that takes up the save."""
    step, run = step_of(tx), started(tx, seed=0)
    for number in range(STEPS):
        if number == SAVED:
            checkpoint.save(path, run, step=number)
            halfway = bits(run)
        run = step(*run, grads(number))
    again = checkpoint.restore(path, started(tx, seed=1))
    assert bits(again) == halfway
    for number in range(checkpoint.read(path).step, STEPS):
        again = step(*again, grads(number))
    assert bits(run)["[0]['dense']['kernel']"] != halfway["[0]['dense']['kernel']"]
    assert step._cache_size() == 1, "the restored state is compiled anew"
    return bits(run), bits(again)


@pytest.mark.parametrize("name", sorted(recipes.__all__))
def test_every_recipe_goes_on_bit_for_bit(name, tmp_path):
    whole, again = resumed(build(name), tmp_path)
    assert again == whole


def by_leaf(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)


def coded(codec, **options):
    return lambda: optlab.quantize_state(optax.adam(0.1), codec, min_size=1, **options)


WRAPPED = {
    "accumulated": lambda: optax.MultiSteps(optlab.lion(0.1), 3).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optlab.lion)(optlab.wsd(0.1, 2, 8, 8)),
    "routed": lambda: optax.partition(
        {"matrix": optlab.muon(0.1), "rest": optax.adam(0.1)}, by_leaf
    ),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optlab.signum(0.1)),
    "averaged": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "fp8": coded(codecs.fp8()),
    "int8": coded(codecs.int8()),
    "linear": coded(codecs.int8(map="linear")),
    "int4": coded(codecs.int4()),
    "int4 by chance": coded(codecs.int4(), stochastic=True),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_wrapped_goes_on_bit_for_bit(kind, tmp_path):
    whole, again = resumed(WRAPPED[kind](), tmp_path)
    assert again == whole


def test_what_is_not_restored_is_another_run(tmp_path):
    """The comparison has teeth: without the moments the end is another."""
    tx = optlab.lion(0.1)
    whole, _ = resumed(tx, tmp_path)
    params, _ = checkpoint.restore(tmp_path, started(tx, seed=1))
    run = params, tx.init(params)
    for number in range(SAVED, STEPS):
        run = step_of(tx)(*run, grads(number))
    assert bits(run) != whole
