# SPDX-License-Identifier: Apache-2.0
"""``starkv inspect ENGINE --kept IMAGE``: which tokens of a prompt a compression keeps."""

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from PIL import Image
from rich.table import Table

from starkv.cli.console import note, results
from starkv.cli.kept_picture import draw_kept
from starkv.cli.kept_scores import stage_name
from starkv.methods.names import FULL, GUI_KV, PYRAMIDKV, RANDOM, SNAPKV, STAR_KV, STREAMING_LLM
from starkv.methods.rows import PromptRows
from starkv.runtime.actions.coordinates import JsonValue
from starkv.runtime.agent import Agent, AgentReply, understand
from starkv.runtime.drawing import check_place, save_png
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.kept import Kept, Part, check_head, check_layer, kept_json, kept_tokens, stage_changes
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import load_image
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import Session
from starkv.runtime.timings import Timings

_TITLES = {
    FULL: "Full cache",
    STAR_KV: "STaR-KV",
    SNAPKV: "SnapKV",
    PYRAMIDKV: "PyramidKV",
    GUI_KV: "GUI-KV",
    STREAMING_LLM: "StreamingLLM",
    RANDOM: "Random rows",
}


@dataclass(frozen=True)
class Inspection:
    """One compressed prompt."""

    model: str
    prompt: str
    images: Sequence[Image.Image]
    kept: Kept
    policy: KvPolicy
    timings: Timings
    actions: Sequence[Mapping[str, JsonValue]]
    head: int | None = None

    @property
    def title(self) -> str:
        """Method, mode and budget."""
        parts = [_TITLES.get(self.policy.method, self.policy.method)]
        if self.policy.method == STAR_KV:
            parts.append("official" if self.policy.star_kv.is_official else "native")
        budget = self.policy.budget
        if budget.ratio < 1.0:
            parts.append(f"budget {budget.ratio:g}")
        if budget.capacity is not None:
            parts.append(f"capacity {budget.capacity}")
        return ", ".join(parts)

    @property
    def facts(self) -> list[str]:
        """What else the picture says in its head."""
        timings = self.timings
        line = " ".join(self.prompt.split())
        kib = timings.kv_bytes_kept / 1024, timings.kv_bytes_full / 1024
        facts = [
            self.model,
            f"{timings.kv_tokens_kept:g} of {timings.kv_tokens_full} KV rows",
            f"{kib[0]:,.0f} of {kib[1]:,.0f} KiB",
            f"“{line if len(line) <= 48 else line[:47] + '…'}”",
        ]
        where = [f"layer {self.kept.layers[0]}"] if len(self.kept.layers) == 1 else []
        where += [f"KV head {self.head}"] if self.head is not None else []
        return facts + where

    @property
    def kept_by(self) -> str:
        """What a token without a veil was kept by."""
        layers, sets, _ = self.kept.mask.shape
        heads = f"all {sets} KV heads"
        if layers == 1:
            return "kept" if sets == 1 else f"kept by {heads}"
        return f"kept in all {layers} layers" + (f" by {heads}" if sets > 1 else "")


@dataclass(frozen=True)
class Question:
    """What to compress, and what to show of it."""

    paths: Sequence[Path]
    """Screenshots, oldest first."""
    prompt: str
    policy: KvPolicy
    layer: int | None
    head: int | None
    replay: bool
    """Ask after each screenshot in turn, as an agent does."""
    max_new_tokens: int


def inspect_kept(engine: Path, verify: bool, question: Question, out: Path | None, json: bool) -> None:
    """Compress a prompt, print what was kept of it and draw it.

    Args:
        engine: engine directory.
        verify: compare its files with their hashes.
        question: what to compress.
        out: the picture; none if this is None.
        json: print one JSON object instead of a table.

    Raises:
        StarkvError: a screenshot can't be taken, there is no such layer, or the picture can't be written.
        ModuleNotFoundError: matplotlib is missing.
    """
    if out:
        # Refused before the model has worked for it.
        check_place(out)
        import_module("matplotlib")
    images = [load_image(path) for path in question.paths]
    agent = Agent.load(engine, verify)
    check_layer(question.layer, agent.engine.manifest.text.layers)
    check_head(question.head, agent.engine.manifest.text.kv_heads)
    session = Session(agent.engine, agent.tokenizer, question.policy)
    parameters = SamplingParameters(question.max_new_tokens)
    for count in range(1 if question.replay else len(images), len(images) + 1):
        messages = opening(question.prompt, count, agent.engine.manifest.prompt)
        text = "".join(session.reply(messages, images[:count], parameters))
    reply = understand(text, session)
    if session.compressed is None or not isinstance(session.prompt, PromptRows):
        raise AssertionError("a reply leaves its prompt and what was kept of it")
    kept = kept_tokens(session.compressed, session.prompt, question.policy, question.layer, question.head)
    seen = Inspection(
        agent.engine.manifest.name,
        question.prompt,
        images,
        kept,
        question.policy,
        reply.timings,
        reply.action_json,
        question.head,
    )
    if out:
        save_png(draw_kept(seen), out)
    if json:
        print(json_module.dumps(_to_json(seen, reply), ensure_ascii=False))
    else:
        _print(seen)
    if out:
        note(f"drawn to {out}")


def _to_json(seen: Inspection, reply: AgentReply) -> dict[str, object]:
    timings, policy = seen.timings, seen.policy
    return {
        "model": seen.model,
        "method": policy.method,
        "mode": ("official" if policy.star_kv.is_official else "native")
        if policy.method == STAR_KV
        else None,
        "budget": asdict(policy.budget),
        "rows": {"kept": timings.kv_tokens_kept, "full": timings.kv_tokens_full},
        "bytes": {"kept": timings.kv_bytes_kept, "full": timings.kv_bytes_full},
        **kept_json(seen.kept),
        "reply": reply.text,
        "actions": [dict(action) for action in reply.action_json],
    }


def _print(seen: Inspection) -> None:
    """Tokens kept of each part of the prompt, mean over layers and heads."""
    kept = seen.kept
    table = Table("", "tokens", "kept", "share", title=seen.title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    parts = [(f"screenshot {index + 1}", part) for index, part in enumerate(kept.screenshots)]
    for name, part in [*parts, ("text", kept.text), ("all", Part(kept.share))]:
        table.add_row(name, str(part.tokens), f"{part.kept:.1f}", f"{100 * part.share:.0f} %")
    results.print(table)
    for stage, change in stage_changes(kept.scores).items():
        effect = f"changes scores by up to {100 * change:.0f} %" if change else "does nothing here"
        results.print(f"{stage_name(stage)}: {effect}")
    results.print(f"{seen.timings.kv_bytes_kept:,} of {seen.timings.kv_bytes_full:,} bytes")
