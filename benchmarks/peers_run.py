# SPDX-License-Identifier: Apache-2.0
"""One size of ``peers.py``: start the systems, measure them in turn, keep the seconds."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import OthersShare, load_average
from peers_models import STARKV
from peers_protocol import SystemFailedError, Worker
from peers_report import Test
from peers_shapes import SIZES

_PAUSE_SECONDS = 0.3
"""Between two systems, so that the last one's threads have gone to sleep."""
DISTURBED = 0.05
"""A measurement is repeated while other processes use more than this share of the processors; the least
disturbed one counts."""
_TRIES = 3
_TEXT_TOKENS = 96
"""Length of the text whose logits are compared."""


class Run:
    """Measures the systems that ``models`` names, in that order.

    A system that fails is left out from then on, with what it has measured so far.
    """

    def __init__(
        self, size: str, models: dict[str, Path], peers_python: Path, threads: int, max_rows: int, rounds: int
    ) -> None:
        self._size, self._models, self._peers_python = size, models, peers_python
        self._threads, self._max_rows, self._rounds = threads, max_rows, rounds
        self.descriptions: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        """Test → system → seconds of each round."""
        self.most_rows: dict[str, int] = {}
        """System → most cached rows that it is measured behind."""
        self.others: dict[str, dict[str, list[float]]] = {}
        """Share of the processors that other processes used meanwhile."""
        self.agreement: dict[str, float] = {}
        """Correlations of the systems' logits for one random text."""

    def together(self, tests: Sequence[Test]) -> None:
        """All systems loaded, one active at a time. Round 0 warms up."""
        with ExitStack() as stack:
            opened = [stack.enter_context(self._worker(system)) for system in self._models]
            workers = [worker for worker in opened if worker]
            self._compare_logits(workers)
            for number in range(self._rounds + 1):
                note(f"{self._size}: round {number} of {self._rounds}, load {load_average()[0]}")
                for test in tests:
                    for worker in workers:
                        self._measure(worker, test, counted=number > 0)

    def apart(self, tests: Sequence[Test]) -> None:
        """One system loaded at a time, anew in every round, where each test is first run once to warm up."""
        for number in range(1, self._rounds + 1):
            for system in self._models:
                note(f"{self._size}: round {number} of {self._rounds}, {system}, load {load_average()[0]}")
                with self._worker(system) as worker:
                    for test in tests if worker else ():
                        self._measure(worker, test, counted=False)
                        self._measure(worker, test, counted=True)

    @contextmanager
    def _worker(self, system: str) -> Iterator[Worker | None]:
        if system in self.failures:
            yield None
            return
        python = Path(sys.executable) if system == STARKV else self._peers_python
        log = self._models[system].parent / f"{system.replace(' ', '-')}.log"
        try:
            worker = Worker(system, python, self._models[system], self._threads, self._max_rows, log)
        except SystemFailedError as error:
            self._fail(system, error)
            yield None
            return
        self.descriptions.setdefault(system, worker.description)
        try:
            yield worker
        finally:
            self.descriptions[system]["memory_mib"] = worker.memory_mib
            worker.close()

    def _measure(self, worker: Worker, test: Test, counted: bool) -> None:
        if worker.name in self.failures or (test.kept != test.rows and worker.name != STARKV):
            return  # nobody else compacts: their measurements with the full cache serve
        if test.rows > self.most_rows.get(worker.name, test.rows):
            return
        tries = []
        try:
            for _ in range(_TRIES if counted else 1):
                others = OthersShare(worker.pid)
                if test.is_prefill:
                    seconds = worker.ask("prefill", tokens=test.tokens)
                else:
                    seconds = worker.ask("decode", rows=test.kept, position=test.rows, tokens=test.tokens)
                tries.append((others(), seconds))
                time.sleep(_PAUSE_SECONDS)
                if tries[-1][0] < DISTURBED:
                    break
        except SystemFailedError as error:
            self._fail(worker.name, error)
            return
        if counted:
            share, seconds = min(tries)
            self.samples.setdefault(test.name, {}).setdefault(worker.name, []).append(seconds)
            self.others.setdefault(test.name, {}).setdefault(worker.name, []).append(round(share, 3))

    def _compare_logits(self, workers: Sequence[Worker]) -> None:
        """Fill ``agreement``.

        Its last entry is of starkv with all tokens at one position: were it no lower than the others,
        positions would not matter in this model, and the others would say nothing of them.
        """
        tokens = np.random.default_rng(1).integers(0, SIZES[self._size].vocab, _TEXT_TOKENS).tolist()
        logits = {worker.name: self._logits(worker, tokens=tokens) for worker in workers}
        names = list(logits)
        for index, first in enumerate(names):
            for second in names[index + 1 :]:
                self.agreement[f"{first} and {second}"] = _correlation(logits[first], logits[second])
        if len(names) > 1 and names[0] == STARKV:
            wrong = self._logits(workers[0], tokens=tokens, stretch=0.0)
            self.agreement[f"{STARKV} without positions and {names[1]}"] = _correlation(
                wrong, logits[names[1]]
            )

    def _logits(self, worker: Worker, **arguments: Any) -> np.ndarray:
        path = self._models[worker.name].parent / "logits.f32"
        worker.ask("logits", path=str(path.absolute()), **arguments)
        logits = np.fromfile(path, np.float32)
        path.unlink()
        return logits

    def _fail(self, system: str, error: SystemFailedError) -> None:
        note(f"left out: {error}")
        self.failures[system] = str(error)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def note(text: str) -> None:
    """Tell the user how far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)
