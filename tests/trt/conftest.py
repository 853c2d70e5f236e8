# SPDX-License-Identifier: Apache-2.0
"""What several tests of TensorRT start from."""

import pytest
from trt_engines import Exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """gui-tiny, exported once."""
    return Exports.make(tmp_path_factory.mktemp("gui-tiny"))
