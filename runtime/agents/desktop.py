# SPDX-License-Identifier: Apache-2.0
"""The environment ``desktop``: a drawn screen that answers to clicks and keys, and judges its goal."""

from PIL import Image

from starkv.errors import UsageError
from starkv.runtime.actions.types import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    LongPress,
    Press,
    RightClick,
    Scroll,
    Select,
    TripleClick,
    TypeText,
    Wait,
)
from starkv.runtime.agents.environment import Environment, EnvironmentOptions, UnsupportedActionError
from starkv.synthetic.desktop import random_desktop
from starkv.synthetic.desktop_drawing import draw_desktop
from starkv.synthetic.desktop_goals import random_goal

SIZE = (448, 448)
"""Height and width in pixels: those of the drawn episodes that models are asked about."""
ELEMENTS = (8, 18)
"""Fewest and most at the beginning."""
GOAL_STEPS = 4
# They reach the desktop and change nothing on it.
_WITHOUT_EFFECT = (RightClick, Hover, LongPress, Drag, Select, KeyDown, KeyUp, Scroll, Wait)


class DesktopEnvironment(Environment):
    """A drawn desktop. Its goal, "Do: 'Open', 'Save', the red star.", is reached when these were clicked in
    order, and missed with the first other element that is clicked.

    Args:
        options: only the seed counts.

    Raises:
        UsageError: the user set a goal of their own, or a page, or the seed is negative.
    """

    def __init__(self, options: EnvironmentOptions) -> None:
        if options.goal is not None:
            raise UsageError("the desktop sets its own goal by --seed; leave --goal out")
        if options.url is not None:
            raise UsageError("the desktop shows no pages; leave --url out, or use --environment browser")
        if options.seed < 0:
            raise UsageError(f"the seed of a desktop must be at least 0, not {options.seed}")
        self.desktop = random_desktop(options.seed, *SIZE, *ELEMENTS)
        self.judged = random_goal(self.desktop, GOAL_STEPS)
        self.goal = str(self.judged)

    def screenshot(self) -> Image.Image:
        return Image.fromarray(draw_desktop(self.desktop))

    def acted_on(self, screenshot: Image.Image, action: Action) -> Image.Image | None:
        # The mark that earlier screenshots of drawn episodes have.
        clicked = self.desktop.at(action.point.x, action.point.y) if isinstance(action, Click) else None
        return Image.fromarray(draw_desktop(self.desktop, clicked.box)) if clicked else None

    def perform(self, action: Action) -> None:
        match action:
            case Click(point) | DoubleClick(point) | TripleClick(point):
                self.desktop, press = self.desktop.press(point.x, point.y)
                if press.name:
                    self.judged = self.judged.after(press.name)
            case TypeText(content):
                self.desktop = self.desktop.type(content)
            case Press(key):
                self.desktop = self.desktop.key(key)
            case Hotkey(keys):
                if len(keys) == 1:
                    self.desktop = self.desktop.key(keys[0])
            case _ if isinstance(action, _WITHOUT_EFFECT):
                pass
            case _:
                raise UnsupportedActionError(f"a drawn desktop has no {type(action).__name__}")

    def done(self) -> bool:
        return self.judged.next_step is None

    def succeeded(self) -> bool:
        return self.judged.fulfilled
