"""The annotation page in a real browser, by keyboard, as a person would use it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.annotation_folder import COMPLETE, EMPTY, ask, port_of, serving, write_folder

from mof.pairs.annotation.journal import JOURNAL

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install playwright")
pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page; the test fails if a page reports an error."""
    errors, pages = [], []

    def open_page(url):
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        wait(page, "#title", "Pair ")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close(run_before_unload=False)
    assert not errors


def wait(page, selector, text):
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def wait_saved(page):
    sync_api.expect(page.locator("#saved")).to_have_text("saved", timeout=60_000)


def saved(folder: Path):
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def type_all(page):
    """Fill in a whole pair by keyboard alone."""
    page.keyboard.press("3")
    for text in ("open wings", "closed wings", "Are the wings open or closed?", "Open", "Closed"):
        page.keyboard.press("Enter")
        page.keyboard.type(text)
    page.keyboard.press("Escape")
    page.keyboard.press("a")


@pytest.mark.slow
def test_a_person_walks_through_the_pairs_by_keyboard(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs", 4)
    with serving(folder) as server:
        page = open_page(server.url)
        assert page.inner_text("#title") == "Pair 1 of 4" and page.inner_text("#clip") == "0.990"
        page.wait_for_function("[0, 1].every(side => document.getElementById(`image-${side}`).naturalWidth == 16)")
        type_all(page)
        wait(page, "#missing", "Done.")
        assert {name: saved(folder)[-1][name] for name in COMPLETE} == COMPLETE
        page.keyboard.press("Enter")  # nothing left to fill: on
        wait(page, "#title", "Pair 2 of 4")
        wait(page, "#counts", "1 of 4 done")
        page.keyboard.press("s")
        wait(page, "#title", "Pair 3 of 4")
        page.keyboard.press("f")
        page.keyboard.press("u")
        wait(page, "#title", "Pair 4 of 4")
        wait(page, "#counts", "1 of 4 done · 1 skipped · 1 flagged")
        for number in (3, 2, 1):
            page.keyboard.press("ArrowLeft")
            wait(page, "#title", f"Pair {number} of 4")
        assert page.input_value("#question") == COMPLETE["question"]
        page.keyboard.press("b")  # the other way round
        page.keyboard.press("ArrowRight")  # saved before it goes
        wait(page, "#title", "Pair 2 of 4")
        assert next(line for line in reversed(saved(folder)) if "0-left" in line["image_i"])["right"] == ["b", "a"]
        assert page.get_attribute("#skip", "aria-pressed") == "true"
    with serving(folder) as server:  # another day
        page = open_page(server.url)
        assert page.inner_text("#title") == "Pair 4 of 4"


@pytest.mark.slow
def test_letters_in_a_field_are_letters(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server:
        page = open_page(server.url)
        page.click("#question")
        page.keyboard.type('s f 1 a <b> "ü"')
        wait_saved(page)
        assert saved(folder)[-1] | {"question": ""} == saved(folder)[-1] | EMPTY
        assert saved(folder)[-1]["question"] == 's f 1 a <b> "ü"'


@pytest.mark.slow
def test_the_mouse_does_the_same(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server:
        page = open_page(server.url)
        page.click("#patterns button:nth-child(3)")
        for field, text in (("statement-0", "open wings"), ("statement-1", "closed wings"), ("question", COMPLETE["question"]),
                            ("option-0", "Open"), ("option-1", "Closed")):  # fmt: skip
            page.fill(f"#{field}", text)
        page.click("#right-1-b")
        wait(page, "#missing", "Done.")
        assert {name: saved(folder)[-1][name] for name in COMPLETE} == COMPLETE
        page.keyboard.press("Enter")  # does not press the last button again
        wait(page, "#title", "Pair 2 of 3")
        page.click("#next")
        wait(page, "#title", "Pair 3 of 3")


@pytest.mark.slow
def test_two_windows_do_not_lose_work_in_silence(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server, serving(folder) as second:
        mine, theirs = open_page(server.url), open_page(second.url)
        theirs.fill("#question", "Theirs?")
        wait_saved(theirs)
        mine.fill("#question", "Mine?")
        mine.wait_for_selector("#conflict", state="visible")
        assert "Theirs?" in mine.inner_text("#theirs") and mine.input_value("#question") == "Mine?"
        mine.keyboard.press("Escape")
        mine.keyboard.press("ArrowRight")  # not before this is settled
        mine.wait_for_timeout(200)
        assert mine.inner_text("#title") == "Pair 1 of 3" and saved(folder)[-1]["question"] == "Theirs?"
        mine.click("#keep-mine")
        mine.wait_for_selector("#conflict", state="hidden")
        wait_saved(mine)
        assert [line["question"] for line in saved(folder)] == ["Theirs?", "Mine?"]
        theirs.fill("#question", "Again?")
        theirs.wait_for_selector("#conflict", state="visible")
        theirs.click("#take-theirs")
        assert theirs.input_value("#question") == "Mine?" and len(saved(folder)) == 2


@pytest.mark.slow
def test_what_a_dead_server_did_not_confirm_is_kept_and_saved_later(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server:
        page = open_page(server.url)
        page.route("**/api/pairs/0", lambda route: route.abort())
        page.fill("#question", "Lost?")
        page.wait_for_selector("#trouble", state="visible")
        assert "Not saved yet" in page.inner_text("#trouble") and page.inner_text("#saved") == "not saved"
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(200)
        assert page.inner_text("#title") == "Pair 1 of 3"
        page.unroute("**/api/pairs/0")
        wait_saved(page)  # by itself
        assert page.is_hidden("#trouble") and saved(folder)[-1]["question"] == "Lost?"


@pytest.mark.slow
def test_fast_typing_while_saving_is_slow_loses_nothing(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server:
        page = open_page(server.url)

        def slow(route):
            time.sleep(0.2)
            route.continue_()

        page.route("**/api/pairs/0", slow)
        page.click("#question")
        page.keyboard.type("Which way does the bird look, to the left or to the right?", delay=20)
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowRight")
        wait(page, "#title", "Pair 2 of 3")
        assert saved(folder)[-1]["question"] == "Which way does the bird look, to the left or to the right?"


def test_a_window_that_is_looked_at_again_shows_what_others_saved(tmp_path, open_page):
    with serving(write_folder(tmp_path / "pairs")) as server:
        page = open_page(server.url)
        ask(port_of(server), "/api/pairs/0", {"revision": 0, "annotation": COMPLETE})
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        wait(page, "#missing", "Done.")
        assert page.input_value("#option-1") == "Closed"


def test_a_broken_image_is_named(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    (folder / "0-right.png").write_bytes(b"nothing")
    with serving(folder) as server:
        page = open_page(server.url)
        page.wait_for_selector("#trouble", state="visible")
        assert "0-right.png" in page.inner_text("#trouble")


def test_a_pair_is_enlarged_and_shown_in_turn(tmp_path, open_page):
    folder = write_folder(tmp_path / "pairs")
    with serving(folder) as server:
        page = open_page(server.url)
        page.set_viewport_size({"width": 1280, "height": 800})
        assert page.evaluate("document.getElementById('keys').getBoundingClientRect().bottom") <= 800  # no scrolling for the keys
        page.keyboard.press("z")
        shown = page.locator("#large > div:visible")
        assert shown.count() == 2
        page.wait_for_function("[...document.querySelectorAll('#large img')].every(img => img.naturalWidth == 16)")
        page.keyboard.press("+")
        assert len(set(page.evaluate("[...document.querySelectorAll('#large img')].map(img => img.style.transform)"))) == 1
        seen = []
        for _ in range(3):
            page.keyboard.press("Space")
            assert shown.count() == 1
            seen.append(shown.locator("img").get_attribute("src").rpartition("/")[2])
        assert seen == ["0", "1", "0"]
        page.keyboard.press("s")  # means nothing here
        page.keyboard.press("Escape")
        assert not page.is_visible("#viewer") and page.inner_text("#title") == "Pair 1 of 3" and not (folder / JOURNAL).exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_sideways(tmp_path, open_page, width):
    with serving(write_folder(tmp_path / "pairs")) as server:
        page = open_page(server.url)
        page.set_viewport_size({"width": width, "height": 800})
        type_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
