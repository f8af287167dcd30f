"""The structure: which part may import which, and what `import stgfast` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import stgfast
from stgfast.queue.store import Store
from tests import forks

ROOT = Path(stgfast.__file__).parent
# What each part may import from the package, besides itself. All parts may import settings and errors.
COMMON = {"errors", "formulas", "guidance", "kinds", "perturbation", "schedules", "spacing"}
MAY = {
    "errors": set(),
    "version": set(),
    "schedules": {"errors"},
    "perturbation": {"errors", "formulas", "kinds", "schedules"},
    "guidance": {"errors", "formulas", "kinds", "perturbation", "presets", "schedules", "spacing", "wording"},
    "wording": {"formulas", "guidance", "perturbation", "schedules", "spacing"},
    "presets": set(),
    "pages": set(),
    # Files of these two import the part that they extend; a kind may call a kernel.
    "kinds": {"errors", "kernels"},
    "formulas": {"errors"},
    "kernels": set(),
    "batching": COMMON | {"kernels"},
    # `Adapter.of` imports the search for facts when it is called.
    "integrations": COMMON | {"batching", "facts", "kernels", "presets"},
    "memory": COMMON,
    "reuse": COMMON,
    "forecast": COMMON | {"reuse"},
    "spacing": {"errors"},
    "ranks": COMMON | {"batching"},
    "engine": COMMON | {"integrations", "batching", "ranks"},
    "combining": COMMON | {"batching", "engine", "forecast", "integrations", "kernels", "memory", "reuse"},
    "announced": COMMON | {"batching", "engine", "forecast", "integrations", "memory", "reuse"},
    "divided": COMMON | {"announced", "batching", "combining", "engine", "integrations", "ranks"},
    "call": COMMON | {"batching", "integrations"},
    "guided": COMMON | {"batching", "call", "combining", "engine", "integrations", "kernels"},
    "solvers": {"errors", "integrations"},
    "recipes": COMMON | {"batching", "integrations", "solvers"},
    "proof": COMMON | {"announced", "batching", "call", "combining", "engine", "integrations"},
    "installed": COMMON | {"batching", "call", "integrations", "recipes"},
    "facts": COMMON | {"batching", "call", "installed", "integrations", "proof"},
    "verify": COMMON | {"batching", "call", "installed", "integrations", "proof", "render"},
    "install": COMMON
    | {"announced", "batching", "call", "combining", "divided", "engine", "facts", "installed", "integrations"}
    | {"ranks", "recipes", "solvers"},
    "explained": COMMON | {"batching", "ranks", "recipes"},
    "explain": COMMON
    | {"announced", "batching", "call", "combining", "explained", "forecast", "installed", "integrations", "recipes"}
    | {"reuse"},
    "toy": {"guidance", "perturbation"},
    "extras": {"errors"},
    "doctor": {"kernels", "version"},
    "restart": {"errors"},
    # Commands that load no torch import it.
    "queue": COMMON,
    "render": COMMON
    | {"batching", "extras", "install", "installed", "integrations", "pages", "queue", "ranks", "recipes", "solvers"}
    | {"toy", "version"},
    "serve": COMMON | {"pages", "queue", "render"},
    "evaluate": COMMON | {"extras", "install", "pages", "queue", "render", "toy"},
    "tune": COMMON
    | {"explain", "extras", "install", "installed", "pages", "queue", "recipes", "render", "solvers", "toy", "version"},
    "demo": {"evaluate", "explain", "guidance", "install", "integrations", "recipes", "render", "spacing", "toy"},
    "demo_command": {"demo", "errors"},
    "bench": COMMON
    | {"batching", "explain", "explained", "install", "integrations", "kernels", "pages", "ranks", "version"},
    "cli": {"extras", "version"},  # commands are imported by name, when they are called
    "": {
        "batching",
        "errors",
        "evaluate",
        "explain",
        "guidance",
        "guided",
        "install",
        "integrations",
        "perturbation",
        "render",
        "restart",
        "schedules",
        "solvers",
        "verify",
        "version",
    },
}
FOREIGN = {  # third-party packages, and the only parts that may import them
    "diffusers": {"integrations", "render", "solvers", "toy", "bench"},
    "triton": {"kernels"},
    "ray": {"render"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "transformers": {"toy", "render"},
    "torch": {
        "combining",
        "divided",
        "announced",
        "reuse",
        "forecast",
        "kernels",
        "ranks",
        "render",
        "batching",
        "integrations",
        "engine",
        "guided",
        "restart",
        "toy",
        "evaluate",
        "demo",
        "doctor",
        "bench",
        "tune",
        "proof",
        "facts",
    },
}


def run(tree):
    """The imports of a module, without those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from run(node)


def imports():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        part = "" if parts == ("__init__",) else parts[0]
        for node in run(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield path, part, [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                names = [node.module]
                if node.module == "stgfast":
                    names = [f"stgfast.{alias.name}" for alias in node.names]
                yield path, part, names


def test_imports_point_one_way():
    seen = 0
    for path, part, names in imports():
        for name in names:
            package, _, inner = name.partition(".")
            if package == "stgfast":
                target = inner.split(".")[0]
                assert target == part or target in MAY[part], f"{path} imports {name}"
                seen += 1
            elif package in FOREIGN:
                assert part in FOREIGN[package], f"{path} imports {name}"
    assert seen > 30


def test_every_room_is_a_package():
    """Otherwise it exists in a checkout, and is not installed."""
    rooms = {path.parent for path in ROOT.rglob("*.py")}
    assert len(rooms) > 15
    assert [room for room in rooms if not (room / "__init__.py").is_file()] == []


def test_no_adapter_imports_another():
    families = {path.stem for path in (ROOT / "integrations" / "families").glob("*.py")} - {"__init__"}
    assert len(families) > 10
    for path, _, names in imports():
        if path.parent.name == "families":
            assert not {name.split(".")[-1] for name in names} & families, path


CORE = (
    *(
        "announced",
        "batching",
        "call",
        "combining",
        "divided",
        "engine",
        "explain",
        "explained",
        "forecast",
        "formulas",
        "guidance",
        "guided",
        "install",
        "installed",
        "ranks",
        "facts",
        "proof",
        "verify",
    ),
    *("integrations", "kinds", "memory", "perturbation", "recipes", "reuse", "schedules", "solvers"),
    "spacing",
)


def files(*parts):
    """The files of these parts."""
    both = [each for part in parts for each in (ROOT / f"{part}.py", *(ROOT / part).rglob("*.py"))]
    return [path for path in both if path.exists()]


def test_kinds_and_formulas_are_known_by_what_they_say_of_themselves():
    """The core imports none of them by name, so a new one needs only its own file."""
    may = {
        "stgfast.kinds": {"KINDS", "AXES", "Kind", "Mark", "kind_of"},
        "stgfast.formulas": {"FORMULAS", "COND", "UNCOND", "GUIDED", "Formula"},
    }
    # Adapters list the kinds of their model, and the plain method implements each kind itself.
    apart = files("kinds", "formulas", "integrations", "proof")
    for path in set(files(*CORE)) - set(apart):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(("stgfast.kinds", "stgfast.formulas")):
                assert {alias.name for alias in node.names} <= may[node.module], path


def test_no_file_of_the_core_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in files(*CORE)}
    assert len(lengths) > 40
    assert not {path: length for path, length in lengths.items() if length > 300}


def test_import_is_cold(tmp_path):
    """Settings are read without torch, and the command line without libraries that take seconds to load."""
    code = """
import sys, stgfast
assert stgfast.Guidance(stgfast.Perturbation([2])).to_json() and set(stgfast.__all__) <= set(dir(stgfast))
print([name for name in ("torch", "numpy", "sqlite3", "PIL", "diffusers") if name in sys.modules])
import stgfast.cli
print([name for name in ("torch", "numpy", "sqlite3", "PIL") if name in sys.modules])
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in ("status", "add", "cancel", "pause"))):
    try:
        stgfast.cli.main(arguments)
    except SystemExit as ended:
        assert ended.code == 0
for name in ("status", "cancel", "pause"):
    assert stgfast.cli.main([name, "--out", OUT, *(["--all"] if name == "cancel" else [])]) == (name == "cancel")
assert stgfast.cli.main(["add", JOBS, "--out", OUT]) == 0
print("at last", [name for name in ("torch", "numpy", "diffusers", "PIL") if name in sys.modules])
"""
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("a red kite\n")
    with Store(tmp_path / "out"):
        pass
    code = code.replace("OUT", repr(str(tmp_path / "out"))).replace("JOBS", repr(str(jobs)))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[]\n[]\n")
    assert out.endswith("\n1 job added\nat last []\n")


def test_a_function_of_the_package_is_not_taken_for_the_module_that_it_is_in():
    code = """
import stgfast.explain, stgfast.render.command, stgfast.evaluate, stgfast.guided, stgfast.restart, stgfast
print([getattr(stgfast, name).__qualname__ for name in ("explain", "render", "evaluate", "guided", "restart")])
"""
    out = subprocess.run([sys.executable, *forks.FORKED, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "['explain', 'render', 'evaluate', 'guided', 'restart']\n"
