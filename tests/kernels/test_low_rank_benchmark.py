# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark of compressed caches runs on small sizes: time on a GPU is too dear to find out there."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_benchmark_runs(device: torch.device) -> None:
    from low_rank_gpu import TINY, run

    table, found = run(device, rounds=1, sizes=TINY, with_tuning=True)
    (figures,) = found["figures"].values()
    assert set(figures["seconds"]) == set(figures["errors"])
    assert figures["times_faster_than_dense"][figures["fastest_dense"]] == 1
    assert figures["bytes"]["low-rank int4"] < figures["bytes"]["quantized int4"]
    assert (
        figures["bytes"]["quantized int4"]
        < figures["bytes"]["quantized int8"]
        < figures["bytes"]["dense, SDPA"]
    )
    assert all(found["tuning"].values())
    assert table.count("\n") > 4


def test_a_wrong_result_ends_the_benchmark() -> None:
    from low_rank_gpu_runners import Runner, check_runners

    right = torch.ones(1, 2, 4)
    check_runners({"right": Runner(lambda: right * 1.01, 0, lambda: right)})
    for wrong in (right * 1.03, right * torch.nan):
        runner = Runner(lambda wrong=wrong: wrong, 0, lambda: right)
        with pytest.raises(AssertionError, match="wrong is"):
            check_runners({"wrong": runner})


def test_bytes_at_full_size() -> None:
    """Of 28/4 heads of 128: 128 key and 160 value lanes of 4 bits, five pairs of scales, a position."""
    from low_rank_gpu import Sizes, shape_of
    from low_rank_gpu_runners import runners_of

    shape = shape_of("GQA 28/4", 64, 2, Sizes())
    runners = runners_of(shape, torch.device("cpu"))
    tail = 2 * 128 * 4 * 128 * 2
    assert runners["low-rank int4"].bytes_read == 2 * (64 * (64 + 80 + 20 + 12) + tail)
    assert runners["quantized int8"].bytes_read == 2 * 64 * (2 * 512 + 12)
    assert runners["dense, SDPA"].bytes_read == 2 * (64 + 128) * 2 * 512 * 2
