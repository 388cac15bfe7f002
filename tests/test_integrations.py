"""The guide's code for MaxText, Levanter and shard_map does there what it says.

MaxText and Levanter are not installed. Stand-ins have what their sources have, and nothing else:
names and shapes of parameters, the calls of the trainer, and the dimension numbers that MaxText's
own tests expect (`tests/unit/optimizers_test.py` at e591f30: LLaMA 2 and DeepSeek 3).
"""

import functools
import types

import guide
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optlab import layout

NAMES = {heading: code for heading, _, code in guide.sections(guide.GUIDE)}


@pytest.fixture
def block(monkeypatch):
    """A function that runs the block under a heading and returns its names."""
    return lambda heading: guide.run(guide.GUIDE, NAMES[heading], monkeypatch)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


# --- MaxText --------------------------------------------------------------------------------------

# Shape without the layers, reduction and output axes there; None where MaxText has None. Layers are
# the second axis, wherever scan_layers stacks.
ATTENTION = "self_attention"
MAXTEXT = {
    "decoder/decoder_norm/scale": ((8,), None),
    "decoder/logits_dense/kernel": ((8, 16), None),
    "token_embedder/embedding": ((16, 8), None),
    f"decoder/layers/{ATTENTION}/query/kernel": ((8, 2, 4), ((0,), (-2, -1))),
    f"decoder/layers/{ATTENTION}/key/kernel": ((8, 1, 4), ((0,), (-2, -1))),
    f"decoder/layers/{ATTENTION}/out/kernel": ((2, 4, 8), ((0, -2), (-1,))),
    "decoder/layers/mlp/wi_0/kernel": ((8, 12), ((0,), (-1,))),
    "decoder/layers/mlp/wo/kernel": ((12, 8), ((0,), (-1,))),
    "decoder/layers/pre_self_attention_layer_norm/scale": ((8,), None),
    f"decoder/moe_layers/{ATTENTION}/wq_a/kernel": ((8, 6), ((0,), (-1,))),
    f"decoder/moe_layers/{ATTENTION}/wq_b/kernel": ((6, 2, 4), ((0,), (-2, -1))),
    f"decoder/moe_layers/{ATTENTION}/wkv_b/kernel": ((6, 2, 5), ((0,), (-2, -1))),
    f"decoder/moe_layers/{ATTENTION}/kv_norm/scale": ((6,), None),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": ((8, 3), ((0,), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/bias": ((3,), None),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_1": ((3, 8, 12), ((-2,), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo": ((3, 12, 8), ((-2,), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel": ((8, 4), ((0,), (-1,))),
}
CONFIG = types.SimpleNamespace(
    muon_beta=0.95, muon_weight_decay=0.1, mu_dtype="", adam_b1=0.9, adam_b2=0.95, adam_eps=1e-8,
    adam_weight_decay=0.1,
)  # fmt: skip


def named_as(path, shape, layers):
    """Return path and shape as scan_layers makes them, or as those of a layer alone."""
    if "layers/" not in path:
        return path, shape
    if not layers:
        return path.replace("layers/", "layers_0/"), shape
    return path, (shape[0], layers, *shape[1:])


@pytest.mark.parametrize("layers", [0, 2], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("collection", ["", "params/"], ids=["nnx", "linen"])
def test_the_layout_reads_maxtext_as_its_own_dimension_numbers_do(block, layers, collection):
    policy = block("In MaxText")["MAXTEXT"]
    for given, (shape, numbers) in MAXTEXT.items():
        path, shape = named_as(given, shape, layers)
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        role = layout.role(collection + path, leaf, policy)
        assert (role == "matrix") == (numbers is not None), (path, role)
        if numbers is not None:
            view = layout.view_of(collection + path, leaf, policy)
            axes = tuple(tuple(axis % len(shape) for axis in side) for side in numbers)
            assert (view.rows, view.cols) == axes, path


class TrainState(nnx.Module):
    """MaxText's, of a model in NNX: the optimizer is Flax's, and keywords go on to it."""

    def __init__(self, model, tx):
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def apply_gradients(self, grads, **kwargs):
        self.optimizer.update(self.model, grads, **kwargs)


def maxtext_model(layers):
    """Return a module with two of the kernels and a norm, under MaxText's names."""
    model = nnx.Module()
    model.decoder = nnx.Module()
    model.decoder.layers = at = nnx.Module()
    for path in (f"{ATTENTION}/out/kernel", "mlp/wi_0/kernel", "pre_norm/scale"):
        shape = MAXTEXT.get(f"decoder/layers/{path}", ((8,), None))[0]
        *modules, name = path.split("/")
        owner = at
        for module in modules:
            if not hasattr(owner, module):
                setattr(owner, module, nnx.Module())
            owner = getattr(owner, module)
        setattr(owner, name, nnx.Param(normal(*named_as("layers/", shape, layers)[1])))
    return model


def test_a_scanned_maxtext_model_steps_as_its_layers_alone(block):
    normuon = block("In MaxText")["normuon"]
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    model = maxtext_model(layers=2)
    start = nnx.state(model, nnx.Param)
    second = jax.tree.map(lambda x: x[:, 1], nnx.to_pure_dict(start))
    single = {"decoder": {"layers_1": second["decoder"]["layers"]}}

    state = TrainState(model, normuon(CONFIG, schedule))
    step = nnx.jit(lambda state, grads, **extra: state.apply_gradients(grads, **extra))
    step(state, start, loss=jnp.ones([]), grad_norm=jnp.ones([]))
    tx = normuon(CONFIG, schedule)
    updates, _ = jax.jit(tx.update)(single, tx.init(single), single)
    alone = optax.apply_updates(single, updates)
    for got, want in zip(*map(jax.tree.leaves, (nnx.state(model), alone)), strict=True):
        np.testing.assert_allclose(got[:, 1], want, rtol=0, atol=1e-5)
    for before, want in zip(*map(jax.tree.leaves, (single, alone)), strict=True):
        assert jnp.max(jnp.abs(before - want)) > 0.01


# --- Levanter -------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class NamedArray:
    """Haliax's: a node of the tree around an array, whose child has no name."""

    def __init__(self, array, axis_names):
        self.array, self.axis_names = array, axis_names

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, axis_names, children):
        return cls(*children, axis_names)


def named(**axes):
    return {"weight": NamedArray(normal(*axes.values()), tuple(axes))}


def levanter_model():
    layer, heads, group, size, embed = 2, 2, 2, 3, 8
    stack = {
        "self_attn": {
            "q_proj": named(layer=layer, kv_head=heads, q=group, head_size=size, embed=embed),
            "k_proj": named(layer=layer, kv_head=heads, head_size=size, embed=embed),
            "o_proj": named(layer=layer, embed=embed, heads=heads * group, head_size=size),
        },
        "mlp": {"up_proj": named(layer=layer, mlp=12, embed=embed)},
        "input_layernorm": named(layer=layer, embed=embed),
    }
    return {
        "embeddings": {"token_embeddings": named(vocab=16, embed=embed)},
        "transformer": {"layers": {"stacked": stack}, "norm": named(embed=embed)},
        "lm_head": named(vocab=16, embed=embed),
        "frozen": None,
    }


VIEWS = {  # inputs, outputs
    "q_proj": ((4,), (1, 2, 3)),
    "k_proj": ((3,), (1, 2)),
    "o_proj": ((2, 3), (1,)),
    "up_proj": ((2,), (1,)),
}


def test_the_layout_reads_the_named_axes_of_haliax(block):
    policy = block("In Levanter")["LEVANTER"]
    roles = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(levanter_model()):
        path = layout.path_str(key_path)
        owner = path.split("/")[-3]
        roles[owner] = layout.role(path, leaf, policy)
        if roles[owner] == "matrix":
            view = layout.view_of(path, leaf, policy)
            assert (view.rows, view.cols) == VIEWS[owner], path
    others = {
        "token_embeddings": "embedding", "lm_head": "head", "norm": "vector",
        "input_layernorm": "vector",
    }  # fmt: skip
    assert roles == {**dict.fromkeys(VIEWS, "matrix"), **others}


def test_levanter_builds_it_by_name_and_steps_as_its_trainer_does(block):
    block("In Levanter")
    config = guide.OptimizerConfig.registry["normuon"](learning_rate=0.01, weight_decay=0.5)
    model = levanter_model()
    tx = config.build(num_train_steps=10)
    state = jax.eval_shape(tx.init, model)
    assert set(state.hyperparams) == {"learning_rate"}  # what Levanter logs
    state = tx.init(model)
    zeros = jax.tree.map(jnp.zeros_like, model)
    extra = {"obj_fn": lambda model: 0.0, "loss": jnp.ones([]), "grams": None}
    step = jax.jit(lambda grads, state, model: tx.update(grads, state, params=model, **extra))
    updates, state = step(zeros, state, model)
    # Without gradients only the decay is left, and none where Levanter's mask says so.
    decayed = lambda share: jax.tree.map(lambda p: -share * p, model)  # noqa: E731
    moved, stays = decayed(0.01 * 0.5), decayed(0.0)
    moved["transformer"]["norm"] = stays["transformer"]["norm"]
    inner = moved["transformer"]["layers"]["stacked"]
    inner["input_layernorm"] = stays["transformer"]["layers"]["stacked"]["input_layernorm"]
    for got, want in zip(*map(jax.tree.leaves, (updates, moved)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# --- shard_map ------------------------------------------------------------------------------------


def test_gradients_of_a_shard_map_and_a_step_outside_are_those_of_one_device(block):
    names = block("In a shard_map of your own")
    params = {f"layer_{i}": {"kernel": np.eye(16, dtype="f4") / (i + 1)} for i in range(2)}
    batch = np.arange(256, dtype="f4").reshape(16, 16) / 256

    def loss(params):
        return jnp.mean(functools.reduce(lambda y, p: y @ p["kernel"], params.values(), batch) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    tx = names["optlab"].muon(0.02)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    alone = optax.apply_updates(params, updates)
    np.testing.assert_allclose(names["loss"], value, rtol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (names["params"], alone)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        assert not got.sharding.is_fully_replicated
