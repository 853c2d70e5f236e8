# SPDX-License-Identifier: Apache-2.0
"""Click accuracy on the suite's single screens: Hugging Face transformers and the engines answer the same
questions.

    python benchmarks/clicks.py --count 1000

Chance: a blind click at the centre of a random element of the right kind.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from common import Reference, engines, named_clicks, report
from PIL import Image
from rich.console import Console
from rich.progress import track

from starkv.evaluation.statistics import wilson_interval
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters

PARAMETERS = SamplingParameters(max_new_tokens=24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count", type=int, default=1000, help="questions of the synthetic suite's test split"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()

    reference = Reference()
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    same_text: dict[str, list[bool]] = defaultdict(list)
    with engines("fp32", "int8", "int4") as directories:
        agents = {name: Agent.load(directory) for name, directory in directories.items()}
        for sample in track(named_clicks("test", args.count), "questions", console=Console(stderr=True)):
            image = Image.fromarray(sample.frames[0])
            expected = reference.answer(image, sample.question)
            for name, agent in agents.items():
                reply = agent.act(image, sample.question, PARAMETERS)
                same_text[name].append(reply.text == expected)
                first = reply.actions[0] if reply.actions else None
                point = first.point if isinstance(first, Click) else None
                hits[name, sample.task].append(point is not None and sample.hit(point.x, point.y))

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
    report(table, {"benchmark": "clicks", "questions": args.count, "figures": figures}, args.out)


if __name__ == "__main__":
    main()
