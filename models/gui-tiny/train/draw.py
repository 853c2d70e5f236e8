# SPDX-License-Identifier: Apache-2.0
"""Draw a held-out screen into a PNG and print what is on it.

python models/gui-tiny/train/draw.py --index 7 --scale 2 --out examples/screen.png
"""

import argparse
from pathlib import Path

from PIL import Image
from splits import SPLITS, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--index", type=int, default=0, help="number of the screen within the split")
    parser.add_argument("--size", type=int, default=224, help="side of the screen in pixels")
    parser.add_argument("--scale", type=int, default=1, help="enlarge every pixel this often")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args()
    screen, _ = held_out(args.split, args.index, args.size, questions=1)
    side = args.size * args.scale
    Image.fromarray(screen.image).resize((side, side), Image.Resampling.NEAREST).save(args.out)
    for element in screen.elements:
        print(element.phrase, tuple(edge * args.scale for edge in element.box))


if __name__ == "__main__":
    main()
