# SPDX-License-Identifier: Apache-2.0
"""What all objects of the bindings have in common: they refuse wrong arguments and misspelled attributes.

pybind11 raises ``TypeError`` for an argument of another type, for a class that has no constructor, and where
a subclass forgets to call ``__init__`` (seen in the bindings of 10.3 to 11.4). An attribute that a class does
not have can't be set.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")
_Result = TypeVar("_Result")


class _BindingType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not getattr(made, "_initialised", False):
            base = next(kind.__name__ for kind in cls.__mro__ if kind.__module__.startswith("fake_tensorrt"))
            raise TypeError(f"tensorrt.{base}.__init__() must be called when overriding __init__")
        return made


class Bound(metaclass=_BindingType):
    """An object of the bindings. Attributes that begin with an underscore are the fake's own."""

    def __init__(self) -> None:
        raise TypeError(f"tensorrt.{type(self).__name__}: No constructor defined!")

    @classmethod
    def make(cls, **fields: Any) -> Any:
        """An object of a class that callers can't make."""
        made = object.__new__(cls)
        for name, value in {"_initialised": True, **fields}.items():
            object.__setattr__(made, name, value)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        subclassed = not type(self).__module__.startswith("fake_tensorrt")
        if not (name.startswith("_") or subclassed or hasattr(type(self), name)):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


class Callback(Bound):
    """What callers subclass."""

    def __init__(self) -> None:
        object.__setattr__(self, "_initialised", True)


def expect(value: Any, kind: type[_Kind], what: str) -> _Kind:
    """An argument, which must have a type.

    Raises:
        TypeError: it has another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {what} is {value!r}, not {kind.__name__}")
    return value


def whole(value: Any, what: str) -> int:
    """An argument that is a whole number; numpy's are, too.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"incompatible function arguments: {what} is {value!r}, not an int") from None


class Dims(Bound):
    """A shape. Compares with tuples, but is none, and can't be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any) -> None:
        object.__setattr__(self, "_initialised", True)
        self._sizes = tuple(whole(size, "a dimension") for size in shape)
        # NvInferRuntimeBase.h Dims::MAX_DIMS.
        if len(self._sizes) > 8:
            raise RuntimeError("The number of input dims exceeds the maximum allowed number of dimensions")

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dims | tuple | list):
            return self._sizes == tuple(other)
        return NotImplemented

    def __repr__(self) -> str:
        return repr(self._sizes)


def called(function: Callable[..., _Result], *args: Any, otherwise: _Result) -> _Result:
    """Call what a caller has written; the bindings' trampolines print what it raises, and go on (pyCore.cpp).

    Complaints of the fakes get through.
    """
    try:
        return function(*args)
    except AssertionError:
        raise
    except BaseException as error:
        sys.stderr.write(f"[ERROR] Exception caught in {function.__name__}(): {error}\n")
        return otherwise
