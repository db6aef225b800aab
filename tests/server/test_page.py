"""The page, in a browser where there is one: what is spoken arrives, is searched and played."""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from conftest import ROOT, tone, write_media
from support.journals import NOON, alert, sound, text, write
from support.servers import running
from support.sources import decode
from support.web import wait_for

from mmtransfer.monitoring import MonitorOptions, Partial, Session, SourceEvent, Transcript
from mmtransfer.monitoring.events import Occurrence
from mmtransfer.monitoring.stats import MonitorStats

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    "--autoplay-policy=no-user-gesture-required",
]
SECRET = "Call <img src=x onerror=alert(1)> & <script>alert(2)</script> now."


@pytest.fixture
def place(tmp_path):
    """A journal of a camera with a clip, of one without, and of a recording."""
    recording = write_media(tmp_path / "talk.wav", tone(40.0))
    clip = tmp_path / "clips" / "gate" / f"gate@{NOON:.3f}.mkv"
    clip.parent.mkdir(parents=True)
    write_media(clip, tone(12.0))
    fire = text("gate", NOON, "There is a fire at the gate.", sentiment="negative")
    spoken = {**text("talk", 20.0, "This lies in a recording."), "source": str(recording)}
    shout = text("<b>yard</b>", NOON + 60, SECRET)
    lines = (fire, {**alert(fire, "fire"), "clip": str(clip)}, shout, sound("gate", NOON + 90))
    write(tmp_path / "journal", "2025-11-25", *lines, spoken)
    return tmp_path


@pytest.fixture(autouse=True)
def _engine(fake_recognizer):
    """What a server decodes with."""
    fake_recognizer(lambda context_s: "some words here")


@contextmanager
def served(place):
    with running(journal=place / "journal") as server:
        wait_for(lambda: server.state.indexer.index.search().hits)
        yield server


def get(server, path, **options):
    return httpx2.get(server.url + path, **options)


# --- what it asks for ----------------------------------------------------------------------------


def test_the_search_answers_with_lines_and_no_path(place):
    with served(place) as server:
        found = get(server, "/api/search?q=fire&alert=*&sentiment=negative").json()
        assert [hit["text"] for hit in found["hits"]] == ["There is a fire at the gate."]
        assert found["hits"][0]["alerts"] == ["fire"]
        assert found["cursor"] is None
        one = get(server, "/api/search?limit=1").json()
        two = get(server, f"/api/search?limit=1&cursor={one['cursor']}").json()
        assert one["hits"][0]["at"] > two["hits"][0]["at"]
        names = get(server, "/api/names").json()
        assert names["alert"] == ["fire"]
        assert names["sound"] == ["loud"]
        parts = get(server, f"/api/timeline?after={NOON}&before={NOON + 120}&parts=2").json()
        assert parts["cameras"]["gate"] == [[1, 1, 0], [0, 0, 1]]
        for answer in (found, one, two, names, parts):
            assert str(place) not in json.dumps(answer)
            assert "10.0.0.7" not in json.dumps(answer)
        for wrong in ("after=soon", "cursor=x", "limit=nan"):
            assert get(server, f"/api/search?{wrong}").status_code == 400
        assert get(server, "/api/timeline?after=0&before=1e300").status_code == 400


def test_a_moment_of_a_recording_or_a_clip_is_a_slice_that_can_be_sought_in(place):
    with served(place) as server:
        hits = {hit["camera"]: hit for hit in get(server, "/api/search").json()["hits"]}
        talk = {name: hits["talk"][name] for name in ("camera", "id", "at")}
        moment = get(server, "/api/moment", params=talk).json()
        assert moment["start"] == 5.0
        assert moment["end"] == 7.0
        assert max(moment["peaks"]) > 0.2
        whole = get(server, "/api/audio", params=talk)
        assert whole.content[:4] == b"RIFF"
        assert whole.headers["accept-ranges"] == "bytes"
        assert len(whole.content) == 44 + 2 * 16_000 * 17  # from 5 s before it to 10 s after it
        for asked, expected in (("100-199", (100, 200)), ("-50", (-50, None)), ("44-", (44, None))):
            part = get(server, "/api/audio", params=talk, headers={"Range": f"bytes={asked}"})
            assert part.status_code == 206
            assert part.content == whole.content[slice(*expected)]
        late = get(server, "/api/audio", params=talk, headers={"Range": "bytes=9999999-"})
        assert late.status_code == 416
        fire = get(server, "/api/search?q=fire").json()["hits"][0]
        moment = get(server, "/api/moment", params={k: fire[k] for k in talk}).json()
        assert moment["start"] == pytest.approx(5.0, abs=0.1)  # the clip ends 5 s behind the line
        yard = hits["<b>yard</b>"]
        missing = get(server, "/api/moment", params={k: yard[k] for k in talk})
        assert missing.status_code == 404
        assert "no sound" in missing.json()["error"]
        assert get(server, "/api/audio?camera=gate&id=../../etc/passwd&at=0").status_code == 404


def test_the_sound_of_a_folders_recording_is_where_it_began(place):
    name = f"archive@{NOON + 500:.3f}"
    begun = {"camera": "archive", "event": "reading", "name": "talk.wav", "inode": 1}
    begun |= {"of": "archive", "at": NOON + 490, "size": 1, "probe": ""}
    line = {**text("archive", NOON + 500, "In a folder."), "source": str(place / "talk.wav")}
    write(place / "journal", "2025-11-25", begun, line)
    with served(place) as server:
        where = {"camera": "archive", "id": name, "at": NOON + 500}
        moment = get(server, "/api/moment", params=where).json()
        assert moment["start"] == 5.0  # it is at 10 s of the file


def test_live_items_reach_those_who_follow(place):
    with served(place) as server:
        server.state.stats = MonitorStats()
        server.state.stats.add_cameras(["gate"])
        got = []
        with httpx2.stream("GET", f"{server.url}/api/live", timeout=30) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = (line for line in answer.iter_lines() if line)
            got.append(json.loads(next(lines).removeprefix("data: ")))
            live = server.state.live
            live.put(Partial("gate", f"gate@{NOON:.3f}", NOON, NOON + 1, "Open"))
            live.put(Transcript(**text("gate", NOON, "Open it.")))
            path = f"{place}/x.mkv: full"
            live.put(SourceEvent("gate", Occurrence.NO_CLIP, NOON, path))
            while len([one for one in got if one["type"] != "cameras"]) < 3:
                got.append(json.loads(next(lines).removeprefix("data: ")))
        assert got[0]["type"] == "cameras"
        assert got[0]["cameras"][0]["name"] == "gate"
        partial, line, event = (one for one in got if one["type"] != "cameras")
        assert partial["text"] == "Open"
        assert (line["text"], line["at"]) == ("Open it.", NOON)
        assert event["event"] == "no clip"
        assert str(place) not in json.dumps(got)


def test_a_server_that_stops_lets_those_go_who_follow(place, caplog):
    with httpx2.Client(timeout=30) as client:
        with served(place) as server:
            answer = client.send(client.build_request("GET", f"{server.url}/api/live"), stream=True)
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
        assert all(not line or line.startswith("data: ") for line in lines)  # its end is whole
        answer.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_without_a_journal_the_search_says_so():
    with running() as server:
        assert get(server, "/").status_code == 200
        answer = get(server, "/api/search?q=fire")
        assert answer.status_code == 404
        assert "--journal" in answer.json()["error"]
        assert get(server, "/static/../page.py").status_code == 404
        assert get(server, "/static/index.html").status_code == 404
        policy = get(server, "/").headers["content-security-policy"]
        assert "unsafe" not in policy


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser, whose microphone gives a sentence with pauses again and again."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    spoken = np.pad(decode(ROOT / "examples" / "site" / "source" / "source_000.ogg"), 32_000)
    recording = write_media(tmp_path_factory.mktemp("microphone") / "spoken.wav", spoken)
    for flag in (*FLAGS, f"--use-file-for-fake-audio-capture={recording}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture
def browser(chromium):
    """An empty page, without messages of what another one asked a server for that has ended."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium


def find(browser, selector):
    return browser.find_element("css selector", selector)


def run(browser, script):
    return browser.execute_script(f"return {script}")


def play(browser, button):
    """Click a line; where playback began, once it goes on."""
    button.click()
    wait_for(lambda: run(browser, "document.getElementById('audio').currentTime > 0"), 30)
    wait_for(lambda: run(browser, "!document.getElementById('audio').paused"), 30)
    return run(browser, "document.getElementById('audio').currentTime")


def errors(browser):
    return [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def test_a_spoken_sentence_arrives_is_searched_and_played_where_it_is(
    tmp_path, browser, whisper_tiny
):
    speech = ROOT / "examples" / "site" / "source" / "source_000.ogg"
    words = speech_of(speech)
    (tmp_path / "journal").mkdir()
    with running(journal=tmp_path / "journal") as server:
        browser.get(server.url)
        wait_for(lambda: find(browser, "#connection").text == "connected")
        options = MonitorOptions(
            "bundled:whisper-tiny.en", sources=[speech], journal=tmp_path / "journal", threads=1
        )
        with Session(options) as session:
            for item in session.items():
                server.state.live.put(item)
        wait_for(lambda: find(browser, "#lines .what").text.endswith(words))
        find(browser, 'a[href="#search"]').click()
        find(browser, "#query").send_keys(f'"{words.rstrip(".?!")}"')

        def is_found():  # once the index has it, which follows the journal
            find(browser, "#search button").click()
            time.sleep(0.5)
            return browser.find_elements("css selector", "#results mark")

        wait_for(is_found, 30)
        start = json.loads(lines_of(tmp_path / "journal")[0])["start"]
        began = play(browser, find(browser, "#results button"))
        assert began == pytest.approx(min(start, 5.0), abs=2.0)
        assert "1 line" in find(browser, "#found").text
        assert errors(browser) == []


def speech_of(path: Path) -> str:
    """What the bundled model makes of a recording, its first line."""
    from mmtransfer.monitoring import monitor

    return next(monitor("bundled:whisper-tiny.en", path)).text


def lines_of(journal: Path) -> list[str]:
    (path,) = journal.glob("*.jsonl")
    return path.read_text(encoding="utf-8").splitlines()


def test_texts_and_names_are_never_markup(place, browser):
    with served(place) as server:
        browser.get(server.url)
        wait_for(lambda: "onerror" in find(browser, "#lines").text)
        server.state.live.put(Transcript(**text("<i>x</i>", time.time(), SECRET)))
        wait_for(lambda: "<i>x</i>" in find(browser, "#cameras").text)
        assert browser.find_elements("css selector", "#lines img, #lines script, #cameras i") == []
        browser.get(f"{server.url}/#search")
        find(browser, "#query").send_keys("<script>alert")
        find(browser, "#search button").click()
        wait_for(lambda: "1 line" in find(browser, "#found").text)
        assert [m.text for m in browser.find_elements("css selector", "#results mark")]
        assert errors(browser) == []


def test_a_day_leads_to_its_lines_by_the_keyboard_alone(place, browser):
    with served(place) as server:
        browser.get(f"{server.url}/#day")
        day = time.strftime("%Y-%m-%d", time.localtime(NOON))
        run(browser, f"document.getElementById('day').value = '{day}'")
        run(browser, "document.getElementById('day').dispatchEvent(new Event('change'))")
        wait_for(lambda: browser.find_elements("css selector", ".parts"), 30)
        part = time.localtime(NOON).tm_hour * 2
        tracks = "[...document.querySelectorAll('.track')]"
        buttons = "[...track.querySelectorAll('button')].map((one) => one.ariaLabel)"
        labels = run(browser, f"{tracks}.map((track) => [track.innerText, {buttons}])")
        gate = next(parts for name, parts in labels if "gate" in name)
        assert gate[part].endswith("1 lines, 1 alerts, 1 sounds")
        run(browser, "document.querySelector('.parts').querySelector('button').focus()")
        keys = ["\ue012", "\ue014", "\ue014"]  # left, right, right
        for key in keys:
            browser.switch_to.active_element.send_keys(key)
        focused = "document.activeElement"
        assert run(browser, f"[...{focused}.parentNode.children].indexOf({focused})") == 2
        browser.switch_to.active_element.send_keys("\ue007")
        wait_for(lambda: find(browser, "#found").text != "")
        assert find(browser, "#search [name=camera]").get_attribute("value") == labels[0][0]


def test_a_recording_is_transcribed_on_the_page(tmp_path, browser):
    speech = ROOT / "examples" / "site" / "source" / "source_000.ogg"
    with running() as server:
        browser.get(f"{server.url}/#file")
        wait_for(lambda: run(browser, "document.getElementById('model').value") == "site")
        find(browser, "#file").send_keys(str(speech))
        wait_for(lambda: "is transcribed" in find(browser, "#file-status").text)
        assert find(browser, "#file-text").text.startswith("some words here")
        assert find(browser, "#save").get_attribute("download") == "source_000.ogg.txt"
        path = tmp_path / "noise.txt"
        path.write_text("no recording")
        find(browser, "#file").send_keys(str(path))
        wait_for(lambda: "transcribed" not in find(browser, "#file-status").text)
        assert str(tmp_path) not in find(browser, "body").text


def test_the_microphone_is_transcribed_as_it_comes(place, browser):
    with served(place) as server:
        browser.get(f"{server.url}/#file")
        wait_for(lambda: run(browser, "document.getElementById('model').value") == "site")
        find(browser, "#listen").click()
        wait_for(lambda: find(browser, "#file-text").text.startswith("some words here"))
        find(browser, "#listen").click()
        wait_for(lambda: find(browser, "#file-status").text == "Stopped.")
        assert server.state.streams.taken == 0
        assert errors(browser) == []


def test_an_admin_forgets_on_the_page_after_a_count(place, browser):
    with served(place) as server:
        browser.get(f"{server.url}/#admin")
        wait_for(lambda: find(browser, "#view-admin").is_displayed())
        find(browser, "#forget [name=text]").send_keys("fire")
        find(browser, "#forget button").click()
        wait_for(lambda: "This would remove 1 lines" in find(browser, "#forget-status").text)
        assert server.state.indexer.index.search("fire").hits
        find(browser, "#forget-now").click()
        wait_for(lambda: "Removed 1 lines" in find(browser, "#forget-status").text)
        wait_for(lambda: not server.state.indexer.index.search("fire").hits)
        assert not find(browser, "#forget-now").is_displayed()
        assert errors(browser) == []
