# SPDX-License-Identifier: Apache-2.0
"""Asks engines the questions of ``starkv validate clicks``, one engine in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starkv.cli.click_checks import Cell, TaskRun
from starkv.cli.click_engines import Missing, Rival
from starkv.cli.console import progress
from starkv.errors import StarkvError
from starkv.evaluation.plan import default_dialect
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Problem, Sample
from starkv.evaluation.suites.synthetic import SYNTHETIC, Task
from starkv.evaluation.sweep import sweep
from starkv.methods.names import FULL
from starkv.runtime.agent import Agent
from starkv.runtime.benchmark import peak_of
from starkv.runtime.engines.base import check_kv_method
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy

Answers = dict[Task, dict[str, list[Record]]]


@dataclass(frozen=True)
class Tested:
    """What the engine answered to each task, by the cell's name."""

    answers: Answers
    device: str
    peak_mib: float


@dataclass
class ClickRuns:
    """The questions, and who was asked them so far."""

    questions: Mapping[Task, Sequence[Sample]]
    cells: Mapping[str, Cell]
    max_new_tokens: int
    tell: Callable[[Problem], None]
    problems: list[Problem] = field(default_factory=list)
    """What the engine could not be asked."""

    def tested(self, directory: Path, threads: int | None, device: str) -> Tested:
        """Ask the engine under every policy.

        Raises:
            StarkvError: it can't be opened, or has no such KV method.
        """
        agent = Agent.load(directory, True, threads, device)
        policies = {name: cell.policy for name, cell in self.cells.items()}
        for policy in policies.values():
            check_kv_method(agent.engine.info, policy.method)
        answers = self._ask(agent, policies, "engine", self._lost)
        return Tested(answers, agent.engine.info.device, peak_of(agent.engine))

    def with_rivals(self, tested: Tested, rivals: Sequence[Rival | Missing]) -> list[TaskRun]:
        """Ask the rivals with the whole cache; one that can't be opened is missing.

        Args:
            tested: the engine's answers.
            rivals: PyTorch and the engine in float32.
        """
        others = {rival.name: self._answers_of(rival) for rival in rivals}
        return [
            TaskRun(
                task,
                tested.answers[task],
                {
                    name: other if isinstance(other, Missing) else other[task][FULL]
                    for name, other in others.items()
                },
                tested.peak_mib,
            )
            for task in self.questions
        ]

    def _answers_of(self, rival: Rival | Missing) -> Answers | Missing:
        if isinstance(rival, Missing):
            return rival
        try:
            agent = rival.open()
        except StarkvError as error:
            return Missing(rival.name, str(error))
        # The engine under test has told what can't be asked.
        return self._ask(agent, {FULL: KvPolicy()}, rival.name, lambda problem: None)

    def _lost(self, problem: Problem) -> None:
        self.problems.append(problem)
        self.tell(problem)

    def _ask(
        self,
        agent: Agent,
        policies: Mapping[str, KvPolicy],
        name: str,
        on_problem: Callable[[Problem], None],
    ) -> Answers:
        parameters = SamplingParameters(self.max_new_tokens)
        dialect = default_dialect(SYNTHETIC, agent.engine.manifest)
        found: Answers = {}
        with progress() as stages:
            for task, samples in self.questions.items():
                stages.start(f"{name}: {task}", len(samples))
                found[task] = sweep(samples, agent, policies, parameters, dialect, on_problem, stages.advance)
        return found
