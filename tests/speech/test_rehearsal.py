"""A transfer that rehearses general speech, and the run that says what is forgotten."""

import copy
import csv
import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, ROOT, write_dataset, write_wave_backbone

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config, read_yaml
from mmtransfer.errors import UserError
from mmtransfer.hub.metadata import read_metadata
from mmtransfer.runs import training as run_training
from mmtransfer.runs.card import model_card
from mmtransfer.runs.report import assess_forgetting, forgetting_note
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.clips import bundled_speech, load_clips
from mmtransfer.speech.splits import choose_speech_rehearsal, transcribe
from mmtransfer.speech.whisper import load_speech_model
from mmtransfer.speech.whisper_task import SpeechTask
from mmtransfer.text.classifier_task import SentimentTask
from mmtransfer.transfer import trainer as training
from mmtransfer.transfer.splits import choose_rehearsal
from mmtransfer.transfer.task import plan_mixed

pytestmark = pytest.mark.usefixtures("unmeasured")
CPU = torch.device("cpu")
FINISH = SpeechTask.finish  # which `unmeasured` replaces


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    write_dataset(folder / "train", ["gate one", "gate two", "stop", "all clear", "go", "hold"])
    write_dataset(folder / "validation", ["gate two", "stop"])
    write_dataset(folder / "general", ["a quiet evening", "the old library", "so it was"])
    return folder


def values(folder, source, run_dir, **sections):
    return {
        "source_model": str(source),
        "run_dir": str(run_dir),
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "validation"),
            "rehearsal": str(folder / "general"),
            **sections.pop("data", {}),
        },
        "transfer": {"interpolate": "none", **sections.pop("transfer", {})},
        "train": {"steps": 4, "batch_seconds": 8, "full_context": 0.0, "learning_rate": 1e-3},
        "runtime": {"threads": 1, "device": "cpu"},
        **sections,
    }


# --- batches -----------------------------------------------------------------------------------


def test_every_batch_holds_the_asked_share_of_rehearsal():
    rng = np.random.default_rng(0)
    lengths = [*[3.0] * 80, *rng.uniform(2, 8, 50)]
    seconds = np.array(lengths)
    seen = []
    for epoch in range(3):
        plan = plan_mixed(lengths, 80, 0.4, 48, seed=(0, 0), epoch=epoch)
        assert sorted(i for batch in plan for i in batch if i < 80) == list(range(80))
        shares = [seconds[[i for i in b if i >= 80]].sum() / seconds[b].sum() for b in plan]
        assert min(shares) > 0.1
        assert np.mean(shares) == pytest.approx(0.4, abs=0.06)
        assert all(seconds[b].sum() <= 48 for b in plan)
        seen += [i for batch in plan for i in batch if i >= 80]
    assert plan == plan_mixed(lengths, 80, 0.4, 48, seed=(0, 0), epoch=2)
    assert set(seen) == set(range(80, 130))  # walked through before any is repeated often
    assert np.bincount(seen)[80:].max() - np.bincount(seen)[80:].min() <= 2


def test_long_rehearsal_clips_do_not_lengthen_the_context_of_the_target(
    data, random_whisper, tmp_path
):
    config = values(data, random_whisper, tmp_path / "run")
    config["train"]["joined"] = 0.0
    task = runs.set_up(build_config(config), CPU)
    assert isinstance(task, SpeechTask)
    long = task._targets
    task.train.clips[long] = replace(task.train.clips[long], seconds=20.0)
    micros = task.prepare([0, 1, long], slice(None), 0)
    assert [micro.features.shape[0] for micro in micros] == [2, 1]
    assert micros[0].features.shape[-1] < 300
    assert micros[1].features.shape[-1] >= 2000


@pytest.mark.parametrize("frozen", ["none", "all"])
def test_rehearsed_clips_are_learnt_as_the_source_in_its_full_window_takes_them(
    data, random_whisper, tmp_path, frozen
):
    config = values(data, random_whisper, tmp_path / "run")
    config["transfer"]["stages"] = [{"frozen": frozen}]
    # The source and what is trained take in the same then.
    config["train"] |= {"full_context": 1.0, "batch_seconds": 300, "joined": 0.0}
    task = runs.set_up(build_config(config), CPU)
    assert isinstance(task, SpeechTask)
    task.begin(task.stages[0], CPU)
    micros = task.prepare(range(len(task.train)), slice(None), 0)
    task.model.eval()
    known = [micro for micro in micros if micro.whole is not None]
    assert sum(len(micro.features) for micro in known) == 3
    rehearsed = max(known, key=lambda micro: micro.features[0].numel())  # in the full window
    assert float(task.loss(rehearsed, CPU)) == pytest.approx(0, abs=0.05)
    assert all(float(task.loss(m, CPU)) > 1 for m in micros if m.whole is None)
    halves = task.split(rehearsed)
    total = sum(float(task.loss(half, CPU)) for half in halves)
    assert total == pytest.approx(float(task.loss(rehearsed, CPU)), abs=1e-3)
    with torch.no_grad():
        for weights in task.model.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    assert float(task.loss(rehearsed, CPU)) > 1  # the teacher stays as it was


def test_contexts_are_safe_for_other_speech_as_well(data, random_whisper, tmp_path, monkeypatch):
    def measured(**sections):
        config = values(data, random_whisper, tmp_path / "run", **sections)
        task = runs.set_up(build_config(config), CPU)
        assert isinstance(task, SpeechTask)
        found = []
        monkeypatch.setattr(
            task, "measure_shortest_context", lambda device, sets: found.append(sets)
        )
        monkeypatch.setattr(task, "measure_window", lambda *given: None)
        FINISH(task, CPU)
        return [[clip.text for clip in clips] for clips in found[0]]

    general = ["a quiet evening", "the old library", "so it was"]
    assert measured() == [["gate two", "stop"], general]
    assert measured(data={"rehearsal": "none"}) == [["gate two", "stop"]]
    other = write_dataset(tmp_path / "other", ["elsewhere"])
    named = measured(data={"source_domain": {"other": str(other)}})
    assert named == [["gate two", "stop"], ["elsewhere"]]


def test_a_run_rehearses_and_says_so(data, random_whisper, tmp_path, caplog):
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, "mmtransfer"):
        report = runs.train(build_config(values(data, random_whisper, run)))
    assert "40 % of each batch; data.rehearsal: none turns it off" in caplog.text
    assert report["rehearsal"] == {"data": str(data / "general"), "share": 0.4}
    assert report["data"]["rehearsal"]["clips"] == 3
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Rehearsal: 40% general data of its own." in card
    assert str(data) not in card


# --- what is rehearsed ---------------------------------------------------------------------------


def chosen(language, **sections):
    config = build_config(sections)
    if config.task == "sentiment":
        return choose_rehearsal(config)
    return choose_speech_rehearsal(config, language, SpeechTask.rehearsal_share(config))


def test_speech_in_english_rehearses_by_default_and_nothing_else_does(caplog):
    assert chosen("en") == "bundled"
    assert chosen("en", data={"rehearsal": "none"}) is None
    assert chosen("en", transfer={"rehearsal": 0}) is None
    assert chosen(None) is None  # a new output has nothing to forget
    assert chosen(None, task="sentiment") is None
    assert not caplog.text
    with caplog.at_level(logging.INFO, "mmtransfer"):
        assert chosen("zh") is None
    assert "rehearsal: off" in caplog.text
    assert "'zh'" in caplog.text
    assert chosen("zh", data={"rehearsal": "set"}) == "set"
    assert SentimentTask.rehearsal_share(build_config({})) == 0
    with pytest.raises(UserError, match=r"needs source-domain data: set data\.rehearsal"):
        chosen("zh", transfer={"rehearsal": 0.3})
    with pytest.raises(UserError, match=r"needs source-domain data: set data\.rehearsal"):
        chosen(None, task="sentiment", transfer={"rehearsal": 0.3})


def test_every_speech_recipe_rehearses_unless_its_output_is_new():
    for path in (ROOT / "configs" / "video_monitoring").glob("*.yaml"):
        config = build_config(read_yaml(path))
        assert config.data.rehearsal == "auto", path
        assert config.transfer.rehearsal is None, path


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"language": "zh", "rehearsal": "bundled"}}, "is speech in English"),
        ({"transfer": {"rehearsal": 0}}, "data.rehearsal is not used"),
        ({"data": {"rehearsal": "nothing_here"}}, "nothing_here: no such file or folder"),
        ({"task": "short_context"}, "forgets nothing"),
    ],
)
def test_rehearsal_that_cannot_be(sections, message, data, tmp_path, capsys):
    config = values(data, "bundled:whisper-base", tmp_path / "run", **sections)
    config["data"].setdefault("language", "en")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line


def test_rehearsal_must_not_be_what_forgetting_is_measured_on(data, random_whisper, tmp_path):
    config = values(data, random_whisper, tmp_path / "run")
    config["data"]["source_domain"] = {"general": str(data / "general")}
    with pytest.raises(UserError, match="Scores would flatter the model"):
        runs.train(build_config(config))


def test_bundled_speech_is_general_and_small():
    folder = bundled_speech("en")
    assert folder is not None
    assert bundled_speech("zh") is None
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 8_000_000
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file_name"] for row in rows} == {path.name for path in folder.glob("*.ogg")}
    assert len({row["group"] for row in rows}) > 30  # voices
    assert all(re.fullmatch(r"[A-Z0-9].*[.?]", row["transcription"]) for row in rows)
    lengths = [len(decode_clip(folder / row["file_name"])) / 16_000 for row in rows[::25]]
    lengths += [len(decode_clip(folder / row["file_name"])) / 16_000 for row in rows[-10:]]
    assert min(lengths) < 4
    assert 20 < max(lengths) < 30


# --- unlabelled rehearsal ------------------------------------------------------------------------


def test_speech_without_transcripts_gets_the_sources(whisper_tiny, tmp_path, caplog):
    for path in sorted((EXAMPLE / "source").glob("*.ogg"))[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = build_config({"source_model": str(whisper_tiny)})
    speech = load_speech_model(str(whisper_tiny), short_contexts=False)
    clips = load_clips(tmp_path, config.data, name="rehearsal", labelled=False)
    assert not any(clip.text for clip in clips.clips)
    silent = replace(clips.clips[0], seconds=1.0, digest="silence", cached=None, end=0.2)
    clips.clips.append(silent)
    with caplog.at_level(logging.INFO, "mmtransfer"):
        found = transcribe(speech, clips, config, CPU)
    texts = [clip.text for clip in found.clips]
    assert len(texts) == 3
    assert "1 clips skipped, on which the source model is not confident" in caplog.text
    assert texts[0].startswith("The Council voted last night")
    # A second run finds them in the cache, in the same words.
    speech.model = speech.model.to("cpu")
    speech.processor = None
    again = transcribe(speech, clips, config, CPU)
    assert [clip.text for clip in again.clips] == texts


def test_a_new_output_cannot_transcribe_rehearsal(data, tmp_path):
    backbone = write_wave_backbone(tmp_path / "wave")
    general = tmp_path / "general"
    write_dataset(general, ["", ""])
    config = values(data, backbone, tmp_path / "run", head={"type": "ctc"})
    config["data"]["rehearsal"] = str(general)
    with pytest.raises(UserError, match="no transcripts, and"):
        runs.train(build_config(config))


# --- what is forgotten ---------------------------------------------------------------------------


def test_the_last_line_says_what_is_forgotten_and_what_helps(
    data, random_whisper, tmp_path, capsys, monkeypatch
):
    config = values(data, random_whisper, tmp_path / "run")
    config["data"] |= {"source_domain": {"speech": str(data / "general")}, "rehearsal": "none"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def rated(measured, rate):
        def rerated(*arguments):
            found = measured(*arguments)
            scores = found["source domain speech"]
            clips = len(scores["outcomes"]["errors"])
            scores["wer"] = rate
            scores["outcomes"] |= {"errors": [round(100 * rate)] * clips, "units": [100] * clips}
            return found

        return rerated

    monkeypatch.setattr(run_training, "_scores_before", rated(run_training._scores_before, 0.05))
    monkeypatch.setattr(run_training, "_scores", rated(run_training._scores, 0.08))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == (
        "forgotten beyond transfer.max_forgetting (0.02): speech 0.0500 -> 0.0800; rehearse: set "
        "data.rehearsal to bundled, or data like these"
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["forgetting"]["over"] == ["speech"]
    assert "More than 0.02 is lost on: speech." in (tmp_path / "run" / "README.md").read_text()

    kept = report | {"forgetting": report["forgetting"] | {"over": [], "remedy": None}}
    assert forgetting_note(kept) is None
    saved = read_metadata(tmp_path / "run" / "model")
    assert saved is not None
    assert "is lost on" not in model_card(build_config(config), kept, saved)
    report["rehearsal"]["share"] = 0.4
    judged = assess_forgetting(
        build_config(config | {"transfer": {"max_forgetting": 0.01}}), report
    )
    assert judged["limit"] == 0.01
    assert "raise transfer.rehearsal (now 0.4)" in judged["remedy"]


# --- back towards the source ---------------------------------------------------------------------


def tuned(data, source, stages, **transfer):
    """A task of these stages whose weights have moved by noise, and the line to its source."""
    transfer = {"interpolate": "auto", "stages": stages, **transfer}
    config = build_config(values(data, source, "unused", transfer=transfer))
    task = runs.set_up(config, CPU)
    path = run_training.source_path(config, task)
    task.begin(task.stages[-1], CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return task, path


def merged(task):
    """The weights of the plain model that the task's adapter makes."""
    task = copy.deepcopy(task)
    task.merge()
    return {name: value for name, value in task.model.state_dict().items()}


@pytest.mark.parametrize(
    "stages",
    [
        [{"frozen": "none"}],
        pytest.param([{"frozen": "all"}], marks=pytest.mark.slow),
        [{"frozen": "none", "adapter": {"type": "lora", "r": 2}}],
    ],
    ids=["all weights", "decoder", "lora"],
)
def test_weights_lie_on_the_line_from_the_source(stages, data, random_whisper):
    source = load_speech_model(str(random_whisper)).model.state_dict()
    task, path = tuned(data, random_whisper, stages)
    end = merged(task)
    moved = [name for name in source if not torch.equal(source[name], end[name])]
    assert moved
    path.close(task.model)
    for share in (0.3, 1.0, 0.7):
        path.go(share)
        found = merged(task)
        for name in source:
            wanted = source[name] + share * (end[name] - source[name])
            torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)


def test_auto_goes_back_as_far_as_the_score_is_kept(data, random_whisper, monkeypatch):
    task, path = tuned(data, random_whisper, [{"frozen": "none"}])
    rates = {1.0: 0.01, 0.9: 0.011, 0.8: 0.009, 0.7: 0.01, 0.6: 0.0119, 0.5: 0.0121, 0.4: 0.0}
    seen = []

    def evaluate(task, accelerator, *, on_path):
        assert on_path
        seen.append(gone[-1])
        return {"wer": rates[gone[-1]]}

    gone = []
    go = path.go

    def noted(share):
        gone.append(share)
        go(share)

    monkeypatch.setattr(path, "go", noted)
    monkeypatch.setattr(training, "evaluate_task", evaluate)
    assert training.go_back(task, path, "auto", None) == 0.6
    assert seen == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert gone[-1] == 0.6
    rates |= dict.fromkeys((0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 0.02)
    assert training.go_back(task, path, "auto", None) == 1.0
    assert gone[-1] == 1.0
    rates |= {0.9: 0.01, 0.8: 0.01, 0.7: 0.01, 0.6: 0.01, 0.5: 0.01, 0.4: 0.01}
    assert training.go_back(task, path, "auto", None) == 0.4
    seen.clear()
    assert training.go_back(task, path, 0.5, None) == 0.5
    assert (gone[-1], seen) == (0.5, [])


def test_what_has_no_line_to_the_source_is_refused_or_left(data, random_whisper):
    dora = [{"frozen": "none", "adapter": {"type": "dora", "r": 2}}]
    assert tuned(data, random_whisper, dora)[1] is None
    with pytest.raises(UserError, match="with lora adapters"):
        tuned(data, random_whisper, dora, interpolate=0.5)
    assert tuned(data, random_whisper, [{"frozen": "none"}], interpolate="none")[1] is None
