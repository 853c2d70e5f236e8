# SPDX-License-Identifier: Apache-2.0
"""What it costs to take in five screenshots, four of which were sent at the step before.

    python benchmarks/prepare_images.py --out prepare-images.json

Each step shows one new screenshot and the last four again, as UI-TARS's client does. Three ways take turns:

* all anew: each is resized, cut into patches and named by a checksum of them, as starkv did up to 2026-11-26;
* images: ``ImageCache.prepare`` gets decoded images, as a session of the Python API does;
* PNG files: the same from files, as the server does; here "all anew" decodes them first.

The vision tower is not part of it: all ways spare it for what was seen before.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import report
from PIL import Image
from trajectory import screenshots, tiny_engine

from starkv.manifest import Manifest, read_manifest
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.preprocess.image import load_image, png_bytes, preprocess

SHOWN = 5
SIZES = {"448x448": (448, 448), "1920x1080": (1080, 1920)}
UI_TARS_PIXELS = 16_384 * 28 * 28
"""Most pixels of an image of UI-TARS-1.5, so that 1080p stays 1080p."""

Take = Callable[[Sequence[bytes | Image.Image]], None]


def anew(manifest: Manifest) -> Take:
    """As it was done at every step."""

    def take(sent: Sequence[bytes | Image.Image]) -> None:
        for source in sent:
            inputs = preprocess(load_image(source), manifest.vision, manifest.image)
            hashlib.blake2b(inputs.pixel_values.tobytes(), digest_size=16).digest()

    return take


def cached(manifest: Manifest) -> Take:
    """As it is done, the patches of the new screenshot included, which the vision tower asks for."""
    cache = ImageCache()

    def take(sent: Sequence[bytes | Image.Image]) -> None:
        *_, newest = [cache.prepare(source, manifest) for source in sent]
        newest.inputs()

    return take


def measure(manifest: Manifest, screens: Sequence[Image.Image]) -> dict[str, float]:
    """Median milliseconds of a step, for each way."""
    files = [png_bytes(screen) for screen in screens]
    ways: list[tuple[str, Sequence[bytes | Image.Image], Take]] = [
        ("images, all anew", screens, anew(manifest)),
        ("images, cached", screens, cached(manifest)),
        ("PNG files, all anew", files, anew(manifest)),
        ("PNG files, cached", files, cached(manifest)),
    ]
    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for step in range(SHOWN, len(screens) + 1):
        for name, sources, take in ways:
            shown = sources[step - SHOWN : step]
            started = time.perf_counter()
            take(shown)
            times[name].append((time.perf_counter() - started) * 1e3)
    # The first step of each way has five new screenshots.
    return {name: statistics.median(steps[1:]) for name, steps in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = read_manifest(tiny_engine(Path(scratch)))
    limits = manifest.image.model_copy(update={"max_pixels": UI_TARS_PIXELS})
    manifest = manifest.model_copy(update={"image": limits})
    figures = {
        name: measure(manifest, screenshots(args.steps + SHOWN, *size)) for name, size in SIZES.items()
    }
    header = ("five screenshots", *(f"{name}, ms" for name in SIZES))
    ways = list(next(iter(figures.values())))
    rows = [(way, *(f"{figures[name][way]:.1f}" for name in SIZES)) for way in ways]
    report([header, *rows], {"milliseconds": figures}, args.out)


if __name__ == "__main__":
    main()
