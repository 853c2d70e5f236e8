# SPDX-License-Identifier: Apache-2.0
"""Where the time and the memory of one reply went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass
class Timings:
    """Where the time and the memory of one reply went. Times in milliseconds."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    compress_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_tokens: int = 0
    image_tokens: int = 0
    generated_tokens: int = 0
    kv_tokens_full: int = 0
    """Rows that the prompt filled before compression."""
    kv_tokens_kept: float = 0
    """Rows left of them, mean over the layers: a method may give layers different budgets."""
    kv_bytes_full: int = 0
    """Bytes of the prompt's rows before compression."""
    kv_bytes_kept: int = 0
    """Bytes of the rows left of them."""
    kv_bytes_held: int = 0
    """Bytes of the valid rows after the reply: those and the generated tokens'."""
    kv_bytes_waiting: int = 0
    """Stream mode: bytes in host memory of the newest screenshot's rows that the reply does without and the
    next turn is read behind."""
    kv_bytes_reserved: int = 0
    """Bytes allocated at the peak: for the prompt, whose memory goes back before the reply, for chosen rows
    before they are packed, and for the reply."""

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to ``{stage}_ms``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = f"{stage}_ms"
            setattr(self, name, getattr(self, name) + (time.perf_counter() - started) * 1e3)

    @property
    def prefill_per_second(self) -> float:
        return 1e3 * self.prompt_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_per_second(self) -> float:
        """Tokens per second of the decode steps; the first token comes from the prefill."""
        return 1e3 * (self.generated_tokens - 1) / self.decode_ms if self.decode_ms else 0.0

    def to_json(self) -> dict[str, float]:
        """All figures, and tokens per second."""
        return {
            **{name: round(value, 3) for name, value in asdict(self).items()},
            "prefill_per_second": round(self.prefill_per_second, 2),
            "decode_per_second": round(self.decode_per_second, 2),
        }
