"""Tables, YAML, subtitles, transcripts and recordings made to do harm, or damaged."""

import json
import math
import os
import struct
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tone, write_dataset, write_media, write_text_backbone
from support.hostile import limited, outcome, reason, refused

from mmtransfer.config import DataConfig, load_config, read_yaml
from mmtransfer.data.tables import iter_rows
from mmtransfer.errors import UserError
from mmtransfer.speech import audio
from mmtransfer.speech.audio import MediaError, decode_clip, stream_audio
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.scores import get_normalizer
from mmtransfer.speech.subtitles import read_subtitles


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_text_backbone(tmp_path_factory.mktemp("classifier"), labels=2)


# --- YAML -----------------------------------------------------------------------------------------


def aliases(depth, width):
    lines = ["a0: &a0 lol"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


BOMB = aliases(12, 10)
YAMLS = {
    "aliases": BOMB,
    "aliases of cameras": f"{BOMB}\ncameras: [*a11, *a11]",
    "aliases of settings": f"{BOMB}\ndata: *a11",
    "an alias to itself": "a: &a [*a, *a]",
    "keys merged again and again": "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\ndata: {<<: [*b, *b]}",
    "a date that is none": "task: 2024-13-45",
    "a number that is none": "task: !!int x",
    "a float that is none": "task: !!float x",
    "a number of many digits": "task: " + "9" * 5000,
    "a long number": "task: " + "1" * 200_000,
    "a long number with marks": "task: " + "1_" * 100_000,
    "a long float": "task: " + "1" * 100_000 + "e",
    "deep lists": "task: " + "[" * 20_000,
    "deep objects": "task: " + "{a: " * 20_000,
    "an object of Python": "task: !!python/object/apply:os.system ['touch mark']",
    "binary": "task: !!binary x",
    "a set": "task: !!set {a, b}",
    "zeros": "\0" * 100,
    "a list": "- a",
    "two documents": "task: a\n---\ntask: b",
    "a long key": f"? {'k' * 100_000}\n: 1",
    "a key that is a list": "? [a, b]\n: 1",
    "a half emoji": '"a\\ud83d": "\\ud83d"',
    "escapes": 'task: "\\x1b[2J\\u202e"',
}


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("verb", ["train", "monitor"])
def test_a_configuration_made_to_do_harm_is_refused(name, verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(YAMLS[name], encoding="utf-8")
    started = time.process_time()
    first = ["train", path] if verb == "train" else ["monitor", "bundled:x", "--cameras", path]
    message = refused(first, capsys)
    assert "x.yaml" in message
    assert time.process_time() - started < 10
    assert not (tmp_path / "mark").exists()


def test_numbers_and_aliases_are_read_as_before(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 2e-5, y: 1e3, z: .5e1, w: 1_0.5e-2, v: e5}\nb: *a\nc: 1.5\n")
    values = {"x": 2e-5, "y": 1e3, "z": 5.0, "w": 0.105, "v": "e5"}
    assert read_yaml(path) == {"a": values, "b": values, "c": 1.5}


def test_a_configuration_may_be_piped_but_has_an_end(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    writer = threading.Thread(target=(tmp_path / "x.yaml").write_text, args=["task: sentiment"])
    writer.start()
    with limited():
        assert load_config(tmp_path / "x.yaml").task == "sentiment"
    writer.join()
    with limited(), pytest.raises(UserError, match=r"expected at most 16 MiB|not UTF-8|not valid"):
        load_config("/dev/zero")


# --- tables ---------------------------------------------------------------------------------------

TABLES = {
    "deep.jsonl": '{"text": ' + "[" * 100_000,
    "digits.jsonl": '{"text": ' + "1" * 5000 + "}",
    "list.jsonl": "[1]",
    "cut.jsonl": '{"text": "a',
    "zeros.jsonl": "\0\0\0",
    "zeros.csv": "text\n\0\n",
    "quote.csv": 'text,label\n"a,b\n' + "c,d\n" * 100,
    "wide.csv": "text\n" + "a," * 100,
    "twice.csv": "text,text\na,b\n",
    "none.csv": "",
    "header.tsv": "text\tlabel\n",
    "no.parquet": "PAR1 no PAR1",
    "object.jsonl": '{"text": {"a": 1}}',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_refused(name, classifier, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(TABLES[name])
    outcome(["predict", classifier, "--data", path, "--output", tmp_path / "o.csv"], capsys)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("what", ["pipe", "endless"])
def test_a_table_is_a_regular_file(suffix, what, tmp_path):
    path = tmp_path / f"x.{suffix}"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with limited(), pytest.raises(UserError, match="expected a regular file"):
        list(iter_rows(str(path)))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtransfer.data.tables._LONGEST_LINE", 1 << 20)
    for name, start in (("a.csv", "text\n"), ("a.tsv", "text\n"), ("a.jsonl", '{"text": "')):
        (tmp_path / name).write_text(start + "x" * (3 << 20))
        with pytest.raises(UserError, match=r"a line of more than 1 million characters"):
            list(iter_rows(str(tmp_path / name)))


def test_a_small_file_of_long_texts_takes_little_memory(classifier, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "bomb.parquet"
    texts = pyarrow.array(["good " * 200_000])
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(3000, np.int32), texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert path.stat().st_size < 300_000
    rows = iter_rows(str(path))
    with limited():
        assert sum(len(row["text"]) for row, _ in zip(rows, range(400), strict=False)) == 4e8


def test_half_an_emoji_is_a_mark_and_no_end(classifier, tmp_path, capsys):
    path = tmp_path / "half.jsonl"
    path.write_text(
        '{"text": "half \\ud83d emoji", "k\\ud83d": ["\\uDE00"], "whole": "\\ud83d\\ude00"}\n'
    )
    for name in ("o.jsonl", "o.csv"):
        code, _, _ = outcome(
            ["predict", classifier, "--data", path, "--output", tmp_path / name], capsys
        )
        assert code == 0
    row = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))
    assert (row["text"], row["k\ufffd"], row["whole"]) == ("half \ufffd emoji", ["\ufffd"], "😀")


def test_bytes_on_the_command_line_that_are_no_text_are_marked(classifier, capsys):
    code, out, _ = outcome(["predict", classifier, "--text", "a\udcff"], capsys)
    assert (code, json.loads(out)["text"]) == (0, "a\ufffd")


def test_columns_that_are_written_anew_are_kept_under_another_name(classifier, tmp_path, capsys):
    columns = ["text", "label", "given_label", "probability_LABEL_0", "probabilities"]
    path = tmp_path / "x.csv"
    path.write_text(",".join(columns) + "\ngood,a,b,c,d\n")
    for name in ("o.csv", "o.jsonl"):
        assert (
            outcome(["predict", classifier, "--data", path, "--output", tmp_path / name], capsys)[0]
            == 0
        )
    [row] = iter_rows(str(tmp_path / "o.csv"))
    assert [row["given_label"], row["given_given_label"]] in (["a", "b"], ["b", "a"])
    assert row["given_probability_LABEL_0"] == "c"
    [row] = iter_rows(str(tmp_path / "o.jsonl"))
    assert row["given_probabilities"] == "d"


def test_cells_that_spreadsheets_would_run_are_marked_in_csv_alone(
    classifier, tmp_path, capsys, caplog
):
    cells = ['=HYPERLINK("http://x")', "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3(x)", "\t=1"]
    plain = ["-3.5", "@somebody hello", "- a list", "+1 to that", "a=b"]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "good", "note": c}) + "\n" for c in cells + plain))
    notes = {}
    for name in ("o.csv", "o.jsonl"):
        caplog.clear()
        argv = ["predict", classifier, "--data", path, "--output", tmp_path / name]
        assert outcome(argv, capsys)[0] == 0
        assert ("begin as formulas do" in caplog.text) == (name == "o.csv")
        notes[name] = [row["note"] for row in iter_rows(str(tmp_path / name))]
    assert notes["o.csv"] == [f"'{cell}" for cell in cells] + plain
    assert notes["o.jsonl"] == cells + plain


# --- subtitles and transcripts --------------------------------------------------------------------

HEAD = "1\n00:00:01,000 --> 00:00:02,000\nhi\n\n2\n00:00:03,000 --> 00:00:04,000\n"
ASS = "[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
ASS += "Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,"
UNITS = [
    "1",
    "<",
    "{\\",
    "{",
    "<a",
    "&a",
    "\n",
    " ",
    "-->",
    "1:",
    "NOTE\n",
    "\\N",
    "<p",
    "0:00:00,",
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("suffix", [".srt", ".vtt", ".ass"])
def test_subtitles_take_time_that_grows_with_their_length(unit, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    text = unit * (200_000 // len(unit))
    if suffix == ".ass":
        path.write_text(ASS + "hi " + text.replace("\n", " "))
    else:
        path.write_text(f"{HEAD}{text}\n\n3\n00:00:05,000 --> 00:00:06,000\n{text} ho {text}\n")
    started = time.process_time()
    reason(lambda: read_subtitles(path))
    assert time.process_time() - started < 5  # the square of it would take a minute


@pytest.mark.parametrize("hours", ["9" * 400, "-1", "\u0663", "1e5", "99999"])
def test_times_of_cues_that_nobody_means_are_refused(hours, tmp_path):
    path = tmp_path / "x.srt"
    path.write_text(f"1\n{hours}:00:00,000 --> {hours}:00:01,000\nhi\n", encoding="utf-8")
    assert len(reason(lambda: read_subtitles(path))) < 400


@pytest.mark.parametrize("unit", ["(", "<", "[", "1", "1 ", " ", "'", ".", "(a", "5% "])
@pytest.mark.parametrize("name", ["english-v2", "basic-v2"])
def test_normalisers_take_time_that_grows_with_the_text(unit, name):
    started = time.process_time()
    get_normalizer(name)(unit * (100_000 // len(unit)))
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    "text", ["a (b) c", "(a", "[x] <y> z", "((a)b)", "()a)", "<[a]b>", "a] b > c", "[(a]b)", ")("]
)
def test_brackets_are_left_out_as_the_published_normaliser_does(text):
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    published = EnglishTextNormalizer({})(text).split()
    assert get_normalizer("english-v2")(text).split() == published


# --- recordings -----------------------------------------------------------------------------------


def write_wave(path, samples, *, channels=1, kind=3, bits=32):
    """A WAV file as its header says, whatever that is."""
    data = samples.tobytes()
    width = channels * bits // 8
    rate = 16_000 * width % 2**32
    form = struct.pack("<HHIIHH", kind, channels, 16_000, rate, width % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, -1e38])
def test_a_sample_that_is_no_sound_is_silence(value, speech, tmp_path, capsys):
    samples = speech.astype("<f4")
    samples[100] = value
    path = write_wave(tmp_path / "x.wav", samples)
    found = np.concatenate(list(stream_audio(path)))
    expected = np.concatenate(list(stream_audio(write_wave(tmp_path / "y.wav", speech))))
    assert np.isfinite(found).all()
    assert len(found) == len(expected)
    assert np.abs(found - expected)[200:].max() < 1e-3


def decoded(path):
    return list(stream_audio(path))


@pytest.mark.parametrize("channels", [0, 7, 64, 255, 1024, 65_535])
@pytest.mark.parametrize("bits", [0, 1, 16, 32, 999])
def test_any_number_of_channels_is_read_or_refused(channels, bits, tmp_path):
    samples = np.zeros(65_535 * 4, "<f4")
    path = write_wave(tmp_path / "x.wav", samples, channels=channels, bits=bits, kind=1)
    reason(lambda: list(stream_audio(path)))


CODECS = {".flac": "flac", ".ogg": "libopus", ".mp4": "aac", ".mkv": "aac", ".wav": "pcm_s16le"}
CODECS |= {".ts": "aac", ".flv": "aac", ".avi": "pcm_s16le", ".au": "pcm_s16be"}
CODECS |= {".aiff": "pcm_s16be", ".caf": "pcm_s16be"}


@pytest.mark.parametrize("suffix", CODECS)
def test_recordings_with_damaged_bytes_are_read_or_refused(suffix, tmp_path, speech):
    path = tmp_path / f"whole{suffix}"
    whole = write_media(path, speech[:48_000], codec=CODECS[suffix]).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(12):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 1 + 3 * number):
            data[place] = rng.integers(256)
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(data[: len(data) - 400 * (number % 3)])
        reason(partial(decoded, path))


@pytest.mark.parametrize("rate", [44_101, 7_919, 1_000, 191_999, 48_000])
def test_any_sample_rate_is_converted_in_little_memory(rate, tmp_path):
    path = write_media(tmp_path / "x.wav", tone(1.0, rate=rate), rate=rate)
    with limited():
        assert len(decode_clip(path)) == pytest.approx(16_000, abs=400)


def test_a_recording_that_is_too_long_is_decoded_up_to_the_limit(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "set", ["one", "two"])
    with (folder / "metadata.csv").open("a") as file:
        file.write("long.flac,three\n")
    write_media(folder / "long.flac", np.zeros(16_000 * 600, np.float32))
    decoded = []
    blocks = audio._Reading.blocks

    def counted(self, *arguments):
        for block, is_recorded in blocks(self, *arguments):
            decoded.append(len(block))
            yield block, is_recorded

    monkeypatch.setattr(audio._Reading, "blocks", counted)
    found = load_clips(folder, DataConfig(), name="train")
    assert [clip.text for clip in found.clips] == ["one", "two"]
    assert "long.flac: is longer than 30 s" in found.skipped[0]
    assert sum(decoded) < 16_000 * 40


@pytest.mark.parametrize("value", [1e300, 10**400, -1, "nan", "1e15", [], "1_0"])
def test_start_times_that_nobody_means_are_refused(value, tmp_path):
    folder = write_dataset(tmp_path / "set", ["one"])
    row = {"file_name": "clip0.wav", "transcription": "a", "start": value}
    path = folder / "x.jsonl"
    path.write_text(json.dumps(row) if value != 10**400 else '{"start": ' + "1" * 401 + "}")
    assert len(reason(lambda: load_clips(path, DataConfig(), name="train"))) < 500


@pytest.mark.parametrize(
    "name", ["a\0.wav", "\ud800.wav", "pipe.wav", "loop.wav", "../..", "x" * 5000]
)
def test_names_of_recordings_that_lead_nowhere_are_skipped_by_name(name, tmp_path):
    folder = write_dataset(tmp_path / "set", ["one"] * 3)
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    rows = [{"file_name": f"clip{n}.wav", "transcription": "a"} for n in range(3)]
    rows.append({"file_name": name, "transcription": "a"})
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with limited():
        found = load_clips(path, DataConfig(max_undecodable=0.5), name="train")
    assert (len(found), len(found.skipped)) == (3, 1)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
DESCRIPTION = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 40000 RTP/AVP 0\n"


@pytest.mark.parametrize("name", [b"x.m3u8", b"x\xff.m3u8", b"x\xff.wav", b"x.wav", b"x\xff.sdp"])
@pytest.mark.parametrize("scheme", ["http", "tcp", "sdp"])
def test_a_file_opens_no_address(name, scheme, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        path = tmp_path / os.fsdecode(name)
        text = PLAYLIST.format(f"{scheme}://127.0.0.1:{port}/a.ts")
        path.write_text(DESCRIPTION if scheme == "sdp" else text)
        started = time.monotonic()
        with limited(), pytest.raises(MediaError):
            list(stream_audio(path))
        assert time.monotonic() - started < 15
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_playlist_of_segments_beside_it_is_read(tmp_path):
    write_media(tmp_path / "a.flac", tone(1.0))
    import av

    with av.open(str(tmp_path / "a.ts"), "w", format="mpegts") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(2.0)[None], "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    (tmp_path / "x.m3u8").write_text(PLAYLIST.format("a.ts"))
    assert sum(map(len, stream_audio(tmp_path / "x.m3u8"))) > 16_000


@pytest.mark.parametrize("suffix", [".mkv", ".mpg", ".ts"])
def test_ten_years_between_two_packets_make_no_silence(suffix, tmp_path, speech, caplog):
    import av

    path = tmp_path / f"x{suffix}"
    codec = {".mkv": "pcm_s16le", ".mpg": "mp2", ".ts": "aac"}[suffix]
    with av.open(str(path), "w", format={".mpg": "mpeg"}.get(suffix)) as out:
        stream: Any = out.add_stream(codec, rate=16_000, layout="mono")
        whole = av.AudioFrame.from_ndarray((speech[None] * 32_767).astype(np.int16), "s16", "mono")
        whole.sample_rate, whole.pts = 16_000, 0
        size = stream.codec_context.frame_size or 1024
        frames = av.AudioResampler(stream.codec_context.format, frame_size=size).resample(whole)
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for number, packet in enumerate(packets):
            if number >= 10:
                packet.pts += round(315_360_000 / packet.time_base)
                packet.dts = packet.pts
            out.mux(packet)
    with limited():
        seconds = sum(map(len, stream_audio(path))) / 16_000
    assert seconds == pytest.approx(len(speech) / 16_000, abs=0.3)
    assert "the jump is ignored" in caplog.text


def test_transcripts_without_words_have_no_rate(tmp_path, capsys, speech):
    folder = write_dataset(tmp_path / "set", ["", "(laughs)", "...", "[noise]"])
    write_media(folder / "clip1.wav", speech)  # in which words are found
    # CTranslate2 packs weights: on some processors it takes more than a command may here.
    argv = ["evaluate", "bundled:whisper-tiny.en", "--data", folder, "--engine", "transformers"]
    code, out, _ = outcome(argv, capsys)
    assert code == 0
    assert "WER undefined (no reference words)" in out


@pytest.mark.parametrize("content", [DESCRIPTION, PLAYLIST.format("/etc/passwd")])
def test_what_is_piped_in_opens_nothing(content, tmp_path, monkeypatch):
    (tmp_path / "x").write_text(content)
    with (tmp_path / "x").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        started = time.monotonic()
        with limited(), pytest.raises(MediaError):
            list(stream_audio("-"))
        assert time.monotonic() - started < 15  # a description would be waited for


def test_the_empty_source_is_refused(capsys):
    assert "expected a list of paths" in refused(["monitor", "bundled:whisper-tiny.en", ""], capsys)
    with pytest.raises(yaml.YAMLError):  # what the library itself refuses stays refused
        yaml.safe_load("a: !!python/name:os.system")
