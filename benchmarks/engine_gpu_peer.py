# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on the GPU at UI-TARS-1.5-7B's sizes: the text decoder with random bfloat16."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starkv.export.cards import config_of_card, load_card

PROMPT_ROWS, ROUNDS = 512, 5


def transformers_rates(tokens: int) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Prefill of 512 rows and decode behind them: figures and rows of a table; none where it is missing."""
    try:
        import torch
        from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    except ImportError:
        return {}, []
    config = Qwen2_5_VLConfig.from_json_file(config_of_card(load_card("ui-tars-1.5-7b")))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.ones(1, PROMPT_ROWS, dtype=torch.long, device="cuda")

    def timed(work: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def decode(past: Any) -> None:
        token = ids[:, :1]
        for _ in range(tokens):
            step = model(input_ids=token, past_key_values=past, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)

    prefills, decodes = [], []
    with torch.inference_mode():
        for index in range(ROUNDS + 1):
            past = DynamicCache(config=model.config.get_text_config())
            seconds = timed(partial(model, input_ids=ids, past_key_values=past, use_cache=True))
            step_seconds = timed(partial(decode, past))
            if index:  # the first round warms up
                prefills.append(PROMPT_ROWS / seconds)
                decodes.append(tokens / step_seconds)
    peak = torch.cuda.max_memory_allocated()
    figures = {"prefill": prefills, "decode": decodes, "peak_bytes": peak}
    rows = [
        (f"transformers bfloat16, pp{PROMPT_ROWS}", f"{statistics.median(prefills):,.1f}", ""),
        (
            f"transformers bfloat16, tg{tokens} @ d{PROMPT_ROWS}",
            f"{statistics.median(decodes):,.1f}",
            f"card {peak / 2**30:.2f} GiB",
        ),
    ]
    return figures, rows
