# SPDX-License-Identifier: Apache-2.0
"""Keys as models name them → as Playwright does."""

from collections.abc import Iterable, Mapping

from starkv.runtime.agents.environment import UnsupportedActionError

_NAMES: Mapping[str, str] = {
    "alt": "Alt",
    "option": "Alt",
    "backspace": "Backspace",
    "capslock": "CapsLock",
    "cmd": "Meta",
    "command": "Meta",
    "meta": "Meta",
    "super": "Meta",
    "win": "Meta",
    "winleft": "Meta",
    "ctrl": "Control",
    "control": "Control",
    "ctrlleft": "Control",
    "del": "Delete",
    "delete": "Delete",
    "down": "ArrowDown",
    "left": "ArrowLeft",
    "right": "ArrowRight",
    "up": "ArrowUp",
    "end": "End",
    "enter": "Enter",
    "return": "Enter",
    "esc": "Escape",
    "escape": "Escape",
    "home": "Home",
    "insert": "Insert",
    "pagedown": "PageDown",
    "page_down": "PageDown",
    "pgdn": "PageDown",
    "pageup": "PageUp",
    "page_up": "PageUp",
    "pgup": "PageUp",
    "shift": "Shift",
    "shiftleft": "Shift",
    "space": "Space",
    "tab": "Tab",
    "plus": "+",
    "minus": "-",
    **{f"f{number}": f"F{number}" for number in range(1, 13)},
}


def playwright_key(key: str) -> str:
    """One key.

    Raises:
        UnsupportedActionError: no browser has it.
    """
    if len(key) == 1:
        return "Space" if key == " " else key
    known = _NAMES.get(key.lower())
    if known is None:
        raise UnsupportedActionError(f"a browser has no key {key!r}")
    return known


def playwright_combination(keys: Iterable[str]) -> str:
    """Keys pressed together, such as ``Control+c``.

    Raises:
        UnsupportedActionError: no browser has one of them.
    """
    return "+".join(playwright_key(key) for key in keys)
