# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark of rows and codes runs on small sizes: time on a GPU is too dear to find out there."""

from pathlib import Path

import pytest
import torch

from starkv.kernels.cuda_library import KernelLibrary
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = CodeRowsSize((4, 4), 4, 4, kv_heads=2, head_dim=64, slots=1, slot=0)


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_benchmark_runs(kernels: KernelLibrary, device: torch.device) -> None:
    from code_rows_gpu import run

    table, found = run(kernels, device, rounds=1, sizes={"tiny": TINY}, copy_bytes=1 << 16)
    figures = found["figures"]
    # A row of 8 bits: 256 numbers of 2 bytes, 256 codes, a position.
    assert figures["quantize, tiny rows, 8 bits"]["bytes"] == 8 * (512 + 256 + 12)
    assert figures["dequantize, tiny rows, 4 bits"]["bytes"] == 8 * (512 + 128 + 12)
    assert all(len(figure["seconds"]) == 1 for figure in figures.values())
    assert table.count("\n") == 5


def test_wrong_rows_end_the_benchmark(kernels: KernelLibrary, device: torch.device) -> None:
    from code_rows_gpu import check
    from gpu_steps import StepError

    call = make_code_rows_call(TINY, torch.bfloat16, device)
    call.v[0, 0, 0, 3, 1] = torch.inf
    with pytest.raises(StepError, match="same codes: True, same rows: True, wrong rows: 1"):
        check(kernels, call)
