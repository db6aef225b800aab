"""A pretrained language model classifies news by sentiment.

    python tasks/news_sentiment.py --data news.csv
    python tasks/news_sentiment.py --data zh.csv --config my.yaml --text "股价大跌"

Loads the source model, transfers it in stages (the head on the frozen backbone, then everything),
shows how well it does on held-out texts, and classifies the texts given. The data has the columns
text,label and optionally target (who or what the sentiment is about) and group (article, author).
"""

import argparse
import logging
import sys
from pathlib import Path

import mmtransfer
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.text.classifier import load_text_model

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Transfer, evaluate, predict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "news_sentiment" / "combined.yaml")
    )
    parser.add_argument("--data", required=True, help="CSV, JSONL or Parquet file, or Hub dataset")
    parser.add_argument("--text", nargs="*", default=[], help="texts to classify afterwards")
    parser.add_argument("--target", help="what these texts are about")
    parser.add_argument("--run-dir", help="where the adapted model goes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    overrides = {"data": {"train": arguments.data}}
    if arguments.run_dir:
        overrides["run_dir"] = arguments.run_dir
    config = mmtransfer.load_config(arguments.config, overrides)
    if config.task != "sentiment":
        raise mmtransfer.UserError(
            f"{arguments.config}: expected task: sentiment, found {config.task}. Choose a "
            "configuration of configs/news_sentiment."
        )
    run_dir = Path(config.run_dir)
    if not (run_dir / "report.json").exists():
        report = mmtransfer.train(config, resume=True)  # continues where it was interrupted
        after = report["target"]["after"]
        print(f"macro-F1 {after['macro_f1']:.3f}  [{after['ci_low']:.3f}, {after['ci_high']:.3f}]")
        print(f"accuracy {after['accuracy']:.3f}, calibration error {after['ece']:.3f}")

    model = load_text_model(resolve(config.run_dir))
    targets = [arguments.target] * len(arguments.text)
    for text, found in zip(arguments.text, model.predict(arguments.text, targets), strict=True):
        shares = ", ".join(f"{name} {p:.2f}" for name, p in found.probabilities.items())
        print(f"{found.label}  ({shares})  {text}")


if __name__ == "__main__":
    try:
        main()
    except mmtransfer.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
