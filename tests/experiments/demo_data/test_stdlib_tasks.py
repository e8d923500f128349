"""Questions, answers and rankings made of the standard library's docstrings."""

import ast
import functools
import importlib
import inspect
import json
import re
import sys
import sysconfig

import pytest

from experiments.demo_data import stdlib_corpus, stdlib_tasks

SFT = ("sft_train.jsonl", "sft_eval.jsonl")
RL = ("rl_train.jsonl", "rl_eval.jsonl")
PREFERENCES = ("preferences_train.jsonl", "preferences_eval.jsonl")
HARMLESS = ("argparse", "base64", "calendar", "inspect", "json", "os.path", "pathlib", "random", "shutil", "textwrap")


@pytest.fixture(scope="module")
def walked():
    """The library, read once: the walk takes seconds."""
    found = list(stdlib_corpus.modules(sysconfig.get_paths()["stdlib"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_tasks, "modules", lambda root: found)
        yield found


@pytest.fixture(scope="module")
def tasks(walked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    before = set(sys.modules)
    stats = stdlib_tasks.write_stdlib_tasks(str(folder))
    assert not {m for m in set(sys.modules) - before if m in ("antigravity", "this", "turtle", "tkinter")}
    return folder, stats, {path.name: read(path) for path in folder.iterdir()}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(text):
    return re.sub(r"[^a-z0-9_]+", " ", text.lower()).split()


def documentation(name):
    """The first paragraph of what Python itself says, white space normalised."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        lines = inspect.getdoc(functools.reduce(getattr, parts[n:], found)).strip().splitlines()
        blank = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        return " ".join(" ".join(lines[:blank]).split())
    raise AssertionError(name)


def test_files_hold_the_documented_fields_and_as_many_records_as_the_stats_say(tasks):
    _, stats, rows = tasks
    assert set(rows) == {*SFT, *PREFERENCES, *RL}
    assert stats.records == {name: len(some) for name, some in rows.items()}
    assert stats.num_words["sft_eval.jsonl"] == sum(len(r["response"].split()) for r in rows["sft_eval.jsonl"])
    assert stats.num_words["preferences_eval.jsonl"] == sum(
        len(r["responses"][0].split()) for r in rows["preferences_eval.jsonl"]
    )
    for name, some in rows.items():
        keys = {"prompt", "responses"} if name in PREFERENCES else {"prompt", "reference"}
        keys = {"prompt", "response", "module", "name"} if name in SFT else keys
        assert all(set(row) == keys for row in some)
        assert f"{name} " in str(stats)
        assert f"{len(some):,} records" in str(stats)
    assert len(rows["sft_train.jsonl"]) > 2000
    assert len(rows["sft_eval.jsonl"]) > 50
    assert len(rows["preferences_train.jsonl"]) > 0.9 * len(rows["sft_train.jsonl"])


def test_answers_are_the_first_paragraphs_of_what_python_says(tasks):
    _, _, rows = tasks
    answers = {row["name"]: row["response"] for name in SFT for row in rows[name]}
    assert answers["textwrap.dedent"] == "Remove any common leading whitespace from every line in `text`."
    assert answers["os.path.join"] == documentation("os.path.join")
    known = [row for name in SFT for row in rows[name] if row["module"] in HARMLESS]
    assert len(known) > 150
    for row in known:
        assert row["response"] == documentation(row["name"])


def test_questions_name_what_they_ask_about_in_several_ways(tasks):
    _, _, rows = tasks
    shapes = set()
    for row in rows["sft_train.jsonl"]:
        assert row["name"].startswith(row["module"] + ".")
        assert row["name"] in row["prompt"]
        assert not any(part.startswith("_") for part in row["name"].split("."))
        shapes.add(re.sub(r"\(.*\)", "(...)", row["prompt"].replace(row["name"], "X")))
    assert {
        "What does the function X do?",
        "What is the class X?",
        "Describe the method X.",
        "Tell me about X(...).",
    } <= shapes
    assert 15 < len(shapes) < 40


def test_answers_are_sentences_of_bounded_length_and_occur_once(tasks):
    _, _, rows = tasks
    responses = [row["response"] for name in SFT for row in rows[name]]
    assert all(4 <= len(text.split()) <= 60 for text in responses)
    assert all(text == " ".join(text.split()) for text in responses)
    assert len({" ".join(words_of(text)) for text in responses}) == len(responses)


def test_no_package_and_no_text_is_on_both_sides(tasks):
    _, _, rows = tasks
    train, heldout = ({row["module"].split(".")[0] for row in rows[name]} for name in SFT)
    assert train
    assert heldout
    assert not train & heldout
    texts = []
    for sft, preferences in zip(SFT, PREFERENCES, strict=True):
        ranked = [text for row in rows[preferences] for text in row["responses"]]
        texts.append({tuple(words_of(text)) for text in ranked + [row["response"] for row in rows[sft]]})
    assert not texts[0] & texts[1]
    asked = [{row["reference"] for row in rows[name]} for name in RL]
    assert asked[0] | asked[1] == {row["response"] for row in rows["sft_eval.jsonl"]}
    prompts = [row["prompt"] for row in rows[RL[0]]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("side", [0, 1])
def test_rankings_put_right_over_neighbouring_over_unrelated_or_cut(tasks, side):
    _, _, rows = tasks
    owners = {row["response"]: row for row in rows[SFT[side]]}
    count = {"cut": 0, "unrelated": 0}
    for row in rows[PREFERENCES[side]]:
        best, second, third = row["responses"]
        assert len({" ".join(words_of(text)) for text in row["responses"]}) == 3
        right, near = owners[best], owners[second]
        assert right["name"] in row["prompt"]
        assert near["module"] == right["module"]
        assert near["name"].split(".")[-1] != right["name"].split(".")[-1]
        assert not best.startswith(second)
        assert not second.startswith(best)
        if third in owners:
            count["unrelated"] += 1
            assert owners[third]["module"].split(".")[0] != right["module"].split(".")[0]
        else:
            count["cut"] += 1
            assert best.startswith(third + " ")
            assert len(third.split()) <= len(best.split()) / 2
            assert third.split()[-1].lower() in stdlib_tasks.DANGLING.pattern.split("|")
    assert min(count.values()) > 0.15 * sum(count.values())


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tasks, tmp_path):
    folder, _, rows = tasks
    stdlib_tasks.write_stdlib_tasks(str(tmp_path / "again"))
    for name in rows:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    stats = stdlib_tasks.write_stdlib_tasks(str(tmp_path / "other"), seed=1, max_records=40, max_words=12)
    assert stats.records == dict.fromkeys(rows, 40)
    other = read(tmp_path / "other" / "sft_train.jsonl")
    assert max(len(row["response"].split()) for row in other) <= 12
    assert other != rows["sft_train.jsonl"][:40]


def test_held_out_packages_are_a_fraction_and_keep_their_families_together():
    held = lambda name, seed=0, fraction=0.5: stdlib_tasks.is_held_out_module(name, seed, fraction)
    names = [f"package{i}" for i in range(4000)]
    assert abs(sum(held(n, fraction=0.1) for n in names) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    assert sum(held(n, seed=1) != held(n, seed=2) for n in names) > 1500
    assert all(held(n, fraction=0.7) for n in names if held(n, fraction=0.3))
    for seed in range(30):
        assert held("xml.dom.minidom", seed) == held("xml", seed)
        assert len({held(n, seed) for n in ("os", "os.path", "posixpath", "ntpath", "genericpath")}) == 1
        assert len({held(n, seed) for n in ("decimal", "_pydecimal")}) == 1
        assert len({held(n, seed) for n in ("collections", "collections.abc", "_collections_abc")}) == 1
    # sha256 of "0:os", ... as sha256sum gives it; the split must not move between versions of this library.
    assert [n for n in ("os", "textwrap", "json", "pathlib", "asyncio") if held(n, fraction=0.1)] == ["json", "pathlib"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the number of items.", True),
        ("Like quote(), but accepts bytes rather than a str.", True),
        ("`key` says how to sort the rows", True),
        ("D.get(k[,d]) -> D[k] if k in D, else d.", False),
        ("makedirs(name [, mode=0o777][, exist_ok=False])", False),
        ("run [args...] Restart the debugged program.", False),
        ("CFWS = (1*([FWS] comment) [FWS]) / FWS", False),
        (">>> import io >>> read_uint8(io.BytesIO(b'1'))", False),
        ("Translate arguments, using the same rules as:", False),
        ("datetime minus UTC -> timedelta, positive for east of UTC", False),
        ("Turn it around, as in >>> reverse('abc') 'cba'", False),
        ("A row of 10 20 30 0x40 [50] {60}", False),
        ("", False),
    ],
)
def test_only_prose_passes(text, expected):
    assert stdlib_tasks.is_prose(text) is expected


SOURCE = '''
class Box:
    """Hold things of all sorts."""
    def __init__(self, size, *, color="red"):
        """Make a box of this size."""
    @property
    def color(self):
        """The color that was painted."""
    @color.setter
    def color(self, value):
        """Set the color of the box."""
    def fill(self, /, things):
        """Put all of the things
        into the   box.

        Not this."""
class _Hidden:
    """Not seen by anyone at all."""
    def method(self):
        """Not seen by anyone else, either."""
def short():
    """Only three words."""
def count(boxes=()):
    """Return how many boxes there are."""
'''


def test_kinds_signatures_and_what_is_left_out():
    module = stdlib_corpus.Module("shop.boxes", SOURCE, ast.parse(SOURCE))
    items = list(stdlib_tasks._items([module], 60))
    assert [(i.kind, i.call) for i in items] == [
        ("class", "shop.boxes.Box(size, *, color='red')"),
        ("property", "shop.boxes.Box.color"),
        ("method", "shop.boxes.Box.fill(things)"),
        ("function", "shop.boxes.count(boxes=())"),
    ]
    assert items[1].text == "The color that was painted."
    assert items[2].text == "Put all of the things into the box."
    assert [i.name for i in stdlib_tasks._items([module], 5)] == ["shop.boxes.Box", "shop.boxes.Box.color"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heldout_fraction": 0.0}, "heldout_fraction must lie between 0 and 1, got 0.0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must lie between 0 and 1, got 1.0"),
        ({"max_words": 3}, "max_words must be at least 4, got 3"),
        ({"max_records": 0}, "max_records must be positive, got 0"),
        ({"heldout_fraction": 1e-9}, "leaves nothing for the eval files"),
        ({"heldout_fraction": 1 - 1e-9}, "leaves nothing for the train files"),
    ],
)
def test_arguments_are_checked(walked, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stdlib_tasks.write_stdlib_tasks(str(tmp_path), **arguments)
    assert not list(tmp_path.iterdir())
