# SPDX-License-Identifier: Apache-2.0
"""Options of KV compression, which ``run``, ``chat``, ``bench`` and ``inspect`` share."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import note
from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig

if TYPE_CHECKING:
    from starkv.kv_packing.options import PackingOptions
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


KvQuant = Annotated[
    str | None,
    typer.Option(
        "--kv-quant",
        help="Keep rows as int8 or int4; none: as they are computed. By default as the engine packs them; a "
        "model's engine that packs so is made once.",
        show_default=False,
    ),
]
KvRank = Annotated[
    float | None,
    typer.Option(
        "--kv-rank",
        help="Keep rows as low-rank latents with this share of the channels, such as 0.5; goes with "
        "--kv-quant. 1: all channels, quantized token by token.",
        show_default=False,
    ),
]


def packing_options(quant: str | None, rank: float | None) -> "PackingOptions | None":
    """The packing that the options ask for; None: the engine's, or none at all.

    Raises:
        UsageError: an unknown quantization, or a rank outside (0, 1].
    """
    from starkv.kv_packing.options import PackingOptions, parse_kv_quant

    chosen = parse_kv_quant(quant or "none")
    return None if chosen == "none" and rank is None else PackingOptions(chosen, rank)


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
    quant: str | None = None
    rank: float | None = None

    def __post_init__(self) -> None:
        # Refused before an engine is loaded for it.
        kv_policy(self.method, self.budget, self.capacity, self.mode)
        packing_options(self.quant, self.rank)

    @property
    def packing(self) -> "PackingOptions | None":
        """The packing that they ask for."""
        return packing_options(self.quant, self.rank)

    def policy(self, manifest: "Manifest") -> "KvPolicy":
        """The policy they describe, or the engine's own if none is given, which a line on stderr says.

        Raises:
            UsageError: the engine packs its cache in another way than they ask for.
        """
        return replace(self._which_rows(manifest), packed=self._packed(manifest))

    def _packed(self, manifest: "Manifest") -> bool | None:
        """As ``KvPolicy.packed``."""
        wanted = self.packing
        if wanted is None:
            return False if self.quant == "none" else None
        found = manifest.kv_packing
        if found is None or (found.quant, found.rank) != (wanted.quant, wanted.rank):
            packs = "does not pack its cache" if found is None else f"packs its cache as {found.describe()}"
            command = "build MODEL --backend trt" if manifest.backend == "trt" else "pack"
            raise UsageError(
                f"this engine of {manifest.name} {packs}, not as {wanted}; make one with `starkv {command}`, "
                "or name the model instead of a directory"
            )
        return True

    def _which_rows(self, manifest: "Manifest") -> "KvPolicy":
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
