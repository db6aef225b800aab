"""Clips that a Whisper learns in windows of several, as recordings are transcribed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.config import build_config
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.contexts import WINDOW_S, taught_context_s
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.whisper import load_speech_model
from mmtransfer.speech.whisper_task import SpeechTask, decoder_room, joined_clips

CPU = torch.device("cpu")
TEXTS = ["gate one", "gate two is open", "", "stop", "all clear", "go", "hold", "crane two"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    write_dataset(folder / "train", TEXTS)
    write_dataset(folder / "general", ["a quiet evening", "the old library"])
    return folder


@pytest.fixture(scope="module")
def make_task(data, random_whisper):
    def make(joined=1.0, speed=None):
        config = build_config(
            {
                "source_model": str(random_whisper),
                "run_dir": "unused",
                "data": {"train": str(data / "train")},
                "train": {"joined": joined, "full_context": 0.0, "timestamps": 0.0},
                "augment": {"speed": speed} if speed else {},
            }
        )
        train, general = (
            load_clips(data / name, config.data, name=name) for name in ("train", "general")
        )
        speech = load_speech_model(config.source_model)
        return SpeechTask(speech, train, train, config, rehearsal=general)

    return make


def test_a_window_holds_its_clips_in_turn_and_their_texts(make_task):
    task = make_task()
    clips = {clip.text: clip.samples() for clip in task.train.clips}
    micros = task.prepare([0, 1, 3], slice(None), 0)
    [micro] = micros
    assert micro.features.shape[:1] == (1,)
    assert micro.features.shape[-1] == 2000  # the context of windows, 20 s
    tokenizer = task.speech.processor.tokenizer
    learnt = [int(token) for token in micro.targets[0] if token != -100]
    assert tokenizer.decode(learnt) == " gate one gate two is open stop<|endoftext|>"
    samples, _ = task._example([0, 1, 3], np.random.default_rng(0))
    at = 0
    for text in ("gate one", "gate two is open", "stop"):
        pause = 0
        while not np.array_equal(samples[at + pause : at + pause + 1000], clips[text][:1000]):
            pause += 1
        assert not samples[at : at + pause].any()
        assert (pause == 0) == (text == "gate one")
        assert pause == 0 or 0.1 * SAMPLE_RATE - 1 <= pause <= SAMPLE_RATE
        assert np.array_equal(samples[at + pause :][: len(clips[text])], clips[text])
        at += pause + len(clips[text])
    assert at == len(samples)


def test_rehearsed_clips_are_joined_among_themselves_and_silence_is_not(make_task):
    task = make_task()
    first = task._targets
    assert task._units([0, first, 2, 1, first + 1], 0) == [[0, 1], [first, first + 1], [2]]
    rehearsed = [
        m for m in task.prepare([0, first, first + 1], slice(None), 0) if m.whole is not None
    ]
    [micro] = rehearsed
    assert micro.whole.shape[-1] == 3000
    assert float(task.weight(micro)) == sum(len(task._tokens[i]) for i in (first, first + 1)) + 1


def test_none_is_joined_where_that_is_turned_off(make_task):
    batch = list(range(len(TEXTS)))
    assert make_task(joined=0.0)._units(batch, 0) == [[index] for index in batch]


def test_a_clip_of_the_target_is_learnt_in_the_context_that_it_is_decoded_in(make_task):
    task = make_task(joined=0.0)
    decoded_s = taught_context_s(max(clip.seconds for clip in task.target.clips), 30.0)
    own_s = [task.speech.context_s(clip.seconds, shortest=0) for clip in task.train.clips]
    target, rehearsed = own_s[0], own_s[task._targets]
    assert target < decoded_s  # silence follows the longest clip
    [first] = task.prepare([0], slice(None), 0)
    [second] = task.prepare([task._targets], slice(None), 0)
    assert first.features.shape[-1] == round(100 * decoded_s)
    assert second.features.shape[-1] == round(100 * rehearsed)


def test_clips_of_other_languages_are_not_joined(make_task):
    task = make_task()
    for index, language in enumerate(["en", "de", "en", "de"]):
        own = replace(task.train.clips[index], language=language)
        task.train.clips[index] = own
        task._tokens[index] = [5]
    assert task._units([0, 1, 2, 3], 0) == [[0, 2], [1, 3]]


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.lists(st.floats(0.2, 30.0), min_size=1, max_size=30),
    tokens=st.integers(0, 300),
    share=st.sampled_from([0.3, 0.5, 1.0]),
    epoch=st.integers(0, 3),
    slow=st.booleans(),
    world=st.integers(1, 3),
)
def test_every_clip_of_a_batch_is_learnt_once_and_every_window_fits(
    make_task, seconds, tokens, share, epoch, slow, world
):
    task = make_task(share, speed=[0.8, 1.2] if slow else None)
    clip = task.train.clips[0]
    task.train.clips[:] = [replace(clip, seconds=s, start=0.0, end=s) for s in seconds]
    task._tokens = [[7] * (tokens * (index % 3) // 2) for index in range(len(seconds))]
    task._targets = len(seconds) // 2
    batch = list(np.random.default_rng(0).permutation(len(seconds)))
    units = task._units(batch, epoch)
    assert sorted(index for unit in units for index in unit) == list(range(len(seconds)))
    for unit in units:
        assert len({index >= task._targets for index in unit}) == 1
        if len(unit) > 1:
            longest_s = sum(seconds[index] / task._augmenter.slowest + 1.0 for index in unit)
            assert longest_s <= WINDOW_S
            assert sum(len(task._tokens[index]) for index in unit) <= decoder_room(task.speech)
            assert all(task._tokens[index] for index in unit)
    assert units == task._units(batch, epoch)
    shared = [units[slice(rank, None, world)] for rank in range(world)]
    assert sorted(unit for part in shared for unit in part) == sorted(units)


def test_how_far_to_go_back_is_decided_by_windows_too(make_task, monkeypatch):
    """By a model that ends after the first clip of a window, as single ones do not show."""
    task = make_task()
    clips = task.validation.clips
    samples = [(clip.samples(), clip.text) for clip in clips]

    def transcribe(self, waves, **options):
        firsts = [
            next(text for own, text in samples if np.array_equal(wave[: len(own)], own))
            for wave in waves
        ]
        return [SimpleNamespace(text=text) for text in firsts]

    monkeypatch.setattr(Recognizer, "transcribe", transcribe)
    windows = [own for own in joined_clips(clips) if len(own) > 1]
    assert windows
    assert task.path_size == len(clips) + len(windows)
    every = list(range(task.path_size))
    found = task.validate_path(every, CPU)
    lost = [sum(len(clip.text.split()) for clip in own[1:]) for own in windows]
    assert [record.word_errors for record in found] == [0] * len(clips) + lost
    assert task.summarize(task.validate(every[: len(clips)], CPU))["wer"] == 0
    assert task.summarize(found)["wer"] > 0.2
    # As two processes share it.
    shared = [task.validate_path(every[rank::2], CPU) for rank in range(2)]
    assert [shared[index % 2][index // 2] for index in every] == found
