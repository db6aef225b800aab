"""Model cards: their metadata as the Hub takes it, checked without asking it.

The rules are those of https://huggingface.co/docs/hub/model-cards and of the Hub's own check
(`/api/validate-yaml`), which comes on top when a model is sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmtransfer.errors import UserError

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
"""Identifiers of licences on the Hub."""
RELATIONS = ("adapter", "finetune", "merge", "quantized")
"""What a model can be to its base."""
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_WORDS = ("code", "multilingual")
_MODEL = re.compile(r"(?![.-])(?!.*(?:--|\.\.))[\w.-]+(/[\w.-]+)?")
_MOST_CHARACTERS = 100_000
_RESULT = ("task.type", "dataset.type", "dataset.name")


def card_errors(content: str) -> list[str]:
    """What the Hub would not accept of a card's metadata; a line each."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if match is None:
        return ["expected metadata between two lines of --- at the beginning"]
    try:
        values = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"metadata is no YAML ({' '.join(str(error).split())[:200]})"]
    if not isinstance(values, dict):
        return ["expected metadata as fields with values"]
    return [*_field_errors(values), *_result_errors(values.get("model-index"))]


def _field_errors(values: Mapping[str, Any]) -> list[str]:
    errors = []
    named = [name for name in _listed(values.get("license")) if name not in LICENSES]
    errors += [f'"license" must be one of the Hub\'s identifiers, found {n!r:.60}' for n in named]
    if values.get("license") == "other" and "license_name" not in values:
        errors.append('"license_name" is required where "license" is other')
    for code in _listed(values.get("language")):
        if not isinstance(code, str) or not (_LANGUAGE.fullmatch(code) or code in _WORDS):
            errors.append(f'"language" must hold ISO 639 codes, found {code!r:.60}')
    for key in ("base_model", "datasets"):
        for name in _listed(values.get(key)):
            if not isinstance(name, str) or not _MODEL.fullmatch(name):
                errors.append(f'"{key}" must hold ids on the Hub, found {name!r:.60}')
    relation = values.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(values.get(key), str | None):
            errors.append(f'"{key}" must be a text')
    for key in ("tags", "metrics"):
        found = values.get(key)
        if found is not None and not all(isinstance(x, str) for x in _listed(found)):
            errors.append(f'"{key}" must be a list of texts')
    return errors


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _result_errors(models: Any) -> list[str]:
    """Errors of `model-index`: models with a name, results with a task, a data set, metrics."""
    errors = []
    for index, model in enumerate(_listed(models)):
        where = f"model-index[{index}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        for number, result in enumerate(_listed(model.get("results")) or [{}]):
            errors += _one_result(f"{where}.results[{number}]", result)
    return errors


def _one_result(where: str, result: Any) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{where}" must be an object']
    errors = []
    for path in _RESULT:
        section, key = path.split(".")
        part = result.get(section)
        if not isinstance(part, dict) or not isinstance(part.get(key), str):
            errors.append(f'"{where}.{path}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'"{where}.metrics" is required']
    for metric in metrics:
        known = isinstance(metric, dict) and isinstance(metric.get("type"), str)
        if not known or metric.get("value") is None:
            errors.append(f'"{where}.metrics" need a type and a value')
    return errors


def read_card(path: Path) -> str:
    """A model card that the Hub would take.

    Raises:
        UserError: none, or metadata that is wrong.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model card ({' '.join(str(error).split())}).") from None
    errors = card_errors(content)
    if errors:
        raise UserError(
            f"{path}: not a model card that the Hub takes ({'; '.join(errors)[:400]}). Correct it."
        )
    return content


def card_license(folder: Path) -> str | None:
    """The licence that a model's own card names, as the Hub calls it; None where it names none."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            content = file.read(_MOST_CHARACTERS)
    except OSError:
        return None
    # One line of it, found without its YAML, which may be anything.
    head = content.split("\n---", 1)[0] if content.startswith("---") else ""
    found = re.search(r"""^license: *["']?([\w.+-]+)["']? *\r?$""", head, re.MULTILINE)
    return found[1] if found is not None and found[1] in LICENSES else None
