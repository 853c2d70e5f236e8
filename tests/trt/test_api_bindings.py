# SPDX-License-Identifier: Apache-2.0
"""Where the bindings can't be had, the reason is said; what is fetched is complete or not there."""

import shutil
import sys
from pathlib import Path

import bindings
import pytest
from bindings import BOUNDARIES, CHECKED, UnavailableError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; no test reaches the index."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(bindings, "CACHE", cache)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return cache


def fetch(release: str) -> bindings.Bindings:
    return bindings.bindings.__wrapped__(release)


def test_no_wheel(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("cc") or sys.platform != "linux":
        pytest.skip("needs a C compiler")
    monkeypatch.setenv(bindings.WHEELS_VARIABLE, str(tmp_path))
    with pytest.raises(UnavailableError, match=r"No matching distribution found for tensorrt_cu12_bindings"):
        fetch("10.3.0")
    with pytest.raises(UnavailableError, match=r"tensorrt_cu13_bindings==10\.13\.3\.9"):
        fetch("10.13.3.9")
    assert [path.name for path in empty_cache.iterdir()] == ["stand-ins"]


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UnavailableError, match="no C compiler"):
        fetch("11.1.0.106")
    assert not list((empty_cache / "stand-ins").iterdir())


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(UnavailableError, match="Linux only"):
        fetch("11.1.0.106")


def test_two_processes_at_once(empty_cache: Path) -> None:
    folder = empty_cache / "made"

    def make(place: Path) -> None:
        (place / "file").write_text("slow")
        folder.mkdir()
        (folder / "file").write_text("quick")

    bindings._into(folder, make)
    assert (folder / "file").read_text() == "quick"
    assert list(empty_cache.iterdir()) == [folder]


def test_more_releases_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bindings.VERSIONS_VARIABLE, raising=False)
    assert bindings.wanted() == CHECKED
    monkeypatch.setenv(bindings.VERSIONS_VARIABLE, "all")
    assert set(bindings.wanted()) == {*CHECKED, *BOUNDARIES}
