"""Models combined into one: the arithmetic of each method, what is refused, and what comes out."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import write_dataset, write_text_backbone, write_texts
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import mmtransfer
from mmtransfer import UserError, load, publish, runs
from mmtransfer.cli import main
from mmtransfer.config import RuntimeConfig, build_config
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.runs.merge import merge
from mmtransfer.runs.parents import carry_settings
from mmtransfer.runs.tensors import arithmetic, interpolation, merge_folders
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.text.classifier import TextModel
from mmtransfer.text.ensemble import fit_weights

CPU = RuntimeConfig(device="cpu", threads=1)


def values(folder, backbone, domain, run, **train):
    """A run on a domain, whose texts are like those of the others."""
    return {
        "task": "sentiment",
        "source_model": str(backbone),
        "run_dir": str(run),
        "data": {
            "train": str(folder / f"{domain}.csv"),
            "validation": str(folder / f"{domain}_validation.csv"),
        },
        "train": {
            "steps": 30,
            "learning_rate": 3e-3,
            "head_learning_rate": 1e-2,
            "warmup_steps": 2,
            "batch_tokens": 160,
            "evaluate_every": 10,
            **train,
        },
        "runtime": {"device": "cpu", "threads": 1},
    }


def recorded(run):
    """What a model's own file says of it."""
    return json.loads(Path(run, "model", "mmtransfer.json").read_text())


def loaded(name):
    """A text classifier, or several in one."""
    model = load(str(name))
    assert isinstance(model, TextModel)
    return model


@pytest.fixture(scope="module")
def domains(text_backbone, tmp_path_factory):
    """A folder with two domains, and a run on each from the same source."""
    folder = tmp_path_factory.mktemp("domains")
    for number, domain in enumerate(("books", "films")):
        write_texts(folder / f"{domain}.csv", 48, seed=number)
        write_texts(folder / f"{domain}_validation.csv", 40, seed=number + 10)
        config = values(folder, text_backbone, domain, folder / domain, keep_checkpoints=2)
        runs.train(build_config(config))
    return folder


def weights(run, name="model.safetensors"):
    return load_file(Path(run, "model", name))


def pair(domains):
    return [str(domains / "books"), str(domains / "films")]


# --- the arithmetic ------------------------------------------------------------------------------


def test_a_uniform_soup_is_the_mean_and_an_ordinary_model(domains, tmp_path):
    merged = mmtransfer.merge(pair(domains), str(tmp_path / "run"), runtime=CPU)
    books, films, soup = (weights(p) for p in (*pair(domains), tmp_path / "run"))
    for name, value in soup.items():
        torch.testing.assert_close(value, (books[name] + films[name]) / 2)
    head = [weights(p, "head.safetensors") for p in (*pair(domains), tmp_path / "run")]
    torch.testing.assert_close(
        head[2]["output.weight"], (head[0]["output.weight"] + head[1]["output.weight"]) / 2
    )
    # It is loaded, evaluated and published like any other.
    assert len(loaded(tmp_path / "run").predict(["good port"])) == 1
    for one in merged.domains:
        data = str(domains / f"{one.name}_validation.csv")
        assert runs.evaluate(str(tmp_path / "run"), data)["macro_f1"] == pytest.approx(one.merged)
    assert "model.safetensors" in publish(tmp_path / "run", "user/name", dry_run=True)
    assert [one.name for one in merged.domains] == ["books", "films"]
    assert merged.mean == pytest.approx(np.mean([one.merged for one in merged.domains]))


def test_report_and_card_name_the_parents_and_no_place(domains, tmp_path):
    merged = merge(pair(domains), str(tmp_path / "run"), runtime=CPU)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "uniform"
    assert set(report["domains"][0]["parents"]) == set(pair(domains))
    assert report["domains"][0]["change"]["p"] <= 1
    for path in (tmp_path / "run" / "README.md", tmp_path / "run" / "model" / "README.md"):
        card = ModelCard.load(path)
        assert "- `books`" in card.content
        assert str(domains) not in card.content
        assert [r["dataset"]["name"] for r in card.data.to_dict()["model-index"][0]["results"]]
    table = str(merged)
    assert re.search(r"books .*\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\]", table)
    assert "mean of targets" in table
    known = json.loads((tmp_path / "run" / "model" / "mmtransfer.json").read_text())
    assert known["parents"] == ["books", "films"]
    outcomes = json.loads((tmp_path / "run" / "outcomes.json").read_text())
    assert len(outcomes["after"]["films"]["targets"]) == 40


def test_a_model_of_another_run_is_left_as_it_was(domains, tmp_path):
    before = weights(domains / "books")
    merge(pair(domains), str(tmp_path / "run"), runtime=CPU)
    after = weights(domains / "books")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob(".run*"))  # nothing that was tried is left behind


def test_a_share_of_the_way_from_the_source(domains, text_backbone, tmp_path):
    run = tmp_path / "run"
    merge(
        [str(domains / "books")], str(run), source_model=str(text_backbone), share=0.25, runtime=CPU
    )
    source, tuned = load_file(text_backbone / "model.safetensors"), weights(domains / "books")
    for name, value in weights(run).items():
        torch.testing.assert_close(value, source[name] + 0.25 * (tuned[name] - source[name]))
    # The source has no head; the tuned one stays.
    own = weights(domains / "books", "head.safetensors")
    assert torch.equal(weights(run, "head.safetensors")["output.weight"], own["output.weight"])


def test_the_source_may_stand_among_the_models(domains, text_backbone, tmp_path):
    models = [str(text_backbone), str(domains / "books")]
    merged = merge(models, str(tmp_path / "run"), share=0.5, runtime=CPU)
    assert merged.method == "interpolate"
    assert merged.source == str(text_backbone)
    assert merged.parents == [str(domains / "books")]


def test_a_sweep_picks_the_nearest_point_that_is_as_good_and_draws_it(
    domains, text_backbone, tmp_path
):
    run, models = tmp_path / "run", [str(text_backbone), str(domains / "books")]
    merged = merge(models, str(run), runtime=CPU)
    assert [point.value for point in merged.points] == [round(0.1 * n, 1) for n in range(1, 11)]
    scores = {point.value: point.scores["books"]["value"] for point in merged.points}  # type: ignore[index]
    fine = [share for share, score in scores.items() if max(scores.values()) - score <= 0.003]
    assert merged.chosen == min(fine)
    page = (run / "sweep.html").read_text()
    assert "<svg" in page
    assert page.count("<circle") == 10
    assert not re.search(r"(src|href)=|https?://|url\(", page)  # it needs no other file


def test_task_arithmetic_at_half_is_the_mean_of_two(domains, text_backbone, tmp_path):
    options: dict[str, Any] = {"source_model": str(text_backbone), "runtime": CPU}
    merge(pair(domains), str(tmp_path / "mean"), runtime=CPU)
    run = tmp_path / "run"
    merge(pair(domains), str(run), method="task_arithmetic", scale=0.5, **options)
    mean, found = weights(tmp_path / "mean"), weights(run)
    for name in mean:
        torch.testing.assert_close(found[name], mean[name], atol=1e-6, rtol=1e-5)


def test_ties_keeps_the_largest_changes_of_one_sign():
    start = torch.zeros(4)
    changes = [torch.tensor([4.0, 3.0, -0.1, 0.2]), torch.tensor([2.0, -5.0, 0.1, 0.3])]
    found = arithmetic("ties", 1.0, 0.5)(start, changes)
    assert found.tolist() == [3.0, -5.0, 0.0, 0.0]


def test_dare_keeps_what_is_added_in_the_mean_and_is_drawn_from_the_seed(tmp_path):
    rule = arithmetic("dare", 1.0, 0.25)
    torch.manual_seed(0)
    found = rule(torch.zeros(20_000), [torch.ones(20_000)])
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean() == pytest.approx(1, abs=0.05)


def test_names_of_tensors_are_found_with_and_without_the_part_around_them(tmp_path):
    """A bare encoder, and a classifier of the library's around the same."""
    bare = write_text_backbone(tmp_path / "bare")
    around = write_text_backbone(tmp_path / "around", labels=2)
    merge_folders([around], bare, interpolation(0.5), tmp_path / "out")
    old, new = load_file(bare / "model.safetensors"), load_file(around / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(found[f"bert.{name}"], (old[name] + new[f"bert.{name}"]) / 2)
    assert torch.equal(found["classifier.weight"], new["classifier.weight"])


def test_a_greedy_soup_leaves_out_what_makes_it_worse(domains, text_backbone, tmp_path):
    # A run that learnt the opposite.
    rows = (domains / "books.csv").read_text()
    swapped = rows.replace("negative", "#").replace("positive", "negative").replace("#", "positive")
    (domains / "opposite.csv").write_text(swapped)
    config = values(domains, text_backbone, "books", domains / "opposite")
    config["data"]["train"] = str(domains / "opposite.csv")
    config["data"]["allow_leaks"] = ["same-text"]
    runs.train(build_config(config))
    models = [*pair(domains), str(domains / "opposite")]
    merged = merge(models, str(tmp_path / "run"), method="greedy", runtime=CPU)
    assert isinstance(merged.chosen, list)
    assert str(domains / "opposite") not in merged.chosen
    known = [recorded(name) for name in merged.chosen]
    own = recorded(tmp_path / "run")
    assert own["parents"] == [Path(name).name for name in merged.chosen]
    assert own["temperature"] == pytest.approx(
        np.exp(np.mean([np.log(one["temperature"]) for one in known]))
    )
    best = max(np.mean([one.parents[name] for one in merged.domains]) for name in models)
    assert merged.mean is not None
    assert merged.mean >= best - 1e-9


def test_the_last_checkpoints_of_a_run_are_averaged(domains, tmp_path):
    kept = sorted((domains / "books" / "snapshots").iterdir())
    assert [path.name for path in kept] == ["step-00000020", "step-00000030"]
    merge([str(domains / "books")], str(tmp_path / "run"), method="last", runtime=CPU)
    parts = [load_file(path / "model.safetensors") for path in kept]
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)
    # What is fitted after training is that of the finished run.
    found = recorded(tmp_path / "run")["temperature"]
    assert found == recorded(domains / "books")["temperature"] != 1


def test_settings_that_training_measured_are_those_that_are_safe_for_all(tmp_path):
    """One of an earlier version, whose windows were not recorded, has none."""

    def model(name, number, **values):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mmtransfer.json").write_text(json.dumps({"form": "adapter", **values}))
        (folder / "generation_config.json").write_text(
            json.dumps({"language": "defr"[number:][:2]})
        )
        return cast(Checkpoint, SimpleNamespace(folder=folder, source=name))

    short = {"margin_s": 0.0, "languages": ["en", "de"], "longest_s": 15.0}
    other = {"margin_s": 1.0, "languages": ["de", "fr"], "longest_s": 4.0}
    cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        (
            {"shortest_context_s": 2.0, "window_s": 19.0},
            {"shortest_context_s": 10.0},
            {"shortest_context_s": 10.0, "window_s": 0.0},
        ),
        (
            {"shortest_context_s": 1.5, "short_reader": short},
            {"shortest_context_s": 2.0, "short_reader": other},
            {
                "shortest_context_s": 2.0,
                "short_reader": {"margin_s": 1.0, "languages": ["de"], "longest_s": 4.0},
            },
        ),
    ]
    for number, (one, two, expected) in enumerate(cases):
        parents = [model(f"{number}one", 0, **one), model(f"{number}two", 2, **two)]
        merged = model(f"{number}merged", 0, **one)
        carry_settings(merged.folder, parents)
        found = json.loads((merged.folder / "mmtransfer.json").read_text())
        names = [parent.source for parent in parents]
        assert found == {"form": "adapter", "parents": names, **expected}
        generation = json.loads((merged.folder / "generation_config.json").read_text())
        assert generation["language"] is None


# --- ensembles -----------------------------------------------------------------------------------


def test_weights_of_an_ensemble_are_those_of_the_better_members():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 300)
    good = np.where(targets[:, None] == np.arange(2), 0.9, 0.1)
    chance = np.full((300, 2), 0.5)
    found = fit_weights(np.stack([good, chance, 1 - good]), targets)
    assert sum(found) == pytest.approx(1)
    assert found[0] > 0.99


def test_an_ensemble_of_models_that_cannot_be_merged_is_an_ordinary_model(domains, tmp_path):
    other = write_text_backbone(tmp_path / "other", "distilbert", layers=2)
    runs.train(build_config(values(domains, other, "films", tmp_path / "films")))
    models = [str(domains / "books"), str(tmp_path / "films")]
    with pytest.raises(UserError, match="--method ensemble"):
        merge(models, str(tmp_path / "run"), runtime=CPU)
    merged = merge(models, str(tmp_path / "run"), method="ensemble", runtime=CPU)
    found, members = loaded(tmp_path / "run"), [loaded(name) for name in models]
    # One whose members alone differ is another model.
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "run", copied)
    shutil.copytree(
        copied / "model" / "member-0", copied / "model" / "member-1", dirs_exist_ok=True
    )
    digests = {resolve(str(run)).digest for run in (tmp_path / "run", copied)}
    assert len(digests) == 2
    texts = ["good port", "the awful mayor was not here"]
    expected = sum(
        weight * np.array([list(one.probabilities.values()) for one in member.predict(texts)])
        for weight, member in zip(found.weights, members, strict=True)
    )
    shares = [list(one.probabilities.values()) for one in found.predict(texts)]
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    data = str(domains / "books_validation.csv")
    score = runs.evaluate(str(tmp_path / "run"), data)
    assert score["macro_f1"] == pytest.approx(merged.domains[0].merged)
    assert [row["label"] for row in predicted(tmp_path / "run", texts)]
    assert "member-1/model.safetensors" in publish(tmp_path / "run", "user/name", dry_run=True)
    with pytest.raises(UserError, match="an ensemble"):
        merge([models[0], str(tmp_path / "run")], str(tmp_path / "x"), method="ensemble")


def predicted(model, texts):
    from mmtransfer.text.prediction import predict_texts

    return predict_texts(str(model), texts, None, runtime=CPU)


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(text_backbone, domains):
    """Two runs that are saved as adapters on a base that others have."""
    patch = pytest.MonkeyPatch()
    patch.setattr("mmtransfer.hub.metadata.Base.is_portable", True)
    try:
        for domain in ("books", "films"):
            config = values(domains, text_backbone, domain, domains / f"lora_{domain}")
            config["transfer"] = {"preset": "lora"}
            assert runs.train(build_config(config))["form"] == "adapter"
    finally:
        patch.undo()
    return [str(domains / "lora_books"), str(domains / "lora_films")]


def test_the_mean_of_adapters_is_the_mean_of_what_they_add(adapters, text_backbone, tmp_path):
    merged = merge(adapters, str(tmp_path / "run"), runtime=CPU)
    assert merged.form == "adapter"
    models = [loaded(name).network.state_dict() for name in (*adapters, str(tmp_path / "run"))]
    for name, value in models[2].items():
        expected = (models[0][name] + models[1][name]) / 2
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_part_of_an_adapter_is_part_of_what_it_adds(adapters, text_backbone, tmp_path):
    merge(adapters[:1], str(tmp_path / "run"), share=0.3, runtime=CPU)
    tuned = loaded(adapters[0]).network.state_dict()
    found = loaded(tmp_path / "run").network.state_dict()
    start = load_file(text_backbone / "model.safetensors")
    for name, value in start.items():
        key = f"encoder.model.{name}"
        expected = value + 0.3 * (tuned[key] - value)
        torch.testing.assert_close(found[key], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_adapters_are_combined_by_pefts_own_rules(adapters, tmp_path, method):
    merged = merge(adapters, str(tmp_path / "run"), method=method, scale=1.0, runtime=CPU)
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert settings["r"] == 8  # unlike a sum, which has the ranks of both
    assert len(loaded(tmp_path / "run").predict(["good port"])) == 1
    assert merged.form == "adapter"


def test_an_adapter_and_a_whole_model_are_refused(adapters, domains, tmp_path):
    with pytest.raises(UserError, match="merge_adapter: true"):
        merge([adapters[0], str(domains / "films")], str(tmp_path / "run"), runtime=CPU)


# --- speech --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recogniser(random_whisper, tmp_path_factory):
    """A run of a random Whisper on two tones, with a source-domain set."""
    folder = tmp_path_factory.mktemp("recogniser")
    train = write_dataset(folder / "train", ["gate one", "gate two"])
    validation = write_dataset(folder / "validation", ["gate one", "gate two"])
    old = write_dataset(folder / "old", ["crane one", "crane two"])
    config = {
        "source_model": str(random_whisper),
        "run_dir": str(folder / "run"),
        "data": {
            "train": str(train),
            "validation": str(validation),
            "rehearsal": "none",
            "source_domain": {"old": str(old)},
        },
        "transfer": {"interpolate": "none"},
        "train": {"steps": 8, "learning_rate": 3e-3},
        "runtime": {"device": "cpu", "threads": 1},
    }
    runs.train(build_config(config))
    return folder


def test_the_most_gain_that_keeps_the_source(recogniser, random_whisper, tmp_path, monkeypatch):
    monkeypatch.setattr("mmtransfer.runs.merge._SHARES", (0.3, 0.7))
    models = [str(random_whisper), str(recogniser / "run")]
    merged = merge(models, str(tmp_path / "run"), keep_source=0.1, runtime=CPU)
    target, old = merged.domains
    assert (target.name, old.name, old.is_source) == ("run", "old", True)
    assert "source domain: old" in str(merged)
    at = {p.value: {n: s["value"] for n, s in p.scores.items()} for p in merged.points}  # type: ignore[index]
    assert min(at) == 0
    assert max(at) == 1
    keeping = {v: s for v, s in at.items() if v and s["old"] - at[0]["old"] <= 0.1 + 1e-9}
    assert merged.chosen in keeping
    assert at[merged.chosen]["run"] == min(scores["run"] for scores in keeping.values())
    assert old.source is not None
    assert old.merged - old.source <= 0.1 + 1e-9
    # It decodes in contexts that are safe for what it was made of.
    contexts = [
        json.loads(Path(run, "model", "config.json").read_text())["shortest_context_s"]
        for run in (recogniser / "run", tmp_path / "run")
    ]
    assert contexts[0] == contexts[1]
    model = load(str(tmp_path / "run"))
    assert isinstance(model, SpeechModel)
    assert model.language is None


def test_the_command_prints_the_table(domains, text_backbone, tmp_path, capsys):
    models = [str(text_backbone), str(domains / "books")]
    assert main(["merge", *models, "--to", str(tmp_path / "run"), "--share", "0.5"]) == 0
    assert "books at 0.5 of the way from the source" in capsys.readouterr().out


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "interpolate"}, "one tuned model"),
        ({"share": 0.5}, "--share is not for uniform"),
        ({"method": "ties", "density": 3.0}, "expected a share, found 3"),
        ({"method": "ties"}, "Name it: --source-model"),
        ({"method": "other"}, "expected one of"),
        ({"method": "last"}, "takes one run"),
    ],
)
def test_settings_that_do_not_fit_get_one_line(domains, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        merge(pair(domains), str(tmp_path / "run"), runtime=CPU, **options)
    assert not (tmp_path / "run").exists()


def test_models_that_take_texts_differently_are_refused(domains, tmp_path):
    other = tmp_path / "films"
    shutil.copytree(domains / "films", other)
    known = recorded(other)
    known["text"] |= {"long_texts": "windows"}
    (other / "model" / "mmtransfer.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="expected the windows of texts of"):
        merge([str(domains / "books"), str(other)], str(tmp_path / "run"), runtime=CPU)
    shutil.rmtree(other / "model")
    shutil.copytree(domains / "books" / "snapshots", other / "snapshots", dirs_exist_ok=True)
    with pytest.raises(UserError, match="expected a finished run"):
        merge([str(other)], str(tmp_path / "run"), method="last", runtime=CPU)


def test_keep_source_without_a_source_set_is_refused(domains, text_backbone, tmp_path):
    models = [str(text_backbone), str(domains / "books")]
    with pytest.raises(UserError, match="--source-domain NAME=PATH"):
        merge(models, str(tmp_path / "run"), keep_source=0.005, runtime=CPU)


def test_models_of_other_sources_are_refused_with_the_reason(domains, tmp_path):
    other = write_text_backbone(tmp_path / "other")
    runs.train(build_config(values(domains, other, "films", tmp_path / "films", steps=1)))
    with pytest.raises(UserError, match=r"started from other.*Weights of different sources"):
        merge([str(domains / "books"), str(tmp_path / "films")], str(tmp_path / "run"))


def test_models_of_other_shapes_are_refused_with_the_reason(domains, text_backbone, tmp_path):
    deep = write_text_backbone(tmp_path / text_backbone.name, layers=4)
    runs.train(build_config(values(domains, deep, "films", tmp_path / "films", steps=1)))
    with pytest.raises(UserError, match=r"encoder\.layer\.3.*missing"):
        merge([str(domains / "books"), str(tmp_path / "films")], str(tmp_path / "run"))


def test_runs_that_held_out_different_parts_of_one_set_are_refused(
    domains, text_backbone, tmp_path
):
    """Each would be scored on what the other has learnt."""
    for seed in (0, 1):
        config = values(domains, text_backbone, "books", tmp_path / f"seed{seed}", steps=1)
        config["data"]["validation"] = None
        config["runtime"]["seed"] = seed
        runs.train(build_config(config))
    with pytest.raises(UserError, match="held out different parts"):
        merge([str(tmp_path / "seed0"), str(tmp_path / "seed1")], str(tmp_path / "run"))


def test_a_run_folder_that_is_there_is_refused_and_kept(domains, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["merge", *pair(domains), "--to", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_models_without_a_run_folder_are_merged_unscored(domains, tmp_path):
    places = [str(resolve(name).folder) for name in pair(domains)]
    copies = []
    for number, place in enumerate(places):
        copy = tmp_path / f"copy{number}" / "m"
        copy.parent.mkdir()
        copies.append(str(copy))
        Path(place).rename(copy)
    try:
        merged = merge(copies, str(tmp_path / "a" / "b" / "run"), runtime=CPU)
    finally:
        for copy, place in zip(copies, places, strict=True):
            Path(copy).rename(place)
    assert merged.domains == []
    assert "give --data NAME=PATH" in str(merged)
