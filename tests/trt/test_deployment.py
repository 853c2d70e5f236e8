# SPDX-License-Identifier: Apache-2.0
"""``starkv doctor --plan``, the documentation that shows what it prints, and the server's Dockerfile."""

import fnmatch
import json
import re
from pathlib import Path

import pytest
from command import Command
from conftest import TinyModel
from plan_blocks import DOCUMENT, blocks, renewed

from starkv.manifest import MANIFEST_NAME, TensorRTBuild, read_manifest, seal
from starkv.memory_plan.plan import CONTEXT_BYTES

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile.server"
MIB = 2**20


def plan(starkv: Command, *arguments: object) -> dict:
    outcome = starkv("doctor", "--plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_documentation_shows_what_the_command_prints(starkv: Command) -> None:
    """``python tests/trt/plan_blocks.py`` writes it anew."""
    text = DOCUMENT.read_text()
    assert len(blocks(text)) >= 4
    assert renewed(text, lambda arguments: starkv("doctor", *arguments).out) == text


@pytest.mark.parametrize("kv_quant", ["none", "int8", "int4"])
def test_a_plan_adds_up(starkv: Command, kv_quant: str) -> None:
    found = plan(starkv, "ui-tars-1.5-7b", "--kv-quant", kv_quant)
    assert found["quantization"] == "int4"
    assert found["kv_quant"] == kv_quant
    assert found["prompt_rows"] == 13_645
    assert [(one["budget"], one["sessions"]) for one in found["scenarios"]] == [
        (budget, sessions) for budget in (1.0, 0.2, 0.05) for sessions in (1, 8, 32)
    ]
    for one in found["scenarios"]:
        stages = one["scratch"]
        assert stages["shared"] == max(stages[name] for name in ("vision", "prefill", "decode", "compress"))
        assert one["slabs"] == one["sessions"] * one["slab"]
        parts = found["weights"]["device"], stages["shared"], found["arena"], one["slabs"], one["buffers"]
        assert one["total"] == sum(parts) + one["packing"] + CONTEXT_BYTES
        assert one["kept_rows"] + found["new_tokens"] <= one["slot_rows"]


def test_knobs_lower_what_they_say(starkv: Command) -> None:
    def total(*options: object) -> int:
        scenarios = plan(starkv, "ui-tars-1.5-7b", "--sessions", 4, *options)["scenarios"]
        return scenarios[0]["total"] if len(scenarios) == 1 else scenarios[-2]["total"]

    usual = total("--kv-budget", 0.2)
    assert total("--kv-budget", 0.1) < usual
    assert total("--kv-budget", 0.2, "--max-pixels", 2_109_744) < usual
    assert total("--kv-budget", 0.2, "--prompt-rows", 3000) < usual
    assert total("--kv-budget", 0.2, "--quant", "int8") > usual
    codes = [total("--kv-budget", 0.2, "--kv-quant", kept) for kept in ("int4", "int8", "none")]
    assert codes == sorted(codes)
    assert codes[-1] == usual
    small = "--kv-budget", 0.2, "--max-pixels", 2_109_744
    assert total(*small, "--prefill-rows", 8192) > total(*small, "--prefill-rows", 2048)


@pytest.mark.parametrize(("kv_quant", "row"), [("int8", 28 * (1024 + 12)), ("int4", 28 * (512 + 12))])
def test_a_plan_of_codes(starkv: Command, kv_quant: str, row: int) -> None:
    """A row is 28 layers of 4 heads' keys and values of 128 numbers, and their positions."""
    arguments = "ui-tars-1.5-7b", "--sessions", 8
    floats, codes = (plan(starkv, *arguments, "--kv-quant", kept) for kept in ("none", kv_quant))
    assert codes["arena"] == floats["arena"]
    for one, other in zip(codes["scenarios"], floats["scenarios"], strict=True):
        assert one["slot_rows"] == other["slot_rows"]
        assert one["slab"] == one["slot_rows"] * row
        # For each session and KV head three tables of 32,768 positions and 8 query heads.
        tables = 8 * 4 * 3 * 32_768 * 8 * 4
        assert one["scratch"]["decode"] - other["scratch"]["decode"] == pytest.approx(tables, rel=0.1)
        assert other["packing"] == other["staged"] == 0
    assert [one["staged"] > 0 for one in codes["scenarios"]] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plan", "ui-tars"), "did you mean"),
        (("--plan", "gui-tiny", "--quant", "int3"), "unknown quantization 'int3'"),
        (("--plan", "gui-tiny", "--kv-quant", "int2"), "unknown KV quantization 'int2'"),
        (("--plan", "gui-tiny", "--kv-budget", 2), "a KV budget is a share"),
        (("--plan", "gui-tiny", "--max-pixels", 10), "is 10, but gui-tiny takes 50176 to 250880"),
        (("--plan", "gui-tiny", "--prompt-rows", 4000), "more than gui-tiny's max_context of 4096"),
        (("--plan", "docs"), "docs is no engine directory"),
        (("--sessions", 3), "--sessions is about a memory plan; add --plan MODEL"),
        (("--kv-quant", "int8"), "--kv-quant is about a memory plan; add --plan MODEL"),
    ],
)
def test_bad_input(
    starkv: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], said: str
) -> None:
    monkeypatch.chdir(ROOT)
    outcome = starkv("doctor", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


BUILT = TensorRTBuild(
    version="10.3.0.26",
    cuda="12.6",
    gpu="Orin",
    compute_capability="8.7",
    hardware_compatibility="none",
    graphs={},
    prefill_rows=128,
    sessions=4,
    cache_rows=512,
    image_patches=256,
    stripped=False,
    weight_streaming=False,
    scratch_bytes={
        "vision": 3 * MIB,
        "decoder.prefill": 7 * MIB,
        "decoder.decode": 2 * MIB,
        "compress": MIB,
    },
    weight_bytes={"vision": 627_756, "decoder": 2_127_108, "compress": 0},
)


def test_an_engine_that_is_built_says_what_tensorrt_said(
    tiny: TinyModel, tmp_path: Path, starkv: Command
) -> None:
    manifest = read_manifest(tiny.engine).model_copy(
        update={"backend": "trt", "compute_dtype": "bfloat16", "tensorrt": BUILT}
    )
    (tmp_path / MANIFEST_NAME).write_text(seal(manifest))
    found = plan(starkv, tmp_path)
    assert found["weights"]["device"] == 627_756 + 2_127_108
    assert found["prefill_rows"] == 128
    assert {one["sessions"] for one in found["scenarios"]} == {1, 4}
    for one in found["scenarios"]:
        assert one["scratch"]["shared"] == 7 * MIB
        assert one["scratch"]["measured"]
    for option, value in (("--quant", "int4"), ("--prefill-rows", 64), ("--max-pixels", 5000)):
        assert "is built" in starkv("doctor", "--plan", tmp_path, option, value).err
    assert "built for 4 sessions, not 5" in starkv("doctor", "--plan", tmp_path, "--sessions", 5).err


def test_an_engine_that_is_built_says_what_rows_become(
    tiny: TinyModel, tmp_path: Path, starkv: Command
) -> None:
    built = BUILT.model_copy(update={"kv_bits": 4, "position_rows": 1000})
    manifest = read_manifest(tiny.engine).model_copy(
        update={"backend": "trt", "compute_dtype": "bfloat16", "tensorrt": built}
    )
    (tmp_path / MANIFEST_NAME).write_text(seal(manifest))
    found, text = plan(starkv, tmp_path), manifest.text
    assert found["kv_quant"] == "int4"
    # Both were built for four sessions and a thousand positions, however many answer.
    one, four = found["scenarios"][:2]
    assert one["packing"] == four["packing"]
    assert 0 < one["packing"] - 1000 * text.head_dim * 4 < 200_000
    for same_or_other in ("int4", "int8", "none"):
        assert "is built" in starkv("doctor", "--plan", tmp_path, "--kv-quant", same_or_other).err


def test_the_tables_say_what_rows_are_kept_as(starkv: Command) -> None:
    for kept, said in (("none", "kept rows are 16-bit floats."), ("int8", "kept rows are int8.")):
        tables = starkv("doctor", "--plan", "gui-tiny", "--kv-quant", kept).out
        assert said in tables.splitlines()[0]
        assert ("until they are codes" in tables) == (kept != "none")


def test_an_engine_for_onnx_runtime_is_planned_for_tensorrt(tiny: TinyModel, starkv: Command) -> None:
    found = plan(starkv, tiny.engine, "--sessions", 2, "--kv-quant", "int8")
    assert not found["scenarios"][0]["scratch"]["measured"]
    assert found["kv_quant"] == "int8"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.partition(" ")[::2] for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def arguments() -> dict[str, str]:
    """Defaults of the build's arguments."""
    pairs = (rest.partition("=")[::2] for name, rest in instructions() if name == "ARG")
    return {name: value.strip('"') for name, value in pairs}


def test_the_image_copies_what_exists_and_is_let_through() -> None:
    patterns = (DOCKERFILE.parent / f"{DOCKERFILE.name}.dockerignore").read_text().splitlines()
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and "--from=" not in rest:
            copied |= set(rest.split()[:-1])
    assert {"plugins_trt", "starkv", "pyproject.toml"} <= copied
    assert allowed == copied
    assert all((ROOT / source).exists() for source in copied)
    assert patterns[1] == "*"


def test_the_image_is_pinned_down() -> None:
    defaults = arguments()
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu22\.04", defaults["CUDA_IMAGE"])
    assert re.fullmatch(r"python:3\.\d+-slim-bookworm", defaults["PYTHON_IMAGE"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", defaults["TENSORRT_VERSION"])
    images = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert set(images) == {"${CUDA_IMAGE}", "${PYTHON_IMAGE}"}
    for name, rest in instructions():
        if name == "RUN" and "pip install" in rest:
            # starkv's own wheel is not downloaded.
            rest = re.sub(r'"\$\(ls [^"]*"', "", rest)
            wanted = re.search(r"pip install (?:--\S+ )*(.*?)(?: &&|$)", rest)
            assert wanted
            assert all("==" in package for package in wanted[1].split()), wanted[1]


def test_the_image_runs_as_somebody_without_privileges_and_holds_no_secrets() -> None:
    steps = instructions()
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert user not in ("root", "0")
    assert ("ENTRYPOINT", '["starkv"]') in steps
    text = DOCKERFILE.read_text().lower()
    assert not any(word in text for word in ("password", "secret", "token", "api_key", "hf_token"))
    assert not fnmatch.filter([rest for name, rest in steps if name == "COPY"], ". *")


def test_the_documentation_names_the_images_versions() -> None:
    text, defaults = DOCUMENT.read_text(), arguments()
    assert f"tensorrt=={defaults['TENSORRT_VERSION']}" in text
    assert f"cuda-bindings=={defaults['CUDA_BINDINGS']}" in text


def test_messages_of_the_documentation_are_the_codes() -> None:
    """Words between the placeholders, wherever the code breaks its lines."""
    source = " ".join(
        path.read_text()
        for folder in ("starkv/cli", "starkv/trt_compat", "export", "runtime/engines", "starkv")
        for path in sorted((ROOT / folder).glob("*.py" if folder == "starkv" else "**/*.py"))
    )
    joined = re.sub(r'"\s+f?"', "", source)
    table = DOCUMENT.read_text().partition("## Messages")[2]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall("`([^`]+)`", cell)]
    assert len(messages) > 15
    for message in messages:
        # What CUDA says itself stands behind the function's name.
        ours = message.replace("CUDA driver version is insufficient", "…")
        assert all(part.strip(" ,:") in joined for part in ours.split("…")), message
