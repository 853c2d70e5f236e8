# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind in a folder, complete after every step: lines of JSON, screenshots, and a page.

Each file is written beside its place and renamed there, so that whoever ends the run at whatever moment finds
whole files up to the last step.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from starkv.errors import UsageError
from starkv.runtime.agents.steps import Outcome, Step
from starkv.runtime.agents.trace_page import StepView, html_page, view_of
from starkv.runtime.drawing import save_png

TRACE_FILE, PAGE_FILE = "trace.jsonl", "index.html"


class Trace:
    """Writes the trace of one run.

    Args:
        folder: where to; made if it is not there.
        header: what the run was started with, as JSON values.

    Raises:
        UsageError: the folder can't be made, or there is something in it.
    """

    def __init__(self, folder: Path, header: Mapping[str, object]) -> None:
        self._folder, self._header = folder, header
        check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"can't make the folder {folder}: {error.strerror or error}") from None
        self._lines = [_line("run", header)]
        self._views: list[StepView] = []
        self._write(None)

    def add(self, step: Step, screenshot: Image.Image | None) -> None:
        """Write a step down; without a screenshot where the run was ended before there was one.

        Raises:
            UsageError: the files can't be written.
        """
        name = f"step-{step.number:03}.png" if screenshot else None
        if screenshot and name:
            save_png(screenshot, self._folder / name)
        self._lines.append(_line("step", {"screenshot": name, **step.to_json()}))
        self._views.append(view_of(step, screenshot))
        self._write(None)

    def finish(self, outcome: Outcome) -> None:
        """Write down how the run ended.

        Raises:
            UsageError: the files can't be written.
        """
        self._lines.append(_line("outcome", outcome.to_json()))
        self._write(outcome)

    def _write(self, outcome: Outcome | None) -> None:
        _replace_text(self._folder / TRACE_FILE, "".join(self._lines))
        _replace_text(self._folder / PAGE_FILE, html_page(self._header, self._views, outcome))


def check_folder(folder: Path) -> None:
    """Refuse a place for a trace before the work for it is done.

    Raises:
        UsageError: there is something in it, or it is a file.
    """
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UsageError(f"can't look into {folder}: {error.strerror or error}") from None
    if taken:
        raise UsageError(f"{folder} is no empty folder; choose another --out for the trace")


def _line(kind: str, values: Mapping[str, object]) -> str:
    return json.dumps({"type": kind, **values}) + "\n"


def _replace_text(path: Path, text: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as beside:
            try:
                beside.write(text.encode("utf-8", "replace"))
                os.chmod(beside.name, 0o644)
                beside.flush()
                os.replace(beside.name, path)
            except BaseException:
                os.unlink(beside.name)
                raise
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror or error}") from None
