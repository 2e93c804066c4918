"""The broker's page in a real browser: it shows the state of the queue, or that the broker is gone."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (the test extra has it)")

from browser import CHROMIUM, CONTRASTS, DRIVER, PATIENCE, WITHOUT, Browser
from stub_broker import PAGE, stub

from gateway_queue_sync import (
    LargeBotQueue,
    LocalQueue,
    Permit,
    SessionStartLimit,
    limit_reader,
    serve,
)
from gateway_queue_sync.testing import FakeClock

pytestmark = pytest.mark.slow  # in a browser

HOST = "127.0.0.1"
NO_CONTRAST_BELOW = 4.5  # WCAG 2, level AA


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(WITHOUT)
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The one browser, on a desktop, and with nothing kept; at the end its console must be empty."""
    chromium.driver.get("about:blank")
    chromium.size(1100)
    chromium.scheme("light")
    chromium.console()
    yield chromium
    assert chromium.console() == []


def a_queue(
    clock: FakeClock, *, max_concurrency: int = 2, total: int = 1000, remaining: int = 900
) -> LargeBotQueue:
    limit = SessionStartLimit(total, remaining, 7200.0, max_concurrency)
    return LargeBotQueue(limit, clock=clock, interval=5.0, margin=0.2)


def wait_in_line(queue: LargeBotQueue | LocalQueue, shards: int) -> list[Future[Permit]]:
    """Shards 0 and up ask; the first of each bucket is granted, all others wait."""
    return [queue.enqueue(shard_id) for shard_id in range(shards)]


def advance(queue: LargeBotQueue, clock: FakeClock, by: float, waiting: int) -> None:
    """Let time pass until so many are left in line."""
    clock.advance(by)
    give_up = time.monotonic() + PATIENCE
    while queue.snapshot().waiting != waiting:
        assert time.monotonic() < give_up, queue


def watch(browser: Browser, url: str, *, until: str = "live") -> None:
    browser.driver.get(f"{url}/status")
    reach(browser, until)


def look_again(browser: Browser, state: str) -> None:
    """Come back to the tab, which asks at once then."""
    browser.run("document.dispatchEvent(new Event('visibilitychange'))")
    reach(browser, state)


def reach(browser: Browser, state: str) -> None:
    browser.until(lambda: browser.text("#state") == state, state)


def drop_failed_requests(browser: Browser) -> int:
    """Leave the page, and return how many of its requests failed, which the console shows."""
    browser.driver.get("about:blank")
    lines = browser.console()
    assert all(line.startswith("network: ") and "Failed to load" in line for line in lines), lines
    return len(lines)


def lasting(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def without_clock(rows: list[str]) -> list[list[str]]:
    """The cells of a table's rows but for the time of day."""
    return [re.split(r"\t", row)[:3] for row in rows]


def share(browser: Browser, bar: str) -> float:
    """How much of a bar is filled."""
    return browser.run(
        """const bar = document.querySelector(arguments[0]);
        return bar.firstElementChild.getBoundingClientRect().width / bar.clientWidth""",
        bar,
    )


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    page = PAGE.read_text("utf-8")
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|innerHTML|\son\w+=", page)


def test_the_numbers_equal_the_snapshot(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        wait_in_line(queue, 30)
        advance(queue, clock, 1.3, waiting=28)
        seen = queue.snapshot()
        watch(browser, broker.url)
        assert browser.text("#waiting") == "28" == str(seen.waiting)
        assert browser.text("#waiting-in") == "in 2 of 2 buckets"
        assert browser.text("#granted") == "2" == str(seen.granted)
        assert browser.text("#next-in") == lasting(seen.buckets[0].shards[0].eta or 0) == "3.9 s"
        assert browser.text("#next-who") == "to shard 2"
        assert browser.text("#last-in") == lasting(seen.buckets[1].shards[-1].eta or 0)
        for bucket in seen.buckets:
            card = f"[data-bucket='{bucket.bucket}']"
            assert browser.text(f"{card} h3") == f"Bucket {bucket.bucket}"
            assert browser.text(f"{card} [data-summary]") == "14 waiting, ready in 3.9 s"
            assert without_clock(browser.texts(f"{card} tbody tr")) == [
                [str(shard.shard_id), lasting(shard.waited), lasting(shard.eta or 0)]
                for shard in bucket.shards[:5]
            ]
            assert browser.text(f"{card} [data-more]").startswith(
                f"and 9 more, the last due in {lasting(bucket.shards[-1].eta or 0)} ("
            )
        assert browser.text("#limit-text") == "898 of 1,000 left"
        assert browser.text("#limit-resets").endswith(", in 1 h 59 min")
        assert share(browser, "#limit-bar") == pytest.approx(0.898, abs=0.01)


def test_times_of_day_are_those_of_the_computer_that_shows_them(
    browser: Browser, clock: FakeClock
) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        wait_in_line(queue, 4)
        browser.do("Emulation.setTimezoneOverride", timezoneId="Asia/Kathmandu")
        watch(browser, broker.url)
        now = browser.run("return Date.now() / 1000")
        shown = browser.text("#limit-resets")
        browser.do("Emulation.setTimezoneOverride", timezoneId="")
        at = re.search(r"(\d\d):(\d\d):(\d\d), in 2 h 0 min", shown)
        assert at is not None, shown
        hours, minutes, seconds = map(int, at.groups())
        expected = now + 7200 + (5 * 60 + 45) * 60
        assert (hours * 3600 + minutes * 60 + seconds - expected + 43_200) % 86_400 == (
            pytest.approx(43_200, abs=5)
        )


def test_it_changes_as_shards_are_granted(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        wait_in_line(queue, 2)
        watch(browser, broker.url)
        wait_in_line(queue, 8)
        for left in (8, 6):
            browser.until(lambda left=left: browser.text("#waiting") == str(left), f"{left} left")
            assert browser.text("#granted") == str(10 - left)
            assert (
                browser.text("#fleet-text") == f"{8 - left} of 8 shards have a permit, {left} wait"
            )
            assert share(browser, "#fleet-bar") == pytest.approx((8 - left) / 8, abs=0.01)
            assert browser.text("[data-bucket='1'] tbody tr").startswith(f"{9 - left} ")
            assert browser.driver.title == f"{left} waiting · Gateway queue"
            advance(queue, clock, 5.2, waiting=left - 2)
        for left in (2, 0):
            advance(queue, clock, 5.2, waiting=left)
        look_again(browser, "live")
        browser.until(lambda: browser.text("#waiting") == "0", "the end")
        assert browser.text("#fleet-text") == "Done: 8 shards have a permit"
        assert share(browser, "#fleet-bar") == pytest.approx(1.0, abs=0.01)


def test_opened_in_the_midst_of_a_start_it_counts_what_was_granted(
    browser: Browser, clock: FakeClock
) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        for shard_id in range(2):
            assert b"free to connect" in urlopen(f"{broker.url}/?shard={shard_id}").read()
        wait = [queue.enqueue(shard_id) for shard_id in range(2, 8)]
        clock.advance(5.0)
        watch(browser, broker.url)
        assert browser.text("#fleet-text") == "2 of 8 shards have a permit, 6 wait"
        assert re.match(r"Last: shard 1, \d\.\d s ago$", browser.text("#timeline-past"))
        assert browser.text("#timeline-next").startswith("Next: shard 2, in 0.2 s (")
        past, future = (
            browser.find(f"#{path}").get_attribute("d").count("M") for path in ("past", "next")
        )
        assert (past, future) == (2, len(wait))


def test_nobody_waits(browser: Browser, clock: FakeClock) -> None:
    with (
        a_queue(clock, max_concurrency=5) as queue,
        browser.on(serve(queue, HOST, 0)) as broker,
    ):
        queue.enqueue(3)
        watch(browser, broker.url)
        assert browser.text("#nobody") == "Nobody waits."
        assert browser.texts("#cards article") == browser.texts("#all") == []
        assert browser.text("#waiting") == "0"
        assert browser.text("#next-who") == browser.text("#last-at") == "nobody waits"
        assert browser.text("#fleet-text") == "No shards are starting"
        assert browser.text("#timeline-past") == "No permit from this broker yet"
        assert browser.text("#timeline-next") == "Nobody waits"
        assert browser.text("#resting") == "Empty, and closed after a permit: bucket 3"
        assert browser.text("#ready") == "Empty, and open: buckets 0-2, 4"


def test_a_limit_that_is_not_kept_or_not_begun_or_all_reserve(
    browser: Browser, clock: FakeClock
) -> None:
    with (
        LocalQueue(clock=clock) as queue,
        browser.on(stub(queue, HOST, 0)) as broker,
    ):
        watch(browser, broker.url)
        assert browser.text("#limit-text") == "This queue keeps no session start limit"
        assert browser.texts("#limit-bar") == []
        assert browser.texts("#rows") == []
        picture = asdict(queue.snapshot())
        line = [{"shard_id": 4, "waited": 90.0, "eta": None}]
        picture["buckets"] = [{"bucket": 0, "ready_in": 0.0, "shards": line}]
        picture |= {"waiting": 1, "limit": {"total": 9, "remaining": 9, "resets_in": 0.0}}
        broker.instead["/status.json"] = 200, json.dumps(picture)
        watch(browser, broker.url)
        assert browser.text("#limit-resets") == "A new period begins with the next permit"
        assert without_clock(browser.texts("tbody tr")) == [["4", "1 min 30 s", "never"]]
        assert browser.text("#next-in") == browser.text("#last-in") == "never"
        assert browser.text("#fleet-due").endswith("never: the reserve is the whole limit")
        assert browser.text("[data-summary]") == (
            "1 waiting, ready never: the reserve is the whole limit"
        )


def test_a_limit_that_is_not_known_yet(
    browser: Browser, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_reader, "log", logging.getLogger("gateway_queue_sync.elsewhere"))

    def unreachable() -> SessionStartLimit:
        raise OSError("not now")

    with (
        LargeBotQueue(None, refresh=unreachable, clock=clock) as queue,
        browser.on(serve(queue, HOST, 0)) as broker,
    ):
        watch(browser, broker.url)
        assert browser.text("#limit-text") == "Not known yet"
        assert browser.texts("#limit-bar") == []
        assert browser.text("#limit-resets") == ""
        assert browser.text("#last-at") == browser.text("#next-who") == "nobody waits"
        wait_in_line(queue, 7)
        browser.until(lambda: browser.text("#waiting") == "7", "all wait")
        assert browser.text("#next-in") == browser.text("#last-in") == "not known"
        assert browser.text("#last-at") == "when the limit is known"
        assert browser.text("#fleet-due") == "The last is due when the limit is known"
        assert browser.text("#timeline-next") == "Next: shard 0, when the limit is known"
        assert browser.text("[data-summary]") == "7 waiting, ready when the limit is known"
        assert [row[2] for row in without_clock(browser.texts("tbody tr"))] == ["not known"] * 5
        assert browser.text("[data-more]") == "and 2 more, the last due when the limit is known"
        assert "never" not in browser.text("main")
        queue.update(SessionStartLimit(1000, 900, 7200.0, 1))
        browser.until(lambda: browser.text("#limit-text") == "899 of 1,000 left", "it is known")
        assert browser.text("#fleet-due").startswith("The last is due in ")


@pytest.mark.parametrize(
    ("remaining", "reserve", "text", "bars", "level"),
    [
        (900, 0, "900 of 1,000 left", (0.9, 0.0), "fine"),
        (900, 50, "850 of 1,000 left, and 50 in reserve", (0.85, 0.05), "fine"),
        (120, 50, "70 of 1,000 left, and 50 in reserve", (0.07, 0.05), "low"),
        (999, 999, "Used up: the last 999 of 1,000 are kept in reserve", (0.0, 0.999), "out"),
        (30, 50, "Used up: the last 30 of 1,000 are kept in reserve", (0.0, 0.03), "out"),
        (0, 0, "Used up: 0 of 1,000 left", (0.0, 0.0), "out"),
    ],
)
def test_the_reserve_is_not_shown_as_left(
    browser: Browser,
    clock: FakeClock,
    remaining: int,
    reserve: int,
    text: str,
    bars: tuple[float, float],
    level: str,
) -> None:
    limit, usable = SessionStartLimit(1000, remaining, 7200.0, 2), remaining - reserve
    with (
        LargeBotQueue(limit, clock=clock, reserve=reserve) as queue,
        browser.on(serve(queue, HOST, 0)) as broker,
    ):
        queue.enqueue(0), queue.enqueue(2)
        watch(browser, broker.url)
        text = text if level == "out" else text.replace(str(usable), str(usable - 1))
        assert browser.text("#limit-text") == text
        opens = "after the reset" if level == "out" else "in 5.3 s"
        assert browser.text("[data-bucket='0'] [data-summary]").endswith(f"waiting, ready {opens}")
        shown = """const bar = document.querySelector("#limit-bar");
            return [...bar.children].map((e) => e.getBoundingClientRect().width / bar.clientWidth)"""
        assert browser.run(shown) == pytest.approx(bars, abs=0.005)
        assert browser.find("#limit").get_attribute("data-level") == level
        assert browser.find("#limit-bar").get_attribute("aria-valuetext") == text


def test_two_days_and_more_are_shown_as_days(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        shards = [{"shard_id": 1, "waited": 172_700.0, "eta": 3 * 86_400.0 + 7_300}]
        line = {"bucket": 0, "ready_in": 0.0, "shards": shards}
        broker.instead["/status.json"] = 200, json.dumps(FINE_STATUS | {"buckets": [line]})
        watch(browser, broker.url)
        assert without_clock(browser.texts("tbody tr")) == [["1", "47 h 58 min", "3 d 2 h"]]


def test_the_banner_stays_in_sight(browser: Browser, clock: FakeClock) -> None:
    browser.size(360, 740)
    with (
        a_queue(clock, max_concurrency=16) as queue,
        browser.on(stub(queue, HOST, 0)) as broker,
    ):
        wait_in_line(queue, 200)
        watch(browser, broker.url)
        broker.instead["/status.json"] = 500, ""
        look_again(browser, "gone")
        browser.run("scrollTo(0, 3000)")
        browser.until(lambda: browser.run("return scrollY") > 1000, "the end of the page")
        top, bottom = browser.run(
            """const banner = document.querySelector("#trouble > div").getBoundingClientRect();
            return [banner.top, banner.bottom]"""
        )
        assert 0 <= top < bottom < 740
    assert drop_failed_requests(browser)


@pytest.mark.parametrize("width", [360, 800, 1100])
def test_no_heading_breaks_inside_a_word(browser: Browser, clock: FakeClock, width: int) -> None:
    browser.size(width, 740)
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        broker.instead["/status.json"] = 200, json.dumps(WIDE_STATUS)
        watch(browser, broker.url)
        lines = """return [...document.querySelectorAll("th")].map((e) => {
            const range = document.createRange();
            range.selectNodeContents(e);
            return range.getClientRects().length})"""
        assert {*browser.run(lines)} == {1}


def test_a_broker_that_is_gone_and_comes_back(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue:
        wait_in_line(queue, 10)
        with serve(queue, HOST, 0) as broker:
            watch(browser, broker.url)
            url = broker.url
            colour = browser.find("#waiting").value_of_css_property("color")
        since = browser.run("return Date.now()")
        look_again(browser, "gone")
        assert browser.text("#trouble strong") == "Broker unavailable"
        assert "it does not answer" in browser.text("#trouble")
        shown = browser.run("return Date.parse(document.querySelector('#trouble-since').dateTime)")
        assert since <= shown <= browser.run("return Date.now()")
        assert browser.text("#trouble-since") in browser.text("#trouble")
        assert browser.text("#waiting") == "8"
        assert browser.find("#waiting").value_of_css_property("color") != colour
        with serve(queue, HOST, int(url.rpartition(":")[2])):
            reach(browser, "live")  # by itself
            assert browser.texts("#trouble strong") == []
            assert browser.find("#waiting").value_of_css_property("color") == colour
        look_again(browser, "gone")
        again = browser.run("return Date.parse(document.querySelector('#trouble-since').dateTime)")
        assert again > shown
    assert drop_failed_requests(browser)


def test_an_error_is_no_news(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        broker.instead["/status.json"] = 503, "{}"
        watch(browser, broker.url, until="gone")
        assert "it answers with status 503" in browser.text("#trouble")
        assert browser.texts("main") == browser.texts("#trouble-seen") == []
        del broker.instead["/status.json"]
        look_again(browser, "live")
    assert drop_failed_requests(browser) == 1


FINE_STATUS: dict[str, Any] = {"waiting": 0, "granted": 0, "buckets": [], "limit": None}
FINE_RECENT: dict[str, Any] = {"window": 5, "keeps_limit": True, "reserve": 0, "grants": []}
A_SHARD = {"shard_id": 0, "waited": 0.0, "eta": 0.0}


def a_line(*shards: object) -> dict[str, Any]:
    return FINE_STATUS | {"buckets": [{"bucket": 0, "ready_in": 0.0, "shards": shards}]}


NONSENSE: dict[str, list[object]] = {
    "/status.json": [
        *(None, {}),
        *(FINE_STATUS | {"waiting": wrong} for wrong in (-1, 0.5, "<img src=x>")),
        *(FINE_STATUS | {"buckets": wrong} for wrong in ({}, [None])),
        *(FINE_STATUS | {"limit": wrong} for wrong in (0, {"total": 1, "remaining": 1})),
        *(a_line(A_SHARD | wrong) for wrong in ({"eta": "1"}, {"waited": -1}, {"shard_id": "<"})),
        *(a_line(A_SHARD | {"eta": wrong}) for wrong in (float("nan"), 1e999)),
    ],
    "/recent.json": [
        *(None, {}),
        *(FINE_RECENT | {"window": wrong} for wrong in ("5", -1)),
        *(FINE_RECENT | {"keeps_limit": wrong} for wrong in (None, 0, "true")),
        *(FINE_RECENT | {"reserve": wrong} for wrong in (None, -1, "0")),
        *(FINE_RECENT | {"grants": wrong} for wrong in (None, [{}])),
    ],
}


def test_nonsense_is_told_from_a_snapshot(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        for path, answers in NONSENSE.items():
            texts = ["", "<html>", *map(json.dumps, answers)]
            for text in texts:
                broker.instead = {path: (200, text)}
                watch(browser, broker.url, until="unreadable")
                assert browser.text("#trouble strong") == "Broker unreadable", text
                assert path[1:] in browser.text("#trouble"), text
        broker.instead = {}
        look_again(browser, "live")


def test_numbers_beyond_all_reason_are_shown(browser: Browser, clock: FakeClock) -> None:
    huge = {"shard_id": 2**53, "waited": 1e300, "eta": 1e300}
    limit = {"total": 0, "remaining": 10**15, "resets_in": 1e300}
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        broker.instead["/status.json"] = 200, json.dumps(a_line(huge) | {"limit": limit})
        watch(browser, broker.url)
        assert browser.text("tbody td") == str(2**53)


def test_waiters_of_whom_only_the_number_is_known_are_counted(
    browser: Browser, clock: FakeClock
) -> None:
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        broker.instead["/status.json"] = 200, json.dumps(a_line(A_SHARD) | {"waiting": 1_235})
        watch(browser, broker.url)
        assert browser.text("#waiting") == "1,235"
        assert browser.text("#counted").startswith("And 1,234 more: ")
        assert browser.text("#last-at").endswith(", of those below")
        assert browser.text("#fleet-due").startswith("The last of those below is due in ")
        broker.instead["/status.json"] = 200, json.dumps(a_line(A_SHARD) | {"waiting": 1})
        browser.until(lambda: browser.text("#counted") == "", "all are known")
        assert browser.text("#fleet-due").startswith("The last is due in ")


def test_a_secret_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, clock: FakeClock
) -> None:
    def give(secret: str) -> None:
        browser.find("#secret").send_keys(secret + "\n")

    with (
        a_queue(clock) as queue,
        browser.on(serve(queue, HOST, 0, secret="opensesame")) as broker,
    ):
        wait_in_line(queue, 6)
        watch(browser, broker.url, until="locked")
        assert browser.texts("main") == []
        assert browser.run("return document.activeElement.id") == "secret"
        assert browser.texts("#wrong") == [""]
        give("pläin wrong ☃")
        browser.until(lambda: browser.text("#wrong") == "That secret is wrong.", "no")
        assert browser.find("#secret").get_attribute("aria-invalid") == "true"
        assert browser.find("#secret").get_attribute("value") == ""
        give("opensesame")
        reach(browser, "live")
        assert browser.text("#waiting") == "4"
        assert browser.texts("#locked") == []
        kept = "return [{...sessionStorage}, {...localStorage}, document.cookie]"
        assert browser.run(kept) == [{"gateway-queue-secret": "opensesame"}, {}, ""]
        watch(browser, broker.url)  # a reload needs no more asking
        assert drop_failed_requests(browser) == 2  # without a secret, and with the wrong one
        browser.driver.switch_to.new_window("tab")
        watch(browser, broker.url, until="locked")
        assert drop_failed_requests(browser) == 1
        browser.driver.close()
        browser.driver.switch_to.window(browser.driver.window_handles[0])


WIDE_SHARD = {"shard_id": 2**53, "waited": 999_999.0, "eta": 99_999_999.0}
WIDE_STATUS = {
    "waiting": 10**15,
    "granted": 10**15,
    "buckets": [
        *({"bucket": 10**9, "ready_in": 99_999.0, "shards": [WIDE_SHARD] * 7} for _ in range(20)),
        *({"bucket": number, "ready_in": number % 4, "shards": []} for number in range(0, 200, 2)),
    ],
    "limit": {"total": 10**15, "remaining": 10**14, "resets_in": 99_999_999.0},
}
NOT_DUE = {"bucket": 10**9, "ready_in": 0.0, "shards": [WIDE_SHARD | {"eta": None}] * 7}
WIDE = {
    "live": WIDE_STATUS,
    "gone": WIDE_STATUS,
    "never": WIDE_STATUS | {"buckets": [NOT_DUE]},
    "not known": WIDE_STATUS | {"buckets": [NOT_DUE], "limit": None},
}


@pytest.mark.parametrize("state", [*WIDE, "nobody", "locked"])
def test_nothing_is_wider_than_a_small_telephone(
    browser: Browser, clock: FakeClock, state: str
) -> None:
    browser.size(360, 740)
    secret = "s" if state == "locked" else None
    with (
        a_queue(clock) as queue,
        browser.on(stub(queue, HOST, 0, secret=secret)) as broker,
    ):
        if state in WIDE:
            broker.instead["/status.json"] = 200, json.dumps(WIDE[state])
        watch(browser, broker.url, until="locked" if secret else "live")
        if state == "gone":
            broker.instead["/status.json"] = 500, ""
            look_again(browser, "gone")
        sticks_out = """const root = document.documentElement;
            return [...document.querySelectorAll("html, body *")].filter((e) => e.checkVisibility()
            && (e.scrollWidth > e.clientWidth || e.getBoundingClientRect().right > root.clientWidth)
            && getComputedStyle(e).display !== "inline").map((e) => e.outerHTML.slice(0, 200))"""
        assert browser.run(sticks_out) == []
    assert (drop_failed_requests(browser) > 0) == (state in ("gone", "locked"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_light_and_dark(
    browser: Browser, clock: FakeClock, scheme: str
) -> None:
    browser.scheme(scheme)
    with (
        a_queue(clock, remaining=50) as queue,
        browser.on(stub(queue, HOST, 0, secret="s")) as broker,
    ):
        wait_in_line(queue, 30)

        def check() -> None:
            contrasts = browser.run(CONTRASTS)
            assert len(contrasts) > 5
            assert min(contrasts) > [NO_CONTRAST_BELOW], min(contrasts)

        watch(browser, broker.url, until="locked")
        browser.find("#secret").send_keys("wrong\n")
        browser.until(lambda: browser.text("#wrong"), "no")
        check()
        browser.find("#secret").send_keys("s\n")
        reach(browser, "live")
        check()
        ground = browser.find("body").value_of_css_property("background-color")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 64) == (scheme == "dark")
        broker.instead["/status.json"] = 500, ""
        look_again(browser, "gone")
        check()
    assert drop_failed_requests(browser)


def test_ten_thousand_in_a_line_are_summed_up(browser: Browser, clock: FakeClock) -> None:
    with (
        a_queue(clock, max_concurrency=1) as queue,
        browser.on(serve(queue, HOST, 0)) as broker,
    ):
        wait_in_line(queue, 10_001)
        watch(browser, broker.url)
        assert browser.text("#waiting") == "10,000"
        assert len(browser.texts("tbody tr")) == 5
        assert browser.text("[data-more]").startswith("and 9,995 more, the last due in ")
        assert browser.run("return document.querySelectorAll('*').length") < 300


def test_of_many_buckets_the_first_are_shown_until_one_asks_for_all_by_keyboard(
    browser: Browser, clock: FakeClock
) -> None:
    with (
        a_queue(clock, max_concurrency=256) as queue,
        browser.on(serve(queue, HOST, 0)) as broker,
    ):
        wait_in_line(queue, 256 * 3 - 6)
        watch(browser, broker.url)
        assert len(browser.texts("#cards article")) == 12
        assert browser.text("#all") == "Show 244 more buckets, where 482 wait"
        browser.driver.switch_to.active_element.send_keys("\t")
        assert browser.run("return document.activeElement.id") == "all"
        browser.driver.switch_to.active_element.send_keys("\n")
        assert len(browser.texts("#cards article")) == 256
        assert browser.find("#all").get_attribute("aria-expanded") == "true"
        assert browser.texts("#resting, #ready") == ["", ""]
        browser.driver.switch_to.active_element.send_keys("\n")
        assert len(browser.texts("#cards article")) == 12


def test_what_is_drawn_is_said_in_words_too(browser: Browser, clock: FakeClock) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        wait_in_line(queue, 10)
        watch(browser, broker.url)
        nodes = browser.do("Accessibility.getFullAXTree")["nodes"]
        said = {
            (node["role"]["value"], node["name"]["value"]): node
            for node in nodes
            if not node["ignored"] and "name" in node
        }
        fleet = said["progressbar", "Start of the fleet"]
        assert fleet["value"]["value"] == 0
        budget = said["meter", "Session starts left today"]
        assert budget["value"]["value"] == 898
        timeline = said["image", "Last and next permits"]
        assert "Next: shard 2, in 5.2 s" in timeline["description"]["value"]
        assert ("table", "The first in the line of bucket 0") in said


def test_it_asks_its_own_broker_alone_and_for_no_more_than_it_needs(
    browser: Browser, clock: FakeClock
) -> None:
    with a_queue(clock) as queue, browser.on(stub(queue, HOST, 0)) as broker:
        watch(browser, broker.url)
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert {*browser.run(script)} <= {
            f"{broker.url}/{name}.json" for name in ("status", "recent")
        }
        assert {*broker.asked} == {"/status", "/status.json", "/recent.json"}


def test_it_asks_each_second_but_seldom_while_nobody_looks(
    browser: Browser, clock: FakeClock
) -> None:
    with a_queue(clock) as queue, browser.on(serve(queue, HOST, 0)) as broker:
        watch(browser, broker.url)
        browser.run(
            """const real = setTimeout;
            window.pauses = [];
            window.setTimeout = (call, ms) => (pauses.push(ms), real(call, ms));
            Object.defineProperty(document, "hidden", {value: false, writable: true})"""
        )
        for hidden, pauses in ((False, 1), (True, 2), (False, 3)):
            browser.run("document.hidden = arguments[0]", hidden)
            if not hidden:
                look_again(browser, "live")
            started = time.monotonic()
            browser.until(lambda n=pauses: len(browser.run("return pauses")) >= n, "it asks")
            assert time.monotonic() - started < 8
        first, unseen, seen = browser.run("return pauses")
        assert unseen == 10_000
        assert 1000 <= first < 10_000
        assert 1000 <= seen < 10_000
