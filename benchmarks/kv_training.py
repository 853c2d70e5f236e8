# SPDX-License-Identifier: Apache-2.0
"""Low-rank KV factors of gui-tiny at equal bytes: without training, at the start of training, and trained.

    python benchmarks/kv_training.py --rank 0.5 --out results.json

``start`` are the factors without training, with the ranks that the gradients of sampled replies ask for. A
run that was interrupted goes on if ``--state`` is the same. A rank's figures are added to those in ``--out``.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import MODEL, engines, named_clicks, report
from PIL import Image
from rich.console import Console
from rich.progress import track

from starkv.calibration.kv_packing import RECENT_ROWS, layer_factors, make_packing
from starkv.calibration.kv_prompts import kv_prompts
from starkv.calibration.kv_sensitivity import measure_sensitivities
from starkv.calibration.kv_statistics import gather_statistics
from starkv.evaluation.statistics import wilson_interval
from starkv.export.build.pack import attention_weights, describe_packing, pack_ort_engine
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import PackingOptions
from starkv.kv_training.measure import distance
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.pinned import PinnedFactors, pin
from starkv.kv_training.sequences import TrainingSequence, digest, lay_out, suite_prompts
from starkv.kv_training.soft import OPEN_THRESHOLD, SoftFactors, SoftLayer
from starkv.kv_training.start import budget_bytes, first_factors, pace
from starkv.kv_training.state import StateFile
from starkv.kv_training.training import Training
from starkv.lowrank.latent_format import FLOAT32, NIBBLES
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_weights import load_decoder
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import text_positions
from starkv.runtime.preprocess.prepared import prepare
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.turn_plan import plan_prompt, prefill_embeddings
from starkv.synthetic.samples import Sample

LONGEST_REPLY = 16


class Lines:
    """Progress as lines of a log."""

    def start(self, stage: str, total: int) -> None:
        self._stage, self._total, self._done = stage, total, 0

    def advance(self, item: str) -> None:
        self._done += 1
        if self._done % 25 == 0:
            print(f"{self._stage} {self._done}/{self._total} {item}", file=sys.stderr, flush=True)


def started(first: SoftFactors, options: TrainingOptions, budget: int) -> PinnedFactors:
    """What the first factors are if all thresholds rise alike until the budget is met."""
    met = OPEN_THRESHOLD + pace(first, options.latent, budget, 1)
    layers = []
    for layer in first.layers:
        parts = [replace(part, threshold=torch.tensor(met)) for part in layer.parts]
        for part in parts:
            part.keep_floor()
        layers.append(SoftLayer(tuple(parts[:-1]), parts[-1]))
    return pin(SoftFactors(layers), options.latent, budget)


def ranks_of(packing: LowRankPacking) -> list[list[int]]:
    """Of each layer: its groups of keys, then its values."""
    return [[*(key.rank for key in layer.keys), layer.values.rank] for layer in packing.layers]


class Asker:
    """Asks the exact engine and those with packed caches the same questions, from the same exact prefill."""

    def __init__(self, exact: Path, packed: dict[str, Path]) -> None:
        self._agent = Agent.load(exact, threads=1)
        self._engines = {name: OrtEngine(path, verify=False, threads=1) for name, path in packed.items()}

    def right(self, sample: Sample) -> dict[str, bool]:
        """Whose greedy reply clicks right."""
        engine, tokenizer = self._agent.engine, self._agent.tokenizer
        manifest = engine.manifest
        image = prepare(Image.fromarray(sample.frames[-1]), manifest.vision, manifest.image)
        plan = plan_prompt(manifest, tokenizer, opening(sample.question, 1, manifest.prompt), [image])
        encoded = [engine.encode_image(image.inputs())]
        embeds = prefill_embeddings(plan.ids, engine.embed(plan.ids), encoded, manifest.tokens.image_pad)
        arena = engine.new_arena(len(plan.ids))
        first = int(engine.prefill(arena, embeds, Rope.at(plan.positions.values, manifest.text)).argmax())
        found = {}
        for name, asked in {"full": engine, **self._engines}.items():
            rows = len(plan.ids) + LONGEST_REPLY
            pool = asked.new_pool(1, rows) if name == "full" else asked.new_pool(1, rows, packed=True)
            asked.compress(arena, pool, pool.acquire(), plan.rows, KvPolicy())
            said, token = [], first
            for step in range(LONGEST_REPLY):
                if token in manifest.tokens.end_of_text:
                    break
                said.append(token)
                rope = Rope.at(
                    text_positions(1, plan.positions.next_position + step).values[:, :, None], manifest.text
                )
                token = int(asked.decode(pool, asked.embed([token]), rope)[0].argmax())
            found[name] = self._hits(
                tokenizer.decode(said), sample, (image.facts.resized_width, image.facts.resized_height)
            )
        return found

    def _hits(self, text: str, sample: Sample, size: tuple[int, int]) -> bool:
        from starkv.runtime.actions.parser import ActionParseError, parse_response
        from starkv.runtime.actions.types import Click

        try:
            actions = parse_response(text).actions
        except ActionParseError:
            return False
        if not actions or not isinstance(actions[0], Click) or actions[0].point is None:
            return False
        height, width = sample.frames[-1].shape[:2]
        point = actions[0].point
        across, down = size if self._agent.engine.manifest.coordinates == "absolute" else (1000, 1000)
        return sample.hit(point.x / across * width, point.y / down * height)


def clicks(exact: Path, packings: dict[str, LowRankPacking], rank: float, count: int) -> dict[str, Any]:
    """Clicks that hit on validation questions, through ONNX Runtime."""
    options = PackingOptions("none", rank)
    with tempfile.TemporaryDirectory() as scratch:
        packed = {name: Path(scratch) / name for name in packings}
        for name, packing in packings.items():
            pack_ort_engine(exact, packed[name], packing, describe_packing(packing, options, 0))
        asker = Asker(exact, packed)
        questions = named_clicks("validation", count)
        answers = [asker.right(sample) for sample in track(questions, "clicks", console=Console(stderr=True))]
    return {
        name: {
            "right": (right := sum(answer[name] for answer in answers)),
            "questions": len(answers),
            "interval": wilson_interval(right, len(answers)),
        }
        for name in answers[0]
    }


def compare(exact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one rank."""
    engine, tokenizer = OrtEngine(exact, threads=1), ChatTokenizer.from_directory(exact)
    weights = attention_weights(exact)
    prompts = kv_prompts("gui-tiny", engine.manifest.image.max_pixels)
    statistics = gather_statistics(engine, tokenizer, weights.biases, prompts)
    options = TrainingOptions(PackingOptions("none", args.rank), args.steps, args.batch, seed=args.seed)
    free = make_packing(
        options.packing,
        statistics,
        weights.biases,
        weights.outputs,
        lambda layers, share: measure_sensitivities(engine, tokenizer, layers, share, prompts),
    )
    assert isinstance(free, LowRankPacking)
    lines = Lines()
    sequences = lay_out(engine, tokenizer, list(suite_prompts("train", args.prompts)), lines)
    judged = lay_out(engine, tokenizer, list(suite_prompts("validation", args.judged)), lines)
    decoder = load_decoder(MODEL, engine.manifest.text)
    layers = layer_factors(statistics, weights.biases, weights.outputs)
    begun = first_factors(decoder, layers, sequences, RECENT_ROWS, options.seed, progress=lines)
    start = started(begun, options, budget_bytes(begun, options))
    state = StateFile(args.state / f"rank-{args.rank:g}", f"{options} {digest(sequences)}")
    began = time.process_time()
    trained = Training(decoder, sequences, options, RECENT_ROWS, lambda: begun, state, lines).run()
    seconds = time.process_time() - began
    packings = {
        "without training": free,
        "start": start.packing(weights.biases, RECENT_ROWS),
        "trained": trained.factors.packing(weights.biases, RECENT_ROWS),
    }
    rows = {name: _distances(decoder, judged, packing) for name, packing in packings.items()}
    hits = clicks(exact, packings, args.rank, args.count)
    return {
        "budget_bytes": trained.budget,
        "options": {"steps": options.steps, "batch": options.batch, "prompts": len(sequences)},
        "training_cpu_seconds": seconds,
        "held_out_divergence": trained.divergence,
        "judged_replies": len(judged),
        "loss": [[phase, step, round(loss, 5), size] for phase, step, loss, size in trained.history[::10]],
        "clicks_full": hits["full"],
        "factors": {name: rows[name] | {"clicks": hits[name]} for name in packings},
    }


def _distances(decoder: Any, judged: Sequence[TrainingSequence], packing: LowRankPacking) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": ranks_of(packing)}
    for name, latent in (("float", FLOAT32), ("int4", NIBBLES)):
        factors = PinnedFactors.of_packing(packing, latent)
        moved = distance(decoder, judged, RECENT_ROWS, factors)
        found[name] = {"bytes_per_row": factors.row_bytes, **vars(moved)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=400, help="of the training split")
    parser.add_argument("--judged", type=int, default=100, help="replies of the validation split to compare")
    parser.add_argument("--count", type=int, default=200, help="questions of the validation split to click")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--state", type=Path, default=Path("runs/kv-training"), help="folder for saved states"
    )
    parser.add_argument("--engine", type=Path, help="fp32 engine of gui-tiny; built if not given")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.state.mkdir(parents=True, exist_ok=True)
    if args.engine:
        figures = compare(args.engine, args)
    else:
        with engines("fp32") as directories:
            figures = compare(directories["fp32"], args)

    known = json.loads(args.out.read_text())["figures"] if args.out and args.out.is_file() else {}
    table: list[tuple[str, ...]] = [
        ("factors", "bytes a token", "KL", "logit error", "same token", "KL int4", "clicks right")
    ]
    for name, found in figures["factors"].items():
        plain = found["float"]
        table.append(
            (
                name,
                f"{plain['bytes_per_row']:,}",
                f"{plain['divergence']:.4f}",
                f"{plain['logit_error']:.3f}",
                f"{plain['agreement']:.1%}",
                f"{found['int4']['divergence']:.4f}",
                f"{found['clicks']['right'] / found['clicks']['questions']:.1%}",
            )
        )
    full = figures["clicks_full"]
    print(f"rank {args.rank:g}; full cache: {full['right'] / full['questions']:.1%} of clicks right\n")
    report(table, {"benchmark": "kv_training", "figures": known | {f"{args.rank:g}": figures}}, args.out)


if __name__ == "__main__":
    main()
