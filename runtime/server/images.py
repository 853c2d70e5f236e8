# SPDX-License-Identifier: Apache-2.0
"""Images of a request: where they may come from, and how large they may be."""

import base64
import binascii
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starkv.errors import ImageError
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.server.errors import ApiError
from starkv.runtime.server.options import ServerOptions

Prepare = Callable[[bytes], PreparedImage]
"""Prepares an image file; raises ``ImageError`` where it can't be taken."""

_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<base64>;base64)?,", re.IGNORECASE)


def load(url: str, place: str, options: ServerOptions, prepare: Prepare) -> PreparedImage:
    """Prepare an image.

    Its size is read from its header before any pixel is decoded: a few kilobytes can claim gigapixels.

    Args:
        url: data URI, plain base64, or ``file://`` URL.
        place: path of the field, for messages.
        options: limits of the server.
        prepare: takes the bytes of its file.

    Raises:
        ApiError: it is none of these, lies outside the media folder, or is no image that the server takes.
    """
    try:
        return prepare(_source(url, place, options))
    except ImageError as error:
        raise ApiError(400, f"{place}: {error}", place, "invalid_image") from None


def _source(url: str, place: str, options: ServerOptions) -> bytes:
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        return _decoded(url, place)
    if scheme == "file":
        return _local(url, place, options.media_path)
    if scheme in ("http", "https"):
        raise ApiError(
            400,
            f"{place}: this server fetches nothing from the network; send the image as a data URI",
            place,
            "unsupported_image_url",
        )
    return _base64(url, place)


def _decoded(url: str, place: str) -> bytes:
    header = _DATA_URI.match(url)
    if header is None or not header["base64"]:
        raise ApiError(400, f"{place}: write the image as data:image/png;base64,…", place, "invalid_image")
    return _base64(url[header.end() :], place)


def _base64(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: this is no base64", place, "invalid_image") from None


def _local(url: str, place: str, folder: Path | None) -> bytes:
    if folder is None:
        raise ApiError(
            400,
            f"{place}: this server reads no local files; send the image as a data URI, or start the server "
            "with --media-path",
            place,
            "unsupported_image_url",
        )
    # Resolved, so that neither ".." nor a link leads out of the folder. What is outside is told like what is
    # missing: a client learns nothing of the machine's files.
    try:
        parts = urlsplit(url)
        path = Path(unquote(parts.path)).resolve()
        if parts.netloc in ("", "localhost") and path.is_relative_to(folder.resolve()) and path.is_file():
            return path.read_bytes()
    except (ValueError, OSError, RuntimeError):
        pass
    raise ApiError(400, f"{place}: there is no such file in the media folder", place, "invalid_image")
