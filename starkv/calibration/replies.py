# SPDX-License-Identifier: Apache-2.0
"""How models of each prompt dialect say that they click."""

from starkv.manifest import CoordinateConvention, PromptDialect
from starkv.runtime.actions.coordinates import Size


def click_in(dialect: PromptDialect, phrase: str, x: int, y: int) -> str:
    """A reply that clicks.

    Args:
        dialect: of the model.
        phrase: what is clicked, such as ``the red star``.
        x: in the model's coordinates.
        y: likewise.
    """
    if dialect == "opencua":
        code = f"```python\npyautogui.click(x={x}, y={y})\n```"
        return f"## Action:\nClick {phrase}.\n\n## Code:\n{code}"
    action = f"Action: click(start_box='({x},{y})')"
    if dialect in ("ui_tars_computer", "ui_tars_mobile"):
        return f"Thought: I can see {phrase} on the screen. I will click it.\n{action}"
    return action


def model_point(
    point: tuple[float, float], original: Size, resized: Size, convention: CoordinateConvention
) -> tuple[int, int]:
    """Where a pixel of the original image lies in the model's coordinates."""
    span = resized if convention == "absolute" else Size(1000, 1000)
    return (
        round(point[0] / original.width * span.width),
        round(point[1] / original.height * span.height),
    )
