# SPDX-License-Identifier: Apache-2.0
"""What the rows of a prompt are: which screenshot they belong to, and which of them an agent can't do
without."""

from collections.abc import Sequence

import numpy as np

from starkv.manifest import Manifest
from starkv.methods.rows import ROW_FRAME, PromptRows, prompt_rows
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

ATTENTION_SINKS = 4
"""First rows, which collect the attention that has nowhere to go (StreamingLLM, arXiv 2309.17453)."""
_TURN_STARTS = {
    "<|im_start|>": "",
    "<|im_system|>": "system",
    "<|im_user|>": "user",
    "<|im_assistant|>": "assistant",
}
"""Token that begins a turn → the role, where the token says it; else it is the line after the token.

The first is Qwen's, the others are OpenCUA's.
"""
_LONGEST_ROLE = 16


def describe_prompt(
    ids: Sequence[int], grids: Sequence[tuple[int, int]], manifest: Manifest, tokenizer: ChatTokenizer
) -> PromptRows:
    """Metadata of a prompt's rows.

    Worth keeping whatever their scores are, in this order: the first row, the users' words (the newest turn
    first), the system prompt, the other attention sinks.

    Args:
        ids: ``[S]`` token ids, one placeholder per image token.
        grids: rows and columns of the tokens of each screenshot, in order.
        manifest: tells the placeholder.
        tokenizer: knows how turns begin.
    """
    tokens = np.asarray(ids)
    placeholders = np.flatnonzero(tokens == manifest.tokens.image_pad)
    spans, taken = [], 0
    for rows, columns in grids:
        first = int(placeholders[taken])
        spans.append((first, first + rows * columns))
        taken += rows * columns
    plain = prompt_rows(len(ids), spans, grids)
    text_rows = np.flatnonzero(plain.row_meta[:, ROW_FRAME] < 0)
    sinks = range(min(ATTENTION_SINKS, len(ids)))
    # The first row is the sink that a model can't do without; the others' attention can go elsewhere.
    order = dict.fromkeys(sinks[:1])
    turns = _turns(ids, tokenizer)
    wanted = [turn for turn in reversed(turns) if turn[0] == "user"]
    wanted += [turn for turn in turns if turn[0] == "system"]
    for _, start, end in wanted:
        words = text_rows[(text_rows >= start) & (text_rows < end)].tolist()
        order |= dict.fromkeys(row for row in words if row not in sinks)
    return prompt_rows(len(ids), spans, grids, tuple(order | dict.fromkeys(sinks)))


def _turns(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[tuple[str, int, int]]:
    """Role, first row and end of each turn; none for templates that don't mark turns."""
    roles = {tokenizer.find_token(token): role for token, role in _TURN_STARTS.items()}
    starts = [row for row, token in enumerate(ids) if token in roles]
    turns = []
    for start, end in zip(starts, [*starts, len(ids)][1:], strict=False):
        # The role ends its line; vocabularies cut it into one token or into letters.
        head = tokenizer.decode(ids[start + 1 : start + 1 + _LONGEST_ROLE])
        turns.append((roles[ids[start]] or head.split("\n")[0].strip(), start, end))
    return turns
