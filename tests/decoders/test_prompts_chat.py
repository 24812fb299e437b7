"""Prompts as texts and chats: what a tokenizer reads equals what its own functions give, and bad input is one error."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import transformers

from llmcache.decoders.prompts import RefusedMessages, Rendered, check_prompts, prompt_ids, prompts_ids, rendered
from llmcache.errors import ConfigError
from llmcache.records import check_texts
from tests.conftest import MODELS
from tests.threads import tiny_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}<{{ m['role'] }}> {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template that writes the special tokens of the Llama tokenizer, and refuses other roles."""
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "w1 {w2} é\u0301 {{ 7*7 }}"}]
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # texts that end with this token
KINDS = ["gpt2", "llama", "tiny", "bytes"]


def tokenizer_of(kind: str) -> Any:
    """Return a tokenizer: GPT-2's, a small Llama's (which begins texts with a token), of words, or a slow one of bytes.

    That of bytes ends every text with its end token.
    """
    if kind == "tiny":
        return tiny_tokenizer()
    if kind == "bytes":
        return transformers.ByT5Tokenizer()
    name = "tok-gpt2" if kind == "gpt2" else "stories260k-llama"
    if not (MODELS / name).exists():
        pytest.skip(f"{name} is not in {MODELS}; set LLMCACHE_MODELS to the folder that holds it")
    if kind == "gpt2":
        return transformers.GPT2Tokenizer.from_pretrained(MODELS / name)
    return transformers.AutoTokenizer.from_pretrained(MODELS / name)


def smollm2() -> Any:
    large = os.environ.get("LLMCACHE_MODELS_LARGE")
    if large is None or not Path(large, "smollm2-135m").exists():
        pytest.skip("smollm2-135m is not in the folder that LLMCACHE_MODELS_LARGE names")
    return transformers.AutoTokenizer.from_pretrained(Path(large, "smollm2-135m"))


def random_text(draw: random.Random) -> str:
    """Return words, spaces, braces, letters with combining marks, emoji with joiners, and special tokens as text."""
    pieces = [
        "w1",
        "w22",
        "the cat",
        " ",
        "\n",
        "\t",
        "{",
        "}}",
        "{text}",
        "{{ 7*7 }}",
        "e\u0301",
        "ü",
        "卡在哪里",
        "👩\u200d🚀",
    ]
    pieces += ["\u00a0", "</s>", "<s>", "[SEP]", "<|endoftext|>", "1,234.5", "don't", "🏳️\u200d🌈", "", "x" * 9]
    return "".join(draw.choice(pieces) + draw.choice(("", " ")) for _ in range(draw.randrange(12)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_many_prompts_are_those_of_each_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(0)
    prompts: list[Rendered | str] = [
        draw.choice((text, Rendered(text, special=True), Rendered(text, special=False)))
        for text in (random_text(draw) for _ in range(500))
    ]
    monkeypatch.setattr("llmcache.decoders.prompts._MOST_AT_ONCE", 1000)  # several calls of the tokenizer
    assert prompts_ids(tokenizer, prompts) == [prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert prompts_ids(tokenizer, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_tokenised_with_special_tokens_and_a_chat_without_more_of_them(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(1)
    for text in [random_text(draw) for _ in range(200)]:
        plain = list(tokenizer(text)["input_ids"])
        ended = len(plain) > 1 and plain[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
        assert prompt_ids(tokenizer, text) == (plain[:-1] if ended else plain)
        assert prompt_ids(tokenizer, Rendered(text, special=True)) == prompt_ids(tokenizer, text)
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert prompt_ids(tokenizer, Rendered(text, special=False)) == bare


def test_the_end_token_that_a_chat_template_writes_is_kept() -> None:
    tokenizer = tokenizer_of("bytes")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ids = prompt_ids(tokenizer, rendered(tokenizer, [{"role": "user", "content": "a"}]))
    assert ids == [100, tokenizer.eos_token_id]
    assert prompts_ids(tokenizer, [rendered(tokenizer, [{"role": "user", "content": "a"}]), "a"]) == [ids, [100]]


def check_chat(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """Compare a chat with the tokenizer's own text and ids."""
    found = rendered(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == Rendered(text, special=False)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, found) == list(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_what_the_tokenizer_makes_of_it(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(2)
    tokenizer.chat_template = CHAT
    check_chat(tokenizer, MESSAGES)
    for _ in range(100):
        check_chat(tokenizer, [{"role": draw.choice(("user", "assistant")), "content": random_text(draw)}])
    assert "w1 {w2} é\u0301 {{ 7*7 }}" in rendered(tokenizer, MESSAGES).text


def test_a_chat_of_a_real_model() -> None:
    tokenizer = smollm2()
    check_chat(tokenizer, MESSAGES)
    assert rendered(tokenizer, MESSAGES).text.count("<|im_start|>") == 3


def test_messages_may_be_any_mappings_and_any_sequence() -> None:
    tokenizer = tokenizer_of("tiny")
    tokenizer.chat_template = CHAT
    assert rendered(tokenizer, tuple(map(MappingProxyType, MESSAGES))) == rendered(tokenizer, MESSAGES)
    assert rendered(tokenizer, "a {text}") == Rendered("a {text}", special=True)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "has no chat template; give texts"),
        ("", "has no chat template; give texts"),
        ({"tool_use": CHAT}, "has no chat template .*no default"),
        ("{% for %}", "chat template is damaged in line 1"),
    ],
)
def test_a_tokenizer_without_a_usable_chat_template_is_one_error(chat_template: Any, message: str) -> None:
    tokenizer = tokenizer_of("tiny")
    tokenizer.chat_template = chat_template
    with pytest.raises(ConfigError, match=message) as raised:
        rendered(tokenizer, MESSAGES)
    assert not isinstance(raised.value, RefusedMessages)  # no other messages would do


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        (CHAT, "no role tool"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.append(1) }}", "is not safely callable|safe"),
    ],
)
def test_messages_that_a_chat_template_refuses_are_one_error(chat_template: str, why: str) -> None:
    tokenizer = tokenizer_of("tiny")
    tokenizer.chat_template = chat_template
    with pytest.raises(RefusedMessages, match=rf"refuses messages of these roles \(user, tool\): .*({why})") as raised:
        rendered(tokenizer, [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
    assert "\n" not in str(raised.value)


WRONG: list[tuple[Any, str]] = [
    ([], "without messages"),
    ([{"role": "user"}], "has no 'content' in message 0"),
    ([{"role": "user", "content": "a"}, {"content": "a"}], "has no 'role' in message 1"),
    ([{"role": "user", "content": None}], "has null as 'content' of message 0"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "has a list as 'content' of message 0"),
    ([{"role": 1, "content": "a"}], "has a number as 'role' of message 0"),
    ([{"role": "user", "content": "a", "name": 3}], "has a number as 'name' of message 0"),
    ({"role": "user", "content": "a"}, "must be a text or a list of messages, got an object"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG)
def test_messages_of_a_wrong_form_are_one_error(prompt: Any, message: str) -> None:
    tokenizer = tokenizer_of("tiny")
    tokenizer.chat_template = CHAT
    with pytest.raises(ConfigError, match=f"a prompt .*{message}"):
        rendered(tokenizer, prompt)
    with pytest.raises(ConfigError, match=f"prompt 1 .*{message}"):
        check_prompts(["a text", prompt])


@pytest.mark.parametrize("prompt", [7, None, b"abc", ["a", "b"], ["a", {"role": "user", "content": "a"}]])
def test_other_values_than_texts_and_messages_are_no_prompts(prompt: Any) -> None:
    with pytest.raises(ConfigError, match="number 1 is a"):
        check_prompts([MESSAGES, prompt])
    with pytest.raises(ConfigError, match=r"must be a text or a list|as message 0|without messages"):
        rendered(tokenizer_of("tiny"), prompt)


def test_texts_and_chats_are_prompts() -> None:
    for prompts in ([], ["a", ""], [MESSAGES], ("a", MESSAGES, tuple(MESSAGES)), [MESSAGES, "a"]):
        check_prompts(prompts)


@pytest.mark.parametrize(
    "value", ["a", b"a", {"a": 1}, 3, None, ["a", None], [1], [["a"]], {"a"}, Path("a"), iter("a")]
)
def test_values_that_are_no_texts_have_the_messages_of_texts(value: Any) -> None:
    with pytest.raises(ConfigError) as expected:
        check_texts(value, "prompts")
    with pytest.raises(ConfigError) as found:
        check_prompts(value)
    assert str(found.value) == str(expected.value)


def test_the_messages_of_one_chat_are_no_list_of_prompts() -> None:
    with pytest.raises(ConfigError, match=r"got the messages of one chat; give a list of chats"):
        check_prompts(MESSAGES)
