# SPDX-License-Identifier: Apache-2.0
"""Answers under eviction, quantized rows and low rank → checks and their table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from starkv.cli.click_report_cells import number, share
from starkv.cli.kv_combination_runs import KvAnswer
from starkv.cli.kv_combinations import Plan
from starkv.evaluation.comparison import compare
from starkv.evaluation.graders.point import CLICK_IN_BOX
from starkv.evaluation.suites.synthetic import Task
from starkv.manifest import Manifest
from starkv.methods.names import FULL
from starkv.validation.clicks import latencies, missing
from starkv.validation.kv_gate import MOST_KL, divergence_measures, judge_eviction, judge_packing
from starkv.validation.quant import MOST_LOST, SIGNIFICANCE
from starkv.validation.report import Check

PACKING = "packed caches"
HEADER = (
    "",
    "task",
    "combination",
    "accuracy",
    "against full",
    "same replies",
    "KL",
    "KL p95",
    "KV KiB",
    "bytes",
    "decode, ms",
    "bound",
    "why",
)
TITLE = "Eviction, quantized rows and low rank"
TEXT = (
    "Alone and together, on the same questions, against the whole float cache of the same engine: clicks, "
    "equal replies, and the divergence of each token behind the first while the whole cache's reply is "
    "forced. KV KiB is what the cache held after the reply, measured, mean over the questions; bytes the "
    "share of the whole cache's. Decode is the median per token. What packing adds is judged: the reference "
    "is the same rows as floats."
)


def combination_checks(
    task: Task, answers: Mapping[str, Sequence[KvAnswer]], plan: Plan, manifest: Manifest
) -> Iterator[Check]:
    """Checks of one task, one per combination.

    Args:
        task: what was asked.
        answers: by the combinations' names.
        plan: of the run.
        manifest: of the engine.
    """
    case = f"{task}, {len(answers[FULL])} questions"
    blank = Check(PACKING, "", case, "passed", FULL, manifest.quantization.decoder)
    measured = {name: _measures(some, answers[FULL]) for name, some in answers.items() if some}
    for name, combination in plan.combinations.items():
        unpacked = combination.unpacked.name
        check = replace(blank, implementation=name, reference=unpacked)
        if name not in measured:
            yield missing(check, "no question could be asked")
        elif combination.packing is None:
            yield judge_eviction(check, measured[name], measured[FULL])
        else:
            pair = compare(
                [one.record for one in answers[name]],
                [one.record for one in answers[unpacked]],
                CLICK_IN_BOX,
            )
            clicks = {
                "packing_lost": float(pair.lost),
                "packing_won": float(pair.won),
                "unpacked_right": float(pair.reference_right),
            }
            yield judge_packing(check, measured[name] | clicks, measured[unpacked])
    for name, reason in plan.missing.items():
        yield missing(replace(blank, implementation=name), reason)


def _measures(answers: Sequence[KvAnswer], whole: Sequence[KvAnswer]) -> dict[str, float]:
    records = [one.record for one in answers]
    found = compare(records, [one.record for one in whole], CLICK_IN_BOX).measures()
    found |= divergence_measures([one.divergences for one in answers])
    held, of_whole = (
        sum(one.record.timings["kv_bytes_held"] for one in some) / len(some) for some in (answers, whole)
    )
    found |= {"kv_bytes": held, "kv_bytes_share": held / of_whole}
    times = latencies([record.timings for record in records])
    return found | {name: value for name, value in times.items() if name.startswith("decode_per_token")}


def combination_row(check: Check) -> tuple[str, ...]:
    """A line of the table, see ``HEADER``."""
    found = check.measures
    bounds = (
        f"net loss ≤ {MOST_LOST:.0%} or chance (p ≥ {SIGNIFICANCE:g}), KL ≤ {check.reference}'s + "
        f"{MOST_KL:g}, fewer bytes"
    )
    return (
        check.status,
        check.case,
        check.implementation,
        share(found, "accuracy"),
        share(found, "difference", signed=True),
        number(found, "same_replies", ".1%"),
        number(found, "kl_mean", ".4f"),
        number(found, "kl_p95", ".3f"),
        number(found, "kv_bytes", ",.0f", 1 / 1024),
        number(found, "kv_bytes_share", ".1%"),
        number(found, "decode_per_token_ms_median", ".2f"),
        bounds if "tolerance_kl" in found else "",
        check.reason,
    )
