# SPDX-License-Identifier: Apache-2.0
"""Options of KV compression, which ``run``, ``chat``, ``bench`` and ``inspect`` share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import note
from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig

if TYPE_CHECKING:
    from starkv.manifest import Manifest
    from starkv.runtime.kv.policy import KvPolicy
    from starkv.runtime.timings import Timings

KvMethod = Annotated[
    str | None,
    typer.Option(
        "--kv-method",
        help=f"Which rows of a prompt's KV cache are kept: {', '.join(ENGINE_METHODS)}. "
        "`star_kv` where a budget or capacity is given.",
        show_default=False,
    ),
]
KvBudget = Annotated[
    float | None,
    typer.Option(
        "--kv-budget",
        help="Share of the prompt's rows to keep, such as 0.2; 1 keeps all.",
        show_default=False,
    ),
]
KvCapacity = Annotated[
    int | None,
    typer.Option(
        "--kv-capacity", help="Most rows to keep of a prompt, whatever its length.", show_default=False
    ),
]
KvMode = Annotated[
    str,
    typer.Option(
        "--kv-mode",
        help="STaR-KV as improved here (`native`) or as the paper's code computes it (`official`).",
    ),
]


def kv_policy(
    method: str | None, budget: float | None, capacity: int | None, mode: str = "native"
) -> "KvPolicy":
    """The policy that the options describe; the full cache where they don't limit it.

    Raises:
        UsageError: an unknown method or mode, a budget outside (0, 1], or one for the method that keeps all.
    """
    from starkv.runtime.kv.policy import KvPolicy

    limited = budget is not None or capacity is not None
    limits = Budget(1.0 if budget is None else budget, capacity)
    chosen = method or (FULL if limits == Budget() else STAR_KV)
    if chosen not in ENGINE_METHODS:
        raise UsageError(f"unknown KV method {chosen!r}; known: {', '.join(ENGINE_METHODS)}")
    if chosen == FULL and limited and limits != Budget():
        raise UsageError(
            "the KV method full keeps every row; leave the budget out, or choose another --kv-method"
        )
    if chosen != FULL and not limited:
        raise UsageError(f"the KV method {chosen} needs a budget: --kv-budget 0.2, or --kv-capacity 4096")
    return KvPolicy(chosen, limits, StarKVConfig.of_mode(mode))


@dataclass(frozen=True)
class KvOptions:
    """The options as given, for commands that fall back on the engine's default.

    Raises:
        UsageError: as :func:`kv_policy`.
    """

    method: str | None
    budget: float | None
    capacity: int | None
    mode: str

    def __post_init__(self) -> None:
        # Refused before an engine is loaded for it.
        kv_policy(self.method, self.budget, self.capacity, self.mode)

    def policy(self, manifest: "Manifest") -> "KvPolicy":
        """The policy they describe, or the engine's own if none is given, which a line on stderr says."""
        from starkv.runtime.agent import default_policy

        if (self.method, self.budget, self.capacity) != (None, None, None):
            return kv_policy(self.method, self.budget, self.capacity, self.mode)
        chosen = default_policy(manifest, StarKVConfig.of_mode(self.mode))
        if chosen.method != FULL:
            note(
                f"{manifest.name} keeps {manifest.kv_budget:.0%} of a prompt's KV rows by default; "
                "--kv-budget 1 keeps all"
            )
        return chosen


def kept_rows(timings: "Timings") -> str:
    """What a reply's compression kept, in words."""
    kib = timings.kv_bytes_kept / 1024, timings.kv_bytes_full / 1024
    return (
        f"KV {timings.kv_tokens_kept:g} of {timings.kv_tokens_full} rows, {kib[0]:,.0f} of {kib[1]:,.0f} KiB"
    )
