"""Whisper on CTranslate2: the fast engine on CPU, int8, started without torch.

A model is converted once, by CTranslate2's own converter unless it is bundled, and kept in the
cache folder under the digest of every file that it depends on. A source that decodes short contexts
with an adapter becomes two models: the adapted one for short contexts, the source itself for longer
ones.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.cache import cache_path, is_whole, put, seal
from mmtransfer.errors import UserError
from mmtransfer.hub.bundled import PREFIX, get_bundle, weight_files
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.ctranslate2_files import merged, read_variables, write_variables
from mmtransfer.progress import track
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.contexts import (
    ADAPTED_CLIP_S,
    UNADAPTED_CONTEXT_S,
    WINDOW_S,
    own_context_s,
)
from mmtransfer.speech.engine import (
    DecodingOptions,
    Hypothesis,
    Word,
    align_words,
    choose_language,
    decode_tokens,
    token_limit,
)
from mmtransfer.speech.logmel import MEL_FRAMES_PER_SECOND, log_mel

logger = logging.getLogger(__name__)
_CONVERTER_VERSION = "6"  # raise it when what is written changes
PRECISIONS = ("int8", "float16", "float32")
"""What models are kept and computed in."""
_SETTINGS = "settings.json"
_GENERATION = ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id", "language")
_FRAME_S = 0.02
_BEAMS = 5  # fewer wrong words than greedy search, and than three, for little time
_LONG_BEAMS = 3  # as few in windows, where five take half as long again
_WORKERS = 4  # a large model gains more from cores than from batches side by side


def converted(checkpoint: Checkpoint, *, compute_type: str = "int8") -> Path:
    """Folder of a Whisper converted to CTranslate2; converted first if it is not there yet.

    Raises:
        UserError: no Whisper.
    """
    from filelock import FileLock

    key = "-".join([checkpoint.digest[:24], compute_type, f"v{_CONVERTER_VERSION}"])
    folder = cache_path("ctranslate2", version("ctranslate2"), key)
    if not is_whole(folder):
        with FileLock(f"{folder}.lock"):
            if not is_whole(folder):
                name = checkpoint.source
                logger.info("converting %s to CTranslate2 %s, once", name, compute_type)
                folder = put(folder, partial(_convert_and_seal, checkpoint, compute_type))
    return folder


def _convert_and_seal(checkpoint: Checkpoint, compute_type: str, folder: Path) -> None:
    convert = _convert_bundled if checkpoint.source.startswith(PREFIX) else _convert
    convert(checkpoint, compute_type, folder)
    seal(folder)


def _convert(checkpoint: Checkpoint, compute_type: str, folder: Path) -> None:
    import tempfile

    from ctranslate2.converters import TransformersConverter

    from mmtransfer.speech.whisper import load_speech_model

    class Loaded(TransformersConverter):  # type: ignore[misc]
        """Takes the model that is in memory; writing and loading it again would take longest."""

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            return model

        def load_tokenizer(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer

    # The language is chosen when the model is used.
    speech = load_speech_model(checkpoint, language="auto")
    models = {"full": speech.model}
    if speech.short is not None:
        models["short"] = speech.short.model
    tokenizer = speech.processor.tokenizer
    folder.mkdir(parents=True)
    for name, model in track(models.items(), f"converting {checkpoint.source}", total=len(models)):
        with tempfile.TemporaryDirectory() as plain:
            model.config.save_pretrained(plain)  # by which the converter finds the kind of model
            Loaded(plain).convert(str(folder / name), quantization=compute_type)
        _let_end_win(folder / name / "config.json", speech.model.config.eos_token_id)
    generation = speech.model.generation_config.to_dict()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    alone = replace(speech, short=None)
    values = {
        "generation": {name: generation.get(name) for name in _GENERATION},
        "start": speech.model.config.decoder_start_token_id,
        "before": tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        "positions": speech.model.config.max_target_positions,
        "bands": speech.model.config.num_mel_bins,
        "max_context_s": speech.max_context_s,
        "shortest_context_s": speech.shortest_context_s,
        "margin_s": speech.margin_s,
        "short_s": speech.short_s,
        "window_s": speech.window_s,
        "window_alone_s": alone.window_s,
        # What the model does alone, where the adapter does not know a language.
        "shortest_alone_s": alone.shortest_context_s,
        "short_alone_s": alone.short_s,
        "languages": speech.short.languages if speech.short is not None else None,
    }
    (folder / _SETTINGS).write_text(json.dumps(values), encoding="utf-8")


def _let_end_win(path: Path, end: int) -> None:
    """At the first step the end token may win: a clip of silence has the transcript ""."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    begin = settings.get("suppress_ids_begin") or []
    settings["suppress_ids_begin"] = [token for token in begin if token != end]
    path.write_text(json.dumps(settings), encoding="utf-8")


def _convert_bundled(checkpoint: Checkpoint, compute_type: str, folder: Path) -> None:
    """What `_convert` gives for a Whisper that is bundled, to the last bit, in a tenth of the time:
    its file is CTranslate2's already, and neither torch nor transformers is loaded.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    short = checkpoint.short
    assert short is not None  # every bundled Whisper has one
    config = read(checkpoint.folder / "config.json")
    generation = read(checkpoint.folder / "generation_config.json")
    extractor = read(checkpoint.folder / "processor_config.json")["feature_extractor"]
    lora = read(short.folder / "adapter_config.json")
    variables = read_variables(weight_files(get_bundle(checkpoint.source)))
    adapter = load_file(short.folder / "adapter_model.safetensors")
    models = {
        "full": variables,
        "short": merged(variables, adapter, lora["lora_alpha"] / lora["r"]),
    }
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    vocabulary = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=itemgetter(1))]
    settings = {
        "alignment_heads": generation["alignment_heads"],
        "lang_ids": sorted(generation.get("lang_to_id", {}).values()),
        "suppress_ids": generation["suppress_tokens"],
        "suppress_ids_begin": generation["begin_suppress_tokens"],
    }
    for name, model in track(models.items(), f"converting {checkpoint.source}", total=2):
        (folder / name).mkdir(parents=True)
        write_variables(folder / name / "model.bin", model, compute_type)
        for file, content in (("config.json", settings), ("vocabulary.json", vocabulary)):
            (folder / name / file).write_text(json.dumps(content), encoding="utf-8")
        _let_end_win(folder / name / "config.json", config["eos_token_id"])
    tokenizer.save(str(folder / "tokenizer.json"))
    longest = float(extractor["chunk_length"])
    short_s = ADAPTED_CLIP_S if short.longest_s is None else short.longest_s
    values = {
        "generation": {name: generation.get(name) for name in _GENERATION},
        "start": config["decoder_start_token_id"],
        "before": generation["prev_sot_token_id"],
        "positions": config["max_target_positions"],
        "bands": config["num_mel_bins"],
        "max_context_s": longest,
        "shortest_context_s": min(short.shortest_context_s, longest),
        "margin_s": short.margin_s,
        "short_s": short_s,
        "window_s": WINDOW_S,
        "window_alone_s": WINDOW_S,
        "shortest_alone_s": UNADAPTED_CONTEXT_S,
        "short_alone_s": WINDOW_S,
        "languages": short.languages,
    }
    (folder / _SETTINGS).write_text(json.dumps(values), encoding="utf-8")


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    """Loaded once, since each client of a server may have a prompt of its own."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def place_and_precision(device: str, precision: str | None) -> tuple[str, str]:
    """Where CTranslate2 computes, `cpu` or `cuda`, and in which precision there.

    Raises:
        UserError: a device that it does not find, or a precision that the device does not have; it
            would compute in another one and not say so.
    """
    import ctranslate2

    has_gpu = ctranslate2.get_cuda_device_count() > 0
    place = ("cuda" if has_gpu else "cpu") if device == "auto" else device
    if place not in ("cpu", "cuda"):
        raise UserError(
            f"device {device}: ctranslate2 runs on cpu and cuda. Use --engine transformers."
        )
    if place == "cuda" and not has_gpu:
        raise UserError(
            f"device {device}: ctranslate2 finds no GPU on this machine. Use auto or cpu."
        )
    precision = precision or ("float16" if place == "cuda" else "int8")
    supported = ctranslate2.get_supported_compute_types(place)
    if precision not in supported:
        known = ", ".join(sorted(set(PRECISIONS) & set(supported)))
        raise UserError(
            f"precision {precision}: this machine's {place} does not compute in it. Use {known}."
        )
    return place, precision


class CTranslate2Whisper:
    """A converted Whisper.

    `threads` is the number of cores it may use. Small models gain most from batches side by side,
    one thread each.

    Raises:
        UserError: a model that cannot be used, or a language it does not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        language: str | None = None,
        options: DecodingOptions | None = None,
        compute_type: str | None = None,
        threads: int = 1,
        device: str = "cpu",
    ):
        self.device, self.precision = place_and_precision(device, compute_type)
        """`cpu` or `cuda`, and one of `PRECISIONS`."""
        self._folder = converted(checkpoint, compute_type=self.precision)
        self._settings = json.loads((self._folder / _SETTINGS).read_text(encoding="utf-8"))
        self.options = options or DecodingOptions()
        self.max_context_s = float(self._settings["max_context_s"])
        self._source = checkpoint.source
        self._speak(language, self.options.prompt)
        self.workers = max(1, min(threads, _WORKERS))
        self._model_options = {
            "device": self.device,
            "compute_type": self.precision,
            # One more than there are cores' worth of batches: a turn that is decoded as a whole
            # takes seconds, and a short segment is not to wait behind it.
            "inter_threads": self.workers + 1,
            "intra_threads": max(1, threads // self.workers),
        }
        self._models: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._model(self.shortest_context_s)  # loaded now, not when the first words are spoken

    @property
    def languages(self) -> list[str]:
        """ISO codes of the languages that the model has."""
        generation = self._settings["generation"]
        if not generation["is_multilingual"]:
            return ["en"]
        return sorted(token.strip("<|>") for token in generation["lang_to_id"])

    @property
    def own_language(self) -> str | None:
        """That of the checkpoint."""
        return self._settings["generation"].get("language")

    def speaking(self, language: str | None, prompt: str) -> CTranslate2Whisper:
        """The same model in another language (None: this one) and with another prompt."""
        other = copy(self)
        other._speak(language or self.language, prompt or self.options.prompt)
        return other

    def _speak(self, language: str | None, prompt: str) -> None:
        """Take up a language, with what the model does in it, and a prompt."""
        settings = self._settings
        self.language = choose_language(self._source, settings["generation"], language)
        self._taught = settings["languages"]
        if self._taught and (self.language or "en") not in [*self._taught, "auto"]:
            self._taught = None
        adapted = settings["languages"] is None or self._taught is not None
        own = "" if adapted else "alone_"
        shortest = "shortest_context_s" if adapted else "shortest_alone_s"
        self.shortest_context_s = float(settings[shortest])
        self.short_s = float(settings[f"short_{own}s"])
        self.window_s = float(settings[f"window_{own}s"])
        self.margin_s = float(settings["margin_s"]) if adapted else 0.0
        taught_s = min(self.short_s + self.margin_s, self.max_context_s)
        self._own_s = own_context_s(taught_s, self.max_context_s)
        self._before: list[int] = []
        if prompt:
            tokenizer = _tokenizer(str(self._folder / "tokenizer.json"))
            ids = tokenizer.encode(f" {prompt.strip()}", add_special_tokens=False).ids
            room = settings["positions"] // 2 - 1
            self._before = [settings["before"], *ids[-room:]]

    def _is_adapted(self, context_s: float) -> bool:
        """Whether an adapter decodes contexts of that length."""
        return bool(self._taught) and context_s < self._own_s

    def beams(self, context_s: float) -> int:
        """Hypotheses kept at each token in contexts of that length."""
        # Without an adapter short clips have long contexts, too, and a fine-tuned model has fewer
        # errors with five in windows as well.
        is_window = bool(self._taught) and not self._is_adapted(context_s)
        return self.options.beam_size or (_LONG_BEAMS if is_window else _BEAMS)

    def _model(self, context_s: float) -> Any:
        """The model that decodes contexts of that length, loaded when it is first needed."""
        name = "short" if self._is_adapted(context_s) else "full"
        with self._lock:
            if name not in self._models:
                import ctranslate2

                path = str(self._folder / name)
                self._models[name] = ctranslate2.models.Whisper(path, **self._model_options)
            return self._models[name]

    def _prompt(self, language: str | None) -> list[int]:
        """The decoder's first tokens, without the text before."""
        generation = self._settings["generation"]
        tokens = [self._settings["start"]]
        if generation["is_multilingual"]:
            tokens.append(generation["lang_to_id"][f"<|{language}|>"])
            tokens.append(generation["task_to_id"]["transcribe"])
        return [*tokens, generation["no_timestamps_token_id"]]

    def encode(self, clips: Sequence[np.ndarray], context_s: float) -> np.ndarray:
        """Encoder states [clip, frame, width] of 16-kHz float32 clips, each padded or cut to the
        context; 50 frames a second.
        """
        from ctranslate2 import StorageView

        model = self._model(context_s)
        features = log_mel(clips, context_s, bands=self._settings["bands"])
        # On CPU one by one: several windows' attention does not fit the processor's cache.
        size = len(features) if self.device == "cuda" else 1
        parts = [features[start : start + size] for start in range(0, len(features), size)]
        states = [np.asarray(model.encode(StorageView.from_array(p), to_cpu=True)) for p in parts]
        return np.concatenate(states)

    def decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        """Hypotheses of 16-kHz float32 clips, each padded or cut to the context."""
        from ctranslate2 import StorageView

        model = self._model(context_s)
        seconds = [min(len(clip) / SAMPLE_RATE, context_s) for clip in clips]
        timed = [index for index, long in enumerate(seconds) if long >= self.options.words_from_s]
        encoded = StorageView.from_array(self.encode(clips, context_s))
        languages: list[str | None] = [self.language] * len(clips)
        if self.language == "auto":
            languages = [found[0][0].strip("<|>") for found in model.detect_language(encoded)]
        bare = [self._prompt(language) for language in languages]
        prompts = [[*self._before, *prompt] for prompt in bare]
        room = self._settings["positions"] - len(prompts[0])
        limit = token_limit(max(len(clip) for clip in clips) / SAMPLE_RATE, room)
        results = model.generate(
            encoded,
            prompts,
            beam_size=self.beams(context_s),
            # CTranslate2 takes half of it, or what the prompt leaves of it where that is less.
            max_length=limit + max(limit, len(prompts[0]) - 1),
            return_scores=True,
            return_no_speech_prob=True,
        )
        silent = [result.no_speech_prob for result in results]
        if self._before:  # behind text before, silence looks like speech
            first = model.generate(
                encoded, bare, beam_size=1, max_length=2, return_no_speech_prob=True
            )
            silent = [result.no_speech_prob for result in first]
        timed = [index for index in timed if results[index].sequences_ids[0]]
        words = self._words(model, encoded, prompts, results, seconds, timed) if timed else {}
        hypotheses = []
        for index, result in enumerate(results):
            tokens, names = tuple(result.sequences_ids[0]), result.sequences[0]
            finished = len(tokens) < limit
            hypotheses.append(
                Hypothesis(
                    decode_tokens(names).strip(),
                    tokens,
                    # The score is the mean over the tokens without the end token.
                    result.scores[0] * len(tokens) / (len(tokens) + finished) if tokens else 0.0,
                    silent[index],
                    context_s,
                    finished,
                    languages[index],
                    words.get(index, ()),
                )
            )
        if self._is_adapted(context_s) and self.language == "auto":
            for index, language in enumerate(languages):
                if language not in self._taught:  # the adapter has not learnt it
                    hypotheses[index] = self.decode([clips[index]], self.max_context_s)[0]
        return hypotheses

    def _words(
        self,
        model: Any,
        encoded: Any,
        prompts: Sequence[list[int]],
        results: Sequence[Any],
        seconds: Sequence[float],
        chosen: Sequence[int],
    ) -> dict[int, tuple[Word, ...]]:
        """Words with times of the chosen clips; on a GPU those of one prompt together."""
        from ctranslate2 import StorageView

        states, words = np.asarray(encoded), {}
        groups: dict[Any, list[int]] = {}
        for index in chosen:
            # On CPU one by one: the probabilities of all tokens of several are much memory, and no
            # faster.
            group = tuple(prompts[index]) if self.device == "cuda" else index
            groups.setdefault(group, []).append(index)
        for own in groups.values():
            aligned = model.align(
                StorageView.from_array(states[own]),
                prompts[own[0]],
                [results[index].sequences_ids[0] for index in own],
                [max(2, round(seconds[index] * MEL_FRAMES_PER_SECOND)) for index in own],
            )
            for index, found in zip(own, aligned, strict=True):
                names = results[index].sequences[0]
                starts: dict[int, float] = {}
                for token, frame in found.alignments:
                    starts.setdefault(token, frame * _FRAME_S)
                end = _FRAME_S * (1 + max((frame for _, frame in found.alignments), default=0))
                times = [starts.get(number, end) for number in range(len(names))]
                words[index] = align_words(names, times, found.text_token_probs, end)
        return words
