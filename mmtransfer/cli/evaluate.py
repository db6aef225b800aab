"""`mmtransfer evaluate`: scores of a model with their intervals."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mmtransfer.cli.common import (
    BEAM_HELP,
    add_model,
    at_revision,
    count,
    data_config,
    quiet_libraries,
)
from mmtransfer.data.printing import printable, whole_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the data, and what its columns are called."""
    parser.description = "Score a model with a 95 %% bootstrap interval."
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="speech: folder with metadata.csv, manifest, subtitled recordings, or one recording "
        "with --reference; text: CSV, TSV, JSONL or Parquet file, or Hub dataset; "
        "sounds: folder or manifest",
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="reference transcript of one recording, which is transcribed as monitor does: .srt, "
        ".vtt, .ass, .txt, or .json with text, start and end",
    )
    parser.add_argument("--language", help="ISO code, for multilingual models")
    parser.add_argument("--text-column", help="column with the text or transcript")
    parser.add_argument("--label-column", help="column with the class (default label)")
    parser.add_argument(
        "--target-column",
        help="column with the entity or aspect of the "
        "sentiment (default target); none: classify the whole text",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "ctranslate2", "transformers"),
        default="auto",
        help="engine that decodes speech; auto: ctranslate2 for Whisper on CPU, else transformers",
    )
    parser.add_argument(
        "--compute",
        choices=("int8", "float16", "float32"),
        help="precision of ctranslate2 (default: int8 on CPU, float16 on GPU)",
    )
    parser.add_argument(
        "--beam",
        type=count,
        metavar="N",
        help=BEAM_HELP,
    )
    parser.add_argument(
        "--prompt",
        type=whole_text,
        default="",
        metavar="TEXT",
        help="names and words to expect, as prompt of the decoder",
    )
    parser.add_argument(
        "--guards",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode segments flagged as no-speech, low-confidence, repetitive or too fast again, "
        "and reject them if they stay flagged (default)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where the model computes; auto takes a GPU if there is one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Score a model and print what came out; returns the exit code."""
    quiet_libraries()
    model = at_revision(arguments.model, arguments.revision)
    if arguments.reference:
        from mmtransfer.monitoring import score

        found = score.evaluate_recording(
            model,
            arguments.data,
            arguments.reference,
            language=arguments.language,
            engine=arguments.engine,
            compute_type=arguments.compute,
            beam_size=arguments.beam,
            prompt=arguments.prompt,
            device=arguments.device,
        )
        print(json.dumps(score.as_dict(found)) if arguments.json else score.table(found))
        return 0
    from mmtransfer import runs
    from mmtransfer.runs.report import decoding_note, shown, silence_note

    config = data_config(
        arguments,
        "language",
        "text_column",
        "label_column",
        "target_column",
        evaluation={
            "engine": arguments.engine,
            "compute_type": arguments.compute,
            "beam_size": arguments.beam,
            "guards": arguments.guards,
            "prompt": arguments.prompt,
        },
        runtime={"device": arguments.device},
    )
    result = runs.evaluate(model, arguments.data, config=config)
    if arguments.json:
        print(json.dumps(result))
        return 0
    metric = result["metric"]
    if "per_class" in result:
        _print_classes(result)
        return 0
    if result[metric] is None:
        print(f"{metric.upper()} undefined (no reference words), {silence_note(result)}")
    else:
        print(
            f"{metric.upper()} {result[metric]:.4f}  [{result['ci_low']:.4f}, "
            f"{result['ci_high']:.4f}]  (WER {shown(result['wer'])}, CER {shown(result['cer'])}, "
            f"normaliser {result['normalizer']})"
        )
    for language, found in result["languages"].items():
        rate = found[found["metric"]]
        print(f"{language}: {found['metric'].upper()} {shown(rate)}, {found['clips']} clips")
    print(
        f"{result['clips']} clips, {result['seconds_audio']:.1f} s of audio recognised in "
        f"{result['seconds_wall']:.1f} s"
    )
    if result["silence_clips"] and result[metric] is not None:
        print(silence_note(result))
    print(f"decoded by {decoding_note(result['decoding'])}")
    return 0


def _print_classes(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mmtransfer.runs.report import metric_name

    metric, is_sound = result["metric"], "seconds_audio" in result
    main = f"{metric_name(metric)} {result[metric]:.4f}"
    main += f"  [{result['ci_low']:.4f}, {result['ci_high']:.4f}]  "
    if "accuracy" in result:
        main += f"accuracy {result['accuracy']:.4f}  [{result['accuracy_ci_low']:.4f}, "
        main += f"{result['accuracy_ci_high']:.4f}]"
    else:
        main += f"macro-F1 {result['macro_f1']:.4f} at a threshold of 0.5"
    print(main)
    counted = f"{result['examples']} {'clips' if is_sound else 'texts'} in "
    counted += f"{result['seconds_wall']:.1f} s"
    if "ece" in result:
        print(
            f"calibration error {result['ece']:.4f} ({result['ece_uncalibrated']:.4f} before "
            f"temperature scaling); {counted}"
        )
    else:
        print(counted)
    names = ["precision", "recall", "f1"]
    names += [] if "confusion" in result else ["average_precision"]
    titles = ["F1" if name == "f1" else name.replace("_", " ") for name in names]
    table = Table("class", *titles, "clips" if is_sound else "texts")
    if "confusion" in result:
        table.title = "rows: true class"
        for label in result["labels"]:
            table.add_column(Text(f"→ {printable(label)}"), justify="right")
    confusion = result.get("confusion") or [[]] * len(result["labels"])
    for label, row in zip(result["labels"], confusion, strict=True):
        scores = result["per_class"][label]
        shares = [f"{scores[name]:.3f}" for name in names]
        table.add_row(Text(printable(label)), *shares, f"{scores['support']:.0f}", *map(str, row))
    Console().print(table)
