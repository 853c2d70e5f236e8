# SPDX-License-Identifier: Apache-2.0
"""``starkv chat``: a conversation in the terminal, or through a pipe."""

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import fail, note, print_actions
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank, kept_rows
from starkv.cli.options import (
    Device,
    Dialect,
    Engine,
    MaxNewTokens,
    NewestWhole,
    NoVerify,
    Screenshots,
    Seed,
    Stop,
    Stream,
    Temperature,
    Threads,
    TopP,
    stream_mode,
)
from starkv.errors import StarkvError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from starkv.manifest import PromptDialect
    from starkv.runtime.agent import Agent
    from starkv.runtime.generation import SamplingParameters
    from starkv.runtime.kv.policy import KvPolicy
    from starkv.runtime.preprocess.tokenizer import Message
    from starkv.runtime.session import Mode

_HELP = """\
/image PATH  attach a screenshot to the next message; without PATH, take attached ones away
/reset       forget the conversation
/help        show this
/quit        end; so does the end of input
Ctrl-C stops a reply; at the prompt it ends the chat."""


def chat(
    engine: Engine,
    image: Annotated[
        list[Path] | None, typer.Option(help="Screenshot for the first message; may be repeated.")
    ] = None,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    stream: Stream = False,
    screenshots: Screenshots = None,
    newest_whole: NewestWhole = True,
    dialect: Dialect = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
) -> None:
    """Talk to an engine: one line of input is one message; /help lists the commands.

    Replies go to stdout, everything else to stderr. The whole conversation is prefilled for each reply, or
    with --stream only what is new in it.

    Example: [bold]starkv chat --engine gui-tiny --image examples/screen.png --kv-budget 0.4[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.runtime.agent import Agent
    from starkv.runtime.generation import SamplingParameters
    from starkv.runtime.preprocess.image import load_image
    from starkv.runtime.prompts.dialects import parse_dialect

    parameters = SamplingParameters(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    kv_options = KvOptions(kv_method, kv_budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    words = parse_dialect(dialect) if dialect else None
    images = [load_image(path) for path in image or []]
    agent = Agent.load(
        find_engine(engine, device=device, packing=kv_options.packing), not no_verify, threads, device
    )
    policy = kv_options.policy(agent.engine.manifest)
    mode = stream_mode(stream, screenshots)
    conversation = Conversation(
        agent, policy, parameters, words or agent.engine.manifest.prompt, mode, screenshots, newest_whole
    )
    for screenshot in images:
        conversation.attach(screenshot)
    if sys.stdin.isatty():
        note(f"{agent.engine.manifest.name}; /help lists the commands")
    for line in _lines():
        if line == "/quit":
            break
        # What is wrong with one line is no reason to lose the conversation.
        try:
            if line.startswith("/"):
                _obey(conversation, line)
            else:
                conversation.say(line)
        except StarkvError as error:
            fail(str(error))


def _lines() -> "Iterator[str]":
    """Lines of input that are not blank, until its end or Ctrl-C."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    editing = terminal and sys.stdout.isatty()
    if editing:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives ``input`` a history and the arrow keys)
    while True:
        try:
            if editing:
                line = input("> ")
            else:
                if terminal:
                    print("> ", end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    return
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def _obey(conversation: "Conversation", line: str) -> None:
    """Carry out a command.

    Raises:
        StarkvError: an unknown command, or a screenshot that can't be read.
    """
    from starkv.errors import UsageError
    from starkv.runtime.preprocess.image import load_image

    command, _, argument = line.partition(" ")
    path = argument.strip().strip("'\"")
    if command == "/image" and path:
        loaded = load_image(Path(path).expanduser())
        conversation.attach(loaded)
        note(f"{path}: {loaded.width}x{loaded.height} pixels, for the next message")
    elif command == "/image":
        conversation.attached.clear()
        note("no screenshot for the next message")
    elif command == "/reset":
        conversation.reset()
        note("the conversation is forgotten")
    elif command == "/help":
        note(_HELP)
    else:
        raise UsageError(f"unknown command {line!r}; /help lists the commands")


class Conversation:
    """What was said and shown so far, and the session that answers.

    Nothing of it changes where a message can't be answered.
    """

    def __init__(
        self,
        agent: "Agent",
        policy: "KvPolicy",
        parameters: "SamplingParameters",
        dialect: "PromptDialect",
        mode: "Mode" = "prompt",
        screenshots: int | None = None,
        newest_whole: bool = True,
    ) -> None:
        self._agent, self._policy, self._parameters, self._dialect = agent, policy, parameters, dialect
        self._mode, self._screenshots, self._newest_whole = mode, screenshots, newest_whole
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and what STaR-KV remembers of it."""
        from starkv.runtime.session import Session

        # One session for all replies: its replies are the trajectory that STaR-KV remembers.
        self._session = Session(
            self._agent.engine,
            self._agent.tokenizer,
            self._policy,
            self._mode,
            self._screenshots,
            self._newest_whole,
        )
        self._messages: list[Message] = []
        self._images: list[Image.Image] = []
        self.attached: list[Image.Image] = []
        """Screenshots of the next message."""

    def attach(self, image: "Image.Image") -> None:
        """Show a screenshot with the next message.

        Raises:
            ImageError: the model can't take it.
        """
        from starkv.runtime.preprocess.image import preprocess

        # Refused now: once attached it would spoil every message to come.
        manifest = self._agent.engine.manifest
        preprocess(image, manifest.vision, manifest.image)
        self.attached.append(image)

    def say(self, text: str) -> None:
        """Answer a message on stdout; Ctrl-C stops the reply, and what was said of it stays.

        Raises:
            StarkvError: the message can't be answered.
        """
        from starkv.runtime.agent import understand
        from starkv.runtime.prompts.dialects import opening, user_turn

        session, memory = self._session, self._session.kv_memory
        if self._messages:
            messages = [*self._messages, user_turn(text, len(self.attached))]
        else:
            messages = opening(text, len(self.attached), self._dialect)
        images = [*self._images, *self.attached]
        pieces: list[str] = []
        stopped = False
        try:
            for piece in session.reply(messages, images, self._parameters):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        except StarkvError:
            session.kv_memory = memory
            if pieces:
                print()
            raise
        if pieces:
            print()
        elif stopped:
            session.kv_memory = memory
            note("stopped before the first word; the message is forgotten")
            return
        reply = "".join(pieces)
        self._messages = [*messages, {"role": "assistant", "content": reply}]
        self._images, self.attached = images, []
        if images:
            print_actions(understand(reply, session, self._dialect).action_json)
        timings = session.timings
        ending = ""
        if stopped:
            ending = "; stopped"
        elif session.finish_reason == "length":
            ending = f"; cut at {self._parameters.max_new_tokens} tokens"
        note(
            f"{timings.generated_tokens} tokens, {timings.decode_per_second:.0f} tokens/s; "
            f"{timings.prompt_tokens} read; {kept_rows(timings)}{ending}"
        )
