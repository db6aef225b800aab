"""Parakeet (FastConformer with CTC): from encoder and from whole checkpoint to text."""

import numpy as np
import pytest
import torch
from conftest import tone, write_dataset, write_media
from safetensors.torch import load_file

import mmtransfer
from mmtransfer import runs
from mmtransfer.config import build_config
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs.models import load
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.transfer.encoders import FastConformerEncoder, speech_encoder

TEXTS = ["ab c", "ba", "cab", "abc a", "bb a", "c ab"]
PIECES = ["<unk>", "▁", "a", "b", "c", "▁a", "▁ab", "ab", "▁ba", "▁c", "<pad>"]
STAGES = {
    "frozen": [{"frozen": "all", "epochs": 2}],
    "partial": [{"frozen": 1}],
    "end_to_end": [{"frozen": "none"}],
    "lora": [{"frozen": "none", "adapter": {"type": "lora", "r": 2}}],
}


def random_model():
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    torch.manual_seed(0)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
    }
    config = ParakeetCTCConfig(
        vocab_size=len(PIECES), pad_token_id=len(PIECES) - 1, encoder_config=encoder
    )
    return ParakeetForCTC(config).eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A random ParakeetForCTC with feature extractor and pieces, as a checkpoint."""
    from tokenizers import Tokenizer, models
    from transformers import ParakeetFeatureExtractor

    folder = tmp_path_factory.mktemp("parakeet")
    random_model().save_pretrained(folder)
    ParakeetFeatureExtractor().save_pretrained(folder)
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    Tokenizer(models.WordLevel(vocabulary, "<unk>")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A random ParakeetEncoder with its feature extractor, as a checkpoint."""
    from transformers import ParakeetFeatureExtractor

    folder = tmp_path_factory.mktemp("encoder")
    random_model().encoder.save_pretrained(folder)
    ParakeetFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "train", TEXTS)
    write_dataset(folder / "validation", ["ab", "c a", ""])
    return folder


def values(data, source, run, stages, **train):
    return {
        "source_model": str(source),
        "run_dir": str(run),
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "rehearsal": "none",
        },
        "transfer": {"stages": stages},
        "train": {"epochs": 2, "batch_seconds": 4, "warmup_steps": 0, **train},
        "runtime": {"threads": 1, "device": "cpu"},
    }


def clips():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 9_000, 23_500, 700)]


def test_states_are_those_of_transformers_from_every_layer_on(whole):
    from transformers import AutoFeatureExtractor

    model, extractor = random_model(), AutoFeatureExtractor.from_pretrained(whole)
    plain = extractor(clips(), sampling_rate=16_000, padding="longest", return_tensors="pt")
    encoder = speech_encoder(model.encoder)
    assert isinstance(encoder, FastConformerEncoder)
    with torch.inference_mode():
        expected = model.encoder(**plain).last_hidden_state
        states = encoder.hidden_states([0, 1, 2], encoder.inputs(extractor, clips(), 24_000))
        lengths = torch.tensor([encoder.frames(len(clip)) for clip in clips()])
        mask = torch.arange(encoder.frames(24_000))[None] < lengths[:, None]
        for start in (0, 1):
            part = {"hidden": states[start], "mask": mask}
            again = encoder.hidden_states([2], part, start=start)[2]
            torch.testing.assert_close(again[mask], states[2][mask])
    assert states[2].shape[1] == mask.shape[1]
    torch.testing.assert_close(states[2][mask], expected[:, : mask.shape[1]][mask])


@pytest.mark.parametrize("kind", sorted(STAGES))
def test_a_run_trains_evaluates_saves_loads_and_monitors(kind, data, bare, tmp_path):
    run = tmp_path / "run"
    report = runs.train(build_config(values(data, bare, run, STAGES[kind])))
    assert report["form"] == "full"
    assert report["model"]["max_context_s"] == 30
    scores = runs.evaluate(str(run), str(data / "validation"))
    assert scores["wer"] == pytest.approx(report["target"]["after"]["wer"])
    assert resolve(str(run)).kind == "ctc"
    before = load_file(bare / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    weights = [name for name in before if "running" not in name and "tracked" not in name]
    same = [name for name in weights if torch.equal(before[name], after[name])]
    first = [name for name in weights if name.startswith(("subsampling.", "layers.0."))]
    if kind == "frozen":
        assert same == weights
    elif kind == "partial":
        assert same == first
    elif kind == "end_to_end":
        assert not same
    else:  # the matrices that an adapter sits in
        assert {"layers.0.self_attn.q_proj.weight"} < set(weights) - set(same)
    found = Recognizer(load(str(run))).transcribe(clips())
    assert found == Recognizer(load(str(run / "model"))).transcribe(clips())
    video = write_media(tmp_path / "v.mp4", tone(2.0), video=True)
    assert list(mmtransfer.monitor(str(run), video)) == []  # a tone is no speech


def test_a_run_repeats_to_the_last_bit(data, bare, tmp_path):
    weights = []
    for name in ("a", "b"):
        runs.train(build_config(values(data, bare, tmp_path / name, STAGES["end_to_end"])))
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_whole_checkpoint_transcribes_as_transformers_does(whole):
    from transformers import AutoFeatureExtractor

    model, extractor = random_model(), AutoFeatureExtractor.from_pretrained(whole)
    plain = extractor(clips(), sampling_rate=16_000, padding="longest", return_tensors="pt")
    expected = []
    for row in model.generate(**plain):
        numbers = [int(n) for n, last in zip(row, [-1, *row[:-1]], strict=True) if n != last]
        text = "".join(PIECES[n] for n in numbers if PIECES[n] not in ("<pad>", "<unk>"))
        expected.append(" ".join(text.replace("▁", " ").split()))
    found = Recognizer(load(str(whole))).transcribe(clips())
    assert [hypothesis.text for hypothesis in found] == expected
    assert any(expected)


def test_its_own_pieces_are_learnt_where_they_spell_the_transcripts(whole, data, tmp_path):
    model = load(str(whole))
    assert isinstance(model, CtcModel)
    assert [PIECES[n] for n in model.spell("ab ba c aa")] == ["▁ab", "▁ba", "▁c", "▁a", "a"]
    assert model.read(model.spell("ab ba  c"))[0] == "ab ba c"
    config = values(data, whole, tmp_path / "run", STAGES["frozen"])
    report = runs.train(build_config(config))
    assert report["target"]["before"] is not None
    adapted = load(str(tmp_path / "run"))
    assert isinstance(adapted, CtcModel)
    assert adapted.symbols == model.symbols
