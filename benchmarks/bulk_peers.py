"""What one would write oneself to transcribe recordings on Ray: two recipes with Ray Data.

    python benchmarks/bulk_peers.py RECIPE MODEL FOLDER OUTPUT WORKERS

Run by `bulk.py --peer-python`. `pipeline`: windows of 30 s, the pipeline of transformers on eight
of them at a time. `faster-whisper`: recordings as a whole, its batched pipeline with its voice
activity filter. Each worker has one thread.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW_S, BATCH, RATE = 30, 8, 16_000


class Pipeline:
    """Windows as they come, with the pipeline of transformers."""

    def __init__(self, model: str):
        import torch
        from transformers import pipeline

        torch.set_num_threads(1)
        self._run = pipeline("automatic-speech-recognition", model, trust_remote_code=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The texts of windows."""
        audio = [{"raw": window, "sampling_rate": RATE} for window in batch.pop("audio")]
        found = self._run(audio, batch_size=len(audio))
        return {**batch, "text": [one["text"] for one in found]}


class FasterWhisper:
    """Recordings as a whole, with faster-whisper."""

    def __init__(self, model: str):
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        whisper = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=1)
        self._run = BatchedInferencePipeline(model=whisper)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The texts of recordings."""
        texts = []
        for path in batch["file"]:
            found, _ = self._run.transcribe(
                path, batch_size=BATCH, vad_filter=True, language="en", beam_size=5
            )
            texts.append(" ".join(segment.text for segment in found))
        return {**batch, "text": texts}


def windows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A recording in windows."""
    import av
    import numpy as np

    with av.open(row["file"]) as media:
        resampler = av.AudioResampler("flt", "mono", RATE)
        frames = [f for frame in media.decode(audio=0) for f in resampler.resample(frame)]
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    for at in range(0, len(samples), WINDOW_S * RATE):
        yield {"file": row["file"], "start": at / RATE, "audio": samples[at : at + WINDOW_S * RATE]}


def main() -> None:
    """Transcribe a folder into Parquet, and print the text of all recordings in order."""
    import ray

    recipe, model, folder, output, workers = sys.argv[1:]
    # As many again for the tasks that decode, which would wait for the workers to end.
    ray.init(num_cpus=2 * int(workers), include_dashboard=False, log_to_driver=False)
    paths = sorted(str(path) for path in Path(folder).iterdir())
    rows: Any = ray.data.from_items([{"file": path, "start": 0.0} for path in paths])
    rows = rows.repartition(len(paths))
    kind: type[Any] = FasterWhisper
    if recipe == "pipeline":
        rows, kind = rows.flat_map(windows), Pipeline
    done = rows.map_batches(
        kind,
        fn_constructor_args=[model],
        batch_size=BATCH if recipe == "pipeline" else 1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=int(workers)),
    )
    done.write_parquet(output)
    found = ray.data.read_parquet(output).take_all()
    found.sort(key=lambda row: (row["file"], row["start"]))
    print(json.dumps([row["text"] for row in found]))


if __name__ == "__main__":
    main()
