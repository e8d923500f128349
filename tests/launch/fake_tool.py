"""Stands for gcloud, gcluster, kubectl, sbatch and sky: records calls, and fails as planned.

FAKE_ROOT holds plan.json, {tool or verb: [what the next calls do, "" for well]}; calls.jsonl, one
call a line; and for gcloud the request and a home for each host, where ssh runs its commands.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_ROOT"])
HOSTS = ("host0", "host1")


def take(name: str, otherwise=""):
    """The plan's next entry for it."""
    plan = json.loads((ROOT / "plan.json").read_text())
    entry, rest = (plan[name][0], plan[name][1:]) if plan.get(name) else (otherwise, [])
    (ROOT / "plan.json").write_text(json.dumps(plan | {name: rest}))
    return entry


def main(tool: str, arguments: list[str]) -> int:
    is_gcloud = tool == "gcloud"
    text = "" if is_gcloud or sys.stdin.isatty() else sys.stdin.read()
    files = {name: pathlib.Path(name).read_text() for name in arguments if name.endswith(".yaml")}
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"tool": tool, "arguments": arguments, "input": text, "files": files}) + "\n")
    if is_gcloud:
        assert arguments[:3] == ["compute", "tpus", "queued-resources"], arguments
        return globals()[arguments[3]](arguments[4:])
    said = take(tool)
    print(said, file=sys.stderr)
    return 1 if said else 0


def create(arguments: list[str]) -> int:
    said = take("create")
    if said:
        print(
            f"Create request issued for: [{arguments[0]}]",
            f"ERROR: {said}",
            "- '@type': more",
            sep="\n",
            file=sys.stderr,
        )
        return 1
    for host in HOSTS:
        (ROOT / host).mkdir()
    (ROOT / "states.json").write_text(json.dumps(take("states", ["ACTIVE"])))
    return 0


def describe(_: list[str]) -> int:
    said = take("describe")
    if said or not (ROOT / "states.json").exists():
        said = said or "(gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found."
        print(f"ERROR: {said}", "- '@type': more", sep="\n", file=sys.stderr)
        return 1
    states = json.loads((ROOT / "states.json").read_text())
    if (ROOT / "preempt").exists():
        (ROOT / "preempt").unlink()
        states = ["SUSPENDING", "SUSPENDED"]
    (ROOT / "states.json").write_text(json.dumps(states[1:] or states))
    failed = {"failedData": {"error": {"code": 8, "message": "no such network"}}} if states[0] == "FAILED" else {}
    print(
        json.dumps(
            {
                "name": "projects/p/locations/z/queuedResources/run1",
                "state": {"state": states[0], **failed},
            }
        )
    )
    return 0


def delete(_: list[str]) -> int:
    for host in HOSTS:
        shutil.rmtree(ROOT / host)
    (ROOT / "states.json").unlink()
    return 0


def is_up() -> bool:
    states = json.loads((ROOT / "states.json").read_text())
    return not (ROOT / "preempt").exists() and states == ["ACTIVE"]


def scp(arguments: list[str]) -> int:
    archive, target = (word for word in arguments if not word.startswith("--"))
    for host in HOSTS if is_up() else ():
        shutil.copy(archive, ROOT / host / target.partition(":")[2])
    return 0 if is_up() else 255


def ssh(arguments: list[str]) -> int:
    how = take("ssh")
    (script,) = (word.removeprefix("--command=") for word in arguments if word.startswith("--command="))
    if how == "lost" or not is_up():
        return 255
    codes = []
    for host in HOSTS if "--worker=all" in arguments else HOSTS[:1]:
        home = {"HOME": str(ROOT / host)}
        with subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT / host, env=os.environ | home, stdout=subprocess.PIPE
        ) as process:
            for number, line in enumerate(process.stdout or ()):
                if how == f"cut after {number}":
                    process.kill()
                    return 255
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            codes.append(process.wait())
    return 255 if not is_up() else next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
