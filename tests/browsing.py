"""A real browser for tests: Chromium, driven by Playwright. Whoever lacks one gets the reason.

As a program it fails, with the reason, where there is none.
"""

import contextlib
import os
import shutil
import sys

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def missing() -> str:
    """Why no browser can be driven here; "" where one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install -e '.[test]'"
    if executable() is None:
        return "no Chromium: install Debian's chromium-headless-shell, or set CHROMIUM to one"
    return ""


def executable() -> str | None:
    """The path of Chromium: of the variable CHROMIUM, or of the first name that is on PATH."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium():
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable())
        yield browser
        browser.close()


if __name__ == "__main__":
    sys.exit(missing() or 0)
