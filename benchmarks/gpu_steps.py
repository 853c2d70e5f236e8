# SPDX-License-Identifier: Apache-2.0
"""Steps of a long check: each is reported whatever becomes of it, and written down when it ends."""

import datetime
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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


def write_results(out: Path, gpu: dict[str, Any], steps: list[Step]) -> str:
    """Write the JSON and the Markdown of the steps so far; returns the table of the steps."""
    from starkv.validation.report import markdown_table, write_json, write_text

    summary = markdown_table(
        ("step", "", "seconds", ""),
        [(step.name, step.status, f"{step.seconds:,.0f}", step.detail.replace("|", "/")) for step in steps],
    )
    today = datetime.date.today().isoformat()
    stem = f"{re.sub('[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}-{today}"
    write_json(out / f"{stem}.json", {"gpu": gpu, "steps": [asdict(step) for step in steps]})
    parts = [f"# {gpu['name']}, {today}", summary]
    parts += [f"## {step.name}\n\n{step.table}" for step in steps if step.table]
    write_text(out / f"{stem}.md", "\n\n".join(parts) + "\n")
    print(f"written to {out / stem}.json and .md", file=sys.stderr)
    return summary
