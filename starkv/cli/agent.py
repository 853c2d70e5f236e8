# SPDX-License-Identifier: Apache-2.0
"""``starkv agent``: look, ask, act, until the goal is reached or something ends it."""

import json as json_module
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import fail, note
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank
from starkv.cli.options import (
    Device,
    Dialect,
    Engine,
    Json,
    MaxNewTokens,
    NewestWhole,
    NoVerify,
    Stream,
    Temperature,
    Threads,
    TopP,
    stream_mode,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from starkv.runtime.agents.loop import OnStep
    from starkv.runtime.agents.steps import Outcome, Step
    from starkv.runtime.agents.trace import Trace


def agent(
    engine: Engine,
    environment: Annotated[
        str,
        typer.Option(
            help="What to act in: `desktop` (drawn, sets its own goal), `browser` (Playwright), or "
            "module:Class of your own."
        ),
    ] = "desktop",
    goal: Annotated[
        str | None,
        typer.Option(help="What is to be done. Needed unless the environment sets it.", show_default=False),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Page that the browser begins with.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the environment and of sampling.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Most steps.", min=1)] = 15,
    minutes: Annotated[
        float | None, typer.Option(help="No step begins after so long.", show_default=False)
    ] = None,
    screenshots: Annotated[
        int, typer.Option(help="Most screenshots in a prompt, the current one included.", min=1)
    ] = 5,
    retries: Annotated[
        int, typer.Option(help="Times to ask again, less greedily, where a reply is no use.", min=0)
    ] = 3,
    repeats: Annotated[
        int,
        typer.Option(
            help="Times to do the same to a screen that it doesn't change; then ask again, less greedily. "
            "0: as often as the model likes.",
            min=0,
        ),
    ] = 3,
    retry_temperature: Annotated[float, typer.Option(help="Of the sampling then.", min=0.0)] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the trace: a page, lines of JSON, screenshots. No trace without it.",
            show_default=False,
        ),
    ] = None,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    stream: Stream = False,
    newest_whole: NewestWhole = True,
    dialect: Dialect = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Let a model act in an environment, step by step.

    The exit code is 0 where the goal is reached, 1 where it is not, 2 where something is wrong. Where the
    environment can't tell, the model's word counts.

    Example: [bold]starkv agent --engine gui-tiny --environment desktop --seed 3 --out runs/desktop-3[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.errors import UsageError
    from starkv.runtime.agent import Agent
    from starkv.runtime.agents.asking import SessionAsk
    from starkv.runtime.agents.environment import ENVIRONMENTS, EnvironmentOptions, open_environment
    from starkv.runtime.agents.loop import AgentLoop, LoopSettings
    from starkv.runtime.agents.trace import Trace, check_folder
    from starkv.runtime.generation import SamplingParameters
    from starkv.runtime.prompts.dialects import parse_dialect

    parameters = SamplingParameters(max_new_tokens, temperature, top_p, seed)
    kv_options = KvOptions(kv_method, kv_budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    words = parse_dialect(dialect) if dialect else None
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes must be more than 0, not {minutes:g}")
    if out:
        check_folder(out)
    if environment not in ENVIRONMENTS and os.getcwd() not in sys.path:
        # A class of the user's own usually lies where they are.
        sys.path.insert(0, os.getcwd())
    with closing(open_environment(environment, EnvironmentOptions(goal, url, seed))) as world:
        wanted = goal or world.goal
        if not wanted:
            raise UsageError(
                f"the environment {environment} sets no goal; say what is to be done with --goal"
            )
        found = Agent.load(
            find_engine(engine, device=device, packing=kv_options.packing), not no_verify, threads, device
        )
        manifest = found.engine.manifest
        policy = kv_options.policy(manifest)
        settings = LoopSettings(
            dialect=words or manifest.prompt,
            coordinates=manifest.coordinates,
            steps=steps,
            seconds=None if minutes is None else 60 * minutes,
            screenshots=screenshots,
            retries=retries,
            retry_temperature=retry_temperature,
            repeats=repeats,
            parameters=parameters,
        )
        header = {
            "goal": wanted,
            "engine": manifest.name,
            "environment": environment,
            "url": url,
            "seed": seed,
            "dialect": settings.dialect,
            "screenshots": screenshots,
            "kv_method": policy.method,
            "kv_budget": policy.budget.ratio,
            "kv_capacity": policy.budget.capacity,
        }
        trace = Trace(out, header) if out else None
        note(f"goal: {wanted}")
        view = screenshots if stream else None
        ask = SessionAsk(found, policy, settings.dialect, stream_mode(stream, view), view, newest_whole)
        outcome = AgentLoop(world, ask, wanted, settings, _watcher(trace)).run()
    if trace:
        trace.finish(outcome)
    _tell(outcome, wanted, out, json)
    if outcome.reason == "error":
        raise typer.Exit(2)
    reached = outcome.reason in ("finished", "done") if outcome.success is None else outcome.success
    if not reached:
        raise typer.Exit(1)


def _watcher(trace: "Trace | None") -> "OnStep":
    """Writes each step into the trace and a line about it on stderr."""

    def watch(step: "Step", screenshot: "Image.Image | None") -> None:
        if trace:
            trace.add(step, screenshot)
        done = "; ".join(_in_words(action) for action in step.actions) or "nothing"
        seconds = (step.screenshot_ms + step.ask_ms + step.perform_ms) / 1e3
        line = f"step {step.number}: {done}; {seconds:.1f} s"
        if step.timings:
            kept, full = step.timings["kv_tokens_kept"], step.timings["kv_tokens_full"]
            held = step.timings["kv_bytes_held"] / 1024
            line += f", KV {kept:g} of {full:g} rows, {held:,.0f} KiB held"
            if waiting := step.timings["kv_bytes_waiting"] / 1024:
                line += f" and {waiting:,.0f} waiting"
        if step.retries:
            line += f", asked {step.retries + 1} times"
        note(f"{line}; {step.error}" if step.error else line)

    return watch


def _in_words(action: "Mapping[str, object]") -> str:
    given = [f"{value}" for name, value in action.items() if name not in ("type", "model_xy", "model_end_xy")]
    return " ".join([str(action["type"]), *given])


def _tell(outcome: "Outcome", goal: str, out: Path | None, json: bool) -> None:
    if json:
        result = {**outcome.to_json(), "goal": goal, "trace": str(out) if out else None}
        print(json_module.dumps(result, ensure_ascii=False))
    else:
        state = {True: "reached", False: "not reached", None: "ended"}[outcome.success]
        print(f"{state}: {outcome.reason} after {outcome.steps} steps, {outcome.seconds:.1f} s")
        if outcome.message:
            print(outcome.message)
    if outcome.error:
        fail(outcome.error)
    if out:
        note(f"trace: {out / 'index.html'}")
