"""OpenAI's own client against `/v1/audio/transcriptions`, on real speech and on bad input."""

import io
import re
import wave
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import tone, write_media
from support.servers import running

from mmtransfer.monitoring import monitor
from mmtransfer.speech.subtitles import parse_subtitles


@pytest.fixture(scope="module")
def served(whisper_tiny):
    with running(max_upload_mb=4, max_audio_s=60) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    import openai  # two seconds, which only this file's worker need take

    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def recording(speech, tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("speech") / "gate.ogg", speech, rate=16_000)


def transcribe(client, recording, **given):
    with recording.open("rb") as file:
        return client.audio.transcriptions.create(model="site", file=file, **given)


def test_every_form_has_the_text_that_monitor_finds(client, recording):
    expected = list(monitor("bundled:whisper-tiny.en", recording, words=True))
    text = " ".join(line.text for line in expected)
    assert len(text.split()) > 10
    assert transcribe(client, recording).text == text
    assert transcribe(client, recording, response_format="text") == text + "\n"
    for form in ("srt", "vtt"):
        cues = parse_subtitles(
            transcribe(client, recording, response_format=form), is_vtt=form == "vtt"
        )
        assert [cue.start for cue in cues] == [line.start for line in expected]
        assert " ".join(cue.text for cue in cues) == text
    whole = transcribe(
        client,
        recording,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        temperature=0.2,
        language="English",
        prompt="Brannock",
    )
    assert whole.language == "en"
    assert whole.duration == pytest.approx(10.7, abs=0.1)
    assert " ".join(word.word for word in whole.words) == whole.text
    assert [word.start for word in whole.words] == sorted(word.start for word in whole.words)
    assert whole.segments[-1].end <= whole.duration
    assert whole.segments[0].avg_logprob < 0
    events = list(transcribe(client, recording, stream=True))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == text
    assert len(events) > 2


def test_models_are_listed(client):
    from openai import NotFoundError

    assert [model.id for model in client.models.list()] == ["site"]
    assert client.models.retrieve("site").owned_by == "mmtransfer"
    with pytest.raises(NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def wav(samples):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((32767 * samples).astype(np.int16).tobytes())
    return file.getvalue()


QUIET = wav(np.zeros(16_000, np.float32))
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no such model": ({"model": "gpt"}, 404, "model 'gpt': no model for speech .* known: site"),
    "a form": ({"response_format": "yaml"}, 400, "response_format: expected one of json, .*'yaml'"),
    "a language": ({"language": "klingon"}, 400, "language: expected an ISO code"),
    "a language that the model lacks": ({"language": "de"}, 400, "English only"),
    "a temperature": ({"temperature": 7}, 400, "temperature: expected 0 to 1"),
    "words of text": ({"timestamp_granularities": ["word"]}, 400, "response_format verbose_json"),
    "no recording": ({"file": ("a.wav", b"\n" * 900)}, 400, "file: not a readable video or audio"),
    "nothing": ({"file": ("a.wav", b"")}, 400, "file: expected a recording, found none"),
    "too much": ({"file": ("a.wav", bytes(5 << 20))}, 413, "expected 4 MB at most"),
    "too long": ({"file": ("a.flac", "long")}, 413, "expected 60 s of audio at most"),
    "a picture": ({"file": ("a.mp4", "video")}, 400, "file: has no audio track"),
    "a list of others": ({"file": ("a.m3u8", "list")}, 400, "file: not a readable video or audio"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_without_a_path(name, client, tmp_path, served):
    from openai import APIStatusError

    given, status, message = BAD[name]
    given = {"model": "site", "file": ("a.wav", QUIET), **given}
    file, content = given["file"]
    if content == "long":
        content = write_media(tmp_path / file, tone(61)).read_bytes()
    elif content == "video":
        content = write_media(tmp_path / file, None, video=True).read_bytes()
    elif content == "list":  # FFmpeg would open what it names
        other = write_media(tmp_path / "other.wav", tone(2))
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n"
        content = text.encode()
    with pytest.raises(APIStatusError) as caught:
        client.audio.transcriptions.create(**given | {"file": (file, content)})
    assert caught.value.status_code == status
    assert re.search(message, caught.value.message)
    assert "/tmp" not in caught.value.message
    assert "\n" not in caught.value.message
    assert served.state.places.taken == 0
    assert not list(served.state.uploads.folder.iterdir())


FORM = "multipart/form-data; boundary=x"
CUT = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF'


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [(b"{}", "application/json", 415), (b"--x\r\nnonsense", FORM, 400), (CUT, FORM, 400)],
)
def test_what_is_no_form_is_refused_in_the_same_form(body, kind, status, served):
    url = f"{served.url}/v1/audio/transcriptions"
    found = httpx.post(url, content=body, headers={"Content-Type": kind})
    assert found.status_code == status
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert not list(served.state.uploads.folder.iterdir())


def test_the_log_does_not_say_where_uploads_lie(served, client, tmp_path, caplog):
    samples = tone(2.0)
    samples[:100] = np.nan
    recording = write_media(tmp_path / "gate.wav", samples, codec="pcm_f32le")
    transcribe(client, recording)
    assert "file: 100 samples are invalid" in caplog.text
    assert str(served.state.uploads.folder) not in caplog.text
