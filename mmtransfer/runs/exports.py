"""A run's model in the formats of other engines: CTranslate2 (for faster-whisper) and ONNX, each
compared with the model on real input before it is kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmtransfer.cache import atomic_path
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.metadata import Metadata
from mmtransfer.hub.publish import EXPORTS
from mmtransfer.runs.models import Model, load
from mmtransfer.runs.sample import Given, sample_of, wave_of
from mmtransfer.runs.snippets import ct2_snippet, onnx_snippet
from mmtransfer.sound.classifier import SoundModel
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.engines_ctranslate2 import converted
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.text.classifier import TextModel
from mmtransfer.transfer.encoders import TextEncoder, WaveEncoder

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest difference of a probability between a classifier and its export."""
_OPSET = 18
_MOST_TOKENS = 200  # of a transcript that is compared


@dataclass(frozen=True)
class Export:
    """What was exported."""

    kind: str
    """ct2 or onnx."""
    precision: str
    """int8 or float32."""
    examples: int
    """On how many it was compared with the model."""
    usage: str
    """Python that runs it without this package."""

    @property
    def section(self) -> str:
        """Of the model card."""
        how = "CTranslate2 for faster-whisper" if self.kind == "ct2" else "ONNX"
        what = "the same text or class" if self.kind == "onnx" else "the same text"
        return f"""
## {how}, {self.precision}

In the folder `{self.kind}`; on {self.examples} examples it gave {what} as the model here.

```python
{self.usage}```
"""


def export(run: str | Path, to: str | Path, kind: str) -> Export:
    """Write a run's model as `ct2` or `onnx` into a new folder, and compare it with the model on
    examples of the run: the same text, or the same class and probabilities within `TOLERANCE`.
    `ct2` is in int8, or in float32 where int8 gives another text.

    Raises:
        UserError: no finished run, a folder that is there, a model that has no such form, packages
            that are missing, or an export that gives something else.
    """
    if kind not in EXPORTS:
        raise UserError(f"format '{kind}': expected one of {', '.join(EXPORTS)}.")
    folder = Path(to)
    if folder.exists():
        raise UserError(f"{to}: is there already. Choose another folder, or remove it.")
    checkpoint = resolve(str(run))
    model = load(checkpoint)
    given = sample_of(Path(run), model)
    with atomic_path(folder) as part:
        part.mkdir(parents=True)
        precision, apart = _WRITERS[kind](checkpoint, model, part, given)
        if apart:
            raise UserError(
                f"{run}: as {kind} it does not give what it gives here ({apart}). It is not kept."
            )
    usage = _usage(kind, checkpoint, model, precision)
    return Export(kind, precision, len(given), usage)


def _usage(kind: str, checkpoint: Checkpoint, model: Model, precision: str) -> str:
    recorded = checkpoint.metadata or Metadata(checkpoint.kind, checkpoint.form, None)
    if isinstance(model, SpeechModel):
        if kind == "ct2":
            return ct2_snippet(model.language, precision)
        prompt = model.prompt(timestamps=False)
        longest = model.model.config.max_target_positions
        return onnx_snippet(recorded, prompt=prompt, longest=longest)
    return onnx_snippet(recorded)


# --- CTranslate2 ---------------------------------------------------------------------------------


def _write_ct2(
    checkpoint: Checkpoint, model: Model, folder: Path, given: Given
) -> tuple[str, str | None]:
    """The files that faster-whisper takes; returns their precision, and what is different, if
    anything. Where the model is in doubt about a word, int8 may decide it otherwise.
    """
    if not isinstance(model, SpeechModel):
        raise UserError(f"{checkpoint.source}: ct2 is for Whisper; export this model as onnx.")
    apart = _in_ctranslate2(checkpoint, model, folder, given, "int8")
    if apart is None:
        return "int8", None
    logger.info("%s: in int8 it gives %s; written in float32", checkpoint.source, apart)
    return "float32", _in_ctranslate2(checkpoint, model, folder, given, "float32")


def _in_ctranslate2(
    checkpoint: Checkpoint, model: SpeechModel, folder: Path, given: Given, precision: str
) -> str | None:
    from mmtransfer.speech.engine import DecodingOptions
    from mmtransfer.speech.recognizers import open_recognizer

    made = converted(checkpoint, compute_type=precision)
    for path in (*(made / "full").iterdir(), made / "tokenizer.json"):
        shutil.copyfile(path, folder / path.name)
    extractor = model.processor.feature_extractor.to_json_string()
    (folder / "preprocessor_config.json").write_text(extractor, encoding="utf-8")
    theirs = open_recognizer(
        checkpoint,
        engine="ctranslate2",
        compute_type=precision,
        device="cpu",
        language=model.language,
        options=DecodingOptions(beam_size=1),
    )
    return _other_text(model, given, lambda wave: _text(theirs, wave, model))


def _text(recognizer: Recognizer, wave: np.ndarray, model: SpeechModel | CtcModel) -> str:
    context = model.max_context_s if isinstance(model, SpeechModel) else None
    return recognizer.transcribe([wave], context_s=context)[0].text


def _other_text(
    model: SpeechModel | CtcModel, given: Given, transcribe: Callable[[np.ndarray], str]
) -> str | None:
    ours = Recognizer(model)
    for wave in map(wave_of, given):
        expected, found = _text(ours, wave, model), transcribe(wave)
        if expected.strip() != found.strip():
            return f"{found[:80]!r} instead of {expected[:80]!r}"
    return None


# --- ONNX ----------------------------------------------------------------------------------------


class _Texts(nn.Module):
    """Token ids to logits of classes, temperature applied; with the library's own forward pass."""

    def __init__(self, model: TextModel):
        super().__init__()
        self.network, self.temperature = model.network, model.temperature
        encoder = model.network.encoder
        assert isinstance(encoder, TextEncoder)
        self.model = encoder.model if model.network.head is None else encoder.base

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[text, token] each -> [text, class]."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        head, layers = self.network.head, self.network.layers
        if head is None:
            return self.model(**inputs).logits / self.temperature
        output = self.model(**inputs, output_hidden_states=True)
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        stacked = torch.stack([states[layer] for layer in layers], 1)
        return head(stacked, attention_mask) / self.temperature


class _Waves(nn.Module):
    """Samples to logits of symbols by frame, or of classes."""

    def __init__(self, model: CtcModel | SoundModel):
        super().__init__()
        self.network = model.network
        self.temperature = model.temperature if isinstance(model, SoundModel) else 1.0

    def forward(self, input_values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """[clip, sample], and how many frames hold the clip [clip] -> [clip, frame, symbol], or
        [clip, class].
        """
        encoder, layers = self.network.encoder, self.network.layers
        states = encoder.hidden_states(layers, {"values": input_values})
        stacked = torch.stack([states[layer] for layer in layers], 1)
        mask = torch.arange(stacked.shape[2])[None] < frames[:, None]
        return self.network.head(stacked, mask) / self.temperature  # type: ignore[misc]


class _Encoder(nn.Module):
    """Whisper's encoder."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """[clip, mel, frame] -> [clip, frame / 2, width]."""
        return self.encoder(input_features).last_hidden_state


class _Decoder(nn.Module):
    """Whisper's decoder without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.output = model.get_decoder(), model.proj_out

    def forward(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[clip, token], [clip, frame, width] -> logits [clip, token, class]."""
        found = self.decoder(
            input_ids=input_ids, encoder_hidden_states=hidden, use_cache=False
        ).last_hidden_state
        return self.output(found)


def _write_onnx(
    checkpoint: Checkpoint, model: Model, folder: Path, given: Given
) -> tuple[str, str | None]:
    """Graphs, and what makes their inputs; returns as `_write_ct2`."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"onnx needs {', '.join(missing)}: pip install 'mmtransfer[onnx]'")
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(model, TextModel):
            return "float32", _write_text(model, folder, given)
        if isinstance(model, SpeechModel):
            return "float32", _write_whisper(model, folder, given)
        if isinstance(model.network.encoder, WaveEncoder):
            return "float32", _write_waves(model, folder, given)
    raise UserError(
        f"{checkpoint.source}: onnx is for Whisper, for texts, and for CTC and sounds on wav2vec "
        f"2.0, HuBERT and WavLM; found {checkpoint.architecture} ({checkpoint.kind})."
    )


def _graph(
    module: nn.Module, inputs: dict[str, torch.Tensor], axes: dict[str, Any], path: Path
) -> None:
    """Write a module's graph; `axes` are the sizes that may change, by input."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own workings
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            module.eval(),
            (),
            str(path),
            kwargs=inputs,
            dynamo=True,
            input_names=list(inputs),
            output_names=["hidden" if isinstance(module, _Encoder) else "logits"],
            dynamic_shapes=axes,
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )


def session(path: Path) -> Any:
    """A graph on onnxruntime, on CPU: takes arrays by name, returns one array."""
    import onnxruntime

    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda **inputs: opened.run(None, inputs)[0]


def _write_text(model: TextModel, folder: Path, given: Given) -> str | None:
    texts = [note["text"] for note, _ in given]
    targets = [note["target"] for note, _ in given]
    encoded = model.encode(texts, targets)
    inputs, _, _ = model.collate(encoded[:2] if len(encoded) > 1 else [encoded[0]] * 2)
    size = torch.export.Dim("texts"), torch.export.Dim("tokens", max=model.settings.max_tokens)
    _graph(
        _Texts(model),
        inputs,
        {name: dict(enumerate(size)) for name in inputs},
        folder / "model.onnx",
    )
    model.tokenizer.save_pretrained(folder)
    run = session(folder / "model.onnx")
    expected = model.probabilities(model.encoded_logits(encoded, device="cpu"))
    for number, text in enumerate(encoded):
        arrays, _, _ = model.collate([text])
        logits = torch.from_numpy(run(**{name: value.numpy() for name, value in arrays.items()}))
        found = logits.double().softmax(-1).mean(0).numpy()
        if len(text.windows) == 1 and _is_apart(expected[number], found):
            return _classes(model.labels, expected[number], found)
    return None


def _is_apart(expected: np.ndarray, found: np.ndarray) -> bool:
    near = bool(np.abs(expected - found).max() <= TOLERANCE)
    return not near or expected.argmax() != found.argmax()


def _classes(labels: Sequence[str], expected: np.ndarray, found: np.ndarray) -> str:
    was, now = labels[int(expected.argmax())], labels[int(found.argmax())]
    return f"{now!r} {found.max():.4f} instead of {was!r} {expected.max():.4f}"


def _write_waves(model: CtcModel | SoundModel, folder: Path, given: Given) -> str | None:
    samples = torch.export.Dim("samples", min=SAMPLE_RATE // 10, max=30 * SAMPLE_RATE)
    inputs = {"input_values": torch.zeros(1, SAMPLE_RATE), "frames": torch.tensor([40])}
    axes = {"input_values": {1: samples}, "frames": {}}
    _graph(_Waves(model), inputs, axes, folder / "model.onnx")
    model.extractor.save_pretrained(folder)
    model.network.encoder.model.config.save_pretrained(folder)  # says how frames are counted
    run = session(folder / "model.onnx")

    def logits(wave: np.ndarray) -> np.ndarray:
        seconds = len(wave) / SAMPLE_RATE
        values = model.inputs([wave], model.context_s(seconds))["values"]
        frames = np.array([model.frames(seconds)])
        return np.asarray(run(input_values=values.numpy(), frames=frames)[0])

    if isinstance(model, CtcModel):
        (folder / "symbols.json").write_text(json.dumps(model.symbols), encoding="utf-8")

        def transcribe(wave: np.ndarray) -> str:
            best = logits(wave).argmax(-1)[: model.frames(len(wave) / SAMPLE_RATE)]
            return model.read(best.tolist())[0]

        return _other_text(model, given, transcribe)
    for wave in map(wave_of, given):
        clip = wave[: round(model.window_s * SAMPLE_RATE)]
        expected = np.array(list(model.predict([clip])[0].probabilities.values()))
        found = torch.from_numpy(logits(clip)).double()
        shares = (found.sigmoid() if model.is_multi else found.softmax(-1)).numpy()
        if _is_apart(expected, shares):
            return _classes(model.labels, expected, shares)
    return None


def _write_whisper(model: SpeechModel, folder: Path, given: Given) -> str | None:
    network = model.model
    waves = [wave_of(one) for one in given]
    features = model.features(waves[:1], model.max_context_s)
    _graph(
        _Encoder(network),
        {"input_features": features},
        {"input_features": {}},
        folder / "encoder.onnx",
    )
    hidden = _Encoder(network)(features)
    tokens = torch.tensor([model.prompt(timestamps=False) * 2])
    length = torch.export.Dim("tokens", max=network.config.max_target_positions)
    _graph(
        _Decoder(network),
        {"input_ids": tokens, "hidden": hidden},
        {"input_ids": {1: length}, "hidden": {}},
        folder / "decoder.onnx",
    )
    model.processor.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)
    encode, decode = session(folder / "encoder.onnx"), session(folder / "decoder.onnx")

    def transcribe(wave: np.ndarray) -> str:
        state = encode(input_features=model.features([wave], model.max_context_s).numpy())
        prompt = model.prompt(timestamps=False)
        found = greedy(decode, state, prompt, network.generation_config.to_dict())
        return str(model.processor.tokenizer.decode(found, skip_special_tokens=True))

    return _other_text(model, given, transcribe)


def greedy(
    decode: Callable[..., Any], hidden: np.ndarray, prompt: list[int], generation: dict[str, Any]
) -> list[int]:
    """Token ids after a prompt, each the likeliest; `generation` says which are never taken."""
    tokens, end = list(prompt), generation["eos_token_id"]
    never = generation.get("suppress_tokens") or []
    first = [token for token in generation.get("begin_suppress_tokens") or [] if token != end]
    while len(tokens) < _MOST_TOKENS:
        ids = np.array([tokens], np.int64)
        logits = decode(input_ids=ids, hidden=hidden)[0, -1]
        logits[never] = -np.inf
        logits[generation["no_timestamps_token_id"] :] = -np.inf
        if len(tokens) == len(prompt):
            logits[first] = -np.inf
        token = int(logits.argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


_WRITERS = {"ct2": _write_ct2, "onnx": _write_onnx}
