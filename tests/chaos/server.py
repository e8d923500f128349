"""A campaign against a real server: many clients, right, wrong and hostile requests, and a stop under load.

    python -m tests.chaos.server --requests=10000 --clients=200

Prints what was sent and answered as a table, and exits with 1 where something happened that must not: an error 5xx (but 503
for limits and at the end), a request with neither an answer nor an end in time, a slot or a file descriptor that stays
taken, memory that grows, a text that differs from what the same seed gives alone, a traceback.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.serving.bodies import bodies

KINDS = ("fuzzed", "seeded", "cut", "half", "slow", "protocol", "place")
WEIGHTS = (60, 14, 8, 3, 2, 8, 5)
SEEDS = range(8)
ANSWER_SECONDS = 60.0
SERVER_FLAGS = ("--config.port=0", "--config.num_slots=8", "--config.request_seconds=2", "--config.init_from=tiny")
PROTOCOL = (
    b"garbage\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
)  # fmt: skip
PLACES = (
    ("GET", "/v1/completions"), ("POST", "/health"), ("PUT", "/v1/models"), ("DELETE", "/"), ("GET", "/v1/models/%ff%00"),
    ("GET", "/../../etc/passwd"), ("OPTIONS", "/v1/completions"), ("HEAD", "/health"), ("GET", "/v1/models"),
)  # fmt: skip


def serve_tiny() -> None:
    """`experiments.serve` with a random model in place of one that is loaded."""
    import jax

    from experiments import serve
    from experiments.shared import cli
    from jaxgpt import partition
    from jaxgpt.models import decoder
    from jaxgpt.runs.load import LoadedModel
    from tests.serving import tiny

    params = partition.unbox(jax.jit(lambda: decoder.init_params(tiny.CFG, jax.random.key(0)))())

    def load(_, mesh):
        placed = jax.device_put(params, partition.replicated(mesh))
        return LoadedModel(tiny.CFG, placed, tiny.TOKENIZER, tiny.TEMPLATE)

    serve.load_model = load
    cli.run(serve.main, serve.ServeConfig, default_config="configs/serve.py", needs_workdir=False)


class Campaign:
    """Clients of a server, and what they saw. counts: answers by kind of request and status. violations: what must not be."""

    def __init__(self, port: int, number: int):
        self.port, self.counts = port, collections.Counter()
        self.violations: list[str] = []
        self.fuzzed = draw_bodies(number, "tiny")
        self.alone: dict[int, str] = {}

    async def send(self, data: bytes, *, read: float | None = None, pause: float = 0.0) -> bytes:
        """What comes back until the server closes; read: bytes after which the client goes away."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return b""
        try:
            writer.write(data)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
            return await (reader.read() if read is None else reader.read(int(read)))
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()

    async def one(self, kind: str, index: int, rng: random.Random) -> None:
        """A request of a kind, and its answer's judgement."""
        try:
            answer = await asyncio.wait_for(self._ask(kind, index, rng), ANSWER_SECONDS)
        except TimeoutError:
            self.violations.append(f"{kind} {index}: neither answered nor closed in {ANSWER_SECONDS:g} s")
            return
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"
        self.counts[kind, status] += 1
        if status.startswith("5") and status != "503":
            self.violations.append(f"{kind} {index}: {status}: {answer[-200:]!r}")
        if kind in ("fuzzed", "seeded", "place") and status == "closed":
            self.violations.append(f"{kind} {index}: closed without an answer")

    async def _ask(self, kind: str, index: int, rng: random.Random) -> bytes:
        path, body = self.fuzzed[index % len(self.fuzzed)]
        if kind == "fuzzed":
            return await self.send(post(path, body))
        if kind == "seeded":
            which = rng.choice(SEEDS)
            answer = await self.send(seeded(which))
            if answer.startswith(b"HTTP/1.1 200") and text_of(answer) != self.alone[which]:
                self.violations.append(f"seeded {index}: seed {which} gave another text than alone")
            return answer
        if kind == "cut":
            streamed = {"model": "tiny", "prompt": "Ann", "max_tokens": 60, "stream": True}
            return await self.send(post("completions", json.dumps(streamed).encode()), read=rng.choice([1, 300]))
        if kind == "half":
            data = post(path, body)
            return await self.send(data[: rng.randrange(len(data))], pause=rng.choice([0, 0.05]), read=1)
        if kind == "slow":
            chatty = {"model": "tiny", "prompt": "Ann", "max_tokens": 40, "logprobs": 20, "n": 4, "stream": True}
            return await self.send(post("completions", json.dumps(chatty).encode()), pause=0.5)
        if kind == "protocol":
            return await self.send(rng.choice(PROTOCOL))
        method, place = rng.choice(PLACES)
        return await self.send(f"{method} {place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())

    async def burst(self, number: int, clients: int, start: int = 0) -> None:
        """So many requests, the i-th of a kind that i decides, from so many clients."""
        indices = iter(range(start, start + number))

        async def client() -> None:
            for index in indices:
                rng = random.Random(index)
                await self.one(rng.choices(KINDS, WEIGHTS)[0], index, rng)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def load(self) -> tuple[str, int, int]:
        """What /health says: status, running, waiting."""
        answer = await self.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        said = json.loads(answer.split(b"\r\n\r\n")[1])
        return said["status"], said["running"], said["waiting"]

    async def settle(self, process: psutil.Process, files: int) -> int:
        """Wait until nothing runs and no connection stays, up to 10 s; the resident bytes then."""
        for _ in range(100):
            load = await self.load()
            if load == ("ok", 0, 0) and process.num_fds() <= files + 1:
                break
            await asyncio.sleep(0.1)
        else:
            self.violations.append(f"after all requests: health {load}, {process.num_fds()} files open, {files} before")
        return process.memory_info().rss


def draw_bodies(number: int, model: str) -> list[tuple[str, bytes]]:
    """The same bodies every time."""
    drawn: list[tuple[str, bytes]] = []

    @seed(0)
    @settings(
        max_examples=number,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(model))
    def collect(request):
        drawn.append(request)

    collect()
    return drawn


def post(path: str, body: bytes) -> bytes:
    """The bytes of a request."""
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def seeded(which: int) -> bytes:
    """A completion whose text its seed decides."""
    return post("completions", json.dumps({"model": "tiny", "prompt": "Ann", "max_tokens": 12, "seed": which}).encode())


def text_of(answer: bytes) -> str:
    """The first choice's text."""
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["choices"][0]["text"]


async def campaign(process: subprocess.Popen, port: int, number: int, clients: int) -> Campaign:
    """All of it: texts alone, a warm-up, the requests, the peace after, and a stop under load."""
    run, watched = Campaign(port, number), psutil.Process(process.pid)
    for which in SEEDS:
        run.alone[which] = text_of(await run.send(seeded(which)))
    files = watched.num_fds()
    await run.burst(max(number // 10, clients), clients)
    before = await run.settle(watched, files)
    await run.burst(number, clients, start=number)
    after = await run.settle(watched, files)
    grown = (after - before) / 2**20
    print(f"resident memory {before / 2**20:.0f} MiB after the warm-up, {after / 2**20:.0f} MiB at the end")
    if grown > 30 + 0.002 * number:
        run.violations.append(f"memory grew by {grown:.0f} MiB")
    last = asyncio.create_task(run.burst(2 * clients, clients, start=2 * number))
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.wait, 60)
    run.port = 1  # nobody is there any more: what is left of the clients ends at once
    kept = len(run.violations)
    await last
    run.violations = [v for i, v in enumerate(run.violations) if i < kept or "closed without" not in v]
    if code != 0:
        run.violations.append(f"the server ended with exit code {code}")
    return run


def main(number: int, clients: int) -> int:
    """The exit code: 0 where nothing happened that must not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
    command = [sys.executable, "-m", "tests.chaos.server", "serve", *SERVER_FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    errors: list[str] = []
    reading = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reading.start()
    watchdog = threading.Timer(120 + number / 10, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        found = re.search(r":(\d+)/v1", line)
        if not found:
            process.kill()
            reading.join()
            print(f"the server did not start: {errors[0][-2000:]}")
            return 1
        run = asyncio.run(campaign(process, int(found[1]), number, clients))
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        reading.join()
        for pipe in (process.stdout, process.stderr):
            pipe.close()
    if errors[0].strip():
        run.violations.append(f"{len(errors[0])} characters on stderr: {errors[0][:1500]}")
    statuses = sorted({status for _, status in run.counts})
    print(f"{'':10}" + "".join(f"{status:>8}" for status in statuses) + f"{'all':>8}")
    for kind in KINDS:
        row = [run.counts[kind, status] for status in statuses]
        print(f"{kind:10}" + "".join(f"{count:8}" for count in row) + f"{sum(row):8}")
    print(f"{sum(run.counts.values())} requests by {clients} clients, {len(run.violations)} violations")
    for violation in run.violations[:20]:
        print(f"violation: {violation}")
    return int(bool(run.violations))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        del sys.argv[1]
        serve_tiny()
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--requests", type=int, default=10_000)
        parser.add_argument("--clients", type=int, default=200)
        arguments = parser.parse_args()
        sys.exit(main(arguments.requests, arguments.clients))
