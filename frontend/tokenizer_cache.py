"""Converted tokenizers on disk, so that a model is converted once.

An entry is named after the content that it was made from, is written beside its place and renamed into it,
and is a MessagePack `TokenizerBundle`: reading it runs nothing. A broken entry is made again; a cache that
cannot be written is done without.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from tercet import envs
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.log import get_logger

logger = get_logger(__name__)

# Raise it when a conversion changes, so that what older versions wrote is not read.
_CONVERSION_VERSION = 2
_HEAD_BYTES = 8 << 20
_TAIL_BYTES = 64 << 10


def cached_bundle(kind: str, fingerprint: str, convert: Callable[[], TokenizerBundle]) -> TokenizerBundle:
    """The bundle cached under this kind of source and fingerprint, else `convert()`, then cached."""
    path = envs.TERCET_CACHE_ROOT / "tokenizers" / f"{kind}-v{_CONVERSION_VERSION}-{fingerprint}.msgpack"
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=TokenizerBundle)
    except FileNotFoundError:
        pass
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("converted tokenizer %s cannot be read (%s); converting again", path, error)
    bundle = convert()
    try:
        write_atomically(path, msgspec.msgpack.encode(bundle))
    except OSError as error:
        logger.warning("converted tokenizer cannot be cached (%s); the next start converts again", error)
    return bundle


def fingerprint_file(path: Path) -> str:
    """Hash of the file's size, beginning and end: cheap however large it is (about 10 ms).

    A GGUF file begins with its tokenizer: files that share their first 8 MiB are versions of one model.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEAD_BYTES))
        file.seek(max(0, size - _TAIL_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Hash of the names and whole contents of small files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a name of its own and rename it into place: nobody ever reads half of it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
