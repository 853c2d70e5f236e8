# SPDX-License-Identifier: Apache-2.0
"""Exported model → engine directory for ONNX Runtime."""

from pathlib import Path

from starkv.errors import UsageError
from starkv.export.build.files import enough_space, link_or_copy
from starkv.export.build.manifest import write_manifest
from starkv.export.lower.ort import lower_to_ort
from starkv.export.progress import NoProgress, Progress
from starkv.export.record import read_record
from starkv.export.staging import staged_directory
from starkv.host import cpu_model
from starkv.manifest import MANIFEST_NAME, ComputeDtype, Manifest

PREPACKED_RUNTIME = "prepacked_onnxruntime"
PREPACKED_CPU = "prepacked_cpu"
"""Entries of ``tool_versions`` that tell where ``*.prepacked.onnx`` fits: that version and that processor."""

_GRAPHS = ("vision", "decoder")
_INLINE_BYTES = 1024


def build_ort_engine(
    export_dir: Path,
    out: Path,
    progress: Progress | None = None,
    prepack: bool = False,
    link: bool = False,
    compute_dtype: ComputeDtype = "float32",
) -> Manifest:
    """Build the engine directory ``out``; it appears complete or not at all.

    Args:
        export_dir: what ``export_model`` wrote.
        out: an engine there is replaced; anything else is not.
        progress: told about each step.
        prepack: also store each graph as this host's ONNX Runtime optimizes it, which loads faster, for at
            least twice the disk space. Elsewhere the runtime falls back to the portable graphs.
        link: share files with the export by hard links where the file system can, instead of copying them.
            Meant for an export that is deleted afterwards: onnx's own tools refuse to read weights from a
            file that has two links. Quantized weights are laid out anew and exist twice until then.
        compute_dtype: of activations and KV cache; ``bfloat16`` or ``float16`` make an engine for GPUs.

    Raises:
        UsageError: ``export_dir`` is no complete export, ``out`` holds something else, the disk has no room,
            or onnxruntime is missing and ``prepack`` asks for it, or the engine is for GPUs and ``prepack``
            asks for a processor.
    """
    if prepack and compute_dtype != "float32":
        raise UsageError(f"--prepack is for processors, not for an engine in {compute_dtype}; leave it out")
    progress = progress or NoProgress()
    record = read_record(export_dir)
    # Graphs first: they decide whether their weights are laid out anew.
    names = sorted(record.files, key=lambda name: not name.endswith(".onnx"))
    # Hard links need no room, but which data files are only linked is not known before.
    new = [name for name in names if not link or name.endswith((".data", ".onnx"))]
    needed = sum((export_dir / name).stat().st_size for name in new)
    with staged_directory(out, MANIFEST_NAME) as staging, enough_space(staging, needed):
        progress.start("engine", len(names) + (len(_GRAPHS) if prepack else 0) + 1)
        for name in names:
            source, target = export_dir / name, staging / name
            if name.endswith(".onnx"):
                lower_to_ort(source, target, compute_dtype)
            elif not target.exists():
                link_or_copy(source, target, link)
            progress.advance(name)
        versions: dict[str, str] = {}
        if prepack:
            versions = {PREPACKED_RUNTIME: _runtime_version(), PREPACKED_CPU: cpu_model()}
            quantization = record.quantization
            quantized = {
                "vision": quantization.vision != "fp32",
                "decoder": (quantization.decoder, quantization.head) != ("fp32", "fp32"),
            }
            for graph in _GRAPHS:
                _prepack(staging, graph, quantized[graph])
                progress.advance(f"{graph}.prepacked.onnx")
        manifest = write_manifest(staging, record, "ort", compute_dtype, versions)
        progress.advance(MANIFEST_NAME)
    return manifest


def _runtime_version() -> str:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("prepacking needs ONNX Runtime; install it with `pip install starkv[cpu]`") from None
    return str(onnxruntime.__version__)


def _prepack(directory: Path, name: str, quantized: bool) -> None:
    """Let ONNX Runtime optimize a graph and save the result as ``{name}.prepacked.*``.

    Weights packed for this processor are saved as well, so that processes map and share them, but only float
    ones: ONNX Runtime (1.31) saves quantized weights before it has packed their scales, and computes NaN from
    what it reads back.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(directory / f"{name}.prepacked.onnx")
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{name}.prepacked.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_INLINE_BYTES),
        "session.save_external_prepacked_constant_initializers": "0" if quantized else "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
