"""Terms beside the loss, by hand and in training."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from conftest import write_texts
from torch import nn
from torch.amp.grad_scaler import GradScaler

from mmtransfer import runs
from mmtransfer.config import TransferConfig, build_config
from mmtransfer.runtime import make_accelerator
from mmtransfer.transfer.regularisers import (
    L2SP,
    REGULARISERS,
    Outputs,
    RDrop,
    Regulariser,
    regularisers,
)
from mmtransfer.transfer.stages import Layout
from mmtransfer.transfer.trainer import Trainer

CPU = torch.device("cpu")


def test_l2sp_pulls_source_weights_to_their_start_and_new_ones_to_zero():
    source, new = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    penalty = L2SP([source], [new], alpha=0.5, beta=0.1)
    with torch.no_grad():
        source.add_(torch.tensor([2.0, -1.0]))
    # 0.5 / 2 * (4 + 1) + 0.1 / 2 * 9
    assert float(penalty.penalty()) == pytest.approx(1.25 + 0.45)
    source.grad, new.grad = torch.tensor([1.0, 1.0]), torch.tensor([0.0])
    penalty.add_gradient()
    torch.testing.assert_close(source.grad, torch.tensor([1 + 0.5 * 2, 1 - 0.5 * 1]))
    torch.testing.assert_close(new.grad, torch.tensor([0.1 * 3]))


def test_l2sp_gradient_is_that_of_its_penalty():
    generator = torch.Generator().manual_seed(0)
    source = nn.Parameter(torch.randn(5, generator=generator))
    start = source.detach().clone()
    penalty = L2SP([source], [], alpha=0.3, beta=0.0)
    with torch.no_grad():
        source.add_(torch.randn(5, generator=generator))
    (0.15 * (source - start).square().sum()).backward()
    assert source.grad is not None
    expected = source.grad.clone()
    source.grad = torch.zeros(5)
    penalty.add_gradient()
    torch.testing.assert_close(source.grad, expected)


def test_r_drop_is_the_divergence_of_two_passes_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    counted = torch.tensor([[True, True, False], [True, False, False]])
    found = RDrop(0.5).loss(Outputs(one, counted), lambda: Outputs(other, counted))
    p, q = one[counted].log_softmax(-1), other[counted].log_softmax(-1)
    both = nn.functional.kl_div(p, q, log_target=True, reduction="sum") + nn.functional.kl_div(
        q, p, log_target=True, reduction="sum"
    )
    torch.testing.assert_close(found, 0.25 * both)


def test_terms_stand_together_and_only_those_asked_for():
    layer = nn.Linear(2, 2)
    layout = Layout([[layer]], 0, [], [])
    assert regularisers(layout, TransferConfig()) == []
    found = regularisers(layout, TransferConfig(l2sp=0.1, r_drop=1.0))
    assert [type(term) for term in found] == [L2SP, RDrop]
    outputs = Outputs(torch.zeros(1, 2), torch.ones(1, dtype=torch.bool))
    assert [term.loss(outputs, lambda: outputs) is None for term in found] == [True, False]
    assert [term.penalty() is None for term in found] == [False, True]


class _Pull(Regulariser):
    """A penalty of another kind: every new weight towards one."""

    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, layout, config):
        term = cls()
        term.parameters = layout.new_parameters()
        return term

    def penalty(self):
        return torch.tensor(7.0)

    def add_gradient(self, scale=1.0):
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - 1, alpha=scale * 1e4)


def small(folder, backbone, name="run", **transfer):
    """A short run on texts that are made for it."""
    write_texts(folder / "train.csv", 24)
    write_texts(folder / "validation.csv", 8, seed=1)
    return build_config(
        {
            "task": "sentiment",
            "source_model": str(backbone),
            "run_dir": str(folder / name),
            "data": {
                "train": str(folder / "train.csv"),
                "validation": str(folder / "validation.csv"),
            },
            "transfer": transfer,
            "train": {"steps": 3, "batch_tokens": 200},
            "runtime": {"threads": 1, "device": "cpu", "seed": 5},  # not that of the backbone
        }
    )


def test_terms_change_training_and_a_new_one_is_a_class_and_a_line(
    text_backbone, tmp_path, monkeypatch
):
    def first_losses(name, **transfer):
        runs.train(small(tmp_path, text_backbone, name, **transfer))
        return losses(tmp_path / name)

    plain, dropped = first_losses("plain"), first_losses("r_drop", r_drop=5.0)
    assert dropped[0]["loss"] > plain[0]["loss"]  # the same batch, and a divergence above zero
    assert "penalty" not in plain[0]
    monkeypatch.setattr("mmtransfer.transfer.regularisers.REGULARISERS", (*REGULARISERS, _Pull))
    pulled = first_losses("pulled", l2sp=0.1)
    assert pulled[0]["penalty"] > 7.0 - 1e-6
    assert pulled[0]["loss"] == plain[0]["loss"]
    assert pulled[0]["grad_norm"] > 100 * plain[0]["grad_norm"]


def test_random_weights_are_pulled_to_their_own_start(tmp_path, text_backbone):
    task = runs.set_up(small(tmp_path, text_backbone, scratch=True, l2sp=10.0), CPU)
    task.forget_source()
    [term] = task.regularisers
    assert isinstance(term, L2SP)
    found = term.penalty()
    assert found is not None
    assert float(found) == 0
    assert all(torch.equal(weight, start) for weight, start in term._source)


def test_a_penalty_weighs_the_same_where_the_loss_is_scaled(tmp_path, text_backbone, monkeypatch):
    """As in float16, with all else in float32."""
    config = small(tmp_path, text_backbone, l2sp=10.0, l2sp_new=10.0)

    def gradients(scaler):
        accelerator = make_accelerator(config.train, config.runtime)
        accelerator.scaler, accelerator.native_amp = scaler, scaler is not None
        task = runs.set_up(config, CPU)
        trainer = Trainer(task, task.stages[0], config, accelerator, tmp_path)
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.add_(0.01)
        [indices, *_] = trainer._batches(0)
        trainer._step(0, indices, task.prepare(indices, slice(None), 0))
        return [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]

    plain = gradients(None)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # by which gradients are unscaled
    monkeypatch.setattr(Accelerator, "autocast", lambda *_, **__: nullcontext())
    scaled = gradients(GradScaler("cpu", init_scale=2.0**16))
    assert len(plain) == len(scaled) > 0
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
