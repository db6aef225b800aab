"""Sentiment and other text classification: texts with labels, macro-F1 as the score."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.text.classifier import (
    Encoded,
    TextModel,
    average_windows,
    cut_note,
    length_batches,
    load_text_model,
    new_text_model,
)
from mmtransfer.text.ensemble import is_ensemble, load_ensemble
from mmtransfer.text.examples import TextExample, TextSet, check_labels, read_texts
from mmtransfer.text.splits import load_text_splits
from mmtransfer.transfer.classification import (
    ClassificationScore,
    confusion_matrix,
    fit_temperature,
    macro_f1_accuracy,
    score_classification,
)
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.splits import Splits
from mmtransfer.transfer.stages import (
    Stage,
    class_weights,
    frozen_modules,
    resolve_stages,
    supervised_contrastive_loss,
)
from mmtransfer.transfer.task import Task, name_some

logger = logging.getLogger(__name__)


@dataclass
class TextBatch:
    """Texts as windows, from their tokens or from cached activations."""

    inputs: dict[str, torch.Tensor]
    """What the tokenizer gives [window, token], or `stored` [window, layer, (token,) width]."""
    mask: torch.Tensor | None
    """Tokens that count [window, token]; None for pooled activations."""
    owner: torch.Tensor
    """Number of the text that each window belongs to."""
    targets: torch.Tensor
    """Classes [text]."""


class SentimentTask(Task):
    """Trains a text classifier."""

    metric = "macro_f1"
    higher_is_better = True
    tie_metric = "loss"
    unit: ClassVar[str] = "tokens"
    speed_unit: ClassVar[str] = "tokens/s"
    pipeline: ClassVar[str] = "text-classification"
    pipeline_call: ClassVar[str] = 'run("A text.")'
    usage: ClassVar[str] = (
        'model = mmtransfer.load("path/or/id/of/this/model")\nprint(model.predict(["A text."]))'
    )

    splits: Splits[TextSet]

    def __init__(
        self,
        text: TextModel,
        train: TextSet,
        validation: TextSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
        rehearsal: TextSet | None = None,
    ):
        encoder = text.network.encoder
        stages = stages or resolve_stages(config)
        super().__init__(text, text.network, text.network.layout(), encoder.model, stages, config)
        self.text = text
        self._network = text.network
        self._targets = len(train)
        # Rehearsal texts are numbered behind the target's.
        self.examples = train.examples + (rehearsal.examples if rehearsal else [])
        self.validation = validation
        number = {label: index for index, label in enumerate(text.labels)}
        self._classes = [number[example.label] for example in self.examples]
        self._validation_classes = [number[example.label] for example in validation.examples]
        self._encoded = encode_examples(text, self.examples, "train")
        self._validation_encoded = encode_examples(text, validation.examples, validation.name)
        self._tokens = [float(encoded.tokens) for encoded in self._encoded]
        self.lengths = self._tokens
        counts = Counter(self._classes)
        weights = class_weights(
            [max(1, counts[index]) for index in range(len(text.labels))],
            config.transfer.class_weights,
            config.transfer.effective_beta,
        )
        self._weights = torch.tensor(weights or [1.0] * len(text.labels))
        self._stores: tuple[FeatureStore, FeatureStore] | None = None

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what cannot be, before anything is loaded."""
        super().check(config)
        if config.head.type in ("ctc", "decoder"):
            raise UserError(
                f"head.type: {config.head.type} is for speech; for texts use classifier, native or "
                "auto."
            )

    @classmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> SentimentTask:
        """The task with an encoder, a head for its classes, and its texts."""
        splits, labels = load_text_splits(config)
        text = new_text_model(
            source, labels, data=config.data, head=config.head, seed=config.runtime.seed
        )
        has_targets = any(example.target for example in splits.train.examples)
        text.settings = replace(text.settings, targets=has_targets)
        task = cls(text, splits.train, splits.validation, config, rehearsal=splits.rehearsal)
        task.splits = splits
        return task

    @classmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> TextModel:
        """A text classifier, or several in one."""
        if is_ensemble(checkpoint):
            return load_ensemble(checkpoint)
        return load_text_model(checkpoint)

    # --- training ---------------------------------------------------------------------------

    @property
    def batch_budget(self) -> float:
        """Tokens per forward pass."""
        return self.config.train.batch_tokens

    @property
    def fingerprint(self) -> str:
        """Identity of the training texts."""
        parts = [f"{e.text}\0{e.target}\0{e.label}" for e in self.examples]
        return hashlib.sha256("\1".join(parts).encode()).hexdigest()[:16]

    def epoch(self, epoch: int) -> Sequence[int]:
        """The target's texts, and some of the rehearsal's."""
        return self.epoch_of(self._targets, len(self.examples) - self._targets, epoch)

    def _close_stores(self) -> None:
        self._stores, self.lengths = None, self._tokens

    def _open_stores(self, frozen: int, device: torch.device) -> None:
        # Pooled activations are one vector, however long the text was.
        pooled = self._network.stores_pooled(frozen)
        self.lengths = (
            [float(np.mean(self._tokens))] * len(self._tokens) if pooled else self._tokens
        )
        self._stores = (
            self._open_store("the training texts", self._encoded, frozen, device),
            self._open_store("the validation texts", self._validation_encoded, frozen, device),
        )

    def _open_store(
        self, name: str, encoded: list[Encoded], frozen: int, device: torch.device
    ) -> FeatureStore:
        network, config = self._network, self.config
        pooled = network.stores_pooled(frozen)
        layers = network.stored_layers(frozen)
        values = [
            len(layers) * network.encoder.width * (len(text.windows) if pooled else text.tokens)
            for text in encoded
        ]
        key = cache_key(
            weights=weights_digest(frozen_modules(self.layout, frozen), self.host.config),
            layers=layers,
            pooled=network.config.pooling if pooled else None,
            native=network.head is None,
            dtype=config.transfer.cache_dtype,
            items=[_digest(text) for text in encoded],
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            network.eval()
            costs = [encoded[row].tokens for row in rows]
            for chosen in length_batches(costs, config.evaluation.batch_tokens):
                part = [rows[index] for index in chosen]
                inputs, mask, owner = self.text.collate([encoded[row] for row in part])
                with torch.inference_mode():
                    moved = {name: value.to(device) for name, value in inputs.items()}
                    stored = network.prefix(moved, mask.to(device), frozen).cpu().numpy()
                for number, row in enumerate(part):
                    mine = stored[(owner == number).numpy()]
                    if not pooled:
                        mine = mine[:, :, : max(len(w) for w in encoded[row].windows)]
                    yield row, mine

        return cached_features(name, key, values, compute, dtype=config.transfer.cache_dtype)

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[TextBatch]:
        """Micro-batches of this process's share, each within the budget."""
        mine = list(batch[share])
        lengths, budget = self.lengths, self.config.train.batch_tokens
        micros = []
        for part in length_batches([lengths[index] for index in mine], budget):
            chosen = [mine[position] for position in part]
            targets = torch.tensor([self._classes[index] for index in chosen])
            encoded = [self._encoded[index] for index in chosen]
            store = self._stores[0] if self._stores else None
            micros.append(self._batch(encoded, store, chosen, targets))
        return micros

    def _batch(
        self,
        encoded: list[Encoded],
        store: FeatureStore | None,
        rows: Sequence[int],
        targets: torch.Tensor,
    ) -> TextBatch:
        if store is None:
            inputs, mask, owner = self.text.collate(encoded)
            return TextBatch(inputs, mask, owner, targets)
        counts = torch.tensor([len(text.windows) for text in encoded])
        owner = torch.repeat_interleave(torch.arange(len(encoded)), counts)
        arrays = [store[row] for row in rows]
        if arrays[0].ndim == 3:  # pooled: [window, layer, width]
            stored = torch.from_numpy(np.concatenate(arrays)).float()
            return TextBatch({"stored": stored}, None, owner, targets)
        lengths = [len(window) for text in encoded for window in text.windows]
        longest = max(lengths)
        layers, width = arrays[0].shape[1], arrays[0].shape[3]
        padded = np.zeros((len(lengths), layers, longest, width), arrays[0].dtype)
        row = 0
        for array in arrays:
            padded[row : row + len(array), :, : array.shape[2]] = array
            row += len(array)
        mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
        return TextBatch({"stored": torch.from_numpy(padded).float()}, mask, owner, targets)

    def weight(self, micro: TextBatch) -> float:
        """Sum of the class weights."""
        if self.stage.objective == "contrastive":
            counts = torch.bincount(micro.targets)
            return float(counts[counts > 1].sum())
        return float(self._weights[micro.targets].sum())

    def split(self, micro: TextBatch) -> list[TextBatch]:
        """Two halves of the texts."""
        count = len(micro.targets)
        if count < 2:
            return [micro]
        halves = []
        for start, stop in ((0, count // 2), (count // 2, count)):
            rows = (micro.owner >= start) & (micro.owner < stop)
            inputs = {name: value[rows] for name, value in micro.inputs.items()}
            mask = None if micro.mask is None else micro.mask[rows]
            owner = micro.owner[rows] - start
            halves.append(TextBatch(inputs, mask, owner, micro.targets[start:stop]))
        return halves

    def loss(self, micro: TextBatch, device: torch.device) -> torch.Tensor:
        """Sum of the loss over the texts; in a contrastive stage that of their features alone."""
        if self.stage.objective != "contrastive":
            return super().loss(micro, device)
        targets = micro.targets.to(device)
        pooled = self._pooled(micro, device)
        features = average_windows(pooled, micro.owner.to(device), len(targets))
        return supervised_contrastive_loss(features, targets)

    def outputs(self, micro: TextBatch, device: torch.device) -> Outputs:
        """Logits [text, class], averaged over windows."""
        logits, owner = self._logits(micro, device).float(), micro.owner.to(device)
        averaged = average_windows(logits, owner, len(micro.targets))
        return Outputs(averaged, torch.ones(len(averaged), dtype=torch.bool, device=device))

    def target_loss(self, outputs: Outputs, micro: TextBatch) -> torch.Tensor:
        """Cross-entropy, weighted by class and summed."""
        device = outputs.logits.device
        return functional.cross_entropy(
            outputs.logits,
            micro.targets.to(device),
            weight=self._weights.to(device),
            reduction="sum",
            label_smoothing=self.config.transfer.label_smoothing,
        )

    def _inputs(
        self, micro: TextBatch, device: torch.device
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Inputs on the device; below a freeze line without a cache they become its output."""
        inputs = {name: value.to(device) for name, value in micro.inputs.items()}
        mask = None if micro.mask is None else micro.mask.to(device)
        if self.frozen is not None and "stored" not in inputs and mask is not None:
            with torch.no_grad():
                inputs = {"stored": self._network.prefix(inputs, mask, self.frozen)}
                if self._network.stores_pooled(self.frozen):
                    mask = None
        return inputs, mask

    def _logits(self, micro: TextBatch, device: torch.device) -> torch.Tensor:
        inputs, mask = self._inputs(micro, device)
        if self.frozen is not None:
            return self._network.forward_stored(inputs["stored"], mask, self.frozen)
        return self._network(inputs, mask)

    def _pooled(self, micro: TextBatch, device: torch.device) -> torch.Tensor:
        inputs, mask = self._inputs(micro, device)
        return self._network.pooled(inputs, mask, frozen=self.frozen)  # type: ignore[arg-type]

    def names(self, indices: Sequence[int]) -> str:
        """Where training texts come from."""
        names = [self.examples[index].name for index in indices]
        return name_some(names)

    # --- evaluation -------------------------------------------------------------------------

    @property
    def validation_size(self) -> int:
        """Number of validation texts."""
        return len(self.validation.examples)

    def validate(self, indices: Sequence[int], device: torch.device) -> list[list[float]]:
        """Logits of validation texts."""
        store = self._stores[1] if self._stores else None
        encoded = [self._validation_encoded[index] for index in indices]
        budget = self.config.evaluation.batch_tokens
        if store is None:
            found = self.text.encoded_logits(encoded, device=device, batch_tokens=budget)
            return found.tolist()
        self._network.eval()
        rows = np.zeros((len(indices), len(self.text.labels)), np.float32)
        for part in length_batches([text.tokens for text in encoded], budget):
            chosen = [indices[position] for position in part]
            targets = torch.zeros(len(part), dtype=torch.long)
            micro = self._batch([encoded[i] for i in part], store, chosen, targets)
            with torch.inference_mode():
                logits = self._logits(micro, device).float()
                averaged = average_windows(logits, micro.owner.to(device), len(part))
            rows[part] = averaged.cpu().numpy()
        return rows.tolist()

    def summarize(self, records: Sequence[list[float]]) -> dict[str, float | None]:
        """Macro-F1, accuracy and mean cross-entropy."""
        logits, targets = np.array(records), np.array(self._validation_classes[: len(records)])
        classes = len(self.text.labels)
        confusion = confusion_matrix(targets, logits.argmax(-1), classes)
        macro_f1, accuracy = macro_f1_accuracy(confusion)
        loss = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
        return {"macro_f1": macro_f1, "accuracy": accuracy, "loss": float(loss)}

    def outcomes(self, records: Sequence[list[float]]) -> tuple[str, dict[str, Any]]:
        """Class and predicted class of each text."""
        targets = self._validation_classes[: len(records)]
        found = np.array(records).argmax(-1).tolist()
        return self.metric, {"targets": targets, "predictions": found}

    # --- what a run reports -----------------------------------------------------------------

    def score(self, examples: TextSet, device: torch.device) -> dict[str, Any]:
        """Scores of labelled texts."""
        return evaluate_texts(self.text, examples, self.config, device).as_dict()

    @property
    def is_scored_before(self) -> bool:
        """Whether the head came with the source."""
        return self.text.is_source_head

    def finish(self, device: torch.device) -> None:
        """Calibrate the probabilities."""
        self.calibrate(device)

    def describe(self) -> dict[str, Any]:
        """Classes, temperature, length of texts."""
        return {
            "labels": self.text.labels,
            "temperature": self.text.temperature,
            "max_tokens": self.text.settings.max_tokens,
        }

    @property
    def is_plain(self) -> bool:
        """Whether the head is the library's own, or is saved as one."""
        return self.text.network.head is None or (self.form == "full" and self.text.is_stock)

    @classmethod
    def evaluate(
        cls, checkpoint: Checkpoint, data: str | TextSet, config: Config, device: torch.device
    ) -> dict[str, Any]:
        """Scores of a classifier on labelled texts."""
        text = cls.load(checkpoint, None)
        texts = data
        if isinstance(texts, str):
            texts = read_texts(texts, config.data, name="data", split="validation")
        check_labels(texts, text.labels, where=data if isinstance(data, str) else texts.name)
        text.network.to(device)
        started = time.perf_counter()
        score = evaluate_texts(text, texts, config, device)
        return {
            **score.as_dict(),
            "metric": cls.metric,
            "skipped": len(texts.skipped),
            "seconds_wall": round(time.perf_counter() - started, 3),
        }

    def calibrate(self, device: torch.device) -> float:
        """Fit the temperature on the validation texts (Guo et al. 2017)."""
        self._close_stores()
        records = self.validate(range(self.validation_size), device)
        targets = np.array(self._validation_classes)
        self.text.temperature = fit_temperature(np.array(records), targets)
        return self.text.temperature


def encode_examples(text: TextModel, examples: Sequence[TextExample], name: str) -> list[Encoded]:
    """Tokenise examples in blocks, so that memory stays bounded; says how many were cut."""
    encoded: list[Encoded] = []
    for start in range(0, len(examples), 4096):
        part = examples[start : start + 4096]
        encoded += text.encode([e.text for e in part], [e.target for e in part])
    note = cut_note(sum(one.is_cut for one in encoded), len(encoded), text.settings)
    if note is not None:
        logger.warning("'%s': %s", name, note)
    if text.settings.targets is False and any(example.target for example in examples):
        logger.warning("'%s': targets are not used; the model was trained without", name)
    return encoded


def evaluate_texts(
    text: TextModel, texts: TextSet, config: Config, device: torch.device
) -> ClassificationScore:
    """Score a classifier on labelled texts."""
    encoded = encode_examples(text, texts.examples, texts.name)
    budget = config.evaluation.batch_tokens
    logits = text.encoded_logits(encoded, device=device, batch_tokens=budget)
    number = {label: index for index, label in enumerate(text.labels)}
    targets: Any = np.array([number[example.label] for example in texts.examples])
    return score_classification(
        logits,
        targets,
        text.labels,
        temperature=text.temperature,
        bootstrap_samples=config.evaluation.bootstrap_samples,
        seed=config.runtime.seed,
    )


def _digest(encoded: Encoded) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for number, window in enumerate(encoded.windows):
        digest.update(window.tobytes() + b"|")
        if encoded.types is not None:
            digest.update(encoded.types[number].tobytes() + b"|")
    return digest.hexdigest()
