# SPDX-License-Identifier: Apache-2.0
"""What a step of a long trajectory costs: the whole history again at every step, or a stream that goes on.

    python benchmarks/trajectory.py --out trajectory.json                    # gui-tiny
    python benchmarks/trajectory.py --model 0.5b --scratch DIR --out trajectory-0.5b.json

Every mode is sent the same conversations, with the last five screenshots, and gives the same replies back,
whatever it said itself. The modes take turns step by step, in one process on one engine, so that a machine
that slows down slows all of them down.

* re-prefill, full: the last five screenshots are prefilled anew at every step; nothing is compressed;
* prompt mode 20 %: the same, compressed to a fifth before the reply, as in the papers;
* stream 20 %: a step prefills its own screenshot behind a compacted history of five;
* stream capacity: the same within a fixed number of rows, screenshots never leaving by themselves.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from common import report
from peers_shapes import SIZES, checkpoint_config
from PIL import Image

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import card_of_folder, resolve_model
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.export.random_checkpoint import write_random_checkpoint
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.prompts.dialects import user_turn
from starkv.runtime.session import Session
from starkv.runtime.stream import StreamState
from starkv.synthetic.episodes import random_episode
from starkv.synthetic.suite import EPISODE_ELEMENTS, generator

SHOWN = 5
"""Screenshots in view, as with UI-TARS."""
EARLY, LATE = 5, 20
"""Steps that are compared; each with its two neighbours, so that one disturbance decides nothing."""
GAP = 3


@dataclass
class Mode:
    """A way to go through the trajectory."""

    name: str
    session: Session
    seconds: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Bytes of the valid rows after each step."""
    waiting: list[int] = field(default_factory=list)
    """Bytes in host memory of the newest screenshot's rows that each reply did without."""
    reserved: list[int] = field(default_factory=list)
    """Most bytes allocated in each step."""
    prefilled: list[int] = field(default_factory=list)
    """Tokens prefilled in each step."""

    def step(
        self, messages: Sequence[Message], images: Sequence[Image.Image], parameters: SamplingParameters
    ) -> str:
        started = time.perf_counter()
        text = "".join(self.session.reply(messages, images, parameters))
        self.seconds.append(time.perf_counter() - started)
        timings = self.session.timings
        self.held.append(timings.kv_bytes_held)
        self.waiting.append(timings.kv_bytes_waiting)
        self.reserved.append(timings.kv_bytes_reserved)
        self.prefilled.append(timings.prompt_tokens)
        return text

    @property
    def figures(self) -> dict[str, object]:
        names = ("name", "seconds", "held", "waiting", "reserved", "prefilled")
        return {name: getattr(self, name) for name in names}

    def around(self, step: int) -> float:
        """Median seconds of the steps up to this one."""
        return statistics.median(self.seconds[step - GAP : step])


def modes(agent: Agent, capacity: int) -> list[Mode]:
    fifth = KvPolicy(STAR_KV, Budget(0.2))
    fixed = KvPolicy(STAR_KV, Budget(capacity=capacity))

    def session(
        policy: KvPolicy, stream: bool = False, shown: int | None = None, newest_whole: bool = True
    ) -> Session:
        return Session(
            agent.engine,
            agent.tokenizer,
            policy,
            "stream" if stream else "prompt",
            shown,
            newest_whole,
        )

    return [
        Mode("re-prefill, full", session(KvPolicy(FULL))),
        Mode("prompt mode 20 %", session(fifth)),
        Mode("stream 20 %", session(fifth, True, SHOWN)),
        Mode("stream 20 %, newest compacted", session(fifth, True, SHOWN, newest_whole=False)),
        Mode(f"stream, {capacity} rows", session(fixed, True)),
    ]


def conversation(step: int, said: str, shown: int) -> list[Message]:
    """The turns before a step's reply, with the last ``shown`` screenshots."""
    messages: list[Message] = []
    for number in range(step + 1):
        image = int(number > step - shown)
        text = "Do: 'Open', 'Save', the red star." if number == 0 else ""
        if image or text:
            messages.append(user_turn(text, image))
        if number < step:
            messages.append({"role": "assistant", "content": said})
    return messages


def run(agent: Agent, screens: Sequence[Image.Image], capacity: int, tokens: int) -> list[Mode]:
    """All modes through the trajectory, step by step."""
    parameters, said = SamplingParameters(tokens), "Action: click(start_box='(120,80)')"
    taking_part = modes(agent, capacity)
    for step, _ in enumerate(screens):
        for mode in taking_part:
            shown = screens[max(0, step + 1 - SHOWN) : step + 1]
            mode.step(conversation(step, said, SHOWN), shown, parameters)
            if mode.session.state is not None:
                mode.session.state = _as_if_said(mode.session.state, said)
        print(f"step {step + 1} of {len(screens)}", file=sys.stderr, end="\r", flush=True)
    print(file=sys.stderr)
    return taking_part


def _as_if_said(state: StreamState, said: str) -> StreamState:
    """The stream's state with the given reply's text in place of its own: a random model says what no
    tokenizer would write the same way again, and its rows cost the same whatever they say."""
    head, turn, _ = state.text.rpartition("assistant\n")
    return replace(state, text=head + turn + said, pending=())


def random_engine(size: str, scratch: Path) -> Path:
    """Build an engine of random int4 weights once per scratch directory."""
    engine, folder = scratch / f"engine-{size}", scratch / f"checkpoint-{size}"
    if not engine.is_dir():
        write_random_checkpoint(checkpoint_config(SIZES[size]), folder)
        export_model(folder, card_of_folder(folder), scratch / f"export-{size}", load_preset("int4"))
        build_ort_engine(scratch / f"export-{size}", engine)
    return engine


def tiny_engine(scratch: Path) -> Path:
    """Build gui-tiny's engine."""
    resolved, exported, engine = resolve_model("gui-tiny"), scratch / "export", scratch / "engine"
    export_model(resolved.folder, resolved.card, exported, load_preset("int8"))
    build_ort_engine(exported, engine)
    return engine


def screenshots(count: int, height: int, width: int) -> list[Image.Image]:
    """Successive screenshots of a desktop."""
    random = generator("trajectory", "validation", 0, 7)
    episode = random_episode(random, count, height, width, *EPISODE_ELEMENTS)
    return [Image.fromarray(np.asarray(episode.pointed(step))) for step in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=["gui-tiny", *SIZES], default="gui-tiny")
    parser.add_argument("--scratch", type=Path, help="where a random model is kept")
    parser.add_argument("--steps", type=int, default=LATE)
    parser.add_argument("--size", type=int, nargs=2, default=(448, 448), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--capacity", type=int, default=512, help="rows of the last mode")
    parser.add_argument("--tokens", type=int, default=24, help="of each reply, at most")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    if args.steps < LATE:
        parser.error(f"--steps must be at least {LATE}")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        engine = (
            tiny_engine(Path(temporary)) if args.model == "gui-tiny" else random_engine(args.model, scratch)
        )
        agent = Agent.load(engine)
        screens = screenshots(args.steps, *args.size)
        finished = run(agent, screens, args.capacity, args.tokens)
    whole = finished[0]
    header = (
        "mode",
        f"s at step {EARLY}",
        f"s at step {LATE}",
        "growth",
        f"faster than re-prefill at {LATE}",
        "tokens prefilled per step",
        f"KV MiB held at {EARLY} / {LATE}",
        "and waiting",
        f"KV MiB reserved at {EARLY} / {LATE}",
    )
    rows = [
        (
            mode.name,
            f"{mode.around(EARLY):.3f}",
            f"{mode.around(LATE):.3f}",
            f"{mode.around(LATE) / mode.around(EARLY) - 1:+.1%}",
            f"{whole.around(LATE) / mode.around(LATE):.2f}x",
            f"{mode.prefilled[LATE - 1]}",
            f"{mode.held[EARLY - 1] / 2**20:.2f} / {mode.held[LATE - 1] / 2**20:.2f}",
            f"{mode.waiting[EARLY - 1] / 2**20:.2f} / {mode.waiting[LATE - 1] / 2**20:.2f}",
            f"{mode.reserved[EARLY - 1] / 2**20:.2f} / {mode.reserved[LATE - 1] / 2**20:.2f}",
        )
        for mode in finished
    ]
    figures = {
        "model": args.model,
        "screenshot_hw": list(args.size),
        "reply_tokens": args.tokens,
        "threads": agent.engine.info.threads,
        "modes": [mode.figures for mode in finished],
    }
    report([header, *rows], figures, args.out)


if __name__ == "__main__":
    main()
