"""Sums of gradients over processes, one process here: when they begin, and what they hold."""

import pytest
import torch
from torch import distributed, nn

from mmtransfer.transfer.gradients import GradientSums


@pytest.fixture
def alone(tmp_path):
    """A group of processes of which there is one."""
    address = f"file://{tmp_path / 'group'}"
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    layers.append(nn.Identity())
    layers[-1].unused = nn.Parameter(torch.ones(3))
    return layers


@pytest.mark.usefixtures("alone")
def test_the_last_layers_are_summed_while_the_first_ones_have_no_gradient_yet(model, monkeypatch):
    sums = GradientSums(list(model.parameters()), bucket_bytes=1)
    events: list[object] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    reduce = distributed.all_reduce

    def all_reduce(tensor, **options):
        events.append(tensor.numel())
        return reduce(tensor, **options)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    sums.begin()
    model[:-1](torch.ones(1, 4)).sum().backward()
    assert events == ["first layer"]  # a micro-batch that is not the last
    del events[:]
    sums.last()
    (model[:-1](torch.ones(1, 4)).sum() + model[-1].unused.sum()).backward()
    assert events.index(2) < events.index("first layer")
    sums.finish(torch.zeros(1))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_sums_are_the_gradients_of_all_micro_batches(model, bucket_bytes):
    micros = [torch.randn(2, 4) for _ in range(3)]
    sums = GradientSums(list(model.parameters()), bucket_bytes)
    for count in (3, 1, 0):
        sums.begin()
        for number, micro in enumerate(micros[:count], 1):
            if number == count:
                sums.last()
            model(micro).square().sum().backward()
        assert sums.finish(torch.tensor([2.0])).tolist() == [2.0]
        found = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for micro in micros[:count]:
            model(micro).square().sum().backward()
        torch.testing.assert_close(found, [p.grad for p in model.parameters()])
        assert model[-1].unused.grad is None
    sums.close()
    model(micros[0]).sum().backward()  # takes part no more
