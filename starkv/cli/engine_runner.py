# SPDX-License-Identifier: Apache-2.0
"""Engines under Polygraphy: it opens one after the other and runs each on the same cases."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.cli.engine_outputs import Outputs
from starkv.errors import UsageError

Run = Callable[[int], Outputs]
"""Outputs of an engine on a case."""
_CASE = "case"


@dataclass(frozen=True)
class Contestant:
    """An engine that is compared."""

    name: str
    open: Callable[[], AbstractContextManager[Run]]
    """Opens it; what it holds is given back after the block."""


def run_engines(
    contestants: Sequence[Contestant], cases: int, save: Path | None = None
) -> list[list[Outputs]]:
    """Run engines one after the other, so that only one of them holds memory.

    Args:
        contestants: the reference goes first.
        cases: how many.
        save: file for Polygraphy's results, which ``polygraphy inspect data`` reads.

    Returns:
        outputs of each engine for each case.

    Raises:
        UsageError: Polygraphy is not installed.
        StarkvError: an engine can't be opened or run.
    """
    try:
        from polygraphy.comparator import Comparator
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise UsageError(
            "comparing engines needs the package polygraphy; `pip install polygraphy`, or `starkv[trt]`"
        ) from None
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    feeds = [{_CASE: np.array([case])} for case in range(cases)]
    results = Comparator.run([_runner(each) for each in contestants], data_loader=feeds)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        results.save(str(save))
    return [[dict(results[each.name][case].items()) for case in range(cases)] for each in contestants]


def _runner(contestant: Contestant) -> Any:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class EngineRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self._opened = ExitStack()
            self._run = self._opened.enter_context(contestant.open())

        def deactivate_impl(self) -> None:
            self._opened.close()
            # An engine is as long-lived as what refers to it.
            del self._run

        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add(_CASE, np.int64, (1,))

        def infer_impl(self, feed_dict: dict[str, NDArray[np.int64]]) -> "OrderedDict[str, NDArray[Any]]":
            self.inference_time = 0.0
            return OrderedDict(self._run(int(feed_dict[_CASE][0])))

    return EngineRunner(name=contestant.name)
