# SPDX-License-Identifier: Apache-2.0
"""Everything about the kernels that needs a GPU, in one command: ``make gpu-check``.

    python benchmarks/gpu_check.py [--official path/to/STaR-KV] [--skip sanitizer]

Needs Python with PyTorch, Triton and pytest, and nvcc with CMake unless ``STARKV_KERNELS`` names a library;
installs nothing. Steps: build, tests, compute-sanitizer, agreement of all implementations, benchmarks, and
ONNX Runtime's engine where onnxruntime-gpu is installed. A step that fails is reported and the others go on.
Writes ``benchmarks/results/<gpu>-<date>.json`` and ``.md``, and ends with code 1 if any step failed, 77 if
there is no GPU.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_steps import ROOT, Result, SkippedError, Step, StepError, run_command, take, write_results

if TYPE_CHECKING:
    import torch

BUILD = ROOT / "build" / "plugin"
RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = "STARKV_KERNELS"
SANITIZED = (
    "test_cuda_compress.py",
    "test_attention.py",
    "test_quantized_attention.py",
    "test_code_rows.py",
    "test_sampling.py",
)
SANITIZED_CASES = (
    "native_bfloat16 or maxpool_7 or ragged_with_spare_rows or decode or prefill or every_head_dim "
    "or any_number_of_heads or vocabulary or embedding"
)
"""Tests that compute-sanitizer watches: between them they launch every kernel."""
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MEASURES = ("error", "kept_agreement", "seconds", "reference_seconds")
STEPS = (
    *("build", "tests", "sanitizer", "validate", "compress", "attention", "low-rank", "quantized"),
    *("code-rows", "plugin", "engine"),
)


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


def pytest_command(*arguments: str, files: tuple[str, ...] = ("",)) -> list[str]:
    """The kernels' tests alone: the others' conftest.py wants packages that a GPU machine may lack."""
    isolated = ["--confcutdir=tests/kernels", "-p", "no:cacheprovider", "-q", "-rs"]
    paths = [f"tests/kernels/{file}" for file in files]
    return [sys.executable, "-m", "pytest", *paths, *isolated, *arguments]


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
        watched = pytest_command("-k", SANITIZED_CASES, "-x", files=SANITIZED)
        output = run_command([tool, *options, *watched])
        found[check] = [line.strip("= ") for line in output.splitlines() if "ERROR SUMMARY" in line]
    return f"{', '.join(SANITIZERS)}: no errors", "", found


def validate(device: "torch.device") -> Result:
    """``starkv validate ops`` on the GPU."""
    from starkv.validation.ops import validate_ops
    from starkv.validation.report import Report, markdown_table

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    checks = list(validate_ops(device, started=tell))
    report = Report.of("validate ops", checks)
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


def compress(device: "torch.device", checkout: Path | None) -> Result:
    """Benchmark of ``Compress``."""
    import compress_gpu

    table, figures = compress_gpu.run(device, checkout)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def attention(device: "torch.device") -> Result:
    """Benchmark of ``KVAttention``."""
    import attention_gpu

    table, figures = attention_gpu.run(device)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def low_rank(device: "torch.device") -> Result:
    """Decode attention over compressed caches against dense ones."""
    import low_rank_gpu

    table, figures = low_rank_gpu.run(device, with_tuning=True)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def quantized_attention(device: "torch.device") -> Result:
    """Benchmark of ``QuantizedKVAttention`` against ``KVAttention``."""
    import quantized_attention_gpu

    table, figures = quantized_attention_gpu.run(device)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def code_rows(device: "torch.device") -> Result:
    """Benchmark of rows that become codes, and of the reverse."""
    import code_rows_gpu

    table, figures = code_rows_gpu.run(code_rows_gpu.cuda_library(), device)
    return f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s", table, figures


def plugin() -> Result:
    """The TensorRT plugins' ``enqueue`` on the GPU, without TensorRT."""
    driver = BUILD / "gpu_driver"
    if not driver.is_file():
        raise SkippedError("the plugins were not built: no TensorRT headers (TENSORRT_ROOT)")
    output = run_command([str(driver), str(BUILD / "libstarkv_trt.so")])
    return output.strip().splitlines()[-1], "", {}


def engine() -> Result:
    """ONNX Runtime's engine on the GPU: agreement with the processor's, speed, memory."""
    if find_spec("onnx_ir") is None:
        raise SkippedError("onnx_ir is not installed; pip install 'starkv[cuda,export]'")
    try:
        from engine_gpu import run

        from starkv.runtime.engines.ort_cuda_gpu import ready_gpu
    except ImportError as error:
        raise SkippedError(f"{error.name} is not installed; pip install 'starkv[cuda,export]'") from None
    if ready_gpu() is None:
        raise SkippedError(
            "onnxruntime-gpu is not installed, or can't use this GPU: pip install 'starkv[cuda]'"
        )
    table, figures = run()
    return "says what the processor's engine says", table, figures


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

    device = gpu_or_exit()
    gpu = describe_gpu(device)
    works: dict[str, Callable[[], Result]] = {
        "build": build,
        "tests": tests,
        "sanitizer": sanitizer,
        "validate": lambda: validate(device),
        "compress": lambda: compress(device, args.official),
        "attention": lambda: attention(device),
        "low-rank": lambda: low_rank(device),
        "quantized": lambda: quantized_attention(device),
        "code-rows": lambda: code_rows(device),
        "plugin": plugin,
        "engine": engine,
    }
    steps: list[Step] = []
    for name in STEPS:
        if name not in args.skip:
            steps.append(take(name, works[name]))
            # After every step: a machine may be taken away before the last.
            summary = write_results(args.out, gpu, steps)
    print(summary)
    sys.exit(int(any(step.status == "failed" for step in steps)))


if __name__ == "__main__":
    main()
