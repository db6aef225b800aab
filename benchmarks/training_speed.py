"""Training speed against the usual recipe: the same model, clips, batch size and learning rate.

    python benchmarks/training_speed.py --data FOLDER [--steps 20]

The usual recipe is the Hugging Face Seq2SeqTrainer on features padded to 30 s. Both run in one
process, on the same threads, one after the other; evaluation is off in both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from mmtransfer.config import build_config
from mmtransfer.runtime import make_accelerator
from mmtransfer.speech.clips import ClipSet, load_clips
from mmtransfer.speech.whisper import load_speech_model
from mmtransfer.speech.whisper_task import SpeechTask
from mmtransfer.transfer.trainer import Trainer

BATCH = 16


def ours(data: str, steps: int, folder: str) -> float:
    """Seconds for that many steps of our loop, the padded clips it mixes in included."""
    config = build_config({"train": {"steps": steps, "learning_rate": 1e-4, "warmup_steps": 0}})
    speech = load_speech_model(config.source_model)
    clips = load_clips(data, config.data, name="train")
    task = SpeechTask(speech, clips, ClipSet("none", clips.clips[:1]), config)
    # 16 clips a batch, like the other recipe: the budget is the audio of 16 of the longest.
    train = config.train.model_copy(update={"batch_seconds": BATCH * max(task.lengths)})
    config = config.model_copy(update={"train": train})
    task = SpeechTask(speech, clips, ClipSet("none", clips.clips[:1]), config)
    accelerator = make_accelerator(train, config.runtime)
    trainer = Trainer(task, task.stages[0], config, accelerator, Path(folder))
    started = time.perf_counter()
    task.train_mode()
    for step, (_, _, indices, micros) in enumerate(trainer._prepared()):
        trainer._step(step, indices, micros)
    return time.perf_counter() - started


def usual(data: str, steps: int, folder: str) -> float:
    """Seconds for that many steps of Seq2SeqTrainer with 30-s padding."""
    config = build_config({})
    speech = load_speech_model(config.source_model)
    clips = load_clips(data, config.data, name="train")
    tokenizer = speech.processor.tokenizer

    def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        chosen = [clips.clips[item["index"]] for item in batch]
        rows = [torch.tensor(tokenizer(f" {clip.text}").input_ids[1:]) for clip in chosen]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        features = speech.features([clip.samples() for clip in chosen], 30.0)
        return {"input_features": features, "labels": labels}

    arguments = Seq2SeqTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    examples = [{"index": index} for index in range(len(clips))]
    trainer = Seq2SeqTrainer(
        model=speech.model, args=arguments, train_dataset=examples, data_collator=collate
    )
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        mine = ours(arguments.data, arguments.steps, folder)
        print(f"mmtransfer: {mine:.1f} s for {arguments.steps} steps", flush=True)
        theirs = usual(arguments.data, arguments.steps, folder)
        print(f"Seq2SeqTrainer, 30-s padding: {theirs:.1f} s for {arguments.steps} steps")
    print(f"ratio: {theirs / mine:.2f}")


if __name__ == "__main__":
    main()
