"""The page in a headless Chromium: a picture, two questions by keyboard, and nothing that leaves the host."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mpa_edge.runtime.bundle_vlm import BundleVlm

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if not program and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium; playwright install chromium brings one")
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def file(tmp_path: Path, picture: Callable[..., Any]) -> Path:
    picture(90, 70, 3).save(tmp_path / "sign.png")
    return tmp_path / "sign.png"


class Seen:
    """A tab, with all that it asked for and complained about."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.tab = browser.new_context(**options).new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(address)

    def ask(self, question: str) -> str:
        """The last answer's text."""
        self.tab.keyboard.type(question)
        self.tab.keyboard.press("Enter")
        self.tab.wait_for_selector(".busy", state="detached")
        return str(self.tab.locator(".answer").last.inner_text())


def test_a_picture_two_questions_and_what_they_took(
    browser: Any, vlm: BundleVlm, file: Path, running: Callable[..., Any]
) -> None:
    with running(vlm) as (address, _):
        page = Seen(browser, address)
        page.tab.set_input_files("#file", str(file))
        page.tab.wait_for_selector("#question:focus")
        for question in ("What does the sign say?", "Which colour?"):
            assert page.ask(question) == (vlm.ask(file, question).text or "no words")
        assert page.tab.locator(".turn").count() == 2
        assert re.search(r"vision.* ms.*total.* ms", page.tab.locator(".phases").last.inner_text(), re.DOTALL)
        assert "was kept" in page.tab.locator(".kept").last.inner_text()
        assert "Answer" in page.tab.locator("#said").inner_text()
    assert page.complaints == []
    assert all(url.startswith((address, f"blob:{address}")) for url in page.requests)


def test_what_is_missing_is_said(browser: Any, vlm: BundleVlm, file: Path, running: Callable[..., Any]) -> None:
    with running(vlm, api_keys=["k"]) as (address, _):
        page = Seen(browser, address)
        page.tab.click("#ask")
        assert page.tab.locator("#problem").inner_text() == "Choose a picture first."
        page.tab.set_input_files("#file", str(file))
        page.tab.click("#ask")
        assert page.tab.locator("#problem").inner_text() == "Type a question."
        assert "API key" in page.ask("What?")
        page.tab.fill("#secret", "k")
        page.tab.click("#ask")  # the question is still there
        page.tab.wait_for_selector(".turn:nth-child(2):not(.busy)")
        assert page.tab.locator(".answer").last.inner_text() == (vlm.ask(file, "What?").text or "no words")
        (file.parent / "broken.png").write_bytes(b"no picture")
        page.tab.set_input_files("#file", str(file.parent / "broken.png"))
        page.tab.focus("#question")
        assert "unreadable" in page.ask("What?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_every_control_has_a_name(
    scheme: str, browser: Any, vlm: BundleVlm, file: Path, running: Callable[..., Any]
) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    with running(vlm) as (address, _):
        page = Seen(browser, address, **phone)
        page.tab.set_input_files("#file", str(file))
        page.tab.focus("#question")
        page.ask("What does the long sign at the corner of the street say?")
        assert page.tab.evaluate("document.documentElement.scrollWidth") == 360
        assert page.tab.locator("#camera").is_visible()
        for control in page.tab.locator("button:visible, input:visible").all():
            assert control.evaluate("e => (e.labels?.[0] ?? e).innerText.trim() || e.querySelector('img')?.alt")
            assert control.bounding_box()["height"] >= 44


def test_the_policy_allows_its_own_script_only(vlm: BundleVlm, running: Callable[..., Any]) -> None:
    with running(vlm) as (address, _):
        got = httpx.get(address)
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert vlm.name in got.text
    assert not re.search(r"(src|href)=\"?(https?:)?//", got.text)
