"""A few validation examples that a run keeps, with what its model made of them: what is loaded from
its files later must make the same of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers.modeling_outputs import BaseModelOutput

from mmtransfer.cache import atomic_path
from mmtransfer.errors import UserError
from mmtransfer.runs.models import Model
from mmtransfer.sound.classifier import SoundModel
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip
from mmtransfer.speech.clips import Clip, bundled_speech
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.whisper import SpeechModel, encode_whisper
from mmtransfer.text.classifier import TextModel
from mmtransfer.text.examples import TextExample

Given = Sequence[tuple[dict[str, Any], np.ndarray | None]]
"""Examples: what is noted of each (text, target or language), and 16-bit samples at 16 kHz of one
that is a sound.
"""
SAMPLE = "sample.safetensors"
"""Of a run folder: examples, and what the model gave."""
TOLERANCE = 0.005
"""Largest difference as a share of an example's largest value: other machines and libraries round
differently.
"""
_TEXTS, _CLIPS, _LONGEST_S = 8, 3, 10.0
_LOUDEST = 32767
_SENTENCES = ("The harbour was opened today.", "Nobody liked the new gate.", "It is fine.")
_LEAST = 1e-9  # that a difference is compared with


def write_sample(run_dir: Path, model: Any, examples: Any) -> None:
    """Keep a few of the examples (a set of texts or clips) and what the model makes of them;
    nothing where none of the clips is short enough.
    """
    given = _texts(examples.examples) if isinstance(model, TextModel) else _clips(examples.clips)
    if not given:
        return
    arrays, notes = {}, []
    for number, (note, samples) in enumerate(given):
        if samples is not None:
            arrays[f"samples.{number}"] = samples
        notes.append(note)
    found = _outputs(model, given)
    arrays |= {f"outputs.{number}": row for number, row in enumerate(found)}
    with atomic_path(run_dir / SAMPLE) as part:
        save_file(arrays, part, metadata={"examples": json.dumps(notes)})
        part.chmod(0o600)  # texts and speech


def check_sample(run_dir: Path, model: Model) -> int:
    """Make sure that a model makes of a run's sample what is recorded there; returns how many
    examples there are.

    Raises:
        UserError: a damaged sample, or other results.
    """
    path = run_dir / SAMPLE
    given, expected = _read(path)
    try:
        found = _outputs(model, given)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    for number, (was, now) in enumerate(zip(expected, found, strict=True)):
        # What has another shape, or is no number, differs as much as can be.
        apart = float("inf")
        if was.shape == now.shape:
            apart = float(np.abs(was - now).max() / max(np.abs(was).max(), _LEAST))
        if not apart <= TOLERANCE:
            raise UserError(
                f"{run_dir}: the weights in model/ do not give what training recorded (example "
                f"{number + 1} of {len(expected)} in {SAMPLE} differs by {apart:.2%}, allowed "
                f"{TOLERANCE:.1%}). Restore the folder, or train again."
            )
    return len(expected)


def sample_of(run_dir: Path, model: Model) -> Given:
    """Real inputs of a run's kind: its sample, or what this package has where it keeps none.

    Raises:
        UserError: a damaged sample.
    """
    if (run_dir / SAMPLE).is_file():
        return _read(run_dir / SAMPLE)[0]
    if isinstance(model, TextModel):
        return [({"text": text, "target": None}, None) for text in _SENTENCES]
    folder = bundled_speech("en")
    assert folder is not None  # data of this package
    paths = sorted(folder.glob("*.ogg"))[:_CLIPS]
    return [({"text": "", "language": None}, _whole(decode_clip(path))) for path in paths]


def _read(path: Path) -> tuple[Given, list[np.ndarray]]:
    """(examples, what the model gave) of a sample."""
    try:
        with safe_open(path, "np") as file:
            notes = json.loads(file.metadata()["examples"])
            names = set(file.keys())
            given = [
                (note, file.get_tensor(f"samples.{n}") if f"samples.{n}" in names else None)
                for n, note in enumerate(notes)
            ]
            return given, [file.get_tensor(f"outputs.{n}") for n in range(len(notes))]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path}: damaged ({reason}). Train again, or remove it.")


def wave_of(example: tuple[dict[str, Any], np.ndarray | None]) -> np.ndarray:
    """Samples of an example of sound, float32 at 16 kHz."""
    samples = example[1]
    assert samples is not None  # a text has none
    return samples.astype(np.float32) / _LOUDEST


def _texts(examples: Sequence[TextExample]) -> Given:
    return [({"text": one.text, "target": one.target}, None) for one in examples[:_TEXTS]]


def _clips(clips: Sequence[Clip]) -> Given:
    found = []
    for clip in [clip for clip in clips if 0 < clip.seconds <= _LONGEST_S][:_CLIPS]:
        found.append(({"text": clip.text, "language": clip.language}, _whole(clip.samples())))
    return found


def _whole(samples: np.ndarray) -> np.ndarray:
    """Samples as 16-bit numbers."""
    return np.clip(np.rint(samples * _LOUDEST), -_LOUDEST, _LOUDEST).astype(np.int16)


def _outputs(model: Any, given: Given) -> list[np.ndarray]:
    """Of each example logits [class], temperature applied; of speech log-probabilities [frame,
    symbol], or those of its transcript's tokens.
    """
    if isinstance(model, TextModel):
        device = next(model.network.parameters()).device
        encoded = model.encode([n["text"] for n, _ in given], [n["target"] for n, _ in given])
        logits = model.encoded_logits(encoded, device=device)
        return list(logits / np.float32(model.temperature))
    waves = [(one[0], wave_of(one)) for one in given]
    rate: Any = {SoundModel: _of_sound, CtcModel: _of_symbols, SpeechModel: _of_tokens}[type(model)]
    return [rate(model, wave, note).astype(np.float32) for note, wave in waves]


def _of_sound(model: SoundModel, wave: np.ndarray, _: Any) -> np.ndarray:
    device = next(model.network.parameters()).device
    logits = model.logits([len(wave)], lambda _, start, end: wave[start:end], device=device)
    return np.asarray(logits[0] / model.temperature)


def _of_symbols(model: CtcModel, wave: np.ndarray, _: Any) -> np.ndarray:
    network, seconds = model.network, len(wave) / SAMPLE_RATE
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    context = model.context_s(seconds)
    inputs = {name: x.to(device) for name, x in model.inputs([wave], context).items()}
    mask = model.mask([seconds], context)
    with torch.inference_mode():
        logits = network(inputs, mask.to(device)).float().cpu()
    network.train(was_training)
    return np.asarray(logits[mask].log_softmax(-1).numpy())


def _of_tokens(model: SpeechModel, wave: np.ndarray, note: Any) -> np.ndarray:
    context = model.context_s(len(wave) / SAMPLE_RATE)
    network, language = model.model_for(context), note["language"]
    was_training, device = network.training, network.device
    prompt = model.prompt(timestamps=False, language=language)
    room = network.config.max_target_positions - len(prompt)
    text = model.spell(note["text"], language)[: room - 1]
    tokens = torch.tensor([*prompt, *text, network.config.eos_token_id])
    network.eval()
    with torch.inference_mode():
        hidden = encode_whisper(network, model.features([wave], context).to(device))
        logits = network(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=tokens[None, :-1].to(device),
            use_cache=False,
        ).logits[0]
    network.train(was_training)
    chosen = logits.float().log_softmax(-1).cpu()[len(prompt) - 1 :]
    return np.asarray(chosen.gather(1, tokens[len(prompt) :, None])[:, 0].numpy())
