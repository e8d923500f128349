"""Fakes of the tools of clouds and clusters, first on the PATH of launchers in own processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("gcloud", "gcluster", "kubectl", "sbatch", "sky")


@dataclasses.dataclass
class Fakes:
    """The fakes' folder, and what runs beside them."""

    root: pathlib.Path
    environment: dict[str, str]

    def plan(self, **entries: list) -> None:
        """What the next calls of a tool, or of gcloud's verbs, do."""
        (self.root / "plan.json").write_text(json.dumps(entries))

    def start(self, launcher: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"launch.{launcher}", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root / "project",
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, launcher: str, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(launcher, *arguments)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[dict]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """What gcloud was asked for, without the looks at the state."""
        return [call["arguments"][3] for call in self.calls() if call["arguments"][3] != "describe"]


@pytest.fixture
def fakes(tmp_path):
    tools, project = tmp_path / "bin", tmp_path / "project"
    tools.mkdir()
    fake = pathlib.Path(__file__).with_name("fake_tool.py")
    for tool in TOOLS:
        (tools / tool).write_text(f'#!/bin/bash\nexec {sys.executable} -I -S {fake} {tool} "$@"\n')
    # What the hosts of a TPU install the project with.
    (tools / "python3.11").write_text(
        "#!/bin/bash\nmkdir -p .venv/bin && printf '#!/bin/bash\\n' > .venv/bin/pip\nchmod +x .venv/bin/pip\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    project.mkdir()
    (project / "constraints.txt").touch()
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    yield Fakes(tmp_path, os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "FAKE_ROOT": str(tmp_path)})
    for file in tmp_path.glob("host*/*/job.pid"):  # what a failed test left running
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue


def check_shell(script: str) -> None:
    """Shellcheck has nothing to say of it."""
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"],
        input=script,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
