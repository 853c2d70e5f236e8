# SPDX-License-Identifier: Apache-2.0
"""``tiktoken.model`` → ``tokenizer.json``: a vocabulary of byte strings and ranks as merges of pairs.

tiktoken cuts a text into pieces by a pattern. A piece that is a token is that token; in any other the two
neighbours that make the token of the lowest rank are joined, again and again. ``tokenizers`` joins listed
pairs instead, so the pair that each token comes from has to be found: joining the token's own bytes by the
same rule ends with it. No text makes the token of another pair, because only the token's bytes take part.
"""

import base64
import binascii
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from starkv.errors import CheckpointError

Ranks = dict[bytes, int]
"""Token → its rank, which is its id and the order in which tokens are made."""


def read_ranks(path: Path) -> Ranks:
    """Read a file with a token in base64 and its rank in every line.

    Raises:
        CheckpointError: the file is damaged, or some byte is no token.
    """
    ranks: Ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is no tiktoken vocabulary ({error}); download it again") from None
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        raise CheckpointError(f"{path} is incomplete: bytes or ranks are missing; download it again")
    return ranks


def convert(ranks: Ranks, pattern: str, added: Sequence[tuple[int, AddedToken]]) -> Tokenizer:
    """Build the tokenizer that encodes as tiktoken does.

    Args:
        ranks: the vocabulary.
        pattern: regular expression that cuts texts into pieces.
        added: id and token of those that stand in texts as they are.

    Raises:
        CheckpointError: an added token has the id of another token, or the pattern is none.
    """
    letters = byte_letters()
    vocabulary = {_spell(token, letters): rank for token, rank in ranks.items()}
    taken = set(ranks.values())
    for number, token in added:
        if number in taken:
            raise CheckpointError(
                f"added_tokens_decoder gives {token.content} the id {number}, which another token has; take "
                "tokenizer_config.json and tiktoken.model from the same repository"
            )
        taken.add(number)
        # Being in the vocabulary is what fixes an added token's id.
        vocabulary[token.content] = number
    merges = [
        (_spell(left, letters), _spell(right, letters))
        for token in sorted(ranks, key=ranks.__getitem__)
        if (pair := last_pair(token, ranks)) is not None
        for left, right in [pair]
    ]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level(pattern)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([token for _, token in added])
    return tokenizer


def byte_level(pattern: str) -> PreTokenizer:
    """Cut texts into pieces by ``pattern`` and spell their bytes as letters.

    Raises:
        CheckpointError: the pattern is no regular expression.
    """
    try:
        expression = Regex(pattern)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer's pattern is no regular expression: {error}") from None
    split = Split(expression, behavior="isolated")
    return PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def last_pair(token: bytes, ranks: Ranks) -> tuple[bytes, bytes] | None:
    """The two tokens that ``token`` is made of, or None if it is never made of others."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right) for left, right in pairwise(parts)]
        known = [rank for rank in joined if rank is not None]
        if not known:
            return None
        at = joined.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def byte_letters() -> list[str]:
    """The letter that stands for each byte, as in GPT-2: printable ones for themselves."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [value for first, last in ranges for value in range(ord(first), ord(last) + 1)]
    letters = {value: chr(value) for value in printable}
    others = (value for value in range(256) if value not in letters)
    letters |= {value: chr(256 + index) for index, value in enumerate(others)}
    return [letters[value] for value in range(256)]


def _spell(token: bytes, letters: Sequence[str]) -> str:
    return "".join(letters[value] for value in token)
