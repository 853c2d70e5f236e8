# SPDX-License-Identifier: Apache-2.0
"""What a model of real size costs on this machine, from checkpoint to click: disk, memory, time.

    python benchmarks/real_size.py --scratch /big/disk --out real-size.json
    python benchmarks/real_size.py --scratch /big/disk --out real-size.json --model 7b --tokens 32

Each step is the `starkv` command that a user would type, in a process of its own whose memory is watched:
peak resident memory as the kernel counts it (mapped files included, which it may drop at any time), and the
part of it that is anonymous. 7b is UI-TARS-1.5-7B with its true vision tower, 0.5b and 1.5b are Qwen2.5's
text decoders with next to none; weights are random, gui-tiny's are real.

Steps whose figures are in the JSON file already are not repeated; delete them there to measure again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine, load_average
from peers_run import note
from real_size_memory import StepFailedError
from real_size_steps import MODELS, Options, Steps

from starkv.host import usable_processors

_ROWS = (
    ("weights", "checkpoint", "bytes", "GB"),
    ("engine", "build", "bytes", "GB"),
    ("export", "export", "seconds", "s"),
    ("export, peak memory", "export", "peak_resident_mib", "MiB"),
    ("export, of that anonymous", "export", "peak_anonymous_mib", "MiB"),
    ("build", "build", "seconds", "s"),
    ("build, peak memory", "build", "peak_resident_mib", "MiB"),
    ("build, of that anonymous", "build", "peak_anonymous_mib", "MiB"),
    ("load, files verified", "load", "verified_seconds", "s"),
    ("load, --no-verify", "load", "seconds", "s"),
    ("loaded, memory at rest", "load", "rest_mib", "MiB"),
    ("loaded, of that anonymous", "load", "rest_anonymous_mib", "MiB"),
    ("bench, peak memory", "bench", "peak_mib", "MiB"),
)
"""Label, step, field and unit of each row of the table."""


def markdown(models: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the table of all models in the file; rates last, in tokens per second."""
    lines = [f"| | {' | '.join(models)} |", f"| --- |{' ---: |' * len(models)}"]
    for label, step, field, unit in _ROWS:
        cells = [_cell(figures.get(step, {}).get(field), unit) for figures in models.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    rates = {
        name: {test["test"]: test["tokens_per_second"] for test in figures.get("bench", {}).get("tests", [])}
        for name, figures in models.items()
    }
    for test in dict.fromkeys(test for found in rates.values() for test in found):
        cells = [f"{found[test]:.2f}" if test in found else "" for found in rates.values()]
        lines.append(f"| {test}, tokens/s | {' | '.join(cells)} |")
        if test.startswith("vit"):
            tokens = _image_tokens(test)
            cells = [f"{tokens / found[test]:.2f} s" if test in found else "" for found in rates.values()]
            lines.append(f"| {test}, one screenshot | {' | '.join(cells)} |")
    return lines


def _image_tokens(test: str) -> int:
    """Image tokens of a test such as ``vit1932x1092``: one for 28 x 28 pixels."""
    width, _, height = test.removeprefix("vit").partition("x")
    return int(width) * int(height) // 28**2


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "GB":
        return f"{value / 1e9:.2f} GB"
    return f"{value:.1f} {unit}" if unit == "s" else f"{value:,.0f} {unit}"


def measure(steps: Steps, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill ``figures`` with the steps that it lacks; ``save`` is called after each.

    A step whose product is gone is done again if a later one needs it.

    Raises:
        StepFailedError: a command failed.
    """
    missing = [step for step in steps.order() if step not in figures]
    for step in steps.with_products_for(missing):
        note(f"{steps.model}: {step}, load {load_average()[0]}")
        before = load_average()
        figures[step] = {**steps.run(step), "load_average": before}
        save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; all by default")
    parser.add_argument("--scratch", type=Path, required=True, help="where to work (7b: 26 GB)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints, exports and engines there")
    parser.add_argument("--quant", default="int4", help="preset of all models")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="to decode in one test")
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 2048, 13312], help="rows cached before")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args()
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    report = {
        "benchmark": "real_size",
        **describe_machine(),
        "threads": usable_processors(),
        "models": report.get("models", {}),
    }

    def save() -> None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")

    options = Options(args.quant, args.prefill, args.tokens, tuple(args.depths), args.repetitions)
    for model in args.model or MODELS:
        folder = args.scratch / model
        folder.mkdir(parents=True, exist_ok=True)
        steps = Steps(model, folder, options)
        try:
            measure(steps, report["models"].setdefault(model, {}), save)
        except StepFailedError as error:
            note(f"{model}: {error}")
            continue
        if not args.keep:
            steps.clean()
    print("\n".join(markdown(report["models"])))


if __name__ == "__main__":
    main()
