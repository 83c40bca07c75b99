"""The operator's settings, which no request can change."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...graphs.errors import GuardError, first_line

KEY_VARIABLE = "VLMGUARD_API_KEY"
MIB = 2**20
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one served model.

    Attributes:
        name: the model's name in requests.
        host, port: address of the server; port 0: any free port.
        api_key: key that requests must send; `None`: no key is required.
        concurrency: answers generated at the same time; `None`: 4, or 1 for engines.
        queue: number of waiting requests.
        max_tokens: longest answer in tokens, and the default length.
        max_prompt_tokens: longest conversation in tokens, including the images'.
        max_context: longest conversation and answer together, in tokens; `None`: the model's limit.
        max_image: largest image file, and largest total of the images of one request, in bytes.
        max_images: largest number of images in one conversation.
        variant: precision variant of an onnx-community folder; `None`: the plain one.
        timeout: time limit of a request in seconds, including its wait.
        grace: seconds for running answers after a stop signal.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    concurrency: int | None = None
    queue: int = 64
    max_tokens: int = 512
    max_prompt_tokens: int = 4096
    max_image: int = 10 * MIB
    timeout: float = 120.0
    grace: float = 30.0
    max_context: int | None = None
    max_images: int = 8
    variant: str | None = None

    def __post_init__(self) -> None:
        least = {
            "concurrency": 1,
            "queue": 0,
            "max_tokens": 1,
            "max_prompt_tokens": 1,
            "max_image": 1,
            "max_images": 1,
            "max_context": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise GuardError(f"{name} {value} is out of range; choose {lowest} or more")
        if not 0 <= self.port <= 65535:
            raise GuardError(f"port {self.port} is out of range; choose 0 (any free one) to 65535")
        if not self.timeout > 0 or not self.grace >= 0:
            raise GuardError(f"timeout {self.timeout} s and grace {self.grace} s cannot be kept; choose above 0")

    def places(self, engines: bool) -> int:
        """Answers that are made at the same time.

        Raises:
            GuardError: more than one, of engines.
        """
        if engines and (self.concurrency or 1) > 1:
            raise GuardError("TensorRT engines make one answer at a time; choose --concurrency 1, or leave it out")
        return self.concurrency or (1 if engines else 4)

    @property
    def max_body(self) -> int:
        """Largest request, bytes: its images in base64, and a mebibyte for the words and the JSON around."""
        return 4 * -(-self.max_image // 3) + MIB

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def require_key_or_loopback(host: str, api_key: str | None, without_key: bool) -> None:
    """Require an API key for a port that other machines can reach, unless `without_key` is set.

    Args:
        host: address of the server.
        api_key: the key, `None` for none.
        without_key: the operator's consent to serve without a key.

    Raises:
        GuardError: the key is missing.
    """
    if api_key is None and not without_key and not is_loopback(host):
        raise GuardError(
            f"host {host} can be reached from other machines and there is no API key; give --api-key-file or {KEY_VARIABLE}, "
            "or use --without-key"
        )


def read_api_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key of a file or of the environment; the command line would show it to every user of the machine.

    Raises:
        GuardError: both are given, the file cannot be read, or the key is too short or no line of printable ASCII.
    """
    of_environment = environment.get(KEY_VARIABLE)
    if file is None and of_environment is None:
        return None
    if file is not None and of_environment is not None:
        raise GuardError(f"--api-key-file and {KEY_VARIABLE} are both given; leave one of them out")
    try:
        key = (file.read_text(encoding="utf-8") if file is not None else of_environment or "").strip()
    except (OSError, ValueError) as error:
        raise GuardError(f"{file}: the API key cannot be read ({first_line(error)}); name a text file") from None
    where = file if file is not None else KEY_VARIABLE
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise GuardError(
            f"{where}: an API key is one line of at least {_SHORTEST_KEY} printable ASCII characters without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return key
