# SPDX-License-Identifier: Apache-2.0
"""What the bindings of one TensorRT have: classes, their attributes, and how each function is called."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bindings import bindings

_DUMP = Path(__file__).with_name("api_dump.py")
_SIGNATURE = re.compile(r"(?:\d+\. )?\w*(?P<parameters>\(.*\)) -> (?P<returns>.*)")
_OPENING, _CLOSING = "([{<", ")]}>"
_UNTOLD = {"get_plugin_registry": "IPluginRegistry"}
"""Return types that the bindings of TensorRT 11 spell as nonsense."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function."""

    name: str
    required: bool


@dataclass(frozen=True)
class Signature:
    """One way to call a function."""

    parameters: tuple[Parameter, ...]
    """Without ``self``."""
    returns: str
    """Name of the class in the package, or anything else."""
    free: bool
    """Takes any further arguments."""

    def accepts(self, positional: int, keywords: set[str]) -> bool:
        """Whether it can be called with so many arguments and these keywords."""
        if self.free:
            return True
        by_name = self.parameters[positional:]
        missing = {parameter.name for parameter in by_name if parameter.required} - keywords
        unknown = keywords - {parameter.name for parameter in by_name}
        return positional <= len(self.parameters) and not missing and not unknown


@dataclass(frozen=True)
class Member:
    """Something that has a name in the package or in a class."""

    kind: str
    """``class``, ``function``, ``property`` or ``value``."""
    type: str
    """Class: its name. Property or value: what it holds."""
    signatures: tuple[Signature, ...] = ()
    """Of a function; empty where unknown."""
    writable: bool = False


class Description:
    """All names of one TensorRT's bindings.

    Args:
        dumped: what ``api_dump.py`` prints.
    """

    def __init__(self, dumped: dict[str, Any]) -> None:
        self.version: str = dumped["version"]
        self.names = {name: _member(name, entry) for name, entry in dumped["names"].items()}
        self._bases: dict[str, list[str]] = {}
        self._members: dict[str, dict[str, Member]] = {}
        for entry in _classes(dumped["names"]):
            self._bases[entry["name"]] = entry["bases"]
            self._members[entry["name"]] = {
                name: _member(name, member) for name, member in entry["members"].items()
            }

    def is_class(self, name: str) -> bool:
        """Whether the package has a class of that name, such as ``ILogger.Severity``."""
        return name in self._members

    def member(self, owner: str, name: str) -> Member | None:
        """An attribute of a class or of the classes that it is made from."""
        for kind in (owner, *self._bases[owner]):
            if (found := self._members.get(kind, {}).get(name)) is not None:
                return found
        return None


@cache
def describe(release: str) -> Description:
    """The names of a release.

    Raises:
        UnavailableError: its bindings can't be had here.
    """
    return Description(json.loads(bindings(release).python(_DUMP)))


def _classes(entries: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in entries.values():
        if entry["kind"] == "class":
            yield entry
            yield from _classes(entry["members"])


def _member(name: str, entry: dict[str, Any]) -> Member:
    kind = entry["kind"]
    if kind == "class":
        return Member(kind, entry["name"])
    if kind == "value":
        return Member(kind, entry["type"])
    lines = (_SIGNATURE.fullmatch(line.strip()) for line in entry["doc"].splitlines())
    signatures = tuple(_signature(name, line) for line in lines if line)
    if kind == "property":
        return Member(kind, signatures[0].returns if signatures else "", writable=entry["writable"])
    return Member(kind, "", signatures)


def _signature(name: str, line: re.Match[str]) -> Signature:
    """Read such as ``(self: Builder, flags: int = 0) -> INetworkDefinition``."""
    parts = [part for part in _split(line["parameters"][1:-1]) if part not in ("", "/", "*")]
    if parts and parts[0].split(":")[0] in ("self", "arg0"):
        parts = parts[1:]
    parameters = tuple(
        Parameter(re.split(r"[:=]", part)[0].strip(), "=" not in part) for part in parts if part[0] != "*"
    )
    returns = _UNTOLD.get(name, line["returns"].replace("tensorrt_bindings.tensorrt.", "").strip())
    return Signature(parameters, returns, any(part.startswith("*") for part in parts))


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for position, letter in enumerate(text):
        if letter in _OPENING:
            depth += 1
        elif letter in _CLOSING and text[position - 1] != "-":
            depth -= 1
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
