"""Text classifiers: texts (and what they are about) in, class probabilities out."""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer.config import DataConfig, HeadConfig, checked
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, other_kind, resolve
from mmtransfer.hub.files import METADATA, load_errors
from mmtransfer.hub.loading import load_weights, loading
from mmtransfer.hub.metadata import Base, Metadata, damaged, write_metadata
from mmtransfer.hub.settings import check_labels
from mmtransfer.progress import no_library_bars
from mmtransfer.runtime import is_out_of_memory
from mmtransfer.text.stock import is_stock, write_stock
from mmtransfer.transfer.adapters import adapter_shapes, load_merged, save_adapter
from mmtransfer.transfer.encoders import TextEncoder
from mmtransfer.transfer.heads import ClassifierHead
from mmtransfer.transfer.networks import Network, build_head, check_base, read_head, write_head

_TEMPERATURES = 0.001, 1000.0  # those of a file; beyond what training fits
_HEAD_WEIGHT = re.compile(r"\.(classifier|classifier\.out_proj|score)(\.modules_to_save)?\.weight$")
_LONGEST = 512  # tokens; longer contexts cost more than windows do
_CHARACTERS_PER_TOKEN = 16  # above what any language's tokens hold on average


@dataclass(frozen=True)
class Encoded:
    """A text as the encoder reads it: one or more windows of token ids."""

    windows: tuple[np.ndarray, ...]
    """Token ids of each window [token]."""
    types: tuple[np.ndarray, ...] | None
    """Token types of each window (0: text, 1: target), for models that use them."""
    is_cut: bool = False
    """Whether the text goes on beyond what is read of it."""

    @property
    def tokens(self) -> int:
        """Cost of the text: its windows at the length of the longest."""
        return len(self.windows) * max(len(window) for window in self.windows)


@dataclass(frozen=True)
class TextSettings:
    """How texts become windows."""

    max_tokens: int
    long_texts: str = "truncate"
    window_overlap: int = 64
    max_windows: int = 16
    targets: bool | None = None
    """Whether it was trained on texts with targets; None if that was not noted."""


@dataclass(frozen=True)
class Prediction:
    """A text's class."""

    label: str
    probabilities: dict[str, float]
    """Of every class, after temperature scaling."""
    is_cut: bool = False
    """Whether the text was longer than what was read of it."""


@dataclass
class TextModel:
    """A text encoder with a classification head and its tokenizer."""

    network: Network
    tokenizer: Any
    labels: list[str]
    settings: TextSettings
    base: Base
    temperature: float = 1.0
    """Divides the logits; fitted on validation data (Guo et al. 2017)."""
    source: str = ""
    """Name it was loaded by."""
    is_source_head: bool = False
    """Whether the head came with the source, so that the source can be scored."""

    def with_own_modules(self) -> TextModel:
        """The same model for another thread: on the same weights, with modules of its own."""
        shared = (*self.network.parameters(), *self.network.buffers(), self.tokenizer)
        return copy.deepcopy(self, {id(one): one for one in shared})

    def encode(self, texts: Sequence[str], targets: Sequence[str | None]) -> list[Encoded]:
        """Tokenise texts, each with its target as a second segment where it has one.

        Of a text that is too long, the part that mentions its target is read.
        """
        if self.settings.targets is False:  # it never saw a second segment
            targets = [None] * len(texts)
        with_target = [i for i, target in enumerate(targets) if target]
        without = [i for i, target in enumerate(targets) if not target]
        found: dict[int, Encoded] = {}
        for indices in (with_target, without):
            if indices:
                pairs = [str(targets[i]) for i in indices] if indices is with_target else None
                with load_errors(self.source, "the tokenizer of these texts"):
                    encoded = self._encode([texts[i] for i in indices], pairs)
                found.update(zip(indices, encoded, strict=True))
        return [found[index] for index in range(len(texts))]

    def _encode(self, texts: list[str], targets: list[str] | None) -> list[Encoded]:
        # Tokenising what cannot be read anyway takes minutes on a text of millions of characters.
        parts = [text[: self._reach] for text in texts]
        short = None if targets is None else [self._short_target(target) for target in targets]
        encoded = self._windows(parts, short)
        for index, (found, text) in enumerate(zip(encoded, texts, strict=True)):
            if len(text) > self._reach:
                encoded[index] = found = replace(found, is_cut=True)
            if found.is_cut and targets is not None and short is not None:
                encoded[index] = self._around(text, targets[index], short[index]) or found
        return encoded

    @property
    def _reach(self) -> int:
        """Characters of a text that are tokenised."""
        settings = self.settings
        windows = settings.max_windows if settings.long_texts == "windows" else 1
        return settings.max_tokens * _CHARACTERS_PER_TOKEN * windows

    def _windows(self, texts: list[str], targets: list[str] | None) -> list[Encoded]:
        """Texts as they are read from their beginning."""
        settings = self.settings
        windows = settings.long_texts == "windows"
        output = self.tokenizer(
            texts,
            targets,
            truncation="only_first",
            max_length=settings.max_tokens,
            stride=self._overlap if windows else 0,
            return_overflowing_tokens=True,  # what is left over shows that a text is cut
            return_attention_mask=False,
        )
        types = output.get("token_type_ids")
        most = settings.max_windows if windows else 1
        rows: list[list[int]] = [[] for _ in texts]
        for row, owner in enumerate(output["overflow_to_sample_mapping"]):
            rows[owner].append(row)
        return [
            Encoded(
                tuple(np.array(output["input_ids"][row], np.int32) for row in mine[:most]),
                tuple(np.array(types[row], np.int8) for row in mine[:most]) if types else None,
                len(mine) > most,
            )
            for mine in rows
        ]

    def _around(self, text: str, target: str, short: str) -> Encoded | None:
        """A text from a little before its first mention of the target on; None where it has none,
        or where that is read anyway.
        """
        mention = find_mention(text, target)
        if mention is None:
            return None
        begin, end = mention
        room = self._read_to(text[: self._reach], short)
        if end <= room:
            return None
        # A third of what is read comes before, if what follows is no denser than the beginning.
        for before in (room // 3, room // 12, 0):
            start = max(0, begin - before)
            start += (text[start:begin].find(" ") + 1) if start else 0
            part = text[start : start + self._reach]
            if end - start <= self._read_to(part, short):
                break
        [found] = self._windows([part], [short])
        return replace(found, is_cut=True)

    def _read_to(self, text: str, target: str) -> int:
        """Characters of a text that are read."""
        settings = self.settings
        windows = settings.long_texts == "windows"
        output = self.tokenizer(
            [text],
            [target],
            truncation="only_first",
            max_length=settings.max_tokens,
            stride=self._overlap if windows else 0,
            return_overflowing_tokens=windows,
            return_offsets_mapping=True,
        )
        last = min(len(output["input_ids"]), settings.max_windows if windows else 1) - 1
        spans = zip(output.sequence_ids(last), output["offset_mapping"][last], strict=True)
        return max((end for owner, (_, end) in spans if owner == 0), default=0)

    @property
    def _overlap(self) -> int:
        # A window must move on by at least half its length, beside the target and special tokens.
        return min(self.settings.window_overlap, self.settings.max_tokens // 4)

    def _short_target(self, target: str) -> str:
        """A target leaves at least half of the window to the text."""
        room = self.settings.max_tokens // 2 - 4
        if len(target) <= room // 4:
            return target
        offsets = self.tokenizer(
            target[: room * _CHARACTERS_PER_TOKEN],
            add_special_tokens=False,
            return_offsets_mapping=True,
        ).offset_mapping[:room]
        return target[: offsets[-1][1]] if offsets else target[:room]

    def collate(
        self, encoded: Sequence[Encoded]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """(model inputs [window, token], mask [window, token], owner of each window)."""
        windows = [window for text in encoded for window in text.windows]
        length = max(len(window) for window in windows)
        ids = torch.full((len(windows), length), int(self.tokenizer.pad_token_id))
        mask = torch.zeros(len(windows), length, dtype=torch.long)
        types = torch.zeros(len(windows), length, dtype=torch.long)
        row = 0
        for text in encoded:
            for number, window in enumerate(text.windows):
                ids[row, : len(window)] = torch.from_numpy(window)
                mask[row, : len(window)] = 1
                if text.types is not None:
                    types[row, : len(window)] = torch.from_numpy(text.types[number])
                row += 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if encoded[0].types is not None:
            inputs["token_type_ids"] = types
        counts = torch.tensor([len(text.windows) for text in encoded])
        return inputs, mask, torch.repeat_interleave(torch.arange(len(encoded)), counts)

    def encoded_logits(
        self, encoded: Sequence[Encoded], *, device: torch.device | str, batch_tokens: int = 8192
    ) -> np.ndarray:
        """Logits [text, class], computed in batches of like length and averaged over windows."""
        was_training = self.network.training
        self.network.eval()
        results = np.zeros((len(encoded), len(self.labels)), np.float32)
        try:
            for batch in length_batches([text.tokens for text in encoded], batch_tokens):
                for part, logits in self._halving(encoded, batch, torch.device(device)):
                    results[part] = logits
        finally:
            self.network.train(was_training)
        return results

    def _halving(
        self, encoded: Sequence[Encoded], batch: list[int], device: torch.device
    ) -> list[tuple[list[int], np.ndarray]]:
        """Logits of a batch; if memory does not hold it, as two halves."""
        try:
            inputs, mask, owner = self.collate([encoded[i] for i in batch])
            with torch.inference_mode():
                moved = {name: value.to(device) for name, value in inputs.items()}
                logits = self.network(moved, mask.to(device)).float()
                averaged = average_windows(logits, owner.to(device), len(batch))
            return [(batch, averaged.cpu().numpy())]
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        half = len(batch) // 2
        parts = (batch[:half], batch[half:])
        return [found for part in parts for found in self._halving(encoded, part, device)]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities [text, class]."""
        scaled = torch.from_numpy(logits).double() / self.temperature
        return scaled.softmax(-1).numpy()

    def predict(
        self,
        texts: Sequence[str],
        targets: Sequence[str | None] | None = None,
        *,
        device: torch.device | str | None = None,
        batch_tokens: int = 8192,
    ) -> list[Prediction]:
        """Classes of texts, in their order, with the probability of each.

        `targets` names what the sentiment is about, text by text, for models trained with targets.
        """
        if not len(texts):
            return []
        encoded = self.encode(list(texts), list(targets) if targets else [None] * len(texts))
        return self.predict_encoded(encoded, device=device, batch_tokens=batch_tokens)

    def predict_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        device: torch.device | str | None = None,
        batch_tokens: int = 8192,
    ) -> list[Prediction]:
        """Classes of texts that `encode` has tokenised."""
        where = device or next(self.network.parameters()).device
        logits = self.encoded_logits(encoded, device=where, batch_tokens=batch_tokens)
        return [
            Prediction(
                self.labels[int(row.argmax())],
                {label: float(p) for label, p in zip(self.labels, row, strict=True)},
                one.is_cut,
            )
            for row, one in zip(self.probabilities(logits), encoded, strict=True)
        ]

    # --- on disk ----------------------------------------------------------------------------

    @property
    def is_stock(self) -> bool:
        """Whether its own head is saved as that of the library's classifiers as well."""
        return self.network.head is not None and is_stock(
            self.network.config, self.network.encoder.model
        )

    def save_whole(self, folder: Path) -> None:
        """Write all its weights as the library has them, with its head where that can be."""
        head, model = self.network.head, self.network.encoder.model
        if self.is_stock and isinstance(head, ClassifierHead):
            write_stock(folder, model, head, self.labels, self.temperature)
        else:
            model.save_pretrained(folder)

    def save(self, folder: Path, form: str, adapted: Any = None) -> None:
        """Write the model in a form of `networks`; `adapted` is the peft model of an adapter."""
        network = self.network
        encoder = network.encoder
        native = network.head is None
        if native:
            encoder.model.config.id2label = dict(enumerate(self.labels))
            encoder.model.config.label2id = {name: i for i, name in enumerate(self.labels)}
        with no_library_bars():
            if form == "full":
                self.save_whole(folder)
            elif form == "adapter":
                save_adapter(adapted, folder)
            self.tokenizer.save_pretrained(folder)
        if network.head is not None:
            write_head(folder, network.head)
        write_metadata(
            folder,
            task="sentiment",
            form=form,
            base=self.base,
            labels=self.labels,
            head=network.config.model_dump(mode="json"),
            text=asdict(self.settings),
            temperature=self.temperature,
        )


def find_mention(text: str, target: str) -> tuple[int, int] | None:
    """Where a text first mentions a target: all its words, else one of the longer ones; None if
    nowhere. Case and white space do not matter.
    """
    words = sorted(target.split(), key=len, reverse=True)
    whole = r"\s+".join(map(re.escape, target.split()))
    patterns = [rf"(?<!\w){whole}(?!\w)", whole]
    patterns += [rf"(?<!\w){re.escape(word)}(?!\w)" for word in words if len(word) > 3]
    for pattern in patterns if words else ():
        match = re.search(pattern, text, re.IGNORECASE)
        if match is not None:
            return match.span()
    return None


def cut_note(cut: int, total: int, settings: TextSettings) -> str | None:
    """The line that says how many texts were cut; None if none was."""
    if not cut:
        return None
    windows = settings.max_windows if settings.long_texts == "windows" else 1
    limit = f"{settings.max_tokens} tokens" + (f" x {windows} windows" if windows > 1 else "")
    advice = " data.long_texts: windows, at training, classifies more." if windows == 1 else ""
    return f"{cut} of {total} texts are longer than {limit} and were cut.{advice}"


def average_windows(logits: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Mean logits of each text: [window, class] -> [text, class]."""
    if len(logits) == count:
        return logits
    total = logits.new_zeros(count, logits.shape[1]).index_add_(0, owner, logits)
    return total / torch.bincount(owner, minlength=count)[:, None].to(logits.dtype)


def length_batches(lengths: Sequence[float], budget: float) -> list[list[int]]:
    """Indices sorted by length, in batches whose padded cost is within the budget, longest last."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches


def new_text_model(
    checkpoint: Checkpoint,
    labels: list[str],
    *,
    data: DataConfig,
    head: HeadConfig,
    seed: int = 0,
) -> TextModel:
    """A source encoder with a new head for these labels, or a source classifier of the same ones.

    Raises:
        UserError: not a text encoder.
    """
    source, folder = checkpoint.source, checkpoint.folder
    if checkpoint.kind != "sentiment":
        raise other_kind(checkpoint, "a text encoder")
    if checkpoint.metadata is not None:
        return _continued(load_text_model(checkpoint), labels, data, head, seed)
    tokenizer = _load_tokenizer(source, folder)
    with loading(source, "a text encoder", folder):
        from transformers import AutoModel, AutoModelForSequenceClassification

        known = _plain_labels(source, folder)
        same = False
        if head.type == "native":
            same = _classifies(checkpoint) and sorted(known) == sorted(labels)
            labels = known if same else labels
            model = load_weights(
                AutoModelForSequenceClassification,
                folder,
                head_seed=seed,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={name: i for i, name in enumerate(labels)},
                ignore_mismatched_sizes=True,
            )
        else:
            model = load_weights(AutoModel, folder)
    encoder = TextEncoder(model)
    module = None
    if head.type != "native":
        module = build_head("classifier", encoder.width, encoder.depth, len(labels), head, seed)
    network = Network(encoder, module, head)
    settings = _settings(data, tokenizer, model)
    base = checkpoint.as_base()
    return TextModel(network, tokenizer, labels, settings, base, source=source, is_source_head=same)


def _classifies(checkpoint: Checkpoint) -> bool:
    """Whether its weights have a classification head of the library's."""
    return any(name.endswith("SequenceClassification") for name in checkpoint.classes)


def _continued(
    found: TextModel, labels: list[str], data: DataConfig, head: HeadConfig, seed: int
) -> TextModel:
    """A finished transfer as the source of the next one: its encoder, and its head if the labels
    and the head's shape are the same.
    """
    encoder = found.network.encoder
    settings = _settings(data, found.tokenizer, encoder.model)
    # Its weights are in no public place, so what comes of it is saved whole.
    found.base = Base(found.source)
    wanted = head if head.type != "auto" else found.network.config
    same_shape = wanted.model_dump(exclude={"dropout"}) == found.network.config.model_dump(
        exclude={"dropout"}
    )
    if sorted(found.labels) == sorted(labels) and same_shape:
        found.settings, found.is_source_head = settings, True
        return found
    if wanted.type == "native" or not isinstance(encoder, TextEncoder):
        raise UserError(
            f"{found.source}: its own head has the classes {', '.join(found.labels)}, the data "
            f"{', '.join(labels)}. Set head.type: classifier for a new head."
        )
    bare = TextEncoder(encoder.base)
    module = build_head("classifier", bare.width, bare.depth, len(labels), wanted, seed)
    network = Network(bare, module, wanted)
    return TextModel(network, found.tokenizer, labels, settings, found.base, source=found.source)


def load_text_model(checkpoint: Checkpoint) -> TextModel:
    """Load a text classifier: a finished transfer in any form, or a plain checkpoint.

    Raises:
        UserError: no text classifier.
    """
    source, folder, beneath = checkpoint.source, checkpoint.folder, checkpoint.weights
    metadata = checkpoint.metadata
    new_head: dict[str, Any] = {}
    if metadata is None and not _classifies(checkpoint):
        found = ", ".join(checkpoint.classes) or "no named architecture"
        raise UserError(
            f"{source}: expected a text classifier, found {found}. Train one on it first: "
            "mmtransfer train configs/news_sentiment/end_to_end.yaml --source_model NAME"
        )
    if metadata is not None and metadata.task != "sentiment":
        raise UserError(f"{source}: expected a text classifier, found a {metadata.task} model.")
    if metadata is not None and "members" in metadata.own:
        raise UserError(f"{source}: expected a single text classifier, found an ensemble.")
    if metadata is None:
        head, labels = HeadConfig(type="native"), _plain_labels(source, folder)
    elif checkpoint.is_plain_adapter:
        head = HeadConfig(type="native")
        labels, new_head = _adapter_labels(checkpoint)
    else:
        if metadata.head is None or metadata.labels is None:
            raise damaged(folder / METADATA)
        head, labels = (
            checked(HeadConfig, metadata.head, f"{folder / METADATA}: head"),
            metadata.labels,
        )
    is_own = metadata is not None and not checkpoint.is_plain_adapter
    check_labels(labels, folder / METADATA if is_own else checkpoint.weights / "config.json")
    tokenizer = _load_tokenizer(source, checkpoint.holding("tokenizer*"))
    with loading(source, "a text classifier", beneath):
        from transformers import AutoModel, AutoModelForSequenceClassification

        factory = AutoModelForSequenceClassification if head.type == "native" else AutoModel
        model = load_weights(factory, beneath, **new_head)
    if checkpoint.recorded is not None:
        check_base(model, checkpoint.recorded)
    if checkpoint.adapter is not None:
        model = load_merged(model, checkpoint.adapter)
    encoder = TextEncoder(model)
    module = None
    if head.type != "native":
        module = build_head("classifier", encoder.width, encoder.depth, len(labels), head, 0)
        read_head(folder, module)
    if metadata is not None and metadata.text is not None:
        settings = _recorded_settings(metadata.text, folder, tokenizer, model)
    else:
        settings = _settings(DataConfig(), tokenizer, model)
    text_model = TextModel(
        Network(encoder, module, head).eval(),
        tokenizer,
        labels,
        settings,
        (metadata.base if metadata else None) or checkpoint.as_base(),
        _temperature(folder, metadata),
        source,
    )
    with load_errors(source, "a text classifier"):  # of settings that only show when it computes
        encoded = text_model.encode(["a"], [None])
        logits = text_model.encoded_logits(encoded, device="cpu")
    if not np.isfinite(logits).all():
        raise UserError(
            f"{source}: gives no numbers (NaN or infinity); expected logits of its classes. Save "
            "or download the model again."
        )
    return text_model


def renew_stock(folder: Path) -> None:
    """Write the library's own form of a head anew, where what it was made from has changed."""
    model = load_text_model(resolve(str(folder)))
    if model.is_stock:
        model.save_whole(folder)


def _adapter_labels(checkpoint: Checkpoint) -> tuple[list[str], dict[str, Any]]:
    """Classes of a plain adapter, and how its base is loaded: with its own head, or with one of
    that size in whose place the adapter puts its own.
    """
    shapes = adapter_shapes(checkpoint.folder)
    own = [shape[0] for name, shape in shapes.items() if _HEAD_WEIGHT.search(name)]
    labels = _plain_labels(checkpoint.source, checkpoint.weights)
    if not own:
        if not _classifies(checkpoint):
            raise UserError(
                f"{checkpoint.source}: expected a text classifier, found an adapter that has no "
                "output layer, nor has its base. Save it with modules_to_save: [classifier], or "
                "merge it."
            )
        return labels, {}
    if own[-1] != len(labels):
        labels = [f"LABEL_{number}" for number in range(own[-1])]
    options = {
        "head_seed": 0,
        "num_labels": own[-1],
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
        "ignore_mismatched_sizes": True,
    }
    return labels, options


def _recorded_settings(
    recorded: dict[str, Any], folder: Path, tokenizer: Any, model: Any
) -> TextSettings:
    """What `TextModel.save` noted, if the model can do it."""
    values = {name: value for name, value in recorded.items() if name != "targets"}
    data = checked(DataConfig, values, f"{folder / METADATA}: text")
    return replace(_settings(data, tokenizer, model), targets=recorded.get("targets"))


def _temperature(folder: Path, metadata: Metadata | None) -> float:
    found = 1.0 if metadata is None else metadata.temperature
    low, high = _TEMPERATURES
    if not isinstance(found, (int, float)) or not low <= found <= high:
        raise UserError(
            f"{folder / METADATA}: temperature: expected a number from {low:g} to {high:g}, found "
            f"{reprlib.repr(found)}. Correct it, or save or download the model again."
        )
    return float(found)


def _plain_labels(source: str, folder: Path) -> list[str]:
    from transformers import AutoConfig

    with loading(source, "a text encoder", folder):
        names = AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label
        return [names[index] for index in sorted(names)]


def _load_tokenizer(source: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with loading(source, "a text encoder", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its tokenizer has no padding token; expected a text encoder.")
    return tokenizer


def _longest(tokenizer: Any, positions: Any) -> int:
    """Tokens that a model takes at once."""
    for number in (positions, tokenizer.model_max_length):
        # A library writes 1e30 where it knows none.
        if not isinstance(number, int | float) or isinstance(number, bool) or not number >= 8:
            raise UserError(
                "the longest text (max_position_embeddings, model_max_length): expected a number "
                f"of tokens from 8, found {reprlib.repr(number)}. Correct the model's settings."
            )
    return int(min(positions, tokenizer.model_max_length))


def _settings(data: DataConfig, tokenizer: Any, model: Any) -> TextSettings:
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # these count positions from the padding id on
    limit = _longest(tokenizer, positions)
    if data.max_tokens is not None and data.max_tokens > limit:
        raise UserError(
            f"data.max_tokens: the backbone takes at most {limit} tokens, found {data.max_tokens}."
        )
    return TextSettings(
        max_tokens=data.max_tokens or min(limit, _LONGEST),
        long_texts=data.long_texts,
        window_overlap=data.window_overlap,
        max_windows=data.max_windows,
    )
