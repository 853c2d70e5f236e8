# SPDX-License-Identifier: Apache-2.0
"""Tests as steps of a check: what passed, what was skipped and why."""

import sys
import tempfile
import xml.etree.ElementTree as Xml
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_steps import Result, SkippedError, StepError, run_command


@dataclass
class Outcome:
    """Of one run of pytest without failures."""

    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason → how many."""

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.passed + other.passed, self.skipped + other.skipped)

    def result(self) -> Result:
        """The step's result.

        Raises:
            SkippedError: no test ran.
        """
        reasons = "; ".join(f"{count} skipped: {reason}" for reason, count in self.skipped.items())
        if not self.passed:
            raise SkippedError(reasons or "no tests")
        detail = f"{self.passed} passed" + (f"; {reasons}" if reasons else "")
        return detail, "", {"passed": self.passed, "skipped": dict(self.skipped)}


def run_tests(paths: Sequence[str], only: str = "", environment: Mapping[str, str] | None = None) -> Outcome:
    """Run tests in a process of their own.

    Args:
        paths: files below the repository's root.
        only: pytest's expression for names.
        environment: additional variables.

    Raises:
        StepError: one failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if only:
            options += ["-k", only]
        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        try:
            run_command(["env", *settings, sys.executable, "-m", "pytest", *paths, *options])
        except StepError as end:
            raise StepError(_failures(report) or str(end)) from None
        return _read(report)


def _failures(report: Path) -> str:
    """How many tests failed, and the first; empty where pytest itself did."""
    if not report.is_file():
        return ""
    cases = list(Xml.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    if not failed:
        return ""
    return f"{len(failed)} of {len(cases)} tests failed, first {failed[0].get('name')}; see the output above"


def _read(report: Path) -> Outcome:
    outcome = Outcome()
    for case in Xml.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None:
            outcome.passed += 1
        else:
            outcome.skipped[skipped.get("message", "")] += 1
    return outcome
