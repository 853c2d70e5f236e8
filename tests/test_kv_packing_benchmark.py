# SPDX-License-Identifier: Apache-2.0
"""The benchmark of packed caches: every packing answers as its own engine would, and figures are right."""

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import pytest
from packed_asking import PackedAsker
from packed_figures import packed_figures, pareto_front
from packed_report import write_report
from packed_variants import pack_quickly
from packings import EVICTED, PACKINGS, PackedCell, PackedRecord, PackedSettings, chosen_packings
from PIL import Image
from running import SUITES, run

from starkv.cli.kv_combination_runs import CombinationAsker
from starkv.errors import UsageError
from starkv.evaluation.records import RecordFile
from starkv.evaluation.suites.synthetic import load
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import Session
from starkv.synthetic.samples import Sample

MOST = 20
NAMES = ("int8", "r50-int4")
QUESTIONS = {"click": 2, "trajectory": 1}


@pytest.fixture(scope="module")
def agent(gui_tiny_engine: Path) -> Agent:
    return Agent.load(gui_tiny_engine, threads=1)


@pytest.fixture(scope="module")
def packed(gui_tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starkv.calibration.kv_prompts.SCREENS", 6)
        wanted = {name: PACKINGS[name] for name in NAMES}
        places = pack_quickly(gui_tiny_engine, tmp_path_factory.mktemp("packed"), list(wanted.values()))
    return {
        name: open_engine(places[options], verify=False, threads=1, device="cpu")
        for name, options in wanted.items()
    }


@pytest.fixture(scope="module")
def asked(agent: Agent, packed: Mapping[str, Engine]) -> dict[str, tuple[list[Sample], list[PackedRecord]]]:
    """Questions of each suite and the records of their answers."""
    found = {}
    for suite, count in QUESTIONS.items():
        samples = list(islice(SUITES[suite]("test", 0, count), count))
        records = []
        for sample in samples:
            # Each stands alone: no memory of earlier questions.
            records.append(PackedAsker(agent, packed, [0.3], MOST).ask(sample))
        found[suite] = samples, records
    return found


def answered_alone(engine: Engine, agent: Agent, sample: Sample, policy: KvPolicy) -> tuple[str, int]:
    """A reply that an engine gives after its own prefill, and the bytes that it kept."""
    session = Session(engine, agent.tokenizer, policy)
    images = [Image.fromarray(frame) for frame in sample.frames]
    messages = opening(sample.question, len(images), engine.manifest.prompt)
    text = "".join(session.reply(messages, images, SamplingParameters(MOST)))
    return text, session.timings.kv_bytes_kept


@pytest.mark.parametrize("suite", QUESTIONS)
def test_rows_of_another_engine_are_answered_as_ones_own(
    agent: Agent,
    packed: Mapping[str, Engine],
    asked: Mapping[str, tuple[list[Sample], list[PackedRecord]]],
    suite: str,
) -> None:
    samples, records = asked[suite]
    for sample, record in zip(samples, records, strict=True):
        for name, engine in ((EVICTED, agent.engine), *packed.items()):
            for budget in (1.0, 0.3):
                method = KvPolicy() if budget == 1 else KvPolicy(STAR_KV, Budget(budget))
                policy = KvPolicy(method.method, method.budget, packed=name != EVICTED)
                row = FULL if (name, budget) == (EVICTED, 1.0) else name
                cell = record.cells[row][f"{budget:g}"]
                assert (cell.text, cell.bytes) == answered_alone(engine, agent, sample, policy)


def test_divergences_are_of_the_packing(
    asked: Mapping[str, tuple[list[Sample], list[PackedRecord]]],
) -> None:
    for _, records in asked.values():
        for record in records:
            whole = record.cells[FULL]["1"]
            assert whole.same
            assert set(whole.divergences) == {0.0}
            assert whole.bytes == record.full_bytes
            quantized, cut = record.cells["int8"]["1"], record.cells["r50-int4"]["1"]
            for one in (quantized, cut):
                assert sum(one.divergences) > 0
                assert len(one.divergences) == len(whole.divergences)
            assert cut.bytes < quantized.bytes < 0.3 * whole.bytes


def test_divergences_are_those_of_validate_clicks(
    packed: Mapping[str, Engine],
    agent: Agent,
    asked: Mapping[str, tuple[list[Sample], list[PackedRecord]]],
) -> None:
    """The command forces the reply through a session of its own prefill."""
    samples = load("click", "test", 0, QUESTIONS["click"]).samples
    policies = {"full": KvPolicy(packed=False), "evict": KvPolicy(STAR_KV, Budget(0.3), packed=True)}
    asker = CombinationAsker(Agent(packed["int8"], agent.tokenizer), SamplingParameters(MOST), "plain", {})
    answers = asker.ask(samples, policies, pytest.fail, lambda name: None)
    for record, answer in zip(asked["click"][1], answers["evict"], strict=True):
        expected = record.cells["int8"]["0.3"]
        assert answer.record.id.endswith(record.id)
        assert answer.record.reply == expected.text
        assert answer.divergences == pytest.approx(expected.divergences, rel=0.01, abs=1e-5)


def said(record: PackedRecord) -> list[tuple[str, str, str, int]]:
    """What does not hang on the last bits of a sum."""
    return [
        (row, budget, cell.text, cell.bytes)
        for row, by_budget in record.cells.items()
        for budget, cell in by_budget.items()
    ]


def settings(suite: str) -> PackedSettings:
    return PackedSettings(
        engine="gui-tiny",
        engine_hash="1",
        suite=suite,
        split="test",
        seed=0,
        max_new_tokens=MOST,
        budgets=[0.3],
        packings={},
        calibration_tokens=7,
    )


def test_a_run_goes_on_and_reports(
    agent: Agent,
    packed: Mapping[str, Engine],
    asked: Mapping[str, tuple[list[Sample], list[PackedRecord]]],
    tmp_path: Path,
) -> None:
    for suite, (samples, answers) in asked.items():
        records = RecordFile(tmp_path / suite, settings(suite), PackedRecord)
        for answer in answers[:1]:
            records.add(answer)
        told: list[int] = []
        asker = PackedAsker(agent, packed, [0.3], MOST)
        run(samples, False, asker, RecordFile(tmp_path / suite, settings(suite), PackedRecord), told.append)
        assert sum(told) == len(samples)
        again = RecordFile(tmp_path / suite, settings(suite), PackedRecord)
        assert [said(record) for record in again.records.values()] == [said(record) for record in answers]
    write_report(tmp_path)
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    clicks = [line for line in lines if (line["suite"], line["task"]) == ("click", "all")]
    assert len(clicks) == 6
    assert any(line["on_front"] == "True" for line in clicks)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["figures"]) == len(lines)
    report = (tmp_path / "report.md").read_text()
    for words in ("## click", "## trajectory", "### The Pareto front", "rank 50 %, int4", "7 tokens"):
        assert words in report
    for suite in QUESTIONS:
        assert (tmp_path / "plots" / f"{suite}.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no records of packed caches"):
        write_report(tmp_path)


def test_the_pareto_front() -> None:
    assert pareto_front([(1, 5), (2, 5), (2, 7), (3, 6), (3, 9), (1, 5)]) == {0, 2, 4, 5}
    assert pareto_front([]) == set()


def cell(hit: bool, held: int, same: bool = True, divergences: tuple[float, ...] = (0.0,)) -> PackedCell:
    return PackedCell(
        text="x", point=(1, 2), hit=hit, distance=5, rows=1, bytes=held, same=same, divergences=divergences
    )


def records_of(*cells: Mapping[str, Mapping[str, PackedCell]]) -> Iterator[PackedRecord]:
    for number, each in enumerate(cells):
        yield PackedRecord(
            id=str(number),
            task="icon",
            group=str(number),
            frames=1,
            size=(30, 40),
            prompt_rows=10,
            full_bytes=100,
            cells={row: dict(by_budget) for row, by_budget in each.items()},
        )


def test_figures_by_hand() -> None:
    records = list(
        records_of(
            {FULL: {"1": cell(True, 100)}, "int8": {"1": cell(True, 20, divergences=(0.1, 0.3))}},
            {FULL: {"1": cell(True, 100)}, "int8": {"1": cell(False, 30, False, (0.5,))}},
        )
    )
    whole, quantized = packed_figures("click", records)
    assert (whole.packing, quantized.packing) == (EVICTED, "int8")
    assert (whole.plain.accuracy, quantized.plain.accuracy) == (1, 0.5)
    assert (whole.on_front, quantized.on_front) == (True, True)
    assert (quantized.plain.bytes_mean, quantized.plain.bytes_share, quantized.same) == (25, 0.25, 0.5)
    assert quantized.kl_mean == pytest.approx(0.3)
    assert quantized.kl_p95 == pytest.approx(0.48)
    assert quantized.against_full is not None
    assert quantized.against_full.difference == -0.5
    assert whole.against_full is None
    assert whole.added is None
    assert quantized.added is not None
    assert quantized.added.difference == -0.5
    assert (quantized.added.low, quantized.added.high) == (-1, 0)


def test_unknown_packings_are_refused() -> None:
    assert list(chosen_packings(["int4", "int8"])) == ["int8", "int4"]
    with pytest.raises(UsageError, match="unknown packing 'int5'; known: int8, int4, r100-int8"):
        chosen_packings(["int5"])
