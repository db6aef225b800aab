"""Heads that are saved as those of the library's sequence classifiers."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, write_text_backbone
from safetensors.torch import load_file, save_file
from transformers import pipeline

from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.text.classifier import load_text_model, new_text_model, renew_stock
from mmtransfer.text.stock import is_stock

TEXTS = [" ".join(WORDS[n : n + 5]) for n in range(0, 15, 3)]
LINEAR: dict[str, Any] = {"pooling": "first"}
MIXED: dict[str, Any] = {"pooling": "first", "batch_norm": True}
RELU: dict[str, Any] = {"pooling": "first", "batch_norm": True, "relu": True}
DENSE: dict[str, Any] = {"pooling": "first", "conv_layers": 1, "conv_kernel": 1, "batch_norm": True}
TANH = ["bert", "roberta", "mpnet", "xlm-roberta", "camembert"]
OURS: list[dict[str, Any]] = [
    {},
    {"pooling": "first", "layers": "all"},
    {"pooling": "first", "feature_norm": "l2"},
]
OURS += [
    {"pooling": "first", "conv_layers": 1},
    {**DENSE, "conv_width": 8},
    {**DENSE, "relu": True},
]


def randomised(folder, kind, head):
    """A classifier whose weights have the sizes that trained ones have."""
    torch.manual_seed(0)
    source = resolve(str(write_text_backbone(folder, kind)))
    model = new_text_model(source, ["b", "a", "c"], data=DataConfig(), head=HeadConfig(**head))
    for name, value in model.network.state_dict().items():
        if value.is_floating_point() and value.ndim:
            noise = torch.randn_like(value)
            value.copy_(noise.exp() if name.endswith("running_var") else value + 0.2 * noise)
    model.temperature = 1.7
    model.network.eval()
    return model


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        *((kind, head) for kind in TANH for head in (LINEAR, MIXED)),
        *((kind, head) for kind in ("electra", "roformer") for head in (LINEAR, MIXED)),
        *(("distilbert", head) for head in (LINEAR, MIXED, RELU, DENSE)),
    ],
)
def test_the_pipeline_of_the_library_gives_the_same_probabilities(kind, head, tmp_path):
    model = randomised(tmp_path / "source", kind, head)
    model.save(tmp_path / "saved", "full")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    run = pipeline("text-classification", model=str(tmp_path / "saved"), top_k=None)
    again = load_text_model(resolve(str(tmp_path / "saved")))
    rows = zip(run(TEXTS), model.predict(TEXTS), again.predict(TEXTS), strict=True)
    spread = []
    for found, ours, loaded in rows:
        assert {row["label"]: row["score"] for row in found} == pytest.approx(
            ours.probabilities, abs=1e-5
        )
        assert loaded.probabilities == pytest.approx(ours.probabilities, abs=1e-12)
        spread.append(ours.probabilities["a"])
    assert np.ptp(spread) > 1e-2


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        *(("bert", head) for head in [*OURS, RELU, DENSE]),
        *(("distilbert", head) for head in OURS),
        ("modernbert", LINEAR),
        ("deberta", LINEAR),
    ],
)
def test_other_heads_are_saved_as_they_are(kind, head, tmp_path):
    model = randomised(tmp_path / "source", kind, head)
    assert not is_stock(model.network.config, model.network.encoder.model)
    model.save(tmp_path / "saved", "full")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not config["architectures"][0].endswith("ForSequenceClassification")
    found = load_text_model(resolve(str(tmp_path / "saved"))).predict(TEXTS)
    assert found == model.predict(TEXTS)


def test_a_head_that_was_merged_is_written_anew(tmp_path):
    first = randomised(tmp_path / "source", "bert", MIXED)
    first.save(tmp_path / "saved", "full")
    head = load_file(tmp_path / "saved" / "head.safetensors")
    save_file({n: v * 2 for n, v in head.items()}, tmp_path / "saved" / "head.safetensors")
    renew_stock(tmp_path / "saved")
    run = pipeline("text-classification", model=str(tmp_path / "saved"), top_k=None)
    [found], [ours] = (
        run(TEXTS[:1]),
        load_text_model(resolve(str(tmp_path / "saved"))).predict(TEXTS[:1]),
    )
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        ours.probabilities, abs=1e-5
    )
    assert ours.probabilities != pytest.approx(first.predict(TEXTS[:1])[0].probabilities, abs=0.01)
