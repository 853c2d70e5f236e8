# SPDX-License-Identifier: Apache-2.0
"""``starkv bench``: llama-bench's table for an engine."""

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import errors, note
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank
from starkv.cli.options import Device, Engine, NoVerify, Threads
from starkv.errors import UsageError
from starkv.methods.names import FULL

if TYPE_CHECKING:
    from starkv.runtime.agent import Agent
    from starkv.runtime.benchmark import Measurement
    from starkv.runtime.kv.policy import KvPolicy

MIB = 2**20
_MOST_PIXELS = 64 * MIB
_COLUMNS = (
    "model",
    "size",
    "params",
    "backend",
    "threads",
    "kv",
    "test",
    "t/s",
    "kv MiB",
    "peak MiB",
    "% roofline",
)


def bench(
    engine: Engine,
    n_prompt: Annotated[
        list[int] | None,
        typer.Option("-p", "--n-prompt", min=0, help="Rows to prefill; may be repeated, 0 for none. [512]"),
    ] = None,
    n_gen: Annotated[
        list[int] | None,
        typer.Option("-n", "--n-gen", min=0, help="Tokens to decode; may be repeated, 0 for none. [128]"),
    ] = None,
    n_depth: Annotated[
        list[int] | None,
        typer.Option("-d", "--n-depth", min=0, help="Rows cached before; may be repeated. [0]"),
    ] = None,
    screen: Annotated[
        str, typer.Option(help="Screenshot for the vision tower, WIDTHxHEIGHT, or none.")
    ] = "1920x1080",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 5,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json or csv.")] = "md",
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
) -> None:
    """Measure prefill, decode and vision; mean ± standard deviation, as llama-bench prints it.

    Tokenization and sampling are not counted. % roofline compares decode with reading all its weights and
    KV rows once per token at the memory bandwidth measured in the same run; above 100 % they came from cache.
    With a KV budget, compression is measured too (kv2560→512), and decode runs behind what is kept of the
    depth.

    Example: [bold]starkv bench --engine gui-tiny -p 512 -n 128 -d 0 -d 2048[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.runtime.agent import Agent
    from starkv.runtime.benchmark import Benchmark, bandwidth_of, decoder_bytes

    if output not in ("md", "json", "csv"):
        raise UsageError(f"unknown output {output!r}; known: md, json, csv")
    size = _parse_screen(screen)
    # Without a budget nothing is evicted, whatever the engine's default is: depths mean what they say.
    budget = 1.0 if (kv_method, kv_budget, kv_capacity) == (None, None, None) else kv_budget
    kv_options = KvOptions(kv_method, budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    directory = find_engine(engine, device=device, packing=kv_options.packing)
    agent = Agent.load(directory, not no_verify, threads, device)
    policy = kv_options.policy(agent.engine.manifest)
    runner = Benchmark(agent.engine, decoder_bytes(directory), repetitions, policy)
    measurements = []
    with errors.status("measuring") as status:
        for row in runner.run(n_prompt or [512], n_gen or [128], n_depth or [0], size):
            measurements.append(row)
            status.update(f"measuring; {row.test} done")
        # Last, because its gigabyte would show as the engine's peak memory.
        bandwidth = bandwidth_of(agent.engine)
    _print(output, agent, directory, policy, measurements, bandwidth)
    note(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s; {agent.engine.info.device}")


def _parse_screen(text: str) -> tuple[int, int] | None:
    if text == "none":
        return None
    width, _, height = text.partition("x")
    if not all(side.isdecimal() and len(side) < 6 and int(side) for side in (width, height)):
        raise UsageError(f"--screen {text!r} is not WIDTHxHEIGHT in pixels, such as 1920x1080")
    if int(width) * int(height) > _MOST_PIXELS:
        raise UsageError(f"--screen {text} has more than {_MOST_PIXELS:,} pixels")
    return int(width), int(height)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _print(
    output: str,
    agent: "Agent",
    directory: Path,
    policy: "KvPolicy",
    measurements: "list[Measurement]",
    bandwidth: float,
) -> None:
    from starkv.runtime.engines.base import packs

    manifest, info = agent.engine.manifest, agent.engine.info
    size = sum(
        (directory / name).stat().st_size for name in manifest.files if not name.endswith(".prepacked.data")
    )
    model = f"{manifest.name} {manifest.quantization.preset}"
    packing = info.kv_packing.name if info.kv_packing and packs(info, policy) else None
    stored = packing or info.kv_dtype
    kv = stored if policy.method == FULL else f"{stored} {policy.method}"
    fixed = (
        model,
        f"{size / MIB:.2f} MiB",
        f"{manifest.parameters / 1e6:.2f} M",
        info.backend,
        str(info.threads),
        kv,
    )
    rows = [
        (
            *fixed,
            row.test,
            f"{row.mean:.2f} ± {row.deviation:.2f}",
            f"{row.kv_mib:.2f}",
            f"{row.peak_mib:.0f}",
            _percent(row.roofline_share(bandwidth)),
        )
        for row in measurements
    ]
    if output == "md":
        print(f"| {' | '.join(_COLUMNS)} |")
        print(f"|{'|'.join(' --- ' if i < 7 else ' ---: ' for i in range(len(_COLUMNS)))}|")
        for cells in rows:
            print(f"| {' | '.join(cells)} |")
    elif output == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    else:
        print(
            json.dumps(
                {
                    "model": manifest.name,
                    "quantization": manifest.quantization.preset,
                    "size_bytes": size,
                    "parameters": manifest.parameters,
                    "backend": info.backend,
                    "device": info.device,
                    "threads": info.threads,
                    "kv_dtype": info.kv_dtype,
                    "kv_packing": packing,
                    "kv_method": policy.method,
                    "kv_budget": policy.budget.ratio,
                    "kv_capacity": policy.budget.capacity,
                    "tool_versions": manifest.tool_versions,
                    "memory_bandwidth": bandwidth,
                    "tests": [
                        {
                            "test": row.test,
                            "tokens_per_second": row.mean,
                            "standard_deviation": row.deviation,
                            "rates": row.rates,
                            "kv_mib": row.kv_mib,
                            "peak_mib": row.peak_mib,
                            "roofline_share": row.roofline_share(bandwidth),
                        }
                        for row in measurements
                    ],
                }
            )
        )
