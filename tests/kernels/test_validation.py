# SPDX-License-Identifier: Apache-2.0
"""The checks behind ``starkv validate ops``: right implementations pass, wrong ones don't."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.methods.star_kv_config import StarKVConfig
from starkv.validation.attention_checks import AttentionSize, check_attention
from starkv.validation.compress_agreement import kept_agreement
from starkv.validation.compress_cases import CompressSize, Heads, make_case
from starkv.validation.compress_checks import check_compress
from starkv.validation.implementations import Compress, Implementation, implementations
from starkv.validation.onnx_adapter import OnnxImplementation
from starkv.validation.quantized_calls import QuantizedSize
from starkv.validation.quantized_checks import check_quantized_attention
from starkv.validation.report import Check, Report, markdown_table

SIZE = CompressSize("small", Heads(2, 6, 2, 64), (18, 32), 2)
ATTENTION = AttentionSize("small", 2, 3, 40, query_heads=4, kv_heads=2, head_dim=64)
Spoil = Callable[[CompressCall, CompressResult], None]


def check_of(compress: Compress, device: torch.device, mode: str = "native") -> Check:
    (check,) = check_compress(
        SIZE, mode, torch.float32, device, [Implementation("own", compress, timed=False)]
    )
    return check


@pytest.mark.parametrize("mode", ["native", "official"])
def test_the_onnx_definition_passes(mode: str, device: torch.device) -> None:
    check = check_of(OnnxImplementation().compress, device, mode)
    assert (check.status, check.reason) == ("passed", "")
    assert check.measures["kept_agreement"] == 1.0
    assert check.measures["error"] < 1e-5


def _rows_shifted(call: CompressCall, result: CompressResult) -> None:
    result.rows[0, 0, 0, 0] += 1


def _one_key_wrong(call: CompressCall, result: CompressResult) -> None:
    call.dst_k[1, int(call.slot[0]), 0, 3, 5] += 1


def _one_value_wrong(call: CompressCall, result: CompressResult) -> None:
    call.dst_v[1, int(call.slot[0]), 1, 3, 5] += 1


def _metadata_forgotten(call: CompressCall, result: CompressResult) -> None:
    call.dst_meta[1, int(call.slot[0]), 2, 3] += 1


def _scores_off(call: CompressCall, result: CompressResult) -> None:
    result.stages[:, :, 1] *= 1.0001


def _scores_not_numbers(call: CompressCall, result: CompressResult) -> None:
    result.stages[0, 0, 0, 7] = torch.nan


def _final_scores_off(call: CompressCall, result: CompressResult) -> None:
    result.scores *= 1.05


def _information_off(call: CompressCall, result: CompressResult) -> None:
    result.mi_ema += 1.0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_rows_shifted, "rows are not the best of its own scores"),
        (_one_key_wrong, "the destination does not hold the kept rows"),
        (_one_value_wrong, "the destination does not hold the kept rows"),
        (_metadata_forgotten, "the destination does not hold the kept rows"),
        (_scores_off, "attention scores differ by 1.0e-04"),
        (_scores_not_numbers, "attention scores differ by inf"),
        (_final_scores_off, "final scores differ by 5.0e-02"),
        (_information_off, "spatial information differs by 1.0e\\+00 nats"),
    ],
)
def test_a_wrong_implementation_fails(spoil: Spoil, reason: str, device: torch.device) -> None:
    right = OnnxImplementation().compress

    def wrong(call: CompressCall) -> CompressResult:
        result = right(call)
        spoil(call, result)
        return result

    check = check_of(wrong, device)
    assert check.status == "failed"

    assert re.search(reason, check.reason)


def test_in_place_is_compared_with_out_of_place(device: torch.device) -> None:
    right = OnnxImplementation().compress

    def wrong(call: CompressCall) -> CompressResult:
        result = right(call)
        if call.dst_k is call.k:
            call.dst_v[0, 0, 0, 0] += 1
        return result

    assert check_of(wrong, device).reason == "in place and out of place differ"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention(dtype: torch.dtype, kernels: KernelLibrary, device: torch.device) -> None:
    def forgets_the_mask(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        out, keys, values = reference_attention(call)
        return out.flip(1), keys, values

    def forgets_the_rows(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        return reference_attention(call)[0], call.past_k, call.past_v

    others = [
        Implementation("ONNX", attention=OnnxImplementation().attention, timed=False),
        Implementation("CUDA", attention=kernels.attention, timed=False),
        Implementation("no mask", attention=forgets_the_mask, timed=False),
        Implementation("no rows", attention=forgets_the_rows, timed=False),
    ]
    checks = list(check_attention(ATTENTION, dtype, device, others))
    assert [check.status for check in checks] == ["passed", "passed", "failed", "failed"]
    assert "the output differs" in checks[2].reason
    assert "does not hold the new rows" in checks[3].reason


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_attention(
    dtype: torch.dtype, bits: int, kernels: KernelLibrary, device: torch.device
) -> None:
    def forgets_the_bias(call: QuantizedAttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        _, keys, values = reference_quantized_attention(call)
        without = replace(call, k_bias=torch.zeros_like(call.k_bias))
        return reference_quantized_attention(without)[0], keys, values

    def rounds_otherwise(call: QuantizedAttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        out, keys, values = reference_quantized_attention(call)
        keys[0, 0, 40, 3] += 1
        return out, keys, values

    others = [
        Implementation("ONNX", quantized_attention=OnnxImplementation().quantized_attention, timed=False),
        Implementation("CUDA", quantized_attention=kernels.quantized_attention, timed=False),
        Implementation("no bias", quantized_attention=forgets_the_bias, timed=False),
        Implementation("other codes", quantized_attention=rounds_otherwise, timed=False),
    ]
    size = QuantizedSize((40, 20), 48, bits, query_heads=4, kv_heads=2, head_dim=64)
    checks = list(check_quantized_attention(size, dtype, device, others))
    assert [check.status for check in checks] == ["passed", "passed", "failed", "failed"]
    assert "the output differs" in checks[2].reason
    assert "does not hold the new row's codes" in checks[3].reason


def test_missing_implementations_say_why(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STARKV_KERNELS", raising=False)
    monkeypatch.setattr("starkv.kernels.library_paths.library_folders", lambda: iter(()))
    monkeypatch.setattr("starkv.validation.implementations.find_spec", lambda name: None)
    found = implementations(device)
    assert [other.missing for other in found] == [
        "the package onnx is not installed",
        "the package triton is not installed",
        f"no libstarkv_kernels{'' if device.type == 'cuda' else '_cpu'}.so; `make plugin` builds it",
        f"no libstarkv_trt{'' if device.type == 'cuda' else '_cpu'}.so; `make plugin` builds it where "
        "TensorRT's headers are",
    ]
    checks = list(check_compress(SIZE, "native", torch.float32, device, found))
    assert {check.status for check in checks} == {"skipped"}
    assert not Report.of("validate ops", checks).passed


def test_a_case_uses_every_part_of_the_method(device: torch.device) -> None:
    case = make_case(SIZE, StarKVConfig(), torch.bfloat16, device)
    plan = case.request.plan
    assert plan.mi_enabled
    assert plan.mi_weight > 0
    assert plan.temporal_apply
    assert plan.pattern_usable
    assert plan.layer_budget
    assert case.request.protected


def test_agreement_counts_equal_rows() -> None:
    rows = torch.tensor([[[[1, 2, 3, -1]]], [[[4, 5, -1, -1]]]])
    other = torch.tensor([[[[1, 2, 7]]], [[[4, 5, -1]]]])
    assert kept_agreement(rows, other) == pytest.approx(2 / 3)
    assert kept_agreement(rows, rows) == 1.0


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    blank = Check("Compress", "CUDA", "small", "skipped", dtype="float32")
    checks = [blank, blank.finished([], {"error": 1e-7}), blank.finished(["wrong", "and more"], {})]
    report = Report.of("validate ops", checks, "a card")
    path = tmp_path / "deep" / "report.json"
    report.write(path)
    written = json.loads(path.read_text())
    assert written["schema_version"] == 1
    assert written["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert written["all_passed"] is False
    assert written["device"] == "a card"
    assert written["checks"][2]["reason"] == "wrong; and more"
    assert {"starkv", "python", "torch"} <= set(written["versions"])
    assert [item.name for item in path.parent.iterdir()] == ["report.json"]
    assert replace(report, checks=tuple(checks[:2])).passed


def test_a_table_in_markdown() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
