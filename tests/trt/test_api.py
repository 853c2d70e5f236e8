# SPDX-License-Identifier: Apache-2.0
"""Every name of TensorRT that starkv uses is in the real bindings of every version that it supports."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest
from api_check import Checked, check_sources
from api_description import Description, describe
from api_types import ALIAS
from bindings import BOUNDARIES, CHECKED, ROOT, VERSIONS_VARIABLE, UnavailableError, bindings, wanted

from starkv.errors import EngineError
from starkv.trt_compat import version as version_module
from starkv.trt_compat.building import check_hardware_compatibility
from starkv.trt_compat.version import OLDEST, SAME_COMPUTE_CAPABILITY, TensorRTVersion

PACKAGE = ROOT / "starkv" / "trt_compat"
SOURCES = {path.name: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}
MISSING_BEFORE = {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": SAME_COMPUTE_CAPABILITY}
"""Names that are used although early versions lack them, because another place refuses what needs them:
``check_hardware_compatibility``, see the test below. Everything else is guarded where it is used."""
FIRST_VERSIONS: Mapping[str, tuple[str, str, str]] = {
    "STREAM_READER_V2": ("IStreamReaderV2", "10.6.0", "10.7.0"),
    "SAME_COMPUTE_CAPABILITY": (
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "10.8.0.43",
        "10.9.0.34",
    ),
    "PLAN_TO_STREAM": ("Builder.build_serialized_network_to_stream", "10.12.0.36", "10.13.3.9"),
    "NATIVE_ATTENTION": ("INetworkDefinition.add_attention", "10.13.3.9", "10.14.1.48.post1"),
    "ALIASED_TENSORS": ("ICudaEngine.get_aliased_input_tensor", "10.14.1.48.post1", "10.15.1.29"),
    "NATIVE_NORMS": ("INetworkDefinition.add_rotary_embedding", "10.14.1.48.post1", "10.15.1.29"),
}
"""Constant of ``version.py`` → what came with that version, last release without it, first with it."""


def described(release: str) -> Description:
    try:
        return describe(release)
    except UnavailableError as error:
        pytest.skip(f"bindings of TensorRT {release}: {error}")


def check(sources: Mapping[str, str], release: str) -> Checked:
    version = TensorRTVersion.parse(release)
    allowed = {name for name, first in MISSING_BEFORE.items() if version < first}
    return check_sources(sources, described(release), version, allowed)


def has(api: Description, name: str) -> bool:
    owner, _, member = name.rpartition(".")
    return api.member(owner, member) is not None if owner else member in api.names


@pytest.mark.parametrize("release", wanted())
def test_every_name_exists(release: str) -> None:
    checked = check(SOURCES, release)
    assert not checked.problems, "\n".join(checked.problems)


def test_the_checker_sees_what_is_used() -> None:
    uses = check(SOURCES, CHECKED[-1]).uses
    # One of each way to get at an object: attribute, annotation, own attribute, result, base class, loop.
    assert uses >= {
        "BuilderFlag.STRIP_PLAN",
        "IBuilderConfig.set_memory_pool_limit",
        "IExecutionContext.execute_async_v3",
        "IPluginRegistry.load_library",
        "IProgressMonitor.step_complete",
        "IStreamReaderV2.seek",
        "ITensor.name",
        "ParserError.node_operator",
    }
    assert len(uses) > 90


@pytest.mark.parametrize("release", CHECKED[-2:])
def test_a_removed_name_is_found(release: str) -> None:
    changed = dict(SOURCES)
    changed["building.py"] = changed["building.py"].replace("BuilderFlag.STRIP_PLAN", "BuilderFlag.FP16")
    assert [problem.split(": ")[1:] for problem in check(changed, release).problems] == [
        ["BuilderFlag.FP16", "is missing"]
    ]
    assert not check(changed, CHECKED[0]).problems


def test_a_guard_of_the_wrong_version_is_found() -> None:
    changed = {name: text.replace("STREAM_READER_V2", "OLDEST") for name, text in SOURCES.items()}
    problems = "\n".join(check(changed, CHECKED[0]).problems)
    assert "plan_reader.py" in problems
    assert "IStreamReaderV2: is missing" in problems
    changed = {name: text.replace("STREAM_READER_V2", "NEWEST") for name, text in SOURCES.items()}
    assert "IStreamReader: is missing" in "\n".join(check(changed, "11.1.0.106").problems)


def test_what_the_table_lets_through_is_refused_elsewhere() -> None:
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 builds no plans"):
        check_hardware_compatibility("same_compute_capability", OLDEST, None)
    for name in MISSING_BEFORE:
        assert not has(described(CHECKED[0]), name)
        assert has(described(CHECKED[-1]), name)


def test_annotations_name_classes_that_exist_somewhere() -> None:
    known = [described(release) for release in CHECKED]
    for file, text in SOURCES.items():
        for name in annotated_classes(ast.parse(text)):
            assert any(has(api, name) for api in known), f"{file}: {ALIAS}.{name}"


def annotated_classes(tree: ast.AST) -> set[str]:
    """``X`` of every ``trt.X``, also in quoted annotations."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and f"{ALIAS}." in node.value:
            try:
                found |= annotated_classes(ast.parse(node.value, mode="eval"))
            except SyntaxError:
                continue
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == ALIAS:
            found.add(node.attr)
    return found


@pytest.mark.parametrize("constant", FIRST_VERSIONS)
def test_first_versions(constant: str) -> None:
    name, before, first = FIRST_VERSIONS[constant]
    if {before, first} & set(BOUNDARIES) and wanted() == CHECKED:
        pytest.skip(f"needs more releases than the five of the other tests: {VERSIONS_VARIABLE}=all")
    assert not has(described(before), name)
    assert has(described(first), name)
    assert bindings(before).version < getattr(version_module, constant) == bindings(first).version


def test_releases_are_those_of_the_supported_versions() -> None:
    assert tuple(map(TensorRTVersion.parse, CHECKED)) == version_module.CHECKED


def test_nothing_else_touches_tensorrt() -> None:
    folders = [ROOT / name for name in ("export", "runtime", "starkv")]
    paths = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    others = sorted(path for path in paths if PACKAGE not in path.parents)
    assert len(others) > 100
    assert not [path for path in others if mentions_tensorrt(path)]


def mentions_tensorrt(path: Path) -> bool:
    """Whether a file imports the package, or takes it from an object of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == "tensorrt" for alias in node.names
        ):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensorrt":
            return True
        if isinstance(node, ast.Attribute) and node.attr == "module":
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name == "tensorrt":
                return True
    return False
