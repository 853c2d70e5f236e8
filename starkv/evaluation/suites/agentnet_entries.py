# SPDX-License-Identifier: Apache-2.0
"""Form of a task of AgentNetBench, and its actions in the words of the grader."""

from pydantic import AliasChoices, Field, field_validator, model_validator

from starkv.evaluation.answers import Place
from starkv.evaluation.boxes import Box
from starkv.evaluation.files import Entry
from starkv.evaluation.graders.desktop import DesktopAction

_PLACED = ("click", "doubleclick", "tripleclick", "rightclick", "moveto", "dragto")
_AMOUNTS = ("amount", "pixels", "clicks")


class _Position(Entry):
    x: float
    y: float


class _Params(Entry):
    position: _Position | None = None
    text: str | None = Field(default=None, validation_alias=AliasChoices("text", "content"))
    keys: list[str] | str | None = None
    status: str | None = None
    direction: str | None = None
    amount: float | None = Field(default=None, validation_alias=AliasChoices(*_AMOUNTS))


class _MetadataBox(Entry):
    rel_bbox: tuple[float, float, float, float]

    @field_validator("rel_bbox")
    @classmethod
    def _box(cls, value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        Box.from_xywh(value)
        return value


class _Metadata(Entry):
    bboxes: list[_MetadataBox] = Field(default_factory=list)


class ActionEntry(Entry):
    """One recorded action."""

    type: str = Field(min_length=1)
    params: _Params = Field(default_factory=_Params)
    metadata: _Metadata | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ActionEntry":
        kind = self.type.lower()
        needed = {"write": "text", "press": "keys", "hotkey": "keys", "terminate": "status"}.get(kind)
        needed = "position" if kind in _PLACED else needed
        if needed and getattr(self.params, needed) is None:
            raise ValueError(f"{self.type} needs params.{needed}")
        return self

    def action(self) -> DesktopAction:
        """The action in the grader's words."""
        kind, params = self.type.lower(), self.params
        if kind in _PLACED and params.position is not None:
            boxes = self.metadata.bboxes if self.metadata else []
            return DesktopAction(
                kind,
                Place(params.position.x, params.position.y),
                boxes=tuple(Box.from_xywh(box.rel_bbox) for box in boxes),
            )
        if kind in ("press", "hotkey"):
            keys = [params.keys] if isinstance(params.keys, str) else params.keys or []
            return DesktopAction("keys", keys=tuple(key.lower() for key in keys))
        if kind in ("scroll", "hscroll"):
            return DesktopAction("scroll", text=self._direction(kind == "hscroll"))
        return DesktopAction(kind, text=(params.status if kind == "terminate" else params.text) or "")

    def _direction(self, sideways: bool) -> str:
        """A scroll's direction, empty if it isn't said. PyAutoGUI's positive amounts go up and right."""
        amount, direction = self.params.amount, (self.params.direction or "").lower()
        if direction in ("up", "down", "left", "right") or not amount:
            return direction
        if sideways:
            return "right" if amount > 0 else "left"
        return "up" if amount > 0 else "down"


class _Monologue(Entry):
    thought: str = ""
    summary: str = Field(
        default="", validation_alias=AliasChoices("low_level_instruction", "action", "summary")
    )


class StepEntry(Entry):
    """One recorded step."""

    image: str = Field(min_length=1)
    ground_truth_actions: list[ActionEntry] = Field(min_length=1)
    alternative_options: list[list[ActionEntry] | ActionEntry] | None = None
    inner_monologue: _Monologue = Field(default_factory=_Monologue)

    @field_validator("inner_monologue", mode="before")
    @classmethod
    def _said(cls, value: object) -> object:
        if value is None:
            return {}
        return {"thought": value} if isinstance(value, str) else value

    def options(self) -> list[tuple[DesktopAction, ...]]:
        """Right ways to take the step: the recorded one first, then its alternatives."""
        entries = [self.ground_truth_actions]
        for option in self.alternative_options or []:
            entries.append([option] if isinstance(option, ActionEntry) else option)
        return [tuple(entry.action() for entry in option) for option in entries if option]


class TaskEntry(Entry):
    """One recorded task."""

    task_id: str = Field(min_length=1)
    instruction: str = Field(
        min_length=1,
        validation_alias=AliasChoices("high_level_task_description", "user_task_description"),
    )
    steps: list[StepEntry] = Field(min_length=1)
