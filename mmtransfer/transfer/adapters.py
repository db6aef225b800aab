"""Adapters through peft: LoRA, DoRA and its other methods that sit inside layers."""

from __future__ import annotations

import json
import re
import reprlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmtransfer.data.files import read_object
from mmtransfer.errors import UserError
from mmtransfer.hub.loading import check_finite
from mmtransfer.hub.pickled import safe_weights

# Methods that add tokens instead of layers, or that need calls of their own between steps.
_UNFIT = {"ADALORA", "PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"}
_UNFIT |= {"ADAPTION_PROMPT", "XLORA", "CPT", "TRAINABLE_TOKENS"}

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_INSIDE = "base_model.model."  # before the names of modules
_BESIDE = ("weight", "bias")  # a module's own, where an adapter's file has the whole module
# Keys of these become regular expressions; such as `layers.0.k_proj` or `.*decoder.*q_proj`.
_PATTERNS = ("rank_pattern", "alpha_pattern")
_PLAIN_PATTERN = re.compile(r"\^?(?:[\w.|()\\]|\.\*){1,200}\$?")
_MOST_WILD = 3
_MOST_LAYERS = 1000
_MOST_ROUNDS = 64  # of an initialisation


def add_adapter(model: Any, settings: dict[str, Any], *, model_id: str | None = None) -> Any:
    """Put an adapter into a model's layers, in place; returns the peft model around it.

    `settings` holds `type` (lora, dora, ia3, loha, lokr, oft, ...) and the arguments of that
    method. Without `target_modules` peft's choice for the architecture is used, or every linear
    layer where it has none.

    Raises:
        UserError: an unknown type or argument, or layers the model does not have.
    """
    from peft import PeftType, get_peft_config, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    arguments = dict(settings)
    kind = str(arguments.pop("type")).upper()
    if kind == "DORA":
        kind, arguments = "LORA", {**arguments, "use_dora": True}
    known = sorted({name.upper() for name in PeftType.__members__} - _UNFIT)
    if kind not in known:
        raise UserError(
            f"adapter type '{settings['type']}': expected one of dora, "
            f"{', '.join(name.lower() for name in known)}."
        )
    named = {"target_modules", "feedforward_modules"} & set(arguments)
    if not named and kind != "IA3" and model.config.model_type not in TARGETS:
        arguments["target_modules"] = "all-linear"
    try:
        config = get_peft_config({"peft_type": kind, "task_type": None, **arguments})
        # The base's public name, not the folder of this machine that it was loaded from.
        config.base_model_name_or_path = model_id
        with warnings.catch_warnings():
            # It names the folder of this machine that the base lies in.
            warnings.filterwarnings("ignore", message=".*was renamed from.*")
            adapted = get_peft_model(model, config)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {settings}: {reason}") from None
    adapted.peft_config["default"].base_model_name_or_path = model_id
    return adapted


def save_adapter(adapted: Any, folder: Path, *, prefix: str = "") -> None:
    """Write the adapter as peft writes it, its files' names with a prefix."""
    # Without the embeddings, about which it would otherwise ask the Hub.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # the run has a model card of its own
    if prefix:
        for name in _FILES:
            (folder / name).rename(folder / f"{prefix}{name}")


def merge_adapter(adapted: Any) -> Any:
    """Fold the adapter into the weights it sits on; returns the plain model."""
    return adapted.merge_and_unload()


def adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """The tensors of a folder's adapter, by name, with their shapes.

    Raises:
        UserError: a folder without a usable adapter.
    """
    try:
        with _weights(folder, "") as path:
            return _shapes(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be loaded as an adapter ({reason}).") from None


@contextmanager
def _weights(folder: Path, prefix: str) -> Iterator[Path]:
    """The file with an adapter's tensors."""
    if prefix:
        yield folder / f"{prefix}{_FILES[1]}"
        return
    with safe_weights(folder, "adapter") as safe:
        yield safe / _FILES[1]


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _safe_settings(path: Path, shapes: dict[str, list[int]], model: Any) -> dict[str, Any]:
    """An adapter's settings as peft may have them: no module that it would import, no regular
    expression that may not end, no size or count that its tensors do not have.

    Raises:
        UserError: the first that is not so.
    """
    settings = read_object(path)

    def wrong(key: str, expected: str) -> UserError:
        found = reprlib.repr(settings[key])
        return UserError(f"{path}: {key}: expected {expected}, found {found}.")

    if settings.get("megatron_config"):  # with it, peft imports a module that it names
        raise wrong("megatron_config", "null")
    # Regular expressions say which modules are adapted; so do the names of the tensors.
    patterns = [settings.get(key) for key in ("target_modules", "exclude_modules")]
    if any(isinstance(value, str) and value != "all-linear" for value in patterns):
        settings["target_modules"] = _adapted_modules(shapes, model)
        settings["exclude_modules"] = None
    for key in _PATTERNS:
        found = settings.get(key) or {}
        if not isinstance(found, dict) or not all(map(_is_plain_pattern, found)):
            raise wrong(key, "names of modules with numbers")
    for key in ("layers_pattern", "layers_to_transform", "modules_to_save"):
        found = settings.get(key)
        for part in found if isinstance(found, list) else [found]:
            if part is not None and not re.fullmatch(r"[\w.]{1,200}", str(part)):
                raise wrong(key, "names or numbers of modules")
    largest = max((size for shape in shapes.values() for size in shape), default=_MOST_LAYERS)
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    if not all(rank is None or (type(rank) is int and 0 <= rank <= largest) for rank in ranks):
        key = "rank_pattern" if settings.get("rank_pattern") else "r"
        raise wrong(key, f"a rank from 1 to {largest}, the largest size of its tensors")
    copied = settings.get("layer_replication")
    if copied:
        ends = [pair for pair in copied if isinstance(pair, list) and len(pair) == 2]
        numbers = [number for pair in ends for number in pair]
        is_whole = len(ends) == len(copied) and all(type(number) is int for number in numbers)
        if not is_whole or sum(abs(b - a) for a, b in ends) > _MOST_LAYERS:
            raise wrong("layer_replication", f"pairs of layers, up to {_MOST_LAYERS} in all")
    rounds = re.fullmatch(r".*_niter_(\d+)", str(settings.get("init_lora_weights")))
    if rounds and (len(rounds[1]) > 3 or int(rounds[1]) > _MOST_ROUNDS):
        raise wrong("init_lora_weights", f"up to {_MOST_ROUNDS} rounds")
    return settings


def _adapted_modules(shapes: dict[str, list[int]], model: Any) -> list[str]:
    """Names of the modules that an adapter's tensors belong to."""
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    found = set()
    for tensor in shapes:
        parts = tensor.removeprefix(_INSIDE).split(".")
        for size in range(1, len(parts)):
            name = ".".join(parts[:size])
            if name in leaves and parts[size] not in _BESIDE:
                found.add(name)
    return sorted(found)


def _is_plain_pattern(pattern: Any) -> bool:
    return (
        isinstance(pattern, str)
        and _PLAIN_PATTERN.fullmatch(pattern) is not None
        and pattern.count("*") <= _MOST_WILD
    )


@contextmanager
def safe_adapter(model: Any, folder: Path, *, prefix: str = "") -> Iterator[Path]:
    """A temporary folder with a folder's adapter as peft may load it onto the model; `prefix` as
    for `save_adapter`.

    Raises:
        UserError: settings that would run code, or take time or memory without bound.
    """
    with tempfile.TemporaryDirectory() as plain, _weights(folder, prefix) as weights:
        settings = _safe_settings(folder / f"{prefix}{_FILES[0]}", _shapes(weights), model)
        Path(plain, _FILES[0]).write_text(json.dumps(settings), encoding="utf-8")
        Path(plain, _FILES[1]).symlink_to(weights.resolve())
        yield Path(plain)


def load_merged(model: Any, folder: Path, *, prefix: str = "") -> Any:
    """A model with the adapter of a folder merged into it; `prefix` as for `save_adapter`.

    Raises:
        UserError: a folder without a usable adapter, or with a part of one.
    """
    from peft import PeftModel

    try:
        with safe_adapter(model, folder, prefix=prefix) as plain, warnings.catch_warnings():
            # peft fills them at random and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            safe = {"use_safetensors": True}
            adapted = PeftModel.from_pretrained(model, plain, trust_remote_code=False, **safe)
            merged = adapted.merge_and_unload()
    except Exception as error:  # peft raises whatever a wrong value brings about
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: cannot be loaded as an adapter ({reason}).") from None
    check_finite(merged, folder)
    return merged
