import json

import numpy as np
import pytest
import torch
from conftest import WAVE_ARCHITECTURES, tone, write_dataset, write_media, write_wave_backbone
from safetensors.torch import load_file

from mmtransfer import Recognizer, load, load_monitor, runs
from mmtransfer.cli import main
from mmtransfer.config import HeadConfig, build_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.speech.ctc import CtcModel, alphabet, new_ctc_model
from mmtransfer.speech.ctc_task import CtcTask
from mmtransfer.transfer.stages import set_dropout
from mmtransfer.transfer.task import Task

TEXTS = ["ab", "ba ab", "", "aab", "b", "a b", "bb", "ab ab"]
CPU = torch.device("cpu")
STAGES = {"end_to_end": [{}], "feature": [{"frozen": "all"}], "partial": [{"frozen": 1}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctc_data")
    write_dataset(folder / "train", TEXTS)
    write_dataset(folder / "validation", ["ab", "", "ba"])
    return folder


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves")
    return {kind: write_wave_backbone(folder / kind, kind) for kind in WAVE_ARCHITECTURES}


def values(data, backbone, run_dir, stages="feature", **sections):
    return {
        "source_model": str(backbone),
        "run_dir": str(run_dir),
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "rehearsal": "none",
        },
        "transfer": {"stages": STAGES[stages], **sections.pop("transfer", {})},
        "head": {"type": "ctc", **sections.pop("head", {})},
        "train": {
            "steps": 4,
            "learning_rate": 1e-3,
            "head_learning_rate": 1e-2,
            "warmup_steps": 1,
            "batch_seconds": 6,
            "evaluate_every": 2,
            **sections.pop("train", {}),
        },
        "runtime": {"threads": 1, "device": "cpu"},
        **sections,
    }


def make_task(data, backbone, **sections) -> Task:
    task = runs.set_up(build_config(values(data, backbone, "unused", **sections)), CPU)
    task.begin(task.stages[0], torch.device("cpu"))
    return task


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def clips():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 9_000, 23_500, 15_900)]


# --- alphabet ------------------------------------------------------------------------------------


def test_the_alphabet_is_the_targets_with_blank_unknown_and_space(waves):
    assert alphabet(["b a", "", "é"]) == ["<pad>", "<unk>", "|", "a", "b", "é"]
    model = new_ctc_model(resolve(str(waves["wav2vec2"])), ["ab c"], head=HeadConfig(type="ctc"))
    assert model.spell("a  cz") == [3, 2, 5, 1]
    text, symbols = model.read([0, 3, 3, 0, 3, 2, 2, 4, 1, 0])
    assert text == "aa b"
    assert symbols == (3, 3, 2, 4, 1)


# --- training ------------------------------------------------------------------------------------


QUICK = {("wav2vec2", "feature"), ("hubert", "end_to_end"), ("wavlm-stable", "end_to_end")}


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        pytest.param(kind, stages, marks=[] if (kind, stages) in QUICK else [pytest.mark.slow])
        for kind in WAVE_ARCHITECTURES
        for stages in ("end_to_end", "feature")
    ],
)
def test_wave_encoders_train_save_and_load_to_the_same_outputs(data, waves, tmp_path, kind, stages):
    run = tmp_path / "run"
    report = runs.train(build_config(values(data, waves[kind], run, stages)))
    assert report["target"]["before"] is None
    assert len(losses(run)) == 4
    model = load(str(run))
    found = Recognizer(model).transcribe(clips())
    again = Recognizer(load(str(run / "model"))).transcribe(clips())
    assert found == again
    # A folder of this machine is no public base, so even a frozen backbone is saved whole; a wave
    # encoder with a plain output layer is what transformers calls a CTC model.
    assert report["form"] == "full"
    assert report["loads_with_transformers"]
    from transformers import AutoModelForCTC, AutoProcessor

    plain = AutoModelForCTC.from_pretrained(run / "model").eval()
    assert isinstance(model, CtcModel)
    inputs = model.inputs(clips()[:1], 1.0)
    with torch.no_grad():
        expected = plain(inputs["values"]).logits
        torch.testing.assert_close(
            model.network(inputs, model.mask([1.0], 1.0)), expected, rtol=1e-4, atol=1e-5
        )
    processor = AutoProcessor.from_pretrained(run / "model")
    ids = torch.tensor([[0, 3, 3, 0, 2, 4]])
    assert processor.batch_decode(ids)[0] == model.read(ids[0].tolist())[0]
    scores = runs.evaluate(str(run), str(data / "validation"))
    assert scores["wer"] == pytest.approx(report["target"]["after"]["wer"])


def test_frozen_whisper_features_train_a_head_that_spells(data, random_whisper, tmp_path):
    head = {"conv_layers": 1, "layers": "all"}
    train = {"steps": 150, "evaluate_every": 50}
    config = values(data, random_whisper, tmp_path / "run", head=head, train=train)
    report = runs.train(build_config(config))
    found = losses(tmp_path / "run")
    assert np.mean(list(found.values())[-5:]) < 0.5 * found[1]
    assert report["stages"][0]["trained_parameters"] < 20_000
    before = load_file(random_whisper / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in after.items():
        assert torch.equal(value, before[f"model.encoder.{name}"]), name
    model = load(str(tmp_path / "run"))
    assert Recognizer(model).transcribe(clips()) == Recognizer(model).transcribe(clips())


def test_results_do_not_depend_on_the_batch(data, waves, tmp_path):
    for kind in ("wav2vec2", "wavlm-stable"):
        model = new_ctc_model(
            resolve(str(waves[kind])), TEXTS, head=HeadConfig(type="ctc", conv_layers=1)
        )
        model.network.eval()
        together = Recognizer(model).transcribe(clips())
        alone = [Recognizer(model).transcribe([clip])[0] for clip in clips()]
        assert [h.text for h in together] == [h.text for h in alone]
        np.testing.assert_allclose(
            [h.avg_logprob for h in together], [h.avg_logprob for h in alone], rtol=1e-3
        )


@pytest.mark.parametrize("stages", ["feature", "partial"])
def test_cached_activations_give_the_losses_of_the_whole_model(data, waves, stages):
    sections = {"head": {"layers": "all", "conv_layers": 1, "dropout": 0.0}}
    cached = make_task(
        data, waves["wav2vec2"], stages=stages, transfer={"cache_dtype": "float32"}, **sections
    )
    plain = make_task(
        data, waves["wav2vec2"], stages=stages, transfer={"cache": "none"}, **sections
    )
    for task in (cached, plain):
        task.train_mode()
        set_dropout([task.model], 0.0)
    plain.model.load_state_dict(cached.model.state_dict())
    device = torch.device("cpu")
    found = []
    for task in (cached, plain):
        total = sum(task.loss(m, device) for m in task.prepare(range(8), slice(None), 0))
        assert isinstance(total, torch.Tensor)
        total.backward()
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        found.append((float(total.detach()), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert len(found[0][1]) == len(found[1][1]) > 0
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_source_recogniser_keeps_its_output_layer_and_is_scored_before(data, waves, tmp_path):
    first = values(data, waves["hubert"], tmp_path / "first", "end_to_end", train={"steps": 2})
    runs.train(build_config(first))
    second = values(data, tmp_path / "first", tmp_path / "second", "end_to_end", head={})
    second["head"] = {}
    second["data"]["source_domain"] = {"old": str(data / "validation")}
    report = runs.train(build_config(second))
    assert report["target"]["before"] is not None
    assert report["source_domain"]["old"]["forgetting"] is not None


def test_a_clip_too_short_for_its_transcript_is_named_and_skipped(data, waves, tmp_path, caplog):
    folder = write_dataset(tmp_path / "set", ["ab", "aa" * 400, "b"])
    config = values(data, waves["wav2vec2"], tmp_path / "run")
    config["data"]["train"] = str(folder)
    task = runs.set_up(build_config(config), CPU)
    assert isinstance(task, CtcTask)
    assert len(task.train) == 2
    assert "clip1.wav (800 characters)" in caplog.text
    assert "more characters than the clip has frames" in caplog.text
    assert len(task.target.skipped) == 1


# --- the source's own output layer ---------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(waves, tmp_path_factory):
    """A CTC model whose alphabet is A to H."""
    folder = tmp_path_factory.mktemp("letters")
    model = new_ctc_model(
        resolve(str(waves["wav2vec2"])), ["ABCDEFGH' "], head=HeadConfig(type="ctc")
    )
    model.save(folder, "full")
    return str(folder)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["AB CD", "HGFE"], None),
        (["ab cd", "hgfe"], "in the case of its alphabet"),
        (["Ab, cd.", "Hé - g’fe?"], "with the nearest letters"),
        (["abcdefgh " * 40, "b7d x"], "not in its alphabet: '7' (1), 'x' (1)"),
    ],
)
def test_a_source_keeps_its_output_layer_where_its_alphabet_spells_the_target(
    letters, caplog, texts, said
):
    model = new_ctc_model(resolve(letters), texts, head=HeadConfig(type="ctc"))
    assert model.is_source_head
    assert model.symbols[3:] == ["'", *"ABCDEFGH"]
    lines = [r.getMessage() for r in caplog.records]
    assert (said is None and not lines) or said in lines[0]
    assert len(lines) <= 1


def test_a_target_that_the_alphabet_does_not_spell_gets_a_new_layer_and_it_is_said(letters, caplog):
    model = new_ctc_model(resolve(letters), ["abcd xyz", "привет"], head=HeadConfig(type="ctc"))
    assert not model.is_source_head
    assert "z" in model.symbols
    assert "a new output layer, since its alphabet does not spell" in caplog.text


def test_transcripts_are_spelt_by_the_alphabet(letters):
    model = new_ctc_model(resolve(letters), ["ab"], head=HeadConfig(type="ctc"))

    def spelt(text):
        return "".join(model.symbols[number] for number in model.spell(text))

    assert spelt("ab  cd") == "AB|CD"
    assert spelt("A-B, ’c’!") == "A|B|'C'"
    assert spelt("é ç – ,") == "E|C"
    assert spelt("a7b") == "A<unk>B"


def test_a_ctc_model_takes_no_language_that_is_not_its_own(letters, data, waves, tmp_path):
    with pytest.raises(UserError, match="detects no language"):
        load(letters, language="auto")
    with pytest.raises(UserError, match="expected a language"):
        load(letters, language="klingon")
    german = load(letters, language="German")
    assert isinstance(german, CtcModel)
    assert german.language == "de"
    model = new_ctc_model(
        resolve(str(waves["wav2vec2"])), ["ab"], language="en", head=HeadConfig(type="ctc")
    )
    model.save(tmp_path, "full")
    english = load(str(tmp_path), language="en-US")
    assert isinstance(english, CtcModel)
    assert english.language == "en"
    with pytest.raises(UserError, match="recognises 'en', but the language is set to 'de'"):
        load(str(tmp_path), language="de")


# --- augmentation over a frozen prefix -----------------------------------------------------------


@pytest.mark.parametrize("head", ["ctc", pytest.param("decoder", marks=pytest.mark.slow)])
def test_augmentation_over_a_cached_prefix_is_refused_or_done_in_views(
    data, random_whisper, tmp_path, head, capsys
):
    augment = {"speed": [0.9, 1.1], "spec_time_masks": 1}
    config = values(data, random_whisper, tmp_path / "a", augment=augment)
    config["head"] = {"type": head}
    with pytest.raises(UserError, match=r"transfer\.cached_views: 4"):
        runs.train(build_config(config))
    config["transfer"] |= {"cached_views": 2}
    runs.train(build_config(config | {"run_dir": str(tmp_path / "b")}))
    task = runs.set_up(build_config(config), CPU)
    task.begin(task.stages[0], torch.device("cpu"))
    task.train_mode()

    def first_inputs(epoch):
        micros = task.prepare([0], slice(None), epoch)
        return micros[0].inputs["stored"] if head == "ctc" else micros[0].features

    assert not torch.equal(first_inputs(0), first_inputs(1))
    assert torch.equal(first_inputs(0), first_inputs(2))
    config["transfer"] = {"stages": [{"frozen": "all"}], "cache": "none"}
    runs.train(build_config(config | {"run_dir": str(tmp_path / "c")}))


@pytest.mark.parametrize("head", ["ctc", "decoder"])
def test_views_of_clips_that_nothing_changes_are_one(data, random_whisper, head):
    config = values(data, random_whisper, data / "run", head={"type": head})
    config["transfer"] |= {"cached_views": 4}
    task = runs.set_up(build_config(config), CPU)
    task.begin(task.stages[0], CPU)
    first, later = (task.prepare([0], slice(None), epoch)[0] for epoch in (0, 3))
    if head == "ctc":
        assert torch.equal(first.inputs["stored"], later.inputs["stored"])
    else:
        assert torch.equal(first.features, later.features)


@pytest.mark.usefixtures("unmeasured")
def test_decoder_fine_tuning_on_cached_encoder_output(data, random_whisper, tmp_path):
    config = values(data, random_whisper, tmp_path / "run")
    config |= {"head": {"type": "decoder"}, "train": config["train"] | {"full_context": 0.5}}
    report = runs.train(build_config(config))
    assert report["form"] == "full"
    before = load_file(random_whisper / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.decoder.") for name in moved)


def test_cached_decoder_losses_equal_those_of_the_whole_whisper(data, random_whisper):
    head = {"type": "decoder"}
    train = {"full_context": 0.0, "timestamps": 0.0}
    found = []
    for transfer in ({"cache_dtype": "float32"}, {"cache": "none"}):
        for stages in ("feature", "partial"):
            task = make_task(
                data, random_whisper, stages=stages, transfer=transfer, head=head, train=train
            )
            task.train_mode()
            micros = [m for i in range(8) for m in task.prepare([i], slice(None), 0)]
            found.append([float(task.loss(m, torch.device("cpu")).detach()) for m in micros])
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-4)


@pytest.mark.usefixtures("unmeasured")
def test_a_whisper_adapter_alone_holds_the_change(data, random_whisper, tmp_path, capsys):
    config = values(data, random_whisper, tmp_path / "run")
    config |= {"head": {}, "transfer": {"preset": "lora", "merge_adapter": True}}
    report = runs.train(build_config(config))
    assert report["form"] == "full"
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(random_whisper / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("_proj." in name or ".fc" in name for name in moved)


# --- evaluate and monitor ------------------------------------------------------------------------


def test_a_ctc_model_monitors(data, waves, tmp_path, capsys):
    runs.train(build_config(values(data, waves["wav2vec2"], tmp_path / "run")))
    recording = write_media(tmp_path / "v.mp4", tone(2.0), video=True)
    monitor = load_monitor(str(tmp_path / "run"))
    list(monitor.transcribe(recording))
    assert monitor.stats.audio_s == pytest.approx(2.0, abs=0.1)
    capsys.readouterr()
    assert (
        main(["evaluate", str(tmp_path / "run"), "--data", str(data / "validation"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["clips"] == 3
