# SPDX-License-Identifier: Apache-2.0
"""The steps of ``real_size.py``: which command each one is, what it needs, and what it leaves behind."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_size_memory import run_measured

HERE = Path(__file__).parent
STARKV = Path(sys.executable).with_name("starkv")

TINY, CARD = "gui-tiny", "ui-tars-1.5-7b"
MODELS = (TINY, "0.5b", "1.5b", "7b")

_NEEDS: dict[str, str | None] = {
    "checkpoint": None,
    "export": "checkpoint",
    "build": "export",
    "load": "build",
    "bench": "build",
}
"""Step → the one whose product it needs."""


@dataclass(frozen=True)
class Options:
    """What the bench step measures."""

    preset: str
    prefill: int
    tokens: int
    depths: tuple[int, ...]
    repetitions: int


class Steps:
    """The way of one model from its checkpoint to its figures, under ``folder``."""

    def __init__(self, model: str, folder: Path, options: Options) -> None:
        self.model, self._folder, self._options = model, folder, options

    def order(self) -> list[str]:
        """Names of all steps, in order."""
        return list(_NEEDS)

    def with_products_for(self, wanted: Sequence[str]) -> list[str]:
        """``wanted`` and those earlier steps whose products they need and nobody has kept, in order."""
        needed: set[str] = set()
        for step in reversed(self.order()):
            if step in wanted or step in needed:
                needed.add(step)
                before = _NEEDS[step]
                if before and not self._product(before).exists():
                    needed.add(before)
        return [step for step in self.order() if step in needed]

    def run(self, step: str) -> dict[str, Any]:
        """Do one step.

        Raises:
            StepFailedError: its command failed.
        """
        return {
            "checkpoint": self._checkpoint,
            "export": self._export,
            "build": self._build,
            "load": self._load,
            "bench": self._bench,
        }[step]()

    def clean(self) -> None:
        """Remove what the steps left, but not gui-tiny itself."""
        for step in ("checkpoint", "export", "build"):
            product = self._product(step)
            if product.is_relative_to(self._folder):
                shutil.rmtree(product, ignore_errors=True)

    def _product(self, step: str) -> Path:
        if step == "checkpoint" and self.model == TINY:
            return HERE.parent / "models" / TINY
        return self._folder / {"checkpoint": "checkpoint", "export": "export", "build": "engine"}.get(
            step, step
        )

    def _checkpoint(self) -> dict[str, Any]:
        checkpoint = self._product("checkpoint")
        if self.model == TINY:
            return {"bytes": _size(checkpoint, "*.safetensors")}
        command = [sys.executable, HERE / "real_size_checkpoint.py", self.model, checkpoint]
        _, cost = run_measured(command, self._log("checkpoint"))
        return {**cost.as_json(), "bytes": _size(checkpoint, "*.safetensors")}

    def _export(self) -> dict[str, Any]:
        export = self._product("export")
        command: list[str | Path] = [STARKV, "export"]
        if self.model == "7b":
            # The card's own way; the checkpoint is there already, so it is not made again.
            command += [CARD, "--random-weights", "--checkpoint", self._product("checkpoint")]
        else:
            command += [TINY if self.model == TINY else self._product("checkpoint")]
        command += ["--quant", self._options.preset, "--out", export]
        _, cost = run_measured(command, self._log("export"))
        return {**cost.as_json(), "bytes": _size(export), "preset": self._options.preset}

    def _build(self) -> dict[str, Any]:
        engine = self._product("build")
        command = [STARKV, "build", self._product("export"), "--backend", "ort", "--out", engine]
        _, cost = run_measured(command, self._log("build"))
        return {**cost.as_json(), "bytes": _size(engine)}

    def _load(self) -> dict[str, Any]:
        command = [sys.executable, HERE / "real_size_load.py", self._product("build")]
        verified = json.loads(run_measured(command, self._log("load"))[0])
        loaded = json.loads(run_measured([*command, "--no-verify"], self._log("load"))[0])
        return {
            "verified_seconds": verified["seconds"],
            "seconds": loaded["seconds"],
            "form": loaded["form"],
            "peak_resident_mib": round(loaded["mib"]["VmHWM"]),
            "rest_mib": round(loaded["mib"]["VmRSS"]),
            "rest_anonymous_mib": round(loaded["mib"]["RssAnon"]),
            "rest_file_mib": round(loaded["mib"]["RssFile"]),
        }

    def _bench(self) -> dict[str, Any]:
        options = self._options
        limit = json.loads((self._product("build") / "manifest.json").read_text())["max_context"]
        command: list[str | Path] = [STARKV, "bench", "--engine", self._product("build"), "--no-verify"]
        command += ["-p", str(options.prefill), "-n", str(options.tokens), "-r", str(options.repetitions)]
        for depth in options.depths:
            if depth + max(options.prefill, options.tokens) <= limit:
                command += ["-d", str(depth)]
        # A made-up vision tower has nothing to say about the time of a true one.
        command += ["--screen", "none" if self.model in ("0.5b", "1.5b") else "1920x1080", "-o", "json"]
        output, cost = run_measured(command, self._log("bench"))
        found = json.loads(output)
        fields = ("test", "tokens_per_second", "standard_deviation", "rates", "kv_mib", "roofline_share")
        return {
            "seconds": round(cost.seconds, 2),
            # The process's own peak has the gigabyte in it that measures the memory's bandwidth at the end.
            "peak_mib": max(test["peak_mib"] for test in found["tests"]),
            "threads": found["threads"],
            "tool_versions": found["tool_versions"],
            "memory_bandwidth": found["memory_bandwidth"],
            "tests": [{name: test[name] for name in fields} for test in found["tests"]],
        }

    def _log(self, step: str) -> Path:
        return self._folder / f"{step}.log"


def _size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())
