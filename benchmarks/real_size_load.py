# SPDX-License-Identifier: Apache-2.0
"""Load an engine in a fresh process and print how long it took and what it holds at rest, as JSON.

python real_size_load.py ENGINE [--no-verify]
"""

import argparse
import json
import os
import time
from pathlib import Path

from peers_protocol import resident_memory

from starkv.runtime.agent import Agent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--no-verify", action="store_true", help="skip comparing files with their hashes")
    args = parser.parse_args()
    started = time.perf_counter()
    agent = Agent.load(args.engine, not args.no_verify)
    seconds = time.perf_counter() - started
    at_rest = resident_memory(os.getpid())
    print(json.dumps({"seconds": round(seconds, 2), "form": agent.engine.info.loaded_form, "mib": at_rest}))
