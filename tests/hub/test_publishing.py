"""Publishing and loading over HTTP, against a stand-in for the Hub.

The Hub's address is a variable of huggingface_hub, so whatever talks to it runs in a process of its
own, several models in each.
"""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    random_text_model,
    random_wave_model,
    tone,
    write_dataset,
    write_media,
    write_text_backbone,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.children import run_command
from support.hub_programs import OUTPUTS, TOKEN, commands, environment, python
from support.hub_server import Hub
from support.keys import write_keys

from mmtransfer.hub.card import card_errors
from mmtransfer.speech.clips import bundled_speech

WORDS = ["good", "bad", "fine", "awful", "harbour", "gate", "crane", "news", "today", "opened"]
TEXTS = ["good news today", "the crane is awful", "gate opened", "bad bad harbour news today fine"]

TRAIN = """
import json, sys
from mmtransfer import runs
from mmtransfer.config import build_config

for values in json.load(sys.stdin):
    runs.train(build_config(values))
"""

PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer, pipeline
import mmtransfer

texts = json.load(sys.stdin)
batch = AutoTokenizer.from_pretrained("user/adapter")(texts, padding=True, return_tensors="pt")
ours = mmtransfer.load("user/adapter").network.encoder.model
base = AutoModel.from_pretrained("someone/text", revision=sys.argv[1]).eval()
with torch.inference_mode():
    expected = ours(**batch).last_hidden_state
    before = base(**batch).last_hidden_state
    found = PeftModel.from_pretrained(base, "user/adapter").eval()(**batch).last_hidden_state
classify = pipeline("text-classification", model="user/native", top_k=None)
model = mmtransfer.load("user/native")
logits = model.encoded_logits(model.encode(texts, [None] * len(texts)), device="cpu")
shares = torch.from_numpy(logits).softmax(-1)
stock = pipeline("text-classification", model="user/stock", top_k=None)
calibrated = mmtransfer.load("user/stock").predict(texts)
json.dump({
    "distance": (found - expected).abs().max().item(),
    "moved": (before - expected).abs().max().item(),
    "pipeline": [{row["label"]: row["score"] for row in rows} for rows in classify(texts)],
    "ours": [dict(zip(model.labels, row.tolist())) for row in shares],
    "stock": [{row["label"]: row["score"] for row in rows} for rows in stock(texts)],
    "calibrated": [one.probabilities for one in calibrated],
}, sys.stdout)
"""

# Runs the Python of cards, each in a namespace of its own, where this package cannot be imported.
ALONE = """
import contextlib, io, json, sys, traceback

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "mmtransfer":
            raise ImportError("mmtransfer is not installed")

sys.meta_path.insert(0, Absent())
found = {}
for name, code in json.load(sys.stdin).items():
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        found[name] = out.getvalue()
    except BaseException:
        found[name] = traceback.format_exc()
json.dump(found, sys.stdout)
"""

OURS = """
import json, sys
import mmtransfer
from mmtransfer.speech.audio import decode_clip

names, recording = json.load(sys.stdin)
found = {}
for name in names:
    model = mmtransfer.load(f"user/{name}")
    if hasattr(model, "labels"):
        found[name] = model.predict(["A text."])[0].probabilities
    else:
        full = 30.0 if name.startswith("whisper") else None  # in the full window, as pipelines do
        clips = [decode_clip(recording)]
        found[name] = mmtransfer.Recognizer(model).transcribe(clips, context_s=full)[0].text
json.dump(found, sys.stdout)
"""

# What faster-whisper does with an export: its files, an int8 model of CTranslate2 on them, text.
FASTER = """
import json, sys
import ctranslate2
import mmtransfer
from huggingface_hub import snapshot_download
from mmtransfer.speech.audio import decode_clip
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

name, recording = json.load(sys.stdin)
folder = snapshot_download(name, allow_patterns="ct2/*") + "/ct2"
model = ctranslate2.models.Whisper(folder, compute_type="int8")
extractor = WhisperFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
samples = decode_clip(recording)
features = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
prompt = [tokenizer.token_to_id(f"<|{word}|>") for word in ("startoftranscript", "notimestamps")]
features = ctranslate2.StorageView.from_array(features)
[found] = model.generate(features, [prompt], beam_size=1)
loaded = mmtransfer.load(name)
ours = mmtransfer.Recognizer(loaded).transcribe([samples], context_s=30.0)[0].text
print(json.dumps([tokenizer.decode(found.sequences_ids[0]), ours]))
"""

# In the place of the program that transformers decodes files with.
FFMPEG = """#!{python}
import io, sys, wave
import numpy as np

with wave.open(io.BytesIO(sys.stdin.buffer.read())) as file:
    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
sys.stdout.buffer.write((samples / np.float32(32768)).astype("<f4").tobytes())
"""


@pytest.fixture(scope="module")
def hub():
    served = Hub(TOKEN)
    yield served
    served.close()
    assert not served.unserved


@pytest.fixture
def home(tmp_path):
    """A user's folder without any download in it."""
    return tmp_path / "home"


def outputs(models: list[Any], hub: Hub, home: Path) -> dict[str, Any]:
    """Outputs by name of (name, source, revision)."""
    return json.loads(python(OUTPUTS, {"models": models, "texts": TEXTS}, hub.endpoint, home))


def text_base(folder: Path, seed: int) -> Path:
    import torch

    write_text_backbone(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    model = random_text_model("bert", layers=2)
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def wave_base(folder: Path) -> Path:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    random_wave_model("wav2vec2").save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int, start: int = 0) -> str:
    rows = [
        json.dumps({"text": f"{word} {WORDS[4 + i % 5]} number {i}", "label": word})
        for i, word in ((i, WORDS[i % 3]) for i in range(start, start + count))
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


FORMS = {
    "full": ("full", {"preset": "end_to_end"}, {"layers": "all", "pooling": "attention"}),
    "native": ("full", {"preset": "end_to_end"}, {"type": "native"}),
    "stock": ("full", {"preset": "end_to_end"}, {"pooling": "first", "batch_norm": True}),
    "adapter": ("adapter", {"preset": "lora"}, {"batch_norm": True}),
    "head": ("head", {"preset": "feature"}, {"conv_layers": 1}),
    "whisper": ("full", {"preset": "end_to_end"}, {}),
    "whisper-adapter": ("adapter", {"preset": "lora"}, {}),
    "ctc": ("head", {"preset": "feature"}, {}),
}


def base_of(name: str) -> str:
    """What a form is trained from."""
    return {"ctc": "wave"}.get(name, "whisper" if name.startswith("whisper") else "text")


@pytest.fixture(scope="module")
def bases(hub, random_whisper, tmp_path_factory):
    """Commits of the bases on the stand-in: what transfers start from, and a later one."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "someone/text": hub.put("someone/text", text_base(folder / "text", 1)),
        "someone/whisper": hub.put("someone/whisper", random_whisper),
        "someone/wave": hub.put("someone/wave", wave_base(folder / "wave")),
    }


@pytest.fixture(scope="module")
def runs(hub, bases, tmp_path_factory):
    """Finished runs of every form, trained from the stand-in's bases, which change afterwards."""
    folder = tmp_path_factory.mktemp("machine")
    texts = {
        "train": write_texts(folder / "train.jsonl", 24),
        "validation": write_texts(folder / "validation.jsonl", 6, start=100),
    }
    speech = {
        "train": str(write_dataset(folder / "train", ["gate one", "go", "all clear", "stop"])),
        "validation": str(write_dataset(folder / "validation", ["gate", "clear"])),
        "rehearsal": "none",
    }
    wanted = []
    for name, (_, transfer, head) in FORMS.items():
        is_text = base_of(name) == "text"
        wanted.append(
            {
                "task": "sentiment" if is_text else "speech",
                "source_model": f"someone/{base_of(name)}",
                "run_dir": str(folder / "runs" / name),
                "data": texts if is_text else speech,
                "transfer": transfer,
                "head": head,
                "train": {
                    "steps": 4,
                    "learning_rate": 1e-2,
                    "warmup_steps": 1,
                    "batch_seconds": 6,
                    "full_context": 0.0,
                },
                "runtime": {"threads": 1, "device": "cpu"},
            }
        )
    python(TRAIN, wanted, hub.endpoint, folder / "home")
    hub.put("someone/text", text_base(folder / "later", 2))
    return folder / "runs"


@pytest.fixture(scope="module")
def published(hub, runs, tmp_path_factory):
    """Answers of publishing every form as user/FORM, `head` in public."""
    given = [
        [{}, ["publish", str(runs / name), f"user/{name}", *["--public"] * (name == "head")]]
        for name in FORMS
    ]
    home = tmp_path_factory.mktemp("publisher")
    return dict(zip(FORMS, commands(given, hub.endpoint, home), strict=True))


@pytest.fixture(scope="module")
def expected(hub, runs, tmp_path_factory):
    """Outputs of every run, from its folder."""
    models = [(name, str(runs / name), None) for name in FORMS]
    return outputs(models, hub, tmp_path_factory.mktemp("reader"))


def model_files(run: Path) -> dict[str, bytes]:
    model = run / "model"
    return {
        path.relative_to(model).as_posix(): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_run_is_published_in_one_commit_and_in_private_unless_told(hub, runs, published, name):
    code, out, err = published[name]
    assert (code, err.count("\n")) == (0, 1), err
    assert "the saved model gives what training recorded on" in err
    repository = hub.repositories[f"user/{name}"]
    _, commit = repository.commits  # the first is the Hub's own
    assert out == f"{hub.endpoint}/user/{name}/commit/{commit.oid}\n"
    sent = dict(commit.files)
    del sent[".gitattributes"]
    files = model_files(runs / name)
    card = files["README.md"].replace(b"path/or/id/of/this/model", f"user/{name}".encode())
    assert sent == files | {"README.md": card}
    assert repository.private == (name != "head")
    report = json.loads((runs / name / "report.json").read_text())
    assert report["form"] == FORMS[name][0]
    weights = {path for path in sent if path.endswith(".safetensors")}
    assert weights == commit.large
    assert ("model.safetensors" in weights) == (report["form"] == "full")


def test_a_published_model_gives_the_outputs_of_its_run(hub, published, expected, home):
    found = outputs([(name, f"user/{name}", None) for name in FORMS], hub, home)
    for name in FORMS:
        assert found[name] == expected[name], name
    assert len({outcome["logits"] for outcome in found.values()}) == len(FORMS)


def test_published_files_name_no_place_of_the_machine(hub, published, runs, tmp_path_factory):
    private = [str(tmp_path_factory.getbasetemp()), os.environ["MMTRANSFER_CACHE"], str(runs)]
    private += [str(Path.home() / ".cache"), "snapshots/", "models--", "127.0.0.1", TOKEN]
    for name in FORMS:
        for path, data in hub.repositories[f"user/{name}"].commits[-1].files.items():
            assert not [place for place in private if place.encode() in data], f"{name}/{path}"


def test_other_libraries_load_the_adapter_and_the_classifiers(hub, published, bases, home):
    found = json.loads(python(PLAIN, TEXTS, hub.endpoint, home, bases["someone/text"]))
    assert found["distance"] < 1e-4 < found["moved"]
    labels = set(WORDS[:3])
    for plain, ours in zip(found["pipeline"], found["ours"], strict=True):
        assert set(plain) == labels
        assert plain == pytest.approx(ours, abs=1e-5)
    for plain, ours in zip(found["stock"], found["calibrated"], strict=True):
        assert plain == pytest.approx(ours, abs=1e-5)


def card_of(hub: Hub, name: str) -> str:
    return hub.repositories[f"user/{name}"].commits[-1].files["README.md"].decode()


@pytest.mark.parametrize("name", FORMS)
def test_cards_say_what_the_model_is_and_how_sure_its_scores_are(hub, runs, published, name):
    text = card_of(hub, name)
    assert card_errors(text) == []
    data: Any = ModelCard(text).data
    report = json.loads((runs / name / "report.json").read_text())
    is_text, is_adapter = base_of(name) == "text", FORMS[name][0] == "adapter"
    assert data.base_model == f"someone/{base_of(name)}"
    assert data.base_model_relation == ("adapter" if is_adapter else "finetune")
    assert data.license == ("cc-by-4.0" if is_text else None)  # the base's
    own = "transformers" if name in ("native", "stock", "whisper") else "mmtransfer"
    assert data.library_name == ("peft" if is_adapter else own)
    after = report["target"]["after"]
    [first, *_] = data.eval_results
    assert first.metric_value == round(after[report["metric"]], 4)
    assert f"[{after['ci_low']:.4f}, {after['ci_high']:.4f}]" in first.metric_name
    for section in ("## Results", "## Use", "## Training", "## Intended use and limits"):
        assert f"\n{section}\n" in text
    assert ("expected calibration error" in text) == is_text
    assert ("ground in law" in text) == (not is_text)


@pytest.mark.slow  # transformers is imported anew, without what else is here
def test_the_python_of_each_card_runs_without_this_package(hub, published, home, tmp_path):
    recording = write_media(tmp_path / "recording.wav", tone(1.3, hertz=300))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text(FFMPEG.format(python=sys.executable))
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    codes = {name: re.findall(r"```python\n(.*?)```", card_of(hub, name), re.S) for name in FORMS}
    assert all("import mmtransfer" in own for _, own in codes.values())
    surroundings = environment(hub.endpoint, home)
    surroundings["PATH"] = f"{tmp_path / 'bin'}:{surroundings['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path,
        env=surroundings,
        input=json.dumps({name: first for name, (first, _) in codes.items()}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    answers = json.loads(python(OURS, [list(FORMS), str(recording)], hub.endpoint, home))
    for name, ours in answers.items():
        assert "Traceback" not in alone[name], alone[name]
        found = alone[name].strip()
        if isinstance(ours, str):  # of random weights, which rounding tips over after a while
            assert found[:60] == ours.strip()[:60], name
            continue
        found = ast.literal_eval(found)
        if isinstance(found, list):  # the pipeline's best class, without temperature
            assert found[0]["label"] == max(ours, key=ours.get)
        else:
            assert found == pytest.approx(ours, abs=1e-5), name


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, runs, home):
    hub.requests.clear()
    given = [[{}, ["publish", str(runs / "head"), "user/dry", "--dry-run"]]]
    ((code, out, err),) = commands(given, hub.endpoint, home)
    assert (code, err, hub.requests) == (0, "", [])
    listed, card = out.split("\n\n", 1)
    files = model_files(runs / "head")
    files["README.md"] = files["README.md"].replace(b"path/or/id/of/this/model", b"user/dry")
    sizes = {path: len(data) for path, data in files.items()}
    assert listed.splitlines() == [f"{path} {size}" for path, size in sorted(sizes.items())]
    assert card == files["README.md"].decode()


def test_a_revision_gives_the_model_of_that_commit(hub, bases, runs, expected, home, tmp_path):
    # The second form leaves files of the first one behind unless they are taken away: an adapter
    # beside a whole model would be put into it by transformers.
    given = [[{}, ["publish", str(runs / name), "user/moving"]] for name in ("adapter", "native")]
    given.append(given[-1])
    answers = commands(given, hub.endpoint, home)
    assert [code for code, _, _ in answers] == [0, 0, 0], answers
    _, first, second = hub.repositories["user/moving"].commits  # what did not change is no commit
    assert answers[2][1] == answers[1][1] == f"{hub.endpoint}/user/moving/commit/{second.oid}\n"
    assert {*second.files} == {*model_files(runs / "native"), ".gitattributes"}

    hub.requests.clear()
    models = [("adapter", "user/moving", first.oid), ("native", "user/moving", None)]
    found = outputs(models, hub, tmp_path / "reader")
    assert found == {name: expected[name] for name in ("adapter", "native")}
    assert hub.revisions("user/moving") == [first.oid, second.oid]
    assert hub.revisions("someone/text") == [bases["someone/text"]]
    # Asked once, so that a commit in between does not give parts of two.
    asked = [path for _, path in hub.requests if path.startswith("/api/models/user/moving/rev")]
    assert asked == ["/api/models/user/moving/revision/main"]


def test_every_verb_asks_for_the_newest_commit_once(hub, published, home, tmp_path):
    data = write_texts(tmp_path / "texts.jsonl", 6)
    hub.requests.clear()
    verbs = (["predict", "user/head", "--text", "x"], ["evaluate", "user/head", "--data", data])
    answers = commands([[{}, list(verb)] for verb in verbs], hub.endpoint, home)
    assert [code for code, _, _ in answers] == [0, 0], answers
    asked = [path for _, path in hub.requests if path.startswith("/api/models/user/head/rev")]
    assert asked == 2 * ["/api/models/user/head/revision/main"]


def copy_run(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def change_metadata(run: Path, **values) -> Path:
    path = run / "model" / "mmtransfer.json"
    metadata = json.loads(path.read_text())
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (metadata[section] if section else metadata)[name] = value
    path.write_text(json.dumps(metadata))
    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def refused(answer: list[Any], *, notes: int = 0) -> str:
    """The message of a command that failed as input that cannot be used; so many lines on its way
    come before.
    """
    code, out, err = answer
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 + notes, err
    last = err.splitlines()[-1]
    assert last.startswith("mmtransfer: error: ")
    return last


def scale_weights(path: Path, name: str) -> None:
    """Make one of a file's tensors half as large again."""
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_cannot_be_published_is_told_in_one_line(hub, runs, published, tmp_path, home):
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    head = runs / "head"
    licence = copy_run(head, tmp_path / "licence")
    card = licence / "model" / "README.md"
    card.write_text(card.read_text().replace("cc-by-4.0", "nonsense", 1))
    broken = copy_run(head, tmp_path / "broken")
    card = broken / "model" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\ntags: [a\nb: }\n", 1))
    placeless = change_metadata(copy_run(head, tmp_path / "placeless"), base__model_id=None)
    bare = copy_run(head, tmp_path / "bare")
    (bare / "model" / "README.md").unlink()
    wrong = {"HF_TOKEN": "hf_of_someone_else"}
    spoilt = {}
    for name, file, tensor in (
        ("head", "head", "output.weight"),
        ("adapter", "head", "output.weight"),
        ("whisper", "model", "model.decoder.layer_norm.weight"),
        ("ctc", "head", "output.weight"),
    ):
        spoilt[name] = copy_run(runs / name, tmp_path / f"spoilt-{name}")
        scale_weights(spoilt[name] / "model" / f"{file}.safetensors", tensor)
    other = "do not give what training recorded"
    cases = [
        *((run, "user/new", other, {}) for run in spoilt.values()),
        (tmp_path / "none", "user/new", "expected the folder of a finished run", {}),
        (tmp_path / "unfinished", "user/new", "expected the folder of a finished run", {}),
        (head, "user/new/model", "Expected USER/NAME", {}),
        (head, "user/bad--name", "Expected USER/NAME", {}),
        (head, "nobody", "Expected USER/NAME", {}),
        (licence, "user/new", '"license" must be one of', {}),
        (broken, "user/new", "not a model card", {}),
        (bare, "user/new", "not a model card", {}),
        (placeless, "user/new", "transfer.merge_adapter: true", {}),
        (head, "user/full", "public", {}),
        (head, "user/new", "Invalid credentials", wrong),
    ]
    before = {name: len(found.commits) for name, found in hub.repositories.items()}
    given = [
        [env, ["publish", str(run), repo_id, *["--public"] * (repo_id == "user/full")]]
        for run, repo_id, _, env in cases
    ]
    older = copy_run(head, tmp_path / "older")
    (older / "sample.safetensors").unlink()
    given.append([{}, ["publish", str(older), "user/head"]])
    answers = commands(given, hub.endpoint, home)
    for (_, repo_id, reason, _), answer in zip(cases, answers[:-1], strict=True):
        is_sent = reason in ("public", "Invalid credentials")
        assert reason in refused(answer, notes=int(is_sent)), repo_id
    # Public from before: not sent where the world can see it unless that is asked for.
    assert "--public" in refused(answers[-1], notes=1)
    assert "was not checked, since the run keeps no sample" in answers[-1][2]
    assert before == {name: len(found.commits) for name, found in hub.repositories.items()}


def test_what_cannot_be_loaded_is_told_in_one_line(hub, runs, bases, published, tmp_path, home):
    later = hub.repositories["someone/text"].commits[-1].oid
    assert later != bases["someone/text"]
    other = change_metadata(copy_run(runs / "adapter", tmp_path / "other"), base__revision=later)
    gone = change_metadata(copy_run(runs / "head", tmp_path / "gone"), base__revision="0" * 40)
    newer = change_metadata(copy_run(runs / "head", tmp_path / "newer"), format=99)
    partial = change_metadata(copy_run(runs / "head", tmp_path / "partial"), base={"place": "x"})
    head = copy_run(runs / "head", tmp_path / "head")
    cut(head / "model" / "head.safetensors")
    adapter = copy_run(runs / "adapter", tmp_path / "adapter")
    cut(adapter / "model" / "adapter_model.safetensors")
    headless = copy_run(runs / "full", tmp_path / "headless")
    (headless / "model" / "head.safetensors").unlink()
    cases = [
        ("user/nothing", "Repository Not Found", {}),
        (other, "its weights are not those this model was trained on", {}),
        (gone, "someone/text: cannot be downloaded", {}),
        (newer, "format 99 is newer", {}),
        (partial, "mmtransfer.json: damaged", {}),
        (head, "head.safetensors: cannot be loaded", {}),
        (adapter, "cannot be loaded as an adapter", {}),
        (headless, "head.safetensors: cannot be loaded", {}),
        ("user/adapter", "cannot be downloaded", {"HF_TOKEN": "hf_of_someone_else"}),
        ("user/adapter", "Repository Not Found", {"HF_TOKEN": ""}),  # it is private
    ]
    given = [[env, ["predict", str(source), "--text", "good"]] for source, _, env in cases]
    for (source, reason, _), answer in zip(cases, commands(given, hub.endpoint, home), strict=True):
        assert reason in refused(answer), source


def test_a_hub_that_does_not_answer_is_told_in_one_line(runs, home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [
        [{}, ["publish", str(runs / "native"), "user/new"]],
        [{}, ["predict", "user/head", "--text", "good"]],
    ]
    publishing, loading = commands(given, f"http://127.0.0.1:{port}", home)
    assert "user/new: the Hub did not take the model" in refused(publishing, notes=5)
    assert "user/head: cannot be downloaded from the Hub" in refused(loading)


def test_the_exit_code_reaches_the_shell(runs, hub, home):
    surroundings = environment(hub.endpoint, home)
    assert refused(list(run_command("publish", runs / "head", "nobody", environment=surroundings)))


def test_a_signed_run_is_verified_from_the_hub(hub, runs, home, tmp_path):
    (ours, public), (_, other) = (write_keys(tmp_path, name) for name in ("maker", "other"))
    predict = ["predict", "user/signed", "--text", "good", "--verify"]
    given = [
        ["publish", str(runs / "head"), "user/signed", "--sign", ours],
        [*predict, public],
        [*predict, other],
        ["predict", "someone/text", "--text", "good", "--verify", public],
    ]
    answers = commands([[{}, argv] for argv in given], hub.endpoint, home)
    assert [code for code, _, _ in answers] == [0, 0, 2, 2], answers
    sent = hub.repositories["user/signed"].commits[-1].files
    assert set(sent) == {*model_files(runs / "head"), ".gitattributes", "model.sig"}
    assert "not signed by" in answers[2][2]
    assert "expected a signature (model.sig), found none" in answers[3][2]


@pytest.mark.slow
def test_an_export_to_ctranslate2_is_published_whole_and_gives_the_text(
    hub, whisper_tiny, home, tmp_path
):
    from model_signing import hashing, verifying  # a second, which no other test needs

    run = tmp_path / "run"
    shutil.copytree(whisper_tiny, run / "model")
    (run / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A Whisper\n")
    (run / "report.json").write_text("{}")
    private, public = write_keys(tmp_path, "maker")
    argv = ["publish", str(run), "user/exported", "--export", "ct2", "--sign", private]
    ((code, _, err),) = commands([[{}, argv]], hub.endpoint, home)
    assert code == 0, err
    sent = hub.repositories["user/exported"].commits[-1].files
    names = ("model.bin", "config.json", "tokenizer.json", "preprocessor_config.json", "model.sig")
    assert {f"ct2/{name}" for name in names} < set(sent)
    card = sent["README.md"].decode()
    assert "## CTranslate2 for faster-whisper, " in card
    assert 'snapshot_download("user/exported", allow_patterns="ct2/*")' in card
    folder = bundled_speech("en")
    assert folder is not None
    recording = sorted(folder.glob("*.ogg"))[1]  # one of those that it was compared on
    answer = python(FASTER, ["user/exported", str(recording)], hub.endpoint, home)
    found, expected = json.loads(answer.splitlines()[-1])
    assert found.strip() == expected.strip() != ""
    folder = tmp_path / "ct2"
    folder.mkdir()
    for name, data in sent.items():
        if name.startswith("ct2/"):
            (tmp_path / name).write_bytes(data)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public)
    hashes = hashing.Config().set_ignored_paths(paths=["model.sig"])
    config.set_hashing_config(hashes).verify(folder, folder / "model.sig")
