# SPDX-License-Identifier: Apache-2.0
"""Which KV policy a user gets who asks for none, for all, or for some."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from command import Command
from conftest import ChatModel

from starkv.cli.kv import KvOptions, kv_policy
from starkv.errors import UsageError
from starkv.manifest import MANIFEST_NAME, read_manifest, seal
from starkv.methods.budget import Budget
from starkv.runtime.agent import Agent, default_policy
from starkv.runtime.kv.policy import KvPolicy

PROMPT = ("--prompt", "click the red star", "--json")


@pytest.fixture(scope="module")
def frugal(reciting: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of ``reciting``, but its model is said to do with 60 % of the cache."""
    engine = tmp_path_factory.mktemp("frugal") / "engine"
    shutil.copytree(reciting.engine, engine)
    manifest = read_manifest(engine).model_copy(update={"kv_budget": 0.6})
    (engine / MANIFEST_NAME).write_text(seal(manifest))
    return engine


@pytest.mark.parametrize(
    ("options", "kept", "noted"),
    [
        ((), 31, True),
        (("--kv-budget", 1), 52, False),
        (("--kv-method", "full"), 52, False),
        (("--kv-budget", 0.8), 41, False),
        (("--kv-capacity", 40), 40, False),
        (("--kv-method", "snapkv", "--kv-budget", 0.8), 41, False),
        (("--kv-mode", "official"), 31, True),
    ],
)
def test_run_uses_the_engines_default(
    starkv: Command, frugal: Path, screenshot: Path, options: tuple[object, ...], kept: int, noted: bool
) -> None:
    ran = starkv("run", "--engine", frugal, "--image", screenshot, *PROMPT, *options)
    assert ran.code == 0, ran.err
    timings = json.loads(ran.out)["timings"]
    assert (timings["kv_tokens_full"], timings["kv_tokens_kept"]) == (52, kept)
    assert ("keeps 60% of a prompt's KV rows by default; --kv-budget 1 keeps all" in ran.err) == noted


def test_an_engine_that_keeps_all_says_nothing(
    starkv: Command, reciting: ChatModel, screenshot: Path
) -> None:
    ran = starkv("run", "--engine", reciting.engine, "--image", screenshot, *PROMPT)
    assert json.loads(ran.out)["timings"]["kv_tokens_kept"] == 52
    assert "by default" not in ran.err


def test_chat_uses_the_engines_default(
    starkv: Command, frugal: Path, screenshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("click\n"))
    talked = starkv("chat", "--engine", frugal, "--image", screenshot)
    assert talked.code == 0, talked.err
    assert talked.err.count("--kv-budget 1 keeps all") == 1
    counted = re.search(r"KV (\d+) of (\d+) rows", talked.err)
    assert counted
    assert int(counted[1]) == int(0.6 * int(counted[2]))


def test_the_agent_uses_the_engines_default(frugal: Path, screenshot: Path) -> None:
    agent = Agent.load(frugal)
    assert agent.act(screenshot, "click the red star").timings.kv_tokens_kept == 31
    assert agent.act(screenshot, "click the red star", kv_policy=KvPolicy()).timings.kv_tokens_kept == 52


def test_bench_measures_the_full_cache_unless_told(starkv: Command, frugal: Path) -> None:
    bench = ("bench", "--engine", frugal, "-p", 16, "-n", 2, "-d", 0, "-r", 1, "--threads", 1, "-o", "json")
    measured = starkv(*bench)
    assert measured.code == 0, measured.err
    assert "by default" not in measured.err
    assert json.loads(measured.out)["kv_method"] == "full"


def test_policies_of_the_options() -> None:
    assert kv_policy(None, None, None) == kv_policy(None, 1.0, None) == KvPolicy()
    assert kv_policy(None, 0.5, None).method == "star_kv"
    assert kv_policy(None, None, 100).budget == Budget(1.0, 100)
    # A method that is named is run, be it to measure what choosing everything costs.
    assert kv_policy("star_kv", 1.0, None).method == "star_kv"
    with pytest.raises(UsageError, match="needs a budget"):
        KvOptions("star_kv", None, None, "native")
    with pytest.raises(UsageError):
        KvOptions(None, None, None, "fast")


def test_default_of_a_manifest(reciting: ChatModel) -> None:
    manifest = read_manifest(reciting.engine)
    assert default_policy(manifest) == KvPolicy()
    limited = default_policy(manifest.model_copy(update={"kv_budget": 0.4}))
    assert (limited.method, limited.budget) == ("star_kv", Budget(0.4))
