"""Collectives are read off programs of CPU, GPU and TPU alike: each once, with what it gives."""

import pytest

from benchmarks import hlo

CPU = """
%region_0 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (p: f32[2,4]) -> f32[2,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %all-to-all = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%p, %p), replica_groups={{0,1}}
  %x = f32[1,4]{1,0} get-tuple-element(%all-to-all), index=0
  %r = bf16[3]{0} all-reduce(%x), to_apply=%region_0
  ROOT %w = f32[2,4]{1,0} while(%p), condition=%cond, body=%body
}

%cond (p: f32[2,4]) -> pred[] {
  %p = f32[2,4]{1,0} parameter(0)
  ROOT %t = pred[] constant(true)
}

%body (p: f32[2,4]) -> f32[2,4] {
  %p = f32[2,4]{1,0} parameter(0)
  ROOT %g = f32[2,4]{1,0} all-gather(%p), dimensions={0}
}
"""
GPU = """
%wrapped (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[1,4]{1,0} reduce-scatter(%p), dimensions={0}
}

ENTRY %main (p: f32[1,4]) -> f32[1,4] {
  %p = f32[1,4]{1,0} parameter(0)
  %one-start = ((f32[1,4]{1,0}), f32[1,4]{1,0}) all-to-all-start(%p), dimensions={0}
  %one-done = f32[1,4]{1,0} all-to-all-done(%one-start)
  %two-start = ((f32[1,4]{1,0}, f16[2]{0}), (f32[8,4]{1,0}, f16[16]{0})) all-gather-start(%p, %q)
  %two-done = (f32[8,4]{1,0}, f16[16]{0}) all-gather-done(%two-start)
  %sum-start = f32[1,4]{1,0} all-reduce-start(%p), to_apply=%region
  %sum-done = f32[1,4]{1,0} all-reduce-done(%sum-start)
  %c-start = (f32[1,4]{1,0}, f32[1,4]{1,0}, u32[], u32[]) collective-permute-start(%p)
  %c-done = f32[1,4]{1,0} collective-permute-done(%c-start)
  %any-start = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-start(%p), calls=%wrapped
  ROOT %any-done = f32[1,4]{1,0} async-done(%any-start)
}
"""
TPU = """
%start (p: bf16[32]) -> (bf16[256], u32[]) {
  %p = bf16[32]{0:T(256)(128)(2,1)} parameter(0)
  ROOT %g = bf16[256]{0:T(256)(128)(2,1)S(1)} all-gather(%p), frontend_attributes={chain_id="0"}
}

%middle (p: bf16[32]) -> (bf16[256], u32[]) {
  %p = bf16[32]{0:T(256)(128)(2,1)} parameter(0)
  ROOT %g = bf16[256]{0:T(256)(128)(2,1)S(1)} all-gather(%p), frontend_attributes={chain_id="0"}
}

%other (p: bf16[32]) -> (bf16[256], u32[]) {
  %p = bf16[32]{0:T(256)(128)(2,1)} parameter(0)
  ROOT %g = bf16[256]{0:T(256)(128)(2,1)S(1)} all-gather(%p), frontend_attributes={chain_id="1"}
}

ENTRY %main (p: bf16[32]) -> bf16[256] {
  %p = bf16[32]{0:T(256)(128)(2,1)} parameter(0)
  %a = (bf16[256]{0:T(256)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %b = (bf16[256]{0:T(256)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%middle
  %c = (bf16[256]{0:T(256)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%other
  %e = bf16[256]{0:T(256)(128)(2,1)} all-gather(%p), dimensions={0}
  ROOT %f = bf16[256]{0:T(256)(128)(2,1)} all-gather(%p), dimensions={0}
}
"""
EXPECTED = {
    "cpu": (CPU, {"all-to-all": (1, 32), "all-reduce": (1, 6), "all-gather": (1, 32)}),
    "gpu": (
        GPU,
        {
            "all-to-all": (1, 16),
            "all-gather": (1, 128 + 32),
            "all-reduce": (1, 16),
            "collective-permute": (1, 16),
            "reduce-scatter": (1, 16),
        },
    ),
    "tpu": (TPU, {"all-gather": (4, 4 * 512)}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_collectives_count_once_with_the_bytes_of_their_result(name):
    text, expected = EXPECTED[name]
    assert hlo.collective_counts(text) == {kind: n for kind, (n, _) in expected.items()}
    assert hlo.collective_bytes(text) == {kind: b for kind, (_, b) in expected.items()}
    assert hlo.collectives(text) == sum(n for n, _ in expected.values())


def test_widths_of_types():
    line = "  ROOT %a = (pred[3]{0}, s4[2]{0}, f8e4m3fn[5]{0}, c64[], f64[2,2]) all-gather(%p)\n"
    text = f"ENTRY %main (p: f32[]) -> f32[] {{\n{line}}}\n"
    assert hlo.collective_bytes(text) == {"all-gather": 3 + 1 + 5 + 8 + 32}


def test_a_line_without_an_opcode_is_an_error():
    with pytest.raises(ValueError, match="no opcode in '%a = f32"):
        hlo.collectives("ENTRY %main (p: f32[]) -> f32[] {\n  %a = f32[]\n}\n")


def test_arrays_of_collectives_have_their_shapes():
    assert hlo.collective_arrays(CPU) == {
        ("all-to-all", (1, 4)), ("all-reduce", (3,)), ("all-gather", (2, 4)),
    }  # fmt: skip
