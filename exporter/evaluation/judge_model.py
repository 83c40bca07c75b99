"""An optional second judge: the user's own guard model, LlamaGuard or one with the same output.

Inan et al., "Llama Guard: LLM-based Input-Output Safeguard for Human-AI Conversations", arXiv 2312.06674: the model reads the
conversation through its own chat template and outputs `safe` or `unsafe` and a category. It judges whether an ANSWER is
harmful; refusals are still detected by keywords.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...graphs.errors import ExtraMissing, ModelUnreadable, first_line
from ...graphs.extras import install_command

_VERDICT_TOKENS = 16  # "\n\nunsafe\nS1,S2" and some room
_BATCH = 8


class GuardModel:
    """A guard model, ready to judge. Runs on the CPU or, where torch sees one, the GPU.

    Args:
        folder: a Hugging Face checkpoint folder; nothing is downloaded, no code of it is run.

    Attributes:
        name: of the folder.

    Raises:
        ModelUnreadable: it is no such folder.
        ExtraMissing: torch or transformers is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.absolute().name
        if not (self.folder / "config.json").is_file():
            raise ModelUnreadable(f"{folder}: is no checkpoint folder (no config.json); give one of a LlamaGuard model")
        try:
            import torch
            from safetensors import SafetensorError
            from transformers.models.auto.modeling_auto import AutoModelForCausalLM
            from transformers.models.auto.tokenization_auto import AutoTokenizer
        except ImportError:
            raise ExtraMissing(f"a guard model as judge needs torch; run: {install_command('torch')}") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, padding_side="left"
            )
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True, dtype="auto")
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelUnreadable(
                f"{folder}: cannot be opened as a guard model ({first_line(error)}); give one of a LlamaGuard model"
            ) from None
        self._model = model.to(device).eval()
        if self._tokenizer.chat_template is None:
            raise ModelUnreadable(f"{folder}: has no chat template; a guard model needs its own")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @property
    def identity(self) -> str:
        """Digest of its configs, and of its weights' names and sizes."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix in {".json", ".jinja"}:
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def unsafe(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each answer is harmful.

        Args:
            prompts: the users' prompts.
            answers: one per prompt.

        Raises:
            ModelUnreadable: the model's output is neither `safe` nor `unsafe`.
        """
        chats = [self._rendered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found: list[bool] = []
        for start in range(0, len(chats), _BATCH):
            found += [self._verdict(said) for said in self._said(chats[start : start + _BATCH])]
        return found

    def _said(self, chats: list[str]) -> list[str]:
        import torch

        # The template has written the special tokens; the tokenizer would write the first of them twice.
        inputs = self._tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs, max_new_tokens=_VERDICT_TOKENS, do_sample=False, pad_token_id=self._tokenizer.pad_token_id
            )
        said = tokens[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(said, skip_special_tokens=True)

    def _rendered(self, prompt: str, answer: str) -> str:
        """The conversation as the template prints it; some templates take text, others lists of parts."""
        failed = ""
        for wrap in (str, lambda text: [{"type": "text", "text": text}]):
            turns = [{"role": "user", "content": wrap(prompt)}, {"role": "assistant", "content": wrap(answer)}]
            try:
                text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            except Exception as error:  # jinja's own, or whatever a template raises
                failed = first_line(error)
                continue
            failed = "it leaves out the prompt or the answer"
            if prompt.strip() in text and answer.strip() in text:
                return text
        raise ModelUnreadable(
            f"{self.folder}: its chat template cannot print a conversation ({failed}); give one of a LlamaGuard model"
        )

    def _verdict(self, said: str) -> bool:
        words = said.strip().lower().split(maxsplit=1)
        verdict = words[0] if words else ""
        if verdict not in {"safe", "unsafe"}:
            raise ModelUnreadable(
                f"{self.folder}: answered {said.strip()[:40]!r}, neither safe nor unsafe; give a LlamaGuard model"
            )
        return verdict == "unsafe"
