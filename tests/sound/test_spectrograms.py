"""Audio Spectrogram Transformers: features, states, training in every way."""

import numpy as np
import pytest
import torch
from conftest import tone, write_dataset, write_media
from safetensors.torch import load_file

from mmtransfer import runs
from mmtransfer.config import DataConfig, HeadConfig, build_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.sound.classifier import load_sound_model, new_sound_model
from mmtransfer.transfer.encoders import SpectrogramEncoder, speech_encoder
from mmtransfer.transfer.filterbank import filterbank, frame_count

STAGES = {
    "frozen": [{"frozen": "all", "epochs": 2}],
    "partial": [{"frozen": 1}],
    "tuned": [{"frozen": "none"}],
    "lora": [{"frozen": "none", "adapter": {"type": "lora", "r": 2}}],
}
FRAMES = 128


def random_model(kind="ASTModel"):
    """Of two thin layers, for 1.3 seconds."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "num_mel_bins": 32, "max_length": FRAMES}
    model = getattr(transformers, kind)(transformers.ASTConfig(**sizes)).eval()
    for name, value in model.named_parameters():  # zero in what is not trained
        if name.endswith(("position_embeddings", "_token")):
            torch.nn.init.normal_(value)
    return model


def extractor():
    from transformers import ASTFeatureExtractor

    return ASTFeatureExtractor(num_mel_bins=32, max_length=FRAMES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random classifier of other sounds with its feature extractor, as a checkpoint."""
    folder = tmp_path_factory.mktemp("ast")
    random_model("ASTForAudioClassification").save_pretrained(folder)
    extractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tones and noise, shorter and longer than the input."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train", 4), ("validation", 2)):
        for index in range(count):
            seconds = 0.8 + 0.4 * index
            noise = rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
            sounds = {"tone": tone(seconds, hertz=100 * count + 50 * index), "noise": noise}
            for kind, samples in sounds.items():
                (folder / name / kind).mkdir(parents=True, exist_ok=True)
                write_media(folder / name / kind / f"{index}.wav", samples)
    return folder


def clips():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in (21_000, 16_000, 40_000, 700, 100)]


@pytest.mark.parametrize("bands", [32, 128])
@pytest.mark.parametrize("samples", [400, 559, 560, 16_000])
def test_log_mels_are_those_of_kaldi(bands, samples):
    from torchaudio.compliance.kaldi import fbank

    clip = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    expected = fbank(
        torch.from_numpy(clip)[None],
        sample_frequency=16_000,
        window_type="hanning",
        num_mel_bins=bands,
    )
    torch.testing.assert_close(filterbank(clip, bands), expected, atol=2e-3, rtol=1e-3)
    assert len(expected) == frame_count(samples)
    silence = fbank(torch.zeros(1, samples), window_type="hanning", num_mel_bins=bands)
    torch.testing.assert_close(filterbank(np.zeros(samples, np.float32), bands), silence)


@pytest.mark.parametrize("is_scaled", [True, False])
def test_inputs_are_those_of_the_models_own_extractor(is_scaled):
    found, long_enough = extractor(), clips()[:4]
    found.do_normalize = is_scaled
    expected = found(long_enough, sampling_rate=16_000, return_tensors="pt").input_values
    inputs = speech_encoder(random_model()).inputs(found, long_enough, 0)
    torch.testing.assert_close(inputs["features"].mT, expected, atol=2e-3, rtol=1e-3)


def test_states_are_those_of_transformers_from_every_layer_on():
    model = random_model()
    encoder = speech_encoder(model)
    assert isinstance(encoder, SpectrogramEncoder)
    inputs = encoder.inputs(extractor(), clips(), 0)
    with torch.inference_mode():
        plain = model(inputs["features"].mT, output_hidden_states=True)
        states = encoder.hidden_states([0, 1, 2], inputs)
        for start in (0, 1):
            again = encoder.hidden_states([2], {"hidden": states[start]}, start=start)[2]
            torch.testing.assert_close(again, states[2])
    bands, moments = model.embeddings.get_shape(model.config)
    # Here all bands of a moment stand together, there all moments of a band.
    order = [0, 1, *(2 + b * moments + t for t in range(moments) for b in range(bands))]
    torch.testing.assert_close(states[2], plain.last_hidden_state[:, order])
    torch.testing.assert_close(states[0], plain.hidden_states[0][:, order])
    torch.testing.assert_close(states[1], plain.hidden_states[1][:, order])


def test_the_patches_of_a_short_clip_come_first():
    encoder = speech_encoder(random_model())
    assert encoder.input_samples == 400 + (FRAMES - 1) * 160
    whole = encoder.frames(encoder.input_samples)
    assert (
        whole == encoder.hidden_states([0], encoder.inputs(extractor(), clips()[:1], 0))[0].shape[1]
    )
    assert encoder.frames(10**6) == whole
    short = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    features = encoder.inputs(extractor(), [short, np.zeros(0, np.float32)], 0)["features"]
    patches = encoder.enter({"features": features})
    differs = (patches[0] - patches[1]).abs().amax(-1) > 1e-6
    assert encoder.frames(8000) <= 2 + int(differs.sum()) < whole
    assert differs[2 : encoder.frames(8000)].all()


@pytest.mark.parametrize("kind", sorted(STAGES))
def test_a_run_trains_evaluates_saves_and_loads(kind, data, source, tmp_path):
    run = tmp_path / "run"
    config = {
        "task": "sound",
        "source_model": str(source),
        "run_dir": str(run),
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "window_seconds": 1.25,
        },
        "transfer": {"stages": STAGES[kind]},
        "train": {"epochs": 2, "batch_seconds": 8, "warmup_steps": 0},
        "evaluation": {"bootstrap_samples": 100},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    report = runs.train(build_config(config))
    scores = runs.evaluate(str(run), str(data / "validation"))
    assert scores["accuracy"] == report["target"]["after"]["accuracy"]
    assert resolve(str(run)).kind == "sound"
    [one] = load_sound_model(resolve(str(run))).predict([tone(3.0)])  # cut into windows
    assert set(one.probabilities) == {"noise", "tone"}
    prefix = "audio_spectrogram_transformer."
    before = {n.removeprefix(prefix): v for n, v in load_file(source / "model.safetensors").items()}
    after = load_file(run / "model" / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    first, upper = (f"encoder.layer.{n}.attention.attention.query.weight" for n in (0, 1))
    below = ("embeddings.", "encoder.layer.0.")
    if kind == "frozen":
        assert not changed
    elif kind == "partial":
        assert upper in changed
        assert not [name for name in changed if name.startswith(below)]
    elif kind == "tuned":
        assert {first, upper, "embeddings.position_embeddings", "layernorm.weight"} <= changed
    else:  # the matrices that an adapter sits in
        assert {first, upper} <= changed
        assert not [name for name in changed if "norm" in name or name.startswith("embeddings.")]


def test_windows_longer_than_the_input_are_cut_and_that_is_said(source, caplog):
    model = new_sound_model(
        resolve(str(source)),
        ["noise", "tone"],
        is_multi=False,
        data=DataConfig(window_seconds=5),
        head=HeadConfig(),
    )
    assert model.window_s == pytest.approx(1.295)
    assert "5 s is more than the encoder takes; clips are cut into windows of 1.29 s" in caplog.text
    assert model.windows(16_000) == [(0, 16_000)]
    assert model.windows(40_000)[-1] == (40_000 - 20_720, 40_000)


def test_it_is_no_encoder_of_speech(source, tmp_path):
    write_dataset(tmp_path / "train", ["ab", "ba"] * 4)
    config = {
        "task": "speech",
        "source_model": str(source),
        "run_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train"), "rehearsal": "none"},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    with pytest.raises(UserError, match=r"one of sounds .* task: sound"):
        runs.train(build_config(config))
