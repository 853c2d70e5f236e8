# SPDX-License-Identifier: Apache-2.0
"""``starkv validate quant``: the figures, what fails, and the command on the embedded model."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command
from conftest import ChatModel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from test_calibration import LINE, write_prompts

from starkv.calibration.prompts import GuiPrompt
from starkv.cli.forced_replies import reply_to
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.validation.quant import Answer, judge, kl_divergence, measure, sign_test
from starkv.validation.report import Check

CHECK = Check("quantization", "int4", "2 prompts", "passed", "fp32", "int4")

logits = hnp.arrays(np.float32, (3, 7), elements=st.floats(-50, 50, width=32))


@given(reference=logits, other=logits)
@settings(max_examples=60, deadline=None)
def test_divergence_is_that_of_pytorch(reference: np.ndarray, other: np.ndarray) -> None:
    expected, found = (torch.from_numpy(one).double().log_softmax(-1) for one in (reference, other))
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(reference, other), divergence.clamp_min(0).numpy(), atol=1e-9)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 1), (5, 0), (4, 4), (0, 6)])
def test_the_sign_test_counts_all_outcomes(lost: int, won: int) -> None:
    outcomes = list(itertools.product((0, 1), repeat=lost + won))
    assert sign_test(lost, won) == sum(sum(one) >= lost for one in outcomes) / len(outcomes)


def answer(
    divergences: list[float], click: tuple[float, float] | None, right: bool | None, agree: bool = True
) -> Answer:
    return Answer(np.array(divergences), np.full(len(divergences), agree), click, right)


def test_figures_over_tokens_and_prompts() -> None:
    reference = [answer([0, 0, 0], (10, 10), True), answer([0], (5, 5), False), answer([0], None, False)]
    answers = [
        answer([0.1, 0.2, 0.3], (13, 14), True, agree=False),
        answer([0.6], (5, 5), True),
        answer([0.0], None, False),
    ]
    figures = measure(reference, answers)
    assert figures["kl_mean"] == pytest.approx(1.2 / 5)
    assert figures["top1_agreement"] == pytest.approx(2 / 5)
    assert figures["same_clicks"] == pytest.approx(2 / 3)
    assert figures["click_distance"] == pytest.approx(5 / 2)
    assert (figures["tokens"], figures["prompts"]) == (5, 3)
    assert figures["clicks_right"] == pytest.approx(2 / 3)
    assert figures["reference_clicks_right"] == pytest.approx(1 / 3)
    assert (figures["clicks_lost"], figures["clicks_won"]) == (0, 1)


def test_clicks_are_not_judged_where_no_box_is_known() -> None:
    figures = measure([answer([0], None, None)], [answer([0.1], (1, 1), None)])
    assert not {"clicks_right", "clicks_lost", "click_distance"} & figures.keys()
    assert judge(CHECK, figures).status == "passed"


@pytest.mark.parametrize(
    ("divergence", "lost", "won", "kept", "reason"),
    [
        (0.09, 0, 0, 20, ""),
        (0.11, 0, 0, 20, "mean KL divergence 0.11 is above 0.1"),
        (float("nan"), 0, 0, 20, "mean KL divergence nan is above 0.1"),
        # Four losses of four are likelier than one in twenty, five are not.
        (0.0, 4, 0, 20, ""),
        (0.0, 5, 0, 20, "5 right clicks lost and 0 won"),
        (0.0, 9, 4, 20, ""),
        (0.0, 4, 9, 20, ""),
        # Certain, but too few of all prompts to matter.
        (0.0, 8, 0, 800, ""),
        (0.0, 8, 0, 700, "8 right clicks lost and 0 won"),
    ],
)
def test_what_fails(divergence: float, lost: int, won: int, kept: int, reason: str) -> None:
    both = [(True, False)] * lost + [(False, True)] * won + [(True, True)] * kept
    reference = [answer([0.0], (0, 0), before) for before, _ in both]
    answers = [answer([divergence], (0, 0), after) for _, after in both]
    judged = judge(CHECK, measure(reference, answers))
    assert (judged.reason, judged.status) == (reason, "failed" if reason else "passed")


def test_a_forced_reply_is_read_as_an_own_one(babbling: ChatModel) -> None:
    """The engine's own reply, said to it token by token, has the same logits; another one has others."""
    engine, tokenizer = OrtEngine(babbling.engine, threads=1), ChatTokenizer.from_directory(babbling.engine)
    pixels = np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8)
    prompt = GuiPrompt(Image.fromarray(pixels), "click the red star")
    own = reply_to(prompt, engine, tokenizer, longest=6)
    assert len(own.tokens) == 6
    forced = reply_to(prompt, engine, tokenizer, longest=1, forced=own.tokens)
    np.testing.assert_array_equal(forced.logits, own.logits)
    assert forced.understood.text == own.understood.text
    other = [own.tokens[0], *(token + 1 for token in own.tokens[1:])]
    read = reply_to(prompt, engine, tokenizer, longest=1, forced=other).logits
    np.testing.assert_array_equal(read[:2], own.logits[:2])
    assert np.abs(read[2] - own.logits[2]).max() > 1e-3


def test_the_command_on_the_embedded_model(
    starkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARKV_ENGINES", str(tmp_path / "engines"))
    arguments = ("validate", "quant", "gui-tiny", "--quant", "int8", "--quant", "int4", "--count", 8)
    outcome = starkv(*arguments, "--json", "--out", tmp_path / "report.json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["command"] == "validate quant"
    int8, int4 = report["checks"]
    assert (int8["implementation"], int8["reference"], int8["dtype"]) == ("int8", "fp32", "int8")
    assert 0 < int8["measures"]["kl_mean"] < int4["measures"]["kl_mean"] < 0.1
    assert int8["measures"]["bits_per_weight"] > int4["measures"]["bits_per_weight"]
    files = list((tmp_path / "engines" / "gui-tiny-ort-int4").iterdir())
    assert int4["measures"]["bytes"] == sum(path.stat().st_size for path in files)

    table = starkv(*arguments, "--prompts", write_prompts(tmp_path, LINE))
    assert table.code == 0, table.err
    assert "gui-tiny against fp32: 1 prompts" in " ".join(table.out.split())
    assert "2 passed, 0 failed" in table.err


def test_a_loss_ends_with_code_1(starkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARKV_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr("starkv.validation.quant.MOST_KL", {"int8": 1e-9})
    outcome = starkv("validate", "quant", "gui-tiny", "--quant", "int8", "--count", 2)
    assert outcome.code == 1
    assert "int8: mean KL divergence" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quant", "int3"), "unknown quantization 'int3'"),
        (("--quant", "fp32"), "--quant fp32 would be compared with itself"),
        (("--reference", "half"), "unknown quantization 'half'"),
    ],
)
def test_wrong_options_are_one_line(starkv: Command, options: tuple[str, ...], message: str) -> None:
    outcome = starkv("validate", "quant", "gui-tiny", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert not list(Path.cwd().iterdir())
