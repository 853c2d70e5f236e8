# SPDX-License-Identifier: Apache-2.0
"""How the loop asks a model: the only place that knows of engines and sessions."""

import operator
from collections.abc import Callable, Sequence

from PIL import Image

from starkv.errors import UsageError
from starkv.manifest import PromptDialect
from starkv.runtime.agent import Agent, AgentReply, understand
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Mode, Session

Ask = Callable[[Sequence[Message], Sequence[Image.Image], SamplingParameters], AgentReply]
"""The conversation, its images in order, and how to sample → what the model wants done on the last image."""


class SessionAsk:
    """Asks one session all along, so that what STaR-KV remembers of the trajectory goes on from step to step.

    Args:
        agent: the engine with its tokenizer.
        kv_policy: which rows of a prompt's KV cache are kept.
        dialect: words of the prompt, which say how replies are read.
        mode: ``stream`` goes on from the compacted cache of the step before.
        screenshots: of a stream in view.
        newest_whole: of a stream: keep the newest screenshot's rows until the next one was read behind them.

    Raises:
        UsageError: a stream of a dialect whose prompts are one turn with all screenshots.
    """

    def __init__(
        self,
        agent: Agent,
        kv_policy: KvPolicy,
        dialect: PromptDialect,
        mode: Mode = "prompt",
        screenshots: int | None = None,
        newest_whole: bool = True,
    ) -> None:
        if mode == "stream" and dialect in ("plain", "opencua"):
            raise UsageError(
                f"a stream needs prompts that only grow; {dialect} prompts are laid out anew at every step. "
                "Use --dialect ui_tars_computer or ui_tars_mobile, or leave --stream out"
            )
        self._session = Session(agent.engine, agent.tokenizer, kv_policy, mode, screenshots, newest_whole)
        self._dialect = dialect
        self._asked: tuple[list[Message], list[Image.Image]] = ([], [])
        self._before = (self._session.kv_memory, self._session.state)
        """What the session remembered before the last question."""

    def __call__(
        self, messages: Sequence[Message], images: Sequence[Image.Image], parameters: SamplingParameters
    ) -> AgentReply:
        """Answer. The same question again, with the very same images, is answered as if it were the first
        time: a screen must not count twice in the trajectory.

        Raises:
            StarkvError: the prompt doesn't fit the engine, or an image can't be taken.
        """
        session, (last_messages, last_images) = self._session, self._asked
        same_images = len(images) == len(last_images) and all(map(operator.is_, images, last_images))
        if same_images and list(messages) == last_messages:
            session.kv_memory, session.state = self._before
        self._asked = list(messages), list(images)
        self._before = session.kv_memory, session.state
        return understand("".join(session.reply(messages, images, parameters)), session, self._dialect)
