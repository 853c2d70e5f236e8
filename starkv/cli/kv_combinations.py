# SPDX-License-Identifier: Apache-2.0
"""Eviction, quantized rows and low rank, alone and together: what ``validate clicks`` compares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from starkv.errors import UsageError
from starkv.kv_packing.options import KvQuant, PackingOptions
from starkv.manifest import KvPacking, Manifest
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.kv.policy import KvPolicy

EVICT, QUANT, RANK = "evict", "quant", "rank"


@dataclass(frozen=True)
class Combination:
    """Which of the three are at work."""

    budget: float | None
    """Share of the prompt's rows that STaR-KV keeps; None: all."""
    packing: PackingOptions | None

    @property
    def name(self) -> str:
        """Such as ``full``, ``evict`` or ``evict+quant+rank``."""
        parts = [EVICT] if self.budget is not None else []
        if self.packing is not None:
            parts += [QUANT] if self.packing.quant != "none" else []
            parts += [RANK] if self.packing.rank is not None else []
        return "+".join(parts) or FULL

    @property
    def unpacked(self) -> "Combination":
        """The same rows as floats."""
        return Combination(self.budget, None)

    @property
    def policy(self) -> KvPolicy:
        packed = self.packing is not None
        if self.budget is None:
            return KvPolicy(packed=packed)
        return KvPolicy(STAR_KV, Budget(self.budget), packed=packed)


@dataclass(frozen=True)
class Plan:
    """Which engine is asked which combinations."""

    combinations: Mapping[str, Combination]
    """By name: the full cache, the evicted one, then the packed ones."""
    packings: tuple[PackingOptions, ...]
    """To be made of the engine; none for an engine that is packed itself."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Combinations that can't be asked, with the reason."""

    def asked_of(self, packing: PackingOptions | None) -> dict[str, Combination]:
        """Combinations of one engine, by its packing."""
        return {name: one for name, one in self.combinations.items() if one.packing == packing}


def plan_combinations(
    engine: Path,
    manifest: Manifest,
    asked: bool,
    quant: KvQuant | None,
    rank: float | None,
    budget: float,
) -> Plan | None:
    """What is to be compared; None if nothing is.

    Args:
        engine: its directory, to be named.
        manifest: of the engine.
        asked: whether the user wants combinations of an engine without a packed cache.
        quant: of the combinations with quantized rows; int8 if None.
        rank: of those with latents; one half if None.
        budget: of those with eviction.

    Raises:
        UsageError: the engine can't be packed, is packed already and other combinations are named, or an
            option has no meaning here.
    """
    own = manifest.kv_packing
    if own is not None:
        if quant is not None or rank is not None:
            raise UsageError(
                f"{engine} packs its cache as {own.describe()}; leave --kv-quant and --kv-rank out, or name "
                "the engine that it was made from"
            )
        return _plan_of_packed(own, budget)
    if not asked:
        if quant is not None or rank is not None:
            raise UsageError("--kv-quant and --kv-rank belong to --kv-combinations")
        return None
    if manifest.backend != "ort" or manifest.compute_dtype != "float32":
        raise UsageError(
            f"{engine} is for a GPU, and can't be packed once it is built; ask one that was built with "
            "--backend trt --kv-quant int8, or one for processors (--backend ort --device cpu)"
        )
    if quant == "none":
        raise UsageError("--kv-quant none leaves nothing to combine; give int8 or int4")
    quants: tuple[KvQuant, ...] = ("none", quant or "int8")
    ranks = (None, 0.5 if rank is None else rank)
    packings = tuple(
        PackingOptions(a_quant, a_rank)
        for a_rank, a_quant in product(ranks, quants)
        if (a_quant, a_rank) != ("none", None)
    )
    return Plan(_named((None, *packings), budget), packings)


def _plan_of_packed(own: KvPacking, budget: float) -> Plan:
    packing = PackingOptions(own.quant, own.rank)
    plan = _named((None, packing), budget)
    reason = (
        "the engine has only its own packing; ask the engine that it was made from, with --kv-combinations"
    )
    every = [QUANT, RANK, f"{QUANT}+{RANK}"]
    missing = [name for one in every for name in (one, f"{EVICT}+{one}") if name not in plan]
    return Plan(plan, (), dict.fromkeys(missing, reason))


def _named(packings: Sequence[PackingOptions | None], budget: float) -> dict[str, Combination]:
    def every() -> Iterator[Combination]:
        for packing in packings:
            for share in (None, budget):
                yield Combination(share, packing)

    return {one.name: one for one in every()}
