# SPDX-License-Identifier: Apache-2.0
"""Images that were seen before cost neither decoding nor resizing nor the vision tower."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import ChatModel
from fake_engine import FakeEngine
from PIL import Image
from served import noise

from starkv.errors import ImageError
from starkv.manifest import Manifest, read_manifest
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.preprocess.image import png_bytes, preprocess


@pytest.fixture(scope="module")
def manifest(babbling: ChatModel) -> Manifest:
    return read_manifest(babbling.engine)


@pytest.fixture
def engine(manifest: Manifest) -> FakeEngine:
    return FakeEngine(manifest, [1])


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and no image is decoded or resized any more."""

    def forbid() -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("an image that was seen before is prepared again")

        for place in ("kv.image_cache.prepare", "preprocess.prepared.resized_pixels"):
            monkeypatch.setattr(f"starkv.runtime.{place}", fail)

    return forbid


def test_patches_are_those_of_preprocess(manifest: Manifest) -> None:
    image = noise(0)
    inputs = ImageCache().prepare(image, manifest).inputs()
    expected = preprocess(image, manifest.vision, manifest.image)
    assert np.array_equal(inputs.pixel_values, expected.pixel_values)
    for name in ("grid_h", "grid_w", "merged_grid", "resized_height", "resized_width"):
        assert getattr(inputs, name) == getattr(expected, name)
    assert (inputs.original_height, inputs.original_width) == (150, 200)


@pytest.mark.parametrize("as_file", [True, False])
def test_what_comes_again_is_not_prepared(
    manifest: Manifest, engine: FakeEngine, never: Callable[[], None], as_file: bool
) -> None:
    def sent() -> bytes | Image.Image:
        return png_bytes(noise(1)) if as_file else noise(1)

    cache = ImageCache()
    decoded: list[int] = []
    first = cache.prepare(sent(), manifest, on_pixels=decoded.append)
    embeds = cache.encode(engine, first)
    never()
    second = cache.prepare(sent(), manifest, on_pixels=decoded.append)
    assert second.facts == first.facts
    assert cache.encode(engine, second) is embeds
    assert (cache.hits, engine.calls) == (1, [("encode", 1)])
    assert decoded == [30_000]


def test_one_screenshot_sent_in_two_ways_is_one(manifest: Manifest) -> None:
    cache, image = ImageCache(), noise(1)
    clear = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    white = Image.new("RGB", (60, 60), "white")
    facts = [cache.prepare(sent, manifest).facts for sent in (image, png_bytes(image), clear, white)]
    assert facts[0] == facts[1]
    assert facts[2] == facts[3], "what is transparent is laid over white"
    assert facts[0].key != facts[2].key


def test_one_pixel_makes_another_image(manifest: Manifest) -> None:
    cache, image = ImageCache(), Image.new("RGB", (56, 56), "white")
    before = cache.prepare(image, manifest).facts.key
    image.putpixel((3, 3), (0, 0, 0))
    assert cache.prepare(image, manifest).facts.key != before
    # The same bytes in another shape are another image.
    tall = Image.frombytes("RGB", (28, 112), Image.new("RGB", (56, 56), "white").tobytes())
    assert cache.prepare(tall, manifest).facts.key != before


def test_embeddings_that_were_given_up_are_made_again(manifest: Manifest, engine: FakeEngine) -> None:
    cache = ImageCache(most_bytes=0)
    for sent in (noise(1), png_bytes(noise(2))):
        first, second = (cache.encode(engine, cache.prepare(sent, manifest)) for _ in range(2))
        assert np.array_equal(first, second)
    assert (cache.hits, len(engine.calls)) == (0, 4)


def test_memory_is_bounded(manifest: Manifest, engine: FakeEngine) -> None:
    one = engine.encode_image(preprocess(noise(0), manifest.vision, manifest.image)).nbytes
    cache = ImageCache(most_bytes=3 * one, most_known=4)
    decoded: list[int] = []
    files = [png_bytes(noise(number)) for number in range(6)]
    for file in [*files, *files]:
        cache.encode(engine, cache.prepare(file, manifest, on_pixels=decoded.append))
        assert cache.nbytes <= 3 * one
    assert len(decoded) == 12, "of six that take turns none of the last four is the next"
    decoded.clear()
    cache.prepare(files[3], manifest, on_pixels=decoded.append)
    assert not decoded


def test_a_prepared_image_serves_one_request(manifest: Manifest, engine: FakeEngine) -> None:
    cache = ImageCache()
    image = cache.prepare(noise(1), manifest)
    cache.encode(engine, image)
    with pytest.raises(ValueError, match="one request"):
        image.inputs()


def test_what_is_refused_is_not_remembered(manifest: Manifest) -> None:
    cache, file = ImageCache(), png_bytes(noise(1))
    for _ in range(2):
        with pytest.raises(ImageError, match="too large"):
            cache.prepare(file, manifest, most_pixels=1000)
    with pytest.raises(ImageError, match="damaged"):
        cache.prepare(file[:-2000], manifest)
    assert cache.prepare(file, manifest).facts.original_width == 200
