# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake parser, broken on purpose."""

from pathlib import Path

import onnx
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import ATTENDING_SHAPES, FLOAT, Small, attending, save, trt, value


def test_a_network_must_be_strongly_typed(state: State) -> None:
    with pytest.raises(MisuseError, match="strongly typed"):
        trt().Builder(trt().Logger()).create_network(0)


def test_strong_typing_is_another_bit_in_11(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, number in (("10.16.1.11", 1), ("11.1.0.106", 0)):
        install(monkeypatch, version, FakeCuda())
        flag = trt().NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert int(flag) == number
        assert trt().Builder(trt().Logger()).create_network(1 << int(flag)).get_flag(flag)


def test_plugins_come_before_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = install(monkeypatch, cuda=FakeCuda())
    small = Small(attending(tmp_path / "a.onnx"), ATTENDING_SHAPES, state.cuda.new_stream(), state.cuda)
    with pytest.raises(ValueError, match="Plugin not found"):
        small.build()


@pytest.mark.parametrize("wrong", [{"plugin_version": "2"}, {"plugin_namespace": "starkv"}])
def test_a_plugin_is_named_in_full(state: State, tmp_path: Path, wrong: dict[str, str]) -> None:
    small = Small(attending(tmp_path / "a.onnx", **wrong), ATTENDING_SHAPES, 1, state.cuda)
    with pytest.raises(ValueError, match="Plugin not found"):
        small.build()


def test_a_plugin_may_not_have_a_standard_operators_name(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Compress", ["x", "x"], ["y"], name="c", domain="ai.starkv")
    graph = save(tmp_path / "c.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)])
    with pytest.raises(ValueError, match="No importer"):
        Small(graph, {}, 1, state.cuda).build()


def test_operators_have_a_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], name="n")
    inputs = [value("x", FLOAT, 2, 4), value("w", FLOAT, 4)]
    graph = save(tmp_path / "n.onnx", [node], inputs, [value("y", FLOAT, 2, 4)], opset=21)
    for version, known in (("10.3.0.26", False), ("10.13.3.9", False), ("10.16.1.11", True)):
        state = install(monkeypatch, version, FakeCuda())
        network = trt().Builder(trt().Logger()).create_network(2)
        parser = trt().OnnxParser(network, trt().Logger())
        assert parser.parse_from_file(str(graph)) == known
        assert parser.supports_operator("RMSNormalization") == known
        assert parser.num_errors == (0 if known else 1)
        if not known:
            error = parser.get_error(0)
            assert (error.node_name(), error.node_operator(), error.node()) == ("n", "RMSNormalization", 0)
        assert state.builds == []


def test_a_network_takes_one_model(times: Small) -> None:
    logger = trt().Logger()
    parser = trt().OnnxParser(trt().Builder(logger).create_network(2), logger)
    assert parser.parse_from_file(str(times.graph))
    assert not parser.parse_from_file(str(times.graph))
    assert "not empty" in logger._lines[-1]
    parser.clear_errors()
    assert parser.num_errors == 0


def with_function(path: Path) -> Path:
    model = onnx.load(path)
    body = helper.make_node("Identity", ["q"], ["out"])
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("ai.starkv", "KVAttention", ["q"], ["out"], [body], opsets))
    onnx.save(model, path)
    return path


def test_a_function_hides_the_plugin_of_its_name(state: State, tmp_path: Path) -> None:
    path = with_function(attending(tmp_path / "a.onnx"))
    with pytest.raises(ValueError, match="hides the plugin"):
        Small(path, ATTENDING_SHAPES, 1, state.cuda).build()


def test_opsets_end_somewhere(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Sqrt", ["x"], ["y"], name="s")
    graph = save(tmp_path / "s.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)], opset=23)
    with pytest.raises(ValueError, match="newer than 21"):
        Small(graph, {}, 1, state.cuda).build()


def test_int8_is_no_type_of_an_input(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="i")
    kinds = [value(name, onnx.TensorProto.INT8, 4) for name in "xy"]
    with pytest.raises(ValueError, match="unsupported type int8"):
        Small(save(tmp_path / "i.onnx", [node], kinds[:1], kinds[1:]), {}, 1, state.cuda).build()


def test_what_is_no_file_or_no_graph_is_reported(times: Small, tmp_path: Path) -> None:
    for content, reason in ((None, "Failed to open"), (b"no graph", "Failed to parse")):
        path = tmp_path / "wrong.onnx"
        if content:
            path.write_bytes(content)
        times.graph = path
        with pytest.raises(ValueError, match=reason):
            times.build()
    with pytest.raises(TypeError, match="not str"):
        trt().OnnxParser(trt().Builder(times.logger).create_network(2), times.logger).parse_from_file(path)


def test_weights_lie_beside_the_graph(times: Small) -> None:
    model = onnx.load(times.graph)
    (weight,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(weight, "missing.data", 0, 16)
    weight.ClearField("raw_data")
    onnx.save(model, times.graph)
    with pytest.raises(ValueError, match="Failed to load weights"):
        times.build()
