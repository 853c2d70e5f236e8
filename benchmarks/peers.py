# SPDX-License-Identifier: Apache-2.0
"""starkv against llama.cpp and ONNX Runtime GenAI on one processor, in one run, on the same random weights.

    python3 -m venv peers-venv && peers-venv/bin/pip install -r benchmarks/peers-requirements.txt
    python benchmarks/peers.py --peers-python peers-venv/bin/python --sizes 0.5b 1.5b --out peers.json

Text decoders of Qwen2.5 with 0.5, 1.5 and 7 billion weights. Each system loads its model once, in a process
of its own, and waits while another is measured; a round takes one test after the other and in each one
system after the other, so that a busy moment of the machine hits all. Rates are medians over rounds, with
the best round in brackets; ratios are taken within a round. Round 0 warms up and is not counted.

Run it on an idle machine. Work of other processes does not hit all systems alike: llama.cpp's threads wait
for each other after every operation, and one that has to wait for a processor holds up the rest. A
measurement during which others used more than 5 % of the processors is therefore repeated, and their share
is written down.

The same for all: weights (up to rounding), token ids in and the most likely token out, 4 bits for every
matrix including the head, activations rounded to 8 bits, threads, logits of the last row only, prefill in
calls of 512 rows.

What differs:
  weights   llama.cpp Q4_0: 32 weights share a float16 scale, 4.5 bits a weight. ORT GenAI, its builder's
            default: 32 share a float32 scale, 5 bits. starkv: 128 share a float32 scale, 4.25 bits: less to
            read, rounded more coarsely.
  KV cache  llama.cpp keeps float16, the others float32: llama.cpp reads half as much of a long cache.
  filling   starkv's cache holds random rows, llama.cpp's copies of 64 prefilled rows (a saved state,
            lengthened), ORT GenAI's really prefilled ones; the time of decoding depends on how many there
            are, not on what they hold.

The last row of a table is what compaction is for: starkv with 20 % of the rows against the others with all.
Here all layers keep the same number; STaR-KV gives layers different numbers with the same sum.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, load_average, memory_mib
from peers_models import GENAI, STARKV, SYSTEMS, prepare_model, weight_bytes
from peers_report import Test, figures, markdown, plan_tests
from peers_run import DISTURBED, Run, note
from peers_shapes import SIZES

from starkv.host import usable_processors
from starkv.methods.budget import Budget


def needed_mib(size: str, models: dict[str, Path], tests: Sequence[Test]) -> float:
    """Memory that all systems need together: weights as each lays them out for the processor, and caches."""
    rows = sum(test.kept for test in tests if not test.is_prefill)
    weights = sum(weight_bytes(model) for model in models.values()) * 1.15
    return (weights + len(models) * rows * SIZES[size].kv_row_bytes(item_size=4)) / 2**20


def prepare(size: str, args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Models by system, and why others have none."""
    models, failures = {}, {}
    for system in args.systems:
        try:
            models[system] = prepare_model(system, size, args.scratch, args.peers_python)
        except subprocess.CalledProcessError as error:
            note(f"{size}: no model for {system}: {error}")
            failures[system] = f"no model: {error}"
    return models, failures


def compare(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all systems at one size, print the table, and return what the JSON file says of it."""
    models, failures = prepare(size, args)
    deepest = max(args.depths)
    compacted = (deepest, Budget(ratio=args.budget).rows(deepest)) if deepest else None
    tests = plan_tests(args.depths, args.prefill, args.tokens, compacted)
    needed, available = needed_mib(size, models, tests), memory_mib("MemAvailable")
    together = not args.apart and needed < available
    if not together and not args.apart:
        note(f"{size}: {needed:.0f} MiB needed, {available:.0f} available: one system at a time")
    before = load_average()

    run = Run(size, models, args.peers_python, args.threads, max(deepest, args.prefill), args.rounds)
    run.most_rows[GENAI] = args.genai_rows
    (run.together if together else run.apart)(tests)
    measured = figures(tests, run.samples)
    print("\n".join(markdown(size, measured)))
    for pair, value in run.agreement.items():
        print(f"\nlogits of {pair}: correlation {value:.4f}")
    shares = [share for systems in run.others.values() for row in systems.values() for share in row]
    disturbed = sum(share >= DISTURBED for share in shares)
    print(f"\n{disturbed} of {len(shares)} measurements were disturbed by other processes\n", flush=True)
    return {
        "loaded": "together" if together else "one at a time",
        "load_average_before": before,
        "load_average_after": load_average(),
        "systems": run.descriptions,
        "failures": failures | run.failures,
        "model_bytes": {system: weight_bytes(model) for system, model in models.items()},
        "correlation_of_logits": run.agreement,
        "tests": measured,
        "disturbed_measurements": [disturbed, len(shares)],
        "share_of_other_processes": run.others,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers-python", type=Path, required=True, help="interpreter with peers-requirements.txt"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "1.5b"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--scratch", type=Path, default=Path("peers-scratch"), help="models stay here (7b: 33 GB)"
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 2048, 13312], help="rows cached before")
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=0.2, help="share of the rows that our compacted cache holds"
    )
    parser.add_argument("--threads", type=int, default=usable_processors())
    parser.add_argument(
        "--genai-rows",
        type=int,
        default=1 << 31,
        help="measure ORT GenAI behind so many cached rows at most: it really prefills them, once",
    )
    parser.add_argument("--apart", action="store_true", help="one system in memory at a time")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    if STARKV not in args.systems:
        parser.error(f"--systems needs {STARKV}: the others are compared with it")

    report: dict[str, Any] = {
        "benchmark": "peers",
        **describe_machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "sizes": {},
    }
    for size in args.sizes:
        report["sizes"][size] = compare(size, args)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
            note(f"written to {args.out}")


if __name__ == "__main__":
    main()
