# SPDX-License-Identifier: Apache-2.0
"""Run with a version's bindings: prints all names in them as JSON, for ``api_description.py``.

Attributes of the package by name, and of each class in turn. Each has a ``kind``; functions and properties
have the signature that pybind11 writes into their docstring.
"""

import inspect
import json
from typing import Any

import tensorrt_bindings

_PACKAGE = "tensorrt_bindings.tensorrt."


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix(_PACKAGE)


def _describe(value: Any, owner: type | None = None) -> dict[str, Any]:
    """One attribute, as it stands in its owner's dictionary."""
    if isinstance(value, type):
        members = {
            name: _describe(member, value)
            for name, member in vars(value).items()
            if not name.startswith("__") or name == "__init__"
        }
        bases = [_type_name(base) for base in value.__mro__[1:]]
        return {"kind": "class", "name": _type_name(value), "bases": bases, "members": members}
    if isinstance(value, property):
        documentation = (value.fget and value.fget.__doc__) or ""
        return {"kind": "property", "doc": documentation, "writable": value.fset is not None}
    if isinstance(value, staticmethod):
        value = value.__func__
    if callable(value) and owner is not type(value):
        return {"kind": "function", "doc": inspect.getdoc(value) or ""}
    return {"kind": "value", "type": _type_name(type(value))}


names = {
    name: _describe(value)
    for name, value in vars(tensorrt_bindings).items()
    if not name.startswith("_") or name == "__version__"
}
print(json.dumps({"version": tensorrt_bindings.__version__, "names": names}))
