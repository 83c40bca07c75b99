"""The command line in a forked process, with a budget or an early end: what the fuzzer and the killer share.

The parent has imported everything, so a case costs its own work and not seconds of imports. It must run nothing itself before
it forks: a runtime's threads do not come along.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
        said: its stderr.
        seconds: how long it took.
    """

    code: int
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def prepare() -> None:
    """Import once what every command needs."""
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    import vlmguard.cli
    import vlmguard.exporter.evaluation.evaluate
    import vlmguard.exporter.pipeline
    import vlmguard.exporter.proof.verify  # noqa: F401


def command(arguments: list[str], seconds: float, memory: int | None = None) -> Ended:
    """Run `vlmguard ARGUMENTS`; after `seconds` it gets SIGKILL.

    Args:
        memory: bytes of address space that it may have beyond what it begins with.
    """
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_the_command(arguments, said.fileno(), memory)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - started > seconds:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.001)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
        return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - started)


def _be_the_command(arguments: list[str], said: int, memory: int | None) -> None:
    """Never returns: a fork that went on would be a second parent."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        if memory is not None:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        # The budget here is the caller's: the command runs in this process, which is the one that is killed.
        os.environ |= {"VLMGUARD_MAX_SECONDS": "0", "VLMGUARD_MAX_MEMORY": "0"}
        sys.argv = ["vlmguard", *arguments]
        from vlmguard.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
