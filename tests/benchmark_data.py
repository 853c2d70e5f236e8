# SPDX-License-Identifier: Apache-2.0
"""Writes tiny data sets in the forms of the public ones; all screens are drawn here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SCREEN = (196, 140)
"""Pixels that the tiny model sees as they are, so its click on (56, 28) lands there."""
HIT_XYWH, HIT_XYXY = [50, 20, 10, 10], [50, 20, 60, 30]
"""A box around that click in both conventions."""
MISS_XYWH, MISS_XYXY = [100, 100, 20, 20], [100, 100, 120, 120]
Json = dict[str, Any]


def draw(path: Path, size: tuple[int, int] = SCREEN) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((50, 20, 60, 30), fill="red")
    image.save(path)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def spot(kind: str = "text", hit: bool = True, **changes: object) -> Json:
    """An entry of ScreenSpot-v2."""
    entry = {
        "img_filename": "screen.png",
        "bbox": HIT_XYWH if hit else MISS_XYWH,
        "instruction": "click the red star",
        "data_type": kind,
        "data_source": "drawn",
    }
    return entry | changes


def write_screenspot_v2(folder: Path, **platforms: Sequence[object]) -> Path:
    for platform, entries in platforms.items():
        write(folder / f"screenspot_{platform}_v2.json", entries)
    draw(folder / "screenspotv2_image" / "screen.png")
    return folder


def pro(name: str, kind: str = "text", hit: bool = True, **changes: object) -> Json:
    """An entry of ScreenSpot-Pro."""
    entry = {
        "id": name,
        "img_filename": "apps/screen.png",
        "bbox": HIT_XYXY if hit else MISS_XYXY,
        "img_size": list(SCREEN),
        "instruction": "click the red star",
        "instruction_cn": "",
        "platform": "linux",
        "application": "gimp",
        "group": "Creative",
        "ui_type": kind,
    }
    return entry | changes


def write_screenspot_pro(folder: Path, **files: Sequence[object]) -> Path:
    for name, entries in files.items():
        write(folder / "annotations" / f"{name}.json", entries)
    draw(folder / "images" / "apps" / "screen.png")
    return folder


def step(number: int, action: Json | None = None, **changes: object) -> Json:
    """An entry of AndroidControl."""
    entry = {
        "episode_id": 7,
        "step_index": number,
        "screenshot": "7/screenshot.png",
        "goal": "click the red star",
        "step_instruction": "click the star",
        "previous_actions": ["open the app", "scroll down"],
        "action": action or {"action_type": "wait"},
        "accessibility_tree": [
            {"bbox_pixels": {"x_min": 0, "y_min": 0, "x_max": 196, "y_max": 140}, "text": "page"},
            {"bbox_pixels": {"x_min": 50, "y_min": 20, "x_max": 60, "y_max": 30}, "text": "star"},
        ],
    }
    return entry | changes


def write_android_control(folder: Path, entries: Sequence[object]) -> Path:
    write(folder / "500_steps.json", entries)
    draw(folder / "images" / "7" / "screenshot.png")
    return folder


def gesture(kind: str = "click", x: float = 56 / 196, y: float = 28 / 140, boxed: bool = True) -> Json:
    """An action of AgentNetBench with a place."""
    boxes = [{"rel_bbox": [x - 0.02, y - 0.02, 0.04, 0.04]}] if boxed else []
    return {"type": kind, "params": {"position": {"x": x, "y": y}}, "metadata": {"bboxes": boxes}}


def task(name: str, *steps: Sequence[Json], **changes: object) -> Json:
    """A task of AgentNetBench."""
    entry = {
        "task_id": name,
        "high_level_task_description": "click the red star",
        "steps": [
            {
                "image": "screen.png",
                "ground_truth_actions": list(actions),
                "alternative_options": [],
                "milestone": False,
                "inner_monologue": {"thought": f"thought {n}", "low_level_instruction": f"step {n}"},
            }
            for n, actions in enumerate(steps)
        ],
    }
    return entry | changes


def write_agentnet_bench(folder: Path, *tasks: Json) -> Path:
    for entry in tasks:
        write(folder / "test_data" / f"{entry['task_id']}.json", entry)
    draw(folder / "test_data" / "images" / "screen.png")
    return folder
