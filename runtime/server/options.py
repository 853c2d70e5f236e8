# SPDX-License-Identifier: Apache-2.0
"""What a server allows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starkv.errors import UsageError
from starkv.runtime.kv.policy import KvPolicy

LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class ServerOptions:
    """Limits and defaults of a server. Bytes, pixels and seconds."""

    model: str
    """Name that requests ask for."""
    policy: KvPolicy
    """Which rows of the cache are kept where a request doesn't say."""
    api_key: str | None = None
    """Asked for as ``Authorization: Bearer …``; anybody may ask without one."""
    media_path: Path | None = None
    """Folder that ``file://`` images may come from; none by default."""
    most_body_bytes: int = 64 * 2**20
    most_images: int = 32
    most_image_pixels: int = 40_000_000
    """Of one image before it is resized: above 8K's 33 million."""
    most_total_body_bytes: int = 512 * 2**20
    """Of all requests in progress."""
    most_total_pixels: int = 500_000_000
    """Of all images that requests in progress had decoded: 1.5 GB as RGB."""
    most_requests: int = 256
    """Chat requests in progress: those that are read, wait, and are answered."""
    most_connections: int = 512
    most_new_tokens: int = 2048
    default_new_tokens: int = 512
    timeout_seconds: float = 300.0
    """Of a request, queueing included."""
    keep_alive_seconds: float = 15.0
    """Between comments that keep a waiting stream open."""
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("the API key is empty; leave --api-key out to serve anybody")
        if self.media_path is not None and not self.media_path.is_dir():
            raise UsageError(f"--media-path {self.media_path} is no folder")
        for name in (
            "most_body_bytes",
            "most_images",
            "most_image_pixels",
            "most_requests",
            "most_connections",
            "most_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.most_total_body_bytes < self.most_body_bytes:
            raise UsageError(
                f"all bodies together may take {self.most_total_body_bytes} bytes, less than the "
                f"{self.most_body_bytes} of one; raise --max-body-total or lower --max-body"
            )
        if self.most_total_pixels < self.most_image_pixels:
            raise UsageError(
                f"all images together may have {self.most_total_pixels} pixels, less than the "
                f"{self.most_image_pixels} of one; raise --max-pixels-total or lower --max-image-pixels"
            )
        if not self.timeout_seconds > 0:
            raise UsageError(f"the timeout must be above 0 seconds, not {self.timeout_seconds:g}")
