# SPDX-License-Identifier: Apache-2.0
"""From a sample to the turns that a model is asked with, earlier steps included.

Trajectories are laid out as the official driver of AgentNetBench does: each earlier step is its screenshot
and what should have been answered to it, and the instruction comes last, with the current screenshot. The
last few steps keep their screenshots, older ones their words only. How the answers read is our own choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from starkv.errors import ImageError
from starkv.evaluation.answers import Place
from starkv.evaluation.graders.desktop import DesktopAction, joined
from starkv.evaluation.samples import PastStep, Sample
from starkv.manifest import Manifest, PromptDialect
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.preprocess.image import load_image, smart_resize
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.prompts.dialects import opening

HISTORY_STEPS = 10
"""Earlier steps that a prompt tells of at most."""
SCREENSHOTS: Mapping[PromptDialect, int] = {"opencua": 1}
"""Most screenshots of a prompt, the current one included, where it is not ``MOST_SCREENSHOTS``."""
MOST_SCREENSHOTS = 5
_CALLS = {
    "click": "click",
    "doubleclick": "left_double",
    "tripleclick": "left_double",
    "rightclick": "right_single",
    "moveto": "hover",
}


def most_screenshots(dialect: PromptDialect) -> int:
    """Most screenshots of a prompt, the current one included."""
    return SCREENSHOTS.get(dialect, MOST_SCREENSHOTS)


@dataclass(frozen=True)
class Question:
    """A sample ready to be asked."""

    messages: list[Message]
    images: list[Image.Image]


def question_of(sample: Sample, dialect: PromptDialect, manifest: Manifest) -> Question:
    """Lay a sample out for a model.

    Args:
        sample: what to ask.
        dialect: words of the prompt.
        manifest: of the engine, whose coordinates earlier clicks are written in.

    Raises:
        ImageError: a screenshot can't be read, or has another size than the data set says.
    """
    current = load_image(sample.image)
    if sample.image_size and Size(*current.size) != sample.image_size:
        width, height = sample.image_size
        raise ImageError(
            f"{sample.source} has {current.width}x{current.height} pixels, img_size says {width}x{height}"
        )
    messages: list[Message] = []
    images: list[Image.Image] = []
    shown = most_screenshots(dialect) - 1
    steps = sample.history[-HISTORY_STEPS:]
    for number, step in enumerate(steps):
        image = load_image(step.image)
        if number >= len(steps) - shown:
            messages.append({"role": "user", "content": [{"type": "image"}]})
            images.append(image)
        messages.append({"role": "assistant", "content": past_reply(step, dialect, image, manifest)})
    images += [load_image(image) for image in sample.earlier]
    turns = opening(sample.instruction, 1 + len(sample.earlier), dialect)
    system = [turn for turn in turns if turn["role"] == "system"]
    return Question([*system, *messages, *turns[len(system) :]], [*images, current])


def past_reply(step: PastStep, dialect: PromptDialect, image: Image.Image, manifest: Manifest) -> str:
    """What should have been answered to an earlier step, in the model's own dialect."""
    thought = step.thought or step.summary
    if dialect == "opencua":
        # In words: its code would be in coordinates of a screenshot that is no longer shown.
        return f"Thought: {thought}\nAction: {step.summary or thought}"
    span = Size(1000, 1000)
    if manifest.coordinates == "absolute":
        limits, vision = manifest.image, manifest.vision
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = smart_resize(image.height, image.width, factor, limits.min_pixels, limits.max_pixels)
        span = Size(width, height)
    calls = "\n\n".join(written_calls(step.actions, span, boxed=dialect.startswith("ui_tars")))
    return f"Thought: {thought}\nAction: {calls}" if thought else f"Action: {calls}"


def written_calls(actions: Sequence[DesktopAction], span: Size, boxed: bool) -> list[str]:
    """Actions as UI-TARS writes them.

    Args:
        actions: a step.
        span: of the model's coordinates.
        boxed: whether places stand between UI-TARS's special tokens.
    """

    def box(place: Place | None) -> str:
        x, y = (round(place.x * span.width), round(place.y * span.height)) if place else (0, 0)
        return f"'<|box_start|>({x},{y})<|box_end|>'" if boxed else f"'({x},{y})'"

    calls: list[str] = []
    pending = joined(actions)
    for number, action in enumerate(pending):
        before = pending[number - 1] if number else None
        if action.type == "dragto":
            start = before.place if before and before.type in ("moveto", "dragto") else action.place
            calls.append(f"drag(start_box={box(start)}, end_box={box(action.place)})")
        elif action.type == "moveto" and number + 1 < len(pending) and pending[number + 1].type == "dragto":
            continue
        else:
            calls.append(_call(action, box(action.place)))
    return calls


def _call(action: DesktopAction, box: str) -> str:
    match action.type:
        case "write":
            return f"type(content='{_escaped(action.text)}')"
        case "keys":
            return f"hotkey(key='{_escaped(' '.join(action.keys))}')"
        case "scroll":
            # A scroll acts where the pointer is; the data set has no place for it.
            return f"scroll(direction='{action.text or 'down'}')"
        case "terminate":
            return "finished(content='')" if action.text == "success" else "call_user()"
        case kind if kind in _CALLS:
            return f"{_CALLS[kind]}(start_box={box})"
        case _:
            return "wait()"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
