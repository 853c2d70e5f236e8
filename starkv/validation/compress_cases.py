# SPDX-License-Identifier: Apache-2.0
"""Random prompts with screenshots, at the sizes of real models, for checks and benchmarks of ``Compress``."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starkv.kernels.compress_call import CompressCall
from starkv.methods.budget import Budget
from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import StarKVProgress, plan_step
from starkv.methods.star_kv_request import StarKVRequest, request_star_kv
from starkv.methods.star_kv_state import StarKVState

_BEFORE, _BETWEEN, _AFTER = 90, 10, 50
"""Rows of text: system prompt and instruction, between screenshots, and the generation prompt."""


@dataclass(frozen=True)
class Heads:
    """Attention of a model."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


UI_TARS_7B = Heads(layers=28, query_heads=28, kv_heads=4, head_dim=128)


@dataclass(frozen=True)
class CompressSize:
    """A prompt's size and a budget."""

    name: str
    heads: Heads
    grid: tuple[int, int]
    """Rows and columns of a screenshot's tokens."""
    screenshots: int = 1
    budget: float = 0.2
    """Share of the rows to keep."""

    @property
    def prompt(self) -> PromptRows:
        """What the rows are."""
        cells, spans, row = self.grid[0] * self.grid[1], [], _BEFORE
        for _ in range(self.screenshots):
            spans.append((row, row + cells))
            row += cells + _BETWEEN
        return prompt_rows(row + _AFTER, spans, [self.grid] * self.screenshots, range(_BEFORE))


@dataclass(frozen=True)
class CompressCase:
    """One prompt, what to do with it, and a state as after an earlier prompt of the same size."""

    size: CompressSize
    config: StarKVConfig
    prefill: Prefill
    request: StarKVRequest
    state: StarKVState

    def call(self, in_place: bool = False) -> CompressCall:
        """The operator's call; its destination is a pool's second slot, or the cache itself."""
        prefill = self.prefill
        layers, batch, groups, _, dim = prefill.keys.shape
        plan, limits = self.request.plan, self.request.limits
        parts = (self.config.pooling, self.config.kernel)
        if in_place:
            own = replace(prefill, keys=prefill.keys.clone(), values=prefill.values.clone())
            meta = prefill.row_meta.clone()
            own = replace(own, row_meta=meta)
            slot = torch.arange(batch, dtype=torch.int32)
            return CompressCall.of(own, self.state, plan, limits, (own.keys, own.values, meta), slot, *parts)
        rows = -(-self.request.most_rows // 64) * 64
        keys = prefill.keys.new_zeros(layers, batch + 1, groups, rows, dim)
        meta = torch.full((layers, batch + 1, rows, 4), -1, dtype=torch.int32, device=keys.device)
        destination = (keys, torch.zeros_like(keys), meta)
        slot = torch.arange(batch, dtype=torch.int32) + 1
        return CompressCall.of(prefill, self.state, plan, limits, destination, slot, *parts)


def make_case(
    size: CompressSize,
    config: StarKVConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> CompressCase:
    """A random cache whose attention is uneven, so that selection has something to find.

    Args:
        size: of model and prompt.
        config: of STaR-KV.
        dtype: of the cache.
        device: where to.
        seed: the same numbers on any machine with the same device kind.
    """
    heads, prompt = size.heads, size.prompt
    random = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(heads.layers, 1, *shape, generator=random, device=device)

    kept = Budget(ratio=size.budget).rows(prompt.length)
    state = _earlier_state(heads, prompt, config, draw)
    request = request_star_kv(config, prompt, kept, state.progress, config.window)
    assert isinstance(request.prompt, PromptRows)
    keys = (1.5 * draw(heads.kv_heads, prompt.length, heads.head_dim)).to(dtype)
    prefill = Prefill.of_prompt(
        keys=keys,
        values=draw(heads.kv_heads, prompt.length, heads.head_dim).to(dtype),
        queries=draw(heads.query_heads, request.window, heads.head_dim).to(dtype),
        rows=request.prompt,
        window=request.window,
        hidden_norm=1.0 + draw(prompt.length).abs(),
        protect=request.protected,
    )
    # Metadata of their own for every layer, as an arena has them.
    prefill = replace(prefill, row_meta=prefill.row_meta.contiguous())
    return CompressCase(size, config, prefill, request, state)


def _earlier_state(heads: Heads, prompt: PromptRows, config: StarKVConfig, draw: object) -> StarKVState:
    """State after one prompt like this, with random memory: all parts of the method act on the next one."""
    assert callable(draw)
    frame = prompt.newest_frame(config.window)
    _, progress = plan_step(config, StarKVProgress(), frame)
    pattern = draw(heads.kv_heads, max(1, frame.cells)).abs()
    return StarKVState(
        progress=progress,
        mi_ema=draw(heads.kv_heads).abs(),
        pattern_ema=pattern / pattern.sum(-1, keepdim=True),
        temperature=1.0 + 0.1 * draw(1)[..., 0],
    )
