import logging
import re
from pathlib import Path

import pytest
from conftest import tone, write_media
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.config import DataConfig
from mmtransfer.data.encodings import decode_text
from mmtransfer.errors import UserError
from mmtransfer.speech.clips import read_clips
from mmtransfer.speech.subtitles import (
    Cue,
    _spoken,
    escape_ass,
    escape_subtitle,
    parse_ass,
    parse_subtitles,
    read_subtitles,
)

T1, T2, T3 = (f"00:00:0{i},000 --> 00:00:0{i + 1},000" for i in (1, 3, 5))
PLAIN = f"1\n{T1}\nHello you\n\n2\n{T2}\nthere 7\n\n3\n{T3}\nGood bye\n"
SAID = ["Hello you", "there 7", "Good bye"]


def texts(text, suffix=".srt"):
    return [cue.text for cue in parse_subtitles(text, is_vtt=suffix == ".vtt")]


def read(folder: Path, text, name="a.srt", **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_subtitles(path, **options)


# --- text up to the next time --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\n\n"),
        PLAIN.replace("\n\n", "\n"),
        PLAIN.replace("00\n", "00\n\n"),
        PLAIN.replace(" ", "\n\n").replace("\n\n-->\n\n", " --> "),
        PLAIN.replace(" ", "\n \n").replace("\n \n-->\n \n", " --> "),
        "\ufeff\n\n" + PLAIN,
        re.sub(r"^\d\n", "", PLAIN, flags=re.MULTILINE),
        PLAIN.removeprefix("1\n"),
        PLAIN.replace(",000", ".000").replace("00:00:0", "0:0:0"),
        PLAIN.replace("00:00:0", "00: 00: 0").replace("-->", "->"),
        PLAIN.replace(" --> ", "-->").replace(",000\n", ",000 X1:10 X2:20 Y1:5 Y2:6\n"),
        "WEBVTT\n\n" + re.sub(r"^\d\n", "", PLAIN, flags=re.MULTILINE).replace(",0", ".0"),
        "WEBVTT - title\nKind: captions\nLanguage: en\n\n" + PLAIN.replace("00:00:0", "00:0"),
    ],
)
def test_a_cue_is_everything_up_to_the_next_time(text):
    cues = parse_subtitles(text)
    assert [cue.text for cue in cues] == SAID
    assert [(cue.start, cue.end) for cue in cues] == [(1, 2), (3, 4), (5, 6)]


def test_numbers_that_are_said_stay():
    assert texts(f"1\n{T1}\n7\n\n2\n{T2}\n8\n9\n\n3\n{T3}\n10") == ["7", "8 9", "10"]
    assert texts(f"{T1}\nthree\n\n{T2}\n2\n\n{T3}\n1") == ["three", "2", "1"]
    assert texts(f"WEBVTT\n\n{T1}\n3\n\n{T2}\n2\n\n{T3}\n1", ".vtt") == ["3", "2", "1"]


def test_names_comments_styles_and_regions_of_webvtt_are_no_text():
    text = (
        "WEBVTT\n\nNOTE made by hand\nin two lines\n\nREGION\nid:a\n\n"
        "STYLE\n::cue { color: red }\n\n"
        "intro\n00:01.000 --> 00:02.000 align:start\n<v Ann>Hello</v> <c.red>you</c>\n\n"
        "NOTE\nthere is more\n\nsecond\n00:03.000 --> 00:04.000\nNOTE this stays\n- yes\n"
    )
    assert texts(text, ".vtt") == ["Hello you", "NOTE this stays - yes"]
    assert texts(f"{T1}\nHello\n\nNOTE this is said\n") == ["Hello NOTE this is said"]


@pytest.mark.parametrize(
    "time",
    [
        "00:0x:03,000 --> 00:00:04,000",
        "00:00:03,000 -->",
        "--> 00:00:04,000",
        "00:00:61,000 --> 00:00:62,000",
        "O0:00:03,000 --> 00:00:04,0O0",
        "00:00:03,000 --> later",
    ],
)
def test_a_time_that_cannot_be_read_is_named(time, tmp_path):
    with pytest.raises(UserError, match=r"a\.srt:6: expected times such as .*1 more like it"):
        read(tmp_path, f"1\n{T1}\nHello\n\n2\n{time}\nthere\n\n3\n{time}\nyou\n")


def test_arrows_in_what_is_said_are_no_times():
    said = "open menu --> file at 10:30 -> 11:00 → go"
    assert texts(f"1\n{T1}\n{said}\n") == [said]


def test_files_of_empty_cues_are_refused_and_some_are_counted(tmp_path, caplog):
    with pytest.raises(UserError, match=r"a\.srt: 3 of 3 cues have no text"):
        read(tmp_path, f"{T1}\n\n{T2}\n \n\n{T3}\n<i></i>\n")
    with pytest.raises(UserError, match="no subtitle cues found"):
        read(tmp_path, "<html>\n")
    with caplog.at_level(logging.INFO):
        found = read(tmp_path, f"{T1}\n\n{T2}\nx\n")
    assert [cue.text for cue in found] == ["", "x"]
    assert "1 of 2 cues have no text" in caplog.text


def test_cues_that_do_not_last_are_left_out_and_said(tmp_path, caplog):
    found = read(tmp_path, f"{T1}\na\n\n00:00:03,000 --> 00:00:03,000\nb\n\n{T3}\nc\n")
    assert [cue.text for cue in found] == ["a", "c"]
    assert "1 cues without duration, first at line 4" in caplog.text


# --- captions as they are downloaded -------------------------------------------------------------

ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.080 --> 00:00:02.389 align:start position:0%
\x20
hello<00:00:00.480><c> everyone</c><00:00:00.880><c> welcome</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello everyone welcome
\x20

00:00:02.399 --> 00:00:04.470 align:start position:0%
hello everyone welcome
to<00:00:02.639><c> the</c><00:00:02.800><c> show</c>

00:00:04.470 --> 00:00:04.480 align:start position:0%
to the show
\x20

00:00:04.480 --> 00:00:06.000 align:start position:0%
to the show
no

00:00:06.000 --> 00:00:06.010 align:start position:0%
no
\x20

00:00:06.010 --> 00:00:08.000 align:start position:0%
no
no
"""


def as_srt(vtt):
    cues = parse_subtitles(vtt, is_vtt=True)
    return "\n\n".join(
        f"{number}\n00:00:{cue.start:06.3f} --> 00:00:{cue.end:06.3f}\n".replace(".", ",")
        + cue.shown
        for number, cue in enumerate(cues, 1)
    )


@pytest.mark.parametrize("name", ["a.vtt", "a.srt"])
def test_rolling_captions_give_what_is_new(tmp_path, caplog, name):
    with caplog.at_level(logging.INFO):
        cues = read(tmp_path, ROLLING if name == "a.vtt" else as_srt(ROLLING), name)
    assert [cue.text for cue in cues] == ["hello everyone welcome", "to the show", "no", "no"]
    assert [cue.start for cue in cues] == pytest.approx([0.08, 2.399, 4.48, 6.01])
    assert "3 cues that only repeat are left out" in caplog.text


def test_growing_captions_give_what_is_new(tmp_path):
    lines = ["hello", "hello everyone", "hello everyone welcome", "hello everyone welcome to"]
    text = "\n\n".join(f"00:0{i}.000 --> 00:0{i + 1}.000\n{line}" for i, line in enumerate(lines))
    cues = read(tmp_path, f"WEBVTT\n\n{text}\n", "a.vtt")
    assert [cue.text for cue in cues] == ["hello", "everyone", "welcome", "to"]


def test_what_is_said_twice_stays(tmp_path):
    said = ["No.", "No.", "No.\nWhy?", "Because.", "Because.", "Wait.", "Wait."]
    text = "\n\n".join(f"00:0{i}.000 --> 00:0{i + 1}.000\n{line}" for i, line in enumerate(said))
    cues = read(tmp_path, f"WEBVTT\n\n{text}\n", "a.vtt")
    assert [cue.text for cue in cues] == [" ".join(line.split()) for line in said]


def test_captions_that_stay_on_the_screen_end_where_the_next_begins(tmp_path, caplog):
    text = "\n\n".join(f"00:0{i}.000 --> 00:0{i + 3}.000\nline {i}" for i in range(1, 6))
    with caplog.at_level(logging.INFO):
        cues = read(tmp_path, f"WEBVTT\n\n{text}\n", "a.vtt")
    assert [(cue.start, cue.end) for cue in cues] == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 8)]
    assert "4 cues end where the next one begins" in caplog.text
    two = "00:01.000 --> 00:04.000\na\n\n00:02.000 --> 00:03.000\nb\n\n00:05.000 --> 00:06.000\nc"
    assert [cue.end for cue in read(tmp_path, f"WEBVTT\n\n{two}\n", "a.vtt")] == [4, 3, 6]


def test_captions_that_begin_together_are_joined_and_not_dropped(tmp_path, caplog):
    """Two speakers, whose cues stand in pairs a few frames apart."""
    text = "\n\n".join(
        f"00:0{i}.000 --> 00:0{i}.900\nfirst {i}\n\n00:0{i}.040 --> 00:0{i}.800\nsecond {i}"
        for i in range(1, 6)
    )
    with caplog.at_level(logging.INFO):
        cues = read(tmp_path, f"WEBVTT\n\n{text}\n", "a.vtt")
    assert [(cue.start, cue.end, cue.text) for cue in cues] == [
        (i, i + 0.9, f"first {i} second {i}") for i in range(1, 6)
    ]
    assert "5 cues are joined to one that begins with them" in caplog.text
    assert "end where" not in caplog.text


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(6, 60)), min_size=1, max_size=12))
def test_no_cue_that_lasts_is_lost_in_an_overlap(stretches):
    steps = [(sum(step for step, _ in stretches[: i + 1]), n) for i, (_, n) in enumerate(stretches)]
    cues = [Cue(a / 100, (a + n) / 100, f"w{i}", i) for i, (a, n) in enumerate(steps)]
    kept = _spoken(cues, Path("a.srt"))
    assert [word for cue in kept for word in cue.text.split()] == [cue.shown for cue in cues]
    assert all(cue.end - cue.start >= 0.05 for cue in kept)


def test_entities_tags_and_positions():
    lines = [
        (r"{\an8}<i>Hello</i> <font color='red'>you</font>", "Hello you"),
        ("&gt;&gt; It&#39;s &quot;A&amp;B&quot;&nbsp;&lrm;now", '>> It\'s "A&B" now'),
        ("5 < 7 &amp; 8 > 6, AT&T &unknown; &amp;lt;", "5 < 7 & 8 > 6, AT&T &unknown; &lt;"),
        (r"one<br>two\Nthree", "one two three"),
        ("&#1114112; &#xD800; &#x41;", "&#1114112; &#xD800; A"),
    ]
    for line, said in lines:
        assert texts(f"1\n{T1}\n{line}\n") == [said]


PIECES = [
    "a",
    "7",
    "NOTE",
    "&amp;",
    "&",
    "<b>",
    "</b>",
    "<",
    "5<7",
    "-->",
    r"{\an8}",
    r"\N",
    "<br>",
]
PIECES += [">>", "&#39;", "WEBVTT", "é", "00:00:01,000 -->"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), min_size=1, max_size=5),
    st.booleans(),
)
def test_what_is_written_comes_back_unchanged(pieces, is_vtt):
    said = [" ".join(words) for words in pieces]
    written = "WEBVTT\n\n" if is_vtt else ""
    for number, text in enumerate(said, 1):
        written += "" if is_vtt else f"{number}\n"
        written += f"00:00:{number:02},000 --> 00:00:{number:02},900\n"
        written += escape_subtitle(text, is_vtt=is_vtt) + "\n\n"
    assert [cue.text for cue in parse_subtitles(written, is_vtt=is_vtt)] == said


def test_long_lines_are_read_in_a_moment():
    for piece in ("<", "1", r"{\ "[:2], "&", ":", " ", "a "):
        assert len(parse_subtitles(f"1\n{T1}\nx\n{piece * 200_000}\n")) == 1


# --- ASS -----------------------------------------------------------------------------------------

ASS = """[Script Info]
ScriptType: v4.00+

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:05.00,0:00:06.00,Default,,0,0,0,,Good bye, all
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Hello{\\i0} you{a note},\\Nthere\\hnow
Dialogue: 1,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\bord3}Hello you,\\Nthere now
Comment: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,to be checked
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,{\\p1}m 0 0 l 9 9{\\p0}
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r\r\n"])
@pytest.mark.parametrize("name", ["a.ass", "a.ssa"])
def test_ass_gives_what_is_said_once_and_in_order(tmp_path, name, ends):
    cues = read(tmp_path, "\ufeff" + ASS.replace("\n", ends), name)
    assert [(c.start, c.end, c.text, c.line) for c in cues] == [
        (1.0, 2.5, "Hello you, there now", 7),
        (5.0, 6.0, "Good bye, all", 6),
    ]


@pytest.mark.parametrize(
    "time", ["0:00:0x.00,0:00:04.00", "0:00:03.00", "0:00:03.00,later", "0:61:03.00,0:62:00.00"]
)
def test_a_time_of_ass_that_cannot_be_read_is_named(tmp_path, time):
    with pytest.raises(UserError, match=r"a\.ass:9: expected times such as 0:00:03\.25,"):
        read(tmp_path, ASS.replace("0:00:03.00,0:00:04.00", time, 1), "a.ass")


def test_a_file_that_is_no_ass_is_refused(tmp_path):
    for text in ("x", "[Events]\n", PLAIN):
        with pytest.raises(UserError, match="no subtitle cues found"):
            read(tmp_path, text, "a.ass")


def test_events_of_ass_need_no_heading_and_times_have_many_forms(tmp_path):
    usual = read(tmp_path, ASS, "a.ass")
    assert read(tmp_path, ASS.replace("[Events]", ""), "a.ass") == usual
    for times, start, end in (
        ("0:00:1:00,0:00:02:50", 1.0, 2.5),  # a fraction behind a colon
        ("100:00:01.0,100:00:02.500", 360_001.0, 360_002.5),
    ):
        cues = read(tmp_path, ASS.replace("0:00:01.00,0:00:02.50", times), "a.ass")
        assert [(c.start, c.end) for c in cues if c.text.startswith("Hello")] == [(start, end)]


@given(st.lists(st.sampled_from([*PIECES, "{x}", "\\{", "}", "\\h", "\\"]), min_size=1, max_size=5))
def test_what_is_written_to_ass_comes_back_unchanged(words):
    head = ASS.partition("Dialogue")[0]
    said = " ".join(words)
    line = f"Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,{escape_ass(said)}"
    assert [cue.text for cue in parse_ass(f"{head}{line}\n")] == [said]


# --- encodings -----------------------------------------------------------------------------------

SENTENCES = {
    "fr": ("cp1252", "Où est passé le garçon ? Il a été déçu, ça m’étonne."),
    "de": ("cp1252", "Der Kran fährt über die Straße, schönes Wetter."),
    "pl": ("cp1250", "Dzień dobry, gdzie jest źródło? Żółć, świeży chleb."),
    "ru": ("cp1251", "Привет, где находится кран? Он упал в порту."),
    "uk": ("koi8-u", "Добрий день, де кран? Мы тут."),
    "el": ("cp1253", "Καλημέρα, πού είναι ο γερανός; Στο λιμάνι."),
    "he": ("cp1255", "שלום, איפה המנוף נמצא היום"),
    "ja": ("cp932", "こんにちは、クレーンはどこにありますか。港にあります。"),
    "zh": ("gb18030", "你好，吊车在哪里？它在港口。我们明天去看看。"),
    "ko": ("cp949", "안녕하세요. 크레인은 어디에 있습니까? 항구에 있습니다."),
}


@pytest.mark.parametrize("language", [key for key in SENTENCES if key != "uk"])
def test_other_encodings_are_found_and_said(tmp_path, caplog, language):
    encoding, said = SENTENCES[language]
    [cue] = read(tmp_path, f"1\n{T1}\n{said}\n".encode(encoding))
    assert cue.text == said
    assert f"decoded as {encoding}" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_needs_no_guess(tmp_path, caplog, encoding):
    [cue] = read(tmp_path, f"1\n{T1}\ncafé 北门\n".encode(encoding))
    assert cue.text == "café 北门"
    assert caplog.text == ""


def test_what_fits_no_encoding_is_refused(tmp_path):
    assert decode_text(bytes(range(128, 256)) * 3) is None
    with pytest.raises(UserError, match="not UTF-8, and no other encoding fits"):
        read(tmp_path, f"1\n{T1}\n".encode() + bytes(range(128, 256)) * 3)


# --- beside a recording --------------------------------------------------------------------------

CUES = "1\n00:00:00,100 --> 00:00:00,900\n{}\n"


@pytest.fixture
def talk(tmp_path):
    write_media(tmp_path / "talk.mp4", tone(1.5), video=True)
    return tmp_path


def put(folder, **files):
    for name, said in files.items():
        (folder / name.replace("_", ".")).write_text(CUES.format(said), encoding="utf-8")


def said(folder, **config):
    return [(c.path.name, c.text, c.language) for c in read_clips(folder, DataConfig(**config))]


def test_of_several_languages_that_of_the_data_is_read(talk, caplog):
    put(talk, talk_en_srt="yes", talk_es_srt="sí", talk_pt_vtt="sim")
    with caplog.at_level(logging.INFO):
        assert said(talk, language="en") == [("talk.mp4", "yes", "en")]
    assert "using talk.en.srt, not talk.es.srt, talk.pt.vtt" in caplog.text
    assert said(talk, language="Spanish") == [("talk.mp4", "sí", "es")]
    with pytest.raises(UserError, match=r"subtitles in en, es, pt beside it\. Set data\.language"):
        said(talk)
    with pytest.raises(UserError, match=r"subtitles in en, es, pt .* set to 'de'"):
        said(talk, language="de")


def test_a_file_of_two_forms_or_kinds_is_read_once_and_said(talk, caplog):
    put(talk, talk_srt="one", talk_vtt="two")
    with caplog.at_level(logging.INFO):
        assert said(talk) == [("talk.mp4", "one", None)]
    assert "using talk.srt, not talk.vtt" in caplog.text
    put(talk, talk_en_forced_srt="signs", talk_en_sdh_srt="all", talk_de_srt="ja")
    assert said(talk, language="en") == [("talk.mp4", "all", "en")]
    assert said(talk) == [("talk.mp4", "one", None)]
    assert said(talk, language="fr") == [("talk.mp4", "one", None)]


def test_names_of_subtitles(talk):
    put(talk, talk_mp4_srt="beside")
    assert said(talk) == [("talk.mp4", "beside", None)]
    (talk / "talk.mp4.srt").unlink()
    put(talk, talk_new_srt="no language")
    assert said(talk) == [("talk.mp4", "no language", None)]
    write_media(talk / "talk.en.mp4", tone(1.5))
    put(talk, talk_en_srt="its own")
    assert said(talk) == [("talk.en.mp4", "its own", None), ("talk.mp4", "no language", None)]


def test_ass_is_read_where_there_is_no_other(talk, caplog):
    (talk / "talk.en.ass").write_text(ASS.replace("0:00:05.00,0:00:06.00", "0:00:00.10,0:00:00.90"))
    assert said(talk)[0] == ("talk.mp4", "Good bye, all", "en")
    put(talk, talk_en_srt="yes")
    assert said(talk) == [("talk.mp4", "yes", "en")]


def test_what_lies_beside_a_recording_is_none(talk, caplog):
    put(talk, talk_srt="yes")
    for name in ("talk.jpg", "talk.webp", "talk.info.json", "talk.ass", "talk.part", "talk.nfo"):
        (talk / name).write_bytes(b"x")
    for name in ("._talk.mp4", "._talk.srt", ".talk.srt"):
        (talk / name).write_bytes(b"\0\5\x16\7")
    assert said(talk) == [("talk.mp4", "yes", None)]
    write_media(talk / "more.mkv", tone(0.5))
    said(talk)
    assert "1 recordings without subtitles are left out: more.mkv" in caplog.text
