"""The playground without a browser: what is served and to whom, what the page is told, and which folders are refused.

The page itself, in Chromium, is `test_playground_page.py`; its libraries are `test_playground_libraries.py`.
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_guarded import make_the_manifest_fit
from tiny_vlm_paths import DECODER, EVALUATION, SOURCE, Guarded
from tokenizers import Tokenizer
from typer.testing import CliRunner

from vlmguard import cli
from vlmguard.apps.playground import open as opening
from vlmguard.apps.playground.facts import require_page_model, token_checks, tokenizer_json
from vlmguard.apps.playground.libraries import LIBRARIES
from vlmguard.apps.playground.page_server import HEADERS, PlaygroundServer, Served
from vlmguard.apps.playground.samples import choose_samples
from vlmguard.apps.playground.sides import open_sides
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.proof.structure import same_graph
from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.images.open_picture import open_image
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)
pytest.importorskip("onnxruntime")

PROMPT = "how to steal the boat"
_POLL = 0.01  # seconds until a server notices that it is to end


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty files in the libraries' place: nobody runs them here, and nothing is fetched."""
    found = {
        (library.name, name): tmp_path / "lib" / Path(name).name for library in LIBRARIES for name in library.files
    }
    for path in found.values():
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(opening, "find_libraries", lambda *_: found)


@pytest.fixture
def served() -> Iterator[Callable[..., PlaygroundServer]]:
    """A running server of a site."""
    running = []

    def start(server: PlaygroundServer) -> PlaygroundServer:
        running.append(server)
        Thread(target=server.serve_forever, args=[_POLL], daemon=True).start()
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(server: PlaygroundServer, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host is not None else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


# -------------------------------------------------------------------------------------------------------------- the server


def test_only_what_is_listed_is_served(served: Callable[..., PlaygroundServer], tmp_path: Path) -> None:
    (tmp_path / "page.mjs").write_text("1")
    (tmp_path / "secret").write_text("secret")
    site = {"/": Served(b"<p>"), "/page.mjs": Served(tmp_path / "page.mjs"), "/lib/ort.wasm": Served(b"\0asm")}
    server = served(PlaygroundServer(site, 0))
    found = {path: ask(server, path) for path in (*site, "/?x=1")}
    assert {path: (status, content) for path, (status, _, content) in found.items()} == {
        "/": (200, b"<p>"),
        "/page.mjs": (200, b"1"),
        "/lib/ort.wasm": (200, b"\0asm"),
        "/?x=1": (200, b"<p>"),
    }
    kinds = [found[path][1]["Content-Type"] for path in site]
    assert kinds == ["text/html; charset=utf-8", "text/javascript; charset=utf-8", "application/wasm"]
    for path in (
        "/secret",
        "/../secret",
        "/lib/../../secret",
        "/%2e%2e/secret",
        "//etc/hostname",
        str(tmp_path / "secret"),
        "/lib",
    ):
        status, _, content = ask(server, path)
        assert (status, content) == (404, b"404 Not Found\n"), path
    assert ask(server, "/", "HEAD")[::2] == (200, b"")
    assert {ask(server, "/", method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {501}


def test_every_answer_confines_the_page(served: Callable[..., PlaygroundServer]) -> None:
    server = served(PlaygroundServer({"/": Served(b"")}, 0))
    for path in ("/", "/nothing"):
        _, headers, _ = ask(server, path)
        assert headers.items() >= HEADERS.items()
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert policy["connect-src"] == "'self'"


def test_another_host_is_not_answered(served: Callable[..., PlaygroundServer]) -> None:
    server = served(PlaygroundServer({"/": Served(b"model")}, 0))
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        status, _, content = ask(server, "/", host=host)
        assert (status, content) == (421, b"421 Misdirected Request\n"), host
    assert ask(server, "/", host=f"localhost:{server.server_port}")[2] == b"model"
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GuardError) as caught:
            PlaygroundServer({}, port)
    assert str(caught.value) == (
        f"port {port} of 127.0.0.1 cannot be had (Address already in use); choose another --port, or 0 for any that is free"
    )


# ------------------------------------------------------------------------------------------------------ what the page is told


def test_the_site_of_a_guarded_folder(guarded: Guarded, libraries: None) -> None:
    with opening.playground(guarded("restore"), port=0, prompts=str(EVALUATION)) as server:
        site = server.site
    facts = json.loads(site["/model/facts.json"].content)
    manifest = GuardedVLM.open(guarded("restore")).manifest
    assert facts["guard"]["mode"] == manifest.plan["mode"] == "restore"
    assert facts["guard"]["layers"] == manifest.plan["layers"]
    assert facts["guard"]["thresholds"] == [row["tau"] for row in manifest.plan["sites"]]
    assert facts["base"] == "stripped"
    ands = [node.name for node in load_graph(guarded("restore") / DECODER).graph if node.op_type == "And"]
    assert facts["parts"]["guarded"]["cpuNodes"] == ands == facts["parts"]["base"]["cpuNodes"] and ands
    wanted = {f"/model/{part['graph']}" for part in facts["parts"].values()}
    wanted |= {f"/model/{picture['name']}.png" for picture in facts["samples"]["pictures"]} | {"/model/blank.png"}
    assert wanted <= site.keys()
    assert {"/", "/index.html", "/main.mjs", "/worker.mjs", "/lib/ort.wasm.min.mjs", "/lib/jinja.mjs"} <= site.keys()
    kinds = {(row["setting"], row["label"]) for row in facts["samples"]["prompts"]}
    assert kinds == {(setting, label) for setting in ("text", "blank", "image") for label in ("harmful", "harmless")}
    first = next(row for row in facts["samples"]["prompts"] if row["setting"] == "image")
    assert first["picture"] in {picture["name"] for picture in facts["samples"]["pictures"]}
    assert Image.open(io.BytesIO(site["/model/blank.png"].content)).size == (16, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["restore", "runtime_controls"])
def test_both_decoders_are_the_ones_they_are_called(guarded: Guarded, mode: str) -> None:
    """The base is the source, the guarded one says what the shipped one says, and its gates' scores."""
    sides = open_sides(guarded(mode))
    source = load_graph(SOURCE / DECODER)
    dissect(source)
    check = same_graph("", source, sides.base)
    assert check.ok and check.compared > 100, check.note
    assert open_sides(guarded(mode), SOURCE).from_source
    shipped = GuardedVLM.open(guarded(mode))
    told = VisionLanguageModel(sides.package, sides.guarded)
    request = [Request(PROMPT, shipped.blank_image())]
    for ours, theirs in zip(told.steps(request), shipped.steps(request), strict=True):
        np.testing.assert_array_equal(ours.outputs["logits"], theirs.outputs["logits"])
        assert ours.gate_scores is not None
        if mode == "runtime_controls":  # exported with telemetry
            np.testing.assert_array_equal(ours.gate_scores, theirs.gate_scores)


def test_the_tokenizer_says_the_same_in_the_pages_words(guarded: Guarded) -> None:
    """WordLevel becomes WordPiece: the same ids, words that only begin like a known one included."""
    chat = ChatTokenizer.open(guarded("restore"))
    again = Tokenizer.from_str(tokenizer_json(chat).decode())
    assert json.loads(tokenizer_json(chat))["model"]["type"] == "WordPiece"
    for text in (
        "<s>USER: how to steal the boat? ASSISTANT:",
        "carsx cars boats stealing the",
        "x" * 500,
        "é, 漢字\n <image>",
    ):
        expected = chat.tokenizer.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == expected
    checks = token_checks(chat, [PROMPT])
    assert [(row["picture"], len(row["ids"])) for row in checks] == [(None, 10), ({"count": 2, "grid": None}, 12)]


def test_samples_without_a_file_are_the_built_in_ones(tmp_path: Path) -> None:
    samples = choose_samples(None, [tmp_path]).to_json()
    assert {row["label"] for row in samples["prompts"]} == {"harmful", "harmless"}
    assert samples["pictures"] == [] and {row["picture"] for row in samples["prompts"]} == {"none"}
    assert choose_samples(None, [EVALUATION.parent]).pictures


# ----------------------------------------------------------------------------------------------------------------- refusals


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(GuardError) as caught:
        opening.playground(*arguments, port=0, **options)
    return str(caught.value)


def test_a_folder_that_is_not_what_was_proved_is_refused(guarded: Guarded, tmp_path: Path, libraries: None) -> None:
    said = refused(SOURCE)
    assert said == f"{SOURCE}: has no guard.json, so it is not a guarded folder; export it first"
    folder = tmp_path / "guarded"
    shutil.copytree(guarded("restore"), folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "x")
    said = refused(folder)
    assert said == f"{folder}: chat_template.jinja is not the file that was proved (SHA-256 differs); export again"
    assert refused(guarded("restore"), base=guarded("restore")) == (
        f"{guarded('restore') / DECODER}: is not the model that {DECODER} was made from (SHA-256 differs); give that one"
    )
    assert refused(guarded("restore"), variant="q4") == (
        f"{guarded('restore')}: the decoder has no variant 'q4', only ''; name one"
    )


def test_a_model_that_the_page_would_prepare_otherwise_is_refused(
    guarded: Guarded, tmp_path: Path, libraries: None
) -> None:
    folder = tmp_path / "guarded"
    shutil.copytree(guarded("restore"), folder)
    config = folder / "processor_config.json"
    plain = json.loads(config.read_text())
    families = (
        "LLaVA-like ones (LlavaProcessor with CLIPImageProcessor, Gemma3ImageProcessor, LlavaImageProcessor, "
        "SiglipImageProcessor) and Idefics3-like ones (GraniteDoclingProcessor, Idefics3Processor, SmolVLMProcessor with "
        "Idefics3ImageProcessor, SmolVLMImageProcessor) alone"
    )
    for change, kind in (
        ({"processor_class": "Qwen2VLProcessor"}, "Qwen2VLProcessor"),
        ({"processor_class": "SmolVLMProcessor"}, "CLIPImageProcessor"),
        (
            {"image_processor": plain["image_processor"] | {"image_processor_type": "Idefics3ImageProcessor"}},
            "Idefics3ImageProcessor",
        ),
    ):
        config.write_text(json.dumps(plain | change))
        make_the_manifest_fit(folder)
        assert (
            refused(folder) == f"{folder}: its pictures are prepared by {kind}, the page prepares those of {families}"
        )


def test_a_guard_of_paired_rows_is_refused(guarded: Guarded, libraries: None) -> None:
    assert refused(guarded("rows")) == (
        f"{guarded('rows')}: its guard reads pairs of rows, and the page runs one prompt a call; export with --supervisor input"
    )


def test_layouts_and_inputs_that_the_page_does_not_know_are_refused(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = open_sides(guarded("restore"))
    root = sides.package.root

    def said(**package: Any) -> str:
        with pytest.raises(GuardError) as caught:
            require_page_model(replace(sides, package=replace(sides.package, **package)))
        return str(caught.value)

    assert (
        said(layout="genai")
        == f"{root}: is laid out as genai; the page runs folders of the onnx-community layout alone"
    )
    assert said(vision_encoder=None) == (
        f"{root}: has no vision encoder or no embed_tokens graph; the page runs vision-language models alone"
    )
    refusal = said(vision_encoder=sides.package.decoder)
    assert refusal.startswith(f"{sides.package.decoder}: takes inputs_embeds, ")
    assert refusal.endswith(", the page gives pixel_values alone; export the model again")
    sides.base.graph.inputs[0].name = "input_ids"
    assert said() == (
        f"{sides.package.decoder}: takes 'input_ids'; the page runs decoders that take inputs_embeds, attention_mask, "
        "position_ids, use_cache_branch, num_logits_to_keep and a cache"
    )
    monkeypatch.setattr(opening, "LARGEST_MODEL", 1 << 20)
    assert refused(guarded("restore")) == (
        f"{root}: both sides take 0.0 GiB, WebAssembly has room for 0 GiB; choose a smaller --variant, such as q4"
    )


# -------------------------------------------------------------------------------------------------------------- command line


def test_the_command_says_where_the_page_is(guarded: Guarded, libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(server: PlaygroundServer, open_page: bool) -> None:
        ran.append((server.url, open_page))
        server.server_close()

    monkeypatch.setattr(PlaygroundServer, "run", run)
    done = CliRunner().invoke(cli.app, ["playground", str(guarded("restore")), "--port", "0", "--no-open", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"url": ran[0][0]} and ran[0][1] is False
    done = CliRunner().invoke(cli.app, ["playground", str(guarded("restore")), "--port", "0"])
    assert done.exit_code == 0 and ran[1][0] in done.stdout and ran[1][1] is True


def test_a_sample_picture_is_what_the_model_would_see(guarded: Guarded, libraries: None) -> None:
    with opening.playground(guarded("restore"), port=0, prompts=str(EVALUATION)) as server:
        site = server.site
    samples = choose_samples(str(EVALUATION), [])
    assert len(samples.pictures) == 8
    for name, path in samples.pictures.items():
        seen = np.asarray(Image.open(io.BytesIO(site[f"/model/{name}.png"].content)))  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen, np.asarray(open_image(path)))
