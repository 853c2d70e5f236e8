# SPDX-License-Identifier: Apache-2.0
"""Asks a model the samples of a data set, one after the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from starkv.errors import StarkvError
from starkv.evaluation.answers import answer_of
from starkv.evaluation.prompts import question_of
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Problem, Sample
from starkv.manifest import PromptDialect
from starkv.runtime.agent import Agent, understand
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.session import Session


@dataclass(frozen=True)
class Asking:
    """How samples are asked."""

    agent: Agent
    policy: KvPolicy
    parameters: SamplingParameters
    dialect: PromptDialect


def finished_ids(samples: Sequence[Sample], answered: Iterable[str]) -> set[str]:
    """Answers that need not be asked again: those of trajectories that were finished.

    What compression remembers of a trajectory is not kept, so one that was interrupted starts over.

    Args:
        samples: that are to be asked.
        answered: that were asked before; those that are not asked now stay.
    """
    known = set(answered)
    unfinished = {sample.group for sample in samples if sample.id not in known}
    return known - {sample.id for sample in samples if sample.group in unfinished}


def ask(samples: Sequence[Sample], asking: Asking, on_problem: Callable[[Problem], None]) -> Iterator[Record]:
    """Ask samples; greedy decoding makes the records repeatable.

    Args:
        samples: those of a group follow each other.
        asking: the model and how to ask it.
        on_problem: gets what could not be asked; of a trajectory the later steps are lost as well.

    Yields:
        The records as they come.
    """
    for _, group in groupby(samples, key=lambda sample: sample.group):
        steps = list(group)
        # One session per trajectory: STaR-KV remembers its steps.
        session = Session(asking.agent.engine, asking.agent.tokenizer, asking.policy)
        for number, sample in enumerate(steps):
            try:
                record = ask_one(sample, asking, session)
            except StarkvError as error:
                on_problem(Problem(sample.source, sample.id, str(error), len(steps) - number))
                break
            yield record


def ask_one(sample: Sample, asking: Asking, session: Session) -> Record:
    """Ask one sample.

    Args:
        sample: the question.
        asking: the model and how to ask it.
        session: of the sample's group.

    Raises:
        StarkvError: it can't be asked.
    """
    manifest = asking.agent.engine.manifest
    question = question_of(sample, asking.dialect, manifest)
    text = "".join(session.reply(question.messages, question.images, asking.parameters))
    reply = understand(text, session, asking.dialect)
    answer = answer_of(reply, manifest.coordinates)
    place = answer.first.place if answer.first else None
    point = answer.pixels(place) if place else None
    return Record(
        id=sample.id,
        group=sample.group,
        facets=dict(sample.facets),
        reply=text,
        action=dict(reply.action_json[0]) if reply.action_json else None,
        point=point,
        error=reply.error.reason if reply.error else None,
        grades=dict(sample.grade(answer)),
        distance=sample.target.distance(*point) if sample.target and point else None,
        kv_tokens_full=reply.timings.kv_tokens_full,
        kv_tokens_kept=reply.timings.kv_tokens_kept,
        timings={name: round(value, 3) for name, value in asdict(reply.timings).items()},
    )
