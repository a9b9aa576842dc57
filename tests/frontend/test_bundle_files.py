"""Tokenizer files reach every frontend, whatever the model came as."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet import EngineArgs, ModelNotFoundError
from tercet.frontend.bundle_files import prepare_files
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tests.frontend.text_engine import make_bundle, make_tokenizer
from tests.frontend.tokenizer_zoo import smollm2_gguf


def folder_with(bundle: TokenizerBundle, folder: Path) -> Path:
    for name, content in bundle.to_files().items():
        (folder / name).write_bytes(content)
    return folder


def rebuilt(files: dict[str, str]) -> Tokenizer:
    return Tokenizer(TokenizerBundle.from_files({name: Path(p).read_bytes() for name, p in files.items()}))


def test_a_folder_is_used_in_place(tmp_path: Path) -> None:
    folder = folder_with(make_bundle(), tmp_path)
    files = prepare_files(EngineArgs(device="simulated", tokenizer=str(folder)).create_engine_config())
    assert {Path(path).parent for path in files.values()} == {folder}
    assert rebuilt(files).encode("Hello there") == make_tokenizer().encode("Hello there")
    assert rebuilt(files).chat_template == make_bundle().chat_template


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smollm2_gguf()
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path / "cache"))
    config = EngineArgs(device="simulated", tokenizer=str(model)).create_engine_config()
    files = prepare_files(config)
    times = {path: Path(path).stat().st_mtime_ns for path in files.values()}
    assert rebuilt(files).encode("1234") == rebuilt(prepare_files(config)).encode("1234")
    assert {path: Path(path).stat().st_mtime_ns for path in files.values()} == times


def test_without_a_writable_cache_it_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smollm2_gguf()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path / "file"))
    files = prepare_files(EngineArgs(device="simulated", tokenizer=str(model)).create_engine_config())
    assert rebuilt(files).encode("Hello")


def test_no_tokenizer_where_none_is_wanted() -> None:
    assert prepare_files(EngineArgs(device="simulated").create_engine_config()) == {}
    args = EngineArgs(device="simulated", tokenizer="/nowhere", skip_tokenizer_init=True)
    assert prepare_files(args.create_engine_config()) == {}


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="/nowhere"):
        prepare_files(EngineArgs(device="simulated", tokenizer="/nowhere").create_engine_config())
