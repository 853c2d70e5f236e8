# SPDX-License-Identifier: Apache-2.0
"""Whether TensorRT will read a graph, found out without TensorRT.

Rules of the ONNX parser and of strongly typed networks, each with its source. Files of onnx-tensorrt are
those of release 10.1, unless a version is given.
"""

from pathlib import Path

import onnx

from starkv.errors import StarkvError
from starkv.export.lower.trt_graph_rules import GRAPH_RULES
from starkv.export.lower.trt_node_rules import NODE_RULES
from starkv.export.lower.trt_plugin_rules import PLUGIN_RULES
from starkv.export.lower.trt_quantization_rules import QUANTIZATION_RULES
from starkv.export.lower.trt_rule import RuleContext, Violation
from starkv.trt_compat.version import TensorRTVersion

RULES = (*GRAPH_RULES, *NODE_RULES, *PLUGIN_RULES, *QUANTIZATION_RULES)
_SHOWN = 5


class LoweringError(StarkvError):
    """A graph breaks rules of TensorRT's parser: starkv's lowering, or an operator that it doesn't know."""

    def __init__(self, path: Path, target: TensorRTVersion, violations: list[Violation]) -> None:
        shown = "; ".join(str(violation) for violation in violations[:_SHOWN])
        more = len(violations) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        super().__init__(f"{path.name} can't be parsed by TensorRT {target}: {shown}{rest}")
        self.violations = tuple(violations)


def check_trt_graph(path: Path, target: TensorRTVersion) -> list[Violation]:
    """All rules that a graph breaks.

    Args:
        path: the graph; its weights may lie in a data file beside it.
        target: TensorRT that is to parse it.
    """
    context = RuleContext.of(onnx.load(path, load_external_data=False), path.parent, target)
    return [violation for rule in RULES for violation in rule.check(context)]


def require_valid(path: Path, target: TensorRTVersion) -> None:
    """Refuse a graph that breaks a rule.

    Raises:
        LoweringError: names nodes, rules and version.
    """
    if violations := check_trt_graph(path, target):
        raise LoweringError(path, target, violations)
