# SPDX-License-Identifier: Apache-2.0
"""``kv_packing.safetensors`` of an engine: what its rows are packed with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from starkv.errors import EngineError
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.factor import Factor
from starkv.lowrank.latent_format import FORMATS
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.quantized_rows import RowQuantization

PACKING_NAME = "kv_packing.safetensors"

Packing = QuantizedPacking | LowRankPacking
Tensors = Mapping[str, NDArray[Any]]


def save_packing(packing: Packing, path: Path) -> None:
    """Write a packing.

    Raises:
        OSError: the disk is full.
    """
    facts: dict[str, object] = {"layers": len(packing.layers)}
    tensors: dict[str, NDArray[Any]] = {}
    if isinstance(packing, QuantizedPacking):
        facts["bits"] = packing.bits
        for index, layer in enumerate(packing.layers):
            tensors |= {
                f"{index}.key_scales": layer.key_scales,
                f"{index}.value_scales": layer.value_scales,
                **_biases(index, layer),
            }
    else:
        facts |= {
            "latent": packing.latent.name,
            "recent_rows": packing.recent_rows,
            "groups": [len(layer.keys) for layer in packing.layers],
        }
        for index, factors in enumerate(packing.layers):
            tensors |= _biases(index, factors)
            for name, factor in (
                *((f"{index}.keys.{group}", factor) for group, factor in enumerate(factors.keys)),
                (f"{index}.values", factors.values),
            ):
                tensors |= {f"{name}.up": factor.up, f"{name}.down": factor.down}
    stored = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    save_file(stored, path, {"packing": json.dumps(facts)})


def load_packing(path: Path) -> Packing:
    """Read what :func:`save_packing` wrote.

    Raises:
        EngineError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["packing"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        layers = range(facts["layers"])
        if "bits" in facts:
            return QuantizedPacking(
                facts["bits"], tuple(_quantized_layer(tensors, index, facts["bits"]) for index in layers)
            )
        return LowRankPacking(
            FORMATS[facts["latent"]],
            tuple(_low_rank_layer(tensors, index, facts["groups"][index]) for index in layers),
            facts["recent_rows"],
        )
    except FileNotFoundError:
        raise EngineError(f"{path} is missing from the engine; build it again") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise EngineError(f"{path} is damaged ({error!r}); build the engine again") from None


def _biases(index: int, layer: RowQuantization | LowRankLayer) -> dict[str, NDArray[Any]]:
    return {f"{index}.key_bias": layer.key_bias, f"{index}.value_bias": layer.value_bias}


def _quantized_layer(tensors: Tensors, index: int, bits: Any) -> RowQuantization:
    return RowQuantization(
        bits,
        tensors[f"{index}.key_scales"],
        tensors[f"{index}.value_scales"],
        *_stored_biases(tensors, index),
    )


def _low_rank_layer(tensors: Tensors, index: int, groups: int) -> LowRankLayer:
    keys = tuple(_factor(tensors, f"{index}.keys.{group}") for group in range(groups))
    return LowRankLayer(keys, _factor(tensors, f"{index}.values"), *_stored_biases(tensors, index))


def _factor(tensors: Tensors, name: str) -> Factor:
    return Factor(tensors[f"{name}.up"].astype(np.float64), tensors[f"{name}.down"].astype(np.float64))


def _stored_biases(tensors: Tensors, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # They are float32 in the model, too; the arithmetic around them is in float64.
    key, value = (tensors[f"{index}.{kind}_bias"].astype(np.float64) for kind in ("key", "value"))
    return key, value
