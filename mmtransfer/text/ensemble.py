"""Several text classifiers in one: the weighted mean of their probabilities.

The members lie in folders of their own inside the model's, each in the form it was trained in.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.files import METADATA
from mmtransfer.hub.metadata import damaged, write_metadata
from mmtransfer.text.classifier import Encoded, TextModel, load_text_model

_STEPS = 300


@dataclass(frozen=True)
class _Several(Encoded):
    """A text as each member takes it."""

    each: tuple[Encoded, ...] = ()


@dataclass
class TextEnsemble(TextModel):
    """Text classifiers of the same classes whose probabilities are averaged. Its logits are the
    logarithm of that mean.
    """

    members: Sequence[TextModel] = ()
    weights: Sequence[float] = ()
    """Of each member; they sum to 1."""

    def encode(self, texts: Sequence[str], targets: Sequence[str | None]) -> list[Encoded]:
        """Tokenise texts for each member."""
        columns = [member.encode(texts, targets) for member in self.members]
        return [
            _Several(own[0].windows, own[0].types, all(one.is_cut for one in own), own)
            for own in zip(*columns, strict=True)
        ]

    def encoded_logits(
        self, encoded: Sequence[Encoded], *, device: torch.device | str, batch_tokens: int = 8192
    ) -> np.ndarray:
        """Logarithm of the mean probabilities [text, class]."""
        found = member_probabilities(
            self.members,
            [
                [text.each[number] for text in encoded if isinstance(text, _Several)]
                for number in range(len(self.members))
            ],
            device,
            batch_tokens,
        )
        mean = np.tensordot(np.asarray(self.weights), found, 1)
        return np.log(np.maximum(mean, 1e-30)).astype(np.float32)

    def save(self, folder: Path, form: str, adapted: Any = None) -> None:
        """Not in one file.

        Raises:
            UserError: always; it is a source of no transfer.
        """
        raise UserError(f"{self.source}: an ensemble cannot be trained further; train a member.")


def member_probabilities(
    members: Sequence[TextModel],
    encoded: Sequence[Sequence[Encoded]],
    device: torch.device | str,
    batch_tokens: int,
) -> np.ndarray:
    """Calibrated probabilities [member, text, class]."""
    return np.stack(
        [
            member.probabilities(
                member.encoded_logits(own, device=device, batch_tokens=batch_tokens)
            )
            for member, own in zip(members, encoded, strict=True)
        ]
    )


def fit_weights(probabilities: np.ndarray, targets: np.ndarray) -> list[float]:
    """Weights of members that make the classes [text] most likely under the mean of their
    probabilities [member, text, class] (Breiman 1996, stacking with weights that sum to 1).
    """
    chosen = torch.from_numpy(probabilities[:, np.arange(len(targets)), targets]).double()
    # Expectation maximisation: the likelihood of a mixture never falls, and has one maximum.
    weights = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
    for _ in range(_STEPS):
        shares = weights[:, None] * chosen + 1e-300
        weights = (shares / shares.sum(0)).mean(1)
    return [float(weight) for weight in weights]


def write_ensemble(
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    members: Sequence[TextModel],
    weights: list[float],
) -> None:
    """Write an ensemble with its members."""
    folder.mkdir(parents=True)
    for number, found in enumerate(checkpoints):
        own = folder / f"member-{number}"
        own.mkdir()
        for path in found.folder.iterdir():
            if path.is_file() and path.name != "README.md":
                shutil.copyfile(path, own / path.name)
    first = checkpoints[0]
    shutil.copyfile(first.weights / "config.json", folder / "config.json")
    write_metadata(
        folder,
        task="sentiment",
        form="full",
        base=None,
        labels=members[0].labels,
        text=asdict(members[0].settings),
        temperature=1.0,
        members=len(checkpoints),
        weights=weights,
    )


def is_ensemble(checkpoint: Checkpoint) -> bool:
    """Whether a model is one."""
    return checkpoint.metadata is not None and "members" in checkpoint.metadata.own


def load_ensemble(checkpoint: Checkpoint) -> TextEnsemble:
    """Load an ensemble and its members.

    Raises:
        UserError: a member that is missing or has other classes; weights that are none.
    """
    path = checkpoint.folder / METADATA
    own = checkpoint.metadata.own if checkpoint.metadata is not None else {}
    count, weights = own.get("members"), own.get("weights")
    if not isinstance(count, int) or not isinstance(weights, list) or len(weights) != count:
        raise damaged(path)
    if not all(isinstance(w, float) and 0 <= w <= 1 for w in weights) or count < 1:
        raise damaged(path)
    members = []
    for number in range(count):
        found = resolve(str(checkpoint.folder / f"member-{number}"))
        if found.kind != "sentiment" or is_ensemble(found):
            raise damaged(path)
        members.append(load_text_model(found))
    first = members[0]
    if any(member.labels != first.labels for member in members):
        raise damaged(path)
    networks: Any = nn.ModuleList([member.network for member in members])
    return TextEnsemble(
        network=networks,
        tokenizer=first.tokenizer,
        labels=first.labels,
        settings=first.settings,
        base=first.base,
        source=checkpoint.source,
        members=members,
        weights=weights,
    )
