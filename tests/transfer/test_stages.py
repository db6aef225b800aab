import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import random_text_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.speech.whisper import whisper_layout
from mmtransfer.transfer.encoders import TextEncoder
from mmtransfer.transfer.networks import Network, build_head
from mmtransfer.transfer.splits import rehearsal_count
from mmtransfer.transfer.stages import (
    class_weights,
    freeze,
    parameter_groups,
    resolve_stages,
    set_dropout,
    set_training,
    supervised_contrastive_loss,
)


def network(**head):
    config = build_config({"task": "sentiment", "head": head}).head
    encoder = TextEncoder(random_text_model("bert"))
    module = build_head("classifier", encoder.width, encoder.depth, 2, config, 0)
    return Network(encoder, module, config)


def stages(transfer, **train):
    return resolve_stages(build_config({"transfer": transfer, "train": train}))


# --- stages --------------------------------------------------------------------------------------


def test_presets_are_the_stages_of_the_literature():
    assert [s.frozen for s in stages({"preset": "end_to_end"})] == ["none"]
    assert [s.frozen for s in stages({"preset": "feature"})] == ["all"]
    assert [s.frozen for s in stages({"preset": "combined"})] == ["all", "none"]
    (lora,) = stages({"preset": "lora"})
    assert lora.frozen == "none"
    assert lora.adapter["type"] == "lora"


def test_a_stage_takes_what_it_does_not_set_from_the_train_section():
    first, second = stages(
        {"stages": [{"frozen": "all", "epochs": 7}, {"frozen": 2, "learning_rate": 3e-5}]},
        steps=11,
        learning_rate=1e-4,
        layer_decay=0.9,
    )
    assert (first.epochs, first.steps, first.learning_rate) == (7, None, 1e-4)
    assert (second.epochs, second.steps, second.learning_rate) == (None, 11, 3e-5)
    assert second.layer_decay == 0.9


def test_frozen_counts_layers_and_more_than_there_are_is_refused():
    (stage,) = stages({"stages": [{"frozen": 4}]})
    assert stage.frozen_layers(6) == 4
    with pytest.raises(UserError, match="frozen: 4, but the backbone has 3 layers"):
        stage.frozen_layers(3)
    assert stages({"preset": "feature"})[0].frozen_layers(6) == 6
    assert stages({"preset": "end_to_end"})[0].frozen_layers(6) is None


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"frozen": -1}, "frozen"),
        ({"frozen": "some"}, "frozen"),
        ({"epochs": 1, "steps": 1}, "epochs or steps, not both"),
        ({"adapter": {"r": 4}}, "needs a type"),
        ({"frozen": "all", "adapter": {"type": "lora"}}, "needs unfrozen layers"),
        ({"frozen": "all", "objective": "contrastive"}, "trains the backbone"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stage, message):
    with pytest.raises(UserError, match=message):
        build_config({"transfer": {"stages": [stage]}})


def test_a_last_stage_without_a_head_is_refused():
    with pytest.raises(UserError, match="last stage is contrastive"):
        stages({"stages": [{"objective": "contrastive"}]})


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [None, 0, 2, 3])
def test_every_weight_is_in_exactly_one_place_and_frozen_below_the_line(frozen):
    model = network()
    layout = model.layout()
    placed = [p for level in range(len(layout.levels)) for p in layout.parameters(level)]
    placed += layout.new_parameters()
    assert sorted(map(id, placed)) == sorted(map(id, model.parameters()))
    freeze(model, layout, frozen)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    if frozen is None:
        assert not names
        return
    expected = {n for n, _ in model.named_parameters() if ".embeddings." in n}
    for layer in range(frozen):
        expected |= {n for n, _ in model.named_parameters() if f".layer.{layer}." in n}
    if frozen == 3:  # the pooler stands on a frozen layer, so it is part of the backbone
        expected |= {n for n, _ in model.named_parameters() if ".pooler." in n}
    assert names == expected


def test_a_frozen_part_has_no_dropout_and_no_batch_norm_updates():
    model = network(batch_norm=True)
    layout = model.layout()
    freeze(model, layout, 2)
    set_training(model, layout, 2)
    layers = model.encoder.layers
    assert not any(part.training for part in layers[1].modules())
    assert not model.encoder.base.embeddings.training
    assert layers[2].training
    assert model.head.norm.training


def test_frozen_weights_are_not_in_the_optimiser():
    model = network()
    layout = model.layout()
    (stage,) = stages({"stages": [{"frozen": "all"}]})
    freeze(model, layout, 3)
    groups = parameter_groups(model, layout, stage, 0.01)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in model.head.parameters()}


def test_rates_fall_from_layer_to_layer_and_the_head_has_its_own():
    model = network()
    layout = model.layout()
    (stage,) = stages(
        {"stages": [{}]}, learning_rate=1e-4, head_learning_rate=1e-2, layer_decay=0.5
    )
    freeze(model, layout, None)
    rates = {
        id(p): (group["peak"], group["weight_decay"])
        for group in parameter_groups(model, layout, stage, 0.1)
        for p in group["params"]
    }
    layers = model.encoder.layers
    for layer, expected in ((2, 1e-4), (1, 5e-5), (0, 2.5e-5)):
        dense = layers[layer].output.dense
        assert rates[id(dense.weight)] == pytest.approx((expected, 0.1))
        assert rates[id(dense.bias)] == pytest.approx((expected, 0.0))  # no decay of biases
        norm = layers[layer].output.LayerNorm
        assert rates[id(norm.weight)] == pytest.approx((expected, 0.0))  # nor of norms
    words = model.encoder.base.embeddings.word_embeddings.weight
    assert rates[id(words)] == pytest.approx((1.25e-5, 0.1))
    assert rates[id(model.head.output.weight)] == pytest.approx((1e-2, 0.1))


def test_whisper_layers_are_counted_through_the_encoder_and_its_positions_stay(random_whisper):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(random_whisper)
    layout = whisper_layout(model)
    assert layout.depth == 2
    freeze(model, layout, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.decoder.") for name in trained)
    freeze(model, layout, None)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"model.encoder.embed_positions.weight"}


# --- by hand --------------------------------------------------------------------------------------


def test_weight_decay_shrinks_matrices_by_rate_times_strength():
    weight = nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}])
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 2.0 * (1 - 0.1 * 0.5)))


def test_class_weights_by_hand():
    assert class_weights([3, 1], "none", 0.9) is None
    # 1/3 and 1, scaled so that the four examples weigh 4 in all.
    assert class_weights([3, 1], "inverse", 0.9) == pytest.approx([2 / 3, 2.0])
    # (1 - 0.9) / (1 - 0.9^n): 0.1 / 0.271 and 1.
    first = 0.1 / 0.271
    scale = 4 / (3 * first + 1)
    assert class_weights([3, 1], "effective", 0.9) == pytest.approx([first * scale, scale])


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8))
def test_class_weights_average_to_one_and_favour_the_rare(counts):
    for kind in ("inverse", "effective"):
        weights = class_weights(counts, kind, 0.999)
        assert weights is not None
        total = sum(n * w for n, w in zip(counts, weights, strict=True))
        assert total == pytest.approx(sum(counts))
        order = np.argsort(counts)
        ranked = [weights[index] for index in order]
        assert all(a >= b - 1e-9 for a, b in pairwise(ranked))


def test_contrastive_loss_by_hand():
    # Three unit vectors: two of class 0 at a right angle, one of class 1 equal to the first.
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    targets = torch.tensor([0, 0, 1])
    e = math.exp
    # Anchor 0: positive 1 (similarity 0), others 1 (0) and 2 (1). Anchor 1: positive 0 (0), others
    # 0 (0) and 2 (0). Anchor 2 has no positive.
    expected = -math.log(1 / (1 + e(1))) - math.log(1 / 2)
    loss = supervised_contrastive_loss(features, targets, temperature=1.0)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_contrastive_loss_of_single_examples_is_zero_with_a_gradient():
    features = torch.randn(2, 4, requires_grad=True)
    loss = supervised_contrastive_loss(features, torch.tensor([0, 1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_dropout_override_reaches_modules_and_plain_rates(random_whisper):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(random_whisper)
    set_dropout([model.model.encoder.layers[1]], 0.4)
    assert model.model.encoder.layers[1].dropout == 0.4
    assert model.model.encoder.layers[0].dropout == 0.0
    text = random_text_model("bert")
    set_dropout([text], 0.25)
    assert {m.p for m in text.modules() if isinstance(m, nn.Dropout)} == {0.25}


@given(st.integers(1, 10_000), st.floats(0, 0.9))
def test_rehearsal_is_the_asked_share_of_an_epoch(examples, share):
    count = rehearsal_count(examples, share)
    assert abs(count - share * (examples + count)) <= 1
