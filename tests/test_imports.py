"""The house: which part may import which, and what `import stgfast` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import stgfast

ROOT = Path(stgfast.__file__).parent
# What every part may import of the package, beside itself. Settings and errors are everybody's.
COMMON = {"errors", "guidance", "schedules"}
MAY = {
    "errors": set(),
    "version": set(),
    "schedules": {"errors"},
    "guidance": {"errors", "presets", "schedules"},
    "presets": set(),
    "pages": set(),
    "kernels": set(),
    "batching": COMMON,
    "integrations": COMMON | {"batching", "kernels", "presets"},
    "reuse": COMMON,
    "engine": COMMON | {"integrations", "batching", "kernels", "reuse"},
    "announced": COMMON | {"engine", "integrations", "batching"},
    "call": COMMON | {"batching", "integrations"},
    "guided": COMMON | {"call", "engine", "integrations", "batching", "kernels"},
    "install": COMMON | {"announced", "call", "engine", "integrations", "batching"},
    "explain": COMMON | {"announced", "integrations", "call", "engine", "install", "batching", "reuse"},
    "toy": {"guidance"},
    "doctor": {"kernels", "version"},
    "restart": {"errors"},
    "render": COMMON | {"install", "integrations", "pages", "toy", "version"},
    "evaluate": COMMON | {"install", "pages", "render", "toy"},
    "demo": {"explain", "install", "render", "toy"},
    "bench": COMMON | {"batching", "explain", "install", "integrations", "kernels", "pages", "version"},
    "cli": {"bench", "version", "demo", "doctor", "evaluate", "render", "toy"},
    "": {
        "errors",
        "evaluate",
        "explain",
        "guidance",
        "guided",
        "install",
        "integrations",
        "render",
        "restart",
        "schedules",
        "version",
    },
}
FOREIGN = {  # third-party packages, and the only parts that may import them
    "diffusers": {"integrations", "render", "toy", "bench"},
    "triton": {"kernels"},
    "ray": {"render"},
    "transformers": {"toy", "render"},
    "torch": {
        "announced",
        "reuse",
        "kernels",
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
    },
}


def imports():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        part = "" if parts == ("__init__",) else parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
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


def test_no_adapter_imports_another():
    families = {path.stem for path in (ROOT / "integrations").glob("*.py")} - {
        "__init__",
        "spec",
        "attention",
        "guiders",
        "unet",
    }
    assert len(families) > 10
    for path, _, names in imports():
        if path.stem in families:
            assert not {name.split(".")[-1] for name in names} & families, path


def test_import_is_cold():
    code = (
        "import sys, stgfast, stgfast.cli; "
        "print([name for name in ('triton', 'diffusers', 'transformers', 'ray') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
