# SPDX-License-Identifier: Apache-2.0
"""Runs of ``starkv validate clicks`` → its checks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from starkv.cli.click_engines import Missing
from starkv.evaluation.comparison import compare
from starkv.evaluation.graders.point import CLICK_IN_BOX
from starkv.evaluation.records import Record
from starkv.evaluation.suites.synthetic import Task
from starkv.manifest import Manifest
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.kv.policy import KvPolicy
from starkv.validation.clicks import judge_budget, judge_memory, judge_pair, latencies, missing
from starkv.validation.report import Check

PARITY, QUANTIZATION, COMPRESSION = "PyTorch", "quantization", "compression"
LATENCY, MEMORY = "latency", "memory"
MODES = ("native", "official")
_BYTES = ("kv_bytes_full", "kv_bytes_kept", "kv_bytes_held", "kv_bytes_reserved")


@dataclass(frozen=True)
class Cell:
    """One way to compress; the whole cache is the mode ``full``."""

    mode: str
    budget: float = 1.0

    @property
    def name(self) -> str:
        return FULL if self.mode == FULL else f"{self.mode} {self.budget:g}"

    @property
    def policy(self) -> KvPolicy:
        # What packing changes is judged apart from what the rows' choice changes.
        if self.mode == FULL:
            return KvPolicy(packed=False)
        return KvPolicy(STAR_KV, Budget(self.budget), StarKVConfig.of_mode(self.mode), packed=False)


def cells(budgets: Sequence[float]) -> dict[str, Cell]:
    """The whole cache, then both modes at each budget, by name.

    Raises:
        UsageError: a budget outside (0, 1].
    """
    some = [Cell(FULL), *(Cell(mode, budget) for budget in budgets for mode in MODES)]
    for cell in some:
        Budget(cell.budget)
    return {cell.name: cell for cell in some}


@dataclass(frozen=True)
class TaskRun:
    """Answers to the questions of one task."""

    task: Task
    answers: Mapping[str, Sequence[Record]]
    """Of the engine, by the cell's name."""
    rivals: Mapping[str, Sequence[Record] | Missing]
    """Of PyTorch and of the engine in float32, with the whole cache."""
    peak_mib: float


def checks_of(run: TaskRun, budgets: Mapping[str, Cell], manifest: Manifest) -> Iterator[Check]:
    """All checks of one task.

    Args:
        run: answers of the engine and its rivals.
        budgets: the cells that were run.
        manifest: of the engine.
    """
    full = run.answers[FULL]
    case = f"{run.task}, {len(full)} questions"
    preset = manifest.quantization.preset
    exact = manifest.quantization.decoder == "fp32" and manifest.compute_dtype == "float32"
    blank = Check("", f"{manifest.backend} {preset}", case, "passed", dtype=manifest.quantization.decoder)
    for subject, (name, other) in zip((PARITY, QUANTIZATION), run.rivals.items(), strict=True):
        check = replace(blank, subject=subject, reference=name)
        if isinstance(other, Missing):
            yield missing(check, other.reason)
        elif not _paired(full, other):
            yield missing(check, "no question was answered by both")
        else:
            measures = compare(full, other, CLICK_IN_BOX).measures()
            yield judge_pair(check, measures, exact and subject == PARITY)
    for name, cell in budgets.items():
        if cell.mode != FULL:
            yield _compression(replace(blank, subject=COMPRESSION), run, name, cell)
    yield replace(
        blank, subject=LATENCY, reference="", implementation=FULL, measures=latencies(_timings(full))
    )
    for name in budgets:
        check = replace(blank, subject=MEMORY, reference="", implementation=name)
        timings = _timings(run.answers[name])
        measures = {key: sum(one[key] for one in timings) / len(timings) for key in _BYTES}
        yield judge_memory(check, measures | {"peak_mib": run.peak_mib})


def _compression(blank: Check, run: TaskRun, name: str, cell: Cell) -> Check:
    records = run.answers[name]
    measures = compare(records, run.answers[FULL], CLICK_IN_BOX).measures()
    measures["budget"] = cell.budget
    measures["kept_share"] = sum(one.kv_tokens_kept / one.kv_tokens_full for one in records) / len(records)
    times = latencies(_timings(records))
    measures |= {key: times[key] for key in ("compress_ms_median", "compress_ms_p95")}
    check = replace(blank, implementation=name, reference=FULL)
    # What the paper's own code loses is no fault of the engine.
    return judge_budget(check, measures, cell.budget, bounded=cell.mode == "native")


def _paired(records: Sequence[Record], others: Sequence[Record]) -> bool:
    return bool({one.id for one in records} & {one.id for one in others})


def _timings(records: Sequence[Record]) -> list[dict[str, float]]:
    return [record.timings for record in records]
