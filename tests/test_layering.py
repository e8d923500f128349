"""Imports go one way: a file imports strictly lower ranks and its own package; flax.linen stays in two places."""

import ast
import pathlib

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


def test_a_violation_is_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import jaxgpt.train.loop\nfrom jaxgpt.models import decoder\nfrom flax import linen\nimport jax\n")
    assert violations(bad, "data") == ["jaxgpt.train.loop", "jaxgpt.models.decoder", "flax.linen"]
