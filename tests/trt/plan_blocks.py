# SPDX-License-Identifier: Apache-2.0
"""Tables of ``starkv doctor --plan`` in the documentation: made anew, and written by running this file.

A block begins with the command as a comment, and ends with ``<!-- end -->``. One whose comment begins with
``fits:`` has the first and the last table's paragraph only.
"""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "deployment.md"
_BLOCK = re.compile(
    r"(?P<head><!-- (?P<short>fits: )?starkv doctor (?P<arguments>.*?) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
Run = Callable[[list[str]], str]
"""Arguments of ``starkv doctor`` → what it prints."""


def renewed(text: str, run: Run) -> str:
    """A document with all of its blocks as the command prints them today."""

    def block(found: re.Match[str]) -> str:
        paragraphs = run(shlex.split(found["arguments"])).strip().split("\n\n")
        if found["short"]:
            paragraphs = [paragraphs[0], paragraphs[-2]]
        return f"{found['head']}\n{chr(10).join(f'{part}{chr(10)}' for part in paragraphs)}\n{found['end']}"

    return _BLOCK.sub(block, text)


def blocks(text: str) -> list[str]:
    """Arguments of each block's command."""
    return [found["arguments"] for found in _BLOCK.finditer(text)]


def _run_command(arguments: list[str]) -> str:
    import subprocess

    command = [sys.executable, "-m", "starkv.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(), _run_command))
