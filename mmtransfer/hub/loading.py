"""Weights from a folder: by the library's code alone, as safetensors, whole and finite."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtransfer.errors import UserError
from mmtransfer.hub.files import load_errors
from mmtransfer.hub.pickled import safe_weights
from mmtransfer.hub.settings import check_settings, read_settings
from mmtransfer.progress import no_library_bars

_ATTENTION = ("eager", "sdpa")  # any other name is a package, or a repository whose code is run
_ONE_AT_A_TIME = threading.RLock()  # what is set meanwhile is the whole process's


@contextmanager
def loading(source: str, what: str, folder: Path) -> Iterator[None]:
    """Around whatever transformers loads from a folder: no code is run, nobody is asked, no bar is
    drawn, and a failure is one line.

    Not every part of the library hands on `trust_remote_code=False` to what it loads in turn; there
    it would ask on standard input, which is data.

    Raises:
        UserError: the folder cannot be loaded as `what`, or asks for code.
    """
    from transformers import dynamic_module_utils as library

    check_settings(folder)
    with _ONE_AT_A_TIME, load_errors(source, what), no_library_bars():
        seconds = library.TIME_OUT_REMOTE_CODE
        library.TIME_OUT_REMOTE_CODE = 0  # how long it waits for an answer; 0: it does not ask
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{folder}: it asks for code of its own (auto_map), which is never run. Expected "
                "an architecture of transformers; save the model as one, or choose another."
            ) from None
        finally:
            library.TIME_OUT_REMOTE_CODE = seconds


def load_weights(
    factory: Any, folder: Path, *, head_seed: int | None = None, **options: Any
) -> Any:
    """A transformers model in float32 with the weights of a checkpoint folder.

    `factory` is one of the library's classes, `options` what its `from_pretrained` takes. With
    `head_seed` a head that the checkpoint lacks, or has in another shape, is a new one.

    Raises:
        UserError: weights that are missing, left over or not finite, or a configuration that asks
            for code from elsewhere.
    """
    # A folder without it would be taken for an adapter, and a model loaded that the adapter names.
    path = folder / "config.json"
    config = read_settings(path)
    for key in ("attn_implementation", "_attn_implementation"):
        if config.get(key) not in (None, *_ATTENTION):
            raise UserError(
                f"{path}: {key}: expected {' or '.join(_ATTENTION)}, found {config[key]!r:.60}. "
                "Remove the key."
            )
    with torch.random.fork_rng(devices=[]), safe_weights(folder) as safe:
        # Also for what nothing reads (`_may_lack`): it is part of a base's identity.
        torch.manual_seed(head_seed or 0)
        model, found = factory.from_pretrained(
            safe,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    lacking = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    lacking = {name for name in lacking if not _may_lack(model, name, head_seed is not None)}
    if lacking:
        raise UserError(
            f"{folder}: {len(lacking)} of the weights that its config.json asks for are missing "
            f"({min(lacking)}). Expected a whole checkpoint; save or download it again."
        )
    surplus = [name for name in found["unexpected_keys"] if _is_of_a_layer_too_many(model, name)]
    if surplus:
        raise UserError(
            f"{folder}: it has more layers of weights than its config.json says ({min(surplus)}). "
            "Expected a checkpoint with its own config.json; save or download it again."
        )
    check_finite(model, folder)
    return model


def check_finite(module: nn.Module, path: Path) -> None:
    """Make sure that the weights loaded from a path are numbers.

    Raises:
        UserError: NaN or infinity among them.
    """
    for name, value in module.state_dict().items():
        # A sum is twenty times as fast, and finite only if all are; large values may overflow it.
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: {name} holds values that are not finite (NaN or infinity). Expected "
                "finite weights; save or download the model again."
            )


def _may_lack(model: Any, name: str, new_head: bool) -> bool:
    """Whether a checkpoint is whole without that weight."""
    if name.endswith("masked_spec_embed"):  # for augmentation inside the model, which is not used
        return True
    beneath = "" if model.base_model is model else f"{model.base_model_prefix}."
    if name.startswith(f"{beneath}pooler."):  # part of the head, where there is one
        return new_head or not beneath
    return new_head and not name.startswith(beneath)


def _is_of_a_layer_too_many(model: Any, name: str) -> bool:
    found = re.match(r"(.+?)\.(\d+)\.", name)
    if found is None:
        return False
    prefix = f"{model.base_model_prefix}."
    for stack, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            same = stack.removeprefix(prefix) == found[1].removeprefix(prefix)
            if same and int(found[2]) >= len(module):
                return True
    return False
