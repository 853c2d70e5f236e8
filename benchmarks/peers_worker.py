# SPDX-License-Identifier: Apache-2.0
"""The process of one system under measurement; ``peers.py`` starts it.

    python peers_worker.py SYSTEM MODEL THREADS MAX_ROWS

Runs in the environment that has the system, so each is imported only when it is wanted.
"""

import sys
from pathlib import Path

from peers_protocol import System, private_stdout, serve


def open_system(name: str, model: Path, threads: int, max_rows: int) -> System:
    """Load the system called ``name``."""
    if name == "starkv":
        from peers_starkv import StarkvSystem

        return StarkvSystem(model, threads, max_rows)
    if name == "llama.cpp":
        from peers_llama_cpp import LlamaCppSystem

        return LlamaCppSystem(model, threads, max_rows)
    if name == "ORT GenAI":
        from peers_genai import GenAISystem

        return GenAISystem(model, threads, max_rows)
    raise SystemExit(f"unknown system {name!r}")


if __name__ == "__main__":
    answers = private_stdout()
    serve(open_system(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])), answers)
