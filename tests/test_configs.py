"""Every shipped configuration runs, as it is but for its length, on tiny backbones."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    EXAMPLE,
    ROOT,
    tone,
    write_dataset,
    write_media,
    write_text_backbone,
    write_texts,
)

from mmtransfer import load, runs
from mmtransfer.config import build_config, merge, read_yaml

pytestmark = pytest.mark.usefixtures("unmeasured")
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
STRUCTURES = {"end_to_end", "feature", "combined", "lora"}


def test_every_task_has_every_structure():
    for task in ("video_monitoring", "news_sentiment"):
        assert {path.stem for path in CONFIGS if path.parent.name == task} >= STRUCTURES
    assert len(CONFIGS) >= 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_dataset(folder / "clips", ["gate one", "all clear", "", "stop", "go", "crane two"])
    write_texts(folder / "texts.csv", 48, targets=True)
    for label, base in (("low", 200), ("high", 2000)):
        (folder / "sounds" / label).mkdir(parents=True)
        for index in range(4):
            sound = tone(1.0, hertz=base + 30 * index)
            write_media(folder / "sounds" / label / f"{index}.wav", sound)
    (folder / "spoken").mkdir()
    for path in sorted((EXAMPLE / "source").glob("*.ogg"))[:2]:
        shutil.copyfile(path, folder / "spoken" / path.name)
    # The shipped head and adapter name layers and modules of a backbone of six layers.
    write_text_backbone(folder / "backbone", layers=6)
    return folder


# Bounded by its teacher, the bundled model; and what has the stages of others.
SLOW = {"video_monitoring-short_context", "video_monitoring-combined"}
SLOW |= {"video_monitoring-example_site"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}-{path.stem}",
            marks=[pytest.mark.slow] if f"{path.parent.name}-{path.stem}" in SLOW else [],
        )
        for path in CONFIGS
    ],
)
def test_a_configuration_runs_a_few_steps(path: Path, data, random_whisper, tmp_path):
    values = read_yaml(path)
    short = {"steps": 3, "epochs": None}
    stages = values.get("transfer", {}).get("stages", [])
    overrides: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "runtime": {"threads": 1, "device": "cpu"},
        "train": {**short, "evaluate_every": 3, "full_context": 0.0},
    }
    if values["task"] == "sound":
        overrides["source_model"] = str(random_whisper)
        overrides["data"] = {"train": str(data / "sounds"), "validation_fraction": 0.2}
    elif values["task"] != "sentiment":
        clips = str(data / "clips")
        overrides["source_model"] = str(random_whisper)
        overrides["data"] = {"train": clips, "validation": None, "validation_fraction": 0.2}
        overrides["data"]["rehearsal"] = "none"
        overrides["transfer"] = {"interpolate": "none"}
        values.get("data", {}).pop("source_domain", None)
        if path.stem == "short_context":  # what is learnt is what a model that can read reads
            overrides["source_model"] = "bundled:whisper-tiny.en"
            overrides["data"] |= {"train": str(data / "spoken")}
    else:
        overrides["source_model"] = str(data / "backbone")
        overrides["data"] = {"train": str(data / "texts.csv"), "validation_fraction": 0.2}
    values = merge(values, overrides)
    if stages:
        values["transfer"]["stages"] = [{**stage, **short} for stage in stages]
    report = runs.train(build_config(values))
    assert report["cost"]["steps"] == 3 * len(report["stages"])
    assert (tmp_path / "run" / "README.md").is_file()
    load(str(tmp_path / "run"))
