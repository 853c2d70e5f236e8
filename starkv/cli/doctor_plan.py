# SPDX-License-Identifier: Apache-2.0
"""``starkv doctor --plan``: the memory that a TensorRT engine needs, as Markdown tables or JSON."""

import json as json_module
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.errors import UsageError
from starkv.manifest import ImageLimits, TensorRTBuild, read_manifest

if TYPE_CHECKING:
    from starkv.memory_plan.plan import MemoryPlan, PlannedModel

BUDGETS, SESSIONS = (1.0, 0.2, 0.05), (1, 8, 32)
PREFILL_ROWS, NEW_TOKENS = 2048, 256
_UNUSED = (0.0, 0.0, 0.0)
_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""``dtype`` of a ``config.json`` → storage of the embedding; bf16 where it says nothing."""

Plan = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="Show the memory that a TensorRT engine of this model needs: a card's name, or an engine "
        "directory.",
        show_default=False,
    ),
]
PlanBudgets = Annotated[
    list[float] | None,
    typer.Option("--kv-budget", help="With --plan: may be repeated. [1, 0.2 and 0.05]", show_default=False),
]
PlanSessions = Annotated[
    list[int] | None,
    typer.Option("--sessions", help="With --plan: may be repeated. [1, 8 and 32]", min=1, show_default=False),
]
PlanPromptRows = Annotated[
    int | None,
    typer.Option(
        "--prompt-rows",
        help="With --plan: longest prompt. [five 1080p screenshots and 190 rows of text]",
        min=64,
        show_default=False,
    ),
]
PlanPrefillRows = Annotated[
    int | None,
    typer.Option(
        "--prefill-rows", help="With --plan: rows of one prefill call. [2048]", min=1, show_default=False
    ),
]
PlanQuantization = Annotated[
    str | None, typer.Option("--quant", help="With --plan: as for `build`.", show_default=False)
]
PlanKvQuantization = Annotated[
    str | None,
    typer.Option(
        "--kv-quant", help="With --plan: as for `build`, int8, int4 or none. [none]", show_default=False
    ),
]
PlanPixels = Annotated[
    int | None,
    typer.Option("--max-pixels", help="With --plan: as for `build`.", min=1, show_default=False),
]


@dataclass(frozen=True)
class PlanOptions:
    """What the user says beside ``--plan``."""

    kv_budget: list[float] | None
    sessions: list[int] | None
    prompt_rows: int | None
    prefill_rows: int | None
    quant: str | None
    max_pixels: int | None
    kv_quant: str | None

    def check_unused(self) -> None:
        """Refuse options of the plan without one.

        Raises:
            UsageError: there are some.
        """
        given = [name for name, value in asdict(self).items() if value is not None]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is about a memory plan; add --plan MODEL")


def show_plan(model: str, options: PlanOptions, json: bool) -> None:
    """Print the plan of a card or an engine.

    Raises:
        UsageError: nothing is called so, or an option does not go with it.
    """
    from starkv.memory_plan.tables import plan_json, plan_tables

    directory = Path(model)
    plan = _plan_of_engine(directory, options) if directory.is_dir() else _plan_of_card(model, options)
    print(json_module.dumps(plan_json(plan)) if json else plan_tables(plan))


def _plan_of_card(name: str, options: PlanOptions) -> "MemoryPlan":
    """The plan of an engine that is not built.

    Raises:
        UsageError: no such card or preset, or images that the model does not take.
    """
    from starkv.export.cards import config_of_card, load_card
    from starkv.export.json_file import read_json_object
    from starkv.export.models.families import family_of
    from starkv.export.quantize.presets import load_preset
    from starkv.memory_plan.plan import PlannedModel

    card = load_card(name)
    pixels = options.max_pixels or card.max_pixels
    if not card.min_pixels <= pixels <= card.max_pixels:
        raise UsageError(f"--max-pixels is {pixels}, but {name} takes {card.min_pixels} to {card.max_pixels}")
    path = config_of_card(card)
    config = read_json_object(path, "starkv is not installed whole")
    shapes = family_of(config, path).parse_config(config, path)
    preset = load_preset(options.quant or card.quantization)
    model = PlannedModel(
        name=name,
        text=shapes.text,
        vision=shapes.vision,
        image=ImageLimits(min_pixels=card.min_pixels, max_pixels=pixels, mean=_UNUSED, std=_UNUSED),
        quantization=preset.describe(_STORED.get(config.get("dtype", ""), "bf16")),
        observation_window=card.observation_window,
        max_context=card.max_context,
    )
    return _plan(model, options, SESSIONS)


def _plan_of_engine(directory: Path, options: PlanOptions) -> "MemoryPlan":
    """The plan of an engine that is built; of one for ONNX Runtime what TensorRT would need.

    Raises:
        EngineError: the directory is none.
        UsageError: an option asks for what was settled when it was built.
    """
    from starkv.memory_plan.plan import PlannedModel

    manifest = read_manifest(directory)
    settled: dict[str, object] = {"--quant": options.quant, "--max-pixels": options.max_pixels}
    model, built = PlannedModel.of(manifest), manifest.tensorrt
    if built is not None:
        settled |= {"--prefill-rows": options.prefill_rows, "--kv-quant": options.kv_quant}
    for option, value in settled.items():
        if value is not None:
            raise UsageError(f"{directory} is built, and {option} with it; leave it out, or build it again")
    if built is None:
        return _plan(model, options, SESSIONS)
    if max(options.sessions or [1]) > built.sessions:
        raise UsageError(
            f"{directory} was built for {built.sessions} sessions, not {max(options.sessions or [])}; build "
            "it again with more --sessions"
        )
    rows = replace(options, prefill_rows=built.prefill_rows)
    return _plan(model, rows, tuple(sorted({1, built.sessions})), built)


def _plan(
    model: "PlannedModel",
    options: PlanOptions,
    sessions: tuple[int, ...],
    built: TensorRTBuild | None = None,
) -> "MemoryPlan":
    from starkv.kv_packing.options import code_bits
    from starkv.memory_plan.plan import Wanted, plan_memory
    from starkv.memory_plan.rows import usual_prompt_rows

    usual = min(usual_prompt_rows(model.vision, model.image), model.max_context - NEW_TOKENS)
    wanted = Wanted(
        prompt_rows=options.prompt_rows or usual,
        new_tokens=NEW_TOKENS,
        prefill_rows=options.prefill_rows or PREFILL_ROWS,
        budgets=tuple(options.kv_budget or BUDGETS),
        sessions=tuple(options.sessions or sessions),
        kv_bits=code_bits(options.kv_quant or "none") if built is None else built.kv_bits,
    )
    return plan_memory(model, wanted, built)
