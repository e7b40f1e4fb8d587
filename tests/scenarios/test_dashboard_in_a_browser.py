"""The dashboard in a real browser, of a real broker whose workers are processes: one of them is killed.

Needs Chromium on this machine (`apt install chromium`) and the extra `browser`; `make test-extras` brings the latter.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`: playwright")
pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra `browser`: axe")
pytest.importorskip("uvicorn", reason="needs the extra `dashboard`: starlette and uvicorn")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from distgrad.seeing.dashboard_server import DashboardServer
from distgrad_broker import Broker
from support.broker_process import wait_until
from support.processes import Process
from support.served_dashboard import served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt install chromium"),
    # Playwright's own loop is closed by the collector, after the test.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE_MS = 60_000
TRAINING = """
import sys
import numpy as np
from distgrad_worker import Worker

address, name = sys.argv[1:]
rng = np.random.default_rng(len(name))
with Worker(address, worker_id=name) as worker:
    while True:
        w = worker.pull().parameters["w"]
        gradient = 0.01 * w + rng.normal(0, 0.002, w.size)
        worker.push({"w": gradient.astype(np.float32)}, loss=float((w ** 2).mean()))
        worker.flush(30)
"""
# Where somebody wants the pictures of the documentation made anew.
PICTURES = os.environ.get("PICTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work as root, as whom CI runs.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    start = {"w": np.full(1000, 2.0, np.float32)}
    with Broker(parameters=start, data=tmp_path / "data", workers_silent_after=2.0) as running:
        yield running


@pytest.fixture
def training(tmp_path: Path) -> Path:
    (tmp_path / "training.py").write_text(TRAINING)
    return tmp_path


@pytest.fixture
def server(broker: Broker) -> Iterator[DashboardServer]:
    with served(broker.address, 0.2) as running:
        yield running


def worker(broker: Broker, name: str, folder: Path) -> Process:
    return Process(broker.address, name, program=(sys.executable, str(folder / "training.py")))


def opened(browser: Any, link: str, requests: list[str] | None = None, **options: Any) -> Any:
    """Open a link in a browser that knows nothing of others; every request and every complaint is noted."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE_MS)
    if requests is not None:
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: requests.append(f"error: {error}"))
        page.on("console", lambda message: requests.append(f"{message.type}: {message.text}"))
    page.goto(link)
    return page


def has_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector, has_text=text).first.wait_for()


def until(page: Any, expression: str) -> None:
    """Wait until it is true; Playwright's own waiting would need `eval`, which the page forbids."""
    wait_until(lambda: bool(page.evaluate(expression)))


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/dashboard-{name}.png", full_page=True)


def violations(page: Any) -> list[str]:
    """List what axe finds, of every weight."""
    return [f"{found['impact']}: {found['id']}" for found in Axe().run(page).response["violations"]]


def test_workers_appear_the_loss_falls_and_a_killed_one_is_lost(
    browser: Any, broker: Broker, server: DashboardServer, training: Path
) -> None:
    requests: list[str] = []
    page = opened(browser, server.link(server.tokens.watch), requests)
    has_text(page, "#no-workers", "No worker has come yet.")
    with worker(broker, "steady", training), worker(broker, "victim", training) as victim:
        has_text(page, "#rows tr:has-text('steady')", "live")
        has_text(page, "#rows tr:has-text('victim')", "live")
        until(page, "Number(document.querySelector('#chart-loss output').textContent) < 1")
        until(page, "document.querySelectorAll('#chart-staleness li').length > 0")
        assert "at first" in page.locator("#chart-loss svg").get_attribute("aria-label")

        victim.kill()
        has_text(page, "#rows tr:has-text('victim')", "▲ lost")
        has_text(page, "#rows tr:has-text('steady')", "live")
        has_text(page, "#numbers", "1 of 2")
        assert page.locator("#numbers div:has(dt:text-is('Lost')) dd").inner_text() == "0"

    assert {url for url in requests if not url.startswith(f"http://{server.address}/")} == set()
    assert "token" not in page.url
    page.context.close()


def test_only_the_link_that_controls_has_buttons_and_they_work(
    browser: Any, broker: Broker, server: DashboardServer, training: Path
) -> None:
    control = opened(browser, server.link(server.tokens.control or ""))
    watch = opened(browser, server.link(server.tokens.watch))
    with worker(broker, "a", training) as process:
        has_text(watch, "#rows", "live")
        assert not watch.locator("button:visible", has_text="Stop").count()
        assert not watch.locator("button:visible", has_text="Evict").count()
        refused = watch.evaluate(
            "() => fetch('api/stop', {method: 'POST', headers: "
            "{Authorization: 'Bearer ' + sessionStorage.token}}).then(answer => answer.status)"
        )
        assert refused == 403

        control.get_by_role("button", name="Stop").click()
        has_text(control, "#said", "stopped")
        has_text(watch, "#state", "■ stopped")
        control.get_by_role("button", name="Start").click()
        has_text(watch, "#state", "● running")
        control.get_by_role("button", name="Save checkpoint").click()
        has_text(control, "#said", "saved to ")

        control.get_by_role("button", name="Evict a").click()
        control.get_by_role("button", name="Keep it").click()
        has_text(control, "#rows", "live")
        control.get_by_role("button", name="Evict a").click()
        control.get_by_role("button", name="Evict", exact=True).last.click()
        has_text(control, "#said", "evicted a")
        has_text(watch, "#rows", "▲ lost")
        assert process.wait() != 0, "the process is told, and ends"
    control.context.close()
    watch.context.close()


def test_a_wrong_or_missing_token_shows_nothing(browser: Any, server: DashboardServer) -> None:
    for link in (f"http://{server.address}/", server.link("wrong")):
        page = opened(browser, link)
        has_text(page, "#trouble", "token is missing or wrong")
        assert page.locator("#rows tr").count() == 0
        page.context.close()


def test_the_table_sorts_by_keyboard_and_says_so(
    browser: Any, broker: Broker, server: DashboardServer, training: Path
) -> None:
    page = opened(browser, server.link(server.tokens.watch))
    with worker(broker, "w-2", training), worker(broker, "w-10", training):
        until(page, "document.querySelectorAll('#rows tr').length === 2")
        ids = page.locator("#rows th")
        assert ids.all_inner_texts() == ["w-2", "w-10"]

        page.get_by_role("button", name="Worker").focus()
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#columns th').getAttribute('aria-sort') === 'descending'")
        assert ids.all_inner_texts() == ["w-10", "w-2"]
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        until(page, "document.querySelector('#columns th:nth-child(2)').hasAttribute('aria-sort')")
    page.context.close()


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True},
}


def test_it_is_accessible_and_fits_in_light_dark_and_on_a_phone(
    browser: Any, broker: Broker, server: DashboardServer, training: Path
) -> None:
    with (
        worker(broker, "worker-0", training),
        worker(broker, "worker-1", training),
        worker(broker, "gone", training) as gone,
    ):
        page = opened(browser, server.link(server.tokens.watch))
        has_text(page, "#rows tr:has-text('gone')", "live")
        gone.kill()
        has_text(page, "#rows tr:has-text('gone')", "lost")
        page.context.close()
        for name, options in LOOKS.items():
            page = opened(browser, server.link(server.tokens.control or ""), **options)
            until(page, "document.querySelectorAll('#rows tr').length === 3")

            assert violations(page) == [], name
            wide = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert wide, f"{name}: the page itself never scrolls sideways"
            picture(page, name)
            page.get_by_role("button", name="Evict gone").click()
            assert violations(page) == [], f"{name}, with the question"
            page.context.close()
