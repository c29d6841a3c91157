"""Python processes that start with torch and DeepSpeed imported, which takes longer than a tiny model trains.

A server imports both once, and forks for each process that is asked for. The fork gets an environment, working
directory, output and `sys.argv` of its own, imports this project anew, runs a module or a script as `python` would, and
goes through the interpreter's whole shutdown. What concerns launchers, start-up or imports uses real starts instead.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.02
EARLIER_IMPORTS = ("deepspeed", "torch._dynamo", "tokenizers", "safetensors.torch", "numpy", "yaml", "tqdm")
"""`torch._dynamo` comes with torch's optimizers."""


class PreparedProcess:
    """A process of the server's; as subprocess.Popen, as far as it goes.

    words: what stands after `python`: `-m module ...` or `script.py ...`. Its output is appended to a file.
    """

    def __init__(self, words: list[str], environment: dict[str, str], output: Path, cwd: Path = ROOT):
        self.args = words
        job = {"words": words, "environment": environment, "output": str(output), "cwd": str(cwd)}
        self.pid = _server().start(job)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return _server().exit_code(self.pid)

    def wait(self, timeout: float = 600) -> int:
        """Wait for the exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        return code

    def kill(self) -> None:
        """Send SIGKILL, if it is still there."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class _Server:
    """The client's side of the server: requests go to its stdin, answers come from its stdout, a JSON line each."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # no thread may be there when it forks
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.prepared"],
            cwd=ROOT, env=environment, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.unread = b""
        self.exit_codes: dict[int, int] = {}
        atexit.register(self.close)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        request = memoryview(json.dumps(job).encode() + b"\n")
        while request:
            request = request[self.process.stdin.write(request) or 0 :]
        while True:
            for answer in self._answers():
                if "started" in answer:
                    return answer["started"]

    def exit_code(self, pid: int) -> int | None:
        while select.select([self.process.stdout], [], [], 0)[0]:
            self._answers()
        return self.exit_codes.get(pid)

    def _answers(self) -> list[dict[str, int]]:
        """Wait for answers, and note the exit codes among them. Nothing stays in a buffer that `select` cannot see."""
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), 1 << 16)
        assert read, "the server of prepared processes has ended"
        *lines, self.unread = (self.unread + read).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self.exit_codes |= {answer["ended"]: answer["exit_code"] for answer in answers if "ended" in answer}
        return answers


_running: list[_Server] = []


def _server() -> _Server:
    if not _running:
        _running.append(_Server())
    return _running[0]


def serve() -> dict[str, Any]:
    """Fork for every request on stdin. Returns in each fork, with its job; the server itself ends with its client."""
    pending, children = b"", 0
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            if not (read := os.read(0, 1 << 16)):
                os._exit(0)
            pending += read
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                return json.loads(line)
            children += 1
            _tell({"started": pid})
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            children -= 1
            _tell({"ended": pid, "exit_code": os.waitstatus_to_exitcode(status)})


def _tell(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def become(job: dict[str, Any]) -> None:
    """Run the job's module or script in this process, as `python WORDS` would."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    is_module, words = job["words"][0] == "-m", job["words"]
    place = job["cwd"] if is_module else str(Path(words[0]).absolute().parent)
    added = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *added, *(path for path in sys.path if path != str(ROOT))]
    sys.argv = words[1:] if is_module else list(words)
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for name in EARLIER_IMPORTS:
        __import__(name)
    become(serve())
