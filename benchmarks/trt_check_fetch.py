# SPDX-License-Identifier: Apache-2.0
"""What ``make trt-check`` fetches of TensorRT into ``build/``: headers of four versions, three runtimes."""

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from functools import cache
from pathlib import Path

from gpu_steps import ROOT, Result, SkippedError, StepError

HEADERS_VARIABLE = "STARKV_TENSORRT_HEADERS"
"""Folders of headers, separated as in PATH; nothing is fetched then."""
URL_VARIABLE = "STARKV_TENSORRT_HEADERS_URL"
"""Where headers come from instead, with ``{tag}`` and ``{name}``: a mirror, or file:///folder/{tag}/{name}."""
URL = "https://raw.githubusercontent.com/NVIDIA/TensorRT/{tag}/include/{name}"
TAGS = {
    "v10.3.0": "939bb6afee0d7cbfda7583b600226ad6cb3a68114ffa2ad9bab02f7e4a1989fd",
    "v10.13.3": "9ad0a98df7165af01b993dbde7492469cb72b63e8cc5c92075d0f8c535778a2d",
    "v10.16": "5f5bc596df03cddd167c8b3effc5ade00365601a78d46a9c42001354de05fea5",
    "v11.1": "a261ff2b1e810865928442d6dedeff38e9f6291b5272ae50974cb56fe0161bdf",
}
"""Tag → SHA-256 of all its headers in a row, oldest first."""
NAMES = (
    "NvInferImpl.h",
    "NvInferLegacyDims.h",
    "NvInferPluginBase.h",
    "NvInferRuntime.h",
    "NvInferRuntimeBase.h",
    "NvInferRuntimeCommon.h",
    "NvInferRuntimePlugin.h",
    "NvInferVersion.h",
)
"""All that the plugins include, directly or not."""
_NOT_IN = {"v10.3.0": ("NvInferPluginBase.h",)}
LEAN = ("10.16.1.11", "11.1.0.106", "11.4.0.106")
"""Releases whose lean runtime is on PyPI; its registry works without a GPU."""
_SECONDS = 60


def headers() -> Result:
    """Find or fetch the headers of all versions, for the steps to come."""
    if given := os.environ.get(HEADERS_VARIABLE):
        return f"given: {given}", "", {"given": given}
    if root := os.environ.get("TENSORRT_ROOT"):
        return f"given: TENSORRT_ROOT={root}", "", {"given": root}
    folders = [_fetch_headers(tag, digest) for tag, digest in TAGS.items()]
    os.environ[HEADERS_VARIABLE] = os.pathsep.join(map(str, folders))
    return f"{', '.join(TAGS)}: as expected, by SHA-256", "", {"tags": TAGS}


def header_folders() -> list[Path]:
    """What :func:`headers` found, oldest first; empty if nothing."""
    if named := os.environ.get(HEADERS_VARIABLE):
        return [Path(folder) for folder in named.split(os.pathsep)]
    root = os.environ.get("TENSORRT_ROOT")
    return [Path(root) / "include"] if root else []


def _fetch_headers(tag: str, digest: str) -> Path:
    folder = ROOT / "build" / "tensorrt-headers" / tag
    names = [name for name in NAMES if name not in _NOT_IN.get(tag, ())]
    if not all((folder / name).is_file() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            url = os.environ.get(URL_VARIABLE, URL).format(tag=tag, name=name)
            try:
                with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
                    content = answer.read()
            except OSError as error:
                raise SkippedError(
                    f"{url}: {error}; name folders of headers in {HEADERS_VARIABLE}, or a mirror in "
                    f"{URL_VARIABLE}"
                ) from None
            (folder / name).write_bytes(content)
    found = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    if found != digest:
        raise StepError(
            f"{folder}: SHA-256 of the headers is {found}, not {digest}; delete them, and try again"
        )
    return folder


@cache
def lean_runtime(release: str) -> Path:
    """Folder with the packages of a lean runtime.

    Raises:
        SkippedError: it can't be had here.
    """
    folder = (
        ROOT / "build" / "tensorrt-lean" / f"{release}-cp{sys.version_info.major}{sys.version_info.minor}"
    )
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        downloads, made = Path(scratch) / "wheels", Path(scratch) / "made"
        made.mkdir()
        for part in ("libs", "bindings"):
            _download(f"tensorrt-lean-cu13-{part}=={release}", downloads)
        for wheel in downloads.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(made)
        made.rename(folder)
    return folder


def _download(requirement: str, folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *map(str, options), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [
            "no reason given"
        ]
        raise SkippedError(f"pip can't download {requirement}: {reasons[-1]}")
