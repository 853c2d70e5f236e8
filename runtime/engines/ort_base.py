# SPDX-License-Identifier: Apache-2.0
"""What the ONNX Runtime engines share, wherever they compute: files, embedding, vision, prefill in chunks."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starkv.errors import EngineError
from starkv.host import usable_processors
from starkv.runtime.engines.base import Floats
from starkv.runtime.engines.stepping import SteppingEngine
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision

CPU_PROVIDER = "CPUExecutionProvider"
Providers = Sequence[str | tuple[str, dict[str, str]]]


class OrtBase(SteppingEngine):
    """Opens an engine directory; the engines say where keys and values lie and how a graph is run on them."""

    def __init__(self, directory: Path, verify: bool, threads: int | None) -> None:
        """Read the manifest, check the files and find ONNX Runtime.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: intra-op threads; the processors this process may use by default.

        Raises:
            EngineError: the directory is damaged, built for another backend, or onnxruntime is missing.
        """
        super().__init__(directory, "ort", verify)
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("ONNX Runtime is not installed; `pip install starkv[cpu]`") from None
        self._ort = onnxruntime
        self._threads = threads or usable_processors()

    def _open_host_graph(self, graph: str) -> Any:
        """The session of a graph that works on host memory."""
        return self._load(f"{graph}.onnx", (CPU_PROVIDER,))

    def _load(
        self,
        name: str,
        providers: Providers,
        entries: Mapping[str, str] | None = None,
        optimized: bool = False,
    ) -> Any:
        """Open the session of a graph.

        Args:
            name: file in the engine's directory.
            providers: as ONNX Runtime takes them.
            entries: of the session's configuration.
            optimized: the graph is so already; doing it again would cost load time.

        Raises:
            EngineError: ONNX Runtime can't.
        """
        path = self._directory / name
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if optimized:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # the binding raises many classes, all of its own
            reason = str(error).splitlines()[0]
            raise EngineError(f"ONNX Runtime {self._ort.__version__} can't load {path}: {reason}") from None

    def _run_options(self, **entries: str) -> Any:
        """Options of a run; dots of a key are written as two underscores."""
        options = self._ort.RunOptions()
        for key, value in entries.items():
            options.add_run_config_entry(key.replace("__", "."), value)
        return options

    def _check_decoder(self, decoder: Any) -> Any:
        if "last_rows" not in {entry.name for entry in decoder.get_inputs()}:
            raise EngineError(f"{self._directory} was built by an older starkv; build it again")
        return decoder

    @property
    @abstractmethod
    def _vision(self) -> Any:
        """Session of ``vision.onnx``."""

    @property
    @abstractmethod
    def _vision_run(self) -> Any:
        """Options of a run of ``vision.onnx``, whose memory should go back to the system after it: a large
        image's activations would stay reserved as long as the engine lives."""

    def encode_image(self, image: ImageInputs) -> Floats:
        plan = plan_vision(image.grid_h, image.grid_w, self._manifest.vision)
        feeds = {"pixel_values": image.pixel_values, **plan.inputs()}
        embeds: Floats = self._vision.run(["image_embeds"], feeds, self._vision_run)[0]
        return embeds
