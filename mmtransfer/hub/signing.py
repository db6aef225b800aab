"""Signatures of models by model-signing (OpenSSF Model Signing): who vouches for the files that a
model is loaded from, by a key, or by an identity that Sigstore has checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmtransfer.data.files import check_regular
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.files import MODEL_FILES, SIGNATURE, model_files
from mmtransfer.hub.publish import EXPORTS, Contents

SIGSTORE = "sigstore"
"""In the place of a key: sign as whom one is, which Sigstore asks in CI or in a browser."""
_MOST_BYTES = 16 << 20  # of a signature


def signatures(files: Contents, by: str) -> dict[str, bytes]:
    """Signatures of a repository's files, by their names in it: one of what a model is loaded from,
    and one in the folder of each export. The model card is in none.

    `by` is the file of a private key on an elliptic curve (PEM), or `sigstore`.

    Raises:
        UserError: no such key, a package that is missing, or a signature that cannot be made.
    """
    groups: dict[str, dict[str, Path | bytes]] = {}
    for name, content in files.items():
        folder, inside, rest = name.partition("/")
        if folder in EXPORTS:
            groups.setdefault(folder, {})[rest] = content
        elif not inside and any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            groups.setdefault("", {})[name] = content
    return {
        f"{folder}/{SIGNATURE}" if folder else SIGNATURE: _sign(own, by)
        for folder, own in groups.items()
    }


def _sign(files: Contents, by: str) -> bytes:
    library = _library()
    with _failures(f"{by}: cannot sign"):
        config = library.signing.Config().set_hashing_config(_hashing(library))
        if by == SIGSTORE:
            config.use_sigstore_signer(use_ambient_credentials=True)
        elif not Path(by).is_file():
            raise UserError(
                f"{by}: no such file; expected a private key on an elliptic curve (PEM), or "
                f"'{SIGSTORE}'."
            )
        else:
            config.use_elliptic_key_signer(private_key=by)
        with TemporaryDirectory() as scratch, _gathered(files) as folder:
            made = Path(scratch, SIGNATURE)
            config.sign(folder, made)
            return made.read_bytes()


def verify(found: Checkpoint, identity: str) -> None:
    """Make sure that a model's own files are those that somebody signed; of a base beneath it the
    weights are, by what it records.

    `identity` is the file of a public key (PEM), or `WHO,ISSUER`: whom Sigstore knows by which
    issuer, as `me@example.org,https://accounts.google.com`.

    Raises:
        UserError: not signed, signed by another, other files, or no identity.
    """
    path = found.folder / SIGNATURE
    if not path.is_file():
        raise UserError(
            f"{found.source}: expected a signature ({SIGNATURE}), found none. Load it without "
            "verify, or ask its maker to publish with --sign."
        )
    check_regular(path, most=_MOST_BYTES)
    recorded = found.recorded
    if recorded is not None and not recorded.digest:
        raise UserError(
            f"{found.source}: its signature does not cover the base that it stands on, whose "
            "weights it does not record. Load it without verify, or verify a whole model."
        )
    library = _library()
    who, _, issuer = identity.partition(",")
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    with _failures(f"{found.source}: not signed by {identity}"):
        if Path(identity).is_file():
            config.use_elliptic_key_verifier(public_key=identity)
        elif issuer.startswith("https://"):
            config.use_sigstore_verifier(identity=who.strip(), oidc_issuer=issuer)
        else:
            raise UserError(
                f"{identity}: expected the file of a public key, or WHO,ISSUER with the address of "
                "who vouches for WHO, such as me@example.org,https://accounts.google.com."
            )
        with _gathered({file.name: file for file in model_files(found.folder)}) as folder:
            config.verify(folder, path)


def _library() -> Any:
    if find_spec("model_signing") is None:
        raise UserError("signatures need model-signing: pip install 'mmtransfer[sign]'")
    import model_signing
    import model_signing.hashing
    import model_signing.signing
    import model_signing.verifying

    return model_signing


def _hashing(library: Any) -> Any:
    return library.hashing.Config().set_allow_symlinks(True)


@contextmanager
def _gathered(files: Mapping[str, Path | bytes]) -> Iterator[Path]:
    """A folder of these files and no others."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.symlink_to(content.resolve())
        yield Path(folder)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of cryptography, of the network, of a damaged file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} ({reason}).") from None
