# SPDX-License-Identifier: Apache-2.0
"""Values inside of engines, layer by layer, to find the first one that is wrong.

A layer's value is its residual sum: the last Add of ``layers.i`` or ``blocks.i``, which every dialect keeps
under the canonical graph's name.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from starkv.cli.engine_copies import Change, changed_copy
from starkv.cli.engine_outputs import Outputs, PromptInputs
from starkv.errors import UsageError
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.vision_plan import plan_vision

_ROWS = 128
"""Rows of a prompt that layers are compared on; one prefill call holds them."""
_RESIDUAL = re.compile(r"(layers|blocks)\.(\d+)/Add_(\d+)\.0$")


class LayerSource(Protocol):
    """An engine that shows its layers."""

    @property
    def engine(self) -> Engine:
        """Which one."""
        ...

    def layers(self, prompt: PromptInputs) -> Outputs:
        """Encode the image and prefill the prompt's first rows.

        Returns:
            layer, such as ``layers.3`` or ``blocks.0``, → its residual sum, float32 [..., hidden].
        """
        ...


def residual_names(names: Iterable[str]) -> dict[str, str]:
    """Layer → name of its value, vision tower first, in the order of the layers: of several sums the last."""
    last: dict[tuple[str, int], tuple[int, str]] = {}
    for name in names:
        if found := _RESIDUAL.search(name):
            key, number = (found[1], int(found[2])), int(found[3])
            last[key] = max(last.get(key, (-1, "")), (number, name))
    return {f"{kind}.{index}": name for (kind, index), (_, name) in sorted(last.items())}


class TensorRTLayers:
    """An engine that was built with ``--debug-layers``."""

    def __init__(self, engine: TrtEngine) -> None:
        """Take an opened engine."""
        self._engine = engine

    @property
    def engine(self) -> Engine:
        return self._engine

    def layers(self, prompt: PromptInputs) -> Outputs:
        short = prompt.first_rows(_ROWS)
        with self._engine.watched_layers() as values:
            self._engine.encode_image(short.image)
            self._engine.prefill(self._engine.new_arena(len(short.embeds)), short.embeds, short.rope)
        if not values:
            raise UsageError(
                "the engine shows nothing of its layers; build it with --debug-layers '*/Add_*.0'"
            )
        return _by_layer({name: values[full] for name, full in residual_names(values).items()})


class OnnxLayers:
    """An engine of ONNX Runtime on processors whose graphs were changed by :func:`showing_layers`."""

    def __init__(self, engine: OrtEngine) -> None:
        """Take an opened engine."""
        self._engine = engine

    @property
    def engine(self) -> Engine:
        return self._engine

    def layers(self, prompt: PromptInputs) -> Outputs:
        short, manifest = prompt.first_rows(_ROWS), self._engine.manifest
        plan = plan_vision(short.image.grid_h, short.image.grid_w, manifest.vision)
        text, rows = manifest.text, len(short.embeds)
        cache = np.zeros((1, text.kv_heads, -(-rows // 64) * 64, text.head_dim), np.float32)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": short.embeds[None],
            "rope_cos": short.rope.cos,
            "rope_sin": short.rope.sin,
            "last_rows": np.full(text.layers, rows - 1, np.int32),
            "longest": np.array([rows], np.int32),
            "last_index": np.array([rows - 1], np.int32),
        }
        feeds |= {f"past_{kind}.{layer}": cache.copy() for layer in range(text.layers) for kind in "kv"}
        vision = {"pixel_values": short.image.pixel_values, **plan.inputs()}
        found: Outputs = {}
        for session, inputs in zip(self._engine.sessions, (vision, feeds), strict=True):
            names = residual_names(entry.name for entry in session.get_outputs())
            found |= dict(zip(names, session.run([*names.values()], inputs), strict=True))
        return _by_layer(found)


def _by_layer(values: Outputs) -> Outputs:
    """Without a batch of one, which dialects have or don't."""
    return {name: value.astype(np.float32).reshape(-1, value.shape[-1]) for name, value in values.items()}


def showing_layers(graph: Any) -> None:
    """The change that makes a graph put out its layers."""
    from onnx import helper

    outputs = (name for node in graph.node for name in node.output)
    for name in residual_names(outputs).values():
        graph.output.append(helper.make_empty_tensor_value_info(name))


@contextmanager
def shown_layers(directory: Path, *changes: Change) -> Iterator[OnnxLayers]:
    """An engine of ONNX Runtime on processors, opened so that it shows its layers.

    Args:
        directory: the engine.
        changes: made to its graphs before.
    """
    with changed_copy(directory, *changes, showing_layers) as copy:
        yield OnnxLayers(OrtEngine(copy, verify=False))
