"""Triton's server, started on this machine from NVIDIA's wheel, with the stand-in for its ONNX Runtime backend."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

_STAND_IN = Path(__file__).parent / "backends" / "onnxruntime"
_PATIENCE = 300.0  # seconds, for every model to be loaded


@dataclass(frozen=True)
class Server:
    """Address of a running server."""

    http: str
    grpc: str


@contextlib.contextmanager
def running(repository: Path, home: Path) -> Iterator[Server]:
    """Serve a repository on the loopback interface until the block ends.

    Args:
        repository: its models must all load.
        home: folder for the backends and the log.

    Raises:
        RuntimeError: the server does not get ready; its log's end is in the sentence.
    """
    wheel = Path(str(distribution("nvidia-pytriton").locate_file("")))
    ports = _free_ports(3)
    command = [
        str(wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_backends(wheel, home)}",
        "--disable-auto-complete-config",  # what a config does not say is an error, not a guess
        *(f"--{what}-address=127.0.0.1" for what in ("http", "grpc", "metrics")),
        *(f"--{what}-port={port}" for what, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
    ]
    # The processes of the Python backend embed this Python: its standard library, its libpython, its packages.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(wheel / "nvidia_pytriton.libs")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PYTHONHOME": sys.base_prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    log = home / "server.log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            server = Server(f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
            _await_ready(process, server, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _backends(wheel: Path, home: Path) -> Path:
    """Triton's Python backend with the process for this Python's version, and the stand-in."""
    folder = home / "backends"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(wheel / "pytriton" / "tritonserver" / "backends" / "python", folder / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = wheel / "pytriton" / "tritonserver" / "python_backend_stubs"
    shutil.copy2(stubs / version / "triton_python_backend_stub", folder / "python")
    shutil.copytree(_STAND_IN, folder / "onnxruntime", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _await_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.http}/v2/health/ready", timeout=5)
            return
        time.sleep(0.5)
    raise RuntimeError(f"Triton did not get ready:\n{log.read_text(errors='replace')[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
