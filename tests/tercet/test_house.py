"""The public face of the package, and the house rules that no other test holds."""

import ast
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tercet
from tercet import envs, errors, log

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_FOLDERS = ("tercet", "core_proc", "frontend", "ipc", "ops", "worker_proc")

PUBLIC_NAMES = set(
    """
    AsyncEngineArgs AsyncLLM AsyncLLMEngine BeamSearchParams CompletionOutput ConfigError EngineArgs
    EngineClosedError EngineDeadError EngineError FlatLogprobs LLM Logprob ModelNotFoundError PromptType
    QueueFullError RequestError RequestOutput RequestOutputKind SamplingParams StartupError TercetError
    TextPrompt TokensPrompt UnsupportedModelError ValidationError __version__
    """.split()  # noqa: SIM905  (a list of quoted names reads worse)
)


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _package_files() -> list[Path]:
    files = [path for folder in PACKAGE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not any(parent.is_symlink() for parent in path.parents)]


# The public face


def test_public_names_are_these() -> None:
    assert sorted(tercet.__all__) == sorted(PUBLIC_NAMES)
    assert set(dir(tercet)) >= PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(tercet, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        tercet.Nothing  # noqa: B018


def test_type_checkers_and_python_see_the_same_exports() -> None:
    tree = ast.parse((ROOT / "tercet/__init__.py").read_text())
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    static = {
        (alias.asname or alias.name): (statement.module, alias.name)
        for statement in guard.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert static == tercet._EXPORTS
    assert set(static) | {"__version__"} == set(tercet.__all__)


def test_async_llm_engine_is_vllms_second_name_for_async_llm() -> None:
    assert tercet.AsyncLLMEngine is tercet.AsyncLLM


def test_import_loads_only_the_version() -> None:
    code = "import sys; old = {*sys.modules}; import tercet; print(*sorted({*sys.modules} - old))"
    loaded = _run(code).split()
    third_party = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"tercet"}
    assert third_party == set()
    assert [name for name in loaded if name.startswith("tercet")] == ["tercet", "tercet.version"]


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import tercet; print(time.perf_counter() - t)"
    seconds = min(float(_run(code)) for _ in range(3))
    assert seconds < 5 * 0.3  # we promise 0.3 s; 5 x slack for a busy machine


def test_version_is_in_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == tercet.__version__
    assert tercet.__version__ in headings or headings == ["Unreleased"]


# The house


def test_every_package_folder_has_an_init() -> None:
    folders = {path.parent for path in _package_files()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_rooms_are_reached_through_relative_links() -> None:
    for room in PACKAGE_FOLDERS[1:]:
        link = ROOT / "tercet" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{room}"


def test_modules_stay_small() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _package_files()}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in _package_files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


def test_documents_link_to_what_exists() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    missing = []
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists():
                missing.append(f"{document.name}: {target}")
    assert missing == []


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\w+)", shown, re.MULTILINE) == phony.group(1).split()


# Environment variables


def test_cache_root_is_read_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    assert tmp_path == envs.TERCET_CACHE_ROOT
    monkeypatch.delenv("TERCET_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert Path("/xdg/tercet") == envs.TERCET_CACHE_ROOT
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Path("/home/someone/.cache/tercet") == envs.TERCET_CACHE_ROOT


def test_wrong_logging_level_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_LOGGING_LEVEL", "loud")
    with pytest.raises(errors.ConfigError, match=r"TERCET_LOGGING_LEVEL: must be one of DEBUG, .*'LOUD'"):
        envs.TERCET_LOGGING_LEVEL  # noqa: B018


def test_every_variable_read_is_documented_in_envs() -> None:
    used = {name for path in _package_files() for name in re.findall(r"\bTERCET_[A-Z_]+\b", path.read_text())}
    assert used == set(dir(envs)) == set(envs.describe())
    assert all(text for _, text in envs.describe().values())


def _environment_writes(tree: ast.Module) -> Iterator[int]:
    """Lines that assign to, delete from or call a changing method of os.environ, or call putenv."""
    for node in ast.walk(tree):
        text = ast.unparse(node)
        match node:
            case ast.Subscript(ctx=ast.Store() | ast.Del()) if text.startswith("os.environ["):
                yield node.lineno
            case ast.Call() if re.match(
                r"os\.(putenv|unsetenv|environ\.(setdefault|update|pop|clear))\(", text
            ):
                yield node.lineno


def test_the_package_sets_no_environment_variable() -> None:
    for code in ("os.environ['A'] = 'b'", "del os.environ['A']", "os.environ.setdefault('A', 'b')"):
        assert list(_environment_writes(ast.parse(code))) == [1]
    writes = {path.name: list(_environment_writes(ast.parse(path.read_text()))) for path in _package_files()}
    assert {name: lines for name, lines in writes.items() if lines} == {}


# Errors


def test_errors_are_one_tree_as_drawn() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    drawn = set(re.findall(r"\b[A-Z]\w*Error\b", errors.__doc__ or "")) - {"ValueError"}
    assert {name for name in defined if not name.startswith("_")} == drawn
    assert all(issubclass(getattr(errors, name), errors.TercetError) for name in drawn)


def test_refused_value_names_its_field() -> None:
    error = errors.ValidationError("top_p", "must be in (0, 1]; got 1.5")
    assert isinstance(error, ValueError)
    assert (error.field, str(error)) == ("top_p", "top_p: must be in (0, 1]; got 1.5")


# Logging


@pytest.fixture
def tercet_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tercet")
    saved = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = saved


def test_library_use_configures_nothing() -> None:
    code = (
        "import logging, tercet.log as log; log.get_logger('tercet.x').error('not shown')\n"
        "root = logging.getLogger(); assert not root.handlers and root.level == logging.WARNING\n"
        "own = logging.getLogger('tercet'); assert own.propagate and own.level == logging.NOTSET\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_configured_process_writes_one_line_with_its_name(
    tercet_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_LOGGING_LEVEL", "warning")
    stream = io.StringIO()
    log.configure("worker 0", io.StringIO())
    log.configure("worker 0", stream)  # replaces the first
    logger = log.get_logger("tercet.worker_proc.main")
    logger.info("too quiet")
    logger.warning("prompt was %r and %s", "a\nb", "c\nERROR forged")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert re.match(
        r"WARNING \d\d-\d\d \d\d:\d\d:\d\d\.\d{3} worker 0\[\d+\] test_house.py:\d+ prompt", lines[0]
    )
    assert lines[0].endswith(r"c\nERROR forged")


def test_logger_outside_the_package_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must start with 'tercet\.'"):
        log.get_logger("tercetish")
