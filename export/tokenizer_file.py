# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.json`` of a checkpoint: as it comes, or made from the files of older tokenizers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from starkv.errors import CheckpointError
from starkv.export.tiktoken_tokenizer import byte_level, convert, read_ranks
from starkv.export.tokenizer_source import read_pattern

TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TIKTOKEN = "tiktoken.model"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"

# How Qwen2 tokenizers cut texts: in their tokenizer.json, and in the code that reads the older files.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_tokenizer(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy ``tokenizer.json`` from one folder into another, or convert what the checkpoint has instead.

    Args:
        source: the checkpoint.
        target: an existing folder.
        config: the checkpoint's ``tokenizer_config.json``.

    Raises:
        CheckpointError: there is no tokenizer, or a damaged one.
    """
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    elif (source / _TIKTOKEN).is_file():
        _from_tiktoken(source, config).save(str(target / TOKENIZER))
    elif (source / _VOCABULARY).is_file() and (source / _MERGES).is_file():
        _from_vocabulary(source, config).save(str(target / TOKENIZER))
    else:
        raise CheckpointError(
            f"{source / TOKENIZER} is missing, and there is neither {_TIKTOKEN} nor {_VOCABULARY} with "
            f"{_MERGES} to make it from; download the whole checkpoint"
        )


def added_tokens(path: Path, config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Id and token of those that ``tokenizer_config.json`` adds to the vocabulary, in ascending order.

    Args:
        path: the file, for errors.
        config: its content.

    Raises:
        CheckpointError: the field is damaged.
    """
    try:
        entries = {int(number): entry for number, entry in config.get("added_tokens_decoder", {}).items()}
        return [(number, _added_token(entries[number])) for number in sorted(entries)]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: field added_tokens_decoder is damaged; download it again") from None


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: entry.get(name, False) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(entry["content"], special=entry.get("special", True), **flags)


def _from_tiktoken(source: Path, config: Mapping[str, Any]) -> Tokenizer:
    reference = config.get("auto_map", {}).get("AutoTokenizer")
    # The second entry would be the class of a fast tokenizer.
    name = reference[0] if isinstance(reference, list) and reference else reference
    if not isinstance(name, str):
        raise CheckpointError(
            f"{source / _CONFIG}: auto_map names no AutoTokenizer, whose pattern {_TIKTOKEN} needs; download "
            "the whole checkpoint"
        )
    added = added_tokens(source / _CONFIG, config)
    return convert(read_ranks(source / _TIKTOKEN), read_pattern(source, name), added)


def _from_vocabulary(source: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = source / _VOCABULARY
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        model = BPE.from_file(str(path), str(source / _MERGES))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} and {_MERGES} are no tokenizer ({error}); download them again"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = byte_level(_QWEN2_PATTERN)
    tokenizer.decoder = ByteLevelDecoder()
    added = added_tokens(source / _CONFIG, config)
    tokenizer.add_tokens([token for _, token in added])
    for number, token in added:
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{source / _CONFIG}: {token.content} has the id {number}, but {_VOCABULARY} holds "
                f"{len(vocabulary)} tokens before it; take both from the same repository"
            )
    return tokenizer
