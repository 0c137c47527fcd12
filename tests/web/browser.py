"""The system's own Chromium, where there is one."""

from __future__ import annotations

import os
import shutil

import pytest
from playwright.async_api import Page

REQUIRED = "AEL_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = f"no browser: none of {', '.join(NAMES)} is installed"
"""How the reason begins; the summary of a run tells it apart from others by that."""


def installed() -> str | None:
    """Return where Chromium is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def chromium() -> str:
    """Return where Chromium is. Without it the test is skipped, and fails where AEL_TEST_BROWSER is `required`."""
    path = installed()
    if path is None:
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"{NO_BROWSER}, and {REQUIRED} requires one", pytrace=False)
        pytest.skip(NO_BROWSER)
    return path


async def overflow(page: Page) -> list[str]:
    """Return what reaches over the right edge of a page that can be scrolled sideways; empty where all is well."""
    found: list[str] = await page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            return [...document.querySelectorAll("body *")]
                .filter((element) => element.getBoundingClientRect().right > width + 1)
                .map((element) => `${element.tagName}#${element.id}.${element.className}: ${element.textContent.trim().slice(0, 40)}`)
                .slice(-5);
        }"""  # noqa: E501
    )
    return found
