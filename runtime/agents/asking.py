# SPDX-License-Identifier: Apache-2.0
"""How the loop asks a model: the only place that knows of engines and sessions."""

from collections.abc import Callable, Sequence

from PIL import Image

from starkv.manifest import PromptDialect
from starkv.runtime.agent import Agent, AgentReply, understand
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Session

Ask = Callable[[Sequence[Message], Sequence[Image.Image], SamplingParameters], AgentReply]
"""The conversation, its images in order, and how to sample → what the model wants done on the last image."""


class SessionAsk:
    """Asks one session all along, so that what STaR-KV remembers of the trajectory goes on from step to step.

    Args:
        agent: the engine with its tokenizer.
        kv_policy: which rows of a prompt's KV cache are kept.
        dialect: words of the prompt, which say how replies are read.
    """

    def __init__(self, agent: Agent, kv_policy: KvPolicy, dialect: PromptDialect) -> None:
        self._session = Session(agent.engine, agent.tokenizer, kv_policy)
        self._dialect = dialect

    def __call__(
        self, messages: Sequence[Message], images: Sequence[Image.Image], parameters: SamplingParameters
    ) -> AgentReply:
        """Answer.

        Raises:
            StarkvError: the prompt doesn't fit the engine, or an image can't be taken.
        """
        session = self._session
        memory = session.kv_memory
        reply = understand("".join(session.reply(messages, images, parameters)), session, self._dialect)
        if reply.error:
            # The same screenshot will be asked about again: it must not count twice in the trajectory.
            session.kv_memory = memory
        return reply
