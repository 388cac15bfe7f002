"""Policies and paths: how each leaf of a real model is read, and that its name never changes."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from optlab import layout
from optlab.layout import MatrixView

POLICIES = {"linen_scan": layout.stacked("^layers/")}

# One line per leaf: path, role, and the axes of rows > cols.
TABLES = {
    "nnx_transformer": """
        blocks/0/attn/key/bias vector
        blocks/0/attn/key/kernel matrix 0>12
        blocks/0/attn/out/bias vector
        blocks/0/attn/out/kernel matrix 01>2
        blocks/0/attn/query/bias vector
        blocks/0/attn/query/kernel matrix 0>12
        blocks/0/attn/value/bias vector
        blocks/0/attn/value/kernel matrix 0>12
        blocks/0/down/kernel matrix 0>1
        blocks/0/norm/bias vector
        blocks/0/norm/scale vector
        blocks/0/up/bias vector
        blocks/0/up/kernel matrix 0>1
        blocks/1/attn/key/bias vector
        blocks/1/attn/key/kernel matrix 0>12
        blocks/1/attn/out/bias vector
        blocks/1/attn/out/kernel matrix 01>2
        blocks/1/attn/query/bias vector
        blocks/1/attn/query/kernel matrix 0>12
        blocks/1/attn/value/bias vector
        blocks/1/attn/value/kernel matrix 0>12
        blocks/1/down/kernel matrix 0>1
        blocks/1/norm/bias vector
        blocks/1/norm/scale vector
        blocks/1/up/bias vector
        blocks/1/up/kernel matrix 0>1
        embed/embedding embedding 0>1
        final/scale vector
        lm_head/kernel head 0>1
    """,
    "nnx_conv": """
        bn1/bias vector
        bn1/scale vector
        conv1/bias vector
        conv1/kernel matrix 012>3
        conv_up/kernel matrix 012>3
        depthwise_conv/bias vector
        depthwise_conv/kernel depthwise 012>3
        grouped_conv/bias vector
        grouped_conv/kernel matrix 01>2
        head/bias vector
        head/kernel head 0>1
    """,
    "nnx_lora": """
        linear/bias vector
        linear/kernel matrix 0>1
        linear/lora/lora_a matrix 0>1
        linear/lora/lora_b matrix 0>1
        standalone/lora_a matrix 0>1
        standalone/lora_b matrix 0>1
    """,
    "linen_transformer": """
        Embed_0/embedding embedding 0>1
        LinenBlock_0/Dense_0/bias vector
        LinenBlock_0/Dense_0/kernel matrix 0>1
        LinenBlock_0/Dense_1/bias vector
        LinenBlock_0/Dense_1/kernel matrix 0>1
        LinenBlock_0/LayerNorm_0/bias vector
        LinenBlock_0/LayerNorm_0/scale vector
        LinenBlock_0/MultiHeadDotProductAttention_0/key/bias vector
        LinenBlock_0/MultiHeadDotProductAttention_0/key/kernel matrix 0>12
        LinenBlock_0/MultiHeadDotProductAttention_0/out/bias vector
        LinenBlock_0/MultiHeadDotProductAttention_0/out/kernel matrix 01>2
        LinenBlock_0/MultiHeadDotProductAttention_0/query/bias vector
        LinenBlock_0/MultiHeadDotProductAttention_0/query/kernel matrix 0>12
        LinenBlock_0/MultiHeadDotProductAttention_0/value/bias vector
        LinenBlock_0/MultiHeadDotProductAttention_0/value/kernel matrix 0>12
        SelfAttention_0/key/bias vector
        SelfAttention_0/key/kernel matrix 0>12
        SelfAttention_0/out/bias vector
        SelfAttention_0/out/kernel matrix 01>2
        SelfAttention_0/query/bias vector
        SelfAttention_0/query/kernel matrix 0>12
        SelfAttention_0/value/bias vector
        SelfAttention_0/value/kernel matrix 0>12
        logits/bias vector
        logits/kernel head 0>1
        qkv/bias vector
        qkv/kernel matrix 0>23
    """,
    "linen_scan": """
        Embed_0/embedding embedding 0>1
        layers/Dense_0/bias vector
        layers/Dense_0/kernel matrix 1>2
        layers/Dense_1/bias vector
        layers/Dense_1/kernel matrix 1>2
        layers/LayerNorm_0/bias vector
        layers/LayerNorm_0/scale vector
        layers/MultiHeadDotProductAttention_0/key/bias vector
        layers/MultiHeadDotProductAttention_0/key/kernel matrix 1>23
        layers/MultiHeadDotProductAttention_0/out/bias vector
        layers/MultiHeadDotProductAttention_0/out/kernel matrix 12>3
        layers/MultiHeadDotProductAttention_0/query/bias vector
        layers/MultiHeadDotProductAttention_0/query/kernel matrix 1>23
        layers/MultiHeadDotProductAttention_0/value/bias vector
        layers/MultiHeadDotProductAttention_0/value/kernel matrix 1>23
        lm_head/bias vector
        lm_head/kernel head 0>1
    """,
    "linen_boxed": """
        Dense_0/bias vector
        Dense_0/kernel matrix 0>1
        Embed_0/embedding embedding 0>1
    """,
    "equinox": """
        embedding/weight embedding 0>1
        attention/query_proj/weight matrix 1>0
        attention/key_proj/weight matrix 1>0
        attention/value_proj/weight matrix 1>0
        attention/output_proj/weight matrix 1>0
        norm/weight vector
        norm/bias vector
        conv/weight matrix 123>0
        conv/bias vector
        depthwise_conv/weight depthwise 123>0
        mlp/layers/0/weight matrix 1>0
        mlp/layers/0/bias vector
        mlp/layers/1/weight matrix 1>0
        mlp/layers/1/bias vector
    """,
    "plain": """
        a/0 matrix 0>1
        a/1 vector
        b/gain scalar
        b/w matrix 0>1
        c/0 matrix 0>1
        c/1 vector
    """,
}


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def line(path, x, policy):
    view = layout.view_of(path, x, policy)
    sides = [] if view is None else ["".join(map(str, side)) for side in (view.rows, view.cols)]
    return " ".join([path, layout.role(path, x, policy), *([">".join(sides)] if sides else [])])


def named_leaves(tree):
    keyed = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(layout.path_str(key_path), x) for key_path, x in keyed]


@pytest.mark.parametrize("name", models.NAMES)
def test_every_leaf_of_a_real_model_has_its_role_and_view(name):
    policy = POLICIES.get(name, layout.flax)
    lines = [line(path, x, policy) for path, x in named_leaves(models.params(name))]
    assert lines == [row.strip() for row in TABLES[name].strip().splitlines()]


def test_per_head_views_make_each_head_a_matrix():
    policy = layout.rules({"Multi|qkv": layout.per_head})
    params = models.params("linen_transformer")
    views = {path: layout.view_of(path, x, policy) for path, x in named_leaves(params)}
    attention = "LinenBlock_0/MultiHeadDotProductAttention_0"
    assert views[f"{attention}/query/kernel"] == MatrixView((0,), (2,))
    assert views[f"{attention}/out/kernel"] == MatrixView((1,), (2,))
    assert views[f"{attention}/query/bias"] is None
    assert views["qkv/kernel"] == MatrixView((0,), (3,))
    assert views["SelfAttention_0/query/kernel"] == MatrixView((0,), (1, 2))
    assert views["LinenBlock_0/Dense_0/kernel"] == MatrixView((0,), (1,))


# ---- paths ----


def recorder():
    """A transform that keeps the paths it is shown at init and at update, and returns its input."""
    seen = {}

    def init(params):
        seen["init"] = [path for path, _ in named_leaves(params)]
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen["updates"] = [path for path, _ in named_leaves(updates)]
        seen["params"] = [path for path, _ in named_leaves(params)]
        return updates, state

    return optax.GradientTransformation(init, update), seen


def half_square(tree):
    return sum(0.5 * jnp.sum(x**2) for x in jax.tree.leaves(tree))


def expected_paths(name):
    return [row.split()[0] for row in TABLES[name].strip().splitlines()]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("nnx_transformer", models.Transformer),
        ("nnx_conv", models.ConvNet),
        ("nnx_lora", models.Adapted),
    ],
)
def test_paths_are_equal_at_init_and_at_update_in_nnx_optimizer(name, module):
    tx, seen = recorder()
    model = models.nnx_module(module)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: half_square(nnx.state(m, nnx.Param)))(model))
    assert seen == dict.fromkeys(("init", "updates", "params"), expected_paths(name))


@pytest.mark.parametrize("name", [n for n in models.NAMES if n.startswith("linen")])
def test_paths_are_equal_at_init_and_at_update_in_train_state(name):
    tx, seen = recorder()
    params = models.params(name)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state.apply_gradients(grads=jax.grad(half_square)(params))
    assert seen == dict.fromkeys(("init", "updates", "params"), expected_paths(name))


@pytest.mark.parametrize("name", ["equinox", "plain"])
def test_paths_are_equal_at_init_and_at_update_in_a_plain_loop(name):
    tx, seen = recorder()
    params = models.params(name)
    grads = (eqx.filter_grad if name == "equinox" else jax.grad)(half_square)(params)
    tx.update(grads, tx.init(params), params)
    assert seen == dict.fromkeys(("init", "updates", "params"), expected_paths(name))


def test_path_str_joins_every_kind_of_key_alike():
    keys = (DictKey("a"), GetAttrKey("b"), SequenceKey(2), FlattenedIndexKey(3))
    assert layout.path_str(keys) == "a/b/2/3"
    assert layout.path_str(()) == ""


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ((DictKey("w"), GetAttrKey("value")), "w"),
        ((DictKey("attn"), DictKey("value"), DictKey("kernel")), "attn/value/kernel"),
        ((GetAttrKey("attn"), GetAttrKey("value"), GetAttrKey("kernel")), "attn/value/kernel"),
        ((DictKey("attn"), DictKey("value")), "attn/value"),
    ],
)
def test_path_str_drops_the_box_of_a_variable_and_nothing_else(keys, path):
    assert layout.path_str(keys) == path


def test_paths_keep_the_structure_and_see_no_leaf_in_none_or_masked_node():
    tree = {"a": None, "b": [jnp.ones(2), optax.MaskedNode()], "c": (jnp.ones(()),)}
    assert layout.paths(tree) == {"a": None, "b": ["b/0", optax.MaskedNode()], "c": ("c/0",)}


def test_map_with_view_passes_view_path_and_the_leaves_of_every_tree():
    tree, other = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"w": "x", "b": "y"}
    out = layout.map_with_view(
        lambda view, path, x, y: (view, path, x.ndim, y), tree, other, policy=layout.flax
    )
    assert out == {"w": (MatrixView((0,), (1,)), "w", 2, "x"), "b": (None, "b", 1, "y")}


# ---- ambiguous leaves ----


@pytest.mark.parametrize(
    ("path", "shape", "stack", "view"),
    [
        ("layers/mlp/kernel", (4, 8, 32), "layers/", "rows=(1,), cols=(2,)"),
        ("layers/attn/query/kernel", (3, 8, 2, 4), "layers/", "rows=(1,), cols=(2, 3)"),
        ("layers/attn/out/kernel", (3, 2, 4, 8), "layers/", "rows=(1, 2), cols=(3,)"),
        ("dec/blocks/attn/query/kernel", (3, 8, 8), "dec/blocks/", "rows=(1,), cols=(2,)"),
        ("mlp/out/kernel", (3, 8, 32), "mlp/", "rows=(1,), cols=(2,)"),
        ("net/stem/kernel", (3, 3, 4, 8), "net/", "rows=(0, 1, 2), cols=(3,)"),
        ("enc/qkv/kernel", (8, 2, 12), "enc/", "rows=(0,), cols=(1, 2)"),
        ("enc/embedding", (2, 16, 8), "enc/", 'rows=(1,), cols=(2,), role="embedding"'),
        ("mlp/layers/weight", (3, 12, 8), "mlp/layers/", "rows=(2,), cols=(1,)"),
        ("w", (2, 3, 4), "w", "rows=(1,), cols=(2,)"),
        ("a.b/w", (2, 3, 4), r"a\\.b/", "rows=(1,), cols=(2,)"),
    ],
)
def test_an_ambiguous_leaf_is_named_and_the_rule_to_add_is_shown(path, shape, stack, view):
    rule = path.replace(".", r"\\.")
    message = (
        f"layout.flax: leaf '{path}' has shape {shape}: a stack of layers, or one tensor? "
        f'Add layout.stacked("{stack}") or layout.rules({{"{rule}": MatrixView({view})}}).'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layout.flax(path, leaf(*shape))


@pytest.mark.parametrize("path", ["layers/mlp/kernel", "a.b/w", "enc/embedding"])
def test_the_rule_shown_in_the_message_is_valid_and_resolves_the_leaf(path):
    x = leaf(4, 8, 32)
    with pytest.raises(ValueError, match="a stack of layers") as caught:
        layout.flax(path, x)
    _, stack, rule = re.split(r" Add | or (?=layout\.rules)", str(caught.value))
    for source in (stack, rule.removesuffix(".")):
        policy = eval(source, {"layout": layout, "MatrixView": MatrixView})
        assert layout.view_of(path, x, policy)[:2] == ((1,), (2,))


def test_a_stack_without_its_rule_raises_in_a_real_model():
    with pytest.raises(ValueError, match=r"leaf 'layers/Dense_0/kernel' has shape \(3, 12, 8\)"):
        layout.map_with_view(lambda view, *_: view, models.params("linen_scan"), policy=layout.flax)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("layers/norm/scale", (3, 8)),
        ("layers/attn/query/bias", (3, 2, 4)),
        ("layers/attention_bias", (3, 2, 4)),
        ("layers/norm/weight", (3, 8)),
        ("layers/ln_1/weight", (3, 8)),
        ("cls_token", (1, 1, 8)),
        ("kernel", (8,)),
        ("kernel", ()),
    ],
)
def test_vectors_stay_vectors_when_stacked(path, shape):
    assert layout.flax(path, leaf(*shape)) is None


@pytest.mark.parametrize(
    ("path", "shape", "view"),
    [
        ("posembed_input/pos_embedding", (1, 5, 8), MatrixView((1,), (2,), "embedding")),
        ("wte/weight", (16, 8), MatrixView((0,), (1,), "embedding")),
        ("patch_embedding/kernel", (12, 8), MatrixView((0,), (1,))),
        ("patch_embed/weight", (8, 12), MatrixView((1,), (0,))),
        ("unembed/kernel", (8, 16), MatrixView((0,), (1,), "head")),
        ("unembedding", (8, 16), MatrixView((0,), (1,), "head")),
        ("lm_head/weight", (16, 8), MatrixView((1,), (0,), "head")),
        ("multi_head_mixer/kernel", (8, 8), MatrixView((0,), (1,))),
        ("ConvLocal_0/kernel", (4, 4, 27, 6), MatrixView((2,), (3,))),
        ("Conv_0/kernel", (3, 1, 6), MatrixView((0, 1), (2,), "depthwise")),
        ("convs/0/kernel", (3, 3, 4, 8), MatrixView((0, 1, 2), (3,))),
        ("enc/kv/kernel", (8, 2, 3, 4), MatrixView((0,), (2, 3))),
        ("norm_proj/kernel", (8, 4), MatrixView((0,), (1,))),
        ("mixer/query/kernel", (8, 2, 4), MatrixView((0,), (1, 2))),
        ("query/kernel", (8, 8), MatrixView((0,), (1,))),
    ],
)
def test_flax_knows_the_names_at_the_edges(path, shape, view):
    assert layout.flax(path, leaf(*shape)) == view


# ---- the other policies, and rules ----


def test_by_ndim_and_output_first_read_axes_only():
    assert layout.by_ndim("bias", leaf(2, 3, 4)) == MatrixView((1,), (2,))
    assert layout.output_first("bias", leaf(2, 3, 4)) == MatrixView((1, 2), (0,))
    for policy in (layout.by_ndim, layout.output_first):
        assert policy("kernel", leaf(3)) is None
        assert policy("kernel", leaf()) is None


def test_rules_take_the_first_match_and_then_the_default():
    policy = layout.rules(
        {"skip": None, "^stem": MatrixView((-2, 0), (-1,)), "torch/": layout.output_first}
    )
    assert policy("stem/skip/kernel", leaf(3, 4)) is None
    assert policy("stem/kernel", leaf(3, 4, 5)) == MatrixView((1, 0), (2,))
    assert policy("torch/w", leaf(3, 4)) == MatrixView((1,), (0,))
    assert policy("dense/kernel", leaf(3, 4)) == MatrixView((0,), (1,))
    assert layout.rules({}, default=layout.by_ndim)("w", leaf(2, 3, 4)) == MatrixView((1,), (2,))


def test_stacks_nest_and_may_lie_at_any_axis():
    policy = layout.stacked("^layers/", layout.stacked("experts/", axis=1))
    assert policy("layers/experts/kernel", leaf(3, 8, 4, 12)) == MatrixView((1,), (3,))
    assert policy("layers/dense/kernel", leaf(3, 8, 12)) == MatrixView((1,), (2,))
    assert policy("layers/norm/scale", leaf(3, 8)) is None
    assert policy("embed/embedding", leaf(16, 8)) == MatrixView((0,), (1,), "embedding")
    last = layout.stacked("^layers/", axis=-1)
    assert last("layers/dense/kernel", leaf(8, 12, 3)) == MatrixView((0,), (1,))


def test_views_name_channels_batch_and_sizes():
    view = MatrixView((1, 2), (-1,)).resolve(5)
    assert (view.rows, view.cols, view.batch(5)) == ((1, 2), (4,), (0, 3))
    assert view.dims((2, 3, 5, 7, 11)) == (15, 11)
    assert view.channels == (4,)
    assert MatrixView((0,), (1,), "embedding").channels == (0,)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: layout.rules({"(": None}), ValueError, r"layout.rules: '\(' is no regular"),
        (lambda: layout.stacked("["), ValueError, r"layout.stacked: '\[' is no regular"),
        (
            lambda: layout.rules({"w": "matrix"}),
            TypeError,
            "must be a MatrixView, a policy or None",
        ),
        (
            lambda: layout.rules({"attn": MatrixView((0,), (1, 2))})("attn/bias", leaf(8)),
            ValueError,
            r"leaf 'attn/bias' of shape \(8,\) does not fit: .* rank 1 .*'?\{\"attn/bias\": None\}",
        ),
        (
            lambda: layout.view_of("w", leaf(2, 3), lambda *_: MatrixView((0,), (-2,))),
            ValueError,
            "leaf 'w' .* names an axis twice",
        ),
        (
            lambda: layout.view_of("w", leaf(2, 3), lambda *_: MatrixView((), (1,))),
            ValueError,
            "rows and cols must each name an axis",
        ),
        (
            lambda: layout.stacked("w", axis=2)("w", leaf(2, 3)),
            ValueError,
            r"leaf 'w' of shape \(2, 3\) has no stack axis 2",
        ),
        (lambda: layout.stacked("w")("w", leaf()), ValueError, "has no stack axis 0"),
        (
            lambda: layout.stacked("^l/")("l/w", leaf(2, 3, 4, 5)),
            ValueError,
            r"leaf 'l/w' has shape \(3, 4, 5\).*without stack axis 0: give the rule to layout",
        ),
    ],
)
def test_wrong_rules_say_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_policies_accept_numpy_arrays_python_scalars_and_tracers():
    assert layout.role("x", 0.5, layout.flax) == "scalar"
    assert layout.role("x", np.ones((2, 3)), layout.flax) == "matrix"
    views = []
    jax.jit(lambda x: views.append(layout.view_of("x", x, layout.flax)))(jnp.ones((2, 3)))
    assert views == [MatrixView((0,), (1,))]
