# SPDX-License-Identifier: Apache-2.0
"""Options of KV compression, which ``run``, ``chat``, ``bench`` and ``inspect`` share."""

from typing import TYPE_CHECKING, Annotated

import typer

from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig

if TYPE_CHECKING:
    from starkv.runtime.kv.policy import KvPolicy
    from starkv.runtime.session import Timings

KvMethod = Annotated[
    str | None,
    typer.Option(
        "--kv-method",
        help=f"Which rows of a prompt's KV cache are kept: {', '.join(ENGINE_METHODS)}. "
        "`star_kv` where a budget or capacity is given, else `full`.",
        show_default=False,
    ),
]
KvBudget = Annotated[
    float | None,
    typer.Option("--kv-budget", help="Share of the prompt's rows to keep, such as 0.2.", show_default=False),
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
    """The policy that the options describe.

    Raises:
        UsageError: an unknown method or mode, a budget outside (0, 1], or one for the method that keeps all.
    """
    from starkv.runtime.kv.policy import KvPolicy

    limited = budget is not None or capacity is not None
    chosen = method or (STAR_KV if limited else FULL)
    if chosen not in ENGINE_METHODS:
        raise UsageError(f"unknown KV method {chosen!r}; known: {', '.join(ENGINE_METHODS)}")
    limits = Budget(1.0 if budget is None else budget, capacity)
    if chosen == FULL and limited and limits != Budget():
        raise UsageError(
            "the KV method full keeps every row; leave the budget out, or choose another --kv-method"
        )
    if chosen != FULL and not limited:
        raise UsageError(f"the KV method {chosen} needs a budget: --kv-budget 0.2, or --kv-capacity 4096")
    return KvPolicy(chosen, limits, StarKVConfig.of_mode(mode))


def kept_rows(timings: "Timings") -> str:
    """What a reply's compression kept, in words."""
    kib = timings.kv_bytes_kept / 1024, timings.kv_bytes_full / 1024
    return (
        f"KV {timings.kv_tokens_kept:g} of {timings.kv_tokens_full} rows, {kib[0]:,.0f} of {kib[1]:,.0f} KiB"
    )
