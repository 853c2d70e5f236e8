# SPDX-License-Identifier: Apache-2.0
"""Questions about noise, and how the tests of the table ask them."""

import numpy as np
from asking import Asker
from cells import TableRecord, TableSettings
from rows import ENGINE_ROWS, Row

from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.agent import Agent
from starkv.synthetic.samples import Evidence, Sample

MOST = 6
"""Longest reply: enough to differ."""
LATE_PRIOR = Row("late prior", "star_kv", StarKVConfig.official(mi_profile_steps=1, mi_ramp_steps=1))
"""The spatial prior counts from a trajectory's second question on, so it tells how many there were."""


def sample(number: int, group: str = "a", frames: int = 1, height: int = 224, width: int = 224) -> Sample:
    """A question about noise; the frames of successive numbers overlap, as in an episode."""
    drawn = tuple(
        np.random.default_rng([step, ord(group)]).integers(0, 256, (height, width, 3), np.uint8)
        for step in range(number, number + frames)
    )
    box = (10, 20, 30, 40)
    evidence = (Evidence(frames - 1, box),)
    name = f"{group}-{number}"
    return Sample(name, "current", group, drawn, f"Click '{name}'.", "", box, evidence)


def ask(
    agent: Agent, samples: list[Sample], rows: tuple[Row, ...], budgets: list[float], batch: int = 16
) -> list[TableRecord]:
    asker = Asker(agent, rows, budgets, MOST, batch)
    return [asker.ask(each) for each in samples]


def settings(rows: tuple[Row, ...] = ENGINE_ROWS, **changes: object) -> TableSettings:
    plain = TableSettings(
        engine="gui-tiny",
        engine_hash="1",
        place="engine",
        suite="trajectory",
        split="test",
        seed=0,
        max_new_tokens=MOST,
        budgets=[0.3],
        rows={row.name: row.settings() for row in rows},
    )
    return plain.model_copy(update=changes)
