import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ROOT,
    child_environment,
    random_token,
    tone,
    write_dataset,
    write_media,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.children import STOPPED, Command, run_command, start_training
from support.clusters import below
from support.sources import free_port
from support.web import wait_for
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mmtransfer import runs
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runtime import make_accelerator, tracked
from mmtransfer.speech.clip_scores import ClipScoring
from mmtransfer.speech.clips import Clip, load_clips
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.splits import load_clip_splits
from mmtransfer.speech.whisper import load_speech_model
from mmtransfer.speech.whisper_task import SpeechTask, joined_clips
from mmtransfer.transfer import resume as checkpoints
from mmtransfer.transfer import trainer as training
from mmtransfer.transfer.task import plan_epoch

TEXTS = ["gate one", "gate two is open", "", "crane three", "all clear", "stop", "gate four", "go"]


@given(
    st.lists(st.floats(0.5, 30), min_size=1, max_size=200),
    st.floats(1, 100),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_plan_holds_every_example_once_within_the_budget(lengths, budget, seed, epoch):
    plan = plan_epoch(lengths, budget, seed=seed, epoch=epoch)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        assert batch
        padded = len(batch) * max(lengths[i] for i in batch)
        assert len(batch) == 1 or padded <= budget * (1 + 1e-6)
    assert plan == plan_epoch(lengths, budget, seed=seed, epoch=epoch)


def test_epochs_differ_and_batches_hold_like_lengths():
    lengths = list(np.random.default_rng(0).uniform(1, 15, 500))
    plans = [plan_epoch(lengths, 60, seed=0, epoch=epoch) for epoch in range(2)]
    assert plans[0] != plans[1]
    waste = sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in plans[0])
    assert waste < 0.1 * sum(lengths)


def test_batches_of_a_small_set_differ_between_epochs():
    lengths = list(np.random.default_rng(0).uniform(1, 15, 40))
    plans = [plan_epoch(lengths, 60, seed=0, epoch=epoch) for epoch in range(2)]
    first, second = ({frozenset(batch) for batch in plan} for plan in plans)
    assert len(first & second) < len(first) / 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "train", TEXTS)
    write_dataset(folder / "validation", ["gate two", "", "crane one"])
    return folder


def values(data, random_whisper, run_dir, **train):
    return {
        "source_model": str(random_whisper),
        "run_dir": str(run_dir),
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "rehearsal": "none",
        },
        "train": {
            "steps": 6,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "batch_seconds": 6,
            "evaluate_every": 3,
            "full_context": 0.0,
            **train,
        },
        "transfer": {"interpolate": "none"},
        "augment": {"speed": [0.9, 1.1], "spec_time_masks": 1},
        "runtime": {"threads": 1, "device": "cpu"},
    }


def make_trainer(data, random_whisper, run_dir, **train):
    config = build_config(values(data, random_whisper, run_dir, **train))
    speech = load_speech_model(config.source_model)
    sets = [load_clips(data / name, config.data, name=name) for name in ("train", "validation")]
    task = SpeechTask(speech, sets[0], sets[1], config)
    task.source = resolve(config.source_model)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config.train, config.runtime)
    return training.Trainer(task, task.stages[0], config, accelerator, Path(run_dir))


def losses(run_dir):
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_loss_falls_and_every_weight_moves(data, random_whisper, tmp_path):
    trainer = make_trainer(
        data, random_whisper, tmp_path, steps=40, evaluate_every=40, learning_rate=3e-3
    )
    before = {k: v.clone() for k, v in trainer.task.model.state_dict().items()}
    result = trainer.run()
    found = losses(tmp_path)
    assert result.steps == len(found) == 40
    assert np.mean([found[s] for s in range(36, 41)]) < 0.7 * np.mean([found[s] for s in (1, 2, 3)])
    trainer.load_checkpoint()
    after = trainer.task.model.state_dict()
    fixed = [k for k in before if torch.equal(before[k], after[k])]
    # End to end: only Whisper's sinusoidal position table is not a weight.
    assert fixed == ["model.encoder.embed_positions.weight"]


def test_targets_carry_prompt_text_and_timestamps(data, random_whisper, tmp_path):
    task = make_trainer(data, random_whisper, tmp_path).task
    tokenizer = task.speech.processor.tokenizer
    plain = task._target(1, 1.0, timestamps=False)
    assert tokenizer.decode(plain) == (
        "<|startoftranscript|><|notimestamps|> gate two is open<|endoftext|>"
    )
    task._bounds[1] = (0.3, 1.1)
    stamped = tokenizer.decode(task._target(1, 1.0, timestamps=True), decode_with_timestamps=True)
    assert stamped == "<|startoftranscript|><|0.30|> gate two is open<|1.10|><|endoftext|>"
    faster = tokenizer.decode(task._target(1, 1.1, timestamps=True), decode_with_timestamps=True)
    assert "<|0.28|>" in faster
    assert "<|1.00|>" in faster
    silence = task._target(2, 1.0, timestamps=True)
    assert tokenizer.decode(silence) == "<|startoftranscript|><|notimestamps|><|endoftext|>"
    # Silence can only be learnt if the stock decoder may end at once.
    generation = task.model.generation_config
    assert task.model.config.eos_token_id not in generation.begin_suppress_tokens


def test_no_loss_on_prompt_or_padding(data, random_whisper, tmp_path):
    task = make_trainer(data, random_whisper, tmp_path).task
    for micro in task.prepare(range(8), slice(None), 0):
        for inputs, targets in zip(micro.inputs, micro.targets, strict=True):
            counted = (targets != -100).nonzero().flatten()
            assert counted.tolist() == list(range(int(counted[0]), int(counted[-1]) + 1))
            stamped = random_token(50362) not in inputs[:2].tolist()
            assert counted[0] == (0 if stamped else 1)
            assert targets[counted[-1]] == task.model.config.eos_token_id


def test_padded_clips_use_the_full_window(data, random_whisper, tmp_path):
    task = make_trainer(data, random_whisper, tmp_path, full_context=1.0).task
    assert {m.features.shape[-1] for m in task.prepare(range(8), slice(None), 0)} == {3000}
    task = make_trainer(data, random_whisper, tmp_path, full_context=0.0, joined=0.0).task
    # Else that in which the longest of them, of 1.5 s, is decoded.
    assert {m.features.shape[-1] for m in task.prepare(range(8), slice(None), 0)} == {250}


def test_the_cut_into_micro_batches_does_not_change_the_gradient(data, random_whisper, tmp_path):
    trainer = make_trainer(data, random_whisper, tmp_path)
    task = trainer.task
    micros = task.prepare(range(6), slice(None), 0)
    halves = [half for micro in micros for half in task.split(micro)]
    assert len(halves) > len(micros)
    gradients = []
    for parts in (micros, halves):
        total = sum(task.weight(micro) for micro in parts)
        trainer._backward(0, parts, total)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_does_not_change_the_gradient(data, random_whisper, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(data, random_whisper, tmp_path, gradient_checkpointing=checkpointing)
        trainer.task.model.train()
        micros = trainer.task.prepare(range(4), slice(None), 0)
        trainer._backward(0, micros, 10.0)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_schedules(data, random_whisper, tmp_path):
    def rates(schedule):
        trainer = make_trainer(
            data, random_whisper, tmp_path, steps=20, warmup_steps=4, schedule=schedule
        )
        return [trainer.rate(step) for step in range(20)]

    linear, cosine, constant = rates("linear"), rates("cosine"), rates("constant")
    assert linear[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert linear[4] == cosine[4] == constant[4] == 1.0
    assert linear[12] == pytest.approx(0.5)
    assert cosine[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert constant[4:] == [1.0] * 16


def test_biases_and_norms_are_not_decayed(data, random_whisper, tmp_path):
    trainer = make_trainer(data, random_whisper, tmp_path, weight_decay=0.1)
    decayed, free = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(trainer.parameters)


def test_out_of_memory_halves_the_micro_batches_and_goes_on(data, random_whisper, tmp_path):
    options = {"evaluate_every": 6, "batch_seconds": 10}  # four clips of 2.5 s
    reference = make_trainer(data, random_whisper, tmp_path / "a", **options)
    reference.run()

    trainer = make_trainer(data, random_whisper, tmp_path / "b", **options)
    whole_loss, sizes = trainer.task.loss, []

    def limited(micro, device):
        if len(micro.features) > 2:
            raise torch.OutOfMemoryError("made here")
        sizes.append(len(micro.features))
        return whole_loss(micro, device)

    trainer.task.loss = limited
    trainer.run()
    assert trainer.state.splits == 1
    assert max(sizes) <= 2
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3)


def test_out_of_memory_with_one_example_says_so(data, random_whisper, tmp_path):
    trainer = make_trainer(data, random_whisper, tmp_path)

    def never(micro, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    trainer.task.loss = never
    with pytest.raises(UserError, match=r"single example.*clip\d\.wav"):
        trainer.run()


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(data, random_whisper, tmp_path):
    trainer = make_trainer(data, random_whisper, tmp_path)
    whole_loss = trainer.task.loss
    trainer.task.loss = lambda micro, device: whole_loss(micro, device) * float("nan")
    with pytest.raises(UserError, match=r"Loss is nan at step 1.*clip\d\.wav"):
        trainer.run()


def test_early_stopping_and_the_best_weights(data, random_whisper, tmp_path):
    trainer = make_trainer(data, random_whisper, tmp_path, steps=30, evaluate_every=2, patience=3)
    scores = iter([0.9, 0.5, 0.6, 0.5, 0.7, 0.1])
    kept = {}

    def summarize(records):
        kept[trainer.state.step] = trainer.task.model.proj_out.weight.detach().clone()
        return {"wer": next(scores), "cer": 0.0, "hallucinated_words": 0}

    trainer.task.summarize = summarize
    result = trainer.run()
    assert result.early_stopped
    assert (result.steps, result.best_step, result.best) == (10, 4, 0.5)
    torch.testing.assert_close(trainer.task.model.proj_out.weight, kept[4])


def test_equal_scores_are_told_apart_by_the_second_metric(data, random_whisper, tmp_path):
    """On a small validation set many weights score the same."""
    trainer = make_trainer(data, random_whisper, tmp_path / "run")
    scripted = iter([(0.5, 0.3), (0.5, 0.2), (0.5, 0.4), (0.4, 0.9), (0.4, 0.9)])
    trainer.evaluate = lambda: dict(zip(("wer", "cer"), next(scripted), strict=True))
    best = []
    for step in range(1, 6):
        trainer.state.step = step
        trainer._evaluate_and_keep_best()
        best.append(trainer.state.best_step)
    assert best == [1, 2, 2, 4, 4]
    assert trainer.state.evaluations_since_best == 1


def test_a_context_is_safe_only_if_the_source_domain_is_read_as_well(
    data, random_whisper, tmp_path, monkeypatch
):
    task = make_trainer(data, random_whisper, tmp_path).task
    source = load_clips(data / "validation", build_config({}).data, name="source")
    # Clips of up to 1.5 s and a second of silence.
    rates = {"target": {30.0: 0.1, 20.0: 0.1, 10.0: 0.1, 2.5: 0.105}}
    rates["source"] = {30.0: 0.2, 20.0: 0.2, 10.0: 0.3, 2.5: 0.3}

    def score(clips, device, shortest_s):
        return (rates["source" if clips == source.clips else "target"], shortest_s)

    task.validation = load_clips(data / "train", build_config({}).data, name="target")
    monkeypatch.setattr(task, "_score", score)
    monkeypatch.setattr(task, "summarize", lambda found: {"wer": found[0][found[1]]})
    for sets, safe_s in (([task.validation], 2.5), ([task.validation, source], 20.0)):
        clips = [clips.clips for clips in sets]
        alone = task.measure_shortest_context("cpu", clips)
        assert task.speech.shortest_context_s == safe_s
        assert [context for _, context in alone] == [safe_s] * len(sets)


@pytest.mark.parametrize(("slip", "window_s"), [("", 19.0), ("and on and on", 0.0)])
def test_windows_are_used_where_joined_clips_score_as_single_ones(
    slip, window_s, data, random_whisper, tmp_path, monkeypatch
):
    task = make_trainer(data, random_whisper, tmp_path).task
    windows = [own for own in joined_clips(task.validation.clips) if len(own) > 1]
    assert windows
    together = [" ".join([*(clip.text for clip in own), slip]) for own in windows]

    def transcribe(self, waves, **options):
        assert len(waves) == len(together)
        return [SimpleNamespace(text=text) for text in together]

    clips = task.validation.clips
    scoring = ClipScoring(clips, task.speech.language, task.config)
    alone = [scoring.score(clip, clip.text) for clip in clips]
    monkeypatch.setattr(Recognizer, "transcribe", transcribe)
    task.measure_window("cpu", [clips], [alone])
    assert task.speech.window_s == window_s
    # The first set with clips to join decides: no other is decoded, which would fail above.
    task.measure_window("cpu", [clips[:1], clips, clips[:2]], [alone[:1], alone, alone[:2]])
    assert task.speech.window_s == window_s
    task.measure_window("cpu", [clips[:1]], [alone[:1]])
    assert task.speech.window_s == 0.0


def test_joined_clips_hold_all_clips_in_windows_of_one_recording():
    def clip(seconds, group):
        return Clip(Path("a.wav"), "x", group=group, seconds=seconds)

    clips = [clip(9.0, "a"), clip(9.0, "a"), clip(9.0, "a"), clip(3.0, "b"), clip(40.0, "b")]
    assert [len(own) for own in joined_clips(clips)] == [2, 1, 1, 1]
    assert [c for own in joined_clips(clips) for c in own] == clips
    assert joined_clips([]) == []


# --- interruption ------------------------------------------------------------------------------


LONG = {"steps": 14, "evaluate_every": 7, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(data, random_whisper, tmp_path_factory):
    """Folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start_training(values(data, random_whisper, folder / "run", **LONG), folder)
    assert process.wait() == 0, process.communicate()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_losses_and_weights(
    data, random_whisper, uninterrupted, tmp_path, number
):
    broken = values(data, random_whisper, tmp_path / "broken", **LONG)
    process = start_training(broken, tmp_path, stop=(7, number))
    assert process.wait() == (143 if number == signal.SIGTERM else -9)
    assert not (tmp_path / "broken" / "report.json").exists()
    assert 7 <= len(losses(tmp_path / "broken")) <= 8

    if number == signal.SIGTERM:
        refused = start_training(broken, tmp_path)
        assert refused.wait() == 2
        assert "--resume" in refused.communicate()[1]
        changed = start_training(broken, tmp_path, "--resume", "--train.learning_rate", "0.5")
        assert changed.wait() == 2
        assert "another train.learning_rate" in changed.communicate()[1]
    assert_resumed(broken, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_at_any_moment_resumes(data, random_whisper, tmp_path, number):
    """By another process, whatever it does just then."""
    long = {"steps": 60, "evaluate_every": 20, "checkpoint_every": 5}
    whole = start_training(values(data, random_whisper, tmp_path / "whole", **long), tmp_path)
    assert whole.wait() == 0, whole.communicate()
    broken = values(data, random_whisper, tmp_path / "broken", **long)
    process = start_training(broken, tmp_path)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 12)
    process.send_signal(number)
    assert process.wait() == (143 if number == signal.SIGTERM else -9)
    assert not (tmp_path / "broken" / "report.json").exists()
    assert_resumed(broken, tmp_path, tmp_path / "whole")


def assert_resumed(broken, tmp_path, uninterrupted):
    process = start_training(broken, tmp_path, "--resume")
    assert process.wait() == 0, process.communicate()
    assert losses(uninterrupted) == losses(tmp_path / "broken")
    assert_same_weights(uninterrupted, tmp_path / "broken")
    assert not (tmp_path / "broken" / "checkpoints").exists()


def assert_same_weights(*run_dirs):
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in run_dirs)
    assert all(torch.equal(one[key], other[key]) for key in one)


def two_torchruns(path, *options, max_restarts=0, rendezvous="static"):
    """torchrun on two "nodes" of this machine, a process on each."""
    return start_nodes(torchrun_commands(path, max_restarts, rendezvous), path, options)


def torchrun_commands(path, max_restarts, rendezvous):
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(max_restarts)]
    if rendezvous == "static":
        common += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        own = [["--node-rank", "0"], ["--node-rank", "1"]]
    else:
        common += ["--rdzv-backend", rendezvous, "--rdzv-id", "run", "--local-addr", "127.0.0.1"]
        common += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        # As if the address were the first node's alone.
        own = [["--rdzv-conf", "is_host=1"], ["--rdzv-conf", "is_host=0"]]
    common += ["-m", "mmtransfer.cli", "train", str(path)]
    return [["torch.distributed.run", *node, *common] for node in own]


def two_machines(path, *options):
    """Accelerate's launcher on two "machines", a process on each."""
    # "multi_gpu" is Accelerate's name for one process per device under torch's launcher; the
    # configuration says that the devices are CPUs.
    common = ["--multi_gpu", "--num_processes", "2", "--num_machines", "2"]
    common += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    common += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    common += ["-m", "mmtransfer.cli", "train", str(path)]
    starts = [["accelerate.commands.launch", "--machine_rank", str(r), *common] for r in (0, 1)]
    return start_nodes(starts, path, options)


def start_nodes(starts, path, options):
    """A process for each node; what they print goes into files beside the configuration."""
    return [start_node(start, path, options, number) for number, start in enumerate(starts)]


def start_node(start, path, options, number):
    with (path.parent / f"node{number}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *start, *options],
            env=child_environment(),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finished(nodes, path):
    codes = [node.wait(600) for node in nodes]
    logs = [(path.parent / f"node{number}.log").read_text() for number in range(len(nodes))]
    assert codes == [0] * len(nodes), "\n".join(logs)
    return logs


def side_by_side(path, *options, folders=(), codes=(0, 0), program=None):
    """Two processes with the variables that a launcher sets, each on a node of its own if they
    have folders of their own; what they print.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    place["LOCAL_WORLD_SIZE"] = "1" if folders else "2"
    processes = []
    for rank in range(2):
        environment = child_environment() | place | {"RANK": str(rank)}
        environment["LOCAL_RANK"] = "0" if folders else str(rank)
        own = ["--run-dir", folders[rank]] if folders else []
        arguments = ["train", path, *own, *options]
        processes.append(Command(*arguments, program=program, environment=environment))
    answers = [process.communicate() for process in processes]
    assert tuple(process.returncode for process in processes) == codes, answers
    return answers


@pytest.mark.parametrize(
    "start",
    [
        side_by_side,
        pytest.param(lambda path: finished(two_torchruns(path), path), marks=pytest.mark.slow),
        pytest.param(lambda path: finished(two_machines(path), path), marks=pytest.mark.slow),
    ],
    ids=["side by side", "torchrun", "accelerate"],
)
def test_two_processes_follow_the_loss_curve_of_one_with_the_doubled_batch(
    data, random_whisper, tmp_path, start
):
    short = {"steps": 4, "evaluate_every": 2}
    runs.train(
        build_config(values(data, random_whisper, tmp_path / "one", batch_seconds=8, **short))
    )
    two = values(data, random_whisper, tmp_path / "two", batch_seconds=4, **short)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(two))
    start(path)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    assert json.loads((tmp_path / "two" / "report.json").read_text())["cost"]["device"][0] == "2"


# The command line, whose first process runs out of memory when half of its gradients are summed.
TIGHT = """
import os
import torch
from mmtransfer import cli
from mmtransfer.speech.whisper_task import SpeechTask

whole = SpeechTask.loss

def loss(self, micro, device):
    found = whole(self, micro, device)
    if os.environ["RANK"] == "0" and len(micro.features) > 1:
        found.backward()
        raise torch.OutOfMemoryError("made here")
    return found

SpeechTask.loss = loss
cli.entry()
"""


@pytest.mark.slow
def test_all_processes_take_a_step_again_in_which_one_ran_out_of_memory(
    data, random_whisper, tmp_path
):
    for name, program in (("whole", None), ("tight", TIGHT)):
        config = values(data, random_whisper, tmp_path / name, batch_seconds=4)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        answers = side_by_side(path, program=program)
    assert "micro-batches are halved" in answers[0][1]
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "tight")
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


@pytest.mark.slow
def test_nodes_need_not_share_the_run_folder(data, random_whisper, tmp_path):
    """The first node's has everything, also what is resumed from, and another one's has nothing."""
    config = values(data, random_whisper, tmp_path / "x", evaluate_every=2, checkpoint_every=1)
    config["transfer"]["stages"] = [{"frozen": 1, "steps": 4}, {"frozen": "none", "steps": 4}]
    del config["augment"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    side_by_side(path, folders=[tmp_path / "whole"] * 2)

    folders = [tmp_path / "first", tmp_path / "second"]
    program = STOPPED.format(after=6, number=int(signal.SIGTERM))
    answers = side_by_side(path, folders=folders, codes=(143, 143), program=program)
    assert "is not shared" in answers[0][1]
    assert not folders[1].exists()

    swapped = side_by_side(path, "--resume", folders=folders[::-1], codes=(2, 2))
    assert all("the checkpoint lies with process 1" in error for _, error in swapped)
    out, other = side_by_side(path, "--resume", folders=folders)
    assert "run folder" in out[0]
    assert not other[0]
    assert losses(tmp_path / "whole") == losses(folders[0])
    assert_same_weights(tmp_path / "whole", folders[0])


@pytest.mark.slow
def test_a_killed_node_comes_back_to_the_same_weights(data, random_whisper, tmp_path, monkeypatch):
    """By torchrun's restarts on either rendezvous, a node alone, and all by the same command."""
    long = {"steps": 40, "evaluate_every": 10, "checkpoint_every": 5}
    paths = {}
    for name in ("whole", "static", "c10d", "joined", "again"):
        paths[name] = tmp_path / name / "config.yaml"
        paths[name].parent.mkdir()
        config = values(data, random_whisper, tmp_path / name / "run", **long)
        paths[name].write_text(yaml.safe_dump(config))
    finished(two_torchruns(paths["whole"], "--resume"), paths["whole"])

    for rendezvous in ("static", "c10d"):
        path = paths[rendezvous]
        nodes = two_torchruns(path, "--resume", max_restarts=2, rendezvous=rendezvous)
        when_at(tmp_path / rendezvous / "run", 12)
        kill(below(nodes[1].pid))  # the process that trains; its launcher lives
        assert "resuming at step" in finished(nodes, path)[0]

    # Without it torch 2.12 lets no node in that comes in the place of another.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    path = paths["joined"]
    starts = torchrun_commands(path, 2, "c10d")
    nodes = start_nodes(starts, path, ["--resume"])
    when_at(tmp_path / "joined" / "run", 12)
    kill([nodes[1].pid, *below(nodes[1].pid)])
    nodes[1].wait(60)
    nodes[1] = start_node(starts[1], path, ["--resume"], 1)
    assert "resuming at step" in finished(nodes, path)[0]

    path = paths["again"]
    nodes = two_torchruns(path, "--resume")
    when_at(tmp_path / "again" / "run", 12)
    kill([nodes[1].pid, *below(nodes[1].pid)])
    assert [node.wait(600) != 0 for node in nodes] == [True, True]
    finished(two_torchruns(path, "--resume"), path)

    for name in paths:
        assert losses(tmp_path / "whole" / "run") == losses(tmp_path / name / "run")
        assert_same_weights(tmp_path / "whole" / "run", tmp_path / name / "run")


def kill(processes):
    for process in processes:
        os.kill(process, signal.SIGKILL)


def when_at(run_dir, steps):
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= steps, 300)


def test_accelerate_settings_reach_the_accelerator(monkeypatch):
    config = build_config({"runtime": {"device": "cpu"}})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert make_accelerator(config.train, config.runtime).mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_mixed_precision_trains_to_nearly_the_same_losses(data, random_whisper, tmp_path):
    for name, precision in (("a", "no"), ("b", "bf16")):
        train = {"mixed_precision": precision, "evaluate_every": 6}
        config = values(data, random_whisper, tmp_path / name, **train)
        process = start_training(config, tmp_path, name=f"{name}.yaml")
        assert process.wait() == 0, process.communicate()
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert list(a) == list(b)
    assert list(a.values()) != list(b.values())
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0.02)


@pytest.mark.usefixtures("unmeasured")
def test_a_tracker_gets_what_is_logged(data, random_whisper, tmp_path):
    config = build_config(values(data, random_whisper, tmp_path / "run", steps=3))
    train = config.train.model_copy(update={"report_to": "tensorboard"})
    runs.train(config.model_copy(update={"train": train}))
    files = [str(path) for path in tmp_path.rglob("*tfevents*")]
    found = {}
    for file in files:
        for event in EventFileLoader(file).Load():
            for value in event.summary.value:
                if value.HasField("tensor") and value.tensor.float_val:
                    found[value.tag, event.step] = value.tensor.float_val[0]
    expected = losses(tmp_path / "run")
    assert len(expected) == 3
    for step, loss in expected.items():
        assert found["loss", step] == pytest.approx(loss, rel=1e-6)
    assert ("validation_wer", 3) in found


def test_a_tracker_that_is_not_there_or_does_not_start_is_one_line(monkeypatch):
    config = build_config({"train": {"report_to": "wandb"}, "runtime": {"device": "cpu"}})
    monkeypatch.setattr("mmtransfer.runtime.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to: wandb is not installed\. pip install wandb"):
        make_accelerator(config.train, config.runtime)

    class Offline:
        trackers = ()

        def init_trackers(self, *arguments, **options):
            raise ConnectionError("no network")

    with (
        pytest.raises(UserError, match=r"wandb cannot be started \(no network\)"),
        tracked(Offline(), config),
    ):
        pass


def test_a_device_this_machine_lacks():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = build_config({"runtime": {"device": "cuda"}})
    with pytest.raises(UserError, match="no usable GPU"):
        make_accelerator(config.train, config.runtime)


# --- the run folder ----------------------------------------------------------------------------


def test_run_folder_is_complete_and_loads_with_plain_transformers(data, random_whisper, tmp_path):
    run = tmp_path / "run"
    config = values(data, random_whisper, run)
    config["data"]["source_domain"] = {"other": str(data / "validation")}
    threads = torch.get_num_threads()
    report = runs.train(build_config(config))
    assert torch.get_num_threads() == threads
    assert sorted(p.name for p in run.iterdir()) == [
        "README.md",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "outcomes.json",
        "report.json",
        "sample.safetensors",
    ]
    assert not [*tmp_path.rglob("*tfevents*")]  # no tracker unless one is named
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["target"]) == {"before", "after", "monitored"}
    keys = {"before", "after", "forgetting", "forgetting_test"}
    assert keys == set(report["source_domain"]["other"])
    assert report["target"]["before"]["silence_clips"] == 1
    assert build_config(yaml.safe_load((run / "config.yaml").read_text())).train.steps == 6

    from huggingface_hub import ModelCard
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    assert str(tmp_path) not in card.content
    AutoModelForSpeechSeq2Seq.from_pretrained(run / "model")
    AutoProcessor.from_pretrained(run / "model")
    recognize = pipeline("automatic-speech-recognition", model=str(run / "model"))
    assert isinstance(recognize(np.zeros(16_000, np.float32))["text"], str)

    scores = runs.evaluate(str(run), str(data / "validation"))
    assert scores["clips"] == 3
    assert scores["wer"] == pytest.approx(report["target"]["after"]["wer"])
    with pytest.raises(UserError, match="holds a finished run"):
        runs.train(build_config(config))


def test_validation_is_held_out_by_group_when_none_is_named(random_whisper, tmp_path):
    folder = write_dataset(
        tmp_path / "set", [f"text {i}" for i in range(12)], groups=list("aabbccddeeff")
    )
    config = build_config(
        {
            "data": {"train": str(folder), "validation_fraction": 0.2},
            "source_model": str(random_whisper),
        }
    )
    splits = load_clip_splits(config, 30.0)
    train, validation = splits.train, splits.validation
    groups = [{clip.group for clip in clips.clips} for clips in (train, validation)]
    assert not groups[0] & groups[1]
    assert len(validation) == 2


def test_training_clips_are_no_source_domain(data, random_whisper, tmp_path):
    config = values(data, random_whisper, tmp_path / "run")
    general = write_dataset(tmp_path / "general", ["elsewhere", "far off"])
    config["data"]["source_domain"] = {"general": str(general)}
    assert set(load_clip_splits(build_config(config), 30.0).source_domain) == {"general"}
    shutil.copyfile(data / "train" / "clip1.wav", general / "clip1.wav")
    with pytest.raises(UserError, match=r"1 clips of 'general' are also in 'train' \(same-audio\)"):
        load_clip_splits(build_config(config), 30.0)
    config["data"]["allow_leaks"] = ["same-audio"]
    assert len(load_clip_splits(build_config(config), 30.0).source_domain["general"]) == 2


def test_resume_folder_errors(data, random_whisper, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="found a file"):
        runs.train(build_config(values(data, random_whisper, tmp_path / "file")))
    with pytest.raises(UserError, match=r"data\.train is not set"):
        runs.train(build_config({"run_dir": str(tmp_path / "x")}))


def test_the_task_script_runs_and_resumes_nothing_when_done(data, random_whisper, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(data, random_whisper, tmp_path / "run", steps=2)))
    video = write_media(tmp_path / "v.mp4", tone(2.0), video=True)
    script = ROOT / "tasks" / "video_monitoring.py"
    command = ["--config", path, "--video", video]
    for expected in (True, False):
        code, out, error = run_command(*command, program=script)
        assert code == 0, error
        assert ("target" in out) is expected
        assert str(video) in out
    code, _, error = run_command(*command, "--video", "nothing.mp4", program=script)
    assert code == 2
    assert error.strip() == "error: nothing.mp4: no such file."


@pytest.mark.usefixtures("unmeasured")
def test_full_disk_is_one_line(data, random_whisper, tmp_path, monkeypatch, capsys):
    """A write that fails for lack of space ends in one line, and the run can be resumed."""
    from mmtransfer.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(data, random_whisper, tmp_path / "run", steps=4)))

    def full(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    assert main(["train", str(path), "--resume"]) == 0
