# SPDX-License-Identifier: Apache-2.0
"""Runs an engine over prompts and keeps every token's logits, with its own replies or with given ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.prompts import GuiPrompt
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import AgentReply, understand
from starkv.runtime.engines.base import Engine, Floats, PicksOnHost, Rope
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import Session


@dataclass
class RecordingEngine(PicksOnHost):
    """Another engine whose logits are kept, and which can be made to say given tokens."""

    engine: Engine
    forced: Sequence[int] | None = None
    """Tokens of the reply, the end of text included; the engine's own choice if None."""
    logits: list[Floats] = field(default_factory=list)
    """[vocab] for each token of the reply."""

    def __getattr__(self, name: str) -> object:
        """Everything else is the engine's."""
        return getattr(self.engine, name)

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        return self._kept(self.engine.prefill(arena, embeds, rope))

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        return self._kept(self.engine.decode(pool, embeds, rope)[0])[None]

    def _kept(self, logits: Floats) -> Floats:
        # Engines may write the next logits into the same memory.
        self.logits.append(logits.copy())
        if self.forced is None:
            return logits
        said = np.zeros_like(logits)
        said[self.forced[len(self.logits) - 1]] = 1.0
        return said


@dataclass(frozen=True)
class Reply:
    """A reply with its logits."""

    understood: AgentReply
    logits: NDArray[np.float32]
    """[tokens, vocab]; the last token is the end of text, unless the reply was too long."""

    @property
    def tokens(self) -> list[int]:
        """What a greedy engine with these logits says."""
        return [int(token) for token in self.logits.argmax(-1)]

    @property
    def click(self) -> tuple[float, float] | None:
        """Where the first action clicks, in pixels of the screen."""
        if not self.understood.actions or not isinstance(self.understood.actions[0], Click):
            return None
        place = self.understood.action_json[0]["screen_xy"]
        assert isinstance(place, list)  # of a click's JSON form
        return float(place[0]), float(place[1])


def reply_to(
    prompt: GuiPrompt,
    engine: Engine,
    tokenizer: ChatTokenizer,
    longest: int,
    forced: Sequence[int] | None = None,
) -> Reply:
    """Answer a prompt greedily with the whole cache, or say given tokens.

    Args:
        prompt: image and instruction.
        engine: who answers.
        tokenizer: its tokenizer.
        longest: tokens of the reply at most.
        forced: tokens to say.
    """
    recording = RecordingEngine(engine, forced)
    session = Session(cast(Engine, recording), tokenizer)
    messages = opening(prompt.instruction, 1, engine.manifest.prompt)
    limit = SamplingParameters(max_new_tokens=len(forced) if forced else longest)
    text = "".join(session.reply(messages, [prompt.image], limit))
    return Reply(understand(text, session, engine.manifest.prompt), np.stack(recording.logits))
