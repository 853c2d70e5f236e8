# SPDX-License-Identifier: Apache-2.0
"""Draw samples of the synthetic suite: all frames side by side, and on stdout what is asked about them.

python benchmarks/gui/draw.py --task trajectory --number 3 --count 4 --boxes --out sample.png
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import SPLITS, click_samples, trajectory_samples

SUITES = {"click": click_samples, "trajectory": trajectory_samples}
GAP = 8
"""Pixels between frames."""
BOX_COLOR = (0, 160, 0)


def picture(sample: Sample, boxes: bool) -> Image.Image:
    """A sample's frames, oldest first, the evidence of its answer outlined if ``boxes``."""
    frames = [Image.fromarray(frame) for frame in sample.frames]
    for frame, (x0, y0, x1, y1) in sample.evidence if boxes else ():
        ImageDraw.Draw(frames[frame]).rectangle((x0 - 6, y0 - 6, x1 + 5, y1 + 5), outline=BOX_COLOR, width=2)
    width = sum(frame.width + GAP for frame in frames) - GAP
    drawn = Image.new("RGB", (width, frames[0].height), "white")
    x = 0
    for frame in frames:
        drawn.paste(frame, (x, 0))
        x += frame.width + GAP
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(SUITES), default="click")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=0, help="of the first sample")
    parser.add_argument("--count", type=int, default=1, help="samples, one below the other")
    parser.add_argument("--boxes", action="store_true", help="outline what the answers are about")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args()
    end = args.number + args.count
    samples = list(islice(SUITES[args.task](args.split, args.seed, end), args.number, end))
    rows = [np.asarray(picture(sample, args.boxes)) for sample in samples]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(padded)[:-GAP]).save(args.out)
    for sample in samples:
        print(f"{sample.id}  {sample.question}  →  {sample.answer!r}  {sample.box}")


if __name__ == "__main__":
    main()
