# SPDX-License-Identifier: Apache-2.0
"""``starkv serve``: an OpenAI-compatible HTTP server."""

from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import note
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank
from starkv.cli.options import Device, Engine, NewestWhole, NoVerify, Threads

MIB = 2**20


def serve(
    engine: Engine,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="STARKV_API_KEY", help="Asked for as Authorization: Bearer …", show_default=False
        ),
    ] = None,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 8,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that wait; more are told to come back.")
    ] = 64,
    kv_memory: Annotated[int, typer.Option(min=1, help="MiB of keys and values, all sequences.")] = 4096,
    session_memory: Annotated[
        int, typer.Option(min=0, help="MiB of host memory for sessions between their turns.")
    ] = 4096,
    screenshots: Annotated[
        int | None,
        typer.Option(min=1, help="Most screenshots of a session in view. [all]", show_default=False),
    ] = None,
    newest_whole: NewestWhole = True,
    prefill_rows: Annotated[
        int, typer.Option(min=1, help="Rows of a prompt between two tokens of the others.")
    ] = 512,
    request_timeout: Annotated[float, typer.Option(help="Seconds, queueing included.")] = 300.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 2048,
    max_images: Annotated[int, typer.Option(min=1, help="Of one request.")] = 32,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Of one image as it is sent.")] = 40_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of one request.")] = 64,
    max_body_total: Annotated[int, typer.Option(min=1, help="MiB of all requests in progress.")] = 512,
    max_pixels_total: Annotated[
        int, typer.Option(min=1, help="Decoded for all requests in progress; 3 bytes each.")
    ] = 500_000_000,
    max_requests: Annotated[int, typer.Option(min=1, help="In progress, those that wait included.")] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="Open at once.")] = 512,
    media_path: Annotated[
        Path | None,
        typer.Option(help="Folder that file:// images may come from. [none]", show_default=False),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json, to stderr.")] = "text",
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
) -> None:
    """Serve an engine to OpenAI's clients, many sessions at once.

    Example: [bold]starkv serve --engine gui-tiny --port 8080 --kv-budget 0.4[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.errors import UsageError
    from starkv.runtime.agent import Agent
    from starkv.runtime.server.options import ServerOptions
    from starkv.runtime.server.run import run_server
    from starkv.runtime.serving.limits import SchedulerLimits
    from starkv.runtime.serving.scheduler import Scheduler

    if log_format not in ("text", "json"):
        raise UsageError(f"unknown --log-format {log_format!r}; known: text, json")
    limits = SchedulerLimits(
        slots=slots,
        queue=max_queue,
        kv_bytes=kv_memory * MIB,
        parked_bytes=session_memory * MIB,
        prefill_rows=prefill_rows,
        screenshots=screenshots,
        newest_whole=newest_whole,
    )
    kv_options = KvOptions(kv_method, kv_budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    agent = Agent.load(
        find_engine(engine, device=device, packing=kv_options.packing), not no_verify, threads, device
    )
    manifest = agent.engine.manifest
    options = ServerOptions(
        model=manifest.name,
        policy=kv_options.policy(manifest),
        api_key=api_key,
        media_path=media_path,
        most_body_bytes=max_body * MIB,
        most_images=max_images,
        most_image_pixels=max_image_pixels,
        most_total_body_bytes=max_body_total * MIB,
        most_total_pixels=max_pixels_total,
        most_requests=max_requests,
        most_connections=max_connections,
        most_new_tokens=max_tokens,
        default_new_tokens=min(512, max_tokens),
        timeout_seconds=request_timeout,
        log_format="json" if log_format == "json" else "text",
    )
    scheduler = Scheduler(agent.engine, agent.tokenizer, limits)
    try:
        run_server(
            scheduler,
            manifest,
            agent.engine.info,
            options,
            host,
            port,
            lambda url: note(f"{manifest.name} answers at {url}/v1; Ctrl-C ends"),
        )
    finally:
        scheduler.close(0)
