"""Speech recognisers that spell characters frame by frame (CTC) on a frozen or tuned encoder."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer.config import HeadConfig, checked
from mmtransfer.data.languages import read_language
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.files import METADATA
from mmtransfer.hub.loading import load_weights, loading
from mmtransfer.hub.metadata import Base, Metadata, damaged, write_metadata
from mmtransfer.progress import no_library_bars
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.contexts import context_step_s
from mmtransfer.transfer.adapters import load_merged, save_adapter
from mmtransfer.transfer.encoders import SpeechEncoder, encoder_family, speech_encoder
from mmtransfer.transfer.heads import CtcHead
from mmtransfer.transfer.networks import Network, build_head, check_base, read_head, write_head

logger = logging.getLogger(__name__)
_BLANK, _UNKNOWN, _SPACE = "<pad>", "<unk>", "|"  # as in transformers' CTC vocabularies
LONGEST_S = 30.0
"""Longest clip of a CTC model."""
# Characters that a source's output layer is worth more than: a share of all, or as many in a small
# set.
_STRAY, _FEW_STRAYS = 0.01, 2
_SAME = dict.fromkeys("’‘ʼ`´", "'") | {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o"}


@dataclass
class CtcModel:
    """A speech encoder with an output layer over characters."""

    network: Network
    extractor: Any
    symbols: list[str]
    """Output symbols by number."""
    base: Base
    language: str | None = None
    source: str = ""
    """Name it was loaded by."""

    is_source_head: bool = False
    """Whether the output layer came with the source, so that the source can be scored."""
    max_context_s: float = LONGEST_S
    """Longest clip."""
    shortest_context_s: float = 0.0
    """A clip is read at its own length: that is how the head was trained."""
    margin_s: float = 0.0
    short_s: float = float("inf")
    window_s: float = 0.0
    """Characters are decoded frame by frame: what was spoken before a pause does not help."""

    @property
    def model(self) -> Network:
        """The network, under the name that Whisper models have for it."""
        return self.network

    def context_s(self, seconds: float, *, shortest: float | None = None) -> float:
        """Context in which a clip of that length is read: the next multiple of the grid."""
        return context_step_s(max(seconds, shortest or 0.0), self.max_context_s)

    def inputs(self, clips: Sequence[np.ndarray], context_s: float) -> dict[str, torch.Tensor]:
        """Encoder inputs of 16-kHz clips, each padded with silence to the context."""
        samples = round(context_s * SAMPLE_RATE)
        return self._encoder.inputs(self.extractor, clips, samples)

    @property
    def _encoder(self) -> SpeechEncoder:
        encoder = self.network.encoder
        if not isinstance(encoder, SpeechEncoder):
            raise TypeError("a CTC model stands on a speech encoder")
        return encoder

    def frames(self, seconds: float) -> int:
        """Output frames of a clip of that length."""
        return self._encoder.frames(round(seconds * SAMPLE_RATE))

    def mask(self, seconds: Sequence[float], context_s: float) -> torch.Tensor:
        """Which frames [clip, frame] of a context hold the clips."""
        total = self.frames(context_s)
        lengths = torch.tensor([min(self.frames(s), total) for s in seconds])
        return torch.arange(total)[None] < lengths[:, None]

    def spell(self, text: str) -> list[int]:
        """Symbol numbers of a transcript, each character as the alphabet has it (see `spelling`);
        others are `<unk>`, or left out where there is none. Where symbols are pieces of words, each
        is as long as can be.
        """
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        if any(symbol[0] == _SPACE and len(symbol) > 1 for symbol in self.symbols):
            return self._pieces(text, numbers)
        unknown = numbers.get(_UNKNOWN)
        spelt: dict[str, list[int]] = {}
        for character in set(text):
            found = spelling(character, numbers)
            if found is not None:
                spelt[character] = [numbers[symbol] for symbol in found]
            else:
                spelt[character] = [] if unknown is None else [unknown]
        space = numbers.get(_SPACE)
        words = ([n for c in word for n in spelt[c]] for word in _words(text, numbers))
        parts = [word for word in words if word]
        joined: list[int] = []
        for number, word in enumerate(parts):
            joined += [space] if number and space is not None else []
            joined += word
        return joined

    def _pieces(self, text: str, numbers: dict[str, int]) -> list[int]:
        spelt = {c: spelling(c, numbers) for c in set(text)}
        words = ["".join("".join(spelt[c] or []) for c in word) for word in _words(text, numbers)]
        rest = "".join(_SPACE + word for word in words if word)
        longest = max(map(len, self.symbols))
        found: list[int] = []
        while rest:
            lengths = range(min(longest, len(rest)), 0, -1)
            length = next((size for size in lengths if rest[:size] in numbers), 1)
            if rest[:length] in numbers:
                found.append(numbers[rest[:length]])
            rest = rest[length:]
        return found

    @property
    def blank(self) -> int:
        """Number of the blank."""
        return self.symbols.index(_BLANK)

    def read(self, numbers: Iterable[int]) -> tuple[str, tuple[int, ...]]:
        """Text and symbol numbers of a best path: repeats collapsed, blanks removed."""
        kept = tuple(number for number, _ in groupby(numbers) if number != self.blank)
        special = {n for n, s in enumerate(self.symbols) if len(s) > 2 and s[0] == "<"}
        text = "".join(self.symbols[number] for number in kept if number not in special)
        return " ".join(text.replace(_SPACE, " ").split()), kept

    # --- on disk ----------------------------------------------------------------------------

    def save(self, folder: Path, form: str, adapted: Any = None) -> None:
        """Write the model in a form of `networks`; `adapted` is the peft model of an adapter.

        A wave encoder with a plain output layer is written as the library's own CTC model.
        """
        head, encoder = self.network.head, self._encoder
        plain = form == "full" and self.is_plain
        with no_library_bars():
            if plain and isinstance(head, CtcHead):
                dropout = self.network.config.dropout
                model = encoder.put_together(head.output, self.blank, dropout)
                model.save_pretrained(folder)
            elif form == "full":
                encoder.model.save_pretrained(folder)
            elif form == "adapter":
                save_adapter(adapted, folder)
            self.extractor.save_pretrained(folder)
        if encoder.has_library_ctc:
            self._save_tokenizer(folder)
        if head is not None and not plain:
            write_head(folder, head)
        write_metadata(
            folder,
            task="ctc",
            form=form,
            base=self.base,
            symbols=self.symbols,
            language=self.language,
            head=self.network.config.model_dump(mode="json"),
        )

    @property
    def is_plain(self) -> bool:
        """Whether a full save is the library's own CTC model."""
        config, encoder = self.network.config, self._encoder
        is_last = self.network.layers == [encoder.depth]
        return encoder.has_library_ctc and is_last and not config.conv_layers

    def _save_tokenizer(self, folder: Path) -> None:
        from transformers import Wav2Vec2CTCTokenizer

        vocabulary = {symbol: number for number, symbol in enumerate(self.symbols)}
        path = folder / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        Wav2Vec2CTCTokenizer(
            str(path), pad_token=_BLANK, unk_token=_UNKNOWN, word_delimiter_token=_SPACE
        ).save_pretrained(folder)


def alphabet(transcripts: Iterable[str]) -> list[str]:
    """Symbols of a set of transcripts: blank, unknown, word delimiter, sorted characters."""
    characters = sorted({c for text in transcripts for c in text if not c.isspace()} - {_SPACE})
    return [_BLANK, _UNKNOWN, _SPACE, *characters]


def spelling(character: str, known: Container[str]) -> list[str] | None:
    """A character by symbols of an alphabet: as it is, in the other case, without its accents, or,
    if it is no letter or digit, as nothing; None where the alphabet cannot spell it.
    """
    if character in known:
        return [character]
    for other in (character.upper(), character.lower(), _SAME.get(character, "")):
        if other and all(part in known for part in other):
            return list(other)
    if not character.isalnum() and unicodedata.category(character)[0] != "M":
        return []  # not spoken
    bare = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    cased = [c if c in known else c.upper() if c.upper() in known else c.lower() for c in bare]
    return cased if cased != [character] and all(c in known for c in cased) else None


def _words(text: str, known: Container[str]) -> list[str]:
    """The words of a text; dashes that the alphabet does not have stand between words."""
    parted = "".join(
        " " if unicodedata.category(c) == "Pd" and c not in known and "-" not in known else c
        for c in text
    )
    return parted.split()


def new_ctc_model(
    checkpoint: Checkpoint,
    transcripts: Sequence[str],
    *,
    language: str | None = None,
    head: HeadConfig,
    seed: int = 0,
) -> CtcModel:
    """A source encoder with a new output layer over the transcripts' characters; or a source CTC
    model, whose own output layer is kept where its alphabet spells nearly all of them (see
    `spelling`). What becomes of the layer is logged.

    Raises:
        UserError: not a speech encoder.
    """
    source, symbols = checkpoint.source, alphabet(transcripts)
    if checkpoint.kind == "ctc" and (
        checkpoint.metadata is not None or _is_library_model(checkpoint)
    ):
        found = load_ctc_model(checkpoint)
        found.language = language or found.language
        found.base = Base(source, checkpoint.commit, None, "")
        wanted = head.model_dump(exclude={"dropout", "type"})
        same = wanted == found.network.config.model_dump(exclude={"dropout", "type"})
        if same and _can_spell(found, transcripts):
            found.is_source_head = True
            return found
        if not same:
            logger.info("%s: a new output layer, of the form that head asks for", source)
        encoder, extractor = found._encoder, found.extractor
        base = found.base
        language = found.language
    else:
        if checkpoint.form != "full":
            raise UserError(
                f"{source}: expected a whole model, found an adapter. Train it with "
                "transfer.merge_adapter: true, or name the model that it stands on."
            )
        encoder = speech_encoder(load_encoder(checkpoint))
        if encoder.input_samples is not None:
            raise UserError(
                f"{source}: expected a speech encoder, found one of sounds "
                f"({checkpoint.architecture}). Train it with task: sound."
            )
        extractor = load_extractor(source, checkpoint.folder)
        base = checkpoint.as_base()
    module = build_head("ctc", encoder.width, encoder.depth, len(symbols), head, seed)
    network = Network(encoder, module, head)
    return CtcModel(network, extractor, symbols, base, language, source)


def _can_spell(model: CtcModel, transcripts: Iterable[str]) -> bool:
    """Whether a model's alphabet spells all but a few stray characters; says which it does not."""
    known = set(model.symbols)
    counts = Counter(c for text in transcripts for c in text if not c.isspace())
    strays = Counter({c: n for c, n in counts.items() if spelling(c, known) is None})
    unspoken = {c for c in counts if spelling(c, known) == []}
    others = {c for c in counts if c not in known} - set(strays) - unspoken
    share = sum(strays.values()) / max(1, counts.total())
    shown = ", ".join(f"{c!r} ({n})" for c, n in strays.most_common(8))
    shown += f" and {len(strays) - 8} more" if len(strays) > 8 else ""
    if strays.total() > _FEW_STRAYS and share > _STRAY:
        logger.warning(
            "%s: a new output layer, since its alphabet does not spell %s: %.1f %% of the "
            "transcripts' characters",
            model.source,
            shown,
            100 * share,
        )
        return False
    changes = []
    if others:
        case = {spelling(c, known) == [c.swapcase()] for c in others} == {True}
        how = "in the case of its alphabet" if case else "with the nearest letters of its alphabet"
        changes.append(f"transcripts are spelt {how}")
    if unspoken:
        changes.append(f"{' '.join(sorted(unspoken)[:12])} left out")
    if strays:
        changes.append(f"not in its alphabet: {shown}")
    if changes:
        logger.warning("%s: its output layer is kept; %s", model.source, "; ".join(changes))
    return True


def _is_library_model(checkpoint: Checkpoint) -> bool:
    """Whether it is a CTC model of transformers, or a plain adapter of one."""
    is_whole = checkpoint.form == "full" or checkpoint.is_plain_adapter
    return is_whole and any(name.endswith("ForCTC") for name in checkpoint.classes)


def load_ctc_model(checkpoint: Checkpoint, *, language: str | None = None) -> CtcModel:
    """Load a CTC recogniser: a finished transfer in any form, or a plain checkpoint, of which
    `language` says what it recognises.

    Raises:
        UserError: no CTC model, or a language that is not the model's.
    """
    source, metadata = checkpoint.source, checkpoint.metadata
    known = metadata.language if metadata else None
    if language == "auto":
        raise UserError(
            f"{source}: a CTC model detects no language; name the one it recognises, or none."
        )
    if language is not None:
        language = read_language(language, f"{source}: language")
        if known is not None and language != known:
            raise UserError(
                f"{source}: recognises '{known}', but the language is set to '{language}'."
            )
    if _is_library_model(checkpoint):
        return _load_library_model(checkpoint, language)
    if metadata is None or metadata.task != "ctc" or checkpoint.is_plain_adapter:
        raise UserError(f"{source}: expected a CTC speech model.")
    return _load_transfer(checkpoint, metadata, language)


def _load_transfer(checkpoint: Checkpoint, metadata: Metadata, language: str | None) -> CtcModel:
    source, base = checkpoint.source, metadata.base
    if base is None or metadata.head is None or metadata.symbols is None:
        raise damaged(checkpoint.folder / METADATA)
    model = load_encoder(checkpoint)
    if checkpoint.recorded is not None:
        check_base(model, checkpoint.recorded)
    if checkpoint.adapter is not None:
        model = load_merged(model, checkpoint.adapter)
    encoder = speech_encoder(model)
    head = checked(HeadConfig, metadata.head, f"{checkpoint.folder / METADATA}: head")
    symbols = metadata.symbols
    module = build_head("ctc", encoder.width, encoder.depth, len(symbols), head, 0)
    read_head(checkpoint.folder, module)
    network = Network(encoder, module, head).eval()
    extractor = load_extractor(source, checkpoint.folder)
    return CtcModel(network, extractor, symbols, base, language or metadata.language, source)


def _load_library_model(checkpoint: Checkpoint, language: str | None) -> CtcModel:
    from transformers import AutoModelForCTC

    source, folder, metadata = checkpoint.source, checkpoint.weights, checkpoint.metadata
    with loading(source, "a CTC model", folder):
        model = load_weights(AutoModelForCTC, folder)
        if checkpoint.adapter is not None:
            model = load_merged(model, checkpoint.adapter)
        family = encoder_family(checkpoint.architecture)
        symbols = family.symbols(folder)
    blank = model.config.pad_token_id
    if blank is not None and blank < len(symbols):
        symbols[blank] = _BLANK  # some vocabularies name it [PAD]
    if _BLANK not in symbols or len(symbols) > model.config.vocab_size:
        raise UserError(f"{source}: its vocabulary has no blank, or does not fit the output layer.")
    bare, output, dropout = family.take_apart(model)
    encoder, head = family(bare), HeadConfig(type="ctc", dropout=dropout)
    outputs = len(output["weight"])
    symbols += [f"<unused{n}>" for n in range(len(symbols), outputs)]
    module = build_head("ctc", encoder.width, encoder.depth, outputs, head, 0)
    if isinstance(module, CtcHead):
        module.output.load_state_dict(output)
    network = Network(encoder, module, head).eval()
    base = (metadata.base if metadata else None) or checkpoint.as_base()
    known = metadata.language if metadata else None
    extractor = load_extractor(source, folder)
    return CtcModel(network, extractor, symbols, base, language or known, source)


def load_encoder(checkpoint: Checkpoint) -> Any:
    """The speech encoder of a checkpoint, of any family.

    Raises:
        UserError: no such encoder, or weights that do not fit it.
    """
    family = encoder_family(checkpoint.architecture)
    with loading(checkpoint.source, "a speech encoder", checkpoint.weights):
        return family.load(checkpoint.weights, checkpoint.classes)


def load_extractor(source: str, folder: Path) -> Any:
    """The feature extractor of a folder; `source` is for messages.

    Raises:
        UserError: none, or one that is not for 16 kHz.
    """
    from transformers import AutoFeatureExtractor

    with loading(source, "a speech model", folder):
        extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(f"{source}: expected a model for 16 kHz, found {extractor.sampling_rate}.")
    return extractor
