# SPDX-License-Identifier: Apache-2.0
"""Everything about the kernels that needs a GPU, in one command: ``make gpu-check``.

    python benchmarks/gpu_check.py [--official path/to/STaR-KV] [--skip sanitizer]

Needs Python with PyTorch, Triton and pytest, and nvcc with CMake unless ``STARKV_KERNELS`` names a library;
installs nothing. Steps: build, tests, compute-sanitizer, agreement of all implementations, benchmarks. A step
that fails is reported and the others go on. Writes ``benchmarks/results/<gpu>-<date>.json`` and ``.md``, and
ends with code 1 if any step failed, 77 if there is no GPU.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "plugin"
RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = "STARKV_KERNELS"
SANITIZED = "native_bfloat16 or maxpool_7 or ragged_with_spare_rows or decode or prefill or sampl"
"""Tests that compute-sanitizer watches: between them they launch every kernel."""
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MEASURES = ("error", "kept_agreement", "seconds", "reference_seconds")
STEPS = ("build", "tests", "sanitizer", "validate", "compress", "attention", "plugin")


@dataclass
class Step:
    """What a step found."""

    name: str
    status: str
    """``passed``, ``failed`` or ``skipped``."""
    detail: str
    seconds: float
    table: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class StepError(Exception):
    """A step's end before its time: its reason, and what it found until then."""

    status = "failed"

    def __init__(self, reason: str, table: str = "", figures: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.table, self.figures = table, figures or {}


class SkippedError(StepError):
    """A step that can't run here."""

    status = "skipped"


Result = tuple[str, str, dict[str, Any]]
"""Detail, table and figures."""


def run_command(command: list[str]) -> str:
    """Output of a command that must succeed; it is shown as it comes."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        print(line, end="", file=sys.stderr, flush=True)
    if process.wait():
        raise StepError(f"`{' '.join(command[:4])} …` ended with {process.returncode}: {last_words(lines)}")
    return "".join(lines)


def last_words(lines: list[str]) -> str:
    """The last lines with something in them."""
    return " | ".join(line.strip() for line in lines if line.strip())[-400:]


def build() -> Result:
    """Build the kernel library for this card, unless one is given."""
    if given := os.environ.get(LIBRARY):
        return f"given: {Path(given).name}", "", {}
    if not shutil.which("nvcc") or not shutil.which("cmake"):
        raise StepError(f"no nvcc or no cmake on PATH, and {LIBRARY} names no library")
    import torch

    major, minor = torch.cuda.get_device_capability()
    options = [
        f"-DSTARKV_CUDA_ARCHS={major}{minor}",
        f"-DTENSORRT_ROOT={os.environ.get('TENSORRT_ROOT', '')}",
    ]
    run_command(["cmake", "-S", "plugins_trt", "-B", str(BUILD), *options])
    run_command(["cmake", "--build", str(BUILD), "--parallel"])
    os.environ[LIBRARY] = str(BUILD / "libstarkv_kernels.so")
    return "built for this card", "", {}


def pytest_command(*arguments: str) -> list[str]:
    """The kernels' tests alone: the others' conftest.py wants packages that a GPU machine may lack."""
    isolated = ["--confcutdir=tests/kernels", "-p", "no:cacheprovider", "-q", "-rs"]
    return [sys.executable, "-m", "pytest", "tests/kernels", *isolated, *arguments]


def tests() -> Result:
    """The kernels' tests on the GPU."""
    output = run_command(pytest_command())
    summary = output.strip().splitlines()[-1].strip("= ")
    return summary, "", {"summary": summary}


def sanitizer() -> Result:
    """compute-sanitizer's four tools over a part of the tests, on our own kernels only."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise SkippedError("no compute-sanitizer on PATH")
    found: dict[str, Any] = {}
    for check in SANITIZERS:
        options = ["--tool", check, "--kernel-regex", "kns=starkv", "--error-exitcode", "9"]
        output = run_command([tool, *options, *pytest_command("-k", SANITIZED, "-x")])
        found[check] = [line.strip("= ") for line in output.splitlines() if "ERROR SUMMARY" in line]
    return f"{', '.join(SANITIZERS)}: no errors", "", found


def validate() -> Result:
    """``starkv validate ops`` on the GPU."""
    import torch

    from starkv.validation.ops import validate_ops
    from starkv.validation.report import Report, markdown_table

    work = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    checks = list(validate_ops(torch.device("cuda"), started=work))
    report = Report.of("validate ops", checks, torch.cuda.get_device_name())
    rows = []
    for check in checks:
        numbers = {name: f"{value:.3g}" for name, value in check.measures.items()}
        cells = (
            numbers.get(name, "") for name in ("error", "kept_agreement", "seconds", "reference_seconds")
        )
        rows.append(
            (check.status, check.subject, check.dtype, check.case, check.implementation, *cells, check.reason)
        )
    header = ("", "operator", "dtype", "case", "implementation", "error", "same rows", "s", "PyTorch s", "")
    table, figures = markdown_table(header, rows), {"checks": [asdict(check) for check in checks]}
    counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
    if failed := [check for check in checks if check.status == "failed"]:
        worst = failed[0]
        reason = f"first: {worst.implementation}, {worst.case}, {worst.dtype}: {worst.reason}"
        raise StepError(f"{counts}; {reason}", table, figures)
    return counts, table, figures


def compress(checkout: Path | None) -> Result:
    """Benchmark of ``Compress``."""
    import compress_gpu
    import torch

    table, figures = compress_gpu.run(torch.device("cuda"), checkout)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def attention() -> Result:
    """Benchmark of ``KVAttention``."""
    import attention_gpu
    import torch

    table, figures = attention_gpu.run(torch.device("cuda"))
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def plugin() -> Result:
    """The TensorRT plugins' ``enqueue`` on the GPU, without TensorRT."""
    driver = BUILD / "gpu_driver"
    if not driver.is_file():
        raise SkippedError("the plugins were not built: no TensorRT headers (TENSORRT_ROOT)")
    output = run_command([str(driver), str(BUILD / "libstarkv_trt.so")])
    return output.strip().splitlines()[-1], "", {}


def take(name: str, work: Callable[[], Result]) -> Step:
    """Run a step and keep whatever comes of it."""
    print(f"== {name}", file=sys.stderr, flush=True)
    started = time.monotonic()

    def step(status: str, detail: str, table: str = "", figures: dict[str, Any] | None = None) -> Step:
        return Step(name, status, detail, round(time.monotonic() - started, 1), table, figures or {})

    try:
        return step("passed", *work())
    except StepError as end:
        return step(end.status, str(end), end.table, end.figures)
    # One broken step must not cost the results of the others.
    except (Exception, SystemExit) as error:
        return step("failed", f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="checkout of the official STaR-KV repository")
    parser.add_argument("--skip", action="append", default=[], choices=STEPS, help="may be repeated")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    from gpu_measure import describe_gpu, gpu_or_exit

    from starkv.validation.report import markdown_table, write_json, write_text

    gpu = describe_gpu(gpu_or_exit())
    works: dict[str, Callable[[], Result]] = {
        "build": build,
        "tests": tests,
        "sanitizer": sanitizer,
        "validate": validate,
        "compress": lambda: compress(args.official),
        "attention": attention,
        "plugin": plugin,
    }
    steps = [take(name, works[name]) for name in STEPS if name not in args.skip]
    summary = markdown_table(
        ("step", "", "seconds", ""), [(s.name, s.status, f"{s.seconds:,.0f}", s.detail) for s in steps]
    )
    today = datetime.date.today().isoformat()
    stem = f"{re.sub('[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}-{today}"
    write_json(args.out / f"{stem}.json", {"gpu": gpu, "steps": [asdict(step) for step in steps]})
    parts = [f"# {gpu['name']}, {today}", summary]
    parts += [f"## {step.name}\n\n{step.table}" for step in steps if step.table]
    write_text(args.out / f"{stem}.md", "\n\n".join(parts) + "\n")
    print(summary)
    print(f"written to {args.out / stem}.json and .md", file=sys.stderr)
    sys.exit(int(any(step.status == "failed" for step in steps)))


if __name__ == "__main__":
    main()
