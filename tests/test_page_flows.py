"""What the page offers beyond a plain search, in a real browser: narrow, compare, go on, add, delete."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Watched, assert_no_sideways_scroll, upload
from PIL import Image
from serving import COLOURS, ColourEncoder, encoded, jpeg, paint, running

from dml.collection import create_collection
from dml.collection.base import NewItem
from service.app import create_app
from service.engine import Engine
from service.jobs import Control
from service.keys import Keys, Scope
from service.settings import Settings

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 860), (360, 780)
EACH = 16  # pictures of a colour


def fill(path: Path, *, each: int = EACH) -> Any:
    """A collection of painted pictures whose payloads have every kind of value."""
    encoder = ColourEncoder()
    collection = create_collection(path, dim=encoder.dim, fingerprint=encoder.fingerprint, index="flat")
    items = []
    for position, colour in enumerate(COLOURS):
        for number in range(each):
            pixels = encoder.preprocess(paint(colour, number))
            payload = {
                "label": colour,
                "price": 10 * number,
                "made": f"2024-{1 + number % 12:02}-15",
                "sale": number % 2 == 0,
                "sizes": [f"S{number % 3}", f"S{3 + number % 3}"],
                "shop": {"city": ["Ulm", "Bonn"][position % 2]},
                "serial": f"{colour}-{number}",
            }
            image = jpeg(colour, number)
            items.append(
                NewItem(f"{colour}/{number:02}", encoder.embed_arrays(pixels[None])[0], payload, image=image)
            )
    if items:
        collection.add(items)
    return collection


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[str]:
    """A service of a test's own, since tests write to it."""
    collections = {"shop": fill(tmp_path / "shop"), "void": fill(tmp_path / "void", each=0)}
    engine = Engine(collections, [ColourEncoder()], settings=Settings(max_body_bytes=1024 * 1024))
    with running(create_app(engine)) as found:
        yield found
    engine.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request, browser, shop, watched):
    """The page, opened; afterwards nothing unexpected stands on the console."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: watched.console.append(message.text))
    page.on("pageerror", lambda error: watched.console.append(str(error)))
    page.goto(f"{shop}/#shop")
    page.wait_for_selector(".card")
    yield page
    context.close()
    assert watched.console == []


def ids(page) -> list[str]:
    return page.locator(".card .hit").evaluate_all("all => all.map(b => b.dataset.id)")


def shows(page, condition: str) -> None:
    """Wait until there are cards, and their ids, in order, meet a condition of JavaScript."""
    listed = "[...document.querySelectorAll('.card .hit')].map(hit => hit.dataset.id)"
    page.wait_for_function(f"() => {{ const ids = {listed}; return ids.length > 0 && ({condition}); }}")


def searched(page, data: bytes | None = None) -> None:
    upload(page, data or jpeg("red", 2))
    page.wait_for_selector(".score")
    page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")


def refine(page) -> None:
    if not page.evaluate("document.querySelector('#refine').open"):
        page.click("#refine summary")


def act(page, id: str, name: str) -> None:
    """One of the actions of a card, as a visitor does it: they show when the card is pointed at."""
    card = page.locator(".card", has=page.locator(f'[data-id="{id}"]'))
    card.hover()
    card.get_by_role("button", name=re.compile(f"^{name}")).click()


# A region of the picture


def halves() -> bytes:
    """Red at the left, blue at the right, and a grey margin that nothing in the collection has."""
    picture = Image.new("RGB", (400, 300), (120, 120, 120))
    for colour, left in (("red", 20), ("blue", 220)):
        picture.paste(COLOURS[colour], (left, 20, left + 160, 280))
    return encoded(picture, quality=95)


def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place of the query picture to another, in shares of it."""
    box = page.locator("#query-image").bounding_box()
    width, height = box["width"], box["height"]
    scale = min(width / 400, height / 300)
    left, top = box["x"] + (width - 400 * scale) / 2, box["y"] + (height - 300 * scale) / 2
    points = [(left + x * 400 * scale, top + y * 300 * scale) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def test_a_box_drawn_on_the_picture_is_what_is_searched(page):
    searched(page, halves())
    if page.viewport_size["width"] < 760:  # the picture is small there until a region is asked for
        page.click("#crop")
        drag(page, (0.15, 0.1), (0.1, 0.9))
    drag(page, (0.55, 0.1), (0.92, 0.9))
    shows(page, "ids.slice(0, 8).every(id => id.startsWith('blue/'))")
    assert page.locator("#region").is_visible()
    assert page.locator("#query-name").inner_text() == "mine.jpg"
    assert page.locator(".step").count() == 1, "a region is no step of its own"
    drag(page, (0.7, 0.5), (0.24, 0.5))  # taken inside, it moves
    shows(page, "ids.slice(0, 8).every(id => id.startsWith('red/'))")
    whole = page.locator("#crop")
    assert whole.get_attribute("aria-pressed") == "true"
    whole.click()
    assert page.locator("#region").is_hidden()
    assert whole.inner_text() == "Select a region"
    assert_no_sideways_scroll(page)


def test_the_region_is_moved_and_sized_with_the_keyboard(page):
    searched(page, halves())
    page.locator("#crop").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "region"
    for _ in range(12):
        page.keyboard.press("Shift+ArrowLeft")  # 36 % wide
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    shows(page, "ids.slice(0, 8).every(id => id.startsWith('blue/'))")
    spoken = page.locator("#region").get_attribute("aria-label")
    assert spoken == "Region to search: 36 by 60 percent of the picture, 60 from the left and 20 from the top"
    assert "36 by 60 percent" in page.locator("#live").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#region").is_hidden()
    assert page.evaluate("document.activeElement.id") == "crop"


def test_a_part_of_a_hit_is_searched_without_finding_the_hit_itself(page):
    searched(page)
    page.locator(".hit").first.click()
    page.wait_for_function("() => document.querySelector('#query-kind').textContent === 'More like'")
    page.wait_for_selector(".score")
    chosen = page.locator("#query-name").get_attribute("title")
    page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")
    with page.expect_response("**/search/image") as answered:
        page.click("#crop")
    hits = [hit["id"] for hit in answered.value.json()["hits"]]
    assert chosen not in hits
    assert len(hits) == 24


# Examples


def test_examples_for_and_against_are_chips_that_can_be_taken_away(page):
    searched(page)
    page.locator(".hit").first.click()
    page.wait_for_function("() => document.querySelector('#query-kind').textContent === 'More like'")
    page.wait_for_selector(".score")
    before = ids(page)
    act(page, before[1], "More of this")
    shows(page, f"!ids.includes('{before[1]}')")
    disliked = ids(page)[0]
    with page.expect_request("**/search") as asked:
        act(page, disliked, "Less of this")
    query = asked.value.post_data_json["query"]
    assert (query["positive"], query["negative"]) == ([before[1]], [disliked])
    shows(page, f"!ids.includes('{disliked}')")
    assert page.locator("#liked .chip").count() == page.locator("#disliked .chip").count() == 1
    assert_no_sideways_scroll(page)

    page.locator("#disliked .chip-remove").click()
    page.locator("#liked .chip-remove").click()
    page.wait_for_selector("#examples", state="hidden")
    shows(page, f"ids.join() === '{','.join(before)}'")
    assert page.evaluate("document.activeElement.id") == "results-title", "the focus is not lost with a chip"


def test_an_example_changes_sides(page):
    searched(page)
    page.locator(".hit").first.click()
    page.wait_for_function("() => document.querySelector('#query-kind').textContent === 'More like'")
    page.wait_for_selector(".score")
    first = ids(page)[0]
    act(page, first, "Less of this")
    page.wait_for_selector("#disliked .chip")
    shows(page, f"!ids.includes('{first}')")
    assert page.locator("#liked-part").is_hidden()


# Filters and the threshold


def test_filters_come_from_what_the_items_carry(page):
    searched(page)
    refine(page)
    names = page.locator("#fields legend").all_inner_texts()
    assert [name.lower() for name in names] == ["label", "sale", "sizes", "shop · city", "price", "made"]
    page.get_by_role("button", name="blue", exact=True).click()
    shows(page, "ids.length === 16 && ids.every(id => id.startsWith('blue/'))")
    page.get_by_role("button", name="gold", exact=True).click()
    shows(page, "ids.length === 24 && ids.every(id => /^(blue|gold)/.test(id))")
    page.get_by_label("price to").fill("30")
    shows(page, "ids.length === 8")
    page.get_by_role("button", name="yes", exact=True).click()
    shows(page, "ids.length === 4 && ids.every(id => /0[02]$/.test(id))")
    page.get_by_label("made to").fill("2024-01-15")
    shows(page, "ids.length === 2 && ids.every(id => /00$/.test(id))")
    chips = page.locator("#narrowed .chip-text").all_inner_texts()
    assert chips == ["label: blue or gold", "sale: yes", "price: to 30", "made: to 2024-01-15"]
    assert_no_sideways_scroll(page)

    page.get_by_label("made to").fill("2023-01-01")
    page.wait_for_selector("#empty:not([hidden])")
    assert page.locator("#empty-title").inner_text() == "Nothing like this here"
    page.get_by_role("button", name="Take all conditions away").click()
    shows(page, "ids.length === 24 && ids[0].startsWith('red/')")
    assert page.locator("#narrowed").is_hidden()
    assert page.locator('.pill[aria-pressed="true"]').count() == 0


def test_a_condition_is_taken_away_by_its_chip(page):
    searched(page)
    refine(page)
    page.get_by_role("button", name="Bonn", exact=True).click()
    shows(page, "ids.every(id => /^(green|gold)/.test(id))")
    page.get_by_role("button", name="Remove: shop · city: Bonn").click()
    shows(page, "ids[0].startsWith('red/')")
    assert page.get_by_role("button", name="Bonn", exact=True).get_attribute("aria-pressed") == "false"


def test_values_that_the_first_items_do_not_have_are_found_as_well(browser, shop):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.route(
        "**/items?limit=1000", lambda route: route.continue_(url=route.request.url.replace("1000", "20"))
    )
    page.goto(f"{shop}/#shop")
    page.wait_for_selector(".card")
    searched(page)
    page.wait_for_function("() => document.querySelectorAll('[data-path=label] .pill').length === 4")
    assert page.locator("[data-path=label] .pill").all_inner_texts() == ["blue", "gold", "green", "red"]
    context.close()


def test_the_threshold_leaves_out_what_is_less_similar(page):
    searched(page)
    refine(page)
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    limit = round((scores[3] + scores[12]) / 2, 2)
    page.locator("#threshold").fill(str(limit))
    shows(page, f"ids.length === {sum(score >= limit for score in scores)}")
    assert page.locator("#threshold-value").inner_text() == f"{limit:.2f}"
    page.get_by_role("button", name=f"Remove: Similarity at least {limit:.2f}").click()
    shows(page, "ids.length === 24")
    assert page.locator("#threshold-value").inner_text() == "any"


def test_conditions_end_with_the_collection(page):
    searched(page)
    refine(page)
    page.get_by_role("button", name="blue", exact=True).click()
    shows(page, "ids.length === 16")
    page.select_option("#collection", "void")
    page.wait_for_selector("#empty:not([hidden])")
    page.select_option("#collection", "shop")
    shows(page, "ids.length === 24")
    searched(page)
    shows(page, "ids[0].startsWith('red/')")
    assert page.locator("#narrowed").is_hidden()


# Page after page


def test_pages_neither_repeat_nor_skip_while_the_collection_changes(page, shop):
    searched(page)
    seen = ids(page)
    page.click("#more")
    shows(page, "ids.length === 48")
    for number in range(6):  # near the query, and among what was shown
        files = {"file": encoded(paint("red", 2, size=(96, 70 + number)), quality=80)}
        httpx.put(f"{shop}/v1/collections/shop/items/new%2F{number}", files=files).raise_for_status()
    httpx.delete(f"{shop}/v1/collections/shop/items/{seen[5].replace('/', '%2F')}").raise_for_status()
    page.click("#more")
    shows(page, "ids.length === 64")
    shown = ids(page)
    assert len(set(shown)) == 64
    assert not [id for id in shown if id.startswith("new/")]
    assert page.locator("#more").is_hidden()
    assert page.evaluate("document.activeElement.dataset.id") == shown[48]


# Adding and deleting


def picked(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


def test_pictures_are_added_and_found(page, shop, watched):
    page.click("#add-open")
    page.fill("#add-label", "red")
    files = [
        picked("03", encoded(Image.new("RGB", (90, 90), (250, 0, 250)))),
        picked("violet.jpg", encoded(Image.new("RGB", (90, 90), (250, 0, 240)))),
        picked("letter.jpg", b"Dear colleague,"),
    ]
    page.set_input_files("#add-file", files)
    assert page.locator("#add-submit").inner_text() == "Add 3 pictures"
    page.click("#add-submit")
    page.get_by_text("2 of 3 added · 1 could not be").wait_for()
    assert "not a picture" in page.locator(".add-row.failed").inner_text()
    assert page.locator(".add-row.done progress").evaluate_all("all => all.map(bar => bar.value)") == [1, 1]
    page.click("#add-submit")
    assert page.locator("#add").is_hidden()

    upload(page, encoded(Image.new("RGB", (90, 90), (250, 0, 250))))
    page.wait_for_selector(".score")
    assert set(ids(page)[:2]) == {"red/03 (2)", "red/violet.jpg"}
    kept = httpx.get(f"{shop}/v1/collections/shop/items/red%2F03/image").content
    assert kept == jpeg("red", 3), "what had the name stays as it was"
    assert watched.console
    assert all("415" in line for line in watched.console)
    watched.console.clear()


def test_pictures_dropped_on_the_dialog_are_to_be_added_and_not_searched(page):
    page.click("#add-open")
    transfer = page.evaluate_handle(
        """data => {
            const transfer = new DataTransfer();
            for (const name of ["one.jpg", "two.jpg"])
              transfer.items.add(new File([new Uint8Array(data)], name, { type: "image/jpeg" }));
            return transfer;
        }""",
        list(jpeg("blue", 1)),
    )
    page.dispatch_event("#add", "drop", {"dataTransfer": transfer})
    assert page.locator(".add-name").all_inner_texts() == ["one.jpg", "two.jpg"]
    page.click("#add-cancel")
    assert page.evaluate("document.body.dataset.view") == "start"


def test_an_item_is_deleted_after_a_question(page, shop):
    searched(page)
    first, second = ids(page)[:2]
    act(page, first, "Delete")
    assert page.locator("#remove-name").inner_text() == first
    assert page.evaluate("document.activeElement.id") == "remove-cancel", (
        "the harmless answer is the easy one"
    )
    page.keyboard.press("Enter")
    assert page.locator("#remove").is_hidden()
    assert ids(page)[0] == first
    act(page, first, "Delete")
    page.click("#remove-submit")
    shows(page, f"ids[0] === '{second}'")
    assert page.evaluate("document.activeElement.dataset.id") == second
    assert page.locator("#live").inner_text() == f"{first} was deleted"
    assert httpx.get(f"{shop}/v1/collections/shop/items/{first.replace('/', '%2F')}").status_code == 404


def test_where_nothing_may_be_written_nothing_offers_it(browser, tmp_path):
    fill(tmp_path / "shop").close()
    engine = Engine({"shop": fill(tmp_path / "other")}, [ColourEncoder()], settings=Settings(read_only=True))
    with running(create_app(engine)) as address:
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/#shop")
        page.wait_for_selector(".card")
        page.get_by_text("read-only").wait_for()
        searched(page)
        assert page.locator("#add-open").is_hidden()
        page.locator(".card").first.hover()
        assert page.locator(".writing:visible").count() == 0
        page.context.close()
    engine.close()


def test_a_key_that_may_only_search_is_offered_no_writing(browser, tmp_path):
    engine = Engine({"shop": fill(tmp_path / "shop")}, [ColourEncoder()])
    keys = Keys(tmp_path / "state")
    text, _ = keys.add("visitor", scope=Scope.SEARCH)
    with running(create_app(engine, keys=keys)) as address:
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/#shop")
        page.fill("#key-text", text)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card")
        page.get_by_text("your key may search only").wait_for()
        assert page.locator("#add-open").is_hidden()
        page.context.close()
    engine.close()
    keys.close()


def test_a_key_that_may_not_write_any_more_is_told_so_once(browser, tmp_path):
    engine = Engine({"shop": fill(tmp_path / "shop")}, [ColourEncoder()])
    keys = Keys(tmp_path / "state")
    (writer, _), (visitor, _) = keys.add("writer", scope=Scope.WRITE), keys.add("visitor", scope=Scope.SEARCH)
    with running(create_app(engine, keys=keys)) as address:
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/#shop")
        page.fill("#key-text", writer)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card")
        page.click("#add-open")
        page.set_input_files("#add-file", [picked("a.jpg", jpeg("red", 1)), picked("b.jpg", jpeg("red", 2))])

        def revoke_on_the_way(route) -> None:
            # Not before: a picture on its way to a card would ask for another key already.
            if route.request.method != "GET":
                keys.revoke("writer")
            route.continue_()

        page.route("**/v1/**", revoke_on_the_way)
        page.click("#add-submit")
        page.fill("#key-text", visitor)
        page.keyboard.press("Enter")
        page.wait_for_selector("#add-problem:not([hidden])")
        assert "scope write" in page.locator("#add-problem-detail").inner_text()
        page.click("#add-cancel")
        page.get_by_text("your key may search only").wait_for()
        assert page.locator("#add-open").is_hidden()
        page.context.close()
    assert engine.count("shop") == 4 * EACH
    engine.close()
    keys.close()


# Addresses


def test_the_first_collection_of_the_command_line_is_shown_unless_the_address_says_otherwise(
    browser, tmp_path
):
    names = ("zebra", "ant")
    engine = Engine({name: fill(tmp_path / name, each=2) for name in names}, [ColourEncoder()])
    with running(create_app(engine)) as address:
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        for place, shown in (("", "zebra"), ("#ant", "ant"), ("#/status", "zebra"), ("#%E0%A4%A", None)):
            page.goto("about:blank")
            page.goto(f"{address}/{place}")
            page.wait_for_selector(".card, .sheet, #empty-choices button")
            assert page.evaluate("document.querySelector('#collection').value") == (shown or "")
        page.context.close()
    engine.close()


def test_a_collection_that_is_not_there_is_told_and_the_others_are_offered(browser, shop):
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    page.goto(f"{shop}/#trousers/red%2F01")
    page.get_by_text("There is no collection “trousers” here").wait_for()
    assert page.locator("#collection").input_value() == ""
    assert page.locator(".card").count() == 0
    upload(page, jpeg("red", 2))
    page.get_by_text("Which collection?").wait_for()
    assert page.locator("#empty-choices button").all_inner_texts() == [
        "shop · 64 pictures",
        "void · 0 pictures",
    ]
    page.get_by_role("button", name="shop · 64 pictures").click()
    page.wait_for_selector(".card")
    assert page.locator("#collection").input_value() == "shop"
    page.go_back()
    page.get_by_text("There is no collection “trousers” here").wait_for()
    page.context.close()


def test_an_alias_in_the_address_leads_to_its_collection(browser, shop):
    assert httpx.put(f"{shop}/v1/aliases/front", json={"collection": "shop"}).status_code == 201
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    page.goto(f"{shop}/#front/red%2F01")
    page.wait_for_selector(".score")
    assert page.locator("#collection").input_value() == "shop"
    page.context.close()


# For who runs the service


def test_a_job_is_cancelled_on_the_status(browser, tmp_path):
    engine = Engine({"shop": fill(tmp_path / "shop")}, [ColourEncoder()])
    app, release = create_app(engine, state=tmp_path / "state"), threading.Event()

    def work(control: Control) -> dict:
        while not release.wait(0.01):
            control.tell(0.25, "16 of 64 items")
        return {}

    with running(app) as address:
        place = engine.place("shop")
        job = app.state.memory.jobs.begin("duplicates", work, collection="shop", place=place)
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/#/status")
        page.get_by_text("16 of 64 items").wait_for()
        assert page.locator("progress").get_attribute("value") == "0.25"
        page.get_by_role("button", name="Cancel duplicates · shop").click()
        page.wait_for_selector(".job.cancelled")
        assert page.get_by_role("button", name="Cancel duplicates").count() == 0
        assert page.locator("#live").inner_text() == "duplicates · shop was asked to stop"
        page.context.close()
        assert app.state.memory.jobs.get(job.id).state == "cancelled"
    release.set()
    engine.close()


def test_the_status_lists_the_jobs(browser, shop):
    started = httpx.post(f"{shop}/v1/collections/shop/duplicates", json={"level": "file"})
    assert started.status_code == 202
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    for _ in range(50):
        if httpx.get(f"{shop}/v1/jobs/{started.json()['id']}").json()["state"] == "succeeded":
            break
        page.wait_for_timeout(100)
    page.goto(f"{shop}/#/status")
    page.wait_for_selector(".job.succeeded")
    assert "duplicates · shop" in page.locator(".job").inner_text()
    page.context.close()


def test_the_status_says_how_the_collections_are_and_how_quick_searches_were(page, shop):
    searched(page)
    page.get_by_role("link", name="Status").click()
    page.wait_for_selector(".sheet")
    assert page.locator("#status-title").evaluate("title => title === document.activeElement")
    sheet = page.locator("article.sheet").first
    assert sheet.locator("h3").inner_text() == "shop"
    facts = dict(
        zip(sheet.locator("dt").all_inner_texts(), sheet.locator("dd").all_inner_texts(), strict=True)
    )
    assert facts["Pictures"] == "64"
    assert facts["Recall@10 promised"] == "1 (exact)"
    assert facts["Encoder"].startswith("c0104e000000 · 48 numbers")
    assert facts["Generation"] == str(httpx.get(f"{shop}/v1/collections/shop").json()["generation"])
    assert sheet.get_by_text("exact", exact=True).is_visible()
    assert page.locator(".chart rect").count() == 3
    assert page.locator(".chart").get_attribute("aria-label").startswith("The last 1 search took")
    assert_no_sideways_scroll(page)
    page.go_back()
    page.wait_for_selector(".score")
    page.go_forward()
    page.get_by_role("button", name="Search in void").click()
    page.wait_for_selector("#empty:not([hidden])")
    assert page.locator("#collection").input_value() == "void"


# For everybody

STATES = ["start", "results", "narrowed", "nothing", "adding", "deleting", "status", "problem", "unknown"]


def reach(page, state: str) -> None:
    """Bring the page into one of its states."""
    if state == "start":
        return
    if state == "unknown":
        page.evaluate("location.hash = '#trousers'")
        page.wait_for_selector("#empty-choices button")
        return
    searched(page, halves() if state == "results" else None)
    if state == "results":
        page.click("#crop")
    elif state in ("narrowed", "nothing"):
        refine(page)
        page.get_by_role("button", name="blue", exact=True).click()
        shows(page, "ids.length === 16")
        if state == "nothing":
            page.locator("#threshold").fill("1")
            page.wait_for_selector("#empty:not([hidden])")
        else:
            act(page, ids(page)[0], "More of this")
            page.wait_for_selector("#liked .chip")
    elif state == "adding":
        page.click("#add-open")
        page.set_input_files("#add-file", [picked("a.jpg", jpeg("red", 1))])
    elif state == "deleting":
        act(page, ids(page)[0], "Delete")
    elif state == "status":
        page.click("#status-link")
        page.wait_for_selector(".sheet")
    elif state == "problem":
        upload(page, b"Dear colleague,")
        page.wait_for_selector("#problem:not([hidden])")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_state_of_the_page_shuts_anybody_out(browser, shop, scheme, size):
    """axe finds nothing against WCAG 2.2 AA and good practice: names, roles, contrast, landmarks."""
    axe = pytest.importorskip("axe_playwright_python")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    found: list[str] = []
    for state in STATES:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{shop}/#shop")
        page.wait_for_selector(".card")
        reach(page, state)
        assert_no_sideways_scroll(page)
        page.evaluate(script)
        results = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        found += [
            f"{state}: {rule['id']} ({rule['help']}): {node['html'][:160]}"
            for rule in results["violations"]
            for node in rule["nodes"]
        ]
        context.close()
    assert found == []
