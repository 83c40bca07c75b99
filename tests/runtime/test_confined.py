"""The process that can be ended: what it answers, how it is ended, and that nothing else comes of it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile.templates import EXPLODING, SAID
from PIL import Image

from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.runtime.chat import chat_template
from vlmguard.runtime.chat.chat_environment import LONGEST_TEXT
from vlmguard.runtime.chat.chat_template import ChatTemplate
from vlmguard.runtime.confined import ConfinedFailure, ConfinedPool
from vlmguard.runtime.images.open_picture import open_image
from vlmguard.runtime.images.picture_files import MOST_SCANS

HELLO = [{"role": "user", "content": "hello"}]
MEBIBYTE = 1 << 20


@pytest.fixture
def pool() -> Iterator[ConfinedPool]:
    made = ConfinedPool(seconds=2, memory=512 * MEBIBYTE)
    yield made
    made.close()


def render(pool: ConfinedPool, source: str = SAID, word: str = "hello") -> str:
    values = {"messages": [{"role": "user", "content": word}]}
    return pool.run("render", {"values": values}, source.encode())[1].decode()


def test_a_job_is_answered_and_its_process_kept(pool: ConfinedPool) -> None:
    assert render(pool) == "hello"
    (helper,) = pool._idle
    assert [render(pool, word=word) for word in ("a", "ü\n\0", "\U0001f600")] == ["a", "ü\n\0", "\U0001f600"]
    assert pool._idle == [helper] and helper.poll() is None


@pytest.mark.slow
def test_what_takes_too_long_is_ended_and_the_next_job_is_answered(pool: ConfinedPool) -> None:
    with pytest.raises(ConfinedFailure, match=r"^it takes more than 2 s$"):
        render(pool, "{{ lipsum(n=99999999) }}")
    assert pool._idle == [] and render(pool) == "hello"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
def test_what_wants_too_much_memory_is_ended_and_the_next_job_is_answered(pool: ConfinedPool) -> None:
    with pytest.raises(ConfinedFailure, match=r"^it needs more than 512 MiB of memory$"):
        render(pool, EXPLODING["center"])
    assert pool._idle == [] and render(pool) == "hello"


def test_a_helper_that_was_killed_is_replaced(pool: ConfinedPool) -> None:
    render(pool)
    (helper,) = pool._idle
    helper.kill()
    helper.wait()
    assert render(pool) == "hello" and pool._idle != [helper]


def test_many_threads_share_a_few_helpers(pool: ConfinedPool) -> None:
    pool.seconds = 60
    with ThreadPoolExecutor(16) as threads:
        words = [f"word {number}" for number in range(200)]
        assert list(threads.map(lambda word: render(pool, word=word), words)) == words
    assert 1 <= len(pool._idle) <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_starts_its_own(pool: ConfinedPool) -> None:
    render(pool)
    child = os.fork()
    if child == 0:
        os._exit(0 if not pool._idle and render(pool) == "hello" and pool.close() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render(pool) == "hello"


def test_an_interpreter_that_cannot_be_started_is_one_sentence(
    pool: ConfinedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: b"/nowhere/python")
    with pytest.raises(GuardError) as raised:
        render(pool)
    assert str(raised.value) == (
        "the process for chat templates and pictures cannot be started with /nowhere/python (No such file or directory); "
        "name a Python interpreter with multiprocessing.set_executable"
    )


PARENT = """
import os, sys
from vlmguard.runtime.confined import TEMPLATES
TEMPLATES.run("render", {"values": {}}, b"x")
print(TEMPLATES._idle[0].pid, flush=True)
os.kill(os.getpid(), int(sys.argv[1])) if int(sys.argv[1]) else None
"""


@pytest.mark.parametrize("signalled", [0, int(getattr(signal, "SIGKILL", 9))])
@pytest.mark.skipif(sys.platform == "win32", reason="a process is asked for by a signal")
def test_helpers_end_with_their_parent_even_if_it_is_killed(signalled: int) -> None:
    done = subprocess.run([sys.executable, "-c", PARENT, str(signalled)], capture_output=True, text=True, timeout=60)
    helper = int(done.stdout)
    for _ in range(600):
        try:
            os.kill(helper, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the helper goes on")


def test_nothing_in_the_current_folder_is_imported(tmp_path: Path) -> None:
    """Users go to the folder of a model that they look at, and it may hold a `jinja2.py`."""
    for name in ("jinja2", "PIL", "vlmguard", "json", "encodings"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    # After the import: an editable install is found by a hook that comes after sys.path, so the parent would import these.
    script = PARENT.replace("TEMPLATES.run(", "sys.path.append(''); TEMPLATES.run(")
    assert "append" in script
    subprocess.run(
        [sys.executable, "-P", "-c", script, "0"], cwd=tmp_path, check=True, timeout=60, stdout=subprocess.DEVNULL
    )
    assert not (tmp_path / "imported").exists()


def test_a_helper_imports_neither_a_framework_nor_a_runtime() -> None:
    """It would take seconds to start, and hundreds of megabytes."""
    code = (
        "import sys, io, struct, json\n"
        "from vlmguard.runtime import confined_jobs\n"
        "from vlmguard.runtime.chat import chat_environment\n"
        "from vlmguard.runtime.images import picture_files\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'tokenizers', 'pydantic'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


# ------------------------------------------------------------------------------------------------------------- templates


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
@pytest.mark.parametrize("name", sorted(EXPLODING))
def test_exploding_templates_are_refused_in_one_line(
    name: str, tmp_path: Path, pool: ConfinedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATES", pool)
    assert len(EXPLODING[name]) < 1000
    with pytest.raises(ModelUnreadable) as raised:
        ChatTemplate.compile(tmp_path, EXPLODING[name] + SAID, {}).render(HELLO)
    line = str(raised.value)
    assert line.startswith(f"{tmp_path}: its chat template ") and "\n" not in line
    assert ChatTemplate.compile(tmp_path, SAID, {}).render(HELLO) == "hello"


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    source = "{% for i in range(20) %}{{ 'x' * 1000000 }}{% endfor %}"
    with pytest.raises(ModelUnreadable) as raised:
        ChatTemplate.compile(tmp_path, source, {}).render(HELLO)
    assert f"(it writes 20000000 characters, more than {LONGEST_TEXT})" in str(raised.value)
    assert len(ChatTemplate.compile(tmp_path, source.replace("20", "10"), {}).render(HELLO)) == 10_000_000


# -------------------------------------------------------------------------------------------------------------- pictures


def jpeg(scans: int, edge: int = 16) -> bytes:
    """A progressive JPEG with one scan repeated."""
    made = io.BytesIO()
    Image.effect_noise((edge, edge), 60).convert("RGB").save(made, "JPEG", progressive=True)
    content = made.getvalue()
    starts = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    last, end = starts[-1], len(content) - 2
    return content[:end] + content[last:end] * (scans - len(starts)) + content[end:]


def test_a_progressive_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    assert open_image(jpeg(MOST_SCANS)).size == (16, 16)
    with pytest.raises(GuardError) as raised:
        open_image(jpeg(MOST_SCANS + 1))
    assert (
        str(raised.value)
        == f"the image has {MOST_SCANS + 1} scans, more than {MOST_SCANS}; save it again as a plain JPEG"
    )


def test_a_picture_that_takes_too_long_or_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(file, "PNG")
    for limits, reason in (((0.01, 2048), "takes more than 0.01 s"), ((10, 300), "needs more than 300 MiB of memory")):
        if limits[1] == 300 and sys.platform != "linux":
            continue
        small = ConfinedPool(limits[0], limits[1] * MEBIBYTE, "images.picture_files")
        monkeypatch.setattr("vlmguard.runtime.images.open_picture.PICTURES", small)
        with pytest.raises(GuardError) as raised:
            open_image(file.getvalue())
        assert str(raised.value).startswith("the image cannot be read (it ") and reason in str(raised.value)
        small.close()
