"""The house: what the wheel holds, how light the import is, who imports whom, and that the public names are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmguard

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "apps",
    "apps/playground",
    "apps/report",
    "apps/serving",
    "commands",
    "graphs",
    "graphs/lowerings",
    "graphs/proof",
    "runtime",
    "runtime/chat",
    "runtime/images",
    "runtime/tensorrt",
    "exporter",
    "exporter/artifact",
    "exporter/calibration",
    "exporter/checkpoints",
    "exporter/engines",
    "exporter/evaluation",
    "exporter/extraction",
    "exporter/families",
    "exporter/packaging",
    "plugins",
    "exporter/prompts",
    "exporter/proof",
)
TOPS = sorted({folder.partition("/")[0] for folder in FOLDERS})
# What `import vlmguard` leaves for later.
HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "sklearn",
    "onnx",
    "tensorrt",
    "plotly",
    "ray",
    "fastapi",
    "uvicorn",
    "openai",
)
# What is not Python.
DATA = (
    "exporter/prompts/anchors.csv",
    *(f"apps/report/page.{kind}" for kind in ("html", "css", "js")),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "apps/playground/page").iterdir())),
)


SOURCES = [
    ROOT / "__init__.py",
    ROOT / "cli.py",
    *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")),
]


MOST_LINES = 400
# Files that are still longer. The list only shrinks: a file that no longer is leaves it, and no file joins it.
STILL_LONG = {
    "examples/tiny_vlm/world.py",
    "tests/apps/test_playground_page.py",
    "tests/apps/test_report.py",
    "tests/apps/test_serving.py",
    "tests/exporter/test_calibrate.py",
    "tests/exporter/test_checkpoint.py",
    "tests/exporter/test_choice.py",
    "tests/exporter/test_evaluate.py",
    "tests/exporter/test_families.py",
    "tests/exporter/test_pipeline.py",
    "tests/exporter/test_tampering.py",
    "tests/graphs/test_anatomy.py",
    "tests/graphs/test_directions.py",
    "tests/graphs/test_fold.py",
    "tests/graphs/test_hostile_files.py",
    "tests/graphs/test_lowerings.py",
    "tests/graphs/test_package.py",
    "tests/graphs/test_plan.py",
    "tests/graphs/test_positions.py",
    "tests/graphs/test_rewrite.py",
    "tests/graphs/test_runtime_controls.py",
    "tests/graphs/test_staging.py",
    "tests/graphs/test_structure.py",
    "tests/graphs/test_subgraphs.py",
    "tests/runtime/test_chat.py",
    "tests/runtime/test_engine_runner.py",
    "tests/runtime/test_vlm.py",
    "tests/tampering_folders.py",
    "tests/test_cli.py",
    "tests/test_torch_hooks.py",
    "tests/zoo/families.py",
    "tests/zoo/matrix.py",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed"))]:
        (copy / path.name).write_bytes(path.read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            (copy / folder).mkdir(parents=True, exist_ok=True)
            (copy / folder / path.name).write_bytes(path.read_bytes())
    for name in DATA:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    expected = {f"vlmguard/{name}" for name in ("__init__.py", "cli.py", "py.typed")}
    expected |= {f"vlmguard/{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    expected |= {f"vlmguard/{name}" for name in DATA}
    info = f"vlmguard-{vlmguard.__version__}.dist-info"
    records = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    expected |= {f"{info}/{name}" for name in records}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # -I would also hide the path; -P keeps the working folder out, and the editable install is overridden by the path
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vlmguard.cli; print(vlmguard.cli.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "vlmguard" / "cli.py")


@pytest.mark.parametrize("statement", ["import vlmguard", "import vlmguard.cli", "from vlmguard.graphs import spec"])
def test_importing_is_light(statement: str) -> None:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert vlmguard.__all__ == sorted(vlmguard.__all__, key=lambda name: (name[0].islower(), name))
    for name in vlmguard.__all__:
        assert getattr(vlmguard, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vlmguard' has no attribute 'exprot'"):
        vlmguard.exprot  # noqa: B018


@pytest.mark.slow
def test_main_job_needs_no_torch(tmp_path: Path) -> None:
    """The light path: a guarded folder from the bundled ONNX model with torch and transformers not importable."""
    model = ROOT / "examples" / "tiny_vlm" / "onnx-community"
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import vlmguard\n"
        f"vlmguard.export({str(model)!r}, {str(tmp_path / 'out')!r})\n"
        f"print(vlmguard.GuardedVLM.open({str(tmp_path / 'out')!r}).generate('how to wash the boat', max_new_tokens=4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


# Structure


def test_every_folder_of_the_package_is_listed() -> None:
    found = {path.parent.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert found == set(FOLDERS)


def test_no_two_files_share_a_name() -> None:
    """A file's name alone identifies it. Helpers of tests, examples and integrations are not part of the package."""
    files = [path for top in (*TOPS, "benchmarks") for path in (ROOT / top).rglob("*")]
    files += [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("test_*.py")]
    names = Counter(path.name for path in files if path.is_file() and "__pycache__" not in path.parts)
    assert len(names) > 400
    assert {name for name, count in names.items() if count > 1} == {"__init__.py"}


def test_no_file_is_long() -> None:
    tops = (*TOPS, "benchmarks", "examples", "integrations", "tests")
    files = [*ROOT.glob("*.py"), *(path for top in tops for path in (ROOT / top).rglob("*.py"))]
    assert len(files) > 400
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name for name, count in lines.items() if count > MOST_LINES} == STILL_LONG


def imports_of(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, inside functions too, as parts of their paths."""
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split(".")[: 1000 if node.module else 0])
            for name in node.names:
                yield (*base, name.name)
                yield base


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def names_of(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module's statements define, inside `if`, `try` and `with` too; imports define none."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            yield from names_of([*node.body, *getattr(node, "orelse", [])])
            yield from (name for handler in getattr(node, "handlers", []) for name in names_of(handler.body))


def borrowed(path: Path, defined: dict[tuple[str, ...], set[str]]) -> Iterator[str]:
    """Names that a file imports from a module which imports them itself."""
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            module = (*here[: len(here) - node.level + 1], *parts)
        elif parts[:1] == ("vlmguard",):
            module = parts[1:]
        else:
            continue
        if module in defined:
            names = {name.name for name in node.names if (*module, name.name) not in defined}
            yield from sorted(names - defined[module])


def undocumented(path: Path) -> Iterator[str]:
    """Parameters of a file's public functions and methods with four or more that their `Args:` section does not name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for function in [*tree.body, *(node for owner in classes for node in owner.body)]:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name.startswith("_"):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", ast.get_docstring(function) or "", re.MULTILINE)
        described = re.findall(r"^    ([\w, *]+):", section[1] if section else "", re.MULTILINE)
        documented = {name.strip(" *") for line in described for name in line.split(",")}
        if len(names) >= 4:
            yield from (f"{function.name}: {name}" for name in names if name not in documented)


def circles(graph: dict[tuple[str, ...], set[tuple[str, ...]]]) -> set[tuple[str, ...]]:
    """What is left when modules without imports, or without importers, are taken away again and again."""
    left = {module: set(imported) for module, imported in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        gone = {module for module in left if module not in imported or not left[module] & left.keys()}
        if not gone:
            return set(left)
        left = {module: names - gone for module, names in left.items() if module not in gone}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: they hide a circle, and do not break it."""
    modules = {module_of(path): path for path in SOURCES if path != ROOT / "__init__.py"}
    graph = {
        module: {name for name in imports_of(path) if name in modules} - {module} for module, path in modules.items()
    }
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == set()


def test_names_are_imported_from_the_module_that_defines_them() -> None:
    modules = {module_of(path): path for path in SOURCES if path != ROOT / "__init__.py"}
    defined = {
        module: set(names_of(ast.parse(path.read_text(encoding="utf-8")).body)) for module, path in modules.items()
    }
    others = [
        path for top in ("tests", "benchmarks", "examples", "integrations") for path in (ROOT / top).rglob("*.py")
    ]
    found = {path.relative_to(ROOT).as_posix(): list(borrowed(path, defined)) for path in (*SOURCES, *others)}
    assert len(found) > 500
    assert {name: names for name, names in found.items() if names} == {}


def test_a_borrowed_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "user.py").write_text("from .graphs.owner import own, lent\nfrom .graphs import owner\n")
    defined = {("graphs",): set[str](), ("graphs", "owner"): {"own"}}
    assert list(borrowed(tmp_path / "user.py", defined)) == ["lent"]


def test_every_argument_of_long_signatures_is_documented() -> None:
    """The commands' parameters are options, and their help is their documentation."""
    files = [path for path in SOURCES if path.parent != ROOT / "commands" and path != ROOT / "cli.py"]
    found = {path.relative_to(ROOT).as_posix(): list(undocumented(path)) for path in files}
    assert {name: arguments for name, arguments in found.items() if arguments} == {}


def test_an_undocumented_argument_is_found(tmp_path: Path) -> None:
    body = '"""Does.\\n\\n    Args:\\n        a, b: both.\\n        d: one.\\n    """'
    (tmp_path / "one.py").write_text(f"def f(a, b, *, c, d):\n    {body}\ndef g(a, b, c):\n    pass\n")
    assert list(undocumented(tmp_path / "one.py")) == ["f: c"]


def test_a_circle_is_found() -> None:
    a, b, c, d = ("a",), ("b",), ("c",), ("d",)
    assert circles({a: {b}, b: {c}, c: set()}) == set()
    assert circles({a: {b}, b: {c}, c: {b, d}, d: set()}) == {b, c}
