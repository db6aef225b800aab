"""A structure chosen by short runs: what is tried, what becomes the run, what is resumed."""

import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import tone, write_dataset, write_media, write_texts
from support.children import start_training

from mmtransfer import load, runs
from mmtransfer.cli import main
from mmtransfer.config import build_config, merge
from mmtransfer.errors import UserError
from mmtransfer.runs import choose as choosing
from mmtransfer.runs.choose import Candidate, Trial, candidates
from mmtransfer.text.classifier import TextModel
from mmtransfer.transfer.stages import resolve_stages
from mmtransfer.transfer.trainer import train_stages


@pytest.fixture(scope="module")
def values(tmp_path_factory, text_backbone):
    folder = tmp_path_factory.mktemp("chosen")
    return {
        "task": "sentiment",
        "source_model": str(text_backbone),
        "data": {"train": str(write_texts(folder / "train.csv", 128))},
        "transfer": {"preset": "auto"},
        "train": {"steps": 32, "learning_rate": 3e-3, "head_learning_rate": 1e-2},
        "evaluation": {"bootstrap_samples": 100},
        # So much that the time which a rung takes decides nothing.
        "auto": {"budget_seconds": 1e6},
        "runtime": {"device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """The report of a choice that nothing disturbed, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return runs.train(build_config(merge(values, {"run_dir": str(folder)}))), folder


def without_times(choice):
    tried = [{k: v for k, v in one.items() if "seconds" not in k} for one in choice["tried"]]
    kept = ("chosen", "structure", "rate", "relatedness")
    return {name: choice[name] for name in kept} | {"tried": tried}


def facts_of(choice):
    return choosing.Facts(**choice["relatedness"], seconds=0.0)


def test_the_chosen_candidate_is_the_run_and_the_report_says_why(values, whole):
    report, folder = whole
    choice = report["choice"]
    facts = facts_of(choice)
    assert (facts.labels, facts.epoch_steps) == (128, 2)
    tuned, _ = candidates(build_config(values), facts)
    tried = [(one["candidate"], one["share"]) for one in choice["tried"]]
    # Ten steps at least, which is more than a quarter, so that there is one rung.
    assert tried == [(one.name, 10 / 32) for one in tuned]
    assert [one["steps"] for one in choice["tried"][:2]] == [20, 10]  # two stages, and one
    assert dict(tried).keys() >= {"end_to_end", "combined", "lora x10", "end_to_end x0.3"}
    assert all(one["examples"] == 64 for one in choice["tried"])  # half of the texts are held out
    assert len(choice["reasons"]) == 2
    assert choice["reasons"][0].startswith(f"{choice['chosen']} was chosen: it is")
    stages = {one.name: one for one in tuned}[choice["chosen"]].stages
    assert [stage["frozen"] for stage in report["stages"]] == [stage.frozen for stage in stages]
    assert all(stage["steps"] == 32 for stage in report["stages"])
    assert json.loads((folder / "report.json").read_text()) == report
    assert choice["reasons"][0] in (folder / "README.md").read_text()
    model = load(str(folder))
    assert isinstance(model, TextModel)
    # The configuration of the run is that of the choice, and trains the same without one.
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["transfer"]["preset"] == "end_to_end"
    assert kept["transfer"]["stages"][0]["steps"] == 32
    assert kept["train"]["evaluate_every"] == 10**9  # 13 texts are too few to select weights by
    names = {path.name for path in (folder / "trials").glob("*/*")}
    assert names <= {"trial.json", "metrics.jsonl"}
    with pytest.raises(UserError, match="holds a finished run"):
        runs.train(build_config(merge(yaml.safe_load((folder / "config.yaml").read_text()), {})))


def test_the_command_prints_what_was_tried(values, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    fixed = {"transfer": {"preset": "feature", "stages": [{"frozen": "all"}]}}
    path.write_text(yaml.safe_dump(merge(values, fixed)))
    arguments = ["train", str(path), "--run-dir", str(tmp_path / "run"), "--structure", "auto"]
    assert main([*arguments, "--budget-seconds", "0.001"]) == 2
    error = capsys.readouterr().err
    assert "auto.budget_seconds: 0.001 s hold no training after the short runs" in error
    assert main([*arguments, "--budget-seconds", "1000"]) == 2
    assert "holds an unfinished choice" in capsys.readouterr().err
    assert main([*arguments, "--budget-seconds", "1000", "--resume"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "what was tried" in printed
    assert "was chosen: it is usual with no fewer than 64 labels" in printed


def test_a_killed_choice_goes_on_where_it_was(values, whole, tmp_path, monkeypatch):
    """The result is the same, and nothing is tried twice but what was killed."""
    config = merge(values, {"run_dir": str(tmp_path / "run")})
    process = start_training(config, tmp_path, stop=(45, signal.SIGKILL))  # in the fourth trial
    assert process.wait() == -signal.SIGKILL
    done = sorted(path.parent.name for path in (tmp_path / "run").glob("trials/*/trial.json"))
    first = candidates(build_config(config), facts_of(whole[0]["choice"]))[0][:4]
    folders = [f"{one.structure}-{one.rate:g}-0.3125" for one in first]
    assert done == sorted(folders[:3])
    trained = []

    def noted(task, stages, config, *arguments, **options):
        trained.append(config.run_dir.rsplit("/", 1)[-1])
        return train_stages(task, stages, config, *arguments, **options)

    monkeypatch.setattr(choosing, "train_stages", noted)

    def killed(*_, **__):
        raise MemoryError("killed")

    monkeypatch.setattr(choosing, "train_watched", killed)  # at the begin of the training itself
    with pytest.raises(MemoryError):
        runs.train(build_config(config), resume=True)
    assert trained[0] == folders[3]
    assert not set(trained) & set(done)
    assert len(trained) == len(whole[0]["choice"]["tried"]) - len(done)
    trained.clear()
    monkeypatch.undo()
    monkeypatch.setattr(choosing, "train_stages", noted)
    report = runs.train(build_config(config), resume=True)
    assert not trained
    assert without_times(report["choice"]) == without_times(whole[0]["choice"])
    assert report["target"] == whole[0]["target"]
    (tmp_path / "run" / "report.json").unlink()
    other = merge(config, {"train": {"steps": 40}})
    with pytest.raises(UserError, match="holds a choice with other settings"):
        runs.train(build_config(other), resume=True)


def test_a_choice_on_other_data_does_not_go_on(values, whole, tmp_path, monkeypatch):
    train = write_texts(tmp_path / "train.csv", 128)
    own = {"run_dir": str(tmp_path / "run"), "data": {"train": str(train)}}
    config = build_config(merge(values, own))

    def killed(*_):
        raise MemoryError("killed")

    monkeypatch.setattr(choosing._Choice, "_measure", lambda _: facts_of(whole[0]["choice"]))
    monkeypatch.setattr(choosing._Choice, "contest", killed)
    with pytest.raises(MemoryError):
        runs.train(config)
    write_texts(train, 128, seed=5)
    with pytest.raises(UserError, match=r"results from before data\.train changed"):
        runs.train(config, resume=True)
    plan = json.loads((tmp_path / "run" / "choice.json").read_text())
    del plan["contents"]  # as a former version left it
    (tmp_path / "run" / "choice.json").write_text(json.dumps(plan))
    with pytest.raises(MemoryError):
        runs.train(config, resume=True)
    write_texts(train, 128)
    with pytest.raises(UserError, match=r"results from before data\.train changed"):
        runs.train(config, resume=True)


def trial(name, right, *, share=0.25, seconds=1.0, train_seconds=0.5):
    """A trial with so many of 100 examples right; which ones, is another for each."""
    targets = np.arange(100) % 2
    is_right = np.random.default_rng(len(name)).permutation(100) < right
    outcomes = {
        "targets": targets.tolist(),
        "predictions": np.where(is_right, targets, 1 - targets).tolist(),
    }
    score = right / 100
    return Trial(name, share, 8, "accuracy", score, 100, seconds, train_seconds, outcomes)


FACTS = choosing.Facts(128, 13, 128, 8, 6, 4, True, True, 0.8, 0.7, 0.5, 1.0)


@pytest.mark.parametrize(
    ("right", "chosen", "why"),
    [
        ({"end_to_end": 80, "frozen_4": 70, "lora": 84}, "end_to_end", "none of 2 others was"),
        ({"end_to_end": 60, "frozen_4": 70, "lora": 90}, "lora", "really better than end_to_end"),
        ({"end_to_end": 90, "frozen_4": 70, "lora": 60}, "end_to_end", "none of 2 others was"),
        ({"end_to_end": 60}, "end_to_end", "the budget held no other"),
        ({"frozen_4": 60, "lora": 61}, "frozen_4", "takes longer than auto.budget_seconds"),
    ],
)
def test_the_usual_one_gives_way_to_what_is_really_better(values, right, chosen, why):
    choice = choosing._Choice(build_config(values))
    last = [(Candidate(name, 1, []), trial(name, count)) for name, count in right.items()]
    choice.tried = [one for _, one in last]
    found, section = choice.decide(last, FACTS)
    assert found.name == section["chosen"] == chosen
    assert why in section["reasons"][0]
    assert "70% of the labels" in section["reasons"][1]


def test_a_budget_leaves_time_for_the_training(values):
    """Half of what the presets would take, which `end_to_end` and LoRA tell: here 10 s of 20."""
    config = build_config(merge(values, {"auto": {"budget_seconds": None, "budget_share": 0.5}}))
    choice = choosing._Choice(config)
    names = ("end_to_end", "lora x10")
    tried = [
        (Candidate(name, 1, []), trial(name, 50, share=1 / 16, seconds=1.0, train_seconds=train))
        for name, train in zip(names, (0.4, 0.3), strict=True)
    ]
    assert choosing.presets_seconds([]) is None
    choice.tried = [one for _, one in tried]
    assert choosing.presets_seconds(choice.tried) == pytest.approx(2 * 7 + 5.5)
    combined = replace(choice.tried[0], candidate="combined")
    assert choosing.presets_seconds([combined]) == pytest.approx(2.7 * 7)
    assert choice._holds(tried, 1 / 4)  # 2.2 s, then 7 s
    choice._spent = 1.0
    assert not choice._holds(tried, 1 / 4)
    assert choice._holds(tried, 1 / 16)


def test_a_third_goes_on_beside_the_usual_one(values, monkeypatch):
    """As far as the budget holds; the second rung decides."""
    right = {"combined": 60, "frozen_4": 70, "lora x10": 80, "end_to_end": 90, "frozen_4 x3": 85}
    tried = []

    def canned(choice, candidate, share):
        tried.append((candidate.name, share))
        seconds = 0.05 if candidate.structure.startswith("feature") else 0.5
        count = right.get(candidate.name, 50)
        return trial(candidate.name, count, share=share, train_seconds=seconds)

    monkeypatch.setattr(choosing._Choice, "_trial", canned)
    kinds = candidates(build_config(values), FACTS)
    many = replace(FACTS, epoch_steps=1000)  # of which 32 steps are taken
    monkeypatch.setattr(choosing, "_STEPS", 2)
    choice = choosing._Choice(build_config(values))
    last = choice.contest(kinds, many)
    assert tried[:11] == [(one.name, 1 / 16) for one in kinds[0]]
    assert tried[11:] == [(n, 1 / 4) for n in ("combined", "end_to_end", "frozen_4 x3", "lora x10")]
    assert choice.decide(last, many)[0].name == "end_to_end"
    # A short budget: what is usual and two others. Hardly any: heads on the frozen backbone.
    for seconds, names in ((17.0, ["combined", "end_to_end", "frozen_4"]), (9.0, ["feature x3"])):
        auto = {"auto": {"budget_seconds": seconds}}
        choice = choosing._Choice(build_config(merge(values, auto)))
        choice._spent = 5.0
        tried.clear()
        assert [one.name for one, _ in choice.contest(kinds, many)] == names


def test_what_is_tried_depends_on_the_labels(values):
    config = build_config(values)
    tuned, heads = candidates(config, FACTS)
    assert [one.name for one in tuned] == [
        *("combined", "end_to_end", "frozen_4", "lora x10"),
        *("combined x3", "end_to_end x3", "frozen_4 x3", "lora x3"),
        *("combined x0.3", "end_to_end x0.3", "frozen_4 x0.3"),
    ]
    assert [one.name for one in heads] == [
        *("feature x3", "feature_4 x3", "feature x10", "feature_4 x10", "feature", "feature_4"),
    ]
    assert candidates(config, replace(FACTS, labels=63)) == [heads, tuned]
    found = {one.name: one for one in (*tuned, *heads)}
    assert found["feature x3"].stages[0].head_learning_rate == pytest.approx(3e-2)
    assert found["feature_4 x3"].stages == found["feature x3"].stages
    assert found["feature_4 x3"].head == {"layers": [4]}
    assert found["lora x10"].stages[0].learning_rate == pytest.approx(3e-2)
    assert found["lora x10"].stages[0].head_learning_rate == pytest.approx(1e-2)
    probe, whole = found["combined x3"].stages
    assert probe.head_learning_rate == pytest.approx(1e-2)
    assert whole.head_learning_rate == whole.learning_rate == pytest.approx(9e-3)
    assert all(stage.steps == 32 for one in found.values() for stage in one.stages)
    # The last layer says most: half of the layers. One layer alone has no part.
    last, alone = replace(FACTS, best_layer=6), replace(FACTS, depth=1, best_layer=1)
    names = [[one.name for kind in candidates(config, f) for one in kind] for f in (last, alone)]
    assert "frozen_3" in names[0]
    assert "feature_6" not in names[0]
    assert not any("frozen" in name for name in names[1])
    bound = candidates(config, replace(FACTS, has_free_head=False))
    assert not any("feature_" in one.name for kind in bound for one in kind)
    # Without a new head there is none to train first.
    assert candidates(config, replace(FACTS, has_new_head=False))[0][0].name == "end_to_end"
    short = choosing.shortened(found["combined"].stages, 1 / 16)
    assert [stage.steps for stage in short] == [2, 2]


def speech_values(folder, backbone):
    write_dataset(folder / "train", [f"gate {n} open" for n in range(24)])
    return {"source_model": str(backbone), "data": {"train": str(folder / "train")}}


def sound_values(folder, backbone):
    for base, label in ((300, "hum"), (2000, "beep")):
        (folder / label).mkdir(parents=True)
        for index in range(10):
            sound = tone(0.6, hertz=base + 30 * index)
            write_media(folder / label / f"{index}.wav", sound)
    return {"task": "sound", "source_model": str(backbone), "data": {"train": str(folder)}}


@pytest.mark.parametrize("kind", ["whisper", "ctc", "sound"])
def test_it_chooses_for_speech_and_sounds(kind, values, random_whisper, tmp_path):
    make = sound_values if kind == "sound" else speech_values
    own = make(tmp_path / "data", random_whisper)
    own |= {
        "run_dir": str(tmp_path / "run"),
        "transfer": {"preset": "auto"},
        "head": {"type": "ctc" if kind == "ctc" else "auto"},
        "train": {"steps": 2},
        "auto": values["auto"],
        "evaluation": {"bootstrap_samples": 100},
        "runtime": {"device": "cpu", "threads": 1},
    }
    own["data"] = own["data"] | {"rehearsal": "none"}
    report = runs.train(build_config(own))
    tried = report["choice"]["tried"]
    assert tried[0]["metric"] == ("macro_f1" if kind == "sound" else "cer")
    usual = {"whisper": "end_to_end", "ctc": "combined", "sound": "feature x3"}
    assert tried[0]["candidate"] == usual[kind]
    found = {one["candidate"].split(" ")[0] for one in tried}
    heads, tuned = {"feature"}, {"end_to_end", "lora", "combined"}  # 20 sounds are few
    assert found >= (heads if kind == "sound" else tuned)
    assert all(math.isfinite(one["score"]) for one in tried)
    load(str(tmp_path / "run"))


def test_what_leaves_nothing_to_choose_is_one_line(values, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def refused(match, **changed):
        config = build_config(merge(values, {"run_dir": str(folder)} | changed))
        with pytest.raises(UserError, match=match):
            runs.train(config)
        assert not folder.exists()

    few = write_texts(tmp_path / "few.csv", 6)
    refused("needs 8 training examples to choose on, found 6", data={"train": str(few)})
    one = tmp_path / "one.csv"
    one.write_text("text,label\n" + "".join(f"a day {n},good\n" for n in range(20)))
    refused("expected at least two classes", data={"train": str(one)})
    refused(r"transfer\.stages names a structure", transfer={"stages": [{"frozen": "all"}]})
    refused("random weights have nothing to freeze", transfer={"scratch": True})
    refused(
        "search.space and transfer.preset: auto", search={"space": {"head.relu": [True, False]}}
    )
    refused("short_context has one structure", task="short_context")
    processes = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(choosing, "make_accelerator", lambda *_: processes)
    refused("in one process")
    with pytest.raises(UserError, match="name a structure here"):
        resolve_stages(build_config(values))
