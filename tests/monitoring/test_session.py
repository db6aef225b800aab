"""The monitor from Python: sinks, files, journal, a webhook, alerts that are sent again."""

import json
import re
import runpy
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, write_media
from support.engines import FakeEngine
from support.sessions import lines_of, transcript

from mmtransfer.errors import UserError
from mmtransfer.monitoring import (
    Alert,
    Camera,
    MonitorOptions,
    Session,
    SourceEnd,
    Transcript,
    run,
)
from mmtransfer.monitoring.outputs.sinks import FileSink
from mmtransfer.speech.recognition import Recognizer

VIDEO = EXAMPLE / "monitor.mp4"


class Desk:
    """A sink of one's own."""

    def __init__(self):
        self.items, self.is_closed = [], False

    def write(self, item):
        self.items.append(item)

    def close(self):
        self.is_closed = True


@pytest.fixture
def model(random_whisper, monkeypatch):
    """A model's folder, whose place an engine takes that says the same of everything."""
    engine = FakeEngine(lambda context_s: "open the gate")
    place = "mmtransfer.monitoring.loading.open_recognizer"
    monkeypatch.setattr(place, lambda *arguments, **options: Recognizer(engine))
    return str(random_whisper)


def test_sinks_files_and_a_webhook_get_the_same(model, receiver, tmp_path):
    desk, other = Desk(), receiver()
    options = MonitorOptions(
        model,
        sources=[VIDEO],
        keywords=["gate"],
        output=[tmp_path / "o.jsonl", tmp_path / "o.srt"],
        webhook=other.url,
    )
    stats = run(options, sinks=[desk])
    texts = [item for item in desk.items if isinstance(item, Transcript)]
    raised = [item for item in desk.items if isinstance(item, Alert)]
    assert len(texts) == len(raised) == stats.segments > 10
    rows = [json.loads(row) for row in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [text.id for text in texts]
    assert (tmp_path / "o.srt").read_text().count("-->") == len(texts)
    assert [json.loads(body)["segment"] for _, body in other.got] == [a.segment for a in raised]
    assert desk.is_closed
    assert not stats.failed


def test_files_of_live_sources_and_pipes_wait_for_a_full_disk(model, tmp_path):
    write_media(tmp_path / "a.wav", np.zeros(16000, np.float32))
    for source, waits in [("-", True), ("rtsp://c/1", True), (tmp_path / "a.wav", False)]:
        options = MonitorOptions(model, sources=[source], output=[tmp_path / "o.txt"])
        with Session(options) as session:
            (sink,) = session._sinks.values()
            assert isinstance(sink, FileSink)
            assert sink._waits is waits


@pytest.mark.parametrize(("names", "before"), [(["a"], ""), (["a", "b"], "a ")])
def test_lines_of_text_name_their_source_where_there_are_several(model, tmp_path, names, before):
    write_media(tmp_path / "a.wav", np.zeros(16000, np.float32))
    cameras = [Camera(name, str(tmp_path / "a.wav")) for name in names]
    options = MonitorOptions(model, sources=cameras, output=[tmp_path / "o.txt"])
    with Session(options) as session:
        for sink in session._files["a"]:
            sink.write(transcript())
    assert (tmp_path / "o.txt").read_text().startswith(f"{before}[00:00:14.6")


def test_each_model_is_found_once(model, text_backbone, monkeypatch, tmp_path):
    from mmtransfer.hub.checkpoint import resolve

    names, judged = [], []

    def counted(name):
        names.append(name)
        return resolve(name)

    def judge(checkpoint):
        judged.append(checkpoint.source)
        return lambda texts: [("calm", 0.9) for _ in texts]

    monkeypatch.setattr("mmtransfer.monitoring.loading.resolve", counted)
    monkeypatch.setattr("mmtransfer.monitoring.loading.text_classifier", judge)
    cameras = [Camera(name, str(VIDEO), model=model) for name in ("one", "other")]
    options = MonitorOptions(
        model, sources=[*cameras, VIDEO], journal=tmp_path / "j", sentiment=str(text_backbone)
    )
    with Session(options):
        assert names == [model, str(text_backbone)]
        assert judged == [str(text_backbone)]


def test_what_a_session_left_over_is_in_the_files_and_on_its_way_in_the_next(
    model,
    receiver,
    tmp_path,
):
    """A sink of one's own gets what is new; files hold everything."""
    options = MonitorOptions(
        model,
        sources=[VIDEO],
        keywords=["gate"],
        journal=tmp_path / "j",
        output=[tmp_path / "o.jsonl"],
        webhook="http://127.0.0.1:9/nobody",
    )
    session, before = Session(options), []
    with session:
        for item in session.items():
            before.append(item)
            if sum(isinstance(item, Transcript) for item in before) == 5:
                break
    raised = [line for line in lines_of(tmp_path / "j") if line.get("event") == "alert"]
    assert len(raised) >= 4
    other, desk = receiver(), Desk()
    stats = run(
        MonitorOptions(
            model,
            sources=[VIDEO],
            keywords=["gate"],
            journal=tmp_path / "j",
            output=[tmp_path / "o.jsonl"],
            webhook=other.url,
        ),
        sinks=[desk],
    )
    rows = [json.loads(row) for row in (tmp_path / "o.jsonl").read_text().splitlines()]
    new = [item.id for item in desk.items if isinstance(item, Transcript)]
    known = [
        line["id"] for line in lines_of(tmp_path / "j") if "keyword" not in line and "id" in line
    ]
    assert [row["id"] for row in rows] == known
    assert stats.segments == len(new) == len(known) - 5
    sent = [json.loads(body)["segment"] for _, body in other.got]
    assert sorted(set(sent)) == sorted(known)
    arrived = [x for x in lines_of(tmp_path / "j") if x.get("event") == "alert delivered"]
    assert {line["segment"] for line in arrived} == set(sent)


def test_files_of_one_recording_hold_nothing_of_what_was_piped_in_before(model, tmp_path, caplog):
    def pipe(until, interrupted=False):
        """What the files hold after a session that transcribed one line."""
        options = MonitorOptions(
            model,
            sources=["pcm:16000"],
            journal=tmp_path / "j",
            output=[tmp_path / f"o{suffix}" for suffix in (".srt", ".html", ".txt")],
        )
        with Session(options) as session:
            assert session._journal is not None
            (camera,) = session.cameras
            line = replace(transcript(f"up to {until}", until - 1, until), camera=camera.name)
            session._journal.write(asdict(line))
            for sink in session._files[camera.name]:
                sink.write(line)
            if not interrupted:
                session._journal.write(SourceEnd("-", camera.name, None).line())
        return [
            re.findall(r"up to \d", (tmp_path / f"o{suffix}").read_text())
            for suffix in (".srt", ".html", ".txt")
        ]

    first, second, third = (f"up to {number}" for number in (1, 2, 3))
    assert pipe(1) == [[first], [first], [first]]
    assert pipe(2, interrupted=True) == [[second], [second], [first, second]]
    assert "what was piped in before has ended" in caplog.text
    assert pipe(3) == [[second, third], [second, third], [first, second, third]]


def test_a_source_that_breaks_off_does_not_end_the_others(model, speech, tmp_path, caplog):
    whole = write_media(tmp_path / "whole.mp4", speech)
    cut = write_media(tmp_path / "cut.mp4", np.tile(speech, 3))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    desk = Desk()
    stats = run(MonitorOptions(model, sources=[cut, whole]), sinks=[desk])
    assert list(stats.failed) == ["cut"]
    assert "ends early" in stats.failed["cut"]
    assert any("ends early" in message for message in caplog.messages)
    assert {item.camera for item in desk.items} == {"cut", "whole"}


def test_a_session_hands_out_everything_and_stops_when_asked(model, tmp_path):
    with Session(MonitorOptions(model, sources=[VIDEO], journal=tmp_path / "j")) as session:
        items = []
        for item in session.items():
            items.append(item)
            session.stop()
    assert isinstance(items[0], Transcript)
    assert isinstance(items[-1], SourceEnd)
    assert not session.stats.failed
    # The journal is free again, and the rest is recognised.
    with Session(MonitorOptions(model, sources=[VIDEO], journal=tmp_path / "j")) as session:
        more = [item.id for item in session.items() if isinstance(item, Transcript)]
    assert more
    assert not set(more) & {item.id for item in items if isinstance(item, Transcript)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ["no.mp4"]}, "no such"),
        ({"sources": [VIDEO], "keywords": ["..."]}, "expected words"),
        ({"sources": [VIDEO], "webhook": "ftp://x/y"}, "expected an address"),
        ({"sources": [VIDEO], "metrics_port": "no"}, "metrics: expected"),
        ({"sources": [VIDEO], "output": ["no/o.srt"]}, "does not exist"),
    ],
)
def test_what_cannot_be_used_is_found_before_anything_is_written(
    model, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(MonitorOptions(model, **options))
    assert not list(tmp_path.iterdir())


def test_the_example_runs(whisper_tiny, speech, tmp_path, capsys):
    recording = write_media(tmp_path / "gate.mp4", speech)
    main = runpy.run_path(str(ROOT / "examples" / "monitor_desk.py"))["main"]
    main([str(recording), str(tmp_path / "heard")])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[-1] == "1 segments, 0 alerts"  # of two lines, joined over a pause
    main([str(recording), str(tmp_path / "heard")])  # once more: there is nothing new
    assert capsys.readouterr().out.splitlines() == ["0 segments, 0 alerts"]
