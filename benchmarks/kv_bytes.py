# SPDX-License-Identifier: Apache-2.0
"""How much smaller a KV cache really gets, and how much smaller it is on paper.

    python benchmarks/kv_bytes.py --out kv-bytes.json

Empty caches of a model's true sizes are told that they hold the rows of a prompt of five 1080p screenshots
and a reply, and asked how many bytes that is. No weights are needed: bytes do not depend on what is in them.

* nominal: share of the rows x share of the rank x bits, as papers count. STAR-KV (arXiv 2606.08382) counts
  its 4-bit outliers and 3-bit inliers as 3.2 bits, although they lie in 4;
* packed rows: scales, padding and whole tiles of 16 ranks counted, positions not;
* whole cache: as a store of the runtime holds it, positions included, and the newest rows and the reply as
  floats where the format leaves them so; compared with a cache of 16 bits per number, raw rows as well;
* of 32 bits: the same on a processor, where the plain cache and raw rows have 32 bits;
* 4 layers left: the whole cache with four layers in 16 bits, as STAR-KV leaves them.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import report

from starkv.export.models.qwen2_5_vl_config import parse_config
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.positions import POSITION_BYTES
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.factor import Factor
from starkv.lowrank.latent_format import FLOAT16, FLOAT32, INT8, NIBBLES, NIBBLES_4_3, LatentFormat
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.plan import LayerSpectra, RankPlan, flat_plan
from starkv.lowrank.quantized_rows import Bits, RowQuantization
from starkv.manifest import TextShape
from starkv.memory_plan.rows import SCREENS, TEXT_ROWS
from starkv.runtime.kv.codecs import rotary_of
from starkv.runtime.kv.low_rank import LowRankCodec
from starkv.runtime.kv.packed import KvCodec
from starkv.runtime.kv.quantized import QuantizedCodec

MODELS = Path(__file__).parent.parent / "models"
GEOMETRIES = {
    "7B": (MODELS / "configs" / "ui-tars-1.5-7b.json", 2691),
    "3B": (MODELS / "configs" / "qwen2.5-vl-3b.json", 2691),
    "gui-tiny": (MODELS / "gui-tiny" / "config.json", 320),
}
"""Configuration, and image tokens of a 1080p screenshot (gui-tiny: of the largest that it takes)."""
PAPER = "LLaMA-2-7B"
PAPER_SHAPE = TextShape(
    layers=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32000,
    rope_theta=1e4,
    mrope_section=None,
    max_positions=4096,
    tied_embedding=False,
)
"""Of STAR-KV's 20x: a model whose queries have a KV head each."""
PAPER_ROWS = 8192
REPLY_ROWS = 32
RECENT_ROWS = 16
KEPT = (1.0, 0.2)
FULL_RANK = 1.0
HALF_BITS = 16
UNTOUCHED = 4
"""Layers that STAR-KV leaves uncompressed: 0, 1, 2 and the last."""


@dataclass(frozen=True)
class Format:
    """A way to store kept rows."""

    name: str
    bits: float
    """Of a number, as papers count."""
    rank: float | None
    """Share of full rank; None for rows that are no latents."""
    latent: LatentFormat | None = None

    def nominal(self, kept: float) -> float:
        """Compression as papers count it."""
        return HALF_BITS / self.bits / (self.rank or FULL_RANK) / kept


FORMATS = (
    Format("16 bits", 16, None),
    Format("int8, static scales", 8, None),
    Format("int4, static scales", 4, None),
    Format("int8, scales per token", 8, 1.0, INT8),
    Format("int4, scales per token", 4, 1.0, NIBBLES),
    Format("rank 50 %, 16 bits", 16, 0.5, FLOAT16),
    Format("rank 50 %, int8", 8, 0.5, INT8),
    Format("rank 50 %, int4", 4, 0.5, NIBBLES),
    Format("rank 25 %, int4", 4, 0.25, NIBBLES),
    Format("rank 25 %, 4/3 bits as published", 3.2, 0.25, NIBBLES_4_3),
)


@dataclass(frozen=True)
class Line:
    """A format's factors at one share of the rows. A factor of 2 is half the bytes."""

    model: str
    kept: float
    format: str
    row_bytes: float
    """Of one packed token in a layer, mean over the layers, without its position."""
    nominal: float
    rows: float
    whole: float
    whole_of_float32: float
    with_untouched: float


def geometries() -> dict[str, tuple[TextShape, int]]:
    """Sizes of each model, and rows of its prompt."""
    found = {
        model: (parse_config(json.loads(path.read_text()), path).text, SCREENS * image_tokens + TEXT_ROWS)
        for model, (path, image_tokens) in GEOMETRIES.items()
    }
    return {**found, PAPER: (PAPER_SHAPE, PAPER_ROWS)}


def plan_of(text: TextShape, one: Format) -> RankPlan:
    """The same share of full rank in every layer; planned ranks cost as much, see ``plan_ranks``."""
    assert one.rank is not None
    assert one.latent is not None
    spectra = LayerSpectra(
        tuple(np.ones(text.head_dim) for _ in range(text.kv_heads)), np.ones(text.kv_heads * text.head_dim)
    )
    return flat_plan(one.rank, [spectra] * text.layers, one.latent, dense_row_bytes(text, 2))


def dense_row_bytes(text: TextShape, item_bytes: int) -> int:
    """Bytes of one token's key and value in a layer."""
    return 2 * text.kv_heads * text.head_dim * item_bytes


def codec_of(text: TextShape, one: Format) -> KvCodec:
    """The runtime's codec of a format, with factors and scales of ones."""
    heads = (text.kv_heads, text.head_dim)
    rotary = rotary_of(text)
    if one.rank is None:
        bits: Bits = 8 if one.bits == 8 else 4
        scales = np.ones(heads, np.float32)
        layer = RowQuantization(bits, scales, scales, np.zeros(heads), np.zeros(heads))
        return QuantizedCodec(QuantizedPacking(bits, (layer,) * text.layers), rotary, text)
    assert one.latent is not None
    layers = []
    for ranks in plan_of(text, one).layers:
        assert ranks is not None
        keys = tuple(_factor(text.head_dim, rank) for rank in ranks.keys)
        values = _factor(text.kv_heads * text.head_dim, ranks.values)
        layers.append(LowRankLayer(keys, values, np.zeros(heads), np.zeros(heads)))
    return LowRankCodec(LowRankPacking(one.latent, tuple(layers), RECENT_ROWS), rotary, text, one.name)


def _factor(width: int, rank: int) -> Factor:
    return Factor(np.zeros((width, rank)), np.zeros((rank, width)))


def lines_of(model: str, text: TextShape, prompt_rows: int) -> Iterator[Line]:
    """All formats of a model at both shares."""
    dense = dense_row_bytes(text, 2)
    whole = dense * text.layers * (prompt_rows + REPLY_ROWS)
    for kept in KEPT:
        rows = round(kept * prompt_rows)
        for one in FORMATS:
            if one.bits == HALF_BITS and one.rank is None:
                row_bytes: float = dense
                held = dense * text.layers * (rows + REPLY_ROWS)
                held32 = 2 * held
            else:
                row_bytes, held, held32 = _packed(text, one, rows)
                if one.latent is FLOAT16:
                    # The processor's latents are as wide as its floats.
                    held32 = _packed(text, replace(one, latent=FLOAT32), rows)[2]
            left = dense * (rows + REPLY_ROWS) * UNTOUCHED + held * (1 - UNTOUCHED / text.layers)
            yield Line(
                model=model,
                kept=kept,
                format=one.name,
                row_bytes=row_bytes,
                nominal=one.nominal(kept),
                rows=dense / row_bytes / kept,
                whole=whole / held,
                whole_of_float32=2 * whole / held32,
                with_untouched=whole / left,
            )


def _packed(text: TextShape, one: Format, rows: int) -> tuple[float, float, float]:
    """Bytes of a packed token in a layer, and of the cache after the reply: with raw rows of 16 bits, and as
    the processor holds it, with raw rows of 32."""
    codec = codec_of(text, one)
    store = codec.new_store(1, rows + REPLY_ROWS)
    packing = codec.packing
    row_bytes = sum(packing.bytes_per_row(layer) for layer in range(text.layers)) / text.layers
    row_bytes -= POSITION_BYTES
    if one.rank is None:
        store.count_rows(rows + REPLY_ROWS)
        return row_bytes, store.bytes_held, store.bytes_held
    store.count_rows(rows)
    # The reply's rows are appended to the raw ones, as a decode step does it.
    store.lengths += REPLY_ROWS
    store.tail_lengths += REPLY_ROWS
    raw_rows = int(store.tail_lengths.sum())
    narrower = raw_rows * (dense_row_bytes(text, 4) - dense_row_bytes(text, 2))
    return row_bytes, store.bytes_held - narrower, store.bytes_held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    table: list[tuple[str, ...]] = [
        (
            *("model", "rows", "format", "bytes per row and layer", "nominal"),
            *("packed rows", "whole cache", "of 32 bits", "4 layers left"),
        )
    ]
    found = []
    for model, (text, prompt_rows) in geometries().items():
        for line in lines_of(model, text, prompt_rows):
            found.append(asdict(line))
            factors = (line.nominal, line.rows, line.whole, line.whole_of_float32, line.with_untouched)
            table.append(
                (
                    model,
                    f"{line.kept:.0%}",
                    line.format,
                    f"{line.row_bytes:.0f}",
                    *(f"{value:.1f}x" for value in factors),
                )
            )
    report(table, {"benchmark": "kv_bytes", "reply_rows": REPLY_ROWS, "figures": found}, args.out)


if __name__ == "__main__":
    main()
