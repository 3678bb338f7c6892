"""The Space in headless Chromium: a decode, interventions, messages, a phone and a wide screen.

`make screenshots` runs the tests that show something with a trained model and keeps their pictures in `docs/images`.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

OUTLINE = "1. Farming: main crop; orchard fruit\n2. Places: nearby river\n3. People: mayor"
WIDE, PHONE = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}
# Milliseconds; a machine that also does other things still answers within them.
PATIENCE = 180_000
COLUMNS = "[...document.querySelectorAll('.pdt-text')].map(text => text.innerText.trim().length)"
BOARDS = "[...document.querySelectorAll('.pdt-board')].map(board => board.dataset.done)"
PICTURES = os.environ.get("PDT_SCREENSHOTS")


@pytest.fixture(scope="module")
def address(model_folder):
    """The Space on the loopback interface, with the tiny model or the one that `PDT_MODEL` names."""
    import gradio
    from app import serve

    name = os.environ.get("PDT_MODEL", str(model_folder))
    yield serve(name, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    gradio.close_all()


@pytest.fixture(scope="module")
def chromium():
    """The machine's own Chromium; none is downloaded."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("no Chromium on this machine; apt-get install --yes chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(chromium, address):
    """`visit(size)`: a page on which the model is loaded; scripts may not fail on it."""
    failures = []

    def open_page(size=WIDE):
        page = chromium.new_page(viewport=size)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector("#description .pdt-model")
        return page

    yield open_page
    for context in chromium.contexts:
        context.close()
    assert failures == []


def write(page, outline=OUTLINE, pace=20, tokens=24, seed=3):
    """Fills in the form and presses Write."""
    page.get_by_label("The text below").check()
    page.fill("#outline textarea", outline)
    if not page.locator("#tokens input[type=number]").is_visible():
        page.get_by_text("Length, sampling, pace").click()
    for name, value in (("tokens", tokens), ("pace", pace)):
        page.fill(f"#{name} input[type=number]", str(value))
    page.fill("#seed input", str(seed))
    page.click("#write")


def wait_for_answer(page, boards=1):
    page.wait_for_function(f"{BOARDS}.join() === '{','.join(['true'] * boards)}'", timeout=PATIENCE)


def shoot(shown, name, **options):
    """Keeps a picture of a page or a part of it, where pictures are wanted."""
    if PICTURES:
        time.sleep(2)
        shown.screenshot(path=Path(PICTURES) / f"space_{name}.png", animations="disabled", **options)


def test_all_columns_fill_at_the_same_time(visit):
    page = visit()
    page.get_by_label("Withdraw blocks at random").check()
    write(page)
    page.wait_for_function(f"{BOARDS}[0] === 'false' && Math.min(3, ...{COLUMNS}) > 0 && {COLUMNS}.length === 3")
    wait_for_answer(page)
    assert page.locator(".pdt-column h3").all_inner_texts() == ["Farming", "Places", "People"]
    assert page.locator(".pdt-withdrawn").count() == sum(
        int(text.split()[0]) for text in page.locator(".pdt-column .pdt-rewritten").all_inner_texts()
    )
    assert page.locator(".pdt-withdrawn").count() > 0
    assert page.locator(".pdt-lanes path").count() > 0
    assert page.locator(".pdt-cell u").count() > 0
    assert "trunk calls" in page.locator(".pdt-head p").inner_text()
    # Side by side.
    tops = {round(box.bounding_box()["y"]) for box in page.locator(".pdt-column").all()}
    assert len(tops) == 1


def test_with_the_bus_off_nobody_reads_a_note(visit):
    page = visit()
    write(page)
    wait_for_answer(page)
    text = page.locator(".pdt-text").all_inner_texts()
    assert page.locator(".pdt-lanes path").count() > 0
    page.get_by_label("Bus off", exact=True).check()
    page.click("#write")
    page.wait_for_function("document.querySelectorAll('.pdt-lanes path').length === 0", timeout=PATIENCE)
    wait_for_answer(page)
    assert page.locator(".pdt-lanes path").count() == 0
    assert page.locator(".pdt-text").all_inner_texts() != text


def test_two_answers_are_compared(visit):
    page = visit()
    page.get_by_label("Write it again with the bus off, and compare").check()
    write(page, tokens=48, pace=0)
    wait_for_answer(page, boards=2)
    assert page.locator(".pdt-head h2").all_inner_texts() == ["With notes", "Without notes"]
    assert page.locator(".pdt-board >> nth=1 >> mark").count() > 0
    assert page.locator(".pdt-board >> nth=0 >> mark").count() == 0
    rows = page.locator(".pdt-compare tbody th").all_inner_texts()
    assert rows == ["tokens written", "trunk calls", "blocks withdrawn", "blocks that waited", "mean agreement"]
    shoot(page.locator("#result"), "compare")


def test_errors_are_messages_and_go_away(visit):
    page = visit()
    write(page, outline="1. Farming: main crop")
    page.wait_for_selector("#message [role=alert]")
    assert "The plan has 1 lines" in page.locator("#message").inner_text()
    page.fill("#words textarea, #words input", "ablait")
    write(page)
    page.wait_for_function("document.querySelector('#message').innerText.includes('ablait')", timeout=PATIENCE)
    page.fill("#words textarea, #words input", "")
    write(page)
    wait_for_answer(page)
    assert page.locator("[role=alert]").count() == 0
    page.fill("#model textarea, #model input", "nowhere/at-all")
    page.click("#load")
    page.wait_for_function("document.querySelector('#message').innerText.includes('nowhere/at-all')")
    assert page.locator("#description .pdt-model").count() == 0


def test_stop_ends_the_call(visit):
    page = visit()
    write(page, pace=2, tokens=200)
    page.wait_for_selector(".pdt-draft")
    # The browser forgets the call once the server has; until then Write would do nothing.
    with page.expect_response("**/reset"):
        page.click("#stop")
    page.wait_for_selector("#message :text('Stopped.')")
    write(page, pace=0, tokens=16)
    wait_for_answer(page)
    assert "48 tokens" in page.locator(".pdt-head p").inner_text()


@pytest.mark.parametrize(("name", "size"), [("wide", WIDE), ("phone", PHONE)])
def test_nothing_is_wider_than_the_screen(visit, name, size):
    page = visit(size)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    page.get_by_label("The model writes it").check()
    page.click("#write")
    page.wait_for_function(f"{BOARDS}[0] === 'false' && document.querySelectorAll('.pdt-cell').length >= 6")
    wait_for_answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    wider = (
        "[...document.querySelectorAll('.pdt-stage *')].filter(one => one.getBoundingClientRect().right > innerWidth)"
    )
    assert page.evaluate(f"{wider}.map(one => one.className)") == []
    if name == "phone":
        boxes = [box.bounding_box() for box in page.locator(".pdt-column").all()]
        assert len({round(box["x"]) for box in boxes}) == 1 and min(box["width"] for box in boxes) > 320
        assert boxes[0]["y"] < page.locator("#plan").bounding_box()["y"]
    # The plan comes back after the last board.
    page.wait_for_function("document.querySelector('#outline textarea').value.startsWith('1. ')", timeout=PATIENCE)
    shoot(page, name, full_page=True)


def test_a_block_that_waits_is_seen(visit):
    page = visit()
    page.get_by_label("Withdraw blocks at random").check()
    page.get_by_text("Length, sampling, pace").click()
    page.get_by_label("It waits for more notes").check()
    write(page, tokens=32)
    page.wait_for_selector(".pdt-waiting")
    page.wait_for_selector(".pdt-cell.waiting")
    wait_for_answer(page)
    assert page.locator(".pdt-waiting, .pdt-halt, .pdt-withdrawn, .pdt-cell.waiting").count() == 0
    waited = [int(text) for text in re.findall(r"(\d+) waited", " ".join(page.locator("footer").all_inner_texts()))]
    assert page.locator(".pdt-cell .pdt-pause").count() == sum(waited) > 0


def test_visitors_take_turns(visit):
    first, second = visit(), visit()
    write(first, pace=2, tokens=200)
    first.wait_for_selector(".pdt-draft")
    second.press("#prompt textarea", "Shift+Enter")
    second.wait_for_selector("#stage :text('one answer at a time')")
    time.sleep(2)
    assert second.locator(".pdt-board").count() == 0
    first.click("#stop")
    second.wait_for_selector(".pdt-column")
    second.click("#stop")
    second.wait_for_selector("#message :text('Stopped.')")
