"""The guard-model judge on a tiny Llama with random weights and a chat template of its own: what is asked, what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmguard.exporter.evaluation.judge_model import GuardModel
from vlmguard.graphs.errors import GuardError

torch = pytest.importorskip("torch")

WORDS = ("safe", "unsafe", "user", "agent", "task", "how", "to", "wash", "steal", "it", "sure", "first", "no", "S1")
TEMPLATE = (
    "{% for m in messages %}{{ 'user ' if m['role'] == 'user' else 'agent ' }}{{ m['content'] }} {% endfor %}task"
)
PARTS = TEMPLATE.replace("m['content']", "m['content'][0]['text']")
PROMPTS = ["how to wash it", "how to steal it", "how to wash", "steal it", "wash", "to steal it first sure"]
ANSWERS = ["sure first wash", "sure first steal", "no", "first it", "sure", "sure sure first"]


def save(folder: Path, verdicts: bool = True, template: str | None = TEMPLATE) -> Path:
    """A Llama whose head can say `safe` and `unsafe` alone (by chance of its random weights), or nothing of either."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    head = model.lm_head.weight.data
    row = head[vocabulary["safe"]].clone()
    head.zero_()
    said = ("safe", "unsafe") if verdicts else ("sure", "first")
    head[vocabulary[said[0]]], head[vocabulary[said[1]]] = row, -row
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> GuardModel:
    return GuardModel(save(tmp_path_factory.mktemp("judges") / "tiny-guard"))


def test_a_verdict_is_what_the_model_says_first(judge: GuardModel) -> None:
    """As transformers alone says it, one conversation at a time: padding of a batch changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(judge.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(judge.folder)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = f"user {prompt} agent {answer} task"
        logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
        expected.append(WORDS[int(logits.argmax()) - 3] == "unsafe")
    assert judge.unsafe(PROMPTS, ANSWERS) == expected and 0 < sum(expected) < len(expected)
    assert judge.name == "tiny-guard"


def test_more_conversations_than_a_batch_holds_are_judged_in_order(judge: GuardModel) -> None:
    few = judge.unsafe(PROMPTS, ANSWERS)
    assert judge.unsafe(PROMPTS * 3, ANSWERS * 3) == few * 3
    assert judge.unsafe([], []) == []


def test_a_template_that_takes_lists_of_parts_is_asked_the_same(judge: GuardModel, tmp_path: Path) -> None:
    other = GuardModel(save(tmp_path / "parts", template=PARTS))
    assert other.unsafe(PROMPTS, ANSWERS) == judge.unsafe(PROMPTS, ANSWERS)
    assert other.identity != judge.identity


def test_an_evaluation_asks_the_judge_about_what_was_said(judge: GuardModel, tmp_path: Path) -> None:
    from tiny_vlm_paths import EVALUATION, SOURCE

    from vlmguard.exporter.evaluation.evaluate import evaluate
    from vlmguard.exporter.evaluation.records import RecordFile
    from vlmguard.exporter.prompts.labelled import read_prompts
    from vlmguard.graphs.layouts import open_package
    from vlmguard.runtime.vlm import VisionLanguageModel

    model = VisionLanguageModel(open_package(SOURCE))
    prompts = [row for row in read_prompts(EVALUATION) if row.label == "harmful"][:6:2]
    file = RecordFile(tmp_path / "r.jsonl", {"judge": judge.identity})
    result = evaluate(model, model, prompts, 6, judge=judge, file=file)
    expected = judge.unsafe([prompt.prompt for prompt in prompts], list(result.base.answers))
    assert [record.base.unsafe for record in result.records] == expected
    assert result.judges == ("keywords", "tiny-guard")
    told = [row for row in result.to_json()["attack_success"] if row["judge"] == "tiny-guard"]
    assert sum(row["base"]["hits"] for row in told) == sum(expected)
    assert RecordFile(tmp_path / "r.jsonl", {"judge": judge.identity}).found.keys() == {0, 1, 2}


def refusal(act: Any) -> str:
    with pytest.raises(GuardError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_judge_is_refused_in_one_line(tmp_path: Path) -> None:
    assert refusal(lambda: GuardModel(tmp_path / "gone")) == (
        f"{tmp_path / 'gone'}: is no checkpoint folder (no config.json); give one of a LlamaGuard model"
    )
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    said = refusal(lambda: GuardModel(tmp_path))
    assert said.startswith(f"{tmp_path}: cannot be opened as a guard model (") and said.endswith("LlamaGuard model")
    mute = save(tmp_path / "mute", template=None)
    assert refusal(lambda: GuardModel(mute)) == (f"{mute}: has no chat template; a guard model needs its own")
    chatty = GuardModel(save(tmp_path / "chatty", verdicts=False))
    said = refusal(lambda: chatty.unsafe(PROMPTS[:1], ANSWERS[:1]))
    assert said.startswith(tuple(f"{tmp_path / 'chatty'}: answered '{word}" for word in ("sure", "first")))
    assert said.endswith(", neither safe nor unsafe; give a LlamaGuard model")
    deaf = GuardModel(save(tmp_path / "deaf", template="{{ messages[0]['role'] }} task"))
    assert refusal(lambda: deaf.unsafe(PROMPTS[:1], ANSWERS[:1])) == (
        f"{tmp_path / 'deaf'}: its chat template cannot print a conversation (it leaves out the prompt or the answer); give "
        "one of a LlamaGuard model"
    )
