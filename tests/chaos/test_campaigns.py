"""A small part of the campaigns, always the same; and the layer of faults by itself. `make chaos` has the whole."""

import os
import random
import subprocess
import sys

import pytest

from tests.chaos.damage import damaged
from tests.chaos.kills import places
from tests.chaos.world import COMMANDS, NAMES_OF_COMMANDS, PARENTS, difference, with_parents

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Seven operations on a, a.tmp and folder, which is there in the end; then one elsewhere.
WORK = """
import os, sys
from tests.chaos.faults import Counter, Fault, install
root, kind, at, after, log = sys.argv[1:]
counter = Counter()
install(root, counter, Fault(kind, int(at), after == "True") if kind else None)
try:
    os.makedirs(root + "/folder")
    with open(root + "/folder/a.tmp", "w") as file:
        file.write("text")
        file.flush()
        os.fsync(file.fileno())
    os.replace(root + "/folder/a.tmp", root + "/folder/a")
    os.remove(root + "/folder/a")
    os.rmdir(root + "/folder")
    os.mkdir(root + "/folder")
except OSError as error:
    print(error.errno, end=" ")
with open(log, "w") as file:
    file.write("elsewhere")
print(counter.value)
"""


def work(root, kind="", at=0, after=False) -> subprocess.CompletedProcess:
    root.mkdir(exist_ok=True)
    arguments = [str(root), kind, str(at), str(after), f"{root}.log"]
    return subprocess.run(
        [sys.executable, "-c", WORK, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        start_new_session=True,
    )  # fmt: skip


def test_operations_below_the_folder_are_counted_and_others_are_not(tmp_path):
    assert work(tmp_path / "root").stdout == "7\n"


@pytest.mark.parametrize(
    ("at", "after", "left"),
    [(1, False, []), (1, True, ["folder"]), (2, True, ["folder", "folder/a.tmp"]), (4, False, ["folder", "folder/a.tmp"]),
     (4, True, ["folder", "folder/a"]), (6, False, ["folder"]), (6, True, [])],
)  # fmt: skip
def test_a_process_dies_before_or_after_its_nth_operation(tmp_path, at, after, left):
    root = tmp_path / "root"
    assert work(root, "kill", at, after).returncode == -9
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == left


@pytest.mark.parametrize(
    ("kind", "at", "printed"),
    [("ENOSPC", 3, "28 3\n"), ("EROFS", 1, "30 1\n"), ("EIO", 4, "5 4\n"), ("ENOSPC", 5, "28 7\n"), ("EIO", 8, "7\n")],
)
def test_an_operation_fails_as_it_does_on_a_bad_disk(tmp_path, kind, at, printed):
    assert work(tmp_path / "root", kind, at).stdout == printed  # a full disk still lets files be removed: 5 and 6


def test_places_are_spread_and_inside():
    for total, count in ((219, 14), (17, 17), (3, 8)):
        found = places(total, count, random.Random(0))
        assert len(found) == count
        assert found == sorted(found)
        assert 1 <= min(found) <= max(found) <= total
        assert all(total * k // count <= at - 1 <= total * (k + 1) / count for k, at in enumerate(found))


@pytest.mark.parametrize("kind", ["flipped", "cut", "emptied", "removed"])
def test_damage_is_done(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    damaged(str(path), kind, random.Random(0))
    now = path.read_bytes() if path.exists() else None
    if kind == "flipped":
        assert now is not None
        assert sum((a ^ b).bit_count() for a, b in zip(now, range(100), strict=True)) == 1
    else:
        assert {"cut": now is not None and 0 < len(now) < 100 and now == bytes(range(len(now))),
                "emptied": now == b"", "removed": now is None}[kind]  # fmt: skip


def test_differences_are_named():
    assert difference({"a": "1", "b": "1"}, {"a": "2", "c": "3"}) == ["a differs", "b is missing", "c is left behind"]


def test_parents_come_first():
    assert with_parents(["import_hf"]) == ["tokenizer", "pretrain", "export_hf", "import_hf"]
    order = {name: i for i, name in enumerate(NAMES_OF_COMMANDS)}
    assert len(order) == len(COMMANDS) == 14
    assert all(order[parent] < order[name] for name, parents in PARENTS.items() for parent in parents)


@pytest.mark.parametrize(
    "arguments",
    [
        ["kills", "--kills=3", "--commands=pretrain"],
        ["damage", "--files=3", "--commands=finalize"],
        ["disk", "--faults=2", "--commands=export_hf"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_part_of_a_campaign(arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.chaos.{arguments[0]}", *arguments[1:], "--workers=1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
