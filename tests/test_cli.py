# SPDX-License-Identifier: Apache-2.0
"""The command from a checkpoint to a click: results on stdout, everything else on stderr."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import Command
from conftest import ChatModel
from PIL import Image

import starkv as package
from starkv.cli import doctor as doctor_module
from starkv.cli.engines import made_parents
from starkv.cli.main import main
from starkv.manifest import read_manifest

REPLY = "Action: click(start_box='(56,28)')"
PROMPT = ("--prompt", "click the red star")


def test_from_checkpoint_to_click(starkv: Command, reciting: ChatModel, screenshot: Path) -> None:
    """Every subcommand takes what the one before has printed."""
    exported = starkv("export", reciting.checkpoint, "--quant", "int4")
    assert (exported.code, exported.out) == (0, "exports/checkpoint-int4\n")
    assert "licence" in exported.err

    built = starkv("build", exported.out.strip())
    assert (built.code, built.out) == (0, "engines/checkpoint-ort-int4\n")
    assert "backend ort" in built.err

    inspected = starkv("inspect", built.out.strip())
    assert inspected.code == 0
    assert "decoder int4, head int8" in inspected.out
    assert "all files have the hashes of the build" in inspected.out

    ran = starkv("run", "--engine", built.out.strip(), "--image", screenshot, *PROMPT)
    assert (ran.code, ran.out) == (0, f"{REPLY}\nclick: model_xy [56, 28], screen_xy [57.14, 30]\n")
    assert "52 prompt tokens (35 of the image), 4 generated" in ran.err


def test_a_model_is_built_in_one_step_and_leaves_no_export(starkv: Command, reciting: ChatModel) -> None:
    built = starkv("build", reciting.checkpoint, "--out", "deep/er/engine", "--backend", "ort", "--prepack")
    assert (built.code, built.out) == (0, "deep/er/engine\n")
    assert os.listdir("deep/er") == ["engine"]
    # Nothing is shared with the deleted export: onnx refuses data files with two links.
    assert {path.stat().st_nlink for path in Path("deep/er/engine").iterdir()} == {1}
    assert "decoder.prepacked.onnx" in read_manifest(Path("deep/er/engine")).files


def test_engines_are_found_by_name_and_built_when_missing(
    starkv: Command,
    reciting: ChatModel,
    screenshot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starkv.export import cards

    card = cards.card_of_folder(reciting.checkpoint).model_copy(update={"folder": str(reciting.checkpoint)})
    monkeypatch.setattr(cards, "card_names", lambda: ["reciter"])
    monkeypatch.setattr(
        "starkv.export.cards.load_card", lambda name: card.model_copy(update={"name": "reciter"})
    )
    monkeypatch.setenv("STARKV_ENGINES", str(tmp_path / "home"))
    arguments = ("run", "--engine", "reciter", "--image", screenshot, *PROMPT)
    first, second = starkv(*arguments), starkv(*arguments)
    assert os.listdir(tmp_path / "home") == ["reciter-ort-int8"]
    assert first.out == second.out != ""
    assert "building it once" in first.err
    assert "building it once" not in second.err


def test_json_is_one_object_with_the_promised_keys(
    starkv: Command, reciting: ChatModel, screenshot: Path
) -> None:
    ran = starkv("run", "--engine", reciting.engine, "--image", screenshot, *PROMPT, "--json")
    reply = json.loads(ran.out)
    assert reply["action"] == {"type": "click", "model_xy": [56, 28], "screen_xy": [57.14, 30]}
    assert (reply["model_xy"], reply["screen_xy"], reply["text"]) == ([56, 28], [57.14, 30], REPLY)
    assert reply["timings"]["prompt_tokens"] == reply["timings"]["kv_tokens_kept"] == 52
    assert reply["timings"]["decode_per_second"] > 0
    assert (reply["resized_wh"], reply["original_wh"]) == ([196, 140], [200, 150])


def test_a_reply_that_is_no_action_is_shown_with_a_warning(
    starkv: Command, babbling: ChatModel, screenshot: Path
) -> None:
    arguments = ("run", "--engine", babbling.engine, "--image", screenshot, *PROMPT, "--max-new-tokens", 5)
    ran = starkv(*arguments)
    assert ran.code == 0
    assert "warning: the reply is no action" in ran.err
    reply = json.loads(starkv(*arguments, "--json").out)
    assert (reply["action"], reply["model_xy"], reply["screen_xy"]) == (None, None, None)
    assert reply["error"]
    assert ran.out.rstrip("\n") == reply["text"].rstrip("\n")


def test_picture_shows_the_click(starkv: Command, reciting: ChatModel, screenshot: Path) -> None:
    ran = starkv("run", "--engine", reciting.engine, "--image", screenshot, *PROMPT, "--draw", "click.png")
    assert ran.code == 0
    with Image.open("click.png") as drawn, Image.open(screenshot) as original:
        assert (drawn.format, drawn.size) == ("PNG", original.size)
        changed = np.argwhere((np.asarray(drawn) != np.asarray(original)).any(axis=2))
    # The mark surrounds the place on the screen, (57, 30), and leaves the rest alone.
    assert np.abs(changed.mean(axis=0) - (30, 57)).max() < 2
    assert np.abs(changed - (30, 57)).max() < 20
    assert os.listdir() == ["click.png"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--stop", "click"), "Action: "),
        (("--max-new-tokens", 1), "Action: click(start_box='("),
        (("--temperature", 0.01, "--top-p", 0.5, "--seed", 3), REPLY),
        (("--no-verify", "--threads", 1, "--kv-method", "full"), REPLY),
    ],
)
def test_options_of_run(
    starkv: Command, reciting: ChatModel, screenshot: Path, options: tuple[object, ...], text: str
) -> None:
    ran = starkv("run", "--engine", reciting.engine, "--image", screenshot, *PROMPT, "--json", *options)
    assert json.loads(ran.out)["text"] == text


def test_inspect_prints_the_manifest(starkv: Command, reciting: ChatModel) -> None:
    inspected = starkv("inspect", reciting.engine, "--json")
    assert json.loads(inspected.out) == read_manifest(reciting.engine).model_dump(mode="json")
    assert inspected.err == ""


BENCH = ("-p", 16, "-n", 4, "-n", 0, "-d", 0, "-d", 32, "-r", 2, "--screen", "100x100", "--threads", 1)
TESTS = ["vit112x112", "pp16", "tg4", "pp16 @ d32", "tg4 @ d32"]


def test_bench_prints_each_form(
    starkv: Command, reciting: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starkv.runtime.benchmark.memory_bandwidth", lambda: 1e10)
    bench = ("bench", "--engine", reciting.engine, *BENCH, "-o")
    markdown = starkv(*bench, "md")
    lines = markdown.out.splitlines()
    assert len(lines) == 2 + len(TESTS)
    assert all(line.count("|") == 12 for line in lines)
    assert [line.split("|")[7].strip() for line in lines[2:]] == TESTS
    assert "memory bandwidth 10.0 GB/s" in markdown.err

    rows = list(csv.DictReader(io.StringIO(starkv(*bench, "csv").out)))
    assert [row["test"] for row in rows] == TESTS
    assert all("±" in row["t/s"] for row in rows)

    report = json.loads(starkv(*bench, "json").out)
    tests = {test["test"]: test for test in report["tests"]}
    assert list(tests) == TESTS
    assert all(len(test["rates"]) == 2 and min(test["rates"]) > 0 for test in tests.values())
    # Two layers, two KV heads of 64, key and value in fp32.
    assert tests["pp16 @ d32"]["kv_mib"] == 48 * 2048 / 2**20
    assert tests["tg4 @ d32"]["kv_mib"] == 36 * 2048 / 2**20
    share, rate = tests["tg4 @ d32"]["roofline_share"], tests["tg4 @ d32"]["tokens_per_second"]
    weights = (reciting.engine / "decoder.data").stat().st_size
    assert share == pytest.approx(rate * (weights + 34 * 2048) / 1e10)
    assert tests["pp16"]["roofline_share"] is None


def test_bandwidth_is_plausible() -> None:
    from starkv.runtime.benchmark import memory_bandwidth

    assert 1e8 < memory_bandwidth(mib=64, repetitions=2) < 1e13


def test_version_and_help(starkv: Command) -> None:
    assert starkv("--version").out == f"starkv {package.__version__}\n"
    helped = starkv("--help")
    assert helped.code == 0
    for command in ("export", "build", "run", "chat", "inspect", "doctor", "bench"):
        assert command in helped.out
        assert starkv(command, "--help").code == 0


def test_doctor_looks_at_everything(starkv: Command) -> None:
    looked = starkv("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(looked.out)}
    assert looked.code == 0
    assert findings["ONNX Runtime"]["usable"]
    assert {"processor", "disk", "CUDA", "TensorRT", "nvcc", "export, build"} <= set(findings)
    assert all(finding["found"] for finding in findings.values())
    assert starkv("doctor").code == 0


@pytest.mark.parametrize(
    ("setting", "tunables", "usable", "advised"),
    [
        ("always madvise [never]", "", False, False),
        ("always [madvise] never", "", False, True),
        ("always [madvise] never", "a.b=2:glibc.malloc.hugetlb=1", True, False),
        ("[always] madvise never", "", True, False),
    ],
)
def test_doctor_advises_huge_pages_where_they_are_to_be_had(
    starkv: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: str,
    tunables: str,
    usable: bool,
    advised: bool,
) -> None:
    (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(doctor_module, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    findings = json.loads(starkv("doctor", "--json").out)
    pages = next(finding for finding in findings if finding["subject"] == "huge pages")
    assert (pages["usable"], "GLIBC_TUNABLES" in pages["advice"]) == (usable, advised)


@pytest.mark.parametrize(
    ("present", "advice"),
    [
        ({}, "pip install 'starkv[cpu]'"),
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, "overwrite each other"),
    ],
)
def test_doctor_fails_where_no_engine_can_run(
    starkv: Command, monkeypatch: pytest.MonkeyPatch, present: dict[str, str], advice: str
) -> None:
    monkeypatch.setattr(doctor_module, "installed", present.get)
    looked = starkv("doctor", "--json")
    assert looked.code == 1
    assert advice in next(f["advice"] for f in json.loads(looked.out) if f["subject"] == "ONNX Runtime")
    monkeypatch.setattr(doctor_module.results, "width", 200)
    table = starkv("doctor")
    assert table.code == 1
    assert advice in table.out, "brackets were taken for a style"


def test_parents_stay_when_the_work_succeeds(tmp_path: Path) -> None:
    with made_parents(tmp_path / "a" / "b" / "target"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("starkv.cli.main.app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_it_is_also_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "starkv.cli", "inspect", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: engine directory nowhere does not exist")
