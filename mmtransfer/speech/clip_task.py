"""What tasks on clips with transcripts have in common: data, batches, word error rates."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.augmentation import Augmenter
from mmtransfer.speech.clip_scores import ClipScoring, as_monitored, evaluate_clips
from mmtransfer.speech.clips import Clip, ClipSet, load_clips, read_clips, usual_language
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.scores import ClipScore, SpeechScore
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.transfer.splits import Splits
from mmtransfer.transfer.stages import Layout, Stage, resolve_stages
from mmtransfer.transfer.task import Task, comparable, name_some, refuse_contrastive

logger = logging.getLogger(__name__)


class ClipTask(Task):
    """A task whose examples are clips with transcripts."""

    higher_is_better = False
    tie_metric = "cer"
    unit: ClassVar[str] = "audio_seconds"
    speed_unit: ClassVar[str] = "x"
    pipeline: ClassVar[str] = "automatic-speech-recognition"
    pipeline_call: ClassVar[str] = 'run("recording.wav")["text"]'
    usage: ClassVar[str] = (
        'model = "path/or/id/of/this/model"\n'
        'print([piece.text for piece in mmtransfer.monitor(model, "recording.mp4")])'
    )
    bundled_rehearsal: ClassVar[bool] = True
    usual_rehearsal: ClassVar[float] = 0.4

    splits: Splits[ClipSet]

    def __init__(
        self,
        speech: SpeechModel | CtcModel,
        model: Any,
        layout: Layout,
        host: Any,
        stages: Sequence[Stage],
        config: Config,
        train: ClipSet,
        validation: ClipSet,
        rehearsal: ClipSet | None = None,
    ):
        super().__init__(speech, model, layout, host, stages, config)
        self._augmenter = Augmenter(config.augment, speech.max_context_s)
        # The target's clips that can be learnt; rehearsal clips are numbered behind.
        self.target = self._fitting(train)
        if not self.target.clips:
            raise UserError(f"'{train.name}': every transcript is too long for the model.")
        self._targets = len(self.target)
        extra = self._fitting(rehearsal).clips if rehearsal is not None else []
        self.train, self.validation = ClipSet("train", self.target.clips + extra), validation
        self._scoring = ClipScoring(validation.clips, speech.language, config)
        self.metric = self._scoring.metric

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what cannot be, before anything is loaded."""
        super().check(config)
        refuse_contrastive(resolve_stages(config))
        if config.data.language == "auto":
            raise UserError(
                "data.language: training needs the language of the speech, found 'auto'. Name it "
                "(en, zh, ...), or give the clips a column 'language'."
            )
        if config.head.type in ("classifier", "native"):
            raise UserError(
                f"head.type: {config.head.type} is for texts; for speech use ctc, decoder or auto."
            )

    @abstractmethod
    def _fitting(self, clips: ClipSet) -> ClipSet:
        """The clips whose transcripts the model can learn."""

    # --- training ---------------------------------------------------------------------------

    @property
    def batch_budget(self) -> float:
        """Audio seconds per forward pass."""
        return self.config.train.batch_seconds

    def epoch(self, epoch: int) -> Sequence[int]:
        """The target's clips."""
        return range(self._targets)

    def plan(self, budget: float, *, seed: Sequence[int], epoch: int) -> list[list[int]]:
        """Batches of the target's clips and the rehearsal's."""
        return self.plan_with(self._targets, budget, seed=seed, epoch=epoch)

    def names(self, indices: Sequence[int]) -> str:
        """Names of training clips."""
        return name_some([self.train.clips[index].name for index in indices])

    def _view_rng(self, index: int, view: int) -> np.random.Generator:
        return np.random.default_rng([self.config.runtime.seed, 2, view, index])

    # --- evaluation -------------------------------------------------------------------------

    @property
    def validation_size(self) -> int:
        """Number of validation clips."""
        return len(self.validation.clips)

    def summarize(self, records: Sequence[ClipScore]) -> dict[str, float | None]:
        """WER, CER and words on silence."""
        score = self.summary(records)
        return {"wer": score.wer, "cer": score.cer, "hallucinated_words": score.hallucinated_words}

    def outcomes(self, records: Sequence[ClipScore]) -> tuple[str, dict[str, Any]]:
        """Characters, since hardly a word is right at first: errors and number in each clip."""
        errors, units = ([getattr(r, name) for r in records] for name in ("char_errors", "chars"))
        return "cer", {"errors": errors, "units": units}

    def summary(self, records: Sequence[ClipScore]) -> SpeechScore:
        """All scores of validation records."""
        return self._scoring.summary(records)

    def rate(self, records: Sequence[ClipScore]) -> float:
        """The main metric of records; words emitted where it is undefined."""
        return comparable(self.summarize(records), self.metric)

    def _evaluated(
        self, speech: SpeechModel | CtcModel, clips: ClipSet, device: torch.device, **options: Any
    ) -> SpeechScore:
        """Scores of a set of the run: by the target's metric, which stands for all of them."""
        options["metric"] = self.metric
        return evaluate_clips(speech, clips, self.config, device, **options)

    @classmethod
    def evaluate(
        cls, checkpoint: Checkpoint, data: str | ClipSet, config: Config, device: torch.device
    ) -> dict[str, Any]:
        """Scores of a recogniser on data, as it is used."""
        read = read_clips(data, config.data) if isinstance(data, str) else data.clips
        language = config.data.language or usual_language(read)
        model: SpeechModel | CtcModel = cls.load(checkpoint, language)
        clips = data
        if isinstance(clips, str):
            clips = load_clips(
                clips,
                config.data,
                name="data",
                max_seconds=model.max_context_s,
                languages=model.languages if isinstance(model, SpeechModel) else None,
                clips=read,
            )
        opened, decoding = None, dict[str, Any]()
        if config.evaluation.engine is None:
            model.model.to(device)
        else:
            opened, decoding = as_monitored(checkpoint, model, config, device)
            opened(model.language)  # loaded before the time is taken
        started = time.perf_counter()
        guards = opened is not None and config.evaluation.guards
        score = evaluate_clips(model, clips, config, device, opened=opened, guards=guards)
        return {
            **score.as_dict(),
            **({"decoding": decoding} if decoding else {}),
            "metric": ClipScoring(clips.clips, model.language, config).metric,
            "skipped": len(clips.skipped),
            "seconds_audio": round(clips.seconds, 3),
            "seconds_wall": round(time.perf_counter() - started, 3),
        }


def skip_long(name: str, found: Sequence[tuple[Clip, str]], limit: str) -> list[str]:
    """Say which clips are left out since their transcripts are too long, all of them at once; gives
    a line for each.
    """
    lines = [
        f"{clip.where or clip.name}: {clip.name}: the transcript has {length}, {limit}"
        for clip, length in found
    ]
    if found:
        names = [f"{clip.name} ({length})" for clip, length in found]
        logger.warning(
            "skipped: %d of the clips of '%s' have transcripts that are too long (%s): %s. Cut "
            "the clips, or mend the transcripts.",
            len(found),
            name,
            limit,
            name_some(names),
        )
    return lines


def check_views(augmenter: Augmenter, config: Config) -> int:
    """Augmented versions of each clip to cache; 1 without augmentation.

    Raises:
        UserError: augmentation over a cached prefix without a number of views.
    """
    views = config.transfer.cached_views
    if augmenter.is_active and not views:
        raise UserError(
            "augment: clips that are changed anew in every epoch cannot pass the frozen layers "
            "just once. Set transfer.cached_views: 4 (so many versions of each clip are cached), "
            "transfer.cache: none, or no augmentation."
        )
    return views if augmenter.is_active else 1
