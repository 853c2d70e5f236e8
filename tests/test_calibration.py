# SPDX-License-Identifier: Apache-2.0
"""Calibration prompts: drawn screens, a user's own, and the sequences made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from command import Command
from conftest import ChatModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_card

from starkv.calibration.held_out import held_out_prompts
from starkv.calibration.prompts import IMAGE_TOKENS, GuiPrompt, drawn_prompts, read_prompts
from starkv.calibration.replies import click_in, model_point
from starkv.calibration.screens import draw_screen
from starkv.calibration.sequences import PromptCalibration
from starkv.cli.forced_replies import reply_to
from starkv.errors import ImageError, UsageError
from starkv.export.cards import ResolvedModel, resolve_model
from starkv.manifest import PromptDialect
from starkv.runtime.actions.coordinates import Size, to_screen
from starkv.runtime.actions.parser import parse_response
from starkv.runtime.actions.pyautogui_code import parse_pyautogui
from starkv.runtime.actions.types import Click, Point
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.synthetic.suite import click_samples


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(5, 30), height=st.integers(5, 30))
@settings(max_examples=25, deadline=None)
def test_targets_are_on_the_screen_and_have_names_of_their_own(seed: int, width: int, height: int) -> None:
    screen = draw_screen(np.random.default_rng(seed), width * 28, height * 28)
    assert screen.image.size == (width * 28, height * 28)
    assert screen.targets
    assert len({target.phrase for target in screen.targets}) == len(screen.targets)
    pixels = np.asarray(screen.image)
    for target in screen.targets:
        x0, y0, x1, y1 = target.box
        assert 0 <= x0 < x1 <= width * 28
        assert 0 <= y0 < y1 <= height * 28
        assert len(np.unique(pixels[y0:y1, x0:x1].reshape(-1, 3), axis=0)) > 1


def test_a_seed_draws_one_screen() -> None:
    first, again, other = (draw_screen(np.random.default_rng(seed), 448, 280) for seed in (1, 1, 2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.targets == again.targets
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("max_pixels", [50176, 2_000_000])
def test_drawn_prompts_fit_the_model(max_pixels: int) -> None:
    prompts = drawn_prompts(6, max_pixels)
    for prompt in prompts:
        assert prompt.image.width * prompt.image.height <= min(max_pixels, IMAGE_TOKENS * 28**2)
        assert prompt.box is not None
        assert prompt.phrase in prompt.instruction
    assert len({prompt.image.size for prompt in prompts}) > 1
    assert drawn_prompts(2, max_pixels, first=4)[0].image.tobytes() == prompts[4].image.tobytes()


def test_held_out_screens_are_none_of_the_calibration(tmp_path: Path) -> None:
    model = ResolvedModel(tiny_card(max_pixels=200_000), tmp_path)
    calibration = {prompt.image.tobytes() for prompt in drawn_prompts(48, 200_000)}
    assert not calibration & {prompt.image.tobytes() for prompt in held_out_prompts(model, 8)}


def test_the_embedded_model_is_judged_by_its_test_split() -> None:
    prompts = held_out_prompts(resolve_model("gui-tiny"), 6)
    samples = [s for s in click_samples("test", 0, 40) if s.task in ("icon", "word")][:6]
    assert len(prompts) == 6
    for prompt, sample in zip(prompts, samples, strict=True):
        assert (prompt.instruction, prompt.reply, prompt.box) == (sample.question, sample.answer, sample.box)
        assert np.array_equal(np.asarray(prompt.image), sample.frames[0])
        assert prompt.phrase
        assert prompt.phrase.startswith(("the ", "'"))
        assert prompt.instruction.endswith(f" {prompt.phrase}.")


@pytest.mark.parametrize("dialect", get_args(PromptDialect))
def test_a_reply_is_read_as_a_click(dialect: PromptDialect) -> None:
    parse = parse_pyautogui if dialect == "opencua" else parse_response
    actions = parse(click_in(dialect, "the red star", 12, 345)).actions
    assert actions == (Click(Point(12, 345)),)


@given(x=st.floats(0, 799), y=st.floats(0, 599))
def test_model_points_are_on_the_same_place_of_the_screen(x: float, y: float) -> None:
    original, resized = Size(800, 600), Size(784, 588)
    for convention in ("absolute", "relative_1000"):
        point = Point(*model_point((x, y), original, resized, convention))
        back = to_screen(point, resized, original, convention)
        assert abs(back.x - x) <= 1
        assert abs(back.y - y) <= 1


def write_prompts(folder: Path, *lines: object) -> Path:
    Image.new("RGB", (64, 48), "white").save(folder / "a.png")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "prompts.jsonl").write_text("\n".join(texts) + "\n")
    return folder


LINE = {"image": "a.png", "prompt": "Click it.", "reply": "Action: click(start_box='(1,2)')"}


def test_a_users_prompts(tmp_path: Path) -> None:
    first, second = read_prompts(write_prompts(tmp_path, LINE, "", {**LINE, "box": [1, 2, 3, 4]}))
    assert (first.instruction, first.reply, first.box) == (LINE["prompt"], LINE["reply"], None)
    assert first.image.size == (64, 48)
    assert second.box == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no prompts"),
        (["{"], "prompts.jsonl, line 1 is not JSON"),
        (["7"], "line 1: the line: Input should be"),
        ([LINE, {"image": "a.png", "prompt": "x"}], "line 2: reply: Field required"),
        ([{**LINE, "answer": "x"}], "line 1: answer: Extra inputs are not permitted"),
        ([{**LINE, "box": [1, 2]}], r"line 1: box.2: Field required"),
    ],
)
def test_wrong_prompts_name_the_line(tmp_path: Path, lines: Sequence[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(write_prompts(tmp_path, *lines))


def test_missing_prompts_and_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts\.jsonl can't be read"):
        read_prompts(tmp_path)
    with pytest.raises(ImageError, match=r"b\.png does not exist"):
        read_prompts(write_prompts(tmp_path, {**LINE, "image": "b.png"}))


class Listening(OrtEngine):
    """Keeps what the decoder is fed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, threads=1)
        self.embeds: list[np.ndarray] = []
        self.ropes: list[Rope] = []

    def prefill(self, arena: object, embeds: np.ndarray, rope: Rope) -> np.ndarray:
        self.embeds.append(embeds)
        self.ropes.append(rope)
        return super().prefill(arena, embeds, rope)

    def decode(self, pool: object, embeds: np.ndarray, rope: Rope) -> np.ndarray:
        self.embeds.append(embeds.copy())
        self.ropes.append(rope)
        return super().decode(pool, embeds, rope)


def test_sequences_are_what_a_session_feeds_the_decoder(babbling: ChatModel) -> None:
    card = tiny_card()
    prompt = drawn_prompts(1, card.max_pixels)[0]
    export = babbling.checkpoint.parent / "export"
    (found,) = PromptCalibration(card, [prompt]).sequences(export)
    engine, tokenizer = Listening(babbling.engine), ChatTokenizer.from_directory(babbling.engine)
    x0, y0, x1, y1 = prompt.box or (0, 0, 0, 0)
    reply = click_in("plain", prompt.phrase, round((x0 + x1) / 2), round((y0 + y1) / 2))
    forced = [*tokenizer.encode(reply), engine.manifest.tokens.end_of_text[0]]
    reply_to(prompt, engine, tokenizer, longest=1, forced=forced)
    # The session stops at the last token, which the calibration still reads.
    fed = np.concatenate(engine.embeds)
    np.testing.assert_allclose(found.embeds[:-1], fed, atol=2e-5 * np.abs(fed).max())
    for name in ("cos", "sin"):
        tables = np.concatenate([getattr(rope, name)[0] for rope in engine.ropes])
        np.testing.assert_array_equal(getattr(found, f"rope_{name}")[:-1], tables)
    np.testing.assert_array_equal(found.embeds[-1], engine.embed(forced[-1:])[0])


def test_prompts_beyond_the_budget_are_left_out(babbling: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    card, export = tiny_card(), babbling.checkpoint.parent / "export"
    calibration = PromptCalibration(card, drawn_prompts(4, card.max_pixels))
    lengths = [len(one.embeds) for one in calibration.sequences(export)]
    assert len(lengths) == 4
    monkeypatch.setattr("starkv.calibration.sequences.MOST_TOKENS", sum(lengths[:2]))
    assert [len(one.embeds) for one in calibration.sequences(export)] == lengths[:2]
    monkeypatch.setattr("starkv.calibration.sequences.MOST_TOKENS", lengths[0] - 1)
    with pytest.raises(UsageError, match="the first calibration prompt has more than"):
        calibration.sequences(export)


def test_a_prompt_without_a_reply_needs_a_box(babbling: ChatModel) -> None:
    prompt = GuiPrompt(Image.new("RGB", (56, 56)), "Click it.")
    with pytest.raises(UsageError, match=r"'Click it\.' has neither a reply nor a box"):
        PromptCalibration(tiny_card(), [prompt]).sequences(babbling.checkpoint.parent / "export")


def test_the_digest_names_the_prompts() -> None:
    prompts = drawn_prompts(2, 50176)
    digest = PromptCalibration(tiny_card(), prompts).digest
    assert PromptCalibration(tiny_card(), drawn_prompts(2, 50176)).digest == digest
    others = [
        PromptCalibration(tiny_card(), prompts[:1]),
        PromptCalibration(tiny_card(max_pixels=40000), prompts),
        PromptCalibration(tiny_card(), drawn_prompts(2, 50176, first=1)),
    ]
    assert digest not in {other.digest for other in others}


def test_calibration_prompts_where_nothing_is_calibrated(starkv: Command, tmp_path: Path) -> None:
    outcome = starkv("build", "gui-tiny", "--quant", "int8", "--calibration", write_prompts(tmp_path, LINE))
    assert outcome.code == 2
    assert (
        "--calibration is for --quant int4-awq, --kv-quant and --kv-rank; int8 takes no prompts"
        in outcome.err
    )
    assert not list(Path.cwd().iterdir())


def test_a_users_prompts_calibrate_an_engine(starkv: Command, tmp_path: Path, babbling: ChatModel) -> None:
    folder = write_prompts(tmp_path, LINE)
    outcome = starkv("build", babbling.checkpoint, "--quant", "int4-awq", "--calibration", folder)
    assert outcome.code == 0, outcome.err
    engine = OrtEngine(Path(outcome.out.strip()), threads=1)
    assert engine.manifest.quantization.preset == "int4-awq"
