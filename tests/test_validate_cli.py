# SPDX-License-Identifier: Apache-2.0
"""``starkv validate ops`` as a command: what it prints, and how it ends."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from starkv.cli.main import app
from starkv.errors import UsageError
from starkv.validation.report import Check

PASSED = Check("Compress", "ONNX", "small case", "passed", dtype="bfloat16").finished(
    [], {"error": 3e-7, "kept_agreement": 1.0, "seconds": 0.0125, "reference_seconds": 1.5}
)
SKIPPED = Check("Compress", "CUDA", "small case", "skipped", dtype="bfloat16", reason="no library")
FAILED = Check("KVAttention", "CUDA", "decode", "passed", dtype="float16").finished(
    ["the output differs by 1.0e+00 of itself"], {"error": 1.0}
)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the command will be told."""
    told: list[Check] = []

    def validate_ops(
        device: torch.device, dtypes: tuple[str, ...], started: Callable[[str], None]
    ) -> Iterator[Check]:
        assert device.type in ("cpu", "cuda")
        started("something")
        yield from (check for check in told if check.dtype in dtypes)

    monkeypatch.setattr("starkv.validation.ops.validate_ops", validate_ops)
    monkeypatch.setattr("starkv.cli.validate.results", Console(width=160, highlight=False))
    return told


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["validate", "ops", *arguments])
    if isinstance(result.exception, UsageError):
        raise result.exception
    return result.exit_code, result.stdout


def test_a_table_for_each_case(checks: list[Check]) -> None:
    checks += [PASSED, SKIPPED, FAILED]
    code, printed = run()
    assert code == 1
    lines = [line.split() for line in printed.splitlines()]
    assert ["Compress:", "small", "case"] in lines
    passed = ["passed", "bfloat16", "ONNX", "3.0e-07", "100.00%", "12.500", "ms", "1,500.000", "ms"]
    assert passed in lines
    assert ["skipped", "bfloat16", "CUDA", "no", "library"] in lines
    assert "failed" in printed
    assert "the output differs by 1.0e+00 of itself" in printed


def test_nothing_checked_is_no_success(checks: list[Check]) -> None:
    checks += [SKIPPED]
    assert run()[0] == 1
    checks += [PASSED]
    assert run()[0] == 0


def test_json_and_a_file_hold_the_report(checks: list[Check], tmp_path: Path) -> None:
    checks += [PASSED, FAILED]
    path = tmp_path / "report.json"
    code, printed = run("--json", "--dtype", "bfloat16", "--out", str(path))
    assert code == 0
    report = json.loads(printed)
    assert report == json.loads(path.read_text())
    assert report["command"] == "validate ops"
    assert [check["implementation"] for check in report["checks"]] == ["ONNX"]
    assert report["checks"][0]["measures"]["kept_agreement"] == 1.0


def test_bad_options_name_the_good_ones(checks: list[Check]) -> None:
    with pytest.raises(UsageError, match=r"--dtype int8: must be one of float32, float16, bfloat16"):
        run("--dtype", "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(checks: list[Check]) -> None:
    with pytest.raises(UsageError, match="PyTorch finds no GPU here; --device cpu emulates"):
        run("--device", "cuda")
