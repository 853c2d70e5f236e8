# SPDX-License-Identifier: Apache-2.0
"""``starkv pack``: an engine → the same engine with a packed KV cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import progress
from starkv.cli.kv import KvQuant, KvRank, packing_options
from starkv.cli.options import Output
from starkv.errors import UsageError

if TYPE_CHECKING:
    from starkv.kv_packing.options import PackingOptions


def pack(
    engine: Annotated[str, typer.Argument(help="Engine directory, or a model's name.")],
    out: Output = None,
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder with prompts.jsonl and its images. Drawn screens by default.", show_default=False
        ),
    ] = None,
    factors: Annotated[
        Path | None,
        typer.Option(
            help="Low-rank factors that `starkv train-kv` wrote, instead of a --kv-rank without training.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Give an engine a packed KV cache: kept rows as int8 or int4, as low-rank latents, or both.

    Prefill and the choice of rows stay exact; only what is kept is packed. The engine's directory is printed.

    Example: [bold]starkv pack gui-tiny --kv-quant int8[/]

    Example: [bold]starkv pack engines/gui-tiny-ort-int4 --kv-rank 0.5 --kv-quant int4 --out small[/]

    Example: [bold]starkv pack gui-tiny --factors gui-tiny-r25.factors --kv-quant int8[/]
    """
    from starkv.cli.engines import find_engine, made_parents
    from starkv.cli.packing import pack_engine, pack_trained
    from starkv.kv_packing.options import PackingOptions, parse_kv_quant
    from starkv.manifest import read_manifest

    quant = parse_kv_quant(kv_quant or "none")
    if factors is not None and (kv_rank is not None or calibration is not None):
        raise UsageError(
            "--factors says which ranks rows have, and needs no prompts; leave --kv-rank and --calibration "
            "out"
        )
    wanted = None if factors else packing_options(kv_quant, kv_rank) or PackingOptions(quant)
    plain = find_engine(engine, device="cpu")
    if read_manifest(plain).backend == "trt":
        _measure_again(plain, out, wanted, calibration)
        return
    suffix = f"kv-trained-{quant}" if wanted is None else wanted.directory_suffix
    target = out or plain.with_name(f"{plain.name}-{suffix}")
    if target.absolute() == plain.absolute():
        raise UsageError(f"{target} is the engine that is to be packed; choose another --out")
    with made_parents(target):
        if factors is not None:
            pack_trained(plain, target, factors, quant)
        elif wanted is not None:
            with progress() as stages:
                pack_engine(plain, target, wanted, stages, calibration)
    print(target)


def _measure_again(
    engine: Path, out: Path | None, wanted: "PackingOptions | None", calibration: Path | None
) -> None:
    """Another set of scales for an engine of TensorRT, which was built for the packing that is wanted."""
    from starkv.cli.trt_packing import measure_again
    from starkv.manifest import read_manifest

    packing = read_manifest(engine).kv_packing
    built = "rows as they are" if packing is None else packing.describe()
    if wanted is None or packing is None or (wanted.quant, wanted.rank) != (packing.quant, packing.rank):
        asked = "trained factors" if wanted is None else str(wanted)
        raise UsageError(
            f"{engine} was built for {built}, not for {asked}; what a TensorRT engine keeps is settled when "
            "it is built: `starkv build MODEL --backend trt --kv-quant int8` or int4"
        )
    if out is None:
        raise UsageError(f"{engine} packs already; give --out for one with other scales")
    with progress() as stages:
        measure_again(engine, out, calibration, stages)
    print(out)
