# SPDX-License-Identifier: Apache-2.0
"""How long each layer of a TensorRT engine takes on a prompt with a screenshot."""

from starkv.calibration.prompts import drawn_prompts
from starkv.cli.engine_outputs import Case, prompt_inputs
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

_BUDGET = 0.5


def layer_timings(engine: TrtEngine, tokenizer: ChatTokenizer, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each layer, the mean of some rounds.

    A round encodes a drawn screen, prefills it with an instruction, keeps half of the rows and decodes one
    token.

    Args:
        engine: opened.
        tokenizer: the engine's.
        rounds: how many.
    """
    # The first round chooses kernels' workspaces and is none of those that count.
    _run(engine, tokenizer)
    with engine.timed_layers() as times:
        for _ in range(rounds):
            _run(engine, tokenizer)
    return {part: {name: ms / rounds for name, ms in layers.items()} for part, layers in times.items()}


def _run(engine: TrtEngine, tokenizer: ChatTokenizer) -> None:
    manifest, policy = engine.manifest, KvPolicy(STAR_KV, Budget(_BUDGET))
    prompt = prompt_inputs(engine, tokenizer, Case(drawn_prompts(1, manifest.image.max_pixels)[0]))
    rows = len(prompt.embeds)
    engine.encode_image(prompt.image)
    arena = engine.new_arena(rows)
    engine.prefill(arena, prompt.embeds, prompt.rope)
    pool = engine.new_pool(1, engine.most_kept_rows(rows, policy) + 1, STAR_KV)
    engine.compress(arena, pool, pool.acquire(), prompt.rows, policy)
    one = Rope(*rope_tables(text_positions(1, prompt.next_position).values, manifest.text))
    engine.decode(pool, prompt.embeds[:1], one)
