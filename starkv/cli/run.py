# SPDX-License-Identifier: Apache-2.0
"""``starkv run``: a screenshot and a prompt → an action."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import note, print_actions
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank, kept_rows
from starkv.cli.options import (
    Device,
    Dialect,
    Engine,
    Json,
    MaxNewTokens,
    NoVerify,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopP,
)


def run(
    engine: Engine,
    image: Annotated[
        list[Path], typer.Option(help="Screenshot; may be repeated, oldest first. Clicks are on the last.")
    ],
    prompt: Annotated[str, typer.Option(help='Instruction, such as "Click the red star."')],
    draw: Annotated[
        Path | None, typer.Option(help="Write a PNG with the action drawn on the screenshot.")
    ] = None,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    dialect: Dialect = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Ask an engine what to do on a screenshot.

    Example: [bold]starkv run --engine gui-tiny --image examples/screen.png --prompt "Click the red star."
    --kv-budget 0.4[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.runtime.agent import Agent
    from starkv.runtime.drawing import check_place, draw_actions, save_png
    from starkv.runtime.generation import SamplingParameters
    from starkv.runtime.preprocess.image import load_image
    from starkv.runtime.prompts.dialects import parse_dialect

    if draw:
        check_place(draw)
    parameters = SamplingParameters(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    kv_options = KvOptions(kv_method, kv_budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    words = parse_dialect(dialect) if dialect else None
    *earlier, screenshot = [load_image(path) for path in image]
    agent = Agent.load(
        find_engine(engine, device=device, packing=kv_options.packing), not no_verify, threads, device
    )
    reply = agent.act(
        screenshot,
        prompt,
        parameters,
        kv_options.policy(agent.engine.manifest),
        None if json else lambda piece: print(piece, end="", flush=True),
        earlier,
        words,
    )
    if draw:
        save_png(draw_actions(screenshot, reply.action_json), draw)
    if json:
        print(json_module.dumps(reply.to_json(), ensure_ascii=False))
        return
    print()
    print_actions(reply.action_json)
    if reply.error:
        note(f"warning: {reply.error}")
    timings = reply.timings
    note(
        f"{timings.prompt_tokens} prompt tokens ({timings.image_tokens} of the image), "
        f"{timings.generated_tokens} generated; vision {timings.vision_ms:.1f} ms, "
        f"prefill {timings.prefill_ms:.1f} ms, compression {timings.compress_ms:.1f} ms, "
        f"decode {timings.decode_per_second:.0f} tokens/s; {kept_rows(timings)}"
    )
    if draw:
        note(f"drawn to {draw}")
