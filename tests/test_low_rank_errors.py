"""What the low-rank family refuses: name, what is wrong, what was given, what to write instead."""

import re

import jax.numpy as jnp
import optax
import pytest

import optlab
from optlab.layout import stacked

ADAM, SVD = optax.scale_by_adam(), optlab.svd_projector()
PARAMS = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"kernel": jnp.ones((6, 4))}}
SMALL = {"b": {"kernel": jnp.ones((3, 3))}, "a": PARAMS["a"]}


def low(**given):
    return optlab.in_low_rank(ADAM, **given)


def started(**given):
    """Return `update` and a state for the standard parameters."""
    tx = low(rank=2, **given)
    return tx.update, tx.init(PARAMS)


def updated(grads, params=None, **given):
    update, state = started(**given)
    return update(grads, state, params)


CONSTRUCTION = [
    (lambda: optlab.in_low_rank(3), "inner must be an optax.GradientTransformation, got 3"),
    (lambda: low(projector="svd"), "projector must be a projector, got 'svd'. Write optlab."),
    (lambda: low(rank=0), "rank must be a number >= 1, a fraction in (0, 1) or \"full\", got 0"),
    (lambda: low(rank=1.0), "rank must be a number >= 1, a fraction in (0, 1) or"),
    (lambda: low(rank=True), "rank must be a number >= 1"),
    (lambda: low(rank="ful"), "a function (path, leaf) or a tree, got 'ful'"),
    (lambda: low(side="top"), "side must be one of 'short', 'long', 'rows', 'cols', 'both'"),
    (lambda: low(every=0), "every must be a whole number >= 1, got 0"),
    (lambda: low(every=1.5), "every must be a whole number >= 1, got 1.5"),
    (lambda: low(scale=-1), "scale must be a number >= 0, got -1"),
    (lambda: low(on_refresh="reset", stagger=True), "have to be refreshed together"),
    (lambda: low(on_refresh="reset", every=optlab.lazy_refresh()), "restarts the step count"),
    (lambda: low(residual="sign"), "residual must be a residual handler or None, got 'sign'"),
    (lambda: low(project="momentum"), "project must be a tuple of names, got 'momentum'"),
    (lambda: low(seed=-1), "seed must be a whole number >= 0, got -1"),
    (lambda: low(layout="flax"), "layout must be a function"),
    (lambda: low(ranks=2), "unknown keyword 'ranks'. Did you mean rank?"),
    (lambda: low(rank={"a": 2}).init(PARAMS), "rank is no prefix of the parameter tree. Give"),
    (lambda: low(layout=stacked("x")).init({"w": jnp.ones((2, 3, 4))}), "leaf 'w' has shape"),
    (lambda: low().init({"w": jnp.ones((4, 4), int)}), "leaf 'w' has dtype int32, floating point"),
    (
        lambda: low(rank=2, shardings={"a": 3}).init(PARAMS),
        "shardings must hold a jax.sharding.Sharding for every leaf, got 3 at 'a'",
    ),
    (lambda: updated({"a": PARAMS["a"]}), "the updates hold 1 projected sides in 1 shapes, init"),
    (lambda: updated({"a": PARAMS["a"]}, PARAMS), "only in the parameters: ['b/kernel']"),
    (
        lambda: optlab.in_low_rank(
            optlab.scale_by_diffgrad(), rank=2, on_refresh="rotate"
        ).init(PARAMS),
        'on_refresh="rotate" turns the fields mu, nu and trace, and inner keeps coordinates in '
        ".previous['a']['kernel']. Give a function (state, into).",
    ),
    (
        lambda: optlab.in_low_rank(
            optlab.quantize_state(optax.scale_by_adam(), optlab.codecs.int8(), min_size=1),
            rank=2,
            on_refresh="rotate",
        ).init(PARAMS),
        "and inner keeps codes of them. Put quantize_state around in_low_rank, not inside.",
    ),
    (lambda: low(on_refresh="rotat"), "on_refresh must be one of 'keep', 'reset', 'rotate', got"),
    (lambda: low(project=3), "project must be a tuple of names, got 3"),
    (lambda: low(layout=None), "layout must be a function, got None. Write optlab.layout.flax."),
    (lambda: low(rank=lambda *leaf: 0).init(PARAMS), "rank of leaf 'a/kernel' must be a number"),
    (lambda: low(rank={"a": 2, "b": 2.5}).init(PARAMS), "rank of leaf 'b/kernel' must be a number"),
    (
        lambda: low(rank=2, side=lambda m, n: "top").init(PARAMS),
        "side of leaf 'a/kernel' must be one of 'rows', 'cols', got 'top'",
    ),
    (lambda: updated(PARAMS, project=("x",)), "update needs the extra argument 'x', got []"),
    (
        lambda: updated({"a": PARAMS["b"], "b": PARAMS["a"]}, PARAMS),
        "leaf 'a/kernel' has shape (6, 4) in the updates and (4, 6) in the parameters",
    ),
]  # fmt: skip

OTHERS = [
    (lambda: optlab.power_projector(0), "power_projector: iterations must be a whole number >= 1"),
    (lambda: optlab.power_projector(oversample=-1), "power_projector: oversample must be a whole"),
    (lambda: optlab.power_projector(start="zero"), "start must be one of 'random', 'svd'"),
    (lambda: optlab.svd_projector(dtype=int), "svd_projector: dtype must be a floating dtype"),
    (lambda: optlab.random_projector(dtype="x"), "random_projector: dtype must be a floating"),
    (lambda: optlab.coordinate_projector(4), "coordinate_projector: too many positional"),
    (lambda: optlab.quantized("svd"), "quantized: projector must be a projector that keeps a b"),
    (lambda: optlab.quantized(optlab.random_projector()), "that keeps a basis, got _Random"),
    (lambda: optlab.quantized(SVD, 2), "quantized: bits must be 4 or 8, got 2"),
    (lambda: optlab.quantized(SVD, block=3), "quantized: block must be even, got 3"),
    (lambda: optlab.quantized(SVD, block=0), "quantized: block must be a whole number >= 2"),
    (lambda: optlab.quantized(SVD, by="row"), "by must be one of 'vector', 'entry', got 'row'"),
    (lambda: optlab.lazy_refresh(0), "lazy_refresh: every must be a whole number >= 1, got 0"),
    (lambda: optlab.lazy_refresh(queue=0), "lazy_refresh: queue must be a whole number >= 1"),
    (lambda: optlab.lazy_refresh(growth=0.5), "lazy_refresh: growth must be a number >= 1"),
    (lambda: optlab.lazy_refresh(threshold=3), "lazy_refresh: threshold must be a number in"),
    (lambda: optlab.sign_residual(-1), "sign_residual: factor must be a number >= 0, got -1"),
    (lambda: optlab.plain_residual(-1), "plain_residual: factor must be a number >= 0, got -1"),
    (lambda: optlab.column_scaled_residual(inside=-1), "inside must be a number >= 0, got -1"),
    (lambda: optlab.column_scaled_residual(eps=0), "eps must be a number > 0, got 0"),
    (lambda: optlab.column_scaled_residual(per="row"), "per must be one of 'column', 'matrix'"),
    (lambda: optlab.norm_growth_limiter(0), "norm_growth_limiter: growth must be a number > 0"),
    (lambda: optlab.norm_growth_limiter(layout=3), "layout must be a function or None, got 3"),
    (lambda: optlab.scale_by_ldadam(rho=2), "scale_by_ldadam: rho must be a number in [0, 1]"),
    (lambda: optlab.scale_by_ldadam(b1=1), "scale_by_ldadam: b1 must be a number in [0, 1)"),
    (lambda: optlab.galore(0.1, rank=0), "galore: rank must be a number >= 1"),
    (lambda: optlab.galore(0.1, inner=3), "galore: inner must be an optax.GradientTransform"),
    (lambda: optlab.q_galore(0.1, bits=3), "q_galore: bits must be 4 or 8, got 3"),
    (lambda: optlab.q_galore(0.1, every=0), "q_galore: every must be a whole number >= 1"),
    (lambda: optlab.fira(0.1, growth=0), "fira: growth must be a number > 0, got 0"),
    (lambda: optlab.frugal(0.1, factor=-1), "frugal: factor must be a number >= 0, got -1"),
    (lambda: optlab.frugal(0.1, side="x"), "frugal: side must be one of 'short'"),
    (lambda: optlab.apollo(0.1, per="x"), "apollo: per must be one of 'column', 'matrix'"),
    (lambda: optlab.conda(0.1, projector=3), "conda: projector must be a projector, got 3"),
    (lambda: optlab.ldadam(0.1, rho=3), "ldadam: rho must be a number in [0, 1], got 3"),
    (lambda: optlab.column_scaled_residual(then=3), "then must be an optax.GradientTransformation"),
    (lambda: optlab.frugal(0.1, every=optlab.lazy_refresh(3)), "frugal: every must be a number of"),
    (lambda: optlab.galore(0.1, layout=None), "galore: layout must be a function, got None"),
]


def refuses(call, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("call", "words"), CONSTRUCTION, ids=[words for _, words in CONSTRUCTION])
def test_in_low_rank_names_what_is_wrong(call, words):
    said = refuses(call, words)
    assert said.startswith(("in_low_rank: ", "layout.flax: "))
    assert said.endswith((".", "?", ")", '"'))


@pytest.mark.parametrize(("call", "words"), OTHERS, ids=[words for _, words in OTHERS])
def test_its_parts_and_recipes_name_themselves(call, words):
    assert re.match(r"[a-z_]+: ", refuses(call, words))
