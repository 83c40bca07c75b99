"""`vlmguard serve` under load: 200 clients at once on loopback, latency, time to the first token, throughput, errors.

    python benchmarks/serving.py                        # the tiny VLM of examples/, guarded here
    python benchmarks/serving.py --guarded FOLDER --prompts FILE

The server runs in a process of its own, as users start it; the clients are one asyncio process on the same machine, and share
its cores. Every request streams; half of the prompts come with a picture. Every answer is compared with what the model says
when it is asked alone: another one counts as an error. Three loads: one client; all clients with a queue for all of them; all
clients with a queue of 16, where the rest must be told 429 at once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from measure import say
from record import parser, write_result

import vlmguard
from vlmguard.exporter.prompts.labelled import read_prompts

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm"
NAME, TOKENS, SHORT_QUEUE = "model", 32, 16


@dataclass(frozen=True)
class Question:
    """A request's body, and the answer that it has when nothing else is asked."""

    body: dict[str, Any]
    answer: str


@dataclass(frozen=True)
class Answered:
    """What came of one request.

    Attributes:
        outcome: `answered`, `429`, another status, or what went wrong.
        first, total: seconds to the first words and to the end, connecting included.
        tokens: of the answer.
    """

    outcome: str
    first: float
    total: float
    tokens: int


def main() -> None:
    options = parser("serving", __doc__)
    options.add_argument("--guarded", type=Path, help="guarded folder; default: the tiny VLM, guarded first")
    options.add_argument("--prompts", type=Path, default=EXAMPLE / "prompts" / "evaluation.jsonl")
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--rounds", type=int, default=10, help="requests of each client, one after the other")
    options.add_argument("--concurrency", type=int, default=4, help="of the server")
    args = options.parse_args()
    if args.quick:
        args.clients, args.rounds = 8, 2
    scratch = Path(tempfile.mkdtemp(prefix="vlmguard-serving-"))
    try:
        source, spec = EXAMPLE / "onnx-community", vlmguard.GuardSpec(mode="restore")
        folder = args.guarded or vlmguard.export(source, scratch / "tiny-vlm", spec=spec).out
        questions = _questions(folder, args.prompts, 8 if args.quick else 40)
        busy = round(os.getloadavg()[0], 1)
        loads = {
            "one client": (1, args.clients, args.clients),
            "all clients": (args.clients, args.rounds, args.clients),
            "all clients, short queue": (args.clients, 1, SHORT_QUEUE if not args.quick else 1),
        }
        for name, (clients, rounds, queue) in loads.items():
            with _server(folder, args.concurrency, queue) as url:
                found = asyncio.run(_load(url, questions, clients, rounds))
            asked = {"clients": clients, "rounds": rounds, "queue": queue, "concurrency": args.concurrency}
            what = "the tiny VLM of examples/tiny_vlm" if args.guarded is None else folder.name
            about = {"model": what, "load_before": busy, "longest_answer": TOKENS, **asked}
            write_result(args, "serving", about | found, name)
            say(f"serving: {name}: {found}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _questions(folder: Path, prompts: Path, count: int) -> list[Question]:
    """From all over the file, as many with a picture as without, and the model's own answers to them."""
    rows = read_prompts(prompts)
    halves = []
    for seen in (False, True):
        half = [row for row in rows if (row.image is not None) == seen]
        halves.append([half[number * 2 * len(half) // count] for number in range(count // 2)])
    vlm = vlmguard.GuardedVLM.open(folder)
    return [
        Question(_body(row.prompt, row.image), vlm.generate(row.prompt, row.image, max_new_tokens=TOKENS))
        for pair in zip(*halves, strict=True)
        for row in pair
    ]


def _body(prompt: str, image: Path | None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "max_tokens": TOKENS, "stream": True}


@contextmanager
def _server(folder: Path, concurrency: int, queue: int) -> Iterator[str]:
    """`vlmguard serve` on a free port; its log is thrown away."""
    numbers = {"port": 0, "concurrency": concurrency, "queue": queue, "max-tokens": TOKENS, "timeout": 600, "grace": 5}
    arguments = [str(folder), "--model-name", NAME, *(f"--{name}={value}" for name, value in numbers.items())]
    command = [sys.executable, "-c", "from vlmguard.cli import main; main()", "serve", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "VLMGUARD_API_KEY"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def _load(url: str, questions: Sequence[Question], clients: int, rounds: int) -> dict[str, Any]:
    """All clients at once, each asking its questions one after the other."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        for question in questions[:4]:  # to warm up
            await _ask(http, question)

        async def client(number: int) -> list[Answered]:
            chosen = (questions[(number * 7 + turn) % len(questions)] for turn in range(rounds))
            return [await _ask(http, question) for question in chosen]

        began = time.perf_counter()
        answered = [one for all_of_one in await asyncio.gather(*map(client, range(clients))) for one in all_of_one]
        seconds = time.perf_counter() - began
    outcomes = Counter(one.outcome for one in answered)
    good = [one for one in answered if one.outcome == "answered"]
    refused = [one for one in answered if one.outcome == "429"]
    return {
        "seconds": round(seconds, 3),
        "outcomes": dict(sorted(outcomes.items())),
        "requests_per_second": round(len(good) / seconds, 2),
        "tokens_per_second": round(sum(one.tokens for one in good) / seconds, 1),
        "first_token_ms": _percentiles([one.first for one in good]),
        "latency_ms": _percentiles([one.total for one in good]),
        "refused_ms": _percentiles([one.total for one in refused]),
    }


async def _ask(http: httpx.AsyncClient, question: Question) -> Answered:
    began, first, said, tokens = time.perf_counter(), 0.0, "", 0
    try:
        async with http.stream("POST", "/chat/completions", json=question.body) as response:
            if response.status_code != 200:
                await response.aread()
                return Answered(str(response.status_code), 0.0, time.perf_counter() - began, 0)
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                words = chunk["choices"][0]["delta"].get("content") if "choices" in chunk else None
                if words:
                    first = first or time.perf_counter() - began
                    said, tokens = said + words, tokens + 1
    except httpx.HTTPError as error:
        return Answered(type(error).__name__, 0.0, time.perf_counter() - began, 0)
    outcome = "answered" if said == question.answer else "another answer"
    return Answered(outcome, first, time.perf_counter() - began, tokens)


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds; `None` where nothing was measured."""
    if not seconds:
        return None
    found = np.percentile(1000 * np.array(seconds), [50, 95, 99])
    return dict(zip(("p50", "p95", "p99"), (round(float(value), 1) for value in found), strict=True))


if __name__ == "__main__":
    main()
