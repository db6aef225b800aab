"""Adapters through peft: LoRA, DoRA and its other methods that sit inside layers."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmtransfer.errors import UserError
from mmtransfer.hub.loading import check_finite
from mmtransfer.hub.pickled import safe_weights

# Methods that add tokens instead of layers, or that need calls of their own between steps.
_UNFIT = {"ADALORA", "PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"}
_UNFIT |= {"ADAPTION_PROMPT", "XLORA", "CPT", "TRAINABLE_TOKENS"}

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError)


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
    from safetensors import safe_open

    try:
        with safe_weights(folder, "adapter") as safe, safe_open(safe / _FILES[1], "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be loaded as an adapter ({reason}).") from None


def check_settings(path: Path) -> None:
    """Make sure that peft runs no code for an adapter's settings.

    Raises:
        ValueError: a module that it would import.
    """
    if json.loads(path.read_text(encoding="utf-8")).get("megatron_config"):
        raise ValueError("megatron_config: expected null")


def load_merged(model: Any, folder: Path, *, prefix: str = "") -> Any:
    """A model with the adapter of a folder merged into it; `prefix` as for `save_adapter`.

    Raises:
        UserError: a folder without a usable adapter, or with a part of one.
    """
    from peft import PeftModel

    try:
        with tempfile.TemporaryDirectory() as plain, warnings.catch_warnings():
            # peft fills them at random and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            check_settings(folder / f"{prefix}{_FILES[0]}")
            if prefix:
                for name in _FILES:
                    shutil.copyfile(folder / f"{prefix}{name}", Path(plain, name))
            with safe_weights(Path(plain) if prefix else folder, "adapter") as safe:
                merged = PeftModel.from_pretrained(
                    model, str(safe), use_safetensors=True, trust_remote_code=False
                ).merge_and_unload()
    except (*_FAILURES, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be loaded as an adapter ({reason}).") from None
    check_finite(merged, folder)
    return merged
