"""Bytes of state from shapes: numbers by hand, real arrays, and the command."""

import pickle
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optlab
from optlab import compressed_bytes, layout, recipes, state_bytes, state_fields
from optlab.lab import cli, memory, models, optimizers

# Parameters as the models' own pages count them; the LLaMAs below 7b summed by hand.
SIZES = {
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "vit-b": 86_567_656,
    "vit-l": 304_326_632,
}


def tree(name, dtype="float32", **options):
    return models.tree(models.model(name), dtype, **options)


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def roles(params, policy=layout.flax):
    return [leaf.role for leaf in layout.describe(params, layout=policy).leaves]


def test_every_model_has_its_published_number_of_parameters():
    assert {name: size(tree(name)) for name in models.MODELS} == SIZES


def matrices(params, policy):
    """Count the matrices by role and size, wherever they stand."""
    counts = Counter()
    for leaf in layout.describe(params, layout=policy).leaves:
        if leaf.view:
            m, n = leaf.view.dims(leaf.shape)
            counts[leaf.role, m, n] += leaf.size // (m * n)
    return counts


@pytest.mark.parametrize("name", models.MODELS)
def test_stacked_layers_are_the_same_matrices_in_fewer_leaves(name):
    apart, stacked = tree(name), tree(name, stacked=True)
    assert matrices(apart, layout.flax) == matrices(stacked, models.STACKED)
    assert size(stacked) == size(apart)
    layers = models.model(name).layers
    fewer = len(jax.tree.leaves(apart)) - len(jax.tree.leaves(stacked))
    assert fewer == (layers - 1) * len(jax.tree.leaves(stacked["layers"]))


def test_the_roles_of_a_tree_are_read_from_its_names():
    llama = roles(tree("llama-60m"))
    assert [llama.count(role) for role in ("matrix", "embedding", "head", "vector")] == [
        8 * 7, 1, 1, 2 * 8 + 1
    ]  # fmt: skip
    vit = roles(tree("vit-b"))
    assert (vit.count("matrix"), vit.count("embedding"), vit.count("head")) == (12 * 6 + 1, 1, 1)
    assert roles(tree("gpt2")).count("embedding") == 2


def test_adamw_of_llama_7b_takes_two_bfloat16_numbers_per_parameter():
    # 2 moments of 2 bytes, and an int32 count.
    assert state_bytes(optax.adamw(1e-3), tree("llama-7b", "bfloat16")) == 4 * 6_738_415_616 + 4


def test_sgd_sai_saves_one_moment():
    params = tree("llama-7b")
    saved = state_bytes(optax.adamw(1e-3), params) - state_bytes(recipes.sgd_sai(1e-3), params)
    # 4 bytes a parameter; its paper says 25.15 GiB. One ratio for each leaf is kept.
    assert saved / 2**30 == pytest.approx(25.10, abs=0.005)


# Elements of state of one matrix with sides a <= b at rank r; all else gets two dense moments.
METHODS = {
    "galore": (lambda a, b, r: a * r + 2 * b * r, 9.40),
    "long side": (lambda a, b, r: b * r + 2 * a * r, 8.04),
    "two-sided": (lambda a, b, r: (a + b) * r + 2 * r * r, 7.11),
    "apollo": (lambda a, b, r: 2 * b * r + 2, 7.52),
    "conda": (lambda a, b, r: 2 * a * b + a * a, 34.47),
    "ldadam": (lambda a, b, r: a * r + 2 * b * r + a * b, 22.36),
}


class LowRankState(NamedTuple):
    basis_and_moments: optax.Params


def low_rank(elements):
    """Return a stand-in for a recipe: one flat array of so many elements for each leaf."""

    def make(learning_rate, rank=1, layout=layout.flax):
        del learning_rate

        def one(view, _, leaf):
            if view is None or view.role != "matrix":
                return jnp.zeros(2 * leaf.size, leaf.dtype)
            a, b = sorted(view.dims(leaf.shape))
            many = leaf.size // (a * b)
            return jnp.zeros(many * elements(a, b, rank), leaf.dtype)

        def init(params):
            return LowRankState(optlab.layout.map_with_view(one, params, policy=layout))

        return optax.GradientTransformation(init, lambda u, s, p=None: (u, s))

    return make


@pytest.mark.parametrize(("elements", "expected"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("stacked", [False, True])
def test_low_rank_formulas_on_llama_7b_give_the_published_bytes(elements, expected, stacked):
    policy = models.STACKED if stacked else layout.flax
    tx = low_rank(elements)(1e-3, rank=1024, layout=policy)
    nbytes = state_bytes(tx, tree("llama-7b", "bfloat16", stacked=stacked))
    assert nbytes / 1e9 == pytest.approx(expected, abs=0.01)


# At 16 bits, as the papers count; of Q-GaLore 3.77 GB at 8 bits, 0.53 of embedding and head, and
# 0.08 because a scale serves 128 numbers, not 256.
RECIPES = {
    "adamw": (16, 26.95),
    "galore": (16, 9.40),
    "fira": (16, 9.40),
    "apollo": (16, 7.52),
    "conda": (16, 34.47),
    "ldadam": (16, 22.36),
    "q_galore": (8, 3.77 + 0.53 + 0.08),
}


@pytest.mark.parametrize("name", RECIPES)
def test_low_rank_recipes_take_the_published_bytes(name):
    bits, expected = RECIPES[name]
    subject = memory.of_model("llama-7b", dtype="bfloat16", stacked=False, rank=None)
    predicted = dict(zip(memory.BITS, memory.row(name, subject).predicted, strict=True))
    assert predicted[bits] / 1e9 == pytest.approx(expected, abs=0.01)


def small():
    return {
        "embed": {"embedding": jnp.ones((8, 4))},
        "attn": {"query": {"kernel": jnp.ones((4, 2, 3), jnp.bfloat16)}},
        "dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    }


@pytest.mark.parametrize("name", optimizers.names())
def test_predicted_bytes_are_those_of_real_arrays(name):
    params, tx = small(), optimizers.recipe(name)(1e-3)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert state_bytes(tx, params) == real
    assert state_bytes(tx, params) == state_bytes(tx, jax.eval_shape(lambda: params))
    assert sum(part.nbytes for part in state_fields(tx, params)) == real
    assert layout.describe(params, tx).state_bytes == real


def test_fields_are_summed_by_class_field_and_dtype():
    tx = optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.trace(0.9))
    parts = {(p.owner, p.field, p.dtype): (p.size, p.nbytes) for p in state_fields(tx, small())}
    assert parts == {
        ("ScaleByAdamState", "count", "int32"): (1, 4),
        ("ScaleByAdamState", "mu", "bfloat16"): (86, 172),
        ("ScaleByAdamState", "nu", "bfloat16"): (24, 48),
        ("ScaleByAdamState", "nu", "float32"): (62, 248),
        ("TraceState", "trace", "bfloat16"): (24, 48),
        ("TraceState", "trace", "float32"): (62, 248),
    }


def test_fields_of_a_wrapper_and_of_what_it_wraps_are_apart():
    tx = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation()
    params = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    parts = {(part.owner, part.field): part.nbytes for part in state_fields(tx, params)}
    assert parts["MultiStepsState", "acc_grads"] == parts["TraceState", "trace"] == 32
    assert parts["MultiStepsState", "mini_step"] == 4


def momentum(**shapes):
    return {key: jax.ShapeDtypeStruct(*value) for key, value in shapes.items()}


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "expected"),
    [
        # Codes, one float32 for each block of up to 128, and the count of `quantize_state`.
        ((64, 64), jnp.float32, 8, 4096 + 4 * 32 + 4),
        ((64, 64), jnp.float32, 4, 2048 + 4 * 32 + 4),
        ((4097,), jnp.float32, 8, 4097 + 4 * 33 + 4),
        # 33 blocks of 126: an even number, of which the last are padding.
        ((4097,), jnp.float32, 4, 33 * 63 + 4 * 33 + 4),
        ((64, 64), jnp.bfloat16, 8, 4096 + 4 * 32 + 4),
        ((64, 64), jnp.float32, 16, 2 * 4096),
        ((64, 64), jnp.float16, 16, 2 * 4096),
        ((4095,), jnp.float32, 8, 4 * 4095 + 4),
        ((64, 64), jnp.float8_e4m3fn, 8, 4096 + 4),
        ((64, 64), jnp.int8, 4, 4096 + 4),
    ],
)
def test_compressed_bytes_by_hand(shape, dtype, bits, expected):
    params = momentum(w=(shape, dtype))
    assert compressed_bytes(optax.trace(0.9), params, bits) == expected


def test_block_and_least_size_are_arguments():
    params = momentum(w=((64, 64), jnp.float32), v=((16,), jnp.float32))
    tx = optax.trace(0.9)
    assert compressed_bytes(tx, params, 8, block=64) == 4096 + 4 * 64 + 64 + 4
    assert compressed_bytes(tx, params, 8, min_size=16) == 4096 + 4 * 32 + (16 + 4) + 4
    assert compressed_bytes(tx, params, 8, min_size=5000) == state_bytes(tx, params) + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits must be 16, 8 or 4, got 2"),
        ({"bits": 8, "block": 0}, "block must be >="),
    ],
)
def test_wrong_codecs_are_refused(options, message):
    with pytest.raises(ValueError, match=f"compressed_bytes: {message}"):
        compressed_bytes(optax.trace(0.9), small(), **options)


def run(capsys, *argv):
    code = cli.main(["memory", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(out, name):
    return next(line.split() for line in out.splitlines() if line.startswith(f"{name} "))


def test_the_command_prints_bytes_and_their_assumptions(capsys, monkeypatch):
    monkeypatch.setitem(optimizers.BASELINES, "low", low_rank(METHODS["galore"][0]))
    code, out, _ = run(
        capsys, "--model=llama-7b", "--dtype=bfloat16", "--optimizers=muon,adamw,low"
    )
    assert code == 0
    assert out.startswith("llama-7b: 6,738,415,616 parameters in 291 leaves, bfloat16, 13.48 GB\n")
    assert cells(out, "adamw") == ["adamw", "26.95", "25.10", "4.00", "26.95", "13.90", "7.16"]
    # The default rank is a quarter of the width: 1024.
    assert cells(out, "low") == ["low", "9.40", "8.76", "1.40", "9.40", "9.40", "9.40"]
    assert (
        "adamw: all leaves in ScaleByAdamState. ScaleByAdamState.mu 13.48 GB bfloat16, "
        "ScaleByAdamState.nu 13.48 GB bfloat16." in out.splitlines()
    )
    assert "matrix: 224 matrix in InterpolateMomentumState" in out
    assert "fallback: 65 vector, 1 embedding, 1 head in " in out
    assert "low: rank 1024; " in out
    assert [line.split(":")[0] for line in out.splitlines()[-3:]] == ["muon", "adamw", "low"]


def test_rank_and_stacked_are_given_to_the_recipes(capsys, monkeypatch):
    monkeypatch.setitem(optimizers.BASELINES, "low", low_rank(METHODS["galore"][0]))
    argv = ["--model=llama-7b", "--dtype=bfloat16", "--optimizers=low,muon,conda", "--rank=128"]
    (_, apart, _), (_, stacked, _) = run(capsys, *argv), run(capsys, *argv, "--stacked")
    assert "low: rank 128; " in apart
    assert "conda: rank full; " in apart  # a default that is no number is part of the method
    # 0.522 billion elements beside 32 layers of 128 (28672 + 2 * 49408)
    assert cells(apart, "low")[1] == cells(stacked, "low")[1] == "2.09"
    assert "12 leaves" in stacked.splitlines()[0]
    assert cells(apart, "muon")[1:4] == cells(stacked, "muon")[1:4]


def test_without_names_every_optimizer_has_a_row_largest_first(capsys):
    code, out, _ = run(capsys, "--model=gpt2")
    assert code == 0
    table = [line.split() for line in out.splitlines()[2 : 2 + len(optimizers.names())]]
    assert sorted(line[0] for line in table) == sorted(optimizers.names())
    sizes = [float(line[1]) for line in table]
    assert sizes == sorted(sizes, reverse=True)


def test_a_file_is_a_model_of_ones_own(capsys, tmp_path):
    params = {"attn": {"kernel": (4, 6)}, "head": {"kernel": jnp.ones((4, 2), jnp.bfloat16)}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"params": params, "step": 3}))
    argv = [f"--file={tmp_path / 'x.pkl'}", "--optimizers=adamw"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "32 parameters in 2 leaves, bfloat16, float32" in out
    assert "GB (left out: 1 that is no array of floats)" in out
    assert cells(out, "adamw")[3] == f"{(24 * 8 + 8 * 4 + 4) / 32:.2f}"
    assert "left out" not in run(capsys, *argv, "--subtree=params")[1]


def test_layout_says_how_a_file_is_read(capsys, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"layers": {"kernel": (3, 8, 8)}}))
    argv = [f"--file={tmp_path / 'x.pkl'}", "--optimizers=muon"]
    code, _, error = run(capsys, *argv)
    assert code == 2
    assert "leaf 'layers/kernel' has shape (3, 8, 8)" in error
    assert "--layout by_ndim" in error
    code, out, _ = run(capsys, *argv, "--layout=by_ndim")
    assert code == 0
    assert "matrix: all leaves in InterpolateMomentumState" in out


WRONG = {
    "neither": ([], "give --model or --file, got neither. Write for example"),
    "both": (["--model=gpt2", "--file=x.pkl"], "give --model or --file, got both"),
    "model": (["--model=lama-7b"], "got 'lama-7b'. Did you mean 'llama-7b'? For a model of your"),
    "dtype": (["--model=gpt2", "--dtype=int8"], "--dtype must be one of float32, bfloat16"),
    "rank": (["--model=gpt2", "--rank=0"], "--rank must be at least 1, got 0"),
    "name": (["--model=gpt2", "--optimizers=muonn"], "got 'muonn'. Did you mean 'muon'?"),
    "twice": (["--model=gpt2", "--optimizers=muon,muon"], "must differ, got 'muon' twice"),
    "layout of a model": (["--model=gpt2", "--layout=flax"], "--layout belongs to --file"),
    "stacked file": (["--file=x.pkl", "--stacked"], "--stacked belongs to --model"),
    "layout": (["--file=x.pkl", "--layout=torch"], "--layout must be one of flax, per_head"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_is_one_line_with_the_fix(argv, message, capsys):
    code, out, error = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert error.startswith("memory: ")
    assert message in error
    assert len(error.splitlines()) == 1
