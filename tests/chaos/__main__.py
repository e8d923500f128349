"""All campaigns in turn, and one table of what came of them; `make chaos`.

    python -m tests.chaos [--only=kills,damage] [--share=1.0] [--seed=0] [--workers=2]

Exits with 1 where any has failed. share: of the usual number of attempts, for the campaigns of this folder that count them.
"""

import argparse
import importlib.util
import subprocess
import sys
import time

CAMPAIGNS = ("mistakes", "kills", "damage", "disk", "server")
COUNTS = {"kills": ("kills", 200), "damage": ("files", 120), "disk": ("faults", 60)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(CAMPAIGNS), help="campaigns, with commas between")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of attempts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for name in options.only.split(","):
        if name not in CAMPAIGNS:
            parser.error(f"there is no campaign {name!r}; there are {', '.join(CAMPAIGNS)}")
    rows, failed = [], False
    for name in options.only.split(","):
        if importlib.util.find_spec(f"tests.chaos.{name}") is None:
            continue
        flags = []
        if name in COUNTS:
            flag, count = COUNTS[name]
            flags = [f"--{flag}={max(1, round(options.share * count))}", f"--seed={options.seed}"]
            flags += [f"--workers={options.workers}"]
        print(f"\n== python -m tests.chaos.{name} {' '.join(flags)}", flush=True)
        started, last = time.monotonic(), ""
        with subprocess.Popen(
            [sys.executable, "-m", f"tests.chaos.{name}", *flags], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = " ".join(line.split()) or last
        rows.append((name, process.returncode, time.monotonic() - started, last))
        failed = failed or process.returncode != 0
    print("\ncampaign   exit  seconds  its last line")
    for name, code, seconds, last in rows:
        print(f"{name:9}  {code:4}  {seconds:7.0f}  {last}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
