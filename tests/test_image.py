# SPDX-License-Identifier: Apache-2.0
"""Image loading and patches, against Hugging Face's PIL processor where there is something to compare."""

import contextlib
import importlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starkv.errors import ImageError
from starkv.manifest import ImageLimits, VisionShape
from starkv.runtime.preprocess.image import load_image, preprocess, smart_resize

LIMITS = ImageLimits(
    min_pixels=78_400,
    max_pixels=300_000,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
VISION = VisionShape(
    depth=1,
    hidden=32,
    intermediate=32,
    heads=2,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=112,
    full_attention_blocks=[0],
    rope_theta=10_000.0,
)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=file_format, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (chunk, body)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pixel_values_equal_huggingface_to_the_bit(mode: str) -> None:
    importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    image = noise(333, 517).convert(mode) if mode in "P1CMYK" else noise(333, 517, mode)
    processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels
    )
    expected = processor(images=[image], return_tensors="np")
    inputs = preprocess(image, VISION, LIMITS)
    assert [1, inputs.grid_h, inputs.grid_w] == expected["image_grid_thw"][0].tolist()
    assert inputs.pixel_values.dtype == expected["pixel_values"].dtype
    np.testing.assert_array_equal(inputs.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("size", [(640, 480), (30, 40), (5, 900), (1400, 1000)])
def test_sizes_equal_huggingface(size: tuple[int, int]) -> None:
    importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    image = noise(*size)
    processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels
    )
    expected = processor(images=[image], return_tensors="np")
    inputs = preprocess(image, VISION, LIMITS)
    np.testing.assert_array_equal(inputs.pixel_values, expected["pixel_values"])
    assert (inputs.original_width, inputs.original_height) == size
    assert (inputs.resized_height, inputs.resized_width) == (inputs.grid_h * 14, inputs.grid_w * 14)
    assert inputs.merged_grid == (inputs.grid_h // 2, inputs.grid_w // 2)


def test_smart_resize_rounds_halves_to_even() -> None:
    assert smart_resize(1022, 1522, 28, 78_400, 12_845_056) == (1008, 1512)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [(720, 1280, 1196), (1080, 1920, 2691), (1440, 2560, 4641), (2160, 3840, 10_549), (3384, 6016, 16_320)],
)
def test_screens_cost_the_known_number_of_tokens(height: int, width: int, tokens: int) -> None:
    resized_height, resized_width = smart_resize(height, width, 28, 78_400, 12_845_056)
    assert resized_height * resized_width // 28**2 == tokens


@settings(deadline=None)
@given(height=st.integers(1, 9000), width=st.integers(1, 9000))
def test_smart_resize_equals_huggingface_everywhere(height: int, width: int) -> None:
    importlib.import_module("torch")
    reference = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ImageError, match="too narrow"):
            smart_resize(height, width, 28, 78_400, 12_845_056)
    else:
        expected = reference.smart_resize(height, width, 28, 78_400, 12_845_056)
        assert smart_resize(height, width, 28, 78_400, 12_845_056) == expected


def test_transparency_lies_over_white() -> None:
    clear_black = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    assert load_image(encoded(clear_black)).getpixel((5, 5)) == (255, 255, 255)


def test_a_palette_with_a_transparent_entry_lies_over_white() -> None:
    image = Image.new("P", (60, 60), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert load_image(encoded(image, transparency=1)).getpixel((5, 5)) == (255, 255, 255)
    assert load_image(encoded(image, transparency=0)).getpixel((5, 5)) == (0, 0, 255)


def test_exif_orientation_turns_the_image_upright() -> None:
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = load_image(encoded(image, "JPEG", exif=exif))
    assert upright.size == (40, 80)
    inputs = preprocess(upright, VISION, LIMITS)
    assert (inputs.original_width, inputs.original_height) == (40, 80)


def test_an_upright_rgb_image_is_not_copied() -> None:
    image = noise(40, 40)
    assert load_image(image) is image


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "screen"
    path.write_bytes(encoded(Image.new("RGB", (50, 40), (10, 200, 30)), file_format))
    for source in (path, str(path)):
        loaded = load_image(source)
        assert (loaded.size, loaded.mode) == ((50, 40), "RGB")


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png does not exist"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="can't be read"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="can't be read"):
        load_image("null\0byte.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "notes.txt").write_text("no pixels here")
    with pytest.raises(ImageError, match=r"notes\.txt is not an image"):
        load_image(tmp_path / "notes.txt")


def test_postscript_is_not_even_probed() -> None:
    with pytest.raises(ImageError, match="not an image"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("size", [(20_000, 100), (100, 20_000), (9000, 9000), (20_000, 20_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="too large"):
        load_image(png_header(*size))


def test_a_header_without_pixels_is_damaged() -> None:
    """The counterpart of the refusal above: a header of an allowed size does reach the decoder."""
    with pytest.raises(ImageError, match="damaged"):
        load_image(png_header(100, 100))


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_zero_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="empty"):
        load_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="empty"):
        smart_resize(*size, 28, 78_400, 12_845_056)


def test_a_strip_is_refused_with_its_size() -> None:
    with pytest.raises(ImageError, match=r"2x600 pixels is too narrow"):
        preprocess(Image.new("RGB", (2, 600)), VISION, LIMITS)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_files_raise_only_image_errors(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(encoded(noise(24, 16), file_format))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    # The promise is that nothing else comes out; whether the damage shows is the format's affair.
    with contextlib.suppress(ImageError):
        assert load_image(bytes(content)).mode == "RGB"
