# SPDX-License-Identifier: Apache-2.0
"""Sessions between their turns: parked in host memory, the one that waited longest given up first."""

from collections import OrderedDict
from dataclasses import replace

from starkv.runtime.stream import StreamState


class ParkedSessions:
    """States of streams by session id.

    Args:
        most_bytes: of rows that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._states: OrderedDict[str, StreamState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in list(self._states.values()))

    def get(self, session_id: str) -> StreamState | None:
        """The state of a session, if it is still there."""
        return self._states.get(session_id)

    def keep(self, session_id: str, state: StreamState) -> None:
        """Park a session's state. One that is larger than all memory goes without the rows that wait; if that
        is still too large it is not kept: its next turn prefills the whole conversation."""
        if state.nbytes > self._most_bytes:
            state = replace(state, waiting=None)
        self._states[session_id] = state
        self._states.move_to_end(session_id)
        while self._states and self.nbytes > self._most_bytes:
            self._states.popitem(last=False)
