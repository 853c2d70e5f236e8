# SPDX-License-Identifier: Apache-2.0
"""Low-rank decode attention: the PyTorch reference against numpy, Triton against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from decode_checks import assert_agree, assert_is_numpys

from starkv.errors import UsageError
from starkv.kernels import triton_decode
from starkv.kernels.low_rank_factors import LatentForm, LowRankFactors
from starkv.kernels.low_rank_reference import lifted_keys, reference_low_rank_attention
from starkv.kernels.triton_low_rank import low_rank_attention
from starkv.kernels.triton_low_rank_scores import ScoreTiles, heads_per_program
from starkv.validation.low_rank_cases import DecodeShape, low_rank_case

FORMS: tuple[LatentForm, ...] = ("float", "int8", "int4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = DecodeShape(
    heads=14,
    kv_heads=2,
    dim=64,
    capacity=100,
    rows=(100, 64, 5),
    sections=(8, 12, 12),
    key_ranks=(26, 48),
    value_rank=37,
    tail_capacity=70,
    tail_rows=(7, 0, 70),
    frame=(3, 5),
)
"""Ragged ranks, 7 query heads of a KV head, an odd number of outliers, more rows than a tile."""


@pytest.mark.parametrize("biased_tail", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_numpy_reference(
    form: LatentForm, biased_tail: bool, device: torch.device
) -> None:
    shape = replace(SMALL, heads=4, rows=(9, 20), capacity=20, tail_rows=(3, 0), tail_capacity=4)
    decode_numpy = pytest.importorskip("decode_numpy", exc_type=ImportError, reason="needs ml_dtypes")
    call = low_rank_case(shape, form, torch.float32, device)
    assert call.tail is not None
    call.tail.values_have_bias = biased_tail
    assert_is_numpys(reference_low_rank_attention(call), [decode_numpy.low_rank(call, at) for at in range(2)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_ragged_ranks(form: LatentForm, dtype: torch.dtype, device: torch.device) -> None:
    call = low_rank_case(SMALL, form, dtype, device)
    assert_agree(low_rank_attention(call), reference_low_rank_attention(call), dtype)


FEW = replace(SMALL, heads=4, capacity=70, rows=(70, 3), tail_capacity=9, tail_rows=(9, 0))
SHAPES = {
    "seven_heads_of_128": DecodeShape(capacity=70, rows=(70,)),
    "many_heads": replace(FEW, heads=6, kv_heads=6, key_ranks=(16,) * 6),
    "one_head": replace(FEW, heads=1, kv_heads=1, key_ranks=(1,), value_rank=1),
    "full_rank": replace(FEW, key_ranks=(64, 64), value_rank=128),
    "two_heads_a_factor": replace(FEW, heads=8, kv_heads=4, key_ranks=(17, 128)),
    "four_heads_a_factor": replace(FEW, heads=4, kv_heads=4, key_ranks=(40,)),
    "more_heads_than_a_program_takes": replace(FEW, heads=36, key_ranks=(16, 5), rows=(9, 3)),
    "dim_80": replace(FEW, dim=80, sections=(10, 15, 15)),
    "dim_32": replace(FEW, dim=32, sections=(16, 0, 0), key_ranks=(16, 32)),
    "seventeen_sharers": replace(FEW, heads=34),
    "no_tail": replace(FEW, tail_capacity=0, tail_rows=()),
    "only_a_tail": replace(FEW, rows=(0, 5)),
    "one_row": replace(FEW, rows=(1, 0), tail_rows=(0, 1)),
}


@pytest.mark.parametrize("form", ["float", "int4"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, form: LatentForm, device: torch.device) -> None:
    call = low_rank_case(SHAPES[name], form, torch.float32, device)
    assert_agree(low_rank_attention(call), reference_low_rank_attention(call), torch.float32)


def test_kv_heads_share_a_program_where_there_are_programs_enough() -> None:
    assert heads_per_program(4, 300) == 2
    assert heads_per_program(4, 1) == 1
    assert heads_per_program(32, 4096) == 8
    assert heads_per_program(12, 4096) == 6


@pytest.mark.parametrize("cut", [ScoreTiles(rows=16), ScoreTiles(heads=2), ScoreTiles(heads=4)], ids=str)
def test_how_the_work_is_cut_changes_nothing(cut: ScoreTiles, device: torch.device) -> None:
    shape = replace(FEW, heads=4, kv_heads=4, key_ranks=(16, 5, 30, 17))
    call = low_rank_case(shape, "int8", torch.float32, device)
    assert_agree(low_rank_attention(call, cut), reference_low_rank_attention(call), torch.float32)


def test_programs_that_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "MAX_SPLITS", 2)
    shape = replace(
        SMALL, heads=2, capacity=300, rows=(300, 200, 64), tail_capacity=300, tail_rows=(5, 290, 130)
    )
    call = low_rank_case(shape, "int4", torch.float32, device)
    assert_agree(low_rank_attention(call), reference_low_rank_attention(call), torch.float32)


def test_a_tail_with_bias_is_the_same_tail(device: torch.device) -> None:
    call = low_rank_case(SMALL, "float", torch.float32, device)
    assert call.tail is not None
    biased = replace(call.tail, v=call.tail.v + call.factors.value_bias[:, None], values_have_bias=True)
    assert_agree(low_rank_attention(replace(call, tail=biased)), low_rank_attention(call), torch.float32)


def test_cached_rows_and_a_tail_are_one_softmax(device: torch.device) -> None:
    """Full rank with an orthonormal factor: the split between cache and tail must not show."""
    shape = replace(SMALL, heads=4, key_ranks=(64, 64), value_rank=128, rows=(60, 60, 60), tail_rows=(0,) * 3)
    call = low_rank_case(shape, "float", torch.float32, device)
    assert call.tail is not None
    whole = low_rank_attention(call)
    for sequence in range(3):
        keys = lifted_keys(call, sequence)[:, 40:60]
        values = call.values[sequence, 40:60] @ call.factors.up_v
        call.tail.k[sequence, :, :20], call.tail.v[sequence, :, :20] = keys, values
    call.n_valid.fill_(40)
    call.tail.n_valid.fill_(20)
    assert_agree(low_rank_attention(call), whole, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_a_sequence_does_not_hold_are_never_read(form: LatentForm, device: torch.device) -> None:
    call = low_rank_case(SMALL, form, torch.float32, device)
    expected = low_rank_attention(call)
    for sequence, rows in enumerate(SMALL.rows):
        for tensor in (call.keys, call.values, call.key_scales, call.value_scales):
            if tensor is not None:
                spoiled = torch.nan if tensor.is_floating_point() else 1
                tensor[sequence, rows:] = spoiled
        call.where.positions[sequence, rows:] = -7
        assert call.tail is not None
        call.tail.k[sequence, :, SMALL.tail_rows[sequence] :] = torch.nan
        call.tail.v[sequence, :, SMALL.tail_rows[sequence] :] = torch.nan
    result = low_rank_attention(call)
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.total, expected.total)


@pytest.mark.parametrize(
    ("rows", "tail_rows"), [((-1, 101, 2**31 - 1), (7, 0, 70)), ((5, 5, 5), (-1, 71, -(2**31)))]
)
def test_numbers_of_rows_that_make_no_sense_come_out_as_zero(
    rows: tuple[int, ...], tail_rows: tuple[int, ...], device: torch.device
) -> None:
    call = low_rank_case(SMALL, "float", torch.float32, device)
    assert call.tail is not None
    call.n_valid.copy_(torch.tensor(rows))
    call.tail.n_valid.copy_(torch.tensor(tail_rows))
    result = low_rank_attention(call)
    assert not result.out.any()
    assert not result.total.any()
    assert (result.largest == -torch.inf).all()
    assert_agree(result, reference_low_rank_attention(call), torch.float32)


@pytest.mark.parametrize("position", [-1, 10**6])
def test_a_position_that_the_tables_do_not_know_shows(position: int, device: torch.device) -> None:
    call = low_rank_case(SMALL, "float", torch.float32, device)
    call.where.positions[1, 3, 2] = position
    out = low_rank_attention(call).out
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_a_broken_latent_shows(device: torch.device) -> None:
    call = low_rank_case(SMALL, "float", torch.float32, device)
    call.keys[2, 4, 0] = torch.nan
    out = low_rank_attention(call).out
    assert out[2, :7].isnan().all()
    assert not out[:2].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_can_be_captured_in_a_graph(device: torch.device) -> None:
    """Launches depend on no data: a replay attends to the rows that are held then."""
    call = low_rank_case(SMALL, "int4", torch.bfloat16, device)
    low_rank_attention(call)  # Kernels are compiled outside of the capture.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = low_rank_attention(call)
    call.n_valid.copy_(torch.tensor((33, 100, 64)))
    graph.replay()
    torch.cuda.synchronize()
    assert_agree(result, reference_low_rank_attention(call), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_valid": torch.zeros(3, dtype=torch.int64)}, "n_valid must be torch.int32"),
        ({"keys": torch.zeros(3, 100, 24, dtype=torch.uint8)}, r"keys must be torch.uint8 of \[3, 100, 40\]"),
        ({"key_scales": None}, "int4 need key_scales"),
        ({"q": torch.zeros(3, 13, 64)}, "13 query heads can't share 2"),
        ({"q": torch.zeros(3, 14, 64, dtype=torch.float16)}, "factors are torch.float32 for head dim 64"),
        ({"q": torch.zeros(3, 14, 64, dtype=torch.float64)}, "q must be float16, bfloat16 or float32"),
        ({"q": torch.zeros(3, 256, 64)}, "128 query heads, not 256"),
        ({"q": torch.zeros(3, 128, 64)}, "at most 32 query heads may share"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    call = low_rank_case(SMALL, "int4", torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match=message):
        low_rank_attention(replace(call, **change))


def test_refused_places_and_tails() -> None:
    call = low_rank_case(SMALL, "float", torch.float32, torch.device("cpu"))
    assert call.tail is not None
    with pytest.raises(UsageError, match="programs of 3 KV heads"):
        low_rank_attention(call, ScoreTiles(heads=3))
    with pytest.raises(UsageError, match="don't share 32 rotary pairs"):
        low_rank_attention(replace(call, where=replace(call.where, sections=(8, 12, 11))))
    with pytest.raises(UsageError, match="sines must be"):
        low_rank_attention(replace(call, where=replace(call.where, sines=call.where.sines[:3])))
    with pytest.raises(UsageError, match="v must be"):
        low_rank_attention(replace(call, tail=replace(call.tail, v=call.tail.v[:, :1])))
    with pytest.raises(UsageError, match="have no scales"):
        low_rank_attention(replace(call, key_scales=torch.zeros(3, 100, 2, 2)))
    narrow = low_rank_case(
        replace(SMALL, dim=48, sections=(8, 8, 8), key_ranks=(16, 16)),
        "float",
        torch.float32,
        torch.device("cpu"),
    )
    with pytest.raises(UsageError, match="head dim 48"):
        low_rank_attention(narrow)


def test_refused_factors() -> None:
    up, bias = torch.zeros(64, 8), torch.zeros(2, 64)

    def factors(keys: list[torch.Tensor], values: torch.Tensor, form: LatentForm = "float") -> LowRankFactors:
        return LowRankFactors.of(form, keys, values, bias, bias)

    with pytest.raises(UsageError, match="3 key factors can't share 2"):
        factors([up] * 3, torch.zeros(128, 8))
    with pytest.raises(UsageError, match=r"value_factor must be \[128, rank"):
        factors([up] * 2, torch.zeros(64, 8))
    with pytest.raises(UsageError, match=r"key_factors\[1\] must be"):
        factors([up, torch.zeros(64, 65)], torch.zeros(128, 8))
    with pytest.raises(UsageError, match=r"key_factors\[1\] is torch.float16"):
        factors([up, up.half()], torch.zeros(128, 8))
    with pytest.raises(UsageError, match="not as 'int3'"):
        factors([up] * 2, torch.zeros(128, 8), "int3")  # type: ignore[arg-type]


def test_bytes_of_a_row() -> None:
    """Ranks 26 and 154 of 28/4 heads of 128: 164 bytes in int4, scales and padding counted."""
    shape = DecodeShape(capacity=1, rows=(1,), key_ranks=(26,) * 4, value_rank=154)
    sizes = {
        form: low_rank_case(shape, form, torch.bfloat16, torch.device("cpu")).factors.bytes_per_row
        for form in FORMS
    }
    assert sizes == {"float": 2 * (128 + 154), "int8": 128 + 160 + 20, "int4": 64 + 80 + 20}
