# SPDX-License-Identifier: Apache-2.0
"""M-RoPE positions and rotary tables against Hugging Face's Qwen2.5-VL."""

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv.manifest import TextShape
from starkv.runtime.preprocess.positions import (
    multimodal_positions,
    prompt_positions,
    rope_tables,
    text_positions,
)

TEXT, VISION_START, IMAGE_PAD, VISION_END = 1, 2, 3, 4


def text_shape(mrope_section: list[int] | None, head_dim: int = 128) -> TextShape:
    return TextShape(
        layers=1,
        hidden=32,
        intermediate=32,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        vocab=10,
        rope_theta=1_000_000.0,
        mrope_section=mrope_section,
        max_positions=128_000,
        tied_embedding=False,
    )


def prompt(*parts: int | tuple[int, int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and merged grids: a number is that much text, a pair is an image between its markers."""
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, tuple):
            ids += [VISION_START, *[IMAGE_PAD] * (part[0] * part[1]), VISION_END]
            grids.append(part)
        else:
            ids += [TEXT] * part
    return ids, grids


@pytest.fixture(scope="module")
def huggingface() -> Any:
    """HF's position function; it reads nothing of the model but two numbers of its config."""
    torch = importlib.import_module("torch")
    modeling = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    from types import SimpleNamespace

    class Positioner:
        config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
        get_vision_position_ids = modeling.Qwen2_5_VLModel.get_vision_position_ids
        get_rope_index = modeling.Qwen2_5_VLModel.get_rope_index

    def positions(ids: list[int], grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
        tokens = torch.tensor([ids])
        grid_thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
        values, delta = Positioner().get_rope_index(tokens, (tokens == IMAGE_PAD).int(), grid_thw)
        return values[:, 0].numpy(), int(delta) + len(ids)

    return positions


def test_prompt_positions_count_as_the_model_does() -> None:
    ids, grids = prompt(5, (4, 6), 3)
    multimodal = prompt_positions(ids, IMAGE_PAD, grids, text_shape([16, 24, 24]))
    np.testing.assert_array_equal(multimodal.values, multimodal_positions(ids, IMAGE_PAD, grids).values)
    assert multimodal.next_position == len(ids) - 4 * 6 + 6

    counted = prompt_positions(ids, IMAGE_PAD, grids, text_shape(None))
    np.testing.assert_array_equal(counted.values, [range(len(ids))] * 3)
    assert counted.next_position == len(ids)


@pytest.mark.parametrize(
    "parts",
    [
        (7,),
        (5, (4, 6), 3),
        (5, (9, 2), 3),
        ((3, 3),),
        (2, (4, 6), 7, (10, 3), 1, (1, 1), 4),
        (2, (4, 6), (6, 4), 3),
    ],
)
def test_positions_equal_huggingface(huggingface: Any, parts: tuple[int | tuple[int, int], ...]) -> None:
    ids, grids = prompt(*parts)
    expected, next_position = huggingface(ids, grids)
    ours = multimodal_positions(ids, IMAGE_PAD, grids)
    np.testing.assert_array_equal(ours.values, expected)
    assert ours.next_position == next_position
    assert ours.values.dtype == np.int32


@settings(deadline=None, max_examples=50)
@given(
    parts=st.lists(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 8), st.integers(1, 8))), max_size=6),
    split=st.integers(0, 5),
)
def test_a_continued_sequence_has_the_positions_of_the_whole(
    parts: list[int | tuple[int, int]], split: int
) -> None:
    """Stream mode appends a screenshot at ``next_position``; nothing may depend on where the cut was."""
    ids, grids = prompt(*parts)
    whole = multimodal_positions(ids, IMAGE_PAD, grids)
    head_ids, head_grids = prompt(*parts[:split])
    tail_ids, tail_grids = prompt(*parts[split:])
    head = multimodal_positions(head_ids, IMAGE_PAD, head_grids)
    tail = multimodal_positions(tail_ids, IMAGE_PAD, tail_grids, start=head.next_position)
    np.testing.assert_array_equal(np.concatenate([head.values, tail.values], axis=1), whole.values)
    assert tail.next_position == whole.next_position


def test_an_image_advances_by_its_longer_side_only() -> None:
    ids, grids = prompt((39, 69))
    assert multimodal_positions(ids, IMAGE_PAD, grids).next_position == 1 + 69 + 1


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([3, 3, 3], [(2, 2)], "3 image tokens"),
        ([1, 3], [], "1 image tokens"),
        ([3, 3, 1, 3, 3], [(2, 2)], "not one run"),
    ],
)
def test_placeholders_that_do_not_fit_the_grids_are_refused(
    ids: list[int], grids: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multimodal_positions(ids, IMAGE_PAD, grids)


@pytest.mark.parametrize("section", [[16, 24, 24], [2, 3, 3], [1, 1, 1, 1, 2, 2]])
def test_rope_tables_equal_huggingface(section: list[int]) -> None:
    torch = importlib.import_module("torch")
    modeling = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    transformers = importlib.import_module("transformers")
    shape = text_shape(section, head_dim=2 * sum(section))
    config = transformers.Qwen2_5_VLConfig().text_config
    config.head_dim = shape.head_dim
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": shape.rope_theta,
        "mrope_section": section,
    }
    positions = np.random.default_rng(0).integers(0, 4000, (3, 2, 50))
    expected = modeling.Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    ours = rope_tables(positions, shape)
    pairs = shape.head_dim // 2
    for table, reference in zip(ours, expected, strict=True):
        assert table.shape == (2, 50, pairs)
        assert table.dtype == np.dtype(np.float32)
        # PyTorch's power differs in the last bit for some frequencies; a position multiplies that bit.
        np.testing.assert_allclose(table, reference.numpy()[..., :pairs], rtol=0, atol=5e-5)
        np.testing.assert_array_equal(reference.numpy()[..., :pairs], reference.numpy()[..., pairs:])


def test_rotation_with_the_half_table_equals_huggingface_rotation() -> None:
    """The layout that a non-interleaved RotaryEmbedding reads: pair i is channels i and i + D/2."""
    torch = importlib.import_module("torch")
    modeling = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    shape = text_shape([2, 3, 3], head_dim=16)
    ids, grids = prompt(3, (4, 6), 2)
    cos, sin = rope_tables(multimodal_positions(ids, IMAGE_PAD, grids).values, shape)
    query = np.random.default_rng(1).standard_normal((1, 4, len(ids), 16)).astype(np.float32)
    first, second = query[..., :8], query[..., 8:]
    c, s = cos[:, None], sin[:, None]
    ours = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    double = [torch.from_numpy(np.concatenate([table, table], axis=-1)) for table in (cos, sin)]
    expected, _ = modeling.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(query), *double)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_without_sections_every_pair_reads_the_first_position() -> None:
    positions = np.stack([np.arange(6), np.arange(6) * 7, np.arange(6) * 11])
    plain, _ = rope_tables(positions, text_shape(None))
    counted, _ = rope_tables(text_positions(6).values, text_shape([16, 24, 24]))
    assert plain.shape == (1, 6, 64)
    np.testing.assert_array_equal(plain, counted)
    mixed, _ = rope_tables(positions, text_shape([16, 24, 24]))
    np.testing.assert_array_equal(mixed[..., :16], plain[..., :16])
    assert not np.array_equal(mixed[..., 16:], plain[..., 16:])


def test_sections_that_do_not_cover_the_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="does not add up"):
        rope_tables(text_positions(2).values, text_shape([16, 24, 23]))
