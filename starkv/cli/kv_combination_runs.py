# SPDX-License-Identifier: Apache-2.0
"""Asks engines questions under every combination of ``validate clicks``, freely and with a forced reply."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
from numpy.typing import NDArray

from starkv.cli.console import progress
from starkv.cli.forced_replies import RecordingEngine
from starkv.cli.kv_combinations import Combination, Plan
from starkv.cli.packing import pack_variants
from starkv.errors import StarkvError
from starkv.evaluation.plan import default_dialect
from starkv.evaluation.prompts import question_of
from starkv.evaluation.records import Record
from starkv.evaluation.runner import Asking, ask_one
from starkv.evaluation.samples import Problem, Sample
from starkv.evaluation.shared_prefill import SharedPrefill
from starkv.evaluation.suites.synthetic import SYNTHETIC, Task
from starkv.manifest import PromptDialect
from starkv.methods.names import FULL
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine, Floats
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.session import Session
from starkv.validation.quant import kl_divergence


@dataclass(frozen=True)
class KvAnswer:
    """What one combination did with one question."""

    record: Record
    divergences: NDArray[np.float64]
    """``[tokens - 1]`` nats from the full cache's distributions, its reply forced. The first token comes from
    the exact prefill."""


class CombinationAsker:
    """Asks one engine under several policies, one prefill per question.

    Args:
        agent: the engine and its tokenizer.
        parameters: sampling and stopping.
        dialect: words of the prompt.
        said: tokens of the full cache's reply to each sample that was asked so far, by its name; grows.
    """

    def __init__(
        self,
        agent: Agent,
        parameters: SamplingParameters,
        dialect: PromptDialect,
        said: dict[str, list[int]],
    ) -> None:
        self._prefills = SharedPrefill(agent.engine)
        self._shared = cast(Engine, self._prefills)
        self._tokenizer, self._parameters = agent.tokenizer, parameters
        self._dialect, self._said = dialect, said

    def ask(
        self,
        samples: Sequence[Sample],
        policies: Mapping[str, KvPolicy],
        on_problem: Callable[[Problem], None],
        on_answer: Callable[[str], None],
    ) -> dict[str, list[KvAnswer]]:
        """Ask samples under each policy, one session per policy and group.

        Args:
            samples: those of a group follow each other.
            policies: by the combinations' names.
            on_problem: gets what could not be asked; of a trajectory the later steps are lost as well.
            on_answer: told a sample's name when all policies have answered it.

        Returns:
            for each policy its answers, in the samples' order.
        """
        found: dict[str, list[KvAnswer]] = {name: [] for name in policies}
        # Without the full cache's reply there is nothing to compare with.
        comparable = [sample for sample in samples if FULL in policies or sample.id in self._said]
        for _, group in groupby(comparable, key=lambda sample: sample.group):
            steps = list(group)
            sessions = {
                name: Session(self._shared, self._tokenizer, policy) for name, policy in policies.items()
            }
            for number, sample in enumerate(steps):
                self._prefills.forget_images()
                try:
                    answers = self._ask_one(sample, sessions)
                except StarkvError as error:
                    on_problem(Problem(sample.source, sample.id, str(error), len(steps) - number))
                    break
                for name, answer in answers.items():
                    found[name].append(answer)
                on_answer(sample.id)
        return found

    def _ask_one(self, sample: Sample, sessions: Mapping[str, Session]) -> dict[str, KvAnswer]:
        records, logits = {}, {}
        # The full cache's reply is what the others' distributions are compared on.
        for name in sorted(sessions, key=lambda name: name != FULL):
            session = sessions[name]
            before, recording = session.kv_memory, RecordingEngine(self._shared)
            session.engine = cast(Engine, recording)
            asking = Asking(
                Agent(session.engine, self._tokenizer), session.kv_policy, self._parameters, self._dialect
            )
            records[name] = ask_one(sample, asking, session)
            free = np.stack(recording.logits)
            tokens = [int(token) for token in free.argmax(-1)]
            said = self._said.setdefault(sample.id, tokens)
            # Who says the same has been forced already.
            if tokens != said:
                again = Session(self._shared, self._tokenizer, session.kv_policy, kv_memory=before)
                free = self._forced(sample, again, said)
            logits[name] = free
        said = self._said[sample.id]
        whole = logits.get(FULL)
        if whole is None:
            whole = self._forced(sample, Session(self._shared, self._tokenizer, KvPolicy(packed=False)), said)
        return {
            name: KvAnswer(records[name], kl_divergence(whole[1:], logits[name][1:])) for name in sessions
        }

    def _forced(self, sample: Sample, session: Session, said: Sequence[int]) -> Floats:
        """Logits ``[tokens, vocab]`` of a session that is made to say given tokens."""
        recording = RecordingEngine(self._shared, said)
        session.engine = cast(Engine, recording)
        question = question_of(sample, self._dialect, self._shared.manifest)
        limit = SamplingParameters(max_new_tokens=len(said))
        for _ in session.reply(question.messages, question.images, limit):
            pass
        return np.stack(recording.logits)


@dataclass(frozen=True)
class CombinationRuns:
    """All that is asked, of one engine in memory at a time."""

    questions: Mapping[Task, Sequence[Sample]]
    plan: Plan
    max_new_tokens: int
    threads: int | None

    def ask(self, directory: Path, scratch: Path) -> dict[Task, dict[str, list[KvAnswer]]]:
        """Ask an engine, and what is packed of it in a temporary folder.

        Args:
            directory: the engine.
            scratch: where the temporary folder is made; files are shared with the engine where they can be.

        Raises:
            StarkvError: it can't be packed or opened.
        """
        said: dict[str, list[int]] = {}
        found: dict[Task, dict[str, list[KvAnswer]]] = {task: {} for task in self.questions}
        if not self.plan.packings:
            self._ask_engine(directory, self.plan.combinations, said, found)
            return found
        # The plain engine first: its whole cache is what all are compared with.
        self._ask_engine(directory, self.plan.asked_of(None), said, found)
        with TemporaryDirectory(prefix=".packed.", dir=scratch) as home:
            with progress() as stages:
                packed = pack_variants(directory, self.plan.packings, Path(home), stages)
            for options, place in packed.items():
                self._ask_engine(place, self.plan.asked_of(options), said, found)
        return found

    def _ask_engine(
        self,
        directory: Path,
        combinations: Mapping[str, Combination],
        said: dict[str, list[int]],
        found: dict[Task, dict[str, list[KvAnswer]]],
    ) -> None:
        agent = Agent.load(directory, False, self.threads)
        dialect = default_dialect(SYNTHETIC, agent.engine.manifest)
        asker = CombinationAsker(agent, SamplingParameters(self.max_new_tokens), dialect, said)
        policies = {name: one.policy for name, one in combinations.items()}
        with progress() as stages:
            for task, samples in self.questions.items():
                stages.start(f"{', '.join(combinations)}: {task}", len(samples))
                # The run without packing has told what can't be asked.
                answers = asker.ask(samples, policies, lambda problem: None, stages.advance)
                found[task] |= answers
