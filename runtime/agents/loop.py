# SPDX-License-Identifier: Apache-2.0
"""The loop of an agent: look, ask, read, act, until something ends it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from PIL import Image

from starkv.errors import StarkvError, UsageError
from starkv.manifest import CoordinateConvention, PromptDialect
from starkv.runtime.actions.coordinates import on_screen
from starkv.runtime.actions.types import Action, CallUser, Finished
from starkv.runtime.agent import AgentReply
from starkv.runtime.agents.asking import Ask
from starkv.runtime.agents.environment import Environment, UnsupportedActionError
from starkv.runtime.agents.history import PastStep, prompt_of
from starkv.runtime.agents.repeats import Repeats
from starkv.runtime.agents.steps import Outcome, Reason, Rejected, Step
from starkv.runtime.drawing import draw_actions
from starkv.runtime.generation import SamplingParameters

OnStep = Callable[[Step, Image.Image | None], None]
"""Called with each step when it is over, and its screenshot if there was time for one."""


@dataclass(frozen=True)
class LoopSettings:
    """How an agent works."""

    dialect: PromptDialect
    """Words of the prompt."""
    coordinates: CoordinateConvention
    """Of the model."""
    steps: int = 15
    """Most of them."""
    seconds: float | None = None
    """No step begins after so much time; a reply that is on its way is waited for. None: no limit."""
    screenshots: int = 5
    """Most of them in a prompt; UI-TARS was trained with 5."""
    retries: int = 3
    """Times that the model is asked again where its reply is no action, or none worth another try."""
    retry_temperature: float = 1.0
    """Of the sampling then, because a greedy model would say the same again; never below the first one's."""
    repeats: int = 3
    """Times that the same actions may be tried on a screen that they don't change; 0: no limit."""
    parameters: SamplingParameters = field(default_factory=SamplingParameters)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("screenshots", 1), ("retries", 0), ("repeats", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"the time limit must be more than 0 seconds, not {self.seconds:g}")

    def sampling(self, attempt: int) -> SamplingParameters:
        """How the ``attempt``-th reply of a step is drawn, from 0."""
        if attempt == 0:
            return self.parameters
        # The next seed: the same one would draw the same words again.
        seed = None if self.parameters.seed is None else self.parameters.seed + attempt
        temperature = max(self.parameters.temperature, self.retry_temperature)
        return replace(self.parameters, temperature=temperature, seed=seed)


@dataclass(frozen=True)
class _End:
    reason: Reason
    message: str = ""
    error: str | None = None


class AgentLoop:
    """One run of an agent.

    Args:
        environment: what it acts in; whoever opened it closes it.
        ask: answers a prompt.
        goal: what the user wants.
        settings: limits and sampling.
        on_step: told of each step.
    """

    def __init__(
        self,
        environment: Environment,
        ask: Ask,
        goal: str,
        settings: LoopSettings,
        on_step: OnStep = lambda step, screenshot: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environment, self._ask, self._goal = environment, ask, goal
        self._settings, self._on_step, self._clock = settings, on_step, clock
        self._past: list[PastStep] = []
        self._repeats = Repeats(settings.repeats)
        self._started = clock()

    def run(self) -> Outcome:
        """Work until something ends it; Ctrl-C does, cleanly. Errors of the user's making end it, too."""
        self._started = self._clock()
        number = 0
        end = _End("steps")
        try:
            while True:
                if self._environment.done():
                    end = _End("done")
                elif self._out_of_time():
                    end = _End("time")
                elif number < self._settings.steps:
                    number += 1
                    ended = self._recorded_step(number)
                    if ended is None:
                        continue
                    end = ended
                break
        except KeyboardInterrupt:
            end = _End("interrupted")
        seconds = self._clock() - self._started
        success = self._environment.succeeded()
        return Outcome(end.reason, success, number, seconds, end.message, end.error)

    def _recorded_step(self, number: int) -> _End | None:
        """Take a step and tell of it, however it ends."""
        step = Step(number)
        seen: list[Image.Image] = []
        try:
            return self._step(step, seen)
        except KeyboardInterrupt:
            step.error = "interrupted"
            raise
        except StarkvError as error:
            step.error = str(error)
            return _End("error", error=str(error))
        except Exception as error:
            step.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._on_step(step, seen[0] if seen else None)

    def _step(self, step: Step, seen: list[Image.Image]) -> _End | None:
        with _measured(step, "screenshot_ms"):
            screenshot = self._environment.screenshot().convert("RGB")
        seen.append(screenshot)
        step.screenshot_wh = screenshot.size
        self._repeats.look(screenshot)
        step.unchanged = self._repeats.unchanged
        reply = self._asked(step, screenshot)
        if isinstance(reply, _End):
            return reply
        self._repeats.tried(reply.actions)
        marked: Image.Image | None = None
        end: _End | None = None
        with _measured(step, "perform_ms"):
            for number, action in enumerate(reply.actions):
                if isinstance(action, Finished | CallUser):
                    step.performed += 1
                    end = _End("finished" if isinstance(action, Finished) else "call_user", action.content)
                    break
                placed = on_screen(action, reply.resized, reply.original, self._settings.coordinates)
                if number == 0:
                    marked = self._environment.acted_on(screenshot, placed)
                if not self._perform(step, placed) or self._environment.done() or self._out_of_time():
                    break
        marked = marked or draw_actions(screenshot, reply.action_json)
        self._past.append(PastStep(screenshot, marked, reply.text))
        # Only the last ones are ever shown again; a long run must not hold all of its screens.
        self._forget_screens()
        return end

    def _asked(self, step: Step, screenshot: Image.Image) -> AgentReply | _End:
        """Ask until the reply is an action worth trying, or the retries or the time are used up."""
        settings = self._settings
        messages, images = prompt_of(
            self._goal, self._past, screenshot, settings.screenshots, settings.dialect
        )
        for attempt in range(settings.retries + 1):
            step.retries = attempt
            with _measured(step, "ask_ms"):
                reply = self._ask(messages, images, settings.sampling(attempt))
            step.text, step.thought = reply.text, reply.thought
            step.actions = [dict(action) for action in reply.action_json]
            step.timings = asdict(reply.timings)
            useless = None if reply.error else self._repeats.useless(reply.actions)
            if reply.error:
                step.error = str(reply.error)
                step.rejected.append(Rejected(reply.text, reply.error.reason))
            elif useless:
                step.error = useless
                step.rejected.append(Rejected(reply.text, useless))
            else:
                step.error = None
                return reply
            if self._out_of_time():
                return _End("time")
        return _End("stuck" if useless else "unreadable", error=step.error)

    def _perform(self, step: Step, action: Action) -> bool:
        """Carry an action out; False if the environment has no such action."""
        try:
            self._environment.perform(action)
        except UnsupportedActionError as error:
            step.error = str(error)
            return False
        step.performed += 1
        return True

    def _out_of_time(self) -> bool:
        limit = self._settings.seconds
        return limit is not None and self._clock() - self._started >= limit

    def _forget_screens(self) -> None:
        hidden = len(self._past) - self._settings.screenshots + 1
        if hidden > 0:
            blank = Image.new("RGB", (1, 1))
            old = self._past[hidden - 1]
            self._past[hidden - 1] = replace(old, screenshot=blank, marked=blank)


@contextmanager
def _measured(step: Step, field_name: Literal["screenshot_ms", "ask_ms", "perform_ms"]) -> Iterator[None]:
    """Add the block's wall time to a field of the step."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(step, field_name, getattr(step, field_name) + (time.perf_counter() - started) * 1e3)
