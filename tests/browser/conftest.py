"""One JupyterLab and one Chromium for all browser tests."""

from __future__ import annotations

import functools
import importlib.util
import shutil

import pytest

_NEEDED = "the browser tests need Chromium: apt-get install chromium."
collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_*.py"]  # of the extra `browser`


def pytest_collection_modifyitems(items):
    """All tests here are browser tests."""
    for item in items:
        if "browser" in item.path.parts:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.exit(_NEEDED, returncode=1)
    from playwright.sync_api import expect, sync_playwright
    from sheets import WITHIN_MS, launch

    expect.set_options(timeout=WITHIN_MS)

    with sync_playwright() as playwright:
        browser = launch(playwright, executable)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser):
    """JupyterLab with its usual settings."""
    from sheets import Lab

    server = Lab(tmp_path_factory.mktemp("lab"), {})
    yield server
    server.close()


@pytest.fixture(scope="session")
def deaf_lab(tmp_path_factory, browser):
    """JupyterLab that keeps messages to widgets back while a cell runs, as older ones do."""
    from sheets import Lab

    server = Lab(tmp_path_factory.mktemp("lab"), {"kernels-settings": {"commsOverSubshells": "disabled"}})
    yield server
    server.close()


@pytest.fixture
def open_notebook(browser, lab):
    """``with open_notebook(name, *cells) as sheet``."""
    from sheets import opened

    return functools.partial(opened, browser, lab)
