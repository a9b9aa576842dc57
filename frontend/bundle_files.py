"""Which files every frontend of an engine gets in Welcome, from which it builds its tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tercet import envs
from tercet.config import EngineConfig
from tercet.frontend.tokenizer import load_bundle
from tercet.frontend.tokenizer_bundle import TokenizerBundle, read_tokenizer_files
from tercet.frontend.tokenizer_cache import write_atomically
from tercet.log import get_logger

logger = get_logger(__name__)

# Folders made because the cache could not be written; removed when this process ends.
_temporary: list[tempfile.TemporaryDirectory[str]] = []


def prepare_files(config: EngineConfig) -> dict[str, str]:
    """Tokenizer and chat-template files of an engine: name -> path on disk.

    A tokenizer that is not there as files (it lies in a .gguf file, or had to be converted) is written to the
    cache first. Empty where the engine has no tokenizer: with skip_tokenizer_init, or simulated.

    Raises:
        ModelNotFoundError: there is no tokenizer where one should be.
        UnsupportedModelError: it is broken, or of an unknown kind.
    """
    frontend = config.frontend
    if frontend.files or frontend.skip_tokenizer_init:
        return dict(frontend.files)
    source = Path(frontend.tokenizer or config.model.path).expanduser()
    if not frontend.tokenizer and config.model.kind == "simulated":
        return {}
    if source.is_dir() and (source / "tokenizer.json").is_file():
        return {name: str(source / name) for name in read_tokenizer_files(source)}
    return _written(load_bundle(source))


def _written(bundle: TokenizerBundle) -> dict[str, str]:
    """Put a bundle's files on disk, under a name that is their content's hash."""
    files = bundle.to_files()
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    folder = envs.TERCET_CACHE_ROOT / "tokenizers" / f"files-{digest.hexdigest()}"
    try:
        _write_all(folder, files)
    except OSError as error:
        logger.warning("the cache cannot be written (%s): tokenizer files go to a temporary folder", error)
        _temporary.append(tempfile.TemporaryDirectory(prefix="tercet-tokenizer-"))
        folder = Path(_temporary[-1].name)
        _write_all(folder, files)
    return {name: str(folder / name) for name in files}


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == content:
            continue
        write_atomically(path, content)
