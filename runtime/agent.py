# SPDX-License-Identifier: Apache-2.0
"""A screenshot and an instruction in, a typed action on the screen out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from starkv.manifest import Manifest, PromptDialect
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.actions.coordinates import JsonValue, Size, to_json
from starkv.runtime.actions.parser import ActionParseError, parse_response
from starkv.runtime.actions.pyautogui_code import parse_pyautogui
from starkv.runtime.actions.types import Action
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import load_image
from starkv.runtime.preprocess.prepared import ImageFacts
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import Session
from starkv.runtime.timings import Timings

Screenshot = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class AgentReply:
    """What the model wants done."""

    text: str
    """The reply as the model wrote it."""
    thought: str
    actions: tuple[Action, ...]
    """In order; empty if the reply is no action."""
    error: ActionParseError | None
    """Why the reply is no action."""
    action_json: tuple[Mapping[str, JsonValue], ...]
    """``actions`` with model and screen coordinates."""
    resized: Size
    """Image that the model saw."""
    original: Size
    """Screenshot that was given."""
    finish_reason: str
    timings: Timings

    def to_json(self) -> dict[str, object]:
        """The reply as JSON values. ``model_xy`` and ``screen_xy`` are the first action's first point."""
        first = self.action_json[0] if self.action_json else {}
        return {
            "action": dict(first) or None,
            "model_xy": first.get("model_xy"),
            "screen_xy": first.get("screen_xy"),
            "actions": [dict(action) for action in self.action_json],
            "thought": self.thought,
            "text": self.text,
            "error": self.error.reason if self.error else None,
            "finish_reason": self.finish_reason,
            "resized_wh": list(self.resized),
            "original_wh": list(self.original),
            "timings": self.timings.to_json(),
        }


class Agent:
    """An engine with its tokenizer.

    Example:
        >>> agent = Agent.load("engines/gui-tiny-ort-int8")
        >>> agent.act("screen.png", "Click the red star.").action_json
        ({'type': 'click', 'model_xy': [134, 87], 'screen_xy': [268, 174]},)
    """

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer

    @classmethod
    def load(
        cls,
        directory: str | Path,
        verify: bool = True,
        threads: int | None = None,
        device: str = "auto",
    ) -> "Agent":
        """Open an engine directory; see ``open_engine``.

        Raises:
            EngineError: it is missing, damaged, or this machine can't run it.
        """
        engine = open_engine(Path(directory), verify, threads, device)
        return cls(engine, ChatTokenizer.from_directory(Path(directory)))

    def act(
        self,
        screenshot: Screenshot,
        instruction: str,
        parameters: SamplingParameters | None = None,
        kv_policy: KvPolicy | None = None,
        on_text: Callable[[str], None] | None = None,
        earlier: Sequence[Screenshot] = (),
        dialect: PromptDialect | None = None,
    ) -> AgentReply:
        """Ask the model what to do on a screenshot.

        Args:
            screenshot: a file, its bytes, or an image; coordinates are on this one.
            instruction: what the user wants.
            parameters: sampling and stopping; greedy by default.
            kv_policy: which rows of the prompt's KV cache are kept; the engine's default otherwise.
            on_text: called with each piece of the reply as it comes.
            earlier: screenshots of earlier steps, oldest first.
            dialect: words of the prompt; the engine's by default.

        Raises:
            ImageError: the screenshot can't be read.
            UsageError: the prompt doesn't fit the engine.
        """
        images = [load_image(shown) for shown in (*earlier, screenshot)]
        dialect = dialect or self.engine.manifest.prompt
        messages = opening(instruction, len(images), dialect)
        session = Session(self.engine, self.tokenizer, kv_policy or default_policy(self.engine.manifest))
        pieces = []
        for piece in session.reply(messages, images, parameters):
            pieces.append(piece)
            if on_text:
                on_text(piece)
        return understand("".join(pieces), session, dialect)


def default_policy(manifest: Manifest, star_kv: StarKVConfig | None = None) -> KvPolicy:
    """What an engine does with a prompt's cache where nobody says: STaR-KV at the manifest's budget.

    Args:
        manifest: of the engine.
        star_kv: hyper-parameters; native mode by default.
    """
    if manifest.kv_budget == 1.0:
        return KvPolicy()
    return KvPolicy(STAR_KV, Budget(manifest.kv_budget), star_kv or StarKVConfig())


def understand(text: str, session: Session, dialect: PromptDialect | None = None) -> AgentReply:
    """What a session's last reply wants done on its newest screenshot.

    Args:
        text: the reply.
        session: has answered a prompt with at least one screenshot.
        dialect: of the prompt; the engine's by default.
    """
    manifest, seen = session.engine.manifest, session.images[-1]
    return interpret(text, manifest, seen, session.timings, session.finish_reason or "length", dialect)


def interpret(
    text: str,
    manifest: Manifest,
    seen: ImageFacts,
    timings: Timings,
    finish_reason: str,
    dialect: PromptDialect | None = None,
) -> AgentReply:
    """What a reply wants done on a screenshot.

    Args:
        text: the reply.
        manifest: of the engine: how it writes coordinates.
        seen: the screenshot.
        timings: of the reply.
        finish_reason: why it ended.
        dialect: of the prompt; the engine's by default.
    """
    parse = parse_pyautogui if (dialect or manifest.prompt) == "opencua" else parse_response
    resized = Size(seen.resized_width, seen.resized_height)
    original = Size(seen.original_width, seen.original_height)
    actions: tuple[Action, ...] = ()
    thought, error = "", None
    try:
        parsed = parse(text)
        actions, thought = parsed.actions, parsed.thought
    except ActionParseError as failure:
        error = failure
    return AgentReply(
        text=text,
        thought=thought,
        actions=actions,
        error=error,
        action_json=tuple(to_json(action, resized, original, manifest.coordinates) for action in actions),
        resized=resized,
        original=original,
        finish_reason=finish_reason,
        timings=timings,
    )
