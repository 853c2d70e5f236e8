# SPDX-License-Identifier: Apache-2.0
"""Asks each sample under several KV policies; what does not depend on the policy is computed once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import cast

from starkv.errors import StarkvError
from starkv.evaluation.records import Record
from starkv.evaluation.runner import Asking, ask_one
from starkv.evaluation.samples import Problem, Sample
from starkv.evaluation.shared_prefill import SharedPrefill
from starkv.manifest import PromptDialect
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.session import Session


def sweep(
    samples: Sequence[Sample],
    agent: Agent,
    policies: Mapping[str, KvPolicy],
    parameters: SamplingParameters,
    dialect: PromptDialect,
    on_problem: Callable[[Problem], None],
    on_answer: Callable[[str], None],
) -> dict[str, list[Record]]:
    """Ask samples under each policy: one prefill per sample, one session per policy and group.

    Only the first policy's records have the true times of the vision tower and the prefill.

    Args:
        samples: those of a group follow each other.
        agent: who answers.
        policies: by name; the first one is asked first.
        parameters: sampling and stopping.
        dialect: words of the prompt.
        on_problem: gets what could not be asked; of a trajectory the later steps are lost as well.
        on_answer: told a sample's name when all policies have answered it.

    Returns:
        for each policy the records of the samples that all policies answered, in the samples' order.
    """
    shared = SharedPrefill(agent.engine)
    asked = Agent(cast(Engine, shared), agent.tokenizer)
    found: dict[str, list[Record]] = {name: [] for name in policies}
    askings = {name: Asking(asked, policy, parameters, dialect) for name, policy in policies.items()}
    for _, group in groupby(samples, key=lambda sample: sample.group):
        steps = list(group)
        sessions = {name: Session(asked.engine, asked.tokenizer, policy) for name, policy in policies.items()}
        for number, sample in enumerate(steps):
            # Earlier screenshots are encoded again with each step, as by anyone who asks: times must be true.
            shared.forget_images()
            try:
                answers = {name: ask_one(sample, asking, sessions[name]) for name, asking in askings.items()}
            except StarkvError as error:
                on_problem(Problem(sample.source, sample.id, str(error), len(steps) - number))
                break
            for name, record in answers.items():
                found[name].append(record)
            on_answer(sample.id)
    return found
