# SPDX-License-Identifier: Apache-2.0
"""Requests as they come over the wire. Fields that nobody knows are let through: clients send many."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ImageUrl(_Tolerant):
    """Where an image is: a data URI, plain base64, or a ``file://`` URL where the server allows it."""

    url: str


class TextContent(_Tolerant):
    type: Literal["text"]
    text: str


class ImageContent(_Tolerant):
    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain_string(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(_Tolerant):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Content] | None = None


class StreamOptions(_Tolerant):
    include_usage: bool = False


class ChatRequest(_Tolerant):
    """Body of ``POST /v1/chat/completions``."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    session_id: str | None = Field(default=None, min_length=1, max_length=200)
    """Stream mode: go on from this session's compacted cache."""
    kv_budget: float | None = Field(default=None, gt=0, le=1)
    kv_capacity: int | None = Field(default=None, ge=2)
    kv_method: str | None = None
    kv_packed: bool | None = None
    """Whether kept rows are packed; by default where the engine can."""

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of the reply, by either of OpenAI's names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
