"""The playground in a real Chromium, against a server on a real socket whose device recites."""

import contextlib
import itertools
import json
import re

import browsing
import pytest
from serving import KEY, RESPONSE, Provider, Reciter, Server, make_service, tiny_text

from collab_jax.cloud import attempts

pytestmark = pytest.mark.skipif(bool(browsing.missing()), reason=browsing.missing())

QUESTION = "49 9 37=95"
CALLS = {6: 2.0}  # a margin after "<think>49+9="
STEPS = 30  # of RESPONSE, with the end
ATTACK = "<img src=x onerror=hacked=1><script>hacked=1</script>"


class Pieces:
    """A Text whose tokens are pieces of eight characters, so that a device can write anything."""

    marker, decision_id, longest_piece = "<unknown> help </unknown>", -1, 8

    def __init__(self):
        self.tokenizer, self._pieces = self, []

    def encode(self, text, add_special_tokens):
        self._pieces = [text[i : i + 8] for i in range(0, len(text), 8)]
        return list(range(len(self._pieces)))

    def spelt(self, ids):
        return "".join(self._pieces[token] for token in ids)

    def prompt_ids(self, messages):
        return [1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def chromium():
    with browsing.chromium() as browser:
        yield browser


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(provider, ...): (the page, its server); all ends with the test, which fails where
    the page has thrown, or its policy was broken.
    """
    numbers, faults = itertools.count(), []
    with contextlib.ExitStack() as stack:

        def open_(provider=None, margins=None, response=RESPONSE, text=None, pause=0.0, **options):
            text = text or tiny_text()
            folder = tmp_path / str(next(numbers))
            folder.mkdir()
            engine = Reciter(text, response, margins, pause)
            service = make_service(engine, text, folder, provider)
            server = stack.enter_context(Server(service))
            page = chromium.new_page(**options)
            stack.callback(page.close)
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda m: faults.append(m.text) if "Policy" in m.text else None)
            page.goto(f"http://127.0.0.1:{server.port}/")
            return page, server

        yield open_
    assert not faults


def ask(page, question=QUESTION):
    """Asks, and waits for the end of all answers."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()


def column(page, name):
    return page.get_by_role("region", name=name, exact=True).last


def content(page, name):
    return column(page, name).locator(".content").inner_text()


def ledger(page):
    """The rows of the ledger: asked, calls, USD by column."""
    rows = page.locator("#ledger tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def line(page):
    return page.get_by_role("slider", name="Line above which a margin calls")


# ------------------------------------------------------------------------------------- answers


def test_three_columns_answer_the_same_question(open_page):
    with Provider() as provider:
        page, _ = open_page(provider)
        ask(page)
        assert content(page, "Device") == content(page, "Collab") == "49+9+37"
        assert content(page, "Cloud") == "42"
        assert "big" in column(page, "Cloud").inner_text()
        assert "margin stayed below" in column(page, "Collab").inner_text()
        thinking = column(page, "Device").locator("details")
        assert thinking.get_attribute("open") is None
        thinking.locator("summary").click()
        assert "49+9=58,58+37=95" in thinking.inner_text()
        assert ledger(page) == {
            "Device": ["1", "0", "0"], "Cloud": ["1", "1", "0.000016"], "Collab": ["1", "0", "0"],
        }  # fmt: skip
        assert page.locator("#rate").inner_text() == "0 of 1, 0 %"
        assert page.locator("#cloud-tokens").inner_text() == "13"


def test_a_chat_with_collab_alone_sends_earlier_turns_where_wanted(open_page):
    with Provider() as provider:
        page, _ = open_page(provider, CALLS)
        page.get_by_label("Ask device and cloud as well").uncheck()
        ask(page)
        page.get_by_label("Send earlier turns too").check()
        ask(page, "and now")
        assert page.get_by_role("region", name="Device").count() == 0
        assert [m["content"] for m in provider.bodies[-1]["messages"]] == [
            QUESTION,
            "42",
            "and now",
        ]


def test_what_fails_is_said_in_its_column(open_page):
    with Provider(lambda _: [("status", 500)]) as provider:
        page, _ = open_page(provider, CALLS)
        ask(page)
        assert "the cloud has no answer" in column(page, "Cloud").inner_text()
        assert content(page, "Collab") == "49+9+37"
        assert "the cloud has failed" in column(page, "Collab").inner_text()


def test_keys_send_break_lines_stop_and_come_back(open_page):
    page, server = open_page(pause=0.2)
    page.get_by_label("Ask device and cloud as well").uncheck()
    box = page.get_by_label("Question", exact=True)
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert box.input_value() == "one\ntwo"
    box.press("Enter")
    column(page, "Collab").wait_for()
    page.get_by_role("button", name="Stop").wait_for()
    page.locator("body").press("Escape")
    page.get_by_role("button", name="Send").wait_for()
    assert "stopped" in column(page, "Collab").inner_text()
    for _ in range(100):  # the server hears that the client has left
        if server.service.engine.cancelled:
            break
        page.wait_for_timeout(50)
    assert server.service.engine.cancelled
    assert box.evaluate("box => box === document.activeElement")
    page.get_by_role("button", name="Export").focus()
    page.keyboard.press("/")
    assert box.evaluate("box => box === document.activeElement") and box.input_value() == ""


def test_a_turn_is_asked_again_and_edited(open_page):
    with Provider() as provider:
        page, server = open_page(provider)
        ask(page)
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_role("button", name="Send").wait_for()
        assert ledger(page)["Device"][0] == "2" and page.locator("article").count() == 1
        assert ledger(page)["Cloud"][2] == "0.000016"  # the second one was bought before
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Edit question").fill("7 2=14")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Send").wait_for()
        assert page.get_by_role("heading", name="7 2=14").count() == 1
        assert provider.bodies[-1]["messages"][-1]["content"] == "7 2=14"


def test_no_text_is_ever_html(open_page, tmp_path):
    """Of the device, the cloud, the user, an error of the server, and a file."""
    response = f"<think>{ATTACK}</think><answer>{ATTACK}</answer>"
    with Provider(lambda _: [("reasoning", ATTACK), ("text", ATTACK)]) as provider:
        page, _ = open_page(provider, response=response, text=Pieces())
        ask(page, ATTACK)
        for name in ("Device", "Cloud", "Collab"):
            assert content(page, name) == ATTACK
            assert ATTACK in column(page, name).locator("details .text").text_content()
        assert page.get_by_role("heading", name=ATTACK).count() == 1
        assert ATTACK in page.locator(".tokens").inner_text()

        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        saved = json.loads(download.value.path().read_text())
        answer = saved["turns"][0]["answers"]["collab"]
        answer.update(model=ATTACK, error=ATTACK)
        answer["collab"].update(answered_by=ATTACK, reason=ATTACK)
        (tmp_path / "attack.json").write_text(json.dumps(saved))
        page.get_by_label("Import").set_input_files(tmp_path / "attack.json")
        column(page, "Collab").get_by_text(f"the {ATTACK} answered").wait_for()
    assert page.locator("img, .page script").count() == 0
    assert page.evaluate("typeof hacked") == "undefined"


# ------------------------------------------------------------------------------ the margin line


def test_the_line_is_dragged_and_says_where_it_would_have_called(open_page):
    page, _ = open_page(margins={6: -2.0, 9: -1.0})
    page.get_by_label("Ask device and cloud as well").uncheck()
    ask(page)
    verdict, label = page.locator(".verdict"), page.get_by_text("here it would have called")
    assert "does not call: the largest margin is −1.00" in verdict.inner_text()
    assert not label.is_visible()

    box = page.locator(".trace .grip").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 5, page.locator(".trace circle.dot").nth(6).bounding_box()["y"] + 8)
    page.mouse.up()
    assert f"it calls at step 7 of {STEPS}" in verdict.inner_text() and label.is_visible()
    assert (
        page.locator(".tokens .call").inner_text()
        == page.locator(".tokens span").nth(6).inner_text()
    )
    assert -5 < float(line(page).get_attribute("aria-valuenow")) < -2

    page.mouse.move(box["x"] + 5, middle)  # let go: it stays
    assert f"it calls at step 7 of {STEPS}" in verdict.inner_text()
    at = float(line(page).get_attribute("aria-valuenow"))
    line(page).press("ArrowUp")
    assert float(line(page).get_attribute("aria-valuenow")) == pytest.approx(at + 0.1, abs=0.011)
    line(page).press("End")
    assert "does not call" in verdict.inner_text()
    line(page).press("Home")
    assert f"it calls at step 1 of {STEPS}" in verdict.inner_text()


def test_collab_asks_at_the_line(open_page):
    with Provider() as provider:
        page, server = open_page(provider, {6: -2.0})
        ask(page)
        assert server.service.engine.jobs[-1].bias == 0
        line(page).press("PageDown")
        line(page).press("PageDown")
        line(page).press("ArrowDown")
        threshold = float(line(page).get_attribute("aria-valuenow"))
        page.get_by_role("button", name="Ask collab at this line").click()
        page.get_by_role("button", name="Send").wait_for()
        assert server.service.engine.jobs[-1].bias == pytest.approx(-threshold, abs=0.006)
        assert content(page, "Collab") == "42" and "crossed" in column(page, "Collab").inner_text()
        assert ledger(page)["Collab"][:2] == ["2", "1"]
        page.get_by_role("button", name="Back to the budget's bias").click()
        assert "does not call" in page.locator(".verdict").inner_text()
        report = server.service.controller.report()
        assert report["queries"] == 1  # what the line has sent is none of the budget's


def test_pointing_at_the_chart_names_the_token(open_page):
    page, _ = open_page(margins={0: -2.5})
    page.get_by_label("Ask device and cloud as well").uncheck()
    ask(page)
    dot = page.locator(".trace circle.dot").first
    # The chart may be drawn anew just then, and a dot that is taken away has no place.
    place = next(box for _ in range(100) if (box := dot.bounding_box()))
    page.mouse.move(place["x"] + 1, place["y"] + 30)
    assert page.get_by_text("step 1, “<think>”: margin −2.50").is_visible()
    assert page.locator(".tokens .at").inner_text() == "<think>"


# ----------------------------------------------------------------------------------- the budget


def test_the_budget_asks_for_the_key_only_then_and_keeps_it_nowhere(open_page):
    page, server = open_page()
    slider, key = page.get_by_role("slider", name="Budget"), page.get_by_label("operator's key")
    page.get_by_text("30 %").first.wait_for()  # the server's, before any question
    assert not key.is_visible()
    slider.press("ArrowRight")
    assert key.is_visible() and server.service.controller.report()["target_call_rate"] == 0.3
    key.fill("another's")
    key.press("Enter")
    page.get_by_text("the operator's key is needed").wait_for()
    assert server.service.controller.report()["target_call_rate"] == 0.3
    slider.fill("31")
    key.fill(KEY)
    key.press("Enter")
    key.wait_for(state="hidden")
    assert server.service.controller.report()["target_call_rate"] == 0.31
    slider.press("End")
    page.locator("#budget-value", has_text="100 %").wait_for()
    for _ in range(100):
        if server.service.controller.report()["target_call_rate"] == 1.0:
            break
        page.wait_for_timeout(20)
    assert server.service.controller.report()["target_call_rate"] == 1.0
    stored = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )
    assert stored == '[{},{},""]' and key.input_value() == ""
    page.reload()
    assert page.evaluate("state.key") == ""


# ------------------------------------------------------------------------------------ the files


def test_a_conversation_goes_out_and_comes_back(open_page, tmp_path):
    with Provider() as provider:
        page, _ = open_page(provider, CALLS)
        ask(page)
        ask(page, "second")
        shown = page.locator("#turns").inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert KEY not in path.read_text()
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
        page.get_by_label("Import").set_input_files(path)
        page.locator("article").nth(1).wait_for()
        assert page.locator("#turns").inner_text() == shown
        requests = provider.requests
        page.wait_for_timeout(100)
        assert provider.requests == requests  # nothing is asked again


@pytest.mark.parametrize(
    "contents",
    [
        "no JSON",
        "[]",
        '{"format": "other", "version": 1, "turns": []}',
        '{"format": "collab_jax playground", "version": 2, "turns": []}',
        '{"format": "collab_jax playground", "version": 1, "turns": [{"question": 1}]}',
        '{"format": "collab_jax playground", "version": 1, "turns":'
        ' [{"question": "q", "answers": {"device": {"state": "done"}}}]}',
    ],
)
def test_a_file_that_is_none_is_refused_and_changes_nothing(open_page, tmp_path, contents):
    page, _ = open_page()
    page.get_by_label("Ask device and cloud as well").uncheck()
    ask(page)
    (tmp_path / "bad.json").write_text(contents)
    page.get_by_label("Import").set_input_files(tmp_path / "bad.json")
    page.get_by_text("This file holds no conversation").wait_for()
    assert page.locator("article").count() == 1


# ------------------------------------------------------------------------------------- its looks


def luminance(colour):
    """Of `rgb(r, g, b)`, by WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_all_text_can_be_read_in_both_colours(open_page, colours):
    """WCAG's 4.5 to 1 for text; 3 to 1 for the edge of what can be operated."""
    page, _ = open_page(color_scheme=colours)
    style = "(name) => getComputedStyle(document.querySelector(name[0]))[name[1]]"
    read = lambda selector, name: page.evaluate(style, [selector, name])  # noqa: E731
    paper = read("body", "backgroundColor")
    assert (luminance(paper) > 0.5) == (colours == "light")
    ask(page)
    card = read(".answer", "backgroundColor")
    for selector in ("body", ".soft", ".answer.collab h3", ".wrong", ".about", "summary"):
        for ground in (paper, card):
            assert contrast(read(selector, "color"), ground) >= 4.5, selector
    send = "#send"
    assert contrast(read(send, "color"), read(send, "backgroundColor")) >= 4.5
    assert contrast(read("#question", "borderTopColor"), paper) >= 3


@pytest.mark.parametrize("width", [360, 1240])
def test_nothing_is_wider_than_the_window(open_page, width):
    """Columns stand side by side where there is room, and aligned, and below each other else."""
    page, _ = open_page(viewport={"width": width, "height": 780})
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [column(page, name).bounding_box() for name in ("Device", "Cloud", "Collab")]
    tops, lefts = {box["y"] for box in boxes}, {box["x"] for box in boxes}
    assert (len(tops), len(lefts)) == ((3, 1) if width == 360 else (1, 3))
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    contents = [column(page, n).locator(".content").bounding_box() for n in ("Device", "Collab")]
    assert width == 360 or contents[0]["y"] == contents[1]["y"]
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send["y"] + send["height"] <= 780 and send["height"] >= 36
    chart = page.locator(".trace svg").bounding_box()
    assert chart["width"] > 0.6 * min(width, 900)


def test_every_control_has_a_name(open_page):
    page, _ = open_page()
    ask(page)
    page.get_by_role("button", name="Edit").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role=slider]")]
        .filter((node) => !(node.textContent.trim() || node.ariaLabel
          || [...(node.labels ?? [])].some((label) => label.textContent.trim())))
        .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    regions = ("Device", "Cloud", "Collab", "Budget", "Ledger of this page")
    assert all(page.get_by_role("region", name=name, exact=True).count() for name in regions)
