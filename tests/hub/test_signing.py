"""Signatures: whose files a model is loaded from; by keys, and by names that Sigstore knows."""

import json

import pytest
from conftest import write_text_backbone
from cryptography.hazmat.primitives.asymmetric import ed25519
from support.hostile import change, copied, outcome, refused, rewrite
from support.keys import write_keys

from mmtransfer import load
from mmtransfer.errors import UserError
from mmtransfer.hub import signing
from mmtransfer.hub.files import SIGNATURE


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_keys(folder, name) for name in ("maker", "other")}


@pytest.fixture(scope="module")
def signed(keys, tmp_path_factory):
    """A classifier with its maker's signature, and a card."""
    folder = write_text_backbone(tmp_path_factory.mktemp("signed"), labels=2)
    (folder / "README.md").write_text("# A card")
    files = {path.name: path for path in folder.iterdir()}
    files["ct2/model.bin"] = folder / "model.safetensors"
    made = signing.signatures(files, keys["maker"][0])
    assert set(made) == {SIGNATURE, f"ct2/{SIGNATURE}"}
    (folder / SIGNATURE).write_bytes(made[SIGNATURE])
    return folder


def test_a_signed_model_loads_and_every_command_verifies_it(signed, keys, tmp_path, capsys):
    ours, other = keys["maker"][1], keys["other"][1]
    assert load(str(signed), verify=ours)
    rewrite(copied(signed, tmp_path / "m") / "README.md", "# Another card")
    assert load(str(tmp_path / "m"), verify=ours)
    (tmp_path / "x.csv").write_text("text,label\ngood,LABEL_0\nbad,LABEL_1\n")
    for argv in (
        ["predict", signed, "--text", "good"],
        ["evaluate", signed, "--data", tmp_path / "x.csv"],
    ):
        assert outcome([*argv, "--verify", ours], capsys)[0] == 0
        assert "not signed by" in refused([*argv, "--verify", other], capsys)
    # Refused before anything is made of the model or the recording.
    argv = ["monitor", signed, "none.wav", "--verify", other]
    assert "not signed by" in refused(argv, capsys)


def test_the_tool_of_the_library_verifies_it_as_well(signed, keys):
    import model_signing.verifying

    config = model_signing.verifying.Config().set_ignore_unsigned_files(True)
    config.use_elliptic_key_verifier(public_key=keys["maker"][1])
    config.verify(signed, signed / SIGNATURE)


@pytest.mark.parametrize(
    "fault", ["changed", "weights", "added", "removed", "unsigned", "damaged", "another's", "link"]
)
def test_anything_else_than_what_was_signed_is_refused(fault, signed, keys, tmp_path):
    folder = copied(signed, tmp_path / "m")
    if fault == "changed":
        change(folder / "config.json", "id2label", {"0": "bad", "1": "good"})
    elif fault == "weights":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        rewrite(folder / "model.safetensors", bytes(data))
    elif fault == "added":
        rewrite(folder / "added_tokens.json", "{}")
    elif fault == "removed":
        (folder / "tokenizer_config.json").unlink()
    elif fault == "unsigned":
        (folder / SIGNATURE).unlink()
    elif fault == "damaged":
        found = json.loads((folder / SIGNATURE).read_text())
        found["dsseEnvelope"]["payload"] = found["dsseEnvelope"]["payload"][:-8]
        rewrite(folder / SIGNATURE, json.dumps(found))
    elif fault == "link":
        (folder / SIGNATURE).unlink()
        (folder / SIGNATURE).symlink_to("/dev/zero")
    else:
        files = {path.name: path for path in folder.glob("*.json")}
        rewrite(folder / SIGNATURE, signing.signatures(files, keys["other"][0])[SIGNATURE])
    expected = "signature|not signed by|regular file"
    with pytest.raises(UserError, match=expected) as error:
        load(str(folder), verify=keys["maker"][1])
    assert "\n" not in str(error.value)


def test_identities_and_keys_that_are_none_are_refused(signed, keys, tmp_path, capsys):
    for identity in (
        "",
        "nobody",
        "me@example.org",
        "me,http://x",
        str(tmp_path),
        keys["maker"][0],
    ):
        with pytest.raises(UserError, match=r"expected the file of a public key|not signed by"):
            load(str(signed), verify=identity)
    files = {"config.json": b"{}"}
    (tmp_path / "none.pem").write_text("no key")
    edwards, _ = write_keys(tmp_path, "edwards", ed25519.Ed25519PrivateKey.generate())
    for key in (str(tmp_path / "missing"), str(tmp_path / "none.pem"), edwards, keys["maker"][1]):
        with pytest.raises(UserError, match=r"expected a private key|cannot sign"):
            signing.signatures(files, key)


def test_identities_are_asked_of_sigstore_with_their_issuer(signed, monkeypatch):
    from model_signing.signing import Config as Signing
    from model_signing.verifying import Config as Verifying

    asked = []

    def note(self, **given):
        asked.append(given)
        return self

    monkeypatch.setattr(Verifying, "use_sigstore_verifier", note)
    monkeypatch.setattr(Verifying, "verify", lambda self, folder, signature: None)
    assert load(str(signed), verify="me@example.org,https://issuer.example")
    assert asked == [{"identity": "me@example.org", "oidc_issuer": "https://issuer.example"}]
    monkeypatch.setattr(Signing, "use_sigstore_signer", note)
    monkeypatch.setattr(Signing, "sign", lambda self, folder, path: path.write_bytes(b"signature"))
    assert signing.signatures({"config.json": b"{}"}, "sigstore") == {SIGNATURE: b"signature"}
    assert asked[1:] == [{"use_ambient_credentials": True}]
