# SPDX-License-Identifier: Apache-2.0
"""Figures that others have published, to read one's own beside them. None was measured with starkv."""

from importlib.resources import files

from pydantic import BaseModel, ConfigDict, TypeAdapter

_FILE = "published.json"


class Published(BaseModel):
    """One published figure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    """Data set, or several joined by " + " where only their average was published."""
    metric: str
    model: str
    """Name of the model's card."""
    method: str
    budget: float
    """Share of the KV cache; 1 is all of it."""
    value: float
    """From 0 to 1."""
    source: str
    second_hand: bool
    """Read in notes about the source, not in the source itself."""
    note: str = ""

    @property
    def origin(self) -> str:
        """The source with what has to be known about it."""
        marks = ["second-hand"] if self.second_hand else []
        return "; ".join([self.source, *marks, *filter(None, [self.note])])


def all_published() -> list[Published]:
    """Every figure of the package's data file."""
    text = files(__package__).joinpath(_FILE).read_text(encoding="utf-8")
    return TypeAdapter(list[Published]).validate_json(text)


def published_for(suite: str, model: str, budget: float) -> list[Published]:
    """Figures of the same data set and model, at this budget and with the full cache.

    Args:
        suite: name of the data set.
        model: name of the engine's model.
        budget: share of the cache that is kept.
    """
    return [
        figure
        for figure in all_published()
        if (figure.suite, figure.model) == (suite, model) and figure.budget in (budget, 1.0)
    ]
