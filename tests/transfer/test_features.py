import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_text_model, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from support.children import forking_context

from mmtransfer.cache import cache_path
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.text.classifier import new_text_model
from mmtransfer.text.classifier_task import SentimentTask
from mmtransfer.text.splits import load_text_splits
from mmtransfer.transfer import features
from mmtransfer.transfer.features import cache_key, cached_features, weights_digest
from mmtransfer.transfer.stages import resolve_stages, set_dropout


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path / "cache"))


def arrays(count=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(2, int(rng.integers(1, 9)), 3)).astype(np.float32) for _ in range(count)
    ]


def store(found, key="k", dtype="float32", calls=None):
    def compute(rows):
        for row in rows:
            if calls is not None:
                calls.append(row)
            yield row, found[row]

    return cached_features("test", key, [a.size for a in found], compute, dtype=dtype)


def test_what_is_read_is_what_was_computed():
    found = arrays()
    kept = store(found)
    assert len(kept) == len(found)
    for index, array in enumerate(found):
        np.testing.assert_array_equal(kept[index], array)
    assert not kept[0].flags.writeable


@pytest.mark.parametrize("fault", ["cut", "flipped", "emptied", "removed", "without a digest"])
def test_a_damaged_shard_and_no_other_is_computed_anew(fault, monkeypatch, caplog):
    monkeypatch.setattr(features, "_SHARD_BYTES", 100)
    found = arrays(30)
    store(found)
    paths = sorted(cache_path("features", "k").glob("*.arrow"))
    whole = paths[1].read_bytes()
    middle = len(whole) // 2
    paths[1].write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "emptied": b"",
            "removed": b"",
            "without a digest": whole[:-32],
        }[fault]
    )
    if fault == "removed":
        paths[1].unlink()
    calls: list[int] = []
    kept = store(found, calls=calls)
    assert 0 < len(calls) < 10
    assert ("damaged; computed anew" in caplog.text) == (fault != "removed")
    assert paths[1].read_bytes() == whole
    for index, array in enumerate(found):
        np.testing.assert_array_equal(kept[index], array)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_shards_hold_every_example_once(sizes, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_SHARD_BYTES", limit)
        shards = [rows for _, rows in features._shards(Path(), sizes, 2)]
    assert sorted(i for shard in shards for i in shard) == list(range(len(sizes)))
    assert all(len(s) == 1 or 2 * sum(sizes[i] for i in s) <= limit for s in shards)


def test_several_shards_read_as_one(monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 100)
    found = arrays(30)
    kept = store(found)
    for index, array in enumerate(found):
        np.testing.assert_array_equal(kept[index], array)


def test_a_second_use_computes_nothing():
    found, calls = arrays(), list[int]()
    store(found, calls=calls)
    assert len(calls) == len(found)
    store(found, calls=calls)
    assert len(calls) == len(found)
    store(found, key="other", calls=calls)
    assert len(calls) == 2 * len(found)


def test_an_interrupted_computation_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 100)
    found, calls = arrays(30), list[int]()

    def breaking(rows):
        for row in rows:
            if len(calls) == 20:
                raise KeyboardInterrupt
            calls.append(row)
            yield row, found[row]

    with pytest.raises(KeyboardInterrupt):
        cached_features("test", "k", [a.size for a in found], breaking, dtype="float32")
    again: list[int] = []
    kept = store(found, calls=again)
    assert 10 <= len(again) < 30
    for index, array in enumerate(found):
        np.testing.assert_array_equal(kept[index], array)


def test_a_disk_that_would_not_hold_it_is_refused_before_anything_is_computed(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))
    calls: list[int] = []
    with pytest.raises(UserError, match=r"needs 0\.00 GiB.*MMTRANSFER_CACHE"):
        store(arrays(), calls=calls)
    assert not calls


def test_values_that_half_precision_cannot_hold_are_refused():
    found = [np.full((1, 2), 1e6, np.float32)]
    with pytest.raises(UserError, match="cache_dtype: float32"), np.errstate(over="ignore"):
        store(found, dtype="float16")
    assert store(found, key="wide")[0].tolist() == [[1e6, 1e6]]


def _in_a_process(cache, log):
    os.environ["MMTRANSFER_CACHE"] = cache
    calls: list[int] = []
    kept = store(arrays(), calls=calls)
    with open(log, "a") as file:
        file.write(json.dumps([len(calls), float(kept[3].sum())]) + "\n")


def test_two_processes_compute_an_entry_once(tmp_path):
    context = forking_context()
    arguments = (str(tmp_path / "shared"), str(tmp_path / "log"))
    processes = [context.Process(target=_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(row[0] for row in rows) == [0, 20]
    assert rows[0][1] == rows[1][1]


def test_the_key_depends_on_weights_and_on_every_part():
    model = random_text_model("bert")
    before = weights_digest([model], model.config)
    assert weights_digest([random_text_model("bert")], model.config) == before
    model.config.shortest_context_s = 3.0  # what a run notes there changes no activation
    assert weights_digest([model], model.config) == before
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 3] += 1e-3
    assert weights_digest([model], model.config) != before
    model.config.hidden_act = "relu"
    assert weights_digest([], model.config) != weights_digest([], random_text_model("bert").config)
    assert cache_key(a=1) != cache_key(a=2)


# --- with a model --------------------------------------------------------------------------------


def make_task(text_backbone, tmp_path, frozen, head=None, **transfer):
    path = tmp_path / "texts.csv"
    if not path.exists():
        write_texts(path, 24)
    config = build_config(
        {
            "task": "sentiment",
            "source_model": str(text_backbone),
            "data": {"train": str(path), "validation_fraction": 0.25},
            "transfer": {"stages": [{"frozen": frozen}], **transfer},
            "head": {"dropout": 0.0, **(head or {})},
            "train": {"batch_tokens": 128},
        }
    )
    splits, labels = load_text_splits(config)
    text = new_text_model(resolve(config.source_model), labels, data=config.data, head=config.head)
    task = SentimentTask(text, splits.train, splits.validation, config)
    task.begin(resolve_stages(config)[0], torch.device("cpu"))
    task.train_mode()
    set_dropout([task.model], 0.0)  # the same forward pass on both sides
    return task


def gradients(task):
    task.model.zero_grad()
    loss = 0.0
    for micro in task.prepare(range(12), slice(None), 0):
        part = task.loss(micro, torch.device("cpu"))
        part.backward()
        loss += float(part.detach())
    return loss, {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [0, 1, 2, "all"])
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"type": "native"},
        {"layers": "all", "conv_layers": 1, "pooling": "max"},
        {"layers": [1, 3], "pooling": "attention", "batch_norm": True},
    ],
)
def test_gradients_from_cached_activations_equal_those_of_the_uncached_model(
    text_backbone, tmp_path, frozen, head
):
    cached = make_task(text_backbone, tmp_path, frozen, head, cache_dtype="float32")
    plain = make_task(text_backbone, tmp_path, "none", head)
    plain.model.load_state_dict(cached.model.state_dict())
    loss, found = gradients(cached)
    expected_loss, expected = gradients(plain)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found
    assert not set(found) - set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    trained = {name for name, p in cached.model.named_parameters() if p.requires_grad}
    # A pooler that the head does not read gets no gradient in either.
    assert {name for name in trained if ".pooler." not in name} <= set(found)


def test_without_a_cache_the_prefix_is_run_each_time_to_the_same_losses(text_backbone, tmp_path):
    cached = make_task(text_backbone, tmp_path, 2, cache_dtype="float32")
    uncached = make_task(text_backbone, tmp_path, 2, cache="none")
    uncached.model.load_state_dict(cached.model.state_dict())
    for (a, left), (b, right) in [(gradients(cached), gradients(uncached))]:
        assert a == pytest.approx(b, rel=1e-5)
        assert set(left) == set(right)


def test_the_cache_serves_other_heads_batch_sizes_and_runs(text_backbone, tmp_path):
    make_task(text_backbone, tmp_path, "all")
    folders = set((tmp_path / "cache" / "features").glob("*/complete.json"))
    assert len(folders) == 2  # training and validation texts
    make_task(text_backbone, tmp_path, "all", {"batch_norm": True, "relu": True})
    assert set((tmp_path / "cache" / "features").glob("*/complete.json")) == folders
    make_task(text_backbone, tmp_path, "all", {"pooling": "max"})
    assert len(set((tmp_path / "cache" / "features").glob("*/complete.json"))) == 4


def test_pooled_activations_are_stored_only_where_the_head_needs_no_more(text_backbone, tmp_path):
    pooled = make_task(text_backbone, tmp_path, "all")
    assert pooled._stores[0][0].shape == (1, 1, 32)
    assert pooled._stores[0][0].dtype == np.float16
    tokens = len(pooled._encoded[0].windows[0])
    conv = make_task(text_backbone, tmp_path, "all", {"conv_layers": 1, "layers": [2, 3]})
    assert conv._stores[0][0].shape == (1, 2, tokens, 32)
    above = make_task(text_backbone, tmp_path, 2, {"layers": "all"})
    assert above._stores[0][0].shape == (1, 3, tokens, 32)  # layers 0, 1 and 2; 3 is run


def test_validation_from_the_cache_equals_validation_by_the_whole_model(text_backbone, tmp_path):
    task = make_task(text_backbone, tmp_path, "all", cache_dtype="float32")
    cached = task.validate(range(task.validation_size), torch.device("cpu"))
    task._close_stores()
    whole = task.validate(range(task.validation_size), torch.device("cpu"))
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-5)
