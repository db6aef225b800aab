"""Uploads to the stand-in for the Hub, with everything that goes wrong on the way: they continue or
end in one line, and the repository never shows half a model.
"""

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from support.children import Command
from support.hub_programs import COMMANDS, TOKEN, environment, python
from support.hub_server import SIGNATURE, Fault, Hub

# In the place of the check of a run: any files are sent. All else is the command line's.
UPLOADS = """
from pathlib import Path
import mmtransfer.runs.publishing as publishing
from mmtransfer.hub.publish import Destination, upload

def publish(folder, repo_id, *, private, revision, tag, message, pr, exports, sign, dry_run):
    paths = {p.name: p for p in Path(folder).iterdir()}
    message = {} if message is None else {"message": message}
    return upload(paths, Destination(repo_id, private, revision, tag, pr=pr, **message))

publishing.publish = publish
"""


@pytest.fixture(scope="module")
def hub():
    served = Hub(TOKEN)
    yield served
    served.close()
    assert not served.unserved


@pytest.fixture(autouse=True)
def _clean(hub):
    hub.faults.clear()
    hub.requests.clear()


def write_model(folder: Path, seed: str) -> Path:
    """A folder with two large files, which no other seed gives, and two small ones."""
    folder.mkdir(exist_ok=True, parents=True)
    for number in range(2):
        content = f"{seed} {number} ".encode() * 8_000
        (folder / f"model-{number}.safetensors").write_bytes(content[:80_000])
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def model(tmp_path, request):
    return write_model(tmp_path / "model", request.node.name)


def uploads(hub: Hub, home: Path, given: list[list[str]]) -> list[Any]:
    """(exit code, output, messages, waits in seconds) of several `mmtransfer publish`."""
    lines = [[{}, ["publish", *map(str, arguments)]] for arguments in given]
    answers = json.loads(python(UPLOADS + COMMANDS, lines, hub.endpoint, home))
    for _, out, err, _ in answers:
        assert TOKEN not in out + err
        assert SIGNATURE not in out + err
        assert "Traceback" not in err, err
    return [(code, out.strip(), err.strip(), waits) for code, out, err, waits in answers]


@pytest.fixture
def send(hub, model, tmp_path):
    """One upload of the model as `user/NAME`."""

    def run(name: str, *options: str) -> tuple[int, str, str, list[float]]:
        [answer] = uploads(hub, tmp_path / "home", [[str(model), f"user/{name}", *options]])
        return answer

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    found = dict(hub.repositories[f"user/{name}"].branches[branch][-1].files)
    del found[".gitattributes"]
    return found


COMMIT, INFO, OBJECT = "/{name}/commit/main$", "^/api/models/user/{name}$", "^/objects/{oid}"
PASSING: dict[str, dict[str, Any]] = {
    "409": {"method": "POST", "path": COMMIT, "status": 409},
    "429": {"method": "POST", "path": COMMIT, "status": 429, "headers": {"Retry-After": "7"}},
    "500": {"method": "POST", "path": COMMIT, "status": 500, "times": 2},
    "503-object": {"method": "PUT", "path": OBJECT, "status": 503},
    "502-preupload": {"method": "POST", "path": "/{name}/preupload/", "status": 502},
    "503-info": {"method": "GET", "path": INFO, "status": 503},
    "cut-object-0": {"method": "PUT", "path": OBJECT},
    "cut-object-middle": {"method": "PUT", "path": OBJECT, "body_bytes": 30_000},
    "cut-object-end": {"method": "PUT", "path": OBJECT, "body_bytes": 79_999},
    "cut-object-answer": {"method": "PUT", "path": OBJECT, "is_done": True},
    "cut-objects-often": {"method": "PUT", "path": OBJECT, "times": 14},
    "cut-commit-0": {"method": "POST", "path": COMMIT},
    "cut-commit-middle": {"method": "POST", "path": COMMIT, "body_bytes": 300},
    "cut-commit-answer": {"method": "POST", "path": COMMIT, "is_done": True},
}
LASTING: dict[str, tuple[str, dict[str, Any]]] = {
    "last-401": ("hf auth login", {"method": "POST", "path": COMMIT, "status": 401}),
    "last-403": ("token that may write", {"method": "POST", "path": COMMIT, "status": 403}),
    "last-404": ("may see", {"method": "POST", "path": "/{name}/preupload/", "status": 404}),
    "last-412": ("same command again", {"method": "POST", "path": COMMIT, "status": 412}),
    "last-429": (
        "asks to wait 4000 s",
        {"method": "POST", "path": COMMIT, "status": 429, "headers": {"Retry-After": "4000"}},
    ),
    "last-503": ("same command again", {"method": "POST", "path": COMMIT, "status": 503}),
    "last-507": ("no room left", {"method": "PUT", "path": OBJECT, "status": 507}),
    "last-cut": ("same command again", {"method": "PUT", "path": OBJECT, "body_bytes": 100}),
}


def fault_of(name: str, folder: Path, path: str, times: int = 1, **values: Any) -> Fault:
    """The fault of a case: only its own requests fail."""
    oid = hashlib.sha256((folder / "model-0.safetensors").read_bytes()).hexdigest()
    return Fault(path=path.format(name=name, oid=oid), times=times, **values)


@pytest.fixture(scope="module")
def failed(hub, tmp_path_factory):
    """By case: its folder, its fault, its answer, and the large files that are there then."""
    folder = tmp_path_factory.mktemp("uploads")
    cases = {name: {"times": 1} | values for name, values in PASSING.items()}
    cases |= {name: values | {"times": 99} for name, (_, values) in LASTING.items()}
    faults = {
        name: fault_of(name, write_model(folder / name, name), **values)
        for name, values in cases.items()
    }
    hub.faults[:] = faults.values()
    given = [[str(folder / name), f"user/{name}"] for name in cases]
    answers = uploads(hub, folder / "home", given)
    there = set(hub.objects)
    return {
        name: (folder / name, faults[name], answer, there)
        for name, answer in zip(cases, answers, strict=True)
    }


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_waited_for(hub, failed, name):
    folder, fault, (code, out, err, waits), _ = failed[name]
    assert code == 0, err
    assert fault.times == 0
    assert published(hub, name) == files(folder)
    _, commit = hub.repositories[f"user/{name}"].commits  # one, also if its answer was lost
    assert out == f"{hub.endpoint}/user/{name}/commit/{commit.oid}"
    if name == "429":
        assert waits == [7]


def test_faults_that_last_end_in_one_line_and_the_next_upload_continues(hub, failed, tmp_path):
    for name, (hint, _) in LASTING.items():
        _, fault, (code, out, err, _), _ = failed[name]
        assert (code, out) == (2, ""), name
        assert fault.times < 99
        assert err.splitlines()[-1].startswith(f"mmtransfer: error: user/{name}: the Hub did not")
        assert hint in err
        # Nothing of it shows: the one commit is the Hub's own.
        assert len(hub.repositories[f"user/{name}"].commits) == 1
    given = [[str(failed[name][0]), f"user/{name}"] for name in LASTING]
    for name, (code, _, err, _) in zip(LASTING, uploads(hub, tmp_path, given), strict=True):
        folder, _, _, there = failed[name]
        assert code == 0, err
        assert published(hub, name) == files(folder)
        assert not sent(hub) & there


def sent(hub: Hub) -> set[str]:
    """Large files that were sent since the log was cleared."""
    return {path.removeprefix("/objects/") for method, path in hub.requests if method == "PUT"}


def test_a_commit_that_comes_in_between_is_built_upon(hub, send, model):
    send("between")
    write_model(model, "second")
    repository = hub.repositories["user/between"]

    def other() -> None:
        last = repository.commits[-1]
        repository.add("Other", last.files | {"notes.md": b"kept"}, last.large)

    hub.faults.append(Fault("POST", "/commit/main$", 412, action=other))
    assert send("between")[0] == 0
    assert published(hub, "between") == files(model) | {"notes.md": b"kept"}


def test_a_killed_upload_leaves_nothing_and_continues_where_it_was(hub, send, model, tmp_path):
    given = [[{}, ["publish", str(model), "user/killed"]]]
    surroundings = environment(hub.endpoint, tmp_path / "home")
    with Command(program=UPLOADS + COMMANDS, environment=surroundings) as command:
        # With half of a large file sent.
        half = Fault("PUT", "^/objects/", body_bytes=40_000, action=command.kill)
        hub.faults.append(half)
        command.communicate(json.dumps(given))
        assert command.wait() == -signal.SIGKILL
    assert half.times == 0
    assert len(hub.repositories["user/killed"].commits) == 1
    there = set(hub.objects)
    hub.requests.clear()
    assert send("killed")[0] == 0
    assert published(hub, "killed") == files(model)
    assert not sent(hub) & there


def test_only_what_changed_is_sent_and_old_model_files_go(hub, send, model):
    send("changed")
    hub.requests.clear()
    assert send("changed")[1].endswith(hub.repositories["user/changed"].commits[-1].oid)
    assert not [path for method, path in hub.requests if method == "PUT" or "commit" in path]
    (model / "model-1.safetensors").rename(model / "model-2.safetensors")
    (model / "config.json").write_text("{}")
    hub.requests.clear()
    code, _, err, _ = send("changed", "--message", "Smaller")
    assert (code, err) == (0, "")
    assert published(hub, "changed") == files(model)
    assert not [path for method, path in hub.requests if method == "PUT"]  # its content is known
    assert [c.message for c in hub.repositories["user/changed"].commits[2:]] == ["Smaller"]


def test_branches_tags_and_pull_requests(hub, send, model):
    first = published_by(send("refs", "--tag", "v1"))
    repository = hub.repositories["user/refs"]
    assert repository.tags == {"v1": first}
    write_model(model, "second")
    second = published_by(send("refs", "--revision", "next", "--tag", "v2"))
    assert published(hub, "refs", "next") == files(model)
    assert repository.commits[-1].oid == first
    assert repository.tags == {"v1": first, "v2": second}
    assert published_by(send("refs", "--revision", "next", "--tag", "v2")) == second  # as it is
    code, _, err, _ = send("refs", "--revision", "next", "--tag", "v1")
    assert code == 2
    assert "the tag v1 is that of another commit" in err
    code, out, _, _ = send("refs", "--pr", "--message", "Better")
    assert (code, out) == (0, f"{hub.endpoint}/user/refs/discussions/1")
    assert published(hub, "refs", "refs/pr/1") == files(model)
    assert repository.commits[-1].oid == first
    hub.faults.append(Fault("POST", "/commit/main$", is_done=True))
    write_model(model, "third")
    code, _, err, _ = send(
        "refs", "--pr"
    )  # whether it was opened is not known: it is not tried again
    assert code == 2
    assert [name for name in repository.branches if "pr" in name] == ["refs/pr/1", "refs/pr/2"]
    code, _, err, _ = send("nobody-made", "--pr")
    assert code == 2
    assert "404" in err


def published_by(answer) -> str:
    code, out, err, _ = answer
    assert code == 0, err
    return out.rsplit("/", 1)[1]
