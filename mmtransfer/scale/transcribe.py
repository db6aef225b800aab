"""Finished recordings in bulk: planned once, transcribed here or on Ray, each row written once.

A killed run goes on by the files of its output alone. Groups of files (`sources`) are the unit that
is finished or not, and one file of rows; pieces of speech (`pieces`) are what is transcribed at a
time, and what a kill can cost. What is in either depends on the files alone, so that the rows are
the same to the last bit whoever makes them, and in whatever order.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, asdict, dataclass, field, replace

from mmtransfer.errors import UserError
from mmtransfer.monitoring.loading import resolve_models
from mmtransfer.monitoring.memory import give_back
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.scale.cluster import check_ray, check_workers
from mmtransfer.scale.pieces import FileEnd, cut
from mmtransfer.scale.progress import BulkProgress
from mmtransfer.scale.recognising import (
    Line,
    Transcriber,
    open_sounds,
    open_transcriber,
    settings_of,
)
from mmtransfer.scale.rows import FORMATS, Output
from mmtransfer.scale.sources import BulkFile, Group, Partition, distinct, grouped, list_files

logger = logging.getLogger(__name__)
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class BulkOptions:
    """What is transcribed, and where to.

    Raises:
        UserError: a value that cannot be used.
    """

    recognition: RecognitionOptions
    sources: Sequence[str]
    """Folders, patterns, manifests, recordings; paths or addresses that fsspec knows."""
    output: str
    """Folder or address of the rows; the same again resumes."""
    _: KW_ONLY
    partition: Partition = "folder"
    """What the rows are parted by: folder of the file, or the UTC day that it was changed."""
    formats: Sequence[str] = ()
    """Files that each recording gets beside its rows: srt, vtt, jsonl."""
    max_errors: float = 5.0
    """Percent of files that may be unusable; the run stops at more."""
    retry_errors: bool = False
    """Try files again that could not be used, although they have not changed since."""
    ray: str | None = None
    """`local`, `auto` or HOST:PORT of a Ray cluster; None: this process."""
    workers: int | None = None
    """Recognisers on Ray; by default as many as there is room for."""
    gpus_per_worker: float = 0.0
    """Share of a GPU that each takes, or how many."""
    price: float | None = None
    """Of a worker's hour (without Ray: this machine's), for the cost of an hour of audio."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise UserError(f"formats: expected {', '.join(FORMATS)}, found {unknown[0]!r}.")
        if not 0 <= self.max_errors <= 100:
            raise UserError(f"max_errors: expected a percentage, found {self.max_errors:g}.")
        check_workers(self.ray, self.workers, self.gpus_per_worker)


@dataclass
class BulkSummary:
    """What a run did, earlier runs with the same output not counted."""

    files: int = 0
    failed: int = 0
    """Of these, with an error."""
    known: int = 0
    """Files that an earlier run had finished."""
    audio_hours: float = 0.0
    lines: int = 0
    rejected: int = 0
    """Stretches of speech whose text a guard rejected."""
    pieces: int = 0
    """Transcribed."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Processor time of all that took part."""
    workers: int = 1
    price: float | None = None

    @property
    def speed(self) -> float:
        """Seconds of audio in a second."""
        return 3600 * self.audio_hours / self.wall_s if self.wall_s else 0.0

    @property
    def core_hours_per_audio_hour(self) -> float:
        """Processor time that an hour of audio took, in hours."""
        return self.cpu_s / 3600 / self.audio_hours if self.audio_hours else 0.0

    @property
    def cost_per_audio_hour(self) -> float | None:
        """What an hour of audio cost, if a worker's hour has a price."""
        if self.price is None or not self.audio_hours:
            return None
        return self.price * self.workers * self.wall_s / 3600 / self.audio_hours

    def line(self) -> str:
        """The last line of a run."""
        cost = self.cost_per_audio_hour
        return (
            f"{self.files} files ({self.failed} unusable, {self.known} known before), "
            f"{self.audio_hours:.2f} h of audio in {self.wall_s:.0f} s "
            f"({self.speed:.1f} times real time), {self.lines} lines, {self.rejected} rejected; "
            f"{self.core_hours_per_audio_hour:.4f} core hours an hour of audio"
            + (f", cost {cost:.4g}" if cost is not None else "")
        )


@dataclass
class _Work:
    """A group that is not finished."""

    pieces: set[str]
    """Transcribed, of this cutting or of one before."""
    ends: dict[int, FileEnd] = field(default_factory=dict)
    cut: Sequence[str] | None = None
    """Its pieces, in order, once they are all cut."""
    reached: dict[int, float] = field(default_factory=dict)
    """To where, in seconds, its files are transcribed: one may take hours."""


class BulkRun:
    """What is to be done, and what was; whoever transcribes calls `begin`, `ended`, `add` and
    `all_cut` for each group, all from one thread.
    """

    def __init__(self, output: Output, groups: Sequence[Group], options: BulkOptions):
        self._output, self._options = output, options
        self.todo = [group for group in groups if group.id not in output.done]
        """Groups to transcribe, in order."""
        self._total = len({file.address for group in groups for file in group.files})
        left = sum(len(group.files) for group in self.todo)
        self.summary = BulkSummary(known=self._total - left, price=options.price)
        self._work: dict[str, _Work] = {}
        self._progress = BulkProgress(left, sum(group.size for group in self.todo))
        self._started = time.monotonic()

    def is_finished(self, group: Group) -> bool:
        """Whether the rows of a group are written."""
        return group.id in self._output.done

    def begin(self, group: Group) -> set[str]:
        """Begin with a group, or once more; returns the pieces that are transcribed already."""
        self._work[group.id] = work = _Work(self._output.pieces(group))
        return work.pieces

    def ended(self, group: Group, end: FileEnd) -> None:
        """A file has been decoded."""
        self._work[group.id].ends[end.file] = end
        if end.error:
            logger.warning("%s", end.error)

    def add(self, group: Group, piece: str, lines: Sequence[tuple[int, Line]]) -> None:
        """A piece has been transcribed; once more makes no difference."""
        work = self._work.get(group.id)
        if work is None or piece in work.pieces:
            return
        self._output.write_piece(group, piece, lines)
        work.pieces.add(piece)
        for file, line in lines:
            work.reached[file] = max(line.end, work.reached.get(file, 0.0))
        self.summary.pieces += 1
        self._advance(0, 0)
        self._finish(group)

    def all_cut(self, group: Group, pieces: Sequence[str]) -> None:
        """A group has these pieces."""
        self._work[group.id].cut = pieces
        self._finish(group)

    def _advance(self, files: int, size: int) -> None:
        summary = self.summary
        begun = sum(sum(work.reached.values()) for work in self._work.values())
        hours = summary.audio_hours + begun / 3600
        self._progress.advance(files, size, audio_hours=hours, pieces=summary.pieces)

    def give_up(self, group: Group, why: str) -> None:
        """A group cannot be transcribed: its files are errors."""
        work = self._work[group.id] = _Work(set(), cut=())
        for number, file in enumerate(group.files):
            work.ends[number] = FileEnd(number, error=f"{file.shown}: {why}")
        self._finish(group)

    def _finish(self, group: Group) -> None:
        """Write the rows of a group if all of it is transcribed.

        Raises:
            UserError: too many files of the run could not be used.
        """
        work, summary = self._work[group.id], self.summary
        if work.cut is None or not work.pieces.issuperset(work.cut):
            return
        rows = self._output.finish(group, work.cut, work.ends)
        del self._work[group.id]
        failed = sum(bool(row["error"]) for row in rows)
        summary.files += len(rows)
        summary.failed += failed
        summary.audio_hours += sum(row["seconds"] for row in rows) / 3600
        summary.lines += sum(row["lines"] for row in rows)
        summary.rejected += sum(row["rejected"] for row in rows)
        self._advance(len(rows), group.size)
        bad = len(self._output.errors)
        if failed and 100 * bad > self._options.max_errors * self._total:
            first = next(row["error"] for row in rows if row["error"])
            raise UserError(
                f"{bad} of {self._total} files could not be used, more than "
                f"{self._options.max_errors:g} %; the last: {first} All are in errors.parquet. "
                "Mend them, or allow more by --max-errors."
            )

    def close(self) -> BulkSummary:
        """The run has ended."""
        self._progress.close()
        self.summary.wall_s = round(time.monotonic() - self._started, 3)
        more = {
            "speed": self.summary.speed,
            "core_hours_per_audio_hour": self.summary.core_hours_per_audio_hour,
            "cost_per_audio_hour": self.summary.cost_per_audio_hour,
        }
        if self.summary.pieces or self.summary.files:  # else that of the last run stays
            values = asdict(self.summary) | more
            self._output.storage.write(_SUMMARY, json.dumps(values, indent=1).encode())
        return self.summary


def transcribe(options: BulkOptions) -> BulkSummary:
    """Transcribe all that is not in the output yet.

    Raises:
        UserError: something that cannot be used, or too many files that cannot.
        OSError: the output cannot be written.

    Example:
        transcribe(BulkOptions(RecognitionOptions("runs/site"), ["archive"], "rows"))
    """
    if options.ray is not None:
        check_ray(options.ray)
    models = resolve_models(options.recognition)
    settings = settings_of(options.recognition, models)
    files = list_files(options.sources, options.partition)
    output = Output(options.output, settings, partition=options.partition, formats=options.formats)
    with output.alone():
        run = BulkRun(output, _planned(output, files, options), options)
        try:
            if not run.todo:
                logger.info("%s: all is transcribed already", output.storage.name)
            elif options.ray is None:
                transcriber = open_transcriber(options.recognition, models)
                started = time.process_time()
                transcribe_here(run, transcriber, open_sounds(options.recognition, models))
                run.summary.cpu_s = time.process_time() - started
            else:
                from mmtransfer.scale.on_ray import transcribe_on_ray

                transcribe_on_ray(run, options, settings)
        finally:
            summary = run.close()
    return summary


def _planned(output: Output, files: Sequence[BulkFile], options: BulkOptions) -> list[Group]:
    """The groups of earlier runs and, behind them, those of files that are new, or that could not
    be used and are tried again.
    """
    before = output.plan()
    known = {file.address: (file, group) for group in before for file in group.files}
    taken = {file.name for file, _ in known.values()}
    fresh, again, changed = list[BulkFile](), list[BulkFile](), list[BulkFile]()
    for file in files:
        if file.address not in known:
            fresh.append(distinct(file) if file.name in taken else file)
            continue
        old, group = known[file.address]
        is_changed = (file.size, file.version) != (old.size, old.version)
        is_wanted = bool(output.errors) and (is_changed or options.retry_errors)
        error = output.errors.get(file.shown) if is_wanted else None
        # Of one that ended early there are lines, which would be there twice.
        if error is not None and not error["lines"] and group.id in output.done:
            again.append(replace(file, name=old.name))
        elif is_changed:
            changed.append(file)
    if changed:
        logger.warning(
            "%d files have changed since an earlier run planned them (%s, ...); what it has of "
            "them stays. Transcribe them into another --output.",
            len(changed),
            changed[0].shown,
        )
    if again:
        logger.info("%d files that could not be used are tried again", len(again))
    anew = grouped([*fresh, *again])
    groups = [*before, *(group for group in anew if not output.reopen(group))]
    if len(groups) > len(before):
        output.write_plan(groups)
    return groups


def transcribe_here(
    run: BulkRun, transcriber: Transcriber, sounds: SoundClasses | None = None
) -> None:
    """Transcribe in this process: this thread decodes and cuts, the recogniser's workers take
    pieces; few of them wait.
    """
    running: dict[Future[list[tuple[int, Line]]], tuple[Group, str]] = {}

    def collect(most: int) -> None:
        while len(running) > most:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                group, piece = running.pop(done)
                run.add(group, piece, done.result())
                give_back()

    with ThreadPoolExecutor(transcriber.workers, thread_name_prefix="recognizer") as pool:
        try:
            for group in run.todo:
                known, names = run.begin(group), list[str]()
                for found in cut(group, transcriber.window_s, sounds):
                    if isinstance(found, FileEnd):
                        run.ended(group, found)
                        continue
                    names.append(found.name)
                    if found.name in known:
                        continue
                    work = pool.submit(transcriber.transcribe, found, group.files)
                    running[work] = (group, found.name)
                    collect(2 * transcriber.workers - 1)
                run.all_cut(group, names)
            collect(0)
        finally:
            pool.shutdown(cancel_futures=True)
