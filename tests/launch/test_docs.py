"""The launchers' lines of the documentation, which are typed as they stand there."""

import re
import shlex

import pytest

from tests.launch.conftest import ROOT

TEXT = (ROOT / "docs" / "pods.md").read_text() + (ROOT / "README.md").read_text()
LINES = re.findall(r"python -m launch\.([a-z_]+) (.*)", re.sub(r"\\\n *", "", TEXT))


@pytest.mark.parametrize(("launcher", "rest"), LINES)
def test_a_line_of_the_documentation_is_taken(fakes, launcher, rest):
    options, _, command = rest.partition("-- ")
    done = fakes.run(launcher, *shlex.split(options), "--dry_run", "--", *shlex.split(command))
    assert (done.returncode, done.stderr) == (0, "")
    assert "experiments.pretrain" in done.stdout
    assert fakes.calls() == []


def test_every_launcher_is_in_the_documentation():
    files = {file.stem for file in (ROOT / "launch").glob("*.py")} - {"__init__", "common"}
    assert {launcher for launcher, _ in LINES} == files
