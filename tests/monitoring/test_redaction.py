"""What nobody may find later is taken out before anything is written."""

import json
import math
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from conftest import EXAMPLE, ROOT
from support.engines import FakeEngine
from support.sources import decode

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Alert, MonitorOptions, Session, Transcript
from mmtransfer.monitoring.redaction import Redactor
from mmtransfer.monitoring.silence import Silences
from mmtransfer.monitoring.sources.clips import AROUND_S
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.recognition import Recognizer

ALL = ["phone", "email", "card"]


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("Jane Doe\n\nKowalski\n王小明\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Call 555-1234 now.", "Call [phone] now."),
        ("Call +49 (30) 123 456-78!", "Call [phone]!"),
        ("It is five five five, one two three four.", "It is [phone]."),
        ("电话一三八零零一三八零零零。", "电话[phone]。"),
        ("Card 4111 1111 1111 1111, thanks.", "Card [card], thanks."),
        ("4 1 1 1, 1 1 1 1, 1 1 1 1, 1 1 1 2", "[card]"),
        ("jo.smith@example.com", "[email]"),
        ("It is jo dot smith at example dot com.", "It is [email]."),
        ("In 2024 there were 1,000,000 of 25.", "In 2024 there were 1,000,000 of 25."),
        ("One of the two is at the gate. Dot it.", "One of the two is at the gate. Dot it."),
        ("One two three, go!", "One two three, go!"),
    ],
)
def test_numbers_and_addresses_are_taken_out_also_as_they_are_spoken(text, expected):
    assert Redactor(ALL).text(text) == expected


def test_names_are_found_in_any_case_and_as_they_sound(names):
    redactor = Redactor([{"names": str(names)}])
    assert redactor.text("JANE  DOE'S car, and Kowalsky's.") == "[name]'S car, and [name]'s."
    assert redactor.text("叫王小明来") == "叫[name]来"
    assert redactor.text("Jane met a doe.") == "Jane met a doe."


def test_a_pattern_is_bounded_in_time_and_then_all_goes():
    redactor = Redactor([{"pattern": r"badge \w\d+"}, {"pattern": r"(?:a|a|aa)+$"}])
    assert redactor.text("My Badge X12 is") == "My [redacted] is"
    assert redactor.text("a" * 200 + "! badge X12") == "[redacted]"


def test_what_overlaps_goes_together():
    redactor = Redactor(["phone", {"pattern": "call 555"}])
    assert redactor.text("Please call 555 1234 now") == "Please [redacted] now"


def test_digits_that_may_go_on_are_not_shown():
    redactor = Redactor(["phone"])
    assert redactor.text("Call 555", is_open=True) == "Call [phone]"
    assert redactor.text("Call 555 later", is_open=True) == "Call 555 later"
    assert redactor.text("Call 555") == "Call 555"


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (["address"], "expected phone, email, card"),
        ([{"names": "none.txt"}], "cannot be read"),
        ([{"pattern": "("}], "expected a regular expression"),
        ([{"pattern": "a", "names": "b"}], "names: FILE or pattern"),
    ],
)
def test_a_rule_that_cannot_be_used_is_one_line(rules, why):
    with pytest.raises(UserError, match=why):
        Redactor(rules)


def test_words_keep_their_times_and_several_become_one():
    spoken = ["Call", " 555", "-12", "34.", " Now", " 555", " 9999"]
    words = tuple(Word(text, n, n + 0.5, 0.9) for n, text in enumerate(spoken))
    found = Redactor(["phone"]).hypothesis(
        Hypothesis("".join(spoken), (1,), -0.1, 0.0, 9.0, words=words)
    )
    assert found.text == "Call [phone]. Now [phone]"
    assert [(word.text, word.start_s, word.end_s) for word in found.words] == [
        ("Call", 0, 0.5),
        (" [phone].", 1, 3.5),
        (" Now", 4, 4.5),
        (" [phone]", 5, 6.5),
    ]
    other = Hypothesis("Call 555 1234", (1,), -0.1, 0.0, 9.0, words=words)
    assert Redactor(["phone"]).hypothesis(other).words == ()  # they are not those of the text


SPOKEN = "Call 555 1234 or jo@example.com, says Kowalski."


def everything(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_nothing_that_is_written_or_sent_holds_it(
    tmp_path, names, receiver, monkeypatch, whisper_tiny
):
    engine = FakeEngine(lambda context_s: SPOKEN)
    monkeypatch.setattr(
        "mmtransfer.monitoring.loading.open_recognizer", lambda *a, **o: Recognizer(engine)
    )
    desk = receiver()
    shutil.copyfile(ROOT / "examples" / "site" / "source" / "source_000.ogg", tmp_path / "gate.ogg")
    (tmp_path / "cameras.yaml").write_text(
        f"cameras:\n- {{name: gate, url: gate.ogg, redact: [phone, {{names: {names.name}}}]}}\n"
        "redact: [email]\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = ["monitor", "bundled:whisper-tiny.en", "--cameras", str(tmp_path / "cameras.yaml")]
    command += ["--journal", str(out / "journal"), "--webhook", desk.url, "--keywords", "call"]
    command += ["--output", *(str(out / f"gate.{kind}") for kind in ("srt", "jsonl", "html"))]
    assert main(command) == 0
    left = everything(out)
    for secret in (b"555", b"1234", b"example", b"Kowalski"):
        assert secret not in left
    assert b"Call [phone] or [email], says [name]." in left
    assert desk.got
    for _, body in desk.got:
        assert json.loads(body)["text"] == "Call [phone] or [email], says [name]."


class TimedEngine(FakeEngine):
    """Gives a text whose words take half a second each from one second on."""

    def decode(self, clips, context_s):
        words = tuple(
            Word(f" {word}" if number else word, 1.0 + number / 2, 1.5 + number / 2, 0.9)
            for number, word in enumerate(self._texts(context_s).split())
        )
        return [replace(found, words=words) for found in super().decode(clips, context_s)]


def test_redacted_words_are_silent_in_clips_and_others_are_not(tmp_path, monkeypatch, whisper_tiny):
    """Also the picture stays."""
    engine = TimedEngine(lambda context_s: "fire call 555 1234 now")
    monkeypatch.setattr(
        "mmtransfer.monitoring.loading.open_recognizer", lambda *a, **o: Recognizer(engine)
    )
    options = MonitorOptions(
        "bundled:whisper-tiny.en",
        sources=[EXAMPLE / "monitor.mp4"],
        redact=["phone"],
        redact_clips=True,
        keywords=["fire"],
        alert_clips=tmp_path,
        words=True,
    )
    with Session(options) as session:
        found = [item for item in session.items() if isinstance(item, Transcript | Alert)]
    lines = [item for item in found if isinstance(item, Transcript)]
    alert = next(item for item in found if isinstance(item, Alert))
    with av.open(alert.clip) as container:
        assert container.streams.video
        assert container.streams.audio[0].codec_context.name == "flac"
    samples = decode(alert.clip)
    begin = alert.end + AROUND_S - len(samples) / SAMPLE_RATE  # it ends so long behind the line
    spans = [(w["start"], w["end"]) for x in lines for w in x.words or () if "[phone]" in w["text"]]
    (start, end), *_ = spans
    hidden = samples[round((start - begin) * SAMPLE_RATE) : round((end - begin) * SAMPLE_RATE)]
    assert len(hidden) > SAMPLE_RATE / 2
    assert np.abs(hidden).max() < 1e-3
    assert np.abs(samples[: round((start - begin - 0.5) * SAMPLE_RATE)]).max() > 0.05


def test_what_has_no_text_is_silent_and_what_is_found_late_is_silenced_again():
    silences, again = Silences(), list[list[tuple[float, float]]]()
    silences.begin("a", 10.0, 12.0)
    silences.begin("", 14.0)
    assert silences.spans(0.0, 20.0) == [(10.0, 12.0), (14.0, math.inf)]
    silences.hide(11.0, 11.5)
    silences.end("a")
    silences.end("")
    assert silences.spans(0.0, 20.0) == [(10.8, 11.7)]
    assert silences.spans(12.0, 20.0) == []
    silences.note_clip(0.0, 20.0, [], again.append)  # written before it was known
    assert again == [[(10.8, 11.7)]]
    silences.hide(15.0, 16.0)
    silences.hide(15.2, 15.8)  # the same, found once more
    silences.hide(30.0, 31.0)
    assert again[1:] == [[(14.8, 16.2)]]
    recording = Silences(known_s=0.0)
    recording.begin("a", 3.0, 5.0)
    recording.end("a")
    assert recording.spans(0.0, 8.0) == [(5.0, math.inf)]
    recording.finish()
    assert recording.spans(0.0, 8.0) == []
