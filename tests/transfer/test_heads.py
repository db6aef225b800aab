import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.config import HeadConfig
from mmtransfer.errors import UserError
from mmtransfer.transfer.heads import (
    ClassifierHead,
    ConvStack,
    CtcHead,
    LayerMix,
    Pooling,
    level,
    pool,
    pools_before_cache,
)
from mmtransfer.transfer.networks import build_head, head_layers, read_head, write_head


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_weights_mix_layers_to_their_mean():
    given_states = states(2, 3, 4, 5)
    torch.testing.assert_close(LayerMix(3)(given_states), given_states.mean(1))
    mix = LayerMix(2)
    mix.weights.data = torch.tensor([0.0, 1e4])
    torch.testing.assert_close(mix(given_states[:, :2]), given_states[:, 1])


def test_poolings_by_hand():
    values = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(values, mask, "mean").tolist() == [[2.0, -3.0]]
    assert pool(values, mask, "max").tolist() == [[3.0, -2.0]]
    assert pool(values, mask, "first").tolist() == [[1.0, -4.0]]
    attention = Pooling(2, "attention")
    assert attention.query is not None
    torch.nn.init.zeros_(attention.query.weight)
    torch.testing.assert_close(attention(values, mask), torch.tensor([[2.0, -3.0]]))


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "first"])
@pytest.mark.parametrize("conv_layers", [0, 2])
def test_padding_does_not_change_logits(pooling, conv_layers):
    config = HeadConfig(pooling=pooling, conv_layers=conv_layers, layers=[1, 2])
    head = build_head("classifier", 6, 3, 4, config, 0).eval()
    short = states(2, 2, 5, 6)
    padded = torch.cat([short, 1e3 * states(2, 2, 3, 6, seed=1)], 2)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    torch.testing.assert_close(head(padded, mask), head(short, mask[:, :5]))


def test_padding_does_not_change_ctc_logits():
    head = build_head("ctc", 6, 3, 9, HeadConfig(conv_layers=2, conv_kernel=5), 0).eval()
    short = states(2, 1, 5, 6)
    padded = torch.cat([short, 1e3 * states(2, 1, 3, 6, seed=1)], 2)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    torch.testing.assert_close(head(padded, mask)[:, :5], head(short, mask[:, :5]))


def test_the_regularised_classifier_is_l2_norm_batch_norm_relu_dropout_linear():
    config = HeadConfig(feature_norm="l2", batch_norm=True, relu=True, dropout=0.0)
    head = ClassifierHead(4, 1, 3, config).train()
    features = states(8, 1, 4)
    unit = features[:, 0] / features[:, 0].norm(dim=1, keepdim=True)
    mean, variance = unit.mean(0), unit.var(0, unbiased=False)
    normed = (unit - mean) / (variance + 1e-5).sqrt()
    expected = normed.clamp(min=0) @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(head(features, None), expected)
    # One example alone has no statistics of its own.
    assert torch.isfinite(head(features[:1], None)).all()


@given(st.sampled_from(["mean", "max", "first", "attention"]), st.integers(1, 3), st.integers(0, 1))
@settings(deadline=None)
def test_pooling_before_the_cache_gives_the_same_logits(pooling, layers, conv_layers):
    config = HeadConfig(pooling=pooling, conv_layers=conv_layers)
    head = ClassifierHead(6, layers, 2, config).eval()
    given_states = states(3, layers, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    if not pools_before_cache(config, layers):
        assert conv_layers or pooling == "attention" or (pooling == "max" and layers > 1)
        return
    scaled = level(given_states) if layers > 1 else given_states
    pooled = pool(scaled, mask[:, None].expand(-1, layers, -1), pooling)
    torch.testing.assert_close(head(pooled, None), head(given_states, mask))


def test_layers_differ_in_scale_but_not_in_say():
    head = ClassifierHead(6, 2, 2, HeadConfig()).eval()
    given_states, mask = states(3, 2, 5, 6), torch.ones(3, 5)
    scaled = given_states * torch.tensor([1e3, 1.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(head(scaled, mask), head(given_states, mask), rtol=1e-3, atol=1e-4)


def test_convolutions_keep_every_position_in_its_place():
    stack = ConvStack(1, HeadConfig(conv_layers=1, conv_kernel=3, dropout=0.0))
    convolution = stack.layers[0]
    assert isinstance(convolution, torch.nn.Conv1d)
    assert convolution.bias is not None
    torch.nn.init.constant_(convolution.weight, 1.0)
    torch.nn.init.zeros_(convolution.bias)
    row = torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]])
    assert stack(row, torch.ones(1, 4)).flatten().tolist() == [11.0, 111.0, 1110.0, 1100.0]


def test_a_new_head_depends_on_the_seed_only():
    first, second, third = (build_head("ctc", 6, 3, 9, HeadConfig(), seed) for seed in (1, 1, 2))
    assert torch.equal(first.output.weight, second.output.weight)
    assert not torch.equal(first.output.weight, third.output.weight)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_head("ctc", 6, 3, 9, HeadConfig(), 1)
    assert torch.equal(torch.rand(1), expected)  # the global generator is left alone


def test_layers_of_a_head():
    assert head_layers(HeadConfig(), 6) == [6]
    assert head_layers(HeadConfig(layers="all"), 2) == [0, 1, 2]
    assert head_layers(HeadConfig(layers=[5, 2]), 6) == [2, 5]
    with pytest.raises(UserError, match=r"layers 0 to 4, found 5"):
        head_layers(HeadConfig(layers=[5]), 4)


def test_a_head_is_written_with_its_running_statistics(tmp_path):
    config = HeadConfig(batch_norm=True)
    head = ClassifierHead(6, 1, 2, config).train()
    head(states(9, 1, 6), None)
    write_head(tmp_path, head.eval())
    other = ClassifierHead(6, 1, 2, config).eval()
    read_head(tmp_path, other)
    torch.testing.assert_close(other(states(2, 1, 6), None), head(states(2, 1, 6), None))
    with pytest.raises(UserError, match="cannot be loaded as the model's head"):
        read_head(tmp_path, CtcHead(6, 1, 5, config))
