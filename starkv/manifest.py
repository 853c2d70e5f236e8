# SPDX-License-Identifier: Apache-2.0
"""``manifest.json`` of an engine directory: the contract between ``export`` (writes) and ``runtime`` (reads).

Everything the runtime must know about a model is here, so it never has to interpret the many dialects
of Hugging Face's ``config.json``.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.errors import EngineError

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"

CoordinateConvention = Literal["absolute", "relative_1000"]
"""``absolute``: pixels of the smart-resized image. ``relative_1000``: thousandths of width and height."""

PromptDialect = Literal["plain", "ui_tars_computer", "ui_tars_mobile", "ui_tars_grounding", "opencua"]
"""How an instruction becomes a prompt. ``plain``: the instruction itself is the user's text; the others ask
as the models of that name expect it."""

ComputeDtype = Literal["float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextShape(_Strict):
    """Sizes of the text decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    mrope_section: list[int] | None
    """Rotary pairs taken from the t, h and w position, or None for one-dimensional RoPE."""
    max_positions: int
    tied_embedding: bool

    @property
    def rotary_sections(self) -> tuple[int, int, int]:
        """Rotary pairs that turn with t, h and w; all with t where positions have one component."""
        t, h, w = self.mrope_section or (self.head_dim // 2, 0, 0)
        return t, h, w


class VisionShape(_Strict):
    """Sizes of the vision tower."""

    depth: int
    hidden: int
    intermediate: int
    heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int | None
    """Pixels of a side of an attention window, or None where every block sees the whole image."""
    full_attention_blocks: list[int]
    """Blocks that see the whole image."""
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class SpecialTokens(_Strict):
    """Ids that the runtime has to recognise."""

    image_pad: int
    """Stands in a rendered prompt for an image, and in the tokens for each of its image tokens."""
    end_of_text: list[int]
    """Generation stops at any of these; the first is what a reply usually ends with."""


class ImageLimits(_Strict):
    """Pixel limits of ``smart_resize`` and the normalisation of its result."""

    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Quantization(_Strict):
    """Storage of each group of weights, e.g. ``int4`` or ``fp32``."""

    preset: str
    decoder: str
    head: str
    vision: str
    embedding: str
    block_size: int | None
    """Rows of the reduction axis that share one scale, or None without quantized weights."""


def packing_words(quant: str, rank: float | None) -> str:
    """A packing of the KV cache in words, such as ``int8`` or ``rank 0.5 int4``."""
    parts = ["" if rank is None else f"rank {rank:.3g}", "" if quant == "none" else quant]
    return " ".join(filter(None, parts))


class KvPacking(_Strict):
    """How kept rows of the KV cache are packed; what with is in ``kv_packing.safetensors``."""

    quant: Literal["none", "int8", "int4"]
    rank: float | None
    """Share of the cache's elements that low-rank latents have; None for all channels."""
    bytes_per_row: int
    """Of one token over all layers, with scales, padding and the row's position in every layer."""
    calibration_tokens: int
    """That scales and factors were worked out from; 0 where factors were trained."""
    trained: bool = False
    """Factors come from `starkv train-kv`."""

    def describe(self) -> str:
        """Such as ``int8`` or ``rank 0.5 int4``."""
        words = packing_words(self.quant, self.rank)
        return f"trained {words}" if self.trained else words


HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
"""GPUs that a plan runs on: the very model it was built on, all of its compute capability, or every one since
Ampere."""


class TensorRTBuild(_Strict):
    """What a TensorRT engine was built with, and so where it runs."""

    version: str
    """TensorRT, such as ``10.3.0.26``: a plan runs on the version that built it."""
    cuda: str
    """CUDA that the driver ran, such as ``12.6``."""
    gpu: str
    """Name of the GPU it was built on."""
    compute_capability: str
    """Such as ``8.7``."""
    hardware_compatibility: HardwareCompatibility
    graphs: dict[str, str]
    """Lowered graph → sha256 of its ``.onnx`` and data together."""
    prefill_rows: int
    """Most rows of one prefill call."""
    sessions: int
    """Most sequences of one decode step, and slots of a pool."""
    cache_rows: int
    """Largest capacity of a cache."""
    image_patches: int
    """Most patches of one image."""
    stripped: bool
    """Plans hold no weights; they are read from the lowered graphs when the engine opens."""
    weight_streaming: bool
    """Weights may stay in host memory, as far as the budget of device memory asks for it."""
    scratch_bytes: dict[str, int]
    """Device memory for activations: ``vision``, ``decoder.prefill``, ``decoder.decode``, ``compress``."""
    weight_bytes: dict[str, int]
    """Weights of each plan's graph."""
    kv_bits: Literal[4, 8] | None = None
    """Of the codes that the decoder can attend to; None where it knows caches of floats only."""
    position_rows: int = 0
    """Positions that attention to codes can tell apart, from 0 on."""


class ModelDescription(_Strict):
    """What an exported model and the engine built from it say about the model in the same words."""

    schema_version: int
    name: str
    """Model card's name."""
    family: str
    licence: str
    source: str
    """Where the weights came from (a folder's name or a repository id, never an absolute path)."""
    coordinates: CoordinateConvention
    prompt: PromptDialect
    text: TextShape
    vision: VisionShape
    tokens: SpecialTokens
    image: ImageLimits
    quantization: Quantization
    observation_window: int
    """How many of the last queries the decoder's ``q_window`` output holds at most."""
    max_context: int
    """Most KV rows that one sequence may hold."""
    kv_budget: float
    """Share of a prompt's KV rows that is kept where the user doesn't say; 1 keeps all."""
    parameters: int
    tool_versions: dict[str, str]


class Manifest(ModelDescription):
    """Everything the runtime needs to know before it opens the first graph."""

    backend: Literal["ort", "trt"]
    compute_dtype: ComputeDtype
    """Of activations and KV cache."""
    tensorrt: TensorRTBuild | None = None
    """Of an engine for TensorRT."""
    kv_packing: KvPacking | None = None
    """Of an engine that can pack its cache."""
    files: dict[str, str]
    """File name → sha256 of its content; every file of the directory except the manifest."""
    manifest_sha256: str = ""
    """sha256 of ``manifest.json`` itself with this value left empty; see :func:`seal`."""


def sha256_of(path: Path) -> str:
    """Hash a file without reading it into memory at once."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seal(manifest: Manifest) -> str:
    """Text of ``manifest.json``, with the hash that covers all of it but itself."""
    text = manifest.model_copy(update={"manifest_sha256": ""}).model_dump_json(indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace('"manifest_sha256": ""', f'"manifest_sha256": "{digest}"')


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        EngineError: the directory or the file is missing, unreadable, or of another schema version.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise EngineError(f"engine directory {directory} does not exist; build one with `starkv build MODEL`")
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise EngineError(f"{directory} is no engine directory: it has no {MANIFEST_NAME}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is not readable JSON ({error}); build the engine again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{path}: schema_version is {version!r}, this starkv reads {SCHEMA_VERSION}; build it again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EngineError(f"{path}: field {field}: {first['msg']}; build the engine again") from None


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file, the manifest included, with the hash that the manifest recorded.

    Raises:
        EngineError: a file is missing or its content changed.
    """
    path, digest = directory / MANIFEST_NAME, manifest.manifest_sha256.encode()
    unsealed = path.read_bytes().replace(b'"' + digest + b'"', b'""', 1)
    if hashlib.sha256(unsealed).hexdigest().encode() != digest:
        raise EngineError(f"{path} was changed since the build (sha256 differs); build the engine again")
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise EngineError(
                f"{path} is missing from the engine; build it again or copy the whole directory"
            )
        if sha256_of(path) != expected:
            raise EngineError(
                f"{path} was changed or damaged since the build (sha256 differs); build it again"
            )
