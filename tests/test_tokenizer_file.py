# SPDX-License-Identifier: Apache-2.0
"""Tokenizers made from older files encode as the programs do that these files were made for."""

import base64
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from starkv.errors import CheckpointError
from starkv.export.tiktoken_tokenizer import Ranks, byte_letters, convert, last_pair, read_ranks
from starkv.export.tokenizer_file import write_tokenizer

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Kimi's: Chinese characters apart, words cut where their case changes, at most three digits.
_UPPER, _LOWER = (rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL = {1000: "[EOS]", 1001: "<|im_end|>", 1005: "<|media_placeholder|>"}
TEXTS = [
    "Click the 'Save As…' button, don't wait.\r\n\r\n  pyautogui.click(x=1443, y=343)\n",
    "点击右上角的按钮 then type 世界abcDEF; größer Ünïcödé ĳ",
    "👩‍👩‍👧‍👦 🤖🤖 नमस्ते العربية 한국어 ไทย e\u0301 \u00a0\u2003x\t\t\n y",
    "HTTPServer2024 snake_case camelCase I'LL they'Re 12345678",
    "",
]


def trained_ranks(seed: int) -> Ranks:
    """A vocabulary as byte-pair encoding makes it, from random words."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdeé点世 ", k=source.randint(2, 9))) for _ in range(80)]
    corpus = [" ".join(source.choices([*words, *TEXTS], k=40)) for _ in range(20)]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    values = {letter: value for value, letter in enumerate(byte_letters())}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(values[letter] for letter in token): rank for token, rank in by_id}


def arbitrary_ranks(seed: int) -> Ranks:
    """A vocabulary that no training would give: some tokens can't be made of others, ranks are shuffled."""
    source = random.Random(seed)
    tokens = {bytes([value]) for value in range(256)}
    while len(tokens) < 600:
        tokens.add("".join(source.choices("ab é", k=source.randint(2, 6))).encode())
    shuffled = sorted(tokens)
    source.shuffle(shuffled)
    return {token: rank for rank, token in enumerate(shuffled)}


def encode_piece(piece: bytes, ranks: Ranks) -> list[int]:
    """The rule of tiktoken, word for word."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([value]) for value in piece]
    while True:
        candidates = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not candidates:
            return [ranks[part] for part in parts]
        _, at = min(candidates)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


VOCABULARIES = {
    f"{make.__name__} {seed}": make(seed) for make in (trained_ranks, arbitrary_ranks) for seed in range(3)
}


@pytest.mark.parametrize("ranks", VOCABULARIES.values(), ids=VOCABULARIES.keys())
@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("abcdeé点世 ")) | st.text())
def test_every_piece_is_encoded_by_tiktokens_rule(ranks: Ranks, text: str) -> None:
    tokenizer = _whole_piece_tokenizer(ranks)
    ids = tokenizer.encode(text).ids
    assert ids == (encode_piece(text.encode(), ranks) if text else [])
    assert tokenizer.decode(ids) == text


_built: dict[int, Tokenizer] = {}


def _whole_piece_tokenizer(ranks: Ranks) -> Tokenizer:
    """Any text is one piece."""
    if id(ranks) not in _built:
        _built[id(ranks)] = convert(ranks, r"[\s\S]+", [])
    return _built[id(ranks)]


@pytest.mark.parametrize("pattern", [QWEN2_PATTERN, KIMI_PATTERN], ids=["Qwen2", "Kimi"])
def test_whole_texts_are_encoded_as_by_tiktoken(pattern: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks(7)
    special = {content: number for number, content in SPECIAL.items()}
    reference = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    added = [(number, AddedToken(content, special=True)) for number, content in SPECIAL.items()]
    tokenizer = convert(ranks, pattern, added)
    source = random.Random(0)
    letters = "aZé'sS点 \n\r\t12，.<|[]\u3000ǅʰ\u0301🤖"
    noise = ["".join(source.choices(letters, k=source.randint(1, 30))) for _ in range(500)]
    framed = [f"{text}<|im_end|>{text}[EOS] <|media_placeholder|>" for text in TEXTS]
    for text in [*TEXTS, *noise, *framed]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text, allowed_special="all"), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_token_comes_from_the_pair_that_is_joined_last() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {
        b"bc": 256,
        b"ab": 257,
        b"abc": 258,
        b"xyz": 259,
    }
    assert last_pair(b"abc", ranks) == (b"a", b"bc")
    assert last_pair(b"xyz", ranks) is None


TOKENIZER_CODE = '''
import os
raise RuntimeError("this file must not be run")

class Base(Tokenizer):
    pat_str: str = "|".join([r"""[\\p{Han}]+""", " ?" + r"\\w+", r"""[\\s\\S]"""])

class Special(Base):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
'''


def write_checkpoint(folder: Path, reference: Any = "tokenization_opencua.Special") -> dict[str, Any]:
    """A checkpoint with a tiktoken vocabulary; returns its tokenizer_config.json."""
    folder.mkdir()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in trained_ranks(1).items()]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenization_opencua.py").write_text(TOKENIZER_CODE)
    decoder = {str(number): {"content": content, "special": True} for number, content in SPECIAL.items()}
    return {"added_tokens_decoder": decoder, "auto_map": {"AutoTokenizer": reference}}


@pytest.mark.parametrize(
    "reference",
    [
        ["tokenization_opencua.Special", None],
        "tokenization_opencua.Base",
        ["xlangai/OpenCUA-7B--tokenization_opencua.Special", None],
    ],
)
def test_tiktoken_files_are_converted_without_running_their_code(tmp_path: Path, reference: Any) -> None:
    config = write_checkpoint(tmp_path / "checkpoint", reference)
    write_tokenizer(tmp_path / "checkpoint", tmp_path, config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for number, content in SPECIAL.items():
        assert tokenizer.token_to_id(content) == number
        assert tokenizer.encode(f"a{content}b").ids[1] == number
        assert tokenizer.decode([number]) == ""
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("点世ab cd!")]
    assert pieces == [_letters("点世"), "ab", "Ġcd", "!"]


def _letters(text: str) -> str:
    return "".join(byte_letters()[value] for value in text.encode())


def damage_vocabulary(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tiktoken.model").write_text("IQ== 0\nno line\n")


def drop_bytes(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tiktoken.model").write_text("IQ== 0\n")


def drop_code(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenization_opencua.py").unlink()


def computed_pattern(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenization_opencua.py").write_text("class Special:\n    pat_str = make()\n")


def no_python(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenization_opencua.py").write_text("<html>")


def no_reference(folder: Path, config: dict[str, Any]) -> None:
    del config["auto_map"]


def path_as_reference(folder: Path, config: dict[str, Any]) -> None:
    config["auto_map"] = {"AutoTokenizer": "../../secret.Special"}


def colliding_token(folder: Path, config: dict[str, Any]) -> None:
    config["added_tokens_decoder"]["17"] = {"content": "[BOS]"}


def no_expression(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenization_opencua.py").write_text("class Special:\n    pat_str = '('\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_vocabulary, r"tiktoken\.model is no tiktoken vocabulary"),
        (drop_bytes, r"tiktoken\.model is incomplete"),
        (drop_code, r"tokenization_opencua\.py is missing"),
        (computed_pattern, "class Special has no pat_str made of literals"),
        (no_python, r"tokenization_opencua\.py is not readable Python"),
        (no_reference, "auto_map names no AutoTokenizer"),
        (path_as_reference, "which is no module and class"),
        (colliding_token, r"gives \[BOS\] the id 17, which another token has"),
        (no_expression, "pattern is no regular expression"),
    ],
)
def test_damaged_tiktoken_files_are_named(
    tmp_path: Path, damage: Callable[[Path, dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    config = write_checkpoint(folder)
    damage(folder, config)
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(folder, tmp_path, config)
    assert not (tmp_path / "tokenizer.json").exists()


def test_vocabulary_and_merges_are_converted_as_by_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    ranks = trained_ranks(3)
    (tmp_path / "vocab.json").write_text(json.dumps({_spell(token): rank for token, rank in ranks.items()}))
    pairs = [pair for token in ranks if (pair := last_pair(token, ranks))]
    lines = [f"{_spell(left)} {_spell(right)}" for left, right in pairs]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    # Qwen2 puts the tokens it adds right behind the vocabulary.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    decoder = {str(len(ranks) + index): {"content": content} for index, content in enumerate(special)}

    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path, tmp_path / "out", {"added_tokens_decoder": decoder})
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    reference = Qwen2Tokenizer(
        vocab=str(tmp_path / "vocab.json"),
        merges=str(tmp_path / "merges.txt"),
        additional_special_tokens=special,
    )
    for text in [*TEXTS, *(f"<|im_start|>{text}<|im_end|>" for text in TEXTS)]:
        ids = tokenizer.encode(text).ids
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def _spell(token: bytes) -> str:
    return "".join(byte_letters()[value] for value in token)


def test_added_tokens_that_dont_follow_the_vocabulary_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "out").mkdir()
    config = {"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}}
    with pytest.raises(CheckpointError, match=r"<\|im_end\|> has the id 9, but vocab\.json holds 3 tokens"):
        write_tokenizer(tmp_path, tmp_path / "out", config)


def test_a_checkpoint_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json is missing, and there is neither tiktoken\.model"
    ):
        write_tokenizer(tmp_path, tmp_path, {})


def test_ranks_are_read_as_tiktoken_reads_them(tmp_path: Path) -> None:
    load = pytest.importorskip("tiktoken.load")
    write_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "tiktoken.model"
    assert read_ranks(path) == load.load_tiktoken_bpe(str(path))
