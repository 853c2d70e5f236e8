# SPDX-License-Identifier: Apache-2.0
"""Where the items of an instruction lie among its tokens, and which of them its answer has to read."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from lessons import Asked
from packed import Packed
from tokens import DONE
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def item_rows(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], text: str) -> dict[str, list[int]]:
    """Tokens of each item of a list such as "Do: 'Open', the red star."

    Args:
        tokenizer: of the tokens.
        ids: that begin with the text's.
        text: items behind a colon, commas between them, a full stop at the end. None comes twice.
    """
    end = text.index(":")
    spans = {}
    for item in text[end + 1 : -1].split(","):
        end += 1 + len(item)
        spans[item.strip()] = end - len(item.strip()), end
    rows: dict[str, list[int]] = {item: [] for item in spans}
    at = 0
    for row, token in enumerate(ids):
        length = len(tokenizer.decode([token]))
        for item, (first, behind) in spans.items():
            if at < behind and at + length > first:
                rows[item].append(row)
        at += length
        if at >= len(text):
            break
    return rows


def list_rows(
    packed: Packed,
    tokenizer: PreTrainedTokenizerFast,
    done: int,
    action: int,
    questions: Sequence[Sequence[Asked]],
) -> tuple[Tensor, Tensor]:
    """Where rows of instructions should look, ``[B, T, T]`` twice: items at the item before, and answers that
    say what comes next at the item that they copy.

    Args:
        packed: the questions.
        tokenizer: of their tokens.
        done: token behind which an answer says what comes next.
        action: token with which the click begins.
        questions: the same.
    """
    batch, length = packed.ids.shape
    follows, copies = (torch.zeros(batch, length, length, dtype=torch.bool) for _ in range(2))
    for entry, asked in enumerate(questions):
        for number, question in enumerate(asked):
            if question.task != "instruction":
                continue
            inside = torch.nonzero(packed.segments[entry] == number)[:, 0]
            ids = packed.ids[entry, inside].tolist()
            rows = item_rows(tokenizer, ids, question.text)
            items = {item: inside[own] for item, own in rows.items()}
            for before, item in pairwise(items.values()):
                follows[entry, item[:, None], before] = True
            following = question.answer.partition(DONE)[2].partition(".\n")[0]
            # The name's last token writes the full stop, which is no part of the item.
            writing = inside[ids.index(done) : ids.index(action) - 3]
            copies[entry, writing[:, None], items[following]] = True
    return follows, copies
