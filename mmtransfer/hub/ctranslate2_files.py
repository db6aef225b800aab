"""CTranslate2's model files of a Whisper, read and written without torch.

The layout maps onto the names of Hugging Face one to one; only the attention projections are fused
(q, k, v in one matrix for self-attention, k and v in one for cross-attention), and the key
projection of Whisper has no bias.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmtransfer.errors import UserError

_VERSION = 6
_NAME, _REVISION = "WhisperSpec", 3
_TYPES = ("float32", "int8", "int16", "int32", "float16")
_PROJECTION, _EMBEDDINGS = "decoder/projection/weight", "decoder/embeddings/weight"  # one matrix
_FLAGS = ("decoder/alibi_use_positive_positions", "decoder/scale_alibi")  # older files lack them
_MODULE = "base_model.model."  # before the names of modules in peft's files


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


def read_variables(paths: list[Path]) -> dict[str, np.ndarray]:
    """Variables of a model file (binary version 6) in parts, by name.

    Layout: version, model name, revision, count, then for each variable its name, rank, shape,
    type and bytes; then aliases of variables that share storage.
    """
    file = _JoinedFiles(paths)
    version = file.unpack("I")
    if version != _VERSION:
        raise UserError(f"{paths[0]}: CTranslate2 binary version {version}, expected {_VERSION}.")
    file.string()
    file.unpack("I")
    variables = {}
    for _ in range(file.unpack("I")):
        name = file.string()
        shape = [file.unpack("I") for _ in range(file.unpack("B"))]
        dtype = np.dtype(_TYPES[file.unpack("B")])
        variables[name] = np.frombuffer(file.read(file.unpack("I")), dtype).reshape(shape)
    for _ in range(file.unpack("I")):
        alias = file.string()
        variables[alias] = variables[file.string()]
    return variables


def write_variables(path: Path, variables: Mapping[str, np.ndarray], precision: str) -> None:
    """Write a model file with its weights in int8 (a scale for each row), float16 or float32, as
    CTranslate2's own converter does.
    """
    kept = {name: value for name, value in variables.items() if name != _PROJECTION}
    stored = {name: np.array(0, np.int8) for name in _FLAGS}
    for name, value in kept.items():
        if not value.ndim:
            stored[name] = value
        elif precision == "int8" and name.endswith("/weight"):
            stored[name], stored[f"{name}_scale"] = _quantized(value)
        else:
            stored[name] = value.astype("float16" if precision == "float16" else "float32")
    with path.open("wb") as file:

        def string(text: str) -> None:
            file.write(struct.pack("<H", len(text) + 1) + text.encode() + b"\0")

        file.write(struct.pack("<I", _VERSION))
        string(_NAME)
        file.write(struct.pack("<II", _REVISION, len(stored)))
        for name, value in sorted(stored.items()):
            string(name)
            file.write(struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape))
            file.write(struct.pack("<BI", _TYPES.index(value.dtype.name), value.nbytes))
            file.write(value.tobytes())
        file.write(struct.pack("<I", 1))
        string(_PROJECTION)
        string(_EMBEDDINGS)


def _quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = weight.astype(np.float32).reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1)
    largest[largest == 0] = 127.0
    scale = np.float32(127) / np.maximum(largest, np.float32(127) / np.finfo(np.float32).max)
    return np.rint(rows * scale[:, None]).astype(np.int8).reshape(weight.shape), scale


def hugging_face_names(variables: Mapping[str, np.ndarray]) -> dict[str, tuple[str, slice]]:
    """Where each weight of `WhisperForConditionalGeneration` lies: a variable and rows of it.

    Raises:
        UserError: a key projection with a bias.
    """
    places: dict[str, tuple[str, slice]] = {}

    def linear(source: str, target: str) -> None:
        split(source, target, [""])

    def norm(source: str, target: str) -> None:
        places[f"{target}.weight"] = f"{source}/gamma", slice(None)
        places[f"{target}.bias"] = f"{source}/beta", slice(None)

    def split(source: str, target: str, projections: list[str]) -> None:
        weight, bias = f"{source}/weight", f"{source}/bias"
        size = len(variables[weight]) // len(projections)
        for number, projection in enumerate(projections):
            rows = slice(number * size, (number + 1) * size)
            places[f"{target}{projection}.weight"] = weight, rows
            if projection != ".k_proj":
                places[f"{target}{projection}.bias"] = bias, rows
            elif variables[bias][rows].any():
                raise UserError(f"{source}: expected a zero key bias; this is not a Whisper file.")

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    for stack in ("encoder", "decoder"):
        target = f"model.{stack}"
        positions = f"{stack}/position_encodings/encodings"
        places[f"{target}.embed_positions.weight"] = positions, slice(None)
        norm(f"{stack}/layer_norm", f"{target}.layer_norm")
        layer = 0
        while f"{stack}/layer_{layer}/ffn/linear_0/weight" in variables:
            source, prefix = f"{stack}/layer_{layer}", f"{target}.layers.{layer}"
            attention, own = f"{source}/self_attention", f"{prefix}.self_attn"
            norm(f"{attention}/layer_norm", f"{own}_layer_norm")
            split(f"{attention}/linear_0", own, [".q_proj", ".k_proj", ".v_proj"])
            linear(f"{attention}/linear_1", f"{own}.out_proj")
            if stack == "decoder":
                attention, cross = f"{source}/attention", f"{prefix}.encoder_attn"
                norm(f"{attention}/layer_norm", f"{cross}_layer_norm")
                split(f"{attention}/linear_0", cross, [".q_proj"])
                split(f"{attention}/linear_1", cross, [".k_proj", ".v_proj"])
                linear(f"{attention}/linear_2", f"{cross}.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{prefix}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{prefix}.fc1")
            linear(f"{source}/ffn/linear_1", f"{prefix}.fc2")
            layer += 1
    places["model.decoder.embed_tokens.weight"] = _EMBEDDINGS, slice(None)
    return places


def hugging_face_weights(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under the names of Hugging Face, fp32."""
    places = hugging_face_names(variables)
    return {name: variables[of][rows].astype(np.float32) for name, (of, rows) in places.items()}


def merged(
    variables: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scaling: float
) -> dict[str, np.ndarray]:
    """The variables in fp32 with a LoRA adapter, as peft keeps it, in them (Hu et al. 2021)."""
    places = hugging_face_names(variables)
    made = {k: v.astype(np.float32) if v.ndim else v for k, v in variables.items()}
    ending = ".lora_A.weight"
    for module in (name.removesuffix(ending) for name in adapter if name.endswith(ending)):
        down, up = (
            adapter[f"{module}.lora_{part}.weight"].astype(np.float32) for part in ("A", "B")
        )
        change = np.zeros((len(up), down.shape[1]), np.float32)
        for rank in range(len(down)):  # in the order in which torch adds, to the last bit
            change += np.outer(up[:, rank], down[rank])
        name, rows = places[f"{module.removeprefix(_MODULE)}.weight"]
        made[name][rows] += change * np.float32(scaling)
    return made
