# SPDX-License-Identifier: Apache-2.0
"""Values inside of engines, layer by layer, to find the first one that is wrong.

A layer's value is its residual sum: the last Add of ``layers.i`` or ``blocks.i``, which every dialect keeps
under the canonical graph's name.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision

Layers = dict[str, NDArray[Any]]
"""Layer, such as ``layers.3``, → its value."""
_RESIDUAL = re.compile(r"(layers|blocks)\.(\d+)/Add_(\d+)\.0$")
_GRAPHS = ("vision", "decoder")


def residual_names(names: Iterable[str]) -> dict[str, str]:
    """Layer → name of its value, in the order of the layers: of several sums the last."""
    last: dict[tuple[str, int], tuple[int, str]] = {}
    for name in names:
        if found := _RESIDUAL.search(name):
            key, number = (found[1], int(found[2])), int(found[3])
            last[key] = max(last.get(key, (-1, "")), (number, name))
    return {f"{kind}.{index}": name for (kind, index), (_, name) in sorted(last.items())}


class TensorRTLayers:
    """An engine that was built with ``--debug-layers``."""

    def __init__(self, engine: TrtEngine) -> None:
        self._engine = engine

    def layers(self, image: ImageInputs, embeds: Floats, rope: Rope) -> Layers:
        with self._engine.watched_layers() as values:
            self._engine.encode_image(image)
            self._engine.prefill(self._engine.new_arena(len(embeds)), embeds, rope)
        if not values:
            raise UsageError(
                "the engine shows nothing of its layers; build it with --debug-layers '*/Add_*.0'"
            )
        return {layer: values[name] for layer, name in residual_names(values).items()}


class OnnxLayers:
    """An engine of ONNX Runtime whose graphs put out their layers as well."""

    def __init__(self, directory: Path) -> None:
        """Open copies of the graphs in ``directory`` with more outputs, see :func:`shown_layers`."""
        self._engine = OrtEngine(directory, verify=False)

    def layers(self, image: ImageInputs, embeds: Floats, rope: Rope) -> Layers:
        manifest = self._engine.manifest
        plan = plan_vision(image.grid_h, image.grid_w, manifest.vision)
        text, rows = manifest.text, len(embeds)
        cache = np.zeros((1, text.kv_heads, -(-rows // 64) * 64, text.head_dim), np.float32)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],
            "rope_cos": rope.cos,
            "rope_sin": rope.sin,
            "last_rows": np.full(text.layers, rows - 1, np.int32),
            "longest": np.array([rows], np.int32),
            "last_index": np.array([rows - 1], np.int32),
        }
        feeds |= {f"past_{kind}.{layer}": cache.copy() for layer in range(text.layers) for kind in "kv"}
        vision = {"pixel_values": image.pixel_values, **plan.inputs()}
        found: Layers = {}
        for session, inputs in ((self._engine.sessions[0], vision), (self._engine.sessions[1], feeds)):
            names = residual_names(entry.name for entry in session.get_outputs())
            found |= dict(zip(names, session.run([*names.values()], inputs), strict=True))
        return found


@contextmanager
def shown_layers(directory: Path) -> Iterator[OnnxLayers]:
    """Copies of an engine's graphs that put out their layers, beside hard links of its other files.

    Args:
        directory: an engine of ONNX Runtime on processors.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix=".starkv-layers-", dir=directory.parent) as scratch:
        copy = Path(scratch)
        for path in directory.iterdir():
            if path.suffix == ".onnx" and path.stem in _GRAPHS:
                model = onnx.load(path, load_external_data=False)
                outputs = (name for node in model.graph.node for name in node.output)
                for name in residual_names(outputs).values():
                    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                onnx.save(model, copy / path.name)
            elif "prepacked" not in path.name:
                try:
                    os.link(path, copy / path.name)
                except OSError:
                    shutil.copyfile(path, copy / path.name)
        yield OnnxLayers(copy)
