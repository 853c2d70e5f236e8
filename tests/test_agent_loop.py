# SPDX-License-Identifier: Apache-2.0
"""The agent's loop, with a model and an environment that do what the test says."""

from collections.abc import Sequence

import pytest
from agent_fakes import SCREEN, FakeModel, Room
from PIL import Image

from starkv.errors import EngineError, UsageError
from starkv.manifest import PromptDialect
from starkv.runtime.actions.types import Action, Click, OpenApp, Point, TypeText, Wait
from starkv.runtime.agents.environment import UnsupportedActionError
from starkv.runtime.agents.history import PastStep, past_reply, prompt_of
from starkv.runtime.agents.loop import AgentLoop, LoopSettings
from starkv.runtime.agents.steps import Outcome, Step
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.preprocess.tokenizer import Message

CLICK = "Thought: there it is.\nAction: click(start_box='(10,20)')"
SETTINGS = LoopSettings("ui_tars_computer", "absolute")


def run(
    model: FakeModel, room: Room | None = None, settings: LoopSettings = SETTINGS, **more: object
) -> tuple[Outcome, list[Step]]:
    steps: list[Step] = []
    loop = AgentLoop(
        room or Room(),
        model,
        "Find it.",
        settings,
        lambda step, screenshot: steps.append(step),
        **more,  # type: ignore[arg-type]
    )
    return loop.run(), steps


def told(messages: Sequence[Message]) -> list[str]:
    """Each turn as its role's first letter and its text, with an ``*`` for each screenshot."""
    lines = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            assert isinstance(content, list)
            content = "".join("*" if part["type"] == "image" else part["text"] for part in content)
        lines.append(f"{str(message['role'])[0]}: {content}")
    return lines


def test_actions_reach_the_environment_in_screen_pixels() -> None:
    room = Room()
    outcome, steps = run(FakeModel([CLICK, "Action: finished(content='42')"]), room)
    assert room.performed == [Click(Point(20, 40))]
    assert (outcome.reason, outcome.message, outcome.steps) == ("finished", "42", 2)
    assert outcome.success is None
    assert steps[0].actions == [{"type": "click", "model_xy": [10, 20], "screen_xy": [20, 40]}]
    assert (steps[0].thought, steps[0].performed, steps[0].error) == ("there it is.", 1, None)
    assert steps[0].timings["kv_bytes_held"] == 3 << 20


def test_several_actions_are_done_in_order_until_the_goal_is_reached() -> None:
    text = "Action: click(start_box='(1,1)')\n\ntype(content='a')\n\nwait()\n\ntype(content='b')"
    room = Room(until=3)
    outcome, steps = run(FakeModel([text]), room)
    assert room.performed == [Click(Point(2, 2)), TypeText("a"), Wait()]
    assert (outcome.reason, steps[0].performed) == ("done", 3)


def test_call_user_ends_it_and_nothing_behind_it_is_done() -> None:
    room = Room()
    text = "Action: call_user(content='a password')\n\nclick(start_box='(1,1)')"
    outcome, _ = run(FakeModel([text]), room)
    assert (outcome.reason, outcome.message, room.performed) == ("call_user", "a password", [])


def test_what_is_done_already_asks_nobody() -> None:
    model = FakeModel([CLICK])
    outcome, steps = run(model, Room(until=0))
    assert (outcome.reason, outcome.steps, steps, model.messages) == ("done", 0, [], [])


def test_steps_have_a_limit() -> None:
    outcome, steps = run(FakeModel([CLICK]), settings=LoopSettings("plain", "absolute", steps=3))
    assert (outcome.reason, outcome.steps, len(steps)) == ("steps", 3, 3)


def test_time_has_a_limit() -> None:
    now = iter([0.0, 0.0, *[4.0, 8.0] * 2, *[12.0] * 9])
    settings = LoopSettings("plain", "absolute", seconds=10)
    outcome, steps = run(FakeModel([CLICK]), settings=settings, clock=lambda: next(now))
    assert (outcome.reason, outcome.seconds) == ("time", 12.0)
    assert 0 < len(steps) < 15


def test_a_reply_that_is_no_action_is_asked_again_at_a_higher_temperature() -> None:
    parameters = SamplingParameters(temperature=0.0, seed=7)
    settings = LoopSettings("ui_tars_computer", "absolute", parameters=parameters)
    model = FakeModel(["I wonder", "click(nowhere)", CLICK, "Action: finished()"])
    _, steps = run(model, settings=settings)
    asked = [(p.temperature, p.seed) for p in model.parameters]
    assert asked == [(0.0, 7), (1.0, 8), (1.0, 9), (0.0, 7)]
    assert model.messages[0] == model.messages[1] == model.messages[2]
    assert (steps[0].retries, steps[0].text, steps[0].error) == (2, CLICK, None)
    assert [rejected.text for rejected in steps[0].rejected] == ["I wonder", "click(nowhere)"]
    # Only the reply that was read is part of the conversation.
    assert told(model.messages[-1])[3].startswith("a: Thought: there it is.")


def test_retries_end() -> None:
    room = Room()
    settings = LoopSettings("plain", "absolute", retries=2)
    model = FakeModel(["I wonder"])
    outcome, steps = run(model, room, settings)
    assert (len(model.messages), room.performed) == (3, [])
    assert outcome.reason == "unreadable"
    assert outcome.error == steps[0].error
    assert "no action" in str(outcome.error)


def test_a_warmer_model_is_not_cooled_for_a_retry() -> None:
    settings = LoopSettings("plain", "absolute", parameters=SamplingParameters(temperature=1.5))
    assert settings.sampling(1).temperature == 1.5
    assert settings.sampling(1).seed is None


def test_what_an_environment_cannot_do_is_written_down_and_it_goes_on() -> None:
    class Phone(Room):
        def perform(self, action: Action) -> None:
            if isinstance(action, OpenApp):
                raise UnsupportedActionError("no apps here")
            super().perform(action)

    room = Phone()
    text = "Action: open_app(app_name='mail')\n\nclick(start_box='(1,1)')"
    outcome, steps = run(FakeModel([text, "Action: finished()"]), room)
    assert (steps[0].error, steps[0].performed, room.performed) == ("no apps here", 0, [])
    assert outcome.reason == "finished"


def _interrupt() -> None:
    raise KeyboardInterrupt


def _fail() -> None:
    raise EngineError("out of memory")


def _crash() -> None:
    raise ZeroDivisionError("a bug")


def test_ctrl_c_ends_it_cleanly() -> None:
    outcome, steps = run(FakeModel([CLICK, _interrupt]))
    assert (outcome.reason, outcome.steps) == ("interrupted", 2)
    assert [step.error for step in steps] == [None, "interrupted"]


def test_an_error_ends_it_with_its_words() -> None:
    outcome, steps = run(FakeModel([CLICK, _fail]))
    assert (outcome.reason, outcome.error, steps[1].error) == ("error", "out of memory", "out of memory")


def test_a_bug_keeps_its_traceback_and_its_step_is_told() -> None:
    steps: list[Step] = []
    loop = AgentLoop(Room(), FakeModel([_crash]), "x", SETTINGS, lambda step, _: steps.append(step))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert steps[0].error == "ZeroDivisionError: a bug"


def test_a_prompt_has_all_answers_and_the_last_screenshots() -> None:
    model = FakeModel([f"Action: click(start_box='({n},{n})')" for n in range(9)])
    run(model, settings=LoopSettings("ui_tars_computer", "absolute", steps=5, screenshots=3))
    turns = told(model.messages[-1])
    assert turns[0] == "s: You are a helpful assistant."
    assert "Find it." in turns[1]
    boxes = [f"a: Action: click(start_box='<|box_start|>({n},{n})<|box_end|>')" for n in range(4)]
    assert turns[2:] == [boxes[0], boxes[1], "u: *", boxes[2], "u: *", boxes[3], "u: *"]
    assert [image.getpixel((0, 0)) for image in model.images[-1]] == [(3, 0, 0), (4, 0, 0), (5, 0, 0)]


def test_a_plain_prompt_shows_what_was_acted_on_in_pictures() -> None:
    class Marking(Room):
        def acted_on(self, screenshot: Image.Image, action: Action) -> Image.Image | None:
            return Image.new("RGB", SCREEN, "white") if self.looks > 1 else None

    model = FakeModel([CLICK])
    run(model, Marking(), LoopSettings("plain", "absolute", steps=3))
    assert told(model.messages[-1]) == ["u: ***Find it."]
    by_loop, by_environment, current = model.images[-1]
    assert by_environment.getpixel((0, 0)) == (255, 255, 255)
    assert len(by_loop.getcolors() or []) > 1, "a cross hair"
    assert by_loop.getpixel((199, 99)) == (1, 0, 0)
    assert current.getpixel((20, 40)) == (3, 0, 0)


@pytest.mark.parametrize("dialect", ["plain", "ui_tars_computer", "ui_tars_mobile", "opencua"])
@pytest.mark.parametrize("screenshots", [1, 2, 5])
def test_every_image_has_its_place(dialect: PromptDialect, screenshots: int) -> None:
    blank = Image.new("RGB", (8, 8))
    past = [PastStep(blank, blank, CLICK)] * 3
    messages, images = prompt_of("x", past, blank, screenshots, dialect)
    assert sum(turn.count("*") for turn in told(messages) if turn.startswith("u: *")) == len(images)
    assert len(images) == min(screenshots, 4)
    assert told(messages)[-1].startswith("u: *")


def test_past_replies_read_as_in_training() -> None:
    drag = "Action: drag(start_box='(1,2)', end_box='(3.5, 4)')"
    boxed = "drag(start_box='<|box_start|>(1,2)<|box_end|>', end_box='<|box_start|>(3.5, 4)<|box_end|>')"
    assert past_reply(drag, "ui_tars_computer") == f"Action: {boxed}"
    point = "Action: click(point='<point>1 2</point>')"
    assert past_reply(point, "ui_tars_computer") == point
    code = "Thought: so\nAction: Click it.\nCode:\n```python\npyautogui.click(x=1, y=2)\n```"
    assert past_reply(code, "opencua") == "Thought: so\nAction: Click it."
    assert past_reply("```python\npyautogui.click(x=1, y=2)\n```", "opencua").startswith("```python")
    # A page may make a model repeat what would be an image to the tokenizer.
    assert "<|image_pad|>" not in past_reply("Action: type(content='<|image_pad|>')", "ui_tars_computer")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"screenshots": 0}, "screenshots must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"seconds": 0.0}, "more than 0 seconds"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LoopSettings("plain", "absolute", **wrong)  # type: ignore[arg-type]
