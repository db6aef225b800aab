"""How a model is used without this package: Python for its card, which needs transformers (and peft
for an adapter) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtransfer.hub.metadata import Base, Metadata

PLACE = "path/or/id/of/this/model"
"""Stands for the model's name until it is published."""
_WAVES = ("wav2vec2", "hubert", "wavlm")


def snippet(model: Metadata, architecture: str) -> str | None:
    """Python that runs a model that transformers takes in no one call; None where it takes this
    package: an encoder that does not take inputs of any length by itself.

    `architecture` is the model type of the encoder.
    """
    base = model.base
    if model.form != "full" and (base is None or base.model_id is None):
        return None
    if model.task == "speech":
        is_short = model.short_reader is not None
        return None if base is None or model.form == "full" or is_short else _whisper(base)
    if model.head is None or (model.task != "sentiment" and architecture not in _WAVES):
        return None
    return _with_head(model, model.head)


def _from(base: Base) -> str:
    revision = "" if base.revision is None else f', revision="{base.revision}"'
    return f'"{base.model_id}"{revision}'


def _whisper(base: Base) -> str:
    return f'''from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

name = "{PLACE}"
base = WhisperForConditionalGeneration.from_pretrained({_from(base)}, trust_remote_code=False)
processor = WhisperProcessor.from_pretrained(name, trust_remote_code=False)
run = pipeline(
    "automatic-speech-recognition",
    model=PeftModel.from_pretrained(base, name).merge_and_unload(),
    tokenizer=processor.tokenizer,
    feature_extractor=processor.feature_extractor,
)
print(run("recording.wav")["text"])
'''


def _with_head(model: Metadata, head: Mapping[str, Any]) -> str:
    """An encoder of transformers, and the head on it as plain arithmetic."""
    is_text, is_ctc = model.task == "sentiment", model.task == "ctc"
    kind = "AutoTokenizer" if is_text else "AutoFeatureExtractor"
    place = "name" if model.form == "full" or model.base is None else _from(model.base)
    lines = [
        *([] if is_text else ["import wave", "", "import numpy as np"]),
        "import torch",
        "import torch.nn.functional as F",
        *(["from peft import PeftModel"] if model.form == "adapter" else []),
        "from safetensors.torch import load_file",
        f"from transformers import AutoModel, {kind}",
        "from transformers.utils import cached_file",
        "",
        f'name = "{PLACE}"',
        f"encoder = AutoModel.from_pretrained({place}, trust_remote_code=False).eval()",
    ]
    if model.form == "adapter":
        lines.append("encoder = PeftModel.from_pretrained(encoder, name).merge_and_unload()")
    lines.append('head = load_file(cached_file(name, "head.safetensors"))')
    lines += _text_inputs(model.text or {}) if is_text else _wave_inputs(_longest_s(model))
    body = [
        "output = encoder(**batch, output_hidden_states=True)",
        *([] if is_text else _WAVE_MASK),
        *_head(head, is_ctc=is_ctc),
    ]
    lines += ["with torch.inference_mode():", *(f"    {line}" for line in body)]
    lines += _best_path(model.symbols or []) if is_ctc else _shares(model)
    return "\n".join(lines) + "\n"


def _one_window(text: Mapping[str, Any]) -> list[str]:
    is_split = text.get("long_texts") == "windows"
    return ["# A text of one window: mmtransfer averages over those of longer ones."] * is_split


def _text_inputs(text: Mapping[str, Any]) -> list[str]:
    length = f"max_length={text.get('max_tokens')}, " if text.get("max_tokens") else ""
    return [
        *_one_window(text),
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)",
        f'batch = tokenizer(["A text."], truncation=True, {length}return_tensors="pt")',
        'mask = batch["attention_mask"]',
    ]


_WAVE_MASK = [
    "frames = encoder._get_feat_extract_output_lengths(len(samples))",
    "mask = torch.arange(output.last_hidden_state.shape[1])[None] < max(1, frames)",
]


def _longest_s(model: Metadata) -> str:
    """How much audio the snippet's single pass may take; a classifier averages over windows."""
    return f"{model.window_s or 30:g}"


def _wave_inputs(longest_s: str) -> list[str]:
    return [
        "extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)",
        f"# 16 kHz, 16 bit, one channel, up to {longest_s} s",
        'with wave.open("recording.wav") as file:',
        '    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")',
        "samples = samples / np.float32(32768)",
        "step = 8000",
        "while len(samples) > 8 * step:",
        "    step *= 2",
        'values = extractor(samples, sampling_rate=16000, return_tensors="pt").input_values',
        "# Padded with silence as in training.",
        'batch = {"input_values": F.pad(values, (0, -len(samples) % step))}',
    ]


def _head(head: Mapping[str, Any], *, is_ctc: bool) -> list[str]:
    """The arithmetic of `transfer.heads`, from hidden states to logits."""
    layers = head["layers"]
    if layers == "last":
        lines = ["hidden = output.last_hidden_state"]
    elif len(layers) == 1:
        lines = [f"hidden = output.hidden_states[{layers[0]}]"]
    else:
        states = "output.hidden_states"
        if layers != "all":
            states = f"[output.hidden_states[n] for n in {sorted(layers)}]"
        lines = [
            f"states = [F.layer_norm(x, x.shape[-1:]) for x in {states}]",
            'shares = head["mix.weights"].softmax(0)',
            "hidden = sum(x * share for x, share in zip(states, shares))",
        ]
    lines.append("shown = mask[..., None].float()")
    if head["conv_layers"]:
        lines += [
            f"for n in range({head['conv_layers']}):",
            '    weight, bias = head[f"conv.layers.{n}.weight"], head[f"conv.layers.{n}.bias"]',
            "    hidden = (hidden * shown).transpose(1, 2)",
            f"    hidden = F.conv1d(hidden, weight, bias, padding={head['conv_kernel'] // 2})",
            "    hidden = hidden.transpose(1, 2).relu()",
        ]
    if is_ctc:
        return [*lines, 'logits = hidden @ head["output.weight"].T + head["output.bias"]']
    lines += {
        "mean": ["features = (hidden * shown).sum(1) / shown.sum(1)"],
        "max": ["features = hidden.masked_fill(shown == 0, -torch.inf).amax(1)"],
        "first": ["features = hidden[:, 0]"],
        "attention": [
            'scores = hidden @ head["pooling.query.weight"].T + head["pooling.query.bias"]',
            "features = (hidden * scores.masked_fill(shown == 0, -torch.inf).softmax(1)).sum(1)",
        ],
    }[head["pooling"]]
    if head["feature_norm"] == "l2":
        lines.append("features = F.normalize(features, dim=-1)")
    if head["batch_norm"]:
        names = ("running_mean", "running_var", "weight", "bias")
        lines.append(f'norm = [head[f"norm.{{n}}"] for n in {names}]')
        lines.append("features = F.batch_norm(features, *norm)")
    if head["relu"]:
        lines.append("features = features.relu()")
    return [*lines, 'logits = features @ head["output.weight"].T + head["output.bias"]']


def _best_path(symbols: list[str]) -> list[str]:
    return [
        f"symbols = {symbols}",
        "best = torch.unique_consecutive(logits[0][mask[0]].argmax(-1)).tolist()",
        'text = "".join(symbols[n] for n in best if not symbols[n].startswith("<"))',
        'print(" ".join(text.replace("|", " ").split()))',
    ]


def _shares(model: Metadata) -> list[str]:
    scale = f" / {model.temperature!r}" if model.temperature != 1 else ""
    squash = "sigmoid" if model.own.get("is_multi") else "softmax"
    last = "" if squash == "sigmoid" else ", -1"
    return [
        f"labels = {model.labels}",
        f"probabilities = torch.{squash}(logits{scale}{last})",
        "print(dict(zip(labels, probabilities[0].tolist())))",
    ]


# --- exports -------------------------------------------------------------------------------------

_FOLDER = """folder = snapshot_download("{place}", allow_patterns="{kind}/*") + "/{kind}"
"""

_CT2 = """from faster_whisper import WhisperModel
from huggingface_hub import snapshot_download

{folder}model = WhisperModel(folder, compute_type="{precision}")
segments, _ = model.transcribe("recording.wav"{language})
print("".join(segment.text for segment in segments))
"""

_ONNX_TEXT = """import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

{folder}tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation({tokens})
model = onnxruntime.InferenceSession(folder + "/model.onnx")
{note}text = tokenizer.encode("A text.")
given = {{
    "input_ids": text.ids,
    "attention_mask": text.attention_mask,
    "token_type_ids": text.type_ids,
}}
given = {{one.name: np.array([given[one.name]]) for one in model.get_inputs()}}
logits = model.run(None, given)[0][0]
shares = np.exp(logits - logits.max())
labels = {labels}
print(dict(zip(labels, (shares / shares.sum()).tolist())))
"""

_ONNX_WAVES = """import json
import wave

import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download

{folder}model = onnxruntime.InferenceSession(folder + "/model.onnx")
with wave.open("recording.wav") as file:  # 16 kHz, 16 bit, one channel, up to {longest_s} s
    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
samples = samples / np.float32(32768)
with open(folder + "/preprocessor_config.json") as file:
    if json.load(file)["do_normalize"]:
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
with open(folder + "/config.json") as file:
    settings = json.load(file)
frames = len(samples)
for kernel, stride in zip(settings["conv_kernel"], settings["conv_stride"]):
    frames = (frames - kernel) // stride + 1
step = 8000
while len(samples) > 8 * step:
    step *= 2
samples = np.pad(samples, (0, -len(samples) % step))  # with silence, as in training
given = {{"input_values": samples[None], "frames": np.array([max(1, frames)])}}
logits = model.run(None, given)[0][0]
"""

_PATH = """symbols = json.load(open(folder + "/symbols.json"))
best = logits[: max(1, frames)].argmax(-1)
best = best[np.append(True, best[1:] != best[:-1])]
text = "".join(symbols[n] for n in best if not symbols[n].startswith("<"))
print(" ".join(text.replace("|", " ").split()))
"""

_SOUNDS = """shares = {shares}
labels = {labels}
print(dict(zip(labels, shares.tolist())))
"""

_ONNX_WHISPER = """import json
import wave

import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

{folder}with wave.open("recording.wav") as file:  # 16 kHz, 16 bit, one channel, up to 30 s
    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
samples = samples / np.float32(32768)
extractor = WhisperFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
features = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
encoder = onnxruntime.InferenceSession(folder + "/encoder.onnx")
decoder = onnxruntime.InferenceSession(folder + "/decoder.onnx")
hidden = encoder.run(None, {{"input_features": features}})[0]
with open(folder + "/generation_config.json") as file:
    settings = json.load(file)
end = settings["eos_token_id"]
prompt = tokens = {prompt}
while len(tokens) < {longest}:
    logits = decoder.run(None, {{"input_ids": np.array([tokens]), "hidden": hidden}})[0][0, -1]
    logits[settings.get("suppress_tokens") or []] = -np.inf
    logits[settings["no_timestamps_token_id"] :] = -np.inf
    if tokens == prompt:
        first = settings.get("begin_suppress_tokens") or []
        logits[[token for token in first if token != end]] = -np.inf
    token = int(logits.argmax())
    if token == end:
        break
    tokens = [*tokens, token]
text = Tokenizer.from_file(folder + "/tokenizer.json").decode(tokens[len(prompt) :])
print(text)
"""


def ct2_snippet(language: str | None, precision: str) -> str:
    """Python that transcribes with an export for faster-whisper."""
    spoken = "" if language is None else f', language="{language}"'
    folder = _FOLDER.format(place=PLACE, kind="ct2")
    return _CT2.format(folder=folder, language=spoken, precision=precision)


def onnx_snippet(model: Metadata, *, prompt: Sequence[int] = (), longest: int = 0) -> str:
    """Python that runs an export on onnxruntime, without torch; a Whisper's `prompt` are the tokens
    before the text, `longest` how many it takes in all.
    """
    folder = _FOLDER.format(place=PLACE, kind="onnx")
    if model.task == "speech":
        return _ONNX_WHISPER.format(folder=folder, prompt=list(prompt), longest=longest)
    if model.task == "sentiment":
        tokens = (model.text or {}).get("max_tokens", 512)
        note = "".join(f"{line}\n" for line in _one_window(model.text or {}))
        return _ONNX_TEXT.format(folder=folder, tokens=tokens, labels=model.labels, note=note)
    waves = _ONNX_WAVES.format(folder=folder, longest_s=_longest_s(model))
    if model.task == "ctc":
        return waves + _PATH
    shares = "np.exp(logits - logits.max())\nshares /= shares.sum()"
    if model.own.get("is_multi"):
        shares = "1 / (1 + np.exp(-logits))"
    return waves + _SOUNDS.format(shares=shares, labels=model.labels)
