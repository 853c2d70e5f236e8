# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from starkv.errors import CheckpointError


def read_json_object(path: Path, missing: str = "") -> dict[str, Any]:
    """Parse a file that holds one JSON object.

    Args:
        path: the file.
        missing: what its absence means, for the error; without it a missing file is empty.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    if not missing and not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {missing}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return parsed
