# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands share, so that they are named and explained once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from starkv.manifest import PromptDialect

if TYPE_CHECKING:
    from starkv.runtime.session import Mode

Model = Annotated[str, typer.Argument(help="Model card's name (see `models/`) or a Hugging Face folder.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quant",
        help="Weights: fp32, int8, int4, int4-awq (calibrated) or int4-small. The model card's choice by "
        "default.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Folder with prompts.jsonl and its images, for int4-awq and packed caches. Drawn screens by "
        "default.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder with a card's weights, instead of $STARKV_MODELS or the Hugging Face Hub. With "
        "--random-weights: where to keep them.",
        show_default=False,
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Make up weights of the model's true sizes, to measure with; what they say means nothing.",
    ),
]
RandomDtype = Annotated[
    str | None,
    typer.Option(
        "--random-dtype", help="Of the random weights: bf16, fp16 or fp32. [bf16]", show_default=False
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        "--layers",
        help="Random weights for so many layers of the text decoder only.",
        min=1,
        show_default=False,
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", help="Engine directory, or a model's name: its engine is found or built.")
]
Dialect = Annotated[
    str | None,
    typer.Option(
        "--dialect",
        help=f"Words of the prompt: {', '.join(get_args(PromptDialect))}. The model's own by default; "
        "ui_tars_grounding for single clicks.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. All usable processors by default.", min=1)]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu or cuda. By default what the engine was built for; of a model's engines the "
        "GPU's where ONNX Runtime can use one."
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip comparing the engine's files with their hashes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[Path | None, typer.Option("--out", help="Directory to write.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest reply.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Nucleus of the sampling.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the reply before this text; may be repeated.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Go on from the compacted KV cache of the turn before, instead of prefilling all turns again.",
    ),
]
Screenshots = Annotated[
    int | None,
    typer.Option(
        "--screenshots",
        min=1,
        help="With --stream: most screenshots in view; the oldest makes room. All by default.",
        show_default=False,
    ),
]
NewestWhole = Annotated[
    bool,
    typer.Option(
        "--newest-whole/--newest-compacted",
        help="Of a stream: keep the newest screenshot's rows, in host memory, until the next one was read "
        "behind them. More accurate at small budgets; compacted takes less memory.",
    ),
]


def stream_mode(stream: bool, screenshots: int | None) -> "Mode":
    """The session mode that the options ask for.

    Raises:
        UsageError: a number of screenshots without a stream.
    """
    from starkv.errors import UsageError

    if screenshots is not None and not stream:
        raise UsageError("--screenshots belongs to --stream; give both, or leave older images out yourself")
    return "stream" if stream else "prompt"
