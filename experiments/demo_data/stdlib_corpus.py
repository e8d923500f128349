"""A corpus that every Python installation has: its standard library's docstrings, language reference and source.

Files are read with ast; nothing is imported or run.
"""

import ast
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
SOURCE_BYTES = 6000  # sources are cut between top-level statements into documents of about this size


class CorpusStats(NamedTuple):
    """UTF-8 bytes and number of documents, by kind."""

    documents: dict[str, int]
    num_bytes: dict[str, int]

    def __str__(self) -> str:
        return "\n".join(
            f"{kind:<10} {count:>6,} documents {self.num_bytes[kind]:>12,} bytes"
            for kind, count in self.documents.items()
        )


def write_stdlib_corpus(
    path: str, *, max_bytes: int, skip: Callable[[str], bool] = lambda module: False
) -> CorpusStats:
    """Write jsonl documents {"text", "source"}: reference topics, docstrings by module, then source, up to max_bytes.

    Modules whose dotted name (`os`, `xml.dom.minidom`) makes `skip` true give neither docstrings nor source; the
    reference describes the language and is always in. The same interpreter and `skip` give the same file. Texts that
    occur twice are written once.
    """
    everything = list(modules(sysconfig.get_paths()["stdlib"]))
    kept = [module for module in everything if not skip(module.name)]
    kinds = {"reference": _reference(everything), "docstrings": _docstrings(kept), "source": _sources(kept)}
    documents, num_bytes, seen = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0), set()
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for kind, texts in kinds.items():
            for source, text in texts:
                size = len(text.encode())
                if text in seen or sum(num_bytes.values()) + size > max_bytes:
                    continue
                seen.add(text)
                file.write(json.dumps({"text": text, "source": source}) + "\n")
                documents[kind] += 1
                num_bytes[kind] += size
    os.replace(f"{path}.tmp", path)
    return CorpusStats(documents, num_bytes)


class Module(NamedTuple):
    """One source file: its dotted name (a package's is that of its folder), its text and the parsed text."""

    name: str
    text: str
    tree: ast.Module


def modules(root: str) -> Iterator[Module]:
    """The parsable modules below `root`, in the order of their paths."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-"))
        for name in sorted(f for f in files if f.endswith(".py")):
            path = os.path.join(folder, name)
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
                tree = ast.parse(text)
            except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
                continue
            parts = os.path.relpath(path, root)[: -len(".py")].split(os.sep)
            yield Module(".".join(p for p in parts if p != "__init__"), text, tree)


def _reference(modules: list[Module]) -> Iterator[tuple[str, str]]:
    """The topics of pydoc_data: a module that is one dict of strings."""
    for module in modules:
        if module.name != "pydoc_data.topics":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if (
                        isinstance(key, ast.Constant)
                        and isinstance(value, ast.Constant)
                        and isinstance(value.value, str)
                    ):
                        yield f"topic {key.value!s}", value.value.strip() + "\n"


def _docstrings(modules: list[Module]) -> Iterator[tuple[str, str]]:
    """One document per module: its docstrings in reading order, each under its name and signature."""
    for module in modules:
        parts = []
        for heading, node in documented(module.tree, module.name):
            docstring = ast.get_docstring(node)
            if docstring:
                parts.append(f"{heading}\n\n{docstring}\n")
        if parts:
            yield module.name, "\n".join(parts)


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """What can carry a docstring, in reading order, under headings such as `class m.C` and `def m.C.f(self, x=1)`.

    The module itself, all classes on its top level or within such classes, and their functions but private ones.
    """
    if isinstance(node, ast.Module):
        yield f"module {name}", node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"class {name}.{child.name}", child
            yield from documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield f"def {name}.{child.name}({ast.unparse(child.args)})", child


def _sources(modules: list[Module]) -> Iterator[tuple[str, str]]:
    """Source text with comments, in pieces that end between top-level statements.

    Docstrings are left out: they are documents of their own, and one that is held out must not be read here.
    """
    for module in modules:
        if module.name == "pydoc_data.topics":
            continue
        lines = module.text.splitlines(keepends=True)
        for line in _docstring_lines(module.tree):
            lines[line] = ""
        starts = [_first_line(node) for node in module.tree.body]
        begin = 0
        for start in [*starts[1:], len(lines)]:
            piece = "".join(lines[begin:start])
            if piece.strip() and (len(piece) >= SOURCE_BYTES or start == len(lines)):
                yield module.name, piece
                begin = start


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Indices of the lines that docstrings stand on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield from range(first.lineno - 1, first.end_lineno or first.lineno)


def _first_line(node: ast.stmt) -> int:
    """Index of a statement's first line, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1
