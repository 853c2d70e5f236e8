# SPDX-License-Identifier: Apache-2.0
"""What an agent acts in: anything that can be looked at and acted on."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from starkv.errors import StarkvError, UsageError
from starkv.runtime.actions.types import Action


class UnsupportedActionError(StarkvError):
    """An environment has no such action. The agent goes on: it will see that nothing happened."""


@dataclass(frozen=True)
class EnvironmentOptions:
    """What the user said about the environment; each takes what it needs."""

    goal: str | None = None
    """What the agent is to do, if the user says so."""
    url: str | None = None
    """Page to begin with."""
    seed: int = 0
    """Of everything that is random in it."""


@runtime_checkable
class Environment(Protocol):
    """The world of an agent. Classes that derive from it write ``screenshot`` and ``perform`` only."""

    goal: str | None = None
    """What is to be done, where the environment sets that itself."""

    def screenshot(self) -> Image.Image:
        """The screen as it is now."""
        ...

    def perform(self, action: Action) -> None:
        """Carry out an action whose places are pixels of the last screenshot.

        ``Finished`` and ``CallUser`` never come here; a ``Wait`` does.

        Raises:
            UnsupportedActionError: there is no such action here.
        """
        ...

    def acted_on(self, screenshot: Image.Image, action: Action) -> Image.Image | None:
        """``screenshot`` with what ``action``, which comes next, acts on marked.

        For prompts that tell of earlier steps in pictures only. None: the loop marks the place itself.
        """
        return None

    def done(self) -> bool:
        """Whether there is nothing more to do, well or badly."""
        return False

    def succeeded(self) -> bool | None:
        """Whether the goal is reached; None where the environment can't tell."""
        return None

    def close(self) -> None:
        """Give back what it holds; called once, at the end."""


ENVIRONMENTS: Mapping[str, str] = {
    "desktop": "starkv.runtime.agents.desktop:DesktopEnvironment",
    "browser": "starkv.runtime.agents.browser:BrowserEnvironment",
}
"""Name → where its class is."""


def open_environment(name: str, options: EnvironmentOptions) -> Environment:
    """Make an environment.

    Args:
        name: one of ``ENVIRONMENTS``, or ``module:Class`` of a class that is called with ``options``.
        options: what it is to be.

    Raises:
        UsageError: there is no such class, it is no environment, or it can't be what ``options`` ask for.
    """
    module_name, colon, class_name = ENVIRONMENTS.get(name, name).partition(":")
    if not (colon and module_name and class_name):
        raise UsageError(
            f"unknown environment {name!r}; known: {', '.join(ENVIRONMENTS)}, or module:Class of your own"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"environment {name}: there is no module {error.name}; install it, or start where it lies"
        ) from None
    made_by = getattr(module, class_name, None)
    if not callable(made_by):
        raise UsageError(f"environment {name}: {module_name} has no class {class_name}")
    environment: object = made_by(options)
    if not isinstance(environment, Environment):
        needed = ("screenshot", "perform", "acted_on", "done", "succeeded", "close", "goal")
        missing = ", ".join(part for part in needed if not hasattr(environment, part))
        raise UsageError(
            f"environment {name} lacks {missing}; derive {class_name} from "
            "starkv.runtime.agents.environment.Environment"
        )
    return environment
