"""A speech recogniser becomes a site's own, then transcribes its monitoring video.

    python tasks/video_monitoring.py                      # the example site, about four minutes
    python tasks/video_monitoring.py --config my.yaml --video camera.mp4

Loads the source model, transfers it end to end, shows what was gained on the target and lost on
the source domain, and transcribes the video.
"""

import argparse
import logging
import sys
from pathlib import Path

import mmtransfer

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Transfer, evaluate, monitor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "video_monitoring" / "example_site.yaml")
    )
    parser.add_argument("--video", default=str(ROOT / "examples" / "site" / "monitor.mp4"))
    parser.add_argument("--run-dir", help="where the adapted model goes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    overrides = {"run_dir": arguments.run_dir} if arguments.run_dir else {}
    config = mmtransfer.load_config(arguments.config, overrides)
    run_dir = Path(config.run_dir)
    if not (run_dir / "report.json").exists():
        report = mmtransfer.train(config, resume=True)  # continues where it was interrupted
        for name, scores in {"target": report["target"], **report["source_domain"]}.items():
            before, after = scores["before"], scores["after"]
            print(f"{name:10} WER {before['wer']:.3f} -> {after['wer']:.3f}")
        if report["forgetting"]["over"]:
            print(f"forgotten too much: {report['forgetting']['remedy']}")

    print(f"\n{arguments.video}:")
    for piece in mmtransfer.monitor(config.run_dir, arguments.video):
        print(f"[{piece.start:6.1f} s → {piece.end:6.1f} s] {piece.text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except mmtransfer.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
