"""Watch words, and alerts that reach another system."""

import hashlib
import hmac
import json
import threading
from base64 import b64encode

import pytest
from conftest import EXAMPLE
from hypothesis import given
from hypothesis import strategies as st
from support.engines import fake_monitor
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Alert, Camera, Journal, MonitorOptions, Transcript
from mmtransfer.monitoring.keywords import Keywords, similarity, sound
from mmtransfer.monitoring.outputs.alerts import SIGNATURE, Webhook

VIDEO = EXAMPLE / "monitor.mp4"


@pytest.mark.parametrize(
    ("keyword", "text", "said"),
    [
        ("fire", "There is a Fire, in the yard!", "fire"),
        ("open the gate", "please open the gate now", "open the gate"),
        ("Hexburn yard", "hold at hex burn yard until", "hex burn yard"),
        ("Brannoch", "the crane at brannock is down", "brannock"),
        ("Zephrine", "zephrin five is on the apron", "zephrin"),
        ("ambulance", "call an ambulants", "ambulants"),
        ("Falkyn", "falcon seven to control", "falcon"),
        ("着火", "三号楼着火了", "着 火"),
        ("Straße", "in der strasse brennt es", "strasse"),
    ],
)
def test_phrases_are_found_although_the_recogniser_slips(keyword, text, said):
    (match,) = Keywords([keyword]).find(text)
    assert match.keyword == keyword
    assert match.matched == said
    assert 0.8 <= match.score <= 1


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("fire", "the hire car is here for the fair"),
        ("gun", "the fun has begun"),
        ("help", "held up the whole shelf"),
        ("open the gate", "the garden is open"),
        ("着火", "火车站在哪里"),
        ("knife", ""),
        ("police", "please hold the line"),
    ],
)
def test_other_words_raise_nothing(keyword, text):
    assert Keywords([keyword]).find(text) == []


def test_a_phrase_needs_letters():
    with pytest.raises(UserError, match="expected words"):
        Keywords(["..."])
    assert not Keywords([])


def test_a_keyword_that_is_given_twice_is_found_once():
    (camera,) = MonitorOptions(
        "m",
        sources=[Camera(name="gate", url="rtsp://c/1", keywords=["Fire"])],
        keywords=["fire"] * 2,
    ).cameras()
    (match,) = Keywords([*camera.keywords, "FIRE!"]).find("there is a fire")
    assert match.keyword == "Fire"


@given(st.text(max_size=12), st.text(max_size=12))
def test_similarity_is_a_share_and_the_same_both_ways(one, other):
    assert 0 <= similarity(one, other) <= 1
    assert similarity(one, other) == pytest.approx(similarity(other, one))
    assert similarity(one, one) == 1
    assert sound(one) == sound(one.upper()) or not one.isascii()


def test_an_alert_follows_its_segment_in_journal_and_output(tmp_path):
    monitor, _ = fake_monitor(lambda context_s: "the gate is open")
    book = Journal(tmp_path, model="m", model_digest="d", sources={"yard": str(VIDEO)})
    items = list(
        monitor.watch([Camera(name="yard", url=str(VIDEO), keywords=["gate"])], journal=book)
    )
    book.close()
    told = [item for item in items if isinstance(item, Transcript | Alert)]
    assert len(told) > 10
    for segment, alert in zip(told[::2], told[1::2], strict=True):
        assert isinstance(segment, Transcript)
        assert isinstance(alert, Alert)
        assert (alert.segment, alert.keyword, alert.matched) == (segment.id, "gate", "gate")
    (path,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["segment"] for line in lines if line.get("event") == "alert"] == [
        line["id"] for line in lines if "id" in line
    ]


def test_an_answer_that_is_no_http_is_asked_again(receiver):
    other = receiver("nonsense")
    hook = Webhook(other.url, first_retry_s=0.05)
    hook.send({"number": 1})
    hook.send({"number": 2})
    wait_for(lambda: len(other.got) == 3)
    hook.close()
    assert [json.loads(body)["number"] for _, body in other.got] == [1, 1, 2]


def test_a_redirected_alert_is_not_delivered(receiver):
    settled = []
    hook = Webhook(receiver(301).url, settled=lambda alert, why: settled.append(why))
    hook.send({"number": 1})
    wait_for(lambda: settled)
    hook.close()
    assert settled == ["HTTP 301"]


def test_alerts_are_posted_in_order_and_signed(receiver):
    other = receiver()
    hook = Webhook(other.url, secret="key")
    for number in range(5):
        hook.send({"camera": "gate", "keyword": "火", "number": number})
    wait_for(lambda: len(other.got) == 5)
    hook.close()
    assert [json.loads(body)["number"] for _, body in other.got] == list(range(5))
    for headers, body in other.got:
        expected = hmac.new(b"key", body, hashlib.sha256).hexdigest()
        assert headers[SIGNATURE] == f"sha256={expected}"


def test_a_webhook_that_is_down_for_a_while_gets_everything(receiver):
    other = receiver(503, "hang", 500, 429)
    hook = Webhook(other.url, timeout_s=0.5, first_retry_s=0.05)
    for number in range(3):
        hook.send({"camera": "gate", "number": number})
    wait_for(lambda: {json.loads(body)["number"] for _, body in other.got} == {0, 1, 2})
    hook.close()
    assert SIGNATURE not in other.got[0][0]


def test_what_cannot_be_delivered_is_told(receiver):
    failed, sent = [], threading.Event()

    def settled(alert, why):
        sent.wait(30)
        failed.append((alert["number"], why))

    address = "http://127.0.0.1:9/nobody"
    hook = Webhook(address, settled=settled, first_retry_s=0.05, give_up_s=0.2)
    hook.send({"number": 0})
    assert not failed  # the monitor does not wait
    sent.set()
    wait_for(lambda: len(failed) == 1)
    other = receiver(404)
    refused = Webhook(other.url, settled=lambda alert, why: failed.append((alert["number"], why)))
    refused.send({"number": 1})
    wait_for(lambda: len(failed) == 2)
    assert failed[1] == (1, "HTTP 404")
    hook.close()
    refused.close()
    for wrong in ("ftp://x/y", "http://", "http://h:x/", "http://[h/", "http://a b/c"):
        with pytest.raises(UserError, match=r"expected an address http\[s\]://"):
            Webhook(wrong)


def test_an_address_may_hold_spaces_letters_of_any_alphabet_and_a_password(receiver):
    other, settled = receiver(), []
    address = other.url.replace("://", "://me:p%20w@") + "/ä b?q=火"
    hook = Webhook(address, settled=lambda alert, why: settled.append(why))
    hook.send({"number": 1})
    wait_for(lambda: settled)
    hook.close()
    assert settled == [""]
    assert other.got[0][0]["Authorization"] == "Basic " + b64encode(b"me:p w").decode()


def test_the_command_raises_alerts(whisper_tiny, short_video, receiver, tmp_path, capsys):
    other = receiver()
    command = ["monitor", str(whisper_tiny), str(short_video)]
    command += ["--keywords", "Hexburn yard", "gantrel"]
    command += ["--webhook", other.url, "--journal", str(tmp_path / "journal")]
    assert main(command) == 0
    printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("ALERT monitor: ")]
    assert len(printed) >= 3
    assert len(other.got) == len(printed)
    assert json.loads(other.got[0][1])["event"] == "alert"
