"""Questions about the standard library and ranked answers to them: instruction and preference data offline.

An answer is the first paragraph of a docstring. Files are read with ast; nothing is imported or run.
"""

import ast
import hashlib
import json
import os
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.demo_data.stdlib_corpus import Module, documented, modules

MIN_WORDS = 4  # shorter docstrings mostly repeat the name
MAX_CALL = 80  # characters; a longer signature is left out of the question

# Modules that are written in one file and imported from another.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "genericpath": "os.path",
    os.path.__name__: "os.path",
    "pathlib._local": "pathlib",
}
# Packages that describe the same functions in nearly the same words: they stay on one side of the split.
SAME_FAMILY = {"ntpath": "os", "posixpath": "os"}

OPENINGS = {
    "class": "What is the class {name}?",
    "property": "What is the property {name}?",
    "method": "What does the method {name} do?",
    "function": "What does the function {name} do?",
}
QUESTIONS = (
    "Describe the {kind} {name}.",
    "What is {name} for?",
    "Explain the {kind} {call}.",
    "Tell me about {call}.",
)

# After one of these words a sentence goes on.
DANGLING = re.compile(
    "a|an|and|are|as|at|be|between|by|for|from|if|into|is|its|of|or|than|the|their|to|using|was|when|where|whether|which|"
    "with",
    re.IGNORECASE,
)


class TaskStats(NamedTuple):
    """Number of records, and of words in their right answers, by file name."""

    records: dict[str, int]
    num_words: dict[str, int]

    def __str__(self) -> str:
        return "\n".join(
            f"{name:<24} {count:>6,} records {self.num_words[name] / max(count, 1):>6.1f} words per answer"
            for name, count in self.records.items()
        )


class _Item(NamedTuple):
    """Something documented: what a question names, and the answer."""

    kind: str  # a key of OPENINGS
    module: str
    name: str  # dotted, module first
    call: str  # the name with its signature, where that is known and short
    text: str


def write_stdlib_tasks(
    folder: str, *, seed: int = 0, heldout_fraction: float = 0.1, max_words: int = 60, max_records: int | None = None
) -> TaskStats:
    """Write questions about public functions, classes and methods, and answers, as jsonl files into `folder`.

      sft_{train,eval}.jsonl          {"prompt", "response", "module", "name"}
      preferences_{train,eval}.jsonl  {"prompt", "responses": [best, ..., worst]}: the right answer, that of a neighbour
                                      in the same module, then either that of something unrelated or the right one cut
                                      off within a sentence
      rl_{train,eval}.jsonl           {"prompt", "reference"}, about the modules of the eval files: two questions about two
                                      thirds of what is in them, one about each of the others

    Eval files are about top-level packages of which the train files hold nothing (see `is_held_out_module`); no text is
    a response on both sides. The same interpreter and arguments give the same files.

    Args:
      folder: made if it is not there; files of these names are replaced.
      heldout_fraction: expected share of the packages that is held out, in (0, 1).
      max_words: answers with more words are left out.
      max_records: bound on the records of each file; None for no bound.

    Raises:
      ValueError: for arguments out of range, and if the seed leaves one side without anything.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction}.")
    if max_words < MIN_WORDS:
        raise ValueError(f"max_words must be at least {MIN_WORDS}, got {max_words}.")
    if max_records is not None and max_records < 1:
        raise ValueError(f"max_records must be positive, got {max_records}.")
    train, heldout = _split(_items(modules(sysconfig.get_paths()["stdlib"]), max_words), seed, heldout_fraction)
    if not train or not heldout:
        side = "eval" if train else "train"
        raise ValueError(f"heldout_fraction={heldout_fraction} with seed={seed} leaves nothing for the {side} files.")
    texts = {_key(item.text) for item in train + heldout}
    ranked = list(_preferences(train, f"{seed} train", texts))
    seen = texts | {_key(response) for row in ranked for response in row["responses"]}
    rows = {
        "sft_train.jsonl": list(_answers(train, seed)),
        "sft_eval.jsonl": list(_answers(heldout, seed)),
        "preferences_train.jsonl": ranked,
        "preferences_eval.jsonl": list(_preferences(heldout, f"{seed} eval", seen)),
        "rl_train.jsonl": [row for i, item in enumerate(heldout) if i % 3 for row in _prompts(item, f"{seed} rl", 2)],
        "rl_eval.jsonl": [row for item in heldout[::3] for row in _prompts(item, f"{seed} rl", 1)],
    }
    return _write(folder, {name: some[:max_records] for name, some in rows.items()})


def is_held_out_module(name: str, seed: int, fraction: float) -> bool:
    """Whether the module of this dotted name belongs to the eval files; all modules of a package answer alike.

    A package is held out if a hash of its name and the seed, as a number in [0, 1), is below `fraction`. Modules
    known by another name (`_pydecimal`, `posixpath`) belong to the package that offers them.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed}:{_family(name)}".encode()).digest()[:8], "big")
    return number / 2**64 < fraction


def _family(module: str) -> str:
    package = PUBLIC_NAMES.get(module, module).partition(".")[0]
    return SAME_FAMILY.get(package, package).lstrip("_")


def _items(found: Iterable[Module], max_words: int) -> Iterator[_Item]:
    """What is public and described in prose of fitting length; the first of several definitions of a name."""
    names = set()
    for module in found:
        public = PUBLIC_NAMES.get(module.name, module.name)
        classes = set()
        for heading, node in documented(module.tree, module.name):
            name = public + heading.partition(" ")[2].partition("(")[0][len(module.name) :]
            if isinstance(node, ast.ClassDef):
                classes.add(name)
            if isinstance(node, ast.Module) or name in names or any(part.startswith("_") for part in name.split(".")):
                continue
            names.add(name)
            text = _first_paragraph(node)
            if is_prose(text) and MIN_WORDS <= len(text.split()) <= max_words:
                kind = _kind(node, is_member=name.rpartition(".")[0] in classes)
                yield _Item(kind, public, name, _call(kind, name, node), text)


def _first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring up to its first blank line, white space made single spaces."""
    return " ".join(re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0].split())


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as sentences, not as a signature, an example, a grammar rule or a list's heading."""
    words = text.split()
    if not words or not re.match(r"[\"'`*]*[A-Za-z]", text) or text[-1] in ":,;(-[":
        return False
    if "(" in words[0] or (len(words) > 1 and words[1][0] in "[<"):
        return False
    if re.search(r"->|=>|>>>|::=| = |==|^\w+:? *-- |[:@]param\b|-----", text):
        return False
    plain = sum(bool(re.fullmatch(r"[(\"'`*]*[A-Za-z][A-Za-z'-]*[)\"'`*.,;:!?]*", word)) for word in words)
    return plain >= 0.6 * len(words)


def _kind(node: ast.ClassDef | ast.FunctionDef, *, is_member: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "abstractproperty"}:
        return "property"
    return "method" if is_member else "function"


def _call(kind: str, name: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    """The name with its parameters (a class's are those of __init__), self and cls left out."""
    if isinstance(node, ast.ClassDef):
        inits = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        init = next(inits, None)
    else:
        init = node
    if kind == "property" or init is None:
        return name
    parameters = ast.unparse(init.args)
    if kind != "function":
        parameters = re.sub(r"^(self|cls)(, /)?(, |$)", "", parameters)
    call = f"{name}({parameters})"
    return call if len(call) <= MAX_CALL else name


def _key(text: str) -> str:
    """What texts that differ by case, punctuation or white space have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _split(items: Iterable[_Item], seed: int, fraction: float) -> tuple[list[_Item], list[_Item]]:
    """The items of train and of held-out packages, each shuffled; a text is kept once, on the train side if it can be."""
    sides: tuple[list[_Item], list[_Item]] = ([], [])
    for item in items:
        sides[is_held_out_module(item.module, seed, fraction)].append(item)
    keys: set[str] = set()
    for side in sides:
        kept = []
        for item in side:
            if _key(item.text) not in keys:
                keys.add(_key(item.text))
                kept.append(item)
        random.Random(f"{seed} order").shuffle(kept)
        side[:] = kept
    return sides


def _question(item: _Item, rng: random.Random) -> str:
    return rng.choice((OPENINGS[item.kind], *QUESTIONS)).format(kind=item.kind, name=item.name, call=item.call)


def _answers(items: Iterable[_Item], seed: int) -> Iterator[dict[str, Any]]:
    for item in items:
        prompt = _question(item, random.Random(f"{seed} sft {item.name}"))
        yield {"prompt": prompt, "response": item.text, "module": item.module, "name": item.name}


def _prompts(item: _Item, seed: str, count: int) -> Iterator[dict[str, Any]]:
    """So many different questions about an item."""
    texts = [text.format(kind=item.kind, name=item.name, call=item.call) for text in (OPENINGS[item.kind], *QUESTIONS)]
    for text in random.Random(f"{seed} {item.name}").sample(texts, count):
        yield {"prompt": text, "reference": item.text}


def _preferences(items: Sequence[_Item], seed: str, texts: Container[str]) -> Iterator[dict[str, Any]]:
    """Ranked answers for each item that has a neighbour; whole sentences stand above fragments.

    `texts` holds the keys that a text cut short must not have.
    """
    neighbours = defaultdict(list)
    for item in items:
        neighbours[item.module].append(item)
    for item in items:
        rng = random.Random(f"{seed} {item.name}")
        near = [other for other in neighbours[item.module] if _is_wrong(other, item)]
        worst = [text for text in (_unrelated(item, items, rng), _cut_short(item.text, rng, texts)) if text]
        if near and worst:
            responses = [item.text, rng.choice(near).text, rng.choice(worst)]
            yield {"prompt": _question(item, rng), "responses": responses}


def _is_wrong(other: _Item, item: _Item) -> bool:
    """Whether the text of `other` cannot pass for an answer about `item`: it may override it, or say the same in short."""
    ours, theirs = _key(item.text), _key(other.text)
    same_name = other.name.rpartition(".")[2].lower() == item.name.rpartition(".")[2].lower()
    return not (same_name or ours.startswith(theirs) or theirs.startswith(ours))


def _unrelated(item: _Item, items: Sequence[_Item], rng: random.Random) -> str | None:
    """The text of something in another package; None if a hundred draws find none."""
    for other in (rng.choice(items) for _ in range(100)):
        if _family(other.module) != _family(item.module) and _is_wrong(other, item):
            return other.text
    return None


def _cut_short(text: str, rng: random.Random, texts: Container[str]) -> str | None:
    """At most the first half of the words, up to one that cannot end a sentence; None if there is no such place."""
    words = text.split()
    ends = [n for n in range(2, len(words) // 2 + 1) if DANGLING.fullmatch(words[n - 1])]
    cuts = [cut for cut in (" ".join(words[:n]) for n in ends) if _key(cut) not in texts]
    return rng.choice(cuts) if cuts else None


def _write(folder: str, rows: dict[str, list[dict[str, Any]]]) -> TaskStats:
    os.makedirs(folder, exist_ok=True)
    for name, some in rows.items():
        path = os.path.join(folder, name)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
        os.replace(f"{path}.tmp", path)
    return TaskStats(
        {name: len(some) for name, some in rows.items()},
        {name: sum(len(_right_answer(row).split()) for row in some) for name, some in rows.items()},
    )


def _right_answer(row: dict[str, Any]) -> str:
    if "responses" in row:
        return row["responses"][0]
    return row["response"] if "response" in row else row["reference"]
