# SPDX-License-Identifier: Apache-2.0
"""How ``peers.py`` talks to the systems that it measures: each is a process that answers lines of JSON.

Standard library only, because both sides of it run in different environments.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol, TextIO

WORKER = Path(__file__).with_name("peers_worker.py")


class System(Protocol):
    """What a system must be able to do to be compared."""

    def describe(self) -> dict[str, Any]:
        """Versions, settings and seconds of loading."""
        ...

    def decode(self, rows: int, position: int, tokens: int) -> float:
        """Seconds that ``tokens`` greedy decode steps take behind ``rows`` cached rows.

        The first new token stands at ``position``, which is larger than ``rows`` after compaction.
        """
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds from ``tokens`` token ids to the logits of the last one, with an empty cache."""
        ...

    def logits(self, tokens: list[int], path: str) -> None:
        """Write the logits [vocab] of the last of ``tokens`` as float32 into the file ``path``."""
        ...


class SystemFailedError(Exception):
    """A system's process answered with an error, or died."""


class Worker:
    """A system in a process of its own."""

    def __init__(self, name: str, python: Path, model: Path, threads: int, max_rows: int, log: Path) -> None:
        """Start the process and wait until the model is loaded.

        Args:
            name: key of ``peers_worker.SYSTEMS``.
            python: interpreter of the environment that has the system.
            model: the model in the system's own format.
            threads: how many it may use.
            max_rows: most KV rows it will be asked for.
            log: file that its messages go to.

        Raises:
            SystemFailedError: the model can't be loaded.
        """
        self.name, self._log = name, log
        command = [str(python), str(WORKER), name, str(model), str(threads), str(max_rows)]
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )
        self.description = self.ask("describe")

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the system.

        Raises:
            SystemFailedError: it raised an error or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise SystemFailedError(f"{self.name} ended with status {status} in {method}; see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemFailedError(f"{self.name}: {answer['error']}; see {self._log}")
        return answer["result"]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory_mib(self) -> dict[str, float]:
        """Resident memory now, in MiB, by the kernel's own names."""
        return resident_memory(self._process.pid)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def resident_memory(pid: int) -> dict[str, float]:
    """``VmRSS``, ``VmHWM``, ``RssAnon`` and ``RssFile`` of a process in MiB; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    wanted = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) / 1024 for name in wanted if name in fields}


def private_stdout() -> TextIO:
    """A stream to the real standard output, which from now on goes to standard error.

    Libraries print what they like.
    """
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def serve(system: System, answers: TextIO) -> None:
    """Answer questions from standard input until it ends."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            result = getattr(system, question["method"])(**question["arguments"])
            answer = {"result": result}
        except Exception as error:  # whatever it is, the other side must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
