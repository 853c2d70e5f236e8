# SPDX-License-Identifier: Apache-2.0
"""The environment ``browser``: a page in Chromium, driven by Playwright."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

from PIL import Image

from starkv.errors import UsageError
from starkv.runtime.actions.types import Action
from starkv.runtime.agents.browser_page import Page, perform_on
from starkv.runtime.agents.environment import Environment, EnvironmentOptions, UnsupportedActionError
from starkv.runtime.preprocess.image import load_image

if TYPE_CHECKING:
    from playwright.sync_api import Page as PlaywrightPage

VIEWPORT = (1280, 800)
"""Width and height in pixels. One CSS pixel is one pixel of the screenshot."""
SETTLE_MS = 500
"""How long a page gets to show what an action did."""
_INSTALL = "pip install 'starkv[browser]' && playwright install chromium"
_SCHEMES = ("http://", "https://", "file://", "data:", "about:")


class BrowserError(UsageError):
    """The browser can't be started, or a page can't be opened."""


class BrowserEnvironment(Environment):
    """A page in a fresh Chromium without a window; links that open a new tab are followed into it.

    Args:
        options: the page to begin with.

    Raises:
        BrowserError: Playwright or its Chromium is not installed, or the page can't be opened.
    """

    def __init__(self, options: EnvironmentOptions) -> None:
        self._home = checked_url(options.url)
        self._resources = ExitStack()
        self._pages: list[Page] = []
        with ExitStack() as started:
            self._pages.append(started.enter_context(_chromium_page(self._opened)))
            with _failing(f"can't open {self._home}", BrowserError):
                self._page.goto(self._home)
            self._resources = started.pop_all()

    @property
    def _page(self) -> Page:
        return self._pages[-1]

    def _opened(self, page: "PlaywrightPage") -> None:
        """A new tab is what is acted on, until it is closed."""
        # Playwright's own page takes more than ours needs.
        tab = cast(Page, page)
        self._pages.append(tab)
        page.on("close", lambda _: self._pages.remove(tab))

    def screenshot(self) -> Image.Image:
        with _failing("no screenshot", BrowserError):
            return load_image(self._page.screenshot())

    def perform(self, action: Action) -> None:
        with _failing(type(action).__name__, UnsupportedActionError):
            perform_on(self._page, action, VIEWPORT, self._home)
            self._page.wait_for_timeout(SETTLE_MS)

    def close(self) -> None:
        self._resources.close()


def checked_url(url: str | None) -> str:
    """The address of a page.

    Raises:
        UsageError: there is none, or it is incomplete.
    """
    if not url:
        raise UsageError("the browser needs a page to begin with: --url https://…")
    if not url.startswith(_SCHEMES):
        raise UsageError(f"--url {url} has no scheme; write https://{url}, or file:///… for a file")
    return url


@contextmanager
def _chromium_page(on_tab: Callable[["PlaywrightPage"], None]) -> Iterator[Page]:
    """A page of a fresh Chromium, closed with it."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise BrowserError(f"the browser environment needs Playwright: {_INSTALL}") from None
    with sync_playwright() as playwright:
        with _failing(f"Chromium can't be started; if it is not installed: {_INSTALL}", BrowserError):
            browser = playwright.chromium.launch()
        width, height = VIEWPORT
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
        page.context.on("page", on_tab)
        try:
            yield cast(Page, page)
        finally:
            browser.close()


@contextmanager
def _failing(what: str, raised: type[BrowserError] | type[UnsupportedActionError]) -> Iterator[None]:
    """Turn Playwright's errors into ours, with their first line."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("playwright."):
            raise
        raise raised(f"{what}: {str(error).strip().splitlines()[0]}") from None
