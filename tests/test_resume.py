# SPDX-License-Identifier: Apache-2.0
"""An export that stops in the middle leaves nothing that looks complete, and the next one goes on."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from conftest import TinyModel
from tiny_model import tiny_card

from starkv.errors import CheckpointError, UsageError
from starkv.export import export_model as export_module
from starkv.export.data_file import DataFile
from starkv.export.export_model import export_model
from starkv.export.journal import JOURNAL_NAME, Journal
from starkv.export.quantize import blockwise
from starkv.export.quantize.presets import PRESETS
from starkv.export.resume import NOTES, partial_directory, resumable_directory
from starkv.export.tensor_file import TensorSpec
from starkv.export.weights import WeightWriter


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class StoppedAfter:
    """Stands for ``WeightWriter._store`` and fails at the n-th weight."""

    def __init__(self, count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.stored = count, 0
        original = WeightWriter._store

        def store(writer: WeightWriter, *arguments: object) -> object:
            if self.left == 0:
                raise error
            self.left -= 1
            self.stored += 1
            return original(writer, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(WeightWriter, "_store", store)


def export_int4(tiny: TinyModel, out: Path) -> None:
    export_model(tiny.checkpoint, tiny_card(), out, PRESETS["int4"])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), OSError(errno.EIO, "io")]
)
@pytest.mark.parametrize("count", [0, 3, 15])
def test_an_interrupted_export_goes_on_where_it_stopped(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, count: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        StoppedAfter(count, error, patch)
        with pytest.raises((UsageError, type(error))):
            export_int4(tiny, out)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]

    written = 0
    original = DataFile.store

    def store(
        file: DataFile, specs: list[TensorSpec], fill: Callable[[object], None]
    ) -> list[ir.ExternalTensor]:
        def counted(rooms: object) -> None:
            nonlocal written
            written += any(
                spec.name.endswith((".codes", ".weight")) and len(spec.shape) == 2 for spec in specs
            )
            fill(rooms)

        return original(file, specs, counted)

    monkeypatch.setattr(DataFile, "store", store)
    export_int4(tiny, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {name: data for name, data in files_of(out).items() if name != "export.json"} == {
        name: data for name, data in files_of(tiny.exports["int4"]).items() if name != "export.json"
    }
    assert written == total_weights(tiny) - count


def total_weights(tiny: TinyModel) -> int:
    """Matrices of the tiny model's two graphs: fused layers count once."""
    graphs = [ir.load(tiny.exports["int4"] / f"{name}.onnx") for name in ("vision", "decoder")]
    return sum(
        value.shape is not None and len(value.shape) == 2 and not name.endswith(".scales")
        for graph in graphs
        for name, value in graph.graph.initializers.items()
    )


def test_a_full_disk_is_one_clear_line(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoppedAfter(2, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    with pytest.raises(UsageError, match=r"is full; free some space .* goes on where it stopped"):
        export_int4(tiny, tmp_path / "out")


def test_bad_input_leaves_nothing(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StoppedAfter(3, CheckpointError("damaged"), monkeypatch)
    with pytest.raises(CheckpointError, match="damaged"):
        export_int4(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_input_starts_over(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        StoppedAfter(15, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            export_int4(tiny, out)
    export_model(tiny.checkpoint, tiny_card(), out, PRESETS["int8"])
    assert (out / "decoder.data").read_bytes() == (tiny.exports["int8"] / "decoder.data").read_bytes()


def test_bytes_that_never_reached_the_disk_are_written_again(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure the journal may know of tensors whose pages were lost."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        StoppedAfter(15, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            export_int4(tiny, out)
    data = partial_directory(out) / "vision.data"
    data.write_bytes(bytes(data.stat().st_size))
    journal = partial_directory(out) / NOTES / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-9])
    export_int4(tiny, out)
    for name in ("vision.data", "decoder.data"):
        assert (out / name).read_bytes() == (tiny.exports["int4"] / name).read_bytes()


def test_a_killed_process_is_continued(tiny: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
        import os, signal
        from pathlib import Path
        from tiny_model import tiny_card
        from starkv.export.export_model import export_model
        from starkv.export.quantize.presets import PRESETS
        from starkv.export.weights import WeightWriter

        original, left = WeightWriter._store, [20]
        def store(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)
        WeightWriter._store = store
        export_model(Path({str(tiny.checkpoint)!r}), tiny_card(), Path({str(out)!r}), PRESETS["int4"])
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (partial_directory(out) / NOTES / JOURNAL_NAME).stat().st_size > 0
    export_int4(tiny, out)
    assert (out / "decoder.data").read_bytes() == (tiny.exports["int4"] / "decoder.data").read_bytes()


def test_two_processes_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = resumable_directory(out, "marker", "one")
    with first, pytest.raises(UsageError, match="another process is making"):
        resumable_directory(out, "marker", "one").__enter__()


def test_an_export_of_the_same_input_is_reused(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    card = tiny_card()
    first = export_model(tiny.checkpoint, card, out, PRESETS["int4"], reuse=True)
    monkeypatch.setattr(export_module, "_write", lambda *_: pytest.fail("exported again"))
    assert export_model(tiny.checkpoint, card, out, PRESETS["int4"], reuse=True) == first


def test_too_little_disk_space_is_said_before_the_work(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"needs about 0\.0 GiB of disk space, .* has 0\.0 GiB free"):
        export_int4(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_of_disk_space_is_close(tiny: TinyModel) -> None:
    from starkv.export.checkpoint import Checkpoint
    from starkv.export.disk_space import export_bytes

    for preset, folder in tiny.exports.items():
        with Checkpoint(tiny.checkpoint) as checkpoint:
            estimate = export_bytes(checkpoint, PRESETS[preset])
            # Tensors of such a small model are filled up to whole pages.
            padding = 4096 * len(checkpoint.names())
        names = ("vision.data", "decoder.data", "embedding.safetensors")
        written = sum((folder / name).stat().st_size for name in names)
        assert 0.9 * estimate < written < 1.1 * estimate + padding


def test_journal_knows_a_tensor_by_place_and_content(tmp_path: Path) -> None:
    stored = np.arange(8, dtype=np.uint8)
    Journal(tmp_path).add([("a.data", "x", (0, 8), stored)])
    journal = Journal(tmp_path)
    assert journal.holds("a.data", "x", (0, 8), stored)
    assert not journal.holds("a.data", "x", (64, 8), stored)
    assert not journal.holds("b.data", "x", (0, 8), stored)
    assert not journal.holds("a.data", "x", (0, 8), stored + 1)


def test_rounding_by_rows_is_rounding_by_columns() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    codes, scales = blockwise.quantize_rows(weight, 4, 32)
    other_codes, other_scales = blockwise.quantize_blockwise(np.ascontiguousarray(weight.T), 4, 32)
    np.testing.assert_array_equal(codes.T, other_codes)
    np.testing.assert_array_equal(scales.T, other_scales)
