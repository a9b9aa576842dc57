"""The report of `tercet collect-env`."""

import importlib.metadata

import pytest

from tercet import __version__
from tercet.collect_env import collect_env, format_env


def test_report_names_versions_hardware_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_LOGGING_LEVEL", "debug")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = collect_env()
    assert report["Tercet"]["version"] == __version__
    assert "GiB" in report["System"]["memory"]
    assert "CUDA of torch" in report["Devices"]
    assert report["Settings"]["TERCET_LOGGING_LEVEL"] == "DEBUG"
    text = format_env(report)
    assert "hf_secret" not in text
    assert all(f"\n{title}\n" in f"\n{text}" for title in report)


def test_packages_are_those_that_tercet_requires() -> None:
    try:
        importlib.metadata.version("tercet")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Tercet runs from a checkout that is not installed")
    packages = collect_env()["Packages"]
    assert packages["torch"] == importlib.metadata.version("torch")
    assert "pytest" not in packages


def test_wrong_setting_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_LOGGING_LEVEL", "loud")
    assert "LOUD" in collect_env()["Settings"]["TERCET_LOGGING_LEVEL"]
