# SPDX-License-Identifier: Apache-2.0
"""Click accuracy on held-out screens: Hugging Face transformers and the engines answer the same questions.

    python benchmarks/clicks.py --screens 100

Chance: a blind click at the centre of a random element of the right kind.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from common import Reference, engines, report
from PIL import Image
from rich.console import Console
from rich.progress import track
from splits import held_out

from starkv.evaluation.statistics import wilson_interval
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters

SIZE, QUESTIONS = 224, 12
PARAMETERS = SamplingParameters(max_new_tokens=24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--screens", type=int, default=100, help="held-out test screens, up to 12 questions each"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()

    reference = Reference()
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    same_text: dict[str, list[bool]] = defaultdict(list)
    chance: dict[str, list[float]] = defaultdict(list)
    with engines("fp32", "int8", "int4") as directories:
        agents = {name: Agent.load(directory) for name, directory in directories.items()}
        for index in track(range(args.screens), "screens", console=Console(stderr=True)):
            screen, drawn = held_out("test", index, SIZE, QUESTIONS)
            image = Image.fromarray(screen.image)
            # Twelve draws go round the elements: the first round asks about each element once.
            for question in drawn[: len(screen.elements)]:
                kind = "icon" if question.element.kind == "icon" else "word"
                same_kind = sum((element.kind == "icon") == (kind == "icon") for element in screen.elements)
                chance[kind].append(1 / same_kind)
                expected = reference.answer(image, question.text)
                for name, agent in agents.items():
                    reply = agent.act(image, question.text, PARAMETERS)
                    same_text[name].append(reply.text == expected)
                    point = (
                        reply.actions[0].point
                        if reply.actions and isinstance(reply.actions[0], Click)
                        else None
                    )
                    hits[name, kind].append(point is not None and question.element.contains(point.x, point.y))

    table = [("engine", "icons", "words", "text identical to transformers fp32")]
    figures = {}
    for name in agents:
        cells = []
        for kind in ("icon", "word"):
            right, total = sum(hits[name, kind]), len(hits[name, kind])
            low, high = wilson_interval(right, total)
            cells.append(f"{right / total:.1%} ({low:.1%}–{high:.1%}, n={total})")
            figures[f"{name} {kind}"] = {"right": right, "questions": total, "interval": [low, high]}
        same, asked = sum(same_text[name]), len(same_text[name])
        figures[f"{name} identical text"] = {"same": same, "questions": asked}
        table.append((name, *cells, f"{same} of {asked}"))
    by_chance = [f"{sum(chance[kind]) / len(chance[kind]):.1%}" for kind in ("icon", "word")]
    table.append(("a random element of the right kind", *by_chance, ""))
    report(table, {"benchmark": "clicks", "screens": args.screens, "figures": figures}, args.out)


if __name__ == "__main__":
    main()
