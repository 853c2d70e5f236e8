# SPDX-License-Identifier: Apache-2.0
"""The checker of TensorRT names finds what it is there to find, in an API of a few made-up names."""

from typing import Any

import pytest
from api_check import Checked, check_sources
from api_description import Description
from live_code import live_code

from starkv.trt_compat.version import TensorRTVersion

NEW_THING = TensorRTVersion(10, 9)
CONSTANTS = {"NEW_THING": NEW_THING}
HEAD = """
from typing import TYPE_CHECKING, Any
if TYPE_CHECKING:
    import tensorrt as trt

class TensorRT:
    module: Any
    version: int
"""


def function(signature: str) -> dict[str, Any]:
    return {"kind": "function", "doc": signature}


def kind(name: str, members: dict[str, Any], *bases: str) -> dict[str, Any]:
    return {"kind": "class", "name": name, "bases": list(bases), "members": members}


PREFIX = "tensorrt_bindings.tensorrt."
FLAG = kind("Flag", {"FAST": {"kind": "value", "type": "Flag"}})
CONFIG = kind(
    "Config",
    {
        "flags": {"kind": "property", "doc": f"(arg0: {PREFIX}Config) -> int\n", "writable": False},
        "level": {"kind": "property", "doc": f"(arg0: {PREFIX}Config) -> int\n", "writable": True},
        "set_flag": function(
            f"set_flag(self: {PREFIX}Config, flag: {PREFIX}Flag, value: bool = True) -> None\n\nSets it."
        ),
    },
    "Base",
)
BASE = kind("Base", {"reset": function(f"reset(self: {PREFIX}Base) -> None")})
BUILDER = kind(
    "Builder",
    {
        "__init__": function(f"__init__(self: {PREFIX}Builder, logger: {PREFIX}ILogger) -> None"),
        "config": function(
            "config(*args, **kwargs)\nOverloaded function.\n\n"
            f"1. config(self: {PREFIX}Builder) -> {PREFIX}Config\n\n"
            f"2. config(self: {PREFIX}Builder, dims: dict[str, int] = {{}}, *, fast: bool) -> {PREFIX}Config"
        ),
    },
)
LOGGER = kind("ILogger", {"log": function(f"log(self: {PREFIX}ILogger, level: int, text: str) -> None")})
API = Description(
    {
        "version": "10.3.0",
        "names": {"Flag": FLAG, "Config": CONFIG, "Base": BASE, "Builder": BUILDER, "ILogger": LOGGER},
    }
)


def check(body: str, version: str = "10.3") -> Checked:
    return check_sources({"x.py": HEAD + body}, API, TensorRTVersion.parse(version), (), CONSTANTS)


def problems(body: str, version: str = "10.3") -> list[str]:
    return [problem.partition(": ")[2] for problem in check(body, version).problems]


def in_function(lines: str) -> str:
    """Lines of a function that has the package and a config."""
    indented = "\n".join(f"    {line}" for line in lines.splitlines())
    parameters = 'tensorrt: TensorRT, config: "trt.Config", builder: "trt.Builder | None"'
    return f"\ndef f({parameters}) -> None:\n{indented}\n"


RIGHT = (
    "config.set_flag(tensorrt.module.Flag.FAST)",
    "config.set_flag(flag=tensorrt.module.Flag.FAST, value=False)",
    "config.reset()",
    "config.level = config.flags",
    "module = tensorrt.module\nmodule.Builder(None).config().reset()",
    "builder.config({'a': 1}, fast=True)",
    "builder.config(*[])",
    "first, second = config, builder\nsecond.config()",
    "[config.flags for flag in range(3) if (again := config).level]",
    "work = lambda: config.set_flag(None)",
    "other: trt.Config = None",
)


@pytest.mark.parametrize("lines", RIGHT)
def test_what_is_right_passes(lines: str) -> None:
    assert problems(in_function(lines)) == []


WRONG = (
    ("tensorrt.module.Flags", "Flags: is missing"),
    ("tensorrt.module.Flag.FP16", "Flag.FP16: is missing"),
    ("config.set_flags", "Config.set_flags: is missing"),
    ("builder.configs()", "Builder.configs: is missing"),
    ("module = tensorrt.module\nmodule.Builder(None).config().resets()", "Config.resets: is missing"),
    ("first, second = config, builder\nsecond.reset()", "Builder.reset: is missing"),
    ("other: trt.Config = g()\nother.resets()", "Config.resets: is missing"),
    ("if (made := builder.config()).level:\n    made.resets()", "Config.resets: is missing"),
    ("def inner():\n    config.resets()", "Config.resets: is missing"),
    ("config.flags = 3", "Config.flags: can't be assigned to"),
    ("config.set_flag = 3", "Config.set_flag: can't be assigned to"),
    ("config.set_flag()", "Config.set_flag: takes other arguments than config.set_flag()"),
    ("config.set_flag(1, 2, 3)", "Config.set_flag: takes other arguments than config.set_flag(1, 2, 3)"),
    ("config.set_flag(1, on=2)", "Config.set_flag: takes other arguments than config.set_flag(1, on=2)"),
    ("tensorrt.module.Builder()", "Builder: takes other arguments than tensorrt.module.Builder()"),
    ("trt.Flag", "Flag: trt is known to type checkers only"),
)


@pytest.mark.parametrize(("lines", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_what_is_wrong_is_found(lines: str, problem: str) -> None:
    assert problems(in_function(lines)) == [problem]


def test_types_reach_attributes_of_own_classes_and_results_of_own_functions() -> None:
    body = """
class Owner:
    def __init__(self, tensorrt: TensorRT) -> None:
        self.tensorrt, self._module = tensorrt, tensorrt.module
        self._builder = self._module.Builder(None)

    @property
    def config(self) -> "trt.Config":
        return self._builder.confg()

def make(owner: Owner) -> "trt.Config":
    return owner.tensorrt.module.Confg()

def use(owner: Owner) -> None:
    make(owner).set_flg()
    owner.config.set_flg()
    Owner(owner.tensorrt).config.set_flg()
"""
    assert problems(body) == [
        "Builder.confg: is missing",
        "Confg: is missing",
        "Config.set_flg: is missing",
        "Config.set_flg: is missing",
        "Config.set_flg: is missing",
    ]


def test_methods_that_tensorrt_calls() -> None:
    body = in_function(
        """class Logger(tensorrt.module.ILogger):
    def log(self, level):
        config.resets()
    def logs(self, level, text):
        pass
    def _note(self):
        pass"""
    )
    assert problems(body) == [
        "ILogger.log: is called with 2 arguments",
        "Config.resets: is missing",
        "ILogger.logs: TensorRT never calls that",
    ]


GUARDED = (
    "if tensorrt.version < NEW_THING:\n    return\nconfig.new_thing()",
    "if tensorrt.version >= NEW_THING:\n    config.new_thing()",
    "if NEW_THING <= tensorrt.version and config.level:\n    config.new_thing()",
    "if not tensorrt.version < NEW_THING:\n    config.new_thing()",
    "if tensorrt.version < NEW_THING or config.new_thing():\n    return",
    "config.level if tensorrt.version < NEW_THING else config.new_thing()",
    "for _ in range(3):\n    if tensorrt.version < NEW_THING:\n        continue\n    config.new_thing()",
)


@pytest.mark.parametrize("lines", GUARDED)
def test_what_a_version_does_not_run_is_not_checked(lines: str) -> None:
    assert problems(in_function(lines), "10.3") == []
    assert problems(in_function(lines), "10.9") == ["Config.new_thing: is missing"]


UNGUARDED = (
    "if config.level < NEW_THING:\n    return\nconfig.new_thing()",
    "if tensorrt.version < OTHER_THING:\n    return\nconfig.new_thing()",
    "if tensorrt.version == NEW_THING:\n    config.new_thing()",
    "if tensorrt.version >= NEW_THING or config.level:\n    config.new_thing()",
    "if tensorrt.version < NEW_THING:\n    config.reset()\nconfig.new_thing()",
)


@pytest.mark.parametrize("lines", UNGUARDED)
def test_what_looks_like_a_guard_is_none(lines: str) -> None:
    assert problems(in_function(lines), "10.3") == ["Config.new_thing: is missing"]


def test_private_functions_that_only_other_versions_call_are_not_checked() -> None:
    body = """
def use(tensorrt: TensorRT, config: "trt.Config") -> None:
    make = _old if tensorrt.version < NEW_THING else _new
    make(config)

def _old(config: "trt.Config") -> None:
    config.old_thing()

def _new(config: "trt.Config") -> None:
    _newer(config)

def _newer(config: "trt.Config") -> None:
    config.new_thing()
"""
    assert problems(body, "10.3") == ["Config.old_thing: is missing"]
    assert problems(body, "10.9") == ["Config.new_thing: is missing"]


def test_uses_are_counted() -> None:
    assert check(in_function("config.set_flag(tensorrt.module.Flag.FAST)")).uses == {
        "Config.set_flag",
        "Flag",
        "Flag.FAST",
    }


def test_an_emptied_body_is_still_python() -> None:
    tree = live_code(
        "def f():\n    if version < NEW_THING:\n        g()\n", TensorRTVersion(11, 1), CONSTANTS
    )
    compile(tree, "x", "exec")
