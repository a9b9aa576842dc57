"""The package works from a bare checkout, from an editable install and from a wheel built from the sdist.

Each way gets a fresh environment that holds Tercet alone; its dependencies are lent to it from the
environment of the tests by a .pth file, so nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tercet.version import __version__

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core_proc", "frontend", "ipc", "ops", "worker_proc")
FILES = ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml")

# Imports every module that needs no torch, then says where the package came from and what was loaded.
PROBE = """
import importlib, json, pkgutil, sys
import tercet
rooms = ("core_proc", "frontend", "ipc", "ops", "worker_proc")
for room in rooms:
    package = importlib.import_module(f"tercet.{room}")
    if room not in ("ops", "worker_proc"):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)
tercet.SamplingParams, tercet.LLM, tercet.AsyncLLM
bare = [name for name in sys.modules if name.split(".")[0] in rooms]
print(json.dumps([tercet.__file__, bare]))
"""


@dataclass
class Environment:
    """A virtual environment and what must be set to use it."""

    folder: Path
    pythonpath: str | None = None

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, cwd: Path) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        if self.pythonpath is not None:
            env["PYTHONPATH"] = self.pythonpath
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def pip_install(self, *arguments: str | Path, cwd: Path) -> None:
        offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        self.run(
            sys.executable, "-m", "pip", "--python", self.python, "install", *offline, *arguments, cwd=cwd
        )


def _new_environment(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    environment = Environment(folder)
    site_packages = next((folder / "lib").glob("python3.*")) / "site-packages"
    # Only this folder is added: .pth files inside it, such as that of an editable Tercet, are not followed.
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree as a clone would have it: links kept, nothing built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    for name in ("tercet", *ROOMS):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _sources(checkout: Path) -> set[str]:
    """Every module of the package, as a path below the package's parent."""
    found = {str(path.relative_to(checkout)) for path in (checkout / "tercet").rglob("*.py")}
    found |= {
        f"tercet/{path.relative_to(checkout)}" for room in ROOMS for path in (checkout / room).rglob("*.py")
    }
    return found


def _check(environment: Environment, outside: Path, package: Path) -> None:
    """Imports everything from a folder that is not the checkout, and runs the command."""
    location, bare = json.loads(environment.run(environment.python, "-c", PROBE, cwd=outside))
    assert Path(location).resolve().parent == package.resolve()
    assert bare == []
    help_text = environment.run(environment.python, "-m", "tercet", "--help", cwd=outside)
    assert "chat" in help_text


def test_bare_checkout_works_with_pythonpath(checkout: Path, tmp_path: Path) -> None:
    environment = _new_environment(tmp_path / "venv")
    environment.pythonpath = str(checkout)
    _check(environment, tmp_path, checkout / "tercet")


def test_editable_install_works(checkout: Path, tmp_path: Path) -> None:
    environment = _new_environment(tmp_path / "venv")
    copy = tmp_path / "editable"
    shutil.copytree(checkout, copy, symlinks=True)  # the build leaves its metadata in the tree
    environment.pip_install("--editable", copy, cwd=tmp_path)
    _check(environment, tmp_path, copy / "tercet")
    assert "chat" in environment.run(environment.folder / "bin" / "tercet", "--help", cwd=tmp_path)


def test_wheel_built_from_the_sdist_works(dist: Path, tmp_path: Path) -> None:
    environment = _new_environment(tmp_path / "venv")
    environment.pip_install(dist / f"tercet-{__version__}-py3-none-any.whl", cwd=tmp_path)
    package = next((environment.folder / "lib").glob("python3.*")) / "site-packages" / "tercet"
    _check(environment, tmp_path, package)
    assert "chat" in environment.run(environment.folder / "bin" / "tercet", "--help", cwd=tmp_path)


def test_wheel_holds_every_module_and_nothing_else_at_top_level(checkout: Path, dist: Path) -> None:
    with zipfile.ZipFile(dist / f"tercet-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    metadata = f"tercet-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"tercet", metadata}
    assert {name for name in names if name.endswith(".py")} == _sources(checkout)
    assert {"tercet/py.typed", f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"} <= names


def test_sdist_holds_every_module(checkout: Path, dist: Path) -> None:
    top = f"tercet-{__version__}"
    with tarfile.open(dist / f"{top}.tar.gz") as sdist:
        names = set(sdist.getnames())
    assert {
        f"{top}/{name}" for name in _sources(checkout) | {"LICENSE", "README.md", "tercet/py.typed"}
    } <= names
