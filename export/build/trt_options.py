# SPDX-License-Identifier: Apache-2.0
"""What the user decides about an engine for TensorRT."""

from dataclasses import dataclass, replace
from pathlib import Path

from starkv.errors import UsageError
from starkv.export.record import ExportRecord
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import ComputeDtype, HardwareCompatibility
from starkv.trt_compat.building import PlanSettings
from starkv.trt_compat.version import TensorRTVersion

ROW_STEP = 64
"""Capacities of caches are multiples of this."""
MOST_LEVEL = 5
POSITION_ROWS = 32768
"""Positions of an engine with codes, at least: some 120 turns with a 1080p screenshot each, since an image of
thousands of tokens takes as many positions as its longer side has. Scratch memory grows with them."""


@dataclass(frozen=True)
class TrtBuildOptions:
    """How to build; the defaults are for one server or board that builds and runs the engine itself."""

    target: TensorRTVersion | None = None
    """TensorRT that will run the engine; the installed one if None."""
    compute_dtype: ComputeDtype | None = None
    """``bfloat16`` or ``float16``; what the GPU has if None."""
    sessions: int = 8
    """Most sequences of one decode step."""
    prefill_rows: int = 2048
    """Most rows of one prefill call; a longer prompt takes several."""
    max_context: int | None = None
    """Most rows of one sequence; the export's if None."""
    max_pixels: int | None = None
    """Larger images are scaled down to this; the export's limit if None."""
    workspace: int | None = None
    """Most bytes that one layer may use beside its tensors."""
    optimization_level: int = 3
    strip: bool = False
    weight_streaming: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    timing_directory: Path | None = None
    """Of the files with measured kernels; the user's caches if None."""
    plugins: Path | None = None
    """``libstarkv_trt.so``; where ``make plugin`` builds it if None."""
    debug_layers: tuple[str, ...] = ()
    """Patterns of tensor names that can be looked at while the engine runs."""
    kv_bits: Bits | None = None
    """Of the codes that kept rows become; None for an engine that keeps them as they are."""

    def __post_init__(self) -> None:
        if self.compute_dtype == "float32":
            raise UsageError("a TensorRT engine computes in bfloat16 or float16, not in float32")
        for name, value in (
            ("--sessions", self.sessions),
            ("--prefill-rows", self.prefill_rows),
            ("--max-context", self.max_context),
            ("--max-pixels", self.max_pixels),
            ("--workspace", self.workspace),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, but must be at least 1")
        if not 0 <= self.optimization_level <= MOST_LEVEL:
            raise UsageError(
                f"--optimization-level is {self.optimization_level}, but goes from 0 to {MOST_LEVEL}"
            )

    def for_constants(self) -> "TrtBuildOptions":
        """Of a graph without weights: there are none to leave out or to stream."""
        return replace(self, strip=False, weight_streaming=False)

    def settings(self, aliased: bool, debug_tensors: tuple[str, ...]) -> PlanSettings:
        """How to build one plan."""
        return PlanSettings(
            workspace=self.workspace,
            optimization_level=self.optimization_level,
            hardware_compatibility=self.hardware_compatibility,
            strip=self.strip,
            weight_streaming=self.weight_streaming,
            aliased=aliased,
            debug_tensors=debug_tensors,
        )


def with_options(record: ExportRecord, options: TrtBuildOptions) -> ExportRecord:
    """The model as the engine will be: its longest context and largest image.

    Raises:
        UsageError: an option asks for more than the model can, or for less than it needs.
    """
    context = options.max_context or record.max_context
    if context > record.max_context:
        raise UsageError(
            f"--max-context is {context}, but {record.name} was exported for {record.max_context}"
        )
    if context <= record.observation_window:
        raise UsageError(
            f"--max-context is {context}, which is no more than the {record.observation_window} rows that "
            "compression looks at"
        )
    limits = record.image
    pixels = options.max_pixels or limits.max_pixels
    if not limits.min_pixels <= pixels <= limits.max_pixels:
        raise UsageError(
            f"--max-pixels is {pixels}, but {record.name} takes {limits.min_pixels} to {limits.max_pixels}"
        )
    if options.prefill_rows < record.observation_window:
        raise UsageError(
            f"--prefill-rows is {options.prefill_rows}, but compression looks at the last "
            f"{record.observation_window} rows of a prompt, which one call must hold"
        )
    image = limits.model_copy(update={"max_pixels": pixels})
    return record.model_copy(update={"max_context": context, "image": image})


def cache_rows(record: ExportRecord) -> int:
    """Largest capacity of a cache: the longest context, rounded up."""
    return -(-record.max_context // ROW_STEP) * ROW_STEP


def position_rows(rows: int) -> int:
    """Positions that attention to codes is built for, where caches have up to so many rows."""
    return max(POSITION_ROWS, rows)


def at_most_context(record: ExportRecord, options: TrtBuildOptions) -> TrtBuildOptions:
    """No prefill call is longer than the longest context."""
    return replace(options, prefill_rows=min(options.prefill_rows, cache_rows(record)))
