# SPDX-License-Identifier: Apache-2.0
"""The report of every ``starkv validate`` subcommand: one schema, as JSON and as a Markdown table."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from starkv import __version__
from starkv.host import cpu_model, usable_processors

SCHEMA_VERSION = 1
Status = Literal["passed", "failed", "skipped"]
_PACKAGES = ("torch", "transformers", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tensorrt")


@dataclass(frozen=True)
class Check:
    """One implementation against its reference on one case."""

    subject: str
    """What is checked, such as the operator ``Compress``."""
    implementation: str
    """Whose result it is, such as ``CUDA``."""
    case: str
    """On which input, in words."""
    status: Status
    reference: str = "PyTorch"
    dtype: str = ""
    """Element type of the input, such as ``bfloat16``; empty where there is no choice."""
    reason: str = ""
    """Why it failed or was skipped; empty where it passed."""
    measures: dict[str, float] = field(default_factory=dict)
    """What was measured. ``seconds`` is the median time of one run; ``error`` the largest relative error;
    ``kept_agreement`` the smallest share of equal kept rows of any layer and sequence. Subcommands add more.
    """

    def finished(self, failures: Sequence[str], measures: dict[str, float]) -> "Check":
        """This check with its outcome: failed if anything did."""
        status: Status = "failed" if failures else "passed"
        return replace(self, status=status, reason="; ".join(failures[:3]), measures=measures)


@dataclass(frozen=True)
class Report:
    """All checks of one run, and where it ran."""

    command: str
    """Such as ``validate ops``."""
    checks: tuple[Check, ...]
    device: str
    """The GPU's name, or the processor's."""
    date: str
    versions: dict[str, str]
    processor: str
    threads: int
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, command: str, checks: Sequence[Check], device: str | None = None) -> "Report":
        """A report of this machine, today.

        Args:
            command: what was run.
            checks: its results.
            device: what the checks ran on; the processor if None.
        """
        return cls(
            command=command,
            checks=tuple(checks),
            device=device or cpu_model(),
            date=datetime.date.today().isoformat(),
            versions=installed_versions(),
            processor=cpu_model(),
            threads=usable_processors(),
        )

    def count(self, status: Status) -> int:
        """Checks of that status."""
        return sum(check.status == status for check in self.checks)

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was checked at all."""
        return self.count("failed") == 0 and self.count("passed") > 0

    def to_json(self) -> str:
        """The report as JSON; ``passed`` and the counts are written out for scripts."""
        counts = {status: self.count(status) for status in get_args(Status)}
        return json.dumps({**asdict(self), "counts": counts, "all_passed": self.passed}, indent=2)

    def write(self, path: Path) -> None:
        """Write the JSON to a file."""
        write_text(path, self.to_json() + "\n")


def installed_versions() -> dict[str, str]:
    """Versions of starkv, Python and the packages that results depend on, if they are installed."""
    found = {"starkv": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures with today's date and the versions that they depend on."""
    stamped = {"date": datetime.date.today().isoformat(), "versions": installed_versions(), **figures}
    write_text(path, json.dumps(stamped, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
