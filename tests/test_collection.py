"""The ids of tests are functions of the code alone: workers of one run, and runs on any machine, have the same."""

import os
import pathlib
import subprocess
import sys

from tests.conftest import COLLECTED

ROOT = pathlib.Path(__file__).parents[1]
# Another process, on another day, in another time zone, with another order of sets.
COLLECT = """
import sys, time
import pytest
now = time.time
time.time = lambda: now() + 1e7
time.time_ns = lambda: int(1e9 * time.time())

class Names:
    def pytest_itemcollected(self, item):
        print(item.nodeid)

options = ["--collect-only", "-qq", "-s", "-p", "no:randomly", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[Names()]))
"""


def test_ids_do_not_depend_on_the_clock_or_the_order_of_sets(request):
    ours = request.config.stash[COLLECTED]
    files = sorted({name.split("::")[0] for name in ours})
    hash_seed = "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *files],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = done.stdout.splitlines()
    for file in files:
        of_file = [name for name in ours if name.startswith(f"{file}::")]
        assert of_file == [name for name in theirs if name in set(of_file)]
