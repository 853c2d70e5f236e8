# SPDX-License-Identifier: Apache-2.0
"""Runs the command inside the test's process, as its entry point would."""

import sys
from dataclasses import dataclass

import pytest

from starkv.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str


class Command:
    """Calls ``starkv``; a traceback of the command is one of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._captured = monkeypatch, captured

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["starkv", *map(str, arguments)])
        self._captured.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
        out, err = self._captured.readouterr()
        return Outcome(code, out, err)
