# SPDX-License-Identifier: Apache-2.0
"""Everything about TensorRT that this machine can prove, in one command: ``make trt-check``.

    python benchmarks/trt_check.py [--skip sanitizers] [--only names --only types]

Without a GPU: names and types against the real bindings, lowered graphs against the parser's rules, plugins
against four versions' headers and three real registries, gui-tiny's tokens from the strict fakes. With one:
the plugins on it. With TensorRT: engines of gui-tiny, built, compared and measured. Headers and wheels are
fetched into ``build/``. A step that fails, or can't run here, is reported and the others go on. Writes
``benchmarks/results/<date>-trt-check-<device>.json`` and ``.md``, and ends with code 1 if any step failed, 77
if none could run.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gpu_steps import ROOT, Result, Step, take
from machine import describe_machine


def steps() -> dict[str, Callable[[], Result]]:
    """All steps in their order."""
    import trt_check_gpu as gpu
    import trt_check_host as host
    from trt_check_fetch import headers

    works: dict[str, Callable[[], Result]] = {
        "headers": headers,
        "names": host.names,
        "types": host.types,
        "rules and fakes": host.rules,
        "plugins": host.plugins,
        "sanitizers": host.sanitizers,
        "registries": host.registries,
        "tokens with plugins": host.sequence_on_processor,
        "plugins on GPU": gpu.plugins_for_gpu,
        "tokens with plugins on GPU": gpu.sequence_on_gpu,
    }
    for name in gpu.ENGINES:
        works[f"build {name}"] = partial(gpu.build, name)
        works[f"validate {name}"] = partial(gpu.validate, name)
    works["bench"] = partial(gpu.bench, next(iter(gpu.ENGINES)))
    return works


def describe() -> dict[str, Any]:
    """This machine, its GPU and TensorRT."""
    from starkv.errors import EngineError
    from starkv.gpu import find_gpu
    from starkv.trt_compat.module import load_tensorrt

    card = find_gpu()
    try:
        tensorrt = load_tensorrt().full_version
    except EngineError as error:
        tensorrt = str(error)
    return {**describe_machine(), "gpu": asdict(card) if card else None, "tensorrt": tensorrt}


def write(folder: Path, machine: dict[str, Any], taken: list[Step]) -> str:
    """Write the JSON and the Markdown of the steps so far; returns their table."""
    from starkv.validation.report import markdown_table, write_json, write_text

    rows = [(step.name, step.status, f"{step.seconds:,.0f}", step.detail.replace("|", "/")) for step in taken]
    table = markdown_table(("step", "", "seconds", ""), rows)
    device = machine["gpu"]["name"] if machine["gpu"] else "no GPU"
    stem = f"{datetime.date.today().isoformat()}-trt-check-{re.sub('[^a-z0-9]+', '-', device.lower())}"
    write_json(folder / f"{stem}.json", {"machine": machine, "steps": [asdict(step) for step in taken]})
    parts = [f"# TensorRT, {device}, {datetime.date.today().isoformat()}", table]
    parts += [f"## {step.name}\n\n{step.table}" for step in taken if step.table]
    write_text(folder / f"{stem}.md", "\n\n".join(parts) + "\n")
    print(f"written to {folder / stem}.json and .md", file=sys.stderr)
    return table


def exit_code(taken: list[Step]) -> int:
    """1 if a step failed, 77 if none of them ran, else 0."""
    statuses = {step.status for step in taken}
    if "failed" in statuses:
        return 1
    return 0 if "passed" in statuses else 77


def main() -> None:
    sys.path.insert(0, str(ROOT))
    works = steps()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(works)
    parser.add_argument("--skip", action="append", default=[], choices=names, help="may be repeated")
    parser.add_argument("--only", action="append", choices=names, help="may be repeated")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results"
    )
    args = parser.parse_args()
    machine, taken, table = describe(), [], ""
    for name, work in works.items():
        if name not in args.skip and name in (args.only or names):
            taken.append(take(name, work))
            # After every step: a machine may be taken away before the last.
            table = write(args.out, machine, taken)
    print(table)
    sys.exit(exit_code(taken))


if __name__ == "__main__":
    main()
