# SPDX-License-Identifier: Apache-2.0
"""The fake's names, arguments and numbers, in each version, are those of the real bindings."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from api_description import Description, describe
from bindings import CHECKED, UnavailableError, bindings
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.state import Current, MisuseError, State
from small_engines import trt

_NUMBERS = """
import json, tensorrt_bindings
names = {name: kind for name, kind in vars(tensorrt_bindings).items() if hasattr(kind, "__members__")}
names["Severity"] = tensorrt_bindings.ILogger.Severity
members = {name: kind.__members__.items() for name, kind in names.items()}
print(json.dumps({name: {member: int(value) for member, value in items} for name, items in members.items()}))
"""
_AS_IN_CPP = {
    ("IStreamReader", "read"),
    ("IStreamReaderV2", "read"),
    ("IStreamWriter", "write"),
}
"""Callbacks whose documented arguments are those of C++; Python's are in pyCore.cpp."""


@pytest.fixture(params=CHECKED)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    install(monkeypatch, str(request.param), FakeCuda())
    return str(request.param)


def described(release: str) -> Description:
    try:
        return describe(release)
    except UnavailableError as error:
        pytest.skip(f"bindings of TensorRT {release}: {error}")


def fake_classes() -> Iterator[tuple[str, Any]]:
    for name, value in vars(trt()).items():
        if isinstance(value, type) and not hasattr(value, "__members__"):
            yield name, value


def fake_members(kind: Any) -> Iterator[tuple[str, Any]]:
    """Public members of a class and of the fake classes that it is made from."""
    for owner in kind.__mro__:
        if owner.__module__.startswith("fake_tensorrt."):
            for name, value in vars(owner).items():
                if not name.startswith("_") and (isinstance(value, property) or inspect.isfunction(value)):
                    yield name, value


INTERNAL = {
    ("Dims", "make"),
    *(("INetworkDefinition", name) for name in ("empty", "fill", "aliases")),
    *(("ITimingCache", name) for name in ("read", "measure")),
    *(("ICudaEngine", name) for name in ("of", "streams", "ranges", "scratch")),
    ("Refitter", "offer"),
}
"""What the fakes' own modules call."""


def test_every_name_of_the_fake_is_real(release: str) -> None:
    real = described(release)
    for name in vars(trt()):
        assert name in real.names or name.startswith("__"), name
    for name, kind in fake_classes():
        for member, _ in fake_members(kind):
            if (name, member) not in INTERNAL:
                assert real.member(name, member) is not None, f"{name}.{member}"


def test_arguments_have_the_real_names_and_order(release: str) -> None:
    real, compared = described(release), 0
    for name, kind in fake_classes():
        members = {member: value for member, value in fake_members(kind) if inspect.isfunction(value)}
        if "__init__" in vars(kind):
            members["__init__"] = kind.__init__
        for member, function in members.items():
            found = real.member(name, member)
            if (name, member) in INTERNAL | _AS_IN_CPP or found is None or not found.signatures:
                continue
            taken = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
            known = [[parameter.name for parameter in way.parameters] for way in found.signatures]
            assert any(taken == way[: len(taken)] for way in known), (
                f"{name}.{member}: {taken}, really {known}"
            )
            compared += 1
    assert compared > 60


def test_properties_can_be_set_where_they_really_can(release: str) -> None:
    real = described(release)
    for name, kind in fake_classes():
        for member, value in fake_members(kind):
            if isinstance(value, property):
                found = real.member(name, member)
                assert found is not None
                assert found.kind == "property"
                assert found.writable or value.fset is None, f"{name}.{member}"


def test_members_have_the_real_numbers(release: str) -> None:
    try:
        real = json.loads(bindings(release).python("-c", _NUMBERS))
    except UnavailableError as error:
        pytest.skip(str(error))
    compared = {name: kind for name, kind in vars(trt()).items() if hasattr(kind, "__members__")}
    compared["Severity"] = trt().ILogger.Severity
    assert len(compared) > 10
    for name, kind in compared.items():
        for member, value in kind.__members__.items():
            assert real[name].get(member) == int(value), f"{name}.{member}"


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("IStreamReader", (10, 3), (10, 16)),
        ("IStreamReaderV2", (10, 13), (11, 4)),
        ("SeekPosition", (10, 13), (11, 4)),
        ("IStreamWriter", (10, 13), (11, 4)),
        ("Builder.build_serialized_network_to_stream", (10, 13), (11, 4)),
        ("ICudaEngine.get_aliased_input_tensor", (10, 16), (11, 4)),
        ("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", (10, 13), (11, 4)),
        ("BuilderFlag.FP16", (10, 3), (10, 16)),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", (10, 3), (10, 16)),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", (10, 3), (11, 4)),
    ],
)
def test_names_come_and_go(release: str, name: str, first: tuple[int, int], last: tuple[int, int]) -> None:
    """Where there are no bindings to compare with, too; other names raise ``AttributeError``."""
    numbers = tuple(int(part) for part in release.split(".")[:2])
    owner: Any = trt()
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    assert hasattr(owner, attribute) == (first <= numbers <= last)
    with pytest.raises(AttributeError):
        getattr(owner, attribute + "_")


def test_members_are_no_numbers(state: State) -> None:
    flag = trt().BuilderFlag.REFIT
    assert flag != 4
    assert 1 << int(flag) == 16
    with pytest.raises(TypeError):
        print(1 << flag)


def test_shapes_compare_with_tuples(state: State) -> None:
    dims = trt().Dims([1, 2, -1])
    assert dims == (1, 2, -1)
    assert tuple(dims) == (1, 2, -1)
    assert dims[2] == -1
    assert not isinstance(dims, tuple)
    with pytest.raises(TypeError, match="unhashable"):
        hash(dims)
    with pytest.raises(TypeError):
        trt().Dims(["a"])
    with pytest.raises(RuntimeError, match="maximum"):
        trt().Dims(range(9))


def test_memory_is_a_buffer_and_nothing_else(state: State) -> None:
    cache = trt().Builder(trt().Logger()).create_builder_config().create_timing_cache(b"")
    memory = cache.serialize()
    assert len(bytes(memory)) == memory.nbytes > 0
    assert memory
    for act in (lambda: len(memory), lambda: memory[0], lambda: memory + b""):
        with pytest.raises(TypeError):
            act()
    with pytest.raises(AttributeError, match="decode"):
        memory.decode()


def test_nothing_is_used_after_its_test(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = trt().get_plugin_registry()
    monkeypatch.setattr(Current, "state", None)
    with pytest.raises(MisuseError, match="after its test"):
        registry.get_creator("KVAttention", "1", "ai.starkv")


def test_states_know_their_version(state: State) -> None:
    assert replace(state, version="11.1.0.106").since(11, 1)
    assert not state.since(10, 4)
