# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: which ways of compressing a cache are compared."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.kv.policy import KvPolicy

ORACLE = "oracle"
NATIVE, OFFICIAL, SNAPKV = "star_kv native", "star_kv official", "snapkv"
FAST_RAMP = "star_kv official, fast ramp"
BASELINES = (OFFICIAL, SNAPKV, FULL)
"""Rows that all others are compared with, question by question."""

Place = Literal["engine", "reference"]


@dataclass(frozen=True)
class Row:
    """One way of compressing, at any budget."""

    name: str
    method: str
    """``oracle``, or a method of the engine that the row runs on."""
    star_kv: StarKVConfig | None = None
    """Hyper-parameters, of STaR-KV's rows."""

    def policy(self, budget: float) -> KvPolicy:
        """What the engine is asked for. The oracle only needs the number of rows."""
        method = FULL if self.method == ORACLE else self.method
        return KvPolicy(method, Budget(budget), self.star_kv or StarKVConfig())

    def settings(self) -> dict[str, object]:
        """What its answers depend on, as JSON values."""
        return {"method": self.method, **(asdict(self.star_kv) if self.star_kv else {})}


def _star_kv(name: str, config: StarKVConfig) -> Row:
    return Row(name, STAR_KV, config)


_native = StarKVConfig()
_full = Row(FULL, FULL)
_compared = (
    _star_kv(NATIVE, _native),
    _star_kv(OFFICIAL, StarKVConfig.official()),
    # With the paper's five profiling steps and ramp of ten, the spatial prior never counts on single screens.
    _star_kv(FAST_RAMP, StarKVConfig.official(mi_profile_steps=0, mi_ramp_steps=1)),
)
ENGINE_ROWS = (
    _full,
    *_compared,
    *(Row(method, method) for method in ENGINE_METHODS if method not in (FULL, STAR_KV)),
    Row(ORACLE, ORACLE),
)
ABLATION_ROWS = (
    _full,
    *_compared[:2],
    Row(SNAPKV, SNAPKV),
    _star_kv("native - protected rows", replace(_native, protect_rows=False)),
    _star_kv("native - layer budgets", replace(_native, entropy=False)),
    _star_kv("native - spatial prior", replace(_native, mi=False)),
    _star_kv("native - temporal discount", replace(_native, temporal=False)),
    _star_kv("native - hidden-norm boost", replace(_native, boost=0.0)),
    _star_kv("native, official temporal reference", replace(_native, temporal_reference="updated")),
    _star_kv("native, official estimator", replace(_native, mi_estimator="plug_in")),
)
REFERENCE_ROWS = tuple(
    Row(f"{method} (reference)", method)
    for method in (
        "vl_cache",
        "h2o",
        "snapkv_per_head",
        "pyramidkv_per_head",
        "gui_kv_per_head",
        "vl_cache_per_head",
        "h2o_per_head",
    )
)


def rows_of(place: Place, ablations: bool) -> tuple[Row, ...]:
    """The rows of a run."""
    if place == "reference":
        return REFERENCE_ROWS
    return ABLATION_ROWS if ablations else ENGINE_ROWS


def chosen_rows(rows: tuple[Row, ...], names: list[str] | None) -> tuple[Row, ...]:
    """The rows called so, in the order of ``rows``; all if there are no names.

    Raises:
        UsageError: there is no such row.
    """
    if names is None:
        return rows
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown row {name!r}; known: {'; '.join(known)}")
    return tuple(row for row in rows if row.name in names)


def budgets_of(row: Row, budgets: list[float]) -> list[float]:
    """At which budgets a row is asked: the full cache has only one."""
    return [1.0] if row.method == FULL else budgets
