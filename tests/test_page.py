"""The search page in a real browser: every way to bring a picture, and the way from hit to hit."""

import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from browsing import Watched, assert_no_sideways_scroll, labels, upload
from serving import ColourEncoder, colour_collection, jpeg, running

from service.app import create_app
from service.engine import Engine
from service.keys import Keys, Scope
from service.settings import Settings

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("collections")
    collections = {
        "colours": colour_collection(folder / "colours", pictures=9),
        "other & <b>more</b>": colour_collection(folder / "other", pictures=2),
        "void": colour_collection(folder / "void", pictures=0),
    }
    engine = Engine(collections, [ColourEncoder()], settings=Settings(max_body_bytes=1024 * 1024))
    with running(create_app(engine)) as found:
        yield found
    engine.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, address, watched):
    """The page, opened; afterwards: nothing on the console, and nothing asked from elsewhere."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: watched.console.append(message.text))
    page.on("pageerror", lambda error: watched.console.append(str(error)))
    page.on("request", lambda asked: watched.requests.append(asked.url))
    page.goto(f"{address}/#colours")
    page.wait_for_selector(".card")
    yield page
    strangers = [url for url in watched.requests if not url.startswith((address, "blob:" + address))]
    context.close()
    assert strangers == []
    assert watched.console == []


def test_the_start_offers_a_varied_sample(page):
    assert page.locator("#question").inner_text() == "What looks like this?"
    names = page.locator(".card .hit").evaluate_all("all => all.map(b => b.getAttribute('aria-label'))")
    assert {name.removeprefix("More like ") for name in names[:4]} == {"red", "green", "blue", "gold"}
    assert_no_sideways_scroll(page)


def test_an_uploaded_picture_shows_its_neighbours_with_scores(page):
    upload(page, jpeg("green", 3))
    page.wait_for_selector(".score")
    assert labels(page)[:9] == ["green"] * 9
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    assert scores[0] > 0.999
    assert scores == sorted(scores, reverse=True)
    fills = page.locator(".fill").evaluate_all(
        "all => all.map(f => f.offsetWidth / f.parentElement.offsetWidth)"
    )
    assert fills[0] == pytest.approx(1, abs=0.02)
    assert fills[8] == pytest.approx(scores[8], abs=0.03)
    assert page.locator("#query-name").inner_text() == "mine.jpg"
    page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth)"
    )
    assert_no_sideways_scroll(page)


def test_more_like_this_leaves_a_trail_that_leads_back(page):
    upload(page, jpeg("red", 2))
    page.wait_for_selector(".score")
    first = page.locator(".card .hit").nth(1).get_attribute("data-id")
    page.locator(".card .hit").nth(1).click()
    page.wait_for_function("id => document.querySelector('#query-name').title === id", arg=first)
    page.wait_for_selector(".score")
    assert first not in page.locator(".card .hit").evaluate_all("all => all.map(b => b.dataset.id)")
    assert page.locator(".step").count() == 2
    page.locator(".card .hit").nth(0).click()
    page.wait_for_function("() => document.querySelectorAll('.step').length === 3")

    page.locator(".step").nth(0).click()
    page.wait_for_function("() => document.querySelector('#query-name').textContent === 'mine.jpg'")
    assert page.locator(".step[aria-current]").get_attribute("aria-label") == "Step 1: your picture"
    page.go_forward()
    page.wait_for_function("id => document.querySelector('#query-name').title === id", arg=first)
    page.go_back()
    page.go_back()
    page.wait_for_selector("body[data-view=start]")
    page.wait_for_selector(".card")


def test_a_picture_can_be_dropped(page):
    data = list(jpeg("blue", 1))
    transfer = page.evaluate_handle(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        data,
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    page.wait_for_selector("body.dragging")
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".score")
    assert labels(page)[0] == "blue"
    assert page.locator("#query-name").inner_text() == "dropped.jpg"
    assert page.locator("body.dragging").count() == 0


def test_a_picture_can_be_pasted(page):
    page.evaluate(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "image.png", { type: "image/jpeg" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
        }""",
        list(jpeg("gold", 4)),
    )
    page.wait_for_selector(".score")
    assert labels(page)[0] == "gold"


def test_a_text_file_leaves_everything_as_it_was_and_a_message(page, watched):
    upload(page, jpeg("red", 2))
    page.wait_for_selector(".score")
    before = page.locator(".card .hit").evaluate_all("all => all.map(b => b.dataset.id)")
    upload(page, b"Dear colleague,", "letter.jpg")
    page.wait_for_selector("#problem:not([hidden])")
    assert "not a picture" in page.locator("#problem-detail").inner_text()
    assert page.locator("#problem").get_attribute("role") == "alert"
    assert page.locator("#problem-type").get_attribute("href") == "problems/unsupported-media"
    assert page.locator(".card .hit").evaluate_all("all => all.map(b => b.dataset.id)") == before
    assert page.locator("#query-name").inner_text() == "mine.jpg"
    page.locator("#problem-close").click()
    assert page.locator("#problem").is_hidden()
    upload(page, jpeg("blue", 2), "second.jpg")
    page.wait_for_function("() => document.querySelector('#query-name').textContent === 'second.jpg'")
    page.wait_for_function("() => document.querySelectorAll('.step').length === 2")
    # The browser itself writes refused requests to the console; nothing else may stand there.
    assert all("415" in line for line in watched.console)
    watched.console.clear()


def test_a_file_that_is_too_large_is_told_before_it_is_sent(page, watched):
    sent = len(watched.requests)
    upload(page, b"\xff\xd8\xff" + bytes(2 * 1024 * 1024), "huge.jpg")
    page.wait_for_selector("#problem:not([hidden])")
    assert "huge.jpg" in page.locator("#problem-detail").inner_text()
    assert not [url for url in watched.requests[sent:] if "/search" in url]


def test_collections_are_switched_and_an_empty_one_says_so(page):
    page.select_option("#collection", "other & <b>more</b>")
    page.wait_for_function("() => document.querySelectorAll('.card').length === 8")
    upload(page, jpeg("red", 1))
    page.wait_for_selector(".score")
    assert len(labels(page)) == 8
    page.select_option("#collection", "void")
    page.wait_for_selector("#empty:not([hidden])")
    assert page.locator("#empty-title").inner_text() == "This collection is empty"
    upload(page, jpeg("red", 1))
    page.wait_for_function(
        "() => document.querySelector('#empty-title').textContent === 'Nothing to compare with'"
    )


def test_more_hits_are_shown_when_asked_for(page):
    upload(page, jpeg("red", 0))
    page.wait_for_selector(".score")
    assert page.locator(".card").count() == 24
    page.locator("#more").click()
    page.wait_for_function("() => document.querySelectorAll('.card').length === 36")
    ids = page.locator(".card .hit").evaluate_all("all => all.map(b => b.dataset.id)")
    assert len(set(ids)) == 36
    assert page.locator("#more").is_hidden()


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator(".card .hit").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = page.evaluate("document.activeElement.dataset.id")
    assert chosen == page.locator(".card .hit").nth(2).get_attribute("data-id")
    page.keyboard.press("ArrowDown")
    below = page.evaluate("[...document.querySelectorAll('.hit')].indexOf(document.activeElement)")
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length"
    )
    assert below == 2 + columns
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_function("id => document.querySelector('#query-name').title === id", arg=chosen)


def test_an_address_with_an_item_can_be_shared(page, address):
    page.goto("about:blank")
    page.goto(f"{address}/#colours/gold%2F3")
    page.wait_for_selector(".score")
    assert page.locator("#query-name").get_attribute("title") == "gold/3"
    assert labels(page)[0] == "gold"
    page.reload()
    page.wait_for_selector(".score")
    assert page.locator("#query-name").get_attribute("title") == "gold/3"


def test_an_item_that_is_gone_is_told_and_the_start_is_shown(page, address, watched):
    page.goto("about:blank")
    page.goto(f"{address}/#colours/nobody")
    page.wait_for_selector("#problem:not([hidden])")
    assert "nobody" in page.locator("#problem-detail").inner_text()
    page.wait_for_selector("body[data-view=start] .card")
    assert all("404" in line for line in watched.console)
    watched.console.clear()


def test_names_of_others_are_text_and_never_markup(page, address):
    options = page.locator("#collection option").all_inner_texts()
    assert "other & <b>more</b>" in options
    assert page.locator("main b").count() == 0


def test_every_control_has_a_name_and_every_picture_a_text(page):
    upload(page, jpeg("green", 3))
    page.wait_for_selector(".score")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, select, input")].filter(
            (control) => !(control.getAttribute("aria-label") || control.textContent.trim() ||
                (control.labels && control.labels.length))).length"""
    )
    assert nameless == 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(browser, address, scheme):
    """WCAG AA: 4.5 to 1 for the muted text on the page's ground, and for the button."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ["paper", "card", "ink", "muted", "accent", "accent-ink", "alert", "alert-soft"];
            return Object.fromEntries(names.map((n) => [n, style.getPropertyValue("--" + n).trim()]));
        }"""
    )
    context.close()
    for text, ground in (
        ("ink", "paper"),
        ("muted", "paper"),
        ("muted", "card"),
        ("accent-ink", "accent"),
        ("accent", "paper"),
        ("alert", "alert-soft"),
    ):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """Contrast of two #rrggbb colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part, 16) / 255 for part in re.findall("..", colour.lstrip("#"))]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture
def guarded(tmp_path) -> Iterator[tuple[str, Keys]]:
    """A service with keys."""
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=3)}, [ColourEncoder()])
    keys = Keys(tmp_path / "state")
    keys.add("first", scope=Scope.SEARCH)
    with running(create_app(engine, keys=keys)) as found:
        yield found, keys
    engine.close()
    keys.close()


PICTURES_SHOWN = """
    () => document.querySelectorAll('.card img').length > 3
      && [...document.querySelectorAll('.card img')].every((image) => image.complete && image.naturalWidth)
"""


@pytest.mark.parametrize("size", [(1280, 860), (390, 844)], ids=["desktop", "phone"])
def test_a_service_with_keys_asks_for_one_and_keeps_it_for_the_tab(browser, guarded, size):
    address, keys = guarded
    text, _ = keys.add("page", scope=Scope.SEARCH)
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.set_default_timeout(30_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/#colours")
    page.wait_for_selector("#key[open]")
    assert page.locator("#key-text").evaluate("field => field === document.activeElement")
    assert not page.locator("#key-wrong").is_visible()
    assert_no_sideways_scroll(page)

    page.fill("#key-text", "dml_not_a_key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-wrong:not([hidden])")
    page.fill("#key-text", text)
    page.keyboard.press("Enter")
    page.wait_for_function(PICTURES_SHOWN)
    assert not page.locator("#key").is_visible()
    upload(page, jpeg("green", 1))
    page.wait_for_selector(".score")
    assert labels(page)[:3] == ["green"] * 3
    page.wait_for_function(PICTURES_SHOWN)
    page.locator(".hit").first.click()
    page.wait_for_function("() => document.querySelector('#query-kind').textContent === 'More like'")
    page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")

    page.goto(f"{address}/?again#colours")
    page.wait_for_function(PICTURES_SHOWN)
    assert not page.locator("#key").is_visible(), "kept for this tab"
    assert not [url for url in asked if text in url], "a key must not stand in an address"

    keys.revoke("page")
    page.goto(f"{address}/?revoked#colours")
    page.wait_for_selector("#key[open]")
    page.click("#key-cancel")
    page.wait_for_selector("#problem:not([hidden])")
    assert "key" in page.locator("#problem-title").inner_text()
    other = context.new_page()
    other.goto(f"{address}/#colours")
    other.wait_for_selector("#key[open]")
    context.close()


def test_a_picture_opens_with_the_key(browser, guarded):
    address, keys = guarded
    text, _ = keys.add("page", scope=Scope.SEARCH)
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(f"{address}/#colours/{quote('red/0', safe='')}")
    page.fill("#key-text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".score")
    page.locator(".card").first.hover()
    with context.expect_page() as opened:
        page.locator(".open").first.click()
    opened.value.wait_for_selector("img")
    assert opened.value.evaluate("document.images[0].naturalWidth") == 96
    context.close()


def test_a_page_elsewhere_can_neither_read_nor_write_through_the_visitor(browser, guarded, tmp_path):
    """A page of another host (here: localhost), and a service without keys on a loopback address."""
    elsewhere = guarded[0].replace("127.0.0.1", "localhost")
    engine = Engine({"colours": colour_collection(tmp_path / "open", pictures=1)}, [ColourEncoder()])
    with running(create_app(engine)) as opened:
        page = browser.new_context(bypass_csp=True).new_page()
        page.goto(f"{elsewhere}/livez")
        tried = page.evaluate(
            """async (address) => {
              const place = `${address}/v1/collections/colours`;
              const form = new FormData();
              form.append("file", new Blob(["x"]), "a.jpg");
              const outcomes = [];
              for (const [path, options] of [
                [place, {}],
                [`${place}/items/red%2F0`, { method: "DELETE" }],
                [`${place}/items/delete`, { method: "POST", body: '{"ids": ["red/0"]}' }],
                [`${place}/search/image`, { method: "POST", body: form }],
                [`${place}/items/new`, { method: "PUT", body: form }],
              ]) {
                outcomes.push(await fetch(path, options).then((answer) => answer.status, () => "blocked"));
              }
              const blind = { method: "POST", body: form, mode: "no-cors" };
              await fetch(`${place}/search/image`, blind).catch(() => {});
              return outcomes;
            }""",
            opened,
        )
        page.context.close()
        assert tried == ["blocked"] * 5
        assert engine.count("colours") == 4
        assert 'dml_problems_total{type="cross-origin"}' in httpx.get(f"{opened}/metrics").text
    engine.close()
