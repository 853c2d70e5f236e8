# SPDX-License-Identifier: Apache-2.0
"""How far TensorRT is with a build, and the wish to stop it.

TensorRT reports nested phases with steps, from threads of its own, and asks after each step whether to go on.
A build takes minutes to hours without a line of Python in between, so it runs in a thread: the main one waits
and hears Ctrl-C.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starkv.trt_compat.module import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

Report = Callable[[str], None]
"""Told the name of the phase at work each time that another percent of the build is done."""
PERCENT = 100

_Result = TypeVar("_Result")


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildMonitor:
    """Makes one percentage of TensorRT's nested phases; may be called by any thread.

    Args:
        report: called 100 times in all, the last ones by :meth:`finish`.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._reported = 0
        self._stop = threading.Event()

    def stop(self) -> None:
        """Have the build end after the step at work."""
        self._stop.set()

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))

    def step_complete(self, name: str) -> bool:
        """Whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done += 1
            self._advance(name, int(PERCENT * self._done()))
        return not self._stop.is_set()

    def phase_finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def finish(self, last: str) -> None:
        """The build is done; ``last`` is what it made."""
        with self._lock:
            self._advance(last, PERCENT)

    def _advance(self, name: str, percent: int) -> None:
        while self._reported < percent:
            self._reported += 1
            self._report(name)

    def _done(self) -> float:
        """Share of the build that is done, less than 1: that of the outermost phases that is furthest."""
        roots = (name for name, phase in self._phases.items() if phase.parent not in self._phases)
        return min(max((self._share(name) for name in roots), default=0.0), 0.99)

    def _share(self, name: str) -> float:
        """Steps of a phase that are done, and the share of the one at work that its own phases have done."""
        phase = self._phases[name]
        within = (self._share(inner) for inner, other in self._phases.items() if other.parent == name)
        return min(1.0, (phase.done + min(max(within, default=0.0), 0.99)) / phase.steps)


def make_monitor(tensorrt: TensorRT, monitor: BuildMonitor) -> "trt.IProgressMonitor":
    """TensorRT's form of the monitor; it must outlive the builder's config."""
    module = tensorrt.module

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return monitor.step_complete(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            monitor.phase_finish(phase_name)

    return Monitor()


def run_stoppable(work: Callable[[], _Result], stop: Callable[[], None]) -> _Result:
    """Run ``work`` in a thread and wait; Ctrl-C calls ``stop`` and is raised when the thread has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C, even if the work was done by then.
        Exception: what ``work`` raises.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []
    # Whoever takes the claim first decides whether the work begins.
    claim, ended = threading.Lock(), threading.Event()

    def run() -> None:
        if not claim.acquire(blocking=False):
            return
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    interrupted = False
    try:
        threading.Thread(target=run, name="starkv-build").start()
        ended.wait()
    except KeyboardInterrupt:
        if claim.acquire(blocking=False):
            raise
        interrupted = True
        stop()
    # Not join(): where Ctrl-C ends it, Python before 3.13 takes the thread for ended.
    while not ended.is_set():
        with suppress(KeyboardInterrupt):
            ended.wait()
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        raise failures[0]
    return results[0]
