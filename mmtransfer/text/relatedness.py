"""What texts of a target and of source domains are like, and their features on a backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmtransfer.config import Config, HeadConfig
from mmtransfer.data.words import split_words
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.text.classifier import Encoded, TextModel, length_batches, new_text_model
from mmtransfer.text.examples import TextExample, label_names, read_texts
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.heads import pool
from mmtransfer.transfer.relatedness import Figure, draw, evenness
from mmtransfer.transfer.splits import training_data

TEXTS = 400
"""Most texts of a set that are looked at; with half of them distances order domains less well."""
TOKENS = 64
"""Tokens of each that pass the backbone."""

FIGURES = {
    "vocabulary_overlap": Figure(
        "vocabulary overlap",
        "share of the target's words that also occur among the set's",
        "grows with the number of texts; words of one form are one, whatever they mean",
        "Gururangan et al. 2020",
        True,
    ),
    "tokens_median": Figure(
        "tokens, median",
        "tokens of the median text",
        "as the source's tokenizer cuts them",
        "Sennrich et al. 2016",
    ),
    "cut": Figure(
        "cut texts",
        "share of texts longer than the backbone takes (data.max_tokens)",
        "whether the cut part matters it does not say",
        "Sun et al. 2019",
    ),
    "tokens_per_word": Figure(
        "tokens per word",
        "how many pieces the source's tokenizer cuts a word into; near 1 for what it was made for",
        "languages differ in it; compare sets of one language",
        "Rust et al. 2021",
    ),
    "unknown_tokens": Figure(
        "unknown tokens",
        "share of tokens that the source's vocabulary has no entry for",
        "tokenizers of bytes have none, however strange the text",
        "Sennrich et al. 2016",
    ),
    "balance": Figure(
        "class balance",
        "entropy of the classes over that of equally many of each: 1 is balanced",
        "says nothing of how hard the classes are to tell apart",
        "Shannon 1948; Pielou 1966",
    ),
}


class TextInputs:
    """Texts of a target and of source-domain sets, up to `TEXTS` of each drawn at random.

    Raises:
        UserError: unusable data, or one class only.
    """

    figures = FIGURES
    rows_are_labelled = False
    """Labels belong to whole texts."""

    def __init__(self, config: Config, source: Checkpoint, device: torch.device):
        self._config, self._device = config, device
        self._sets: dict[str, list[TextExample]] = {}
        self._words: dict[str, list[list[str]]] = {}
        """Of each text."""
        self._totals: dict[str, int] = {}
        target = read_texts(training_data(config), config.data, name="target")
        self._classes = label_names(target)
        self._add("target", target.examples)
        for name, path in config.data.source_domain.items():
            found = read_texts(path, config.data, name=name, split="validation")
            self._add(name, found.examples)

    def _add(self, name: str, examples: list[TextExample]) -> None:
        self._totals[name] = len(examples)
        drawn = draw(examples, TEXTS, self._config.runtime.seed)
        self._sets[name], self._words[name] = drawn, [split_words(one.text) for one in drawn]

    @property
    def samples(self) -> dict[str, str]:
        """How much of each set is looked at."""
        return {
            name: f"{len(found)} of {self._totals[name]} texts, {TOKENS} tokens of each"
            for name, found in self._sets.items()
        }

    @property
    def labelled_by(self) -> str:
        """What the labels are."""
        return f"classes ({', '.join(self._classes[:8])})"

    def labels(self) -> tuple[list[str], list[str]]:
        """Label of each of the target's texts, and what it belongs together with."""
        texts = self._sets["target"]
        groups = [text.group or f"text {number}" for number, text in enumerate(texts)]
        return [text.label for text in texts], groups

    def open(self, checkpoint: Checkpoint) -> TextModel:
        """A backbone, with a head that is not used.

        Raises:
            UserError: not a text encoder.
        """
        data, head = self._config.data, HeadConfig(type="classifier")
        return new_text_model(checkpoint, ["a", "b"], data=data, head=head)

    def features(self, text: TextModel, name: str) -> FeatureStore:
        """Mean-pooled states [1, layer, width] of a set's texts on every layer, from the cache
        where they are known.
        """
        encoder = text.network.encoder
        texts = self._sets[name]
        encoded = [
            Encoded((one.windows[0][:TOKENS],), (one.types[0][:TOKENS],) if one.types else None)
            for one in text.encode([t.text for t in texts], [t.target for t in texts])
        ]
        layers = list(range(encoder.depth + 1))
        key = cache_key(
            kind="relatedness",
            weights=weights_digest([encoder.base], encoder.base.config),
            items=[[row.tolist() for row in (*e.windows, *(e.types or ()))] for e in encoded],
        )
        device, budget = self._device, self._config.evaluation.batch_tokens
        text.network.to(device).eval()

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            for part in length_batches([encoded[row].tokens for row in rows], budget):
                chosen = [rows[position] for position in part]
                inputs, mask, _ = text.collate([encoded[row] for row in chosen])
                with torch.inference_mode():
                    moved = {name: value.to(device) for name, value in inputs.items()}
                    states = encoder.hidden_states(layers, moved)
                    pooled = [pool(states[n], mask.to(device), "mean") for n in layers]
                yield from zip(chosen, torch.stack(pooled, 1)[:, None].cpu().numpy(), strict=True)

        values = [len(layers) * encoder.width] * len(encoded)
        return cached_features(f"{name} texts", key, values, compute, dtype="float32")

    def describe(self, text: TextModel, name: str) -> dict[str, float | None]:
        """Figures of one set."""
        texts = self._sets[name]
        words = self._words[name]
        plain = [one.text for one in texts]
        ids = text.tokenizer(plain, add_special_tokens=False, verbose=False).input_ids
        lengths, unknown = [len(row) for row in ids], text.tokenizer.unk_token_id
        counts = Counter(one.label for one in texts)
        total = max(1, sum(lengths))
        special = text.tokenizer.num_special_tokens_to_add()
        room = text.settings.max_tokens - special
        return {
            "tokens_median": float(np.median(lengths)),
            "cut": float(np.mean([length > room for length in lengths])),
            "tokens_per_word": total / max(1, sum(map(len, words))),
            "unknown_tokens": sum(row.count(unknown) for row in ids) / total,
            "balance": evenness(list(counts.values()), len(self._classes)),
        }

    def describe_pair(self, name: str) -> dict[str, float | None]:
        """Figures of the target and another set."""
        known = {word for row in self._words[name] for word in row}
        words = [word for row in self._words["target"] for word in row]
        return {"vocabulary_overlap": sum(word in known for word in words) / max(1, len(words))}
