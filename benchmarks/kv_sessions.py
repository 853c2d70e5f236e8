# SPDX-License-Identifier: Apache-2.0
"""Many sessions in the same KV memory: how many fit, and how many tokens per second they decode together.

    python benchmarks/kv_sessions.py --scratch DIR --out kv-sessions.json    # 0.5b, random int4 weights
    python benchmarks/kv_sessions.py --model gui-tiny --rows 512

A smaller cache makes no step of one session faster on a processor, but more sessions fit, and a step of many
costs less per token than a step of few: that is where STAR-KV (arXiv 2606.08382) has its throughput from.
The memory is what the whole float caches of a few sessions take; each way of keeping rows gets as many
sessions as the scheduler would let into it. All decode behind prompts of the same length. Ways take turns
within each round, in one process. Prefill is the same for all of them and not counted. Factors are zeros:
time does not depend on them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import report
from kv_bytes import FORMATS, Format, codec_of
from peers_shapes import SIZES
from trajectory import random_engine, tiny_engine

from starkv.export.build.pack import describe_packing, pack_ort_engine
from starkv.kv_packing.options import PackingOptions
from starkv.manifest import MANIFEST_NAME, read_manifest
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.low_rank import LowRankCodec
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.kv.quantized import QuantizedCodec
from starkv.runtime.preprocess.positions import text_positions

FIFTH = Budget(0.2)
_FORMATS = {one.name: one for one in FORMATS}


@dataclass(frozen=True)
class Way:
    """A way of keeping rows."""

    name: str
    evicted: bool
    packing: PackingOptions | None = None
    format: Format | None = None
    """Of the packed rows, as ``kv_bytes.py`` has them."""

    @property
    def policy(self) -> KvPolicy:
        packed = self.packing is not None
        return KvPolicy(STAR_KV, FIFTH, packed=packed) if self.evicted else KvPolicy(packed=packed)


WAYS = (
    Way("whole, float", False),
    Way("20 % of the rows, float", True),
    Way("20 %, int8", True, PackingOptions("int8"), _FORMATS["int8, static scales"]),
    Way("20 %, int4", True, PackingOptions("int4"), _FORMATS["int4, static scales"]),
    Way("20 %, rank 50 %, int4", True, PackingOptions("int4", 0.5), _FORMATS["rank 50 %, int4"]),
)


@dataclass
class Crowd:
    """As many sessions of one way as fit, ready to decode."""

    way: Way
    engine: Engine
    pool: Pool
    rows: int
    """Kept of each prompt."""
    fitting: int
    """Sessions that fit; the pool may have fewer."""
    slot_bytes: int
    seconds: list[float] = field(default_factory=list)
    """Of each timed step."""

    @property
    def tokens_per_second(self) -> float:
        return self.pool.active / statistics.median(self.seconds)

    def decode(self, steps: int, position: int) -> None:
        """Time steps of all sessions, from the rows of the prompts on."""
        count, text = self.pool.active, self.engine.manifest.text
        self.pool.kv.count_rows(self.rows)
        for step in range(steps):
            places = np.repeat(text_positions(1, position + step).values[:, :, None], count, axis=1)
            started = time.perf_counter()
            self.engine.decode(self.pool, self.engine.embed([1] * count), Rope.at(places, text))
            self.seconds.append(time.perf_counter() - started)


def slot_bytes(engine: Engine, way: Way, prompt_rows: int, reply_rows: int) -> int:
    """What the scheduler sets aside for a session of a way."""
    kept = engine.most_kept_rows(prompt_rows, way.policy)
    row = engine.info.kv_bytes_per_row
    packing = engine.info.kv_packing
    if way.packing is None or packing is None:
        return (kept + reply_rows) * row
    return packing.slot_bytes(kept, reply_rows, row)


def gather(engine: Engine, way: Way, memory: int, prompt_rows: int, reply_rows: int, most: int) -> Crowd:
    """As many sessions as fit into ``memory`` bytes, at least one, and at most ``most`` at work."""
    each = slot_bytes(engine, way, prompt_rows, reply_rows)
    fitting = max(1, memory // each)
    count = min(fitting, most)
    capacity = engine.most_kept_rows(prompt_rows, way.policy) + reply_rows
    pool = engine.new_pool(count, capacity, way.policy.method, way.packing is not None)
    for _ in range(count):
        pool.acquire()
    pool.kv.positions[:] = np.arange(pool.kv.capacity, dtype=np.int32)[:, None]
    return Crowd(way, engine, pool, way.policy.kept_rows(prompt_rows), fitting, each)


def packed_engine(plain: Path, way: Way, home: Path) -> Path:
    """The engine of a way, packed once per home."""
    if way.packing is None or way.format is None:
        return plain
    place = home / f"{plain.name}-{way.packing.directory_suffix}"
    if not (place / MANIFEST_NAME).is_file():
        codec = codec_of(read_manifest(plain).text, way.format)
        assert isinstance(codec, QuantizedCodec | LowRankCodec)
        pack_ort_engine(
            plain, place, codec.packing, describe_packing(codec.packing, way.packing, 0), link=True
        )
    return place


def measure(crowds: Sequence[Crowd], tokens: int, rounds: int, position: int) -> None:
    """Decode with all crowds in turn; the first round warms up."""
    for number in range(rounds + 1):
        for crowd in crowds:
            crowd.decode(tokens, position)
            if not number:
                crowd.seconds.clear()
            print(f"round {number} of {rounds}: {crowd.way.name:<30}", file=sys.stderr, end="\r", flush=True)
    print(file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["gui-tiny", *SIZES], default="0.5b")
    parser.add_argument("--scratch", type=Path, help="where engines are kept")
    parser.add_argument("--rows", type=int, default=3072, help="of each prompt")
    parser.add_argument("--sessions", type=int, default=2, help="whole float caches that make the memory")
    parser.add_argument("--most", type=int, default=96, help="sessions that decode at once")
    parser.add_argument("--tokens", type=int, default=4, help="steps of each round")
    parser.add_argument("--reply", type=int, default=128, help="rows set aside for a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all processors that may be used")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        home = args.scratch or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        plain = tiny_engine(home) if args.model == "gui-tiny" else random_engine(args.model, home)
        opened: dict[Path, Engine] = {}
        crowds: list[Crowd] = []
        for way in WAYS:
            place = packed_engine(plain, way, home)
            if place not in opened:
                opened[place] = open_engine(place, verify=False, threads=args.threads, device="cpu")
            engine = opened[place]
            memory = args.sessions * slot_bytes(engine, WAYS[0], args.rows, args.reply)
            crowds.append(gather(engine, way, memory, args.rows, args.reply, args.most))
        measure(crowds, args.tokens, args.rounds, args.rows)
    whole = crowds[0]
    header = ("kept", "KiB per session", "sessions that fit", "decoded together", "s per step, median")
    table: list[tuple[str, ...]] = [(*header, "tokens/s", "times the whole cache's")]
    for crowd in crowds:
        table.append(
            (
                crowd.way.name,
                f"{crowd.slot_bytes / 1024:,.0f}",
                f"{crowd.fitting}",
                f"{crowd.pool.active}",
                f"{statistics.median(crowd.seconds):.3f}",
                f"{crowd.tokens_per_second:.1f}",
                f"{crowd.tokens_per_second / whole.tokens_per_second:.1f}",
            )
        )
    figures = {
        "benchmark": "kv_sessions",
        "model": args.model,
        "prompt_rows": args.rows,
        "reply_rows": args.reply,
        "kv_memory_bytes": args.sessions * whole.slot_bytes,
        "threads": whole.engine.info.threads,
        "ways": [
            {
                "name": crowd.way.name,
                "slot_bytes": crowd.slot_bytes,
                "fitting": crowd.fitting,
                "decoded_together": crowd.pool.active,
                "kept_rows": crowd.rows,
                "seconds": crowd.seconds,
                "tokens_per_second": crowd.tokens_per_second,
            }
            for crowd in crowds
        ],
    }
    report(table, figures, args.out)


if __name__ == "__main__":
    main()
