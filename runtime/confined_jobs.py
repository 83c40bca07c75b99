"""Jobs of a confined process: chat templates, and pictures from files to arrays. Started by `confined`, not imported.

Needs jinja2 and Pillow only, so that the process starts in a fraction of a second; the jobs for transformers' image processors
import transformers. A job is one frame on stdin, its reply one
frame on stdout; the process ends when stdin ends, when a job takes too long, or when memory ran out.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from ..graphs.errors import GuardError, first_line
from .confined_frames import read_frame, write_frame

Reply = tuple[dict[str, Any], bytes]


def serve(memory: int, module: str) -> None:
    """Answer jobs until stdin ends.

    Args:
        memory: bytes of address space that the process may have, where the system can limit it.
        module: dotted, within this package, that the jobs need.
    """
    jobs, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent gets them too, and closes stdin when it ends
        signal.signal(number, signal.SIG_IGN)
    watch = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    import_module(f"{__package__}.{module}")
    _limit(memory)
    write_frame(replies, {"ready": True})
    while (frame := _next(jobs)) is not None:
        header, payload = frame
        # A thread in C: it ends the process even where the job never returns to Python, and where the parent is gone.
        faulthandler.dump_traceback_later(3 * header["seconds"] + 5, exit=True, file=watch)
        _limit_processor(header["seconds"])
        reply, content = _answered(header, payload)
        write_frame(replies, reply, content)
        faulthandler.cancel_dump_traceback_later()
        if "memory" in reply:
            return


def _answered(header: dict[str, Any], payload: bytes) -> Reply:
    try:
        return JOBS[header["job"]](header, payload)
    except MemoryError:
        return {"memory": True}, b""
    except GuardError as error:  # a whole sentence of ours
        return {"refusal": str(error)}, b""
    except Exception as error:  # a program or a file that is not ours may raise anything
        return {"error": first_line(error)}, b""


def _compile(header: dict[str, Any], payload: bytes) -> Reply:
    from .chat.chat_environment import compiled

    return {"literals": list(compiled(payload.decode("utf-8", "surrogatepass")).literals)}, b""


def _render(header: dict[str, Any], payload: bytes) -> Reply:
    from .chat.chat_environment import compiled

    text = compiled(payload.decode("utf-8", "surrogatepass")).render(header["values"])
    return {}, text.encode("utf-8", "surrogatepass")


def _decode(header: dict[str, Any], payload: bytes) -> Reply:
    from .images.picture_files import decode

    image = decode(payload, header["what"], header["damaged"])
    return {"width": image.width, "height": image.height}, image.tobytes()


def _describe(header: dict[str, Any], payload: bytes) -> Reply:
    from .images.transformers_job import describe

    return {"size": describe(header["kind"], header["half"], header["declared"])}, b""


def _prepare(header: dict[str, Any], payload: bytes) -> Reply:
    from PIL import Image

    from .images.array_frames import packed
    from .images.transformers_job import prepare

    image = Image.frombytes("RGB", tuple(header["size"]), payload)
    described, content = packed(prepare(header["kind"], header["half"], header["declared"], header["call"], image))
    return {"arrays": described}, content


JOBS: dict[str, Callable[[dict[str, Any], bytes], Reply]] = {
    "compile": _compile,
    "render": _render,
    "decode": _decode,
    "describe": _describe,
    "prepare": _prepare,
}


def _next(jobs: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    try:
        return read_frame(jobs)
    except (EOFError, struct.error):
        return None


def _limit_processor(seconds: float) -> None:
    """From now on; the system ends the process (SIGXCPU), whatever it is doing."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    except (ImportError, ValueError, OSError):  # the parent's clock is left
        return


def _limit(memory: int) -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, ValueError, OSError):  # Windows and macOS have no such limit; time is limited there too
        return
