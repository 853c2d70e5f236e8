# SPDX-License-Identifier: Apache-2.0
"""From an image file to the patches of the vision graph, bit for bit what Hugging Face's PIL processor gives.

Two decisions where the outside world disagrees with itself:

- Images are turned upright by their EXIF orientation, and the original size is that of the upright image,
  because a click is reported in the coordinates of what a person sees.
- Transparency is laid over white, as the image processor does, not dropped, as the image loader does:
  dropping it uncovers whatever colour was stored under invisible pixels.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from starkv.errors import ImageError
from starkv.manifest import ImageLimits, VisionShape

MAX_SIDE = 16_384
"""Longest side that is decoded, in pixels."""
MAX_PIXELS = 64 * 1024 * 1024
"""Most pixels that are decoded: two 8K screens, 192 MiB as RGB."""
MAX_ASPECT_RATIO = 200
"""``smart_resize`` is not defined beyond it."""

# A closed list: Pillow would otherwise probe formats that start other programs, such as EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = 1


@dataclass(frozen=True)
class ImageInputs:
    """One image as the vision graph takes it."""

    pixel_values: NDArray[np.float32]
    """``[N, 3 * temporal_patch_size * patch_size²]``, merge block after merge block."""
    grid_h: int
    """Rows of patches."""
    grid_w: int
    """Columns of patches."""
    merged_grid: tuple[int, int]
    """Rows and columns of image tokens."""
    resized_height: int
    resized_width: int
    """Pixels of the image that the model sees, the space of its ``absolute`` coordinates."""
    original_height: int
    original_width: int
    """Pixels of the upright image that came in, the space of screen coordinates."""


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file, compressed quickly rather than well."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def load_image(
    source: str | Path | bytes | Image.Image,
    most_pixels: int = MAX_PIXELS,
    on_pixels: Callable[[int], None] = lambda pixels: None,
) -> Image.Image:
    """Open, check and decode an image.

    The header is checked before a single pixel is decoded, so a decompression bomb costs nothing.

    Args:
        source: a path, the bytes of a file, or an image; an upright RGB image is returned as it is.
        most_pixels: a larger one is refused; never more than ``MAX_PIXELS``.
        on_pixels: told the number of pixels before they are decoded; it may refuse by raising.

    Returns:
        An upright RGB image.

    Raises:
        ImageError: missing, unreadable or damaged file, unknown format, or a size out of bounds.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "image", most_pixels, on_pixels)
    if isinstance(source, bytes):
        name, data = "image", source
    else:
        name, data = str(source), _read(Path(source))
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image, or not one of {', '.join(_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{name} is too large: more than {MAX_PIXELS:,} pixels; scale it down first"
        ) from None
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        raise ImageError(f"{name} can't be read: {_one_line(error)}") from None
    return _upright_rgb(image, name, most_pixels, on_pixels)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area is within the limits.

    Halves round to even, as in the Python code that the models were trained with: (1022, 1522) becomes
    (1008, 1512) for factor 28. A C or JavaScript ``round`` shifts every click of such an image.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        ImageError: a side is zero, or one side is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise ImageError(f"image of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"image of {width}x{height} pixels is too narrow: one side may be at most {MAX_ASPECT_RATIO} "
            "times the other; crop it first"
        )
    rounded_height = round(height / factor) * factor
    rounded_width = round(width / factor) * factor
    if rounded_height * rounded_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if rounded_height * rounded_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded_height, rounded_width


def preprocess(image: Image.Image, vision: VisionShape, limits: ImageLimits) -> ImageInputs:
    """Resize, normalise and cut an image into patches.

    Args:
        image: any Pillow image; goes through :func:`load_image` first.
        vision: patch, merge and temporal sizes of the tower.
        limits: pixel limits, mean and standard deviation per channel.

    Raises:
        ImageError: the image's size is out of bounds.
    """
    image = load_image(image)
    pixels = resized_pixels(image, vision, limits)
    return image_inputs(pixels, (image.height, image.width), vision, limits)


def resized_pixels(image: Image.Image, vision: VisionShape, limits: ImageLimits) -> NDArray[np.uint8]:
    """An upright RGB image in the size that the model sees, ``[H, W, 3]``.

    Raises:
        ImageError: the image's size is out of bounds.
    """
    factor = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(image.height, image.width, factor, limits.min_pixels, limits.max_pixels)
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))


def image_inputs(
    pixels: NDArray[np.uint8], original_hw: tuple[int, int], vision: VisionShape, limits: ImageLimits
) -> ImageInputs:
    """Normalise a resized image and cut it into patches.

    Args:
        pixels: of :func:`resized_pixels`.
        original_hw: height and width of the image before it was resized.
        vision: patch, merge and temporal sizes of the tower.
        limits: mean and standard deviation per channel.
    """
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    height, width = pixels.shape[:2]
    grid_h, grid_w = height // patch, width // patch
    merged_h, merged_w = grid_h // merge, grid_w // merge

    blocks = pixels.reshape(merged_h, merge, patch, merged_w, merge, patch, 3)
    # (block row, block column, row in block, column in block, channel, pixel row, pixel column)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(grid_h * grid_w, 3, patch * patch)
    levels = _normalised_levels(limits)
    pixel_values = np.empty((grid_h * grid_w, 3, frames, patch * patch), dtype=np.float32)
    for channel in range(3):
        # A still image fills every frame of its temporal patch.
        pixel_values[:, channel] = levels[channel][patches[:, channel]][:, None]
    return ImageInputs(
        pixel_values=pixel_values.reshape(grid_h * grid_w, -1),
        grid_h=grid_h,
        grid_w=grid_w,
        merged_grid=(merged_h, merged_w),
        resized_height=height,
        resized_width=width,
        original_height=original_hw[0],
        original_width=original_hw[1],
    )


def _normalised_levels(limits: ImageLimits) -> NDArray[np.float32]:
    """Value of each of the 256 levels per channel, ``[3, 256]`` float32.

    Rescaled in float64, rounded, then normalised in float32: this order decides the last bit.
    """
    rescaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.asarray(limits.mean, dtype=np.float32)[:, None]
    deviation = np.asarray(limits.std, dtype=np.float32)[:, None]
    normalised: NDArray[np.float32] = (rescaled - mean) / deviation
    return normalised


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(f"{path} can't be read: {_one_line(error)}") from None


def _upright_rgb(
    image: Image.Image, name: str, most_pixels: int, on_pixels: Callable[[int], None]
) -> Image.Image:
    """Check the size, decode, turn upright, lay over white."""
    width, height = image.size
    most_pixels = min(most_pixels, MAX_PIXELS)
    if min(width, height) < 1:
        raise ImageError(f"{name} is empty: {width}x{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > most_pixels:
        raise ImageError(
            f"{name} is too large: {width}x{height} pixels, at most {MAX_SIDE:,} on a side and "
            f"{most_pixels:,} in all; scale it down first"
        )
    on_pixels(width * height)
    try:
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, _UPRIGHT) != _UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layered = image.convert("RGBA")
            white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, layered).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # as above: decoders raise nearly anything on damaged bytes
        raise ImageError(f"{name} is damaged: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
