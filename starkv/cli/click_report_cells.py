# SPDX-License-Identifier: Apache-2.0
"""Measures of a check as cells of the report on clicks."""

from collections.abc import Mapping


def share(measures: Mapping[str, float], name: str, signed: bool = False) -> str:
    """A share with its interval, if it was measured."""
    if name not in measures:
        return ""
    sign = "+" if signed else ""
    low, high = (100 * measures[f"{name}_{end}"] for end in ("low", "high"))
    return f"{100 * measures[name]:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"


def number(measures: Mapping[str, float], name: str, form: str, scale: float = 1.0) -> str:
    """A measure in a form, if it was measured."""
    return format(measures[name] * scale, form) if name in measures else ""
