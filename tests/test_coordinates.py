# SPDX-License-Identifier: Apache-2.0
"""Model coordinates to screen pixels."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starkv.manifest import CoordinateConvention
from starkv.runtime.actions.coordinates import ScreenPoint, Size, on_screen, to_json, to_screen
from starkv.runtime.actions.types import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    LongPress,
    Point,
    Scroll,
    TypeText,
    Wait,
)
from starkv.runtime.preprocess.image import smart_resize

SCREEN = Size(1920, 1080)
RESIZED = Size(1932, 1092)


def test_absolute_points_are_pixels_of_the_resized_image() -> None:
    assert to_screen(Point(966, 546), RESIZED, SCREEN, "absolute") == ScreenPoint(960, 540)
    assert to_screen(Point(193.2, 109.2), RESIZED, SCREEN, "absolute") == pytest.approx((192, 108))


def test_relative_points_do_not_depend_on_the_resize() -> None:
    for resized in (RESIZED, Size(28, 28)):
        assert to_screen(Point(500, 250), resized, SCREEN, "relative_1000") == ScreenPoint(960, 270)


@pytest.mark.parametrize("convention", ["absolute", "relative_1000"])
def test_points_past_the_edge_land_on_the_last_pixel(convention: CoordinateConvention) -> None:
    assert to_screen(Point(9999, 9999), RESIZED, SCREEN, convention) == ScreenPoint(1919, 1079)
    assert to_screen(Point(-5, -0.5), RESIZED, SCREEN, convention) == ScreenPoint(0, 0)


@given(
    width=st.integers(30, 4000),
    height=st.integers(30, 4000),
    x=st.floats(0, 0.99),
    y=st.floats(0, 0.99),
)
def test_a_pixel_survives_the_way_into_the_model_and_back(
    width: int, height: int, x: float, y: float
) -> None:
    resized_height, resized_width = smart_resize(height, width, 28, 78_400, 12_845_056)
    resized, screen = Size(resized_width, resized_height), Size(width, height)
    target = (int(x * width), int(y * height))
    seen = Point(target[0] * resized_width / width, target[1] * resized_height / height)
    assert to_screen(seen, resized, screen, "absolute") == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize("size", [Size(0, 10), Size(10, 0)])
def test_empty_sizes_are_refused(size: Size) -> None:
    with pytest.raises(ValueError, match="positive"):
        to_screen(Point(1, 1), size, SCREEN, "absolute")
    with pytest.raises(ValueError, match="positive"):
        to_screen(Point(1, 1), SCREEN, size, "absolute")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Click(Point(966, 546)), {"type": "click", "model_xy": [966, 546], "screen_xy": [960, 540]}),
        (
            DoubleClick(Point(1, 2.5)),
            {"type": "double_click", "model_xy": [1, 2.5], "screen_xy": [0.99, 2.47]},
        ),
        (LongPress(Point(0, 0)), {"type": "long_press", "model_xy": [0, 0], "screen_xy": [0, 0]}),
        (
            Drag(Point(966, 546), Point(1932, 1092)),
            {
                "type": "drag",
                "model_xy": [966, 546],
                "screen_xy": [960, 540],
                "model_end_xy": [1932, 1092],
                "screen_end_xy": [1919, 1079],
            },
        ),
        (
            Scroll("down", Point(966, 546)),
            {"type": "scroll", "direction": "down", "model_xy": [966, 546], "screen_xy": [960, 540]},
        ),
        (Scroll("up"), {"type": "scroll", "direction": "up"}),
        (Hotkey(("ctrl", "c")), {"type": "hotkey", "keys": ["ctrl", "c"]}),
        (KeyDown("shift"), {"type": "key_down", "key": "shift"}),
        (TypeText("é\n"), {"type": "type", "content": "é\n"}),
        (Finished("42"), {"type": "finished", "content": "42"}),
        (CallUser(), {"type": "call_user", "content": ""}),
        (Wait(), {"type": "wait"}),
    ],
)
def test_json_form(action: Action, expected: dict[str, object]) -> None:
    values = to_json(action, RESIZED, SCREEN, "absolute")
    assert values == expected
    assert json.loads(json.dumps(values)) == expected


def test_an_action_moves_to_the_screen_with_all_its_places() -> None:
    moved = on_screen(Drag(Point(10, 20), Point(999, 0)), Size(100, 50), Size(200, 200), "absolute")
    assert moved == Drag(Point(20, 80), Point(199, 0))
    assert on_screen(Click(Point(500, 500)), Size(1, 1), Size(80, 40), "relative_1000") == Click(
        Point(40, 20)
    )
    assert on_screen(Scroll("down"), Size(1, 1), Size(2, 2), "absolute") == Scroll("down")
