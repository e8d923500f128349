"""Imports go one way: a file imports strictly lower ranks and its own package; flax.linen stays in two places."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (  # of the house, the lowest first
    ("types",),
    ("tree", "numerics", "partition", "nearest", "json_object"),
    ("config",),
    ("data", "models"),
    ("objectives", "generate", "runs", "rewards"),
    ("train", "evaluation"),
    ("rl", "finalize", "interop", "reporting"),
    ("pipeline", "serving"),
)
RANKS = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}


def violations(path: pathlib.Path, package: str) -> list[str]:
    """What a file of jaxgpt.<package> imports against the rules."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] in ("experiments", "configs", "launch", "tests"):
                found.append(name)
            if parts[0] == "jaxgpt" and parts[1] != package and RANKS[parts[1]] >= RANKS[package]:
                found.append(name)
            if name.startswith("flax.linen") and package not in ("models", "partition"):
                found.append(name)
    return found


def test_imports_go_down():
    files = [p for p in sorted((ROOT / "jaxgpt").rglob("*.py")) if p.parent.name != "jaxgpt" or p.stem != "__init__"]
    assert len(files) > 25
    for path in files:
        package = path.relative_to(ROOT / "jaxgpt").parts[0].removesuffix(".py")
        assert violations(path, package) == [], path


def imported(path: pathlib.Path) -> set[str]:
    """The modules named in the imports of a file, those inside of functions too; `from a import b` names a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def order(root: pathlib.Path, *folders: str) -> list[str]:
    """The modules of folders below root, each after those that it imports; CycleError where there is a circle."""
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py")) if path.stem != "__init__"]
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in files}
    graph = {name: imported(path) & modules.keys() for name, path in modules.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_files_import_one_another_in_a_circle():
    assert len(order(ROOT, "jaxgpt", "experiments", "configs", "launch")) > 100


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.py").write_text("from a import c\n")
    (tmp_path / "a/c.py").write_text("def f():\n    from a.b import g\n")
    with pytest.raises(graphlib.CycleError):
        order(tmp_path, "a")


def test_every_room_says_in_two_sentences_what_lives_there():
    for folder in ("jaxgpt", "experiments"):
        for path in (ROOT / folder).glob("*/__init__.py"):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert said.count(". ") + said.count(".\n") + said.endswith(".") >= 2, path


def test_a_violation_is_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import jaxgpt.train.loop\nfrom jaxgpt.models import decoder\nfrom flax import linen\nimport jax\n")
    assert violations(bad, "data") == ["jaxgpt.train.loop", "jaxgpt.models.decoder", "flax.linen"]
