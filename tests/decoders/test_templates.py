"""Templates: prompts equal those of `str.format` and of plain jinja2, and cut prompts fit and are whole elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jinja2
import pytest

from llmcache.decoders.prompts import Rendered, prompt_ids, rendered
from llmcache.decoders.templates import PromptTemplate, fit, fit_all, read_examples
from llmcache.errors import ConfigError, CorpusError
from tests.decoders.test_prompts_chat import CHAT, KINDS, random_text, smollm2, tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # texts that end with this token
EXAMPLES = [
    {"text": "It rains.", "title": "{title}", "answer": "weather"},
    {"text": "2:1", "title": "", "answer": "a {b}"},
]
HOSTILE = [
    "{text}", "{title}", "{0}", "{}", "{", "}", "{{", "}}", "{{ 7*7 }}", "{% for %}", "{# a #}", "{text.__class__}",
    "{{ title.__class__.__mro__ }}", "%s", "$title", "\\", "\n\n", " a ", "e\u0301", "\u0301", "卡", "👩\u200d🚀", "\0",
    "</s>",
]  # fmt: skip


# -- what a template makes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{text}", ("text",)),
        ("{text} {text}", ("text",)),
        ("{title}: {text}, {title}\n", ("title", "text")),
        ("{{{text}}} {{title}}", ("text",)),
        ('{{"a": "{text}", "b": {{}}}} é {title}', ("text", "title")),
        ("a\r\n{text}\u0301{title}", ("text", "title")),
    ],
)
def test_names_in_braces_are_filled_as_by_format(template: str, fields: tuple[str, ...]) -> None:
    made, draw = PromptTemplate(template), random.Random(0)
    assert made.fields == fields
    for _ in range(200):
        values = {"text": draw.choice(HOSTILE) + random_text(draw), "title": draw.choice(HOSTILE), "other": "o"}
        assert made.prompt(values) == template.format(**values)


def test_a_field_may_have_any_name_of_python() -> None:
    made = PromptTemplate("{größe} {class} {_a1} {self}")
    assert made.fields == ("größe", "class", "_a1", "self")
    assert made.prompt({"größe": "1", "class": "2", "_a1": "3", "self": "4"}) == "1 2 3 4"


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("{text} {text.x}", r"\{text.x\} at line 1, column 8"),
        ("{{ {text}\n{{}} {text[0]}", r"\{text\[0\]\} at line 2, column 6"),
        ("{text}{text!r}", r"\{text!r\} at line 1, column 7"),
        ("{text:>30}", r"\{text:>30\} at line 1, column 1"),
        ("é\n\n {}", r"\{\} at line 3, column 2"),
        ("{0}", r"\{0\} at line 1, column 1"),
        ("{my field}", r"\{my field\} at"),
        ("{ text }", r"\{ text \} at"),
        ("{text:{width}}", r"\{text:\{width\}\} at"),
        ("{text.__class__.__mro__}", "only plain names"),
        ("{text} }", "brace without its other half at line 1, column 8"),
        ("{{a}}\n{text", "brace without its other half at line 2, column 1"),
        ("{text}{{}} {", "brace without its other half at line 1, column 12"),
        ("{text!}", "brace without its other half at line 1, column 1"),
    ],
)
def test_other_braces_are_one_error_that_names_the_place(template: str, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        PromptTemplate(template)


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{{ text }}", ("text",)),
        ("{{ title|upper }}:\n{{ text.strip() }}\n", ("title", "text")),
        ("{% for word in text.split() %}{{ loop.index }} {{ word }}\n{% endfor %}{{ title }}", ("text", "title")),
        ("{% set short = text[:5] %}{{ short }}{% if title %} {{ title }}{% endif %}", ("text", "title")),
        ("{% for i in range(2) %}{{ text }}{% endfor %}{{ '{{' }}", ("text",)),
    ],
)
def test_a_jinja_template_is_filled_as_by_jinja(template: str, fields: tuple[str, ...]) -> None:
    made, draw = PromptTemplate(template, syntax="jinja"), random.Random(0)
    assert made.fields == fields
    plain = jinja2.Environment(keep_trailing_newline=True).from_string(template)
    for _ in range(200):
        values = {"text": draw.choice(HOSTILE) + random_text(draw), "title": draw.choice(HOSTILE), "range": "r"}
        assert made.prompt(values) == plain.render(text=values["text"], title=values["title"])


def test_documents_are_never_templates() -> None:
    for value in HOSTILE:
        assert PromptTemplate("<{text}>").prompt({"text": value}) == f"<{value}>"
        assert PromptTemplate("<{{ text }}>", syntax="jinja").prompt({"text": value}) == f"<{value}>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text", "no jinja2 template: .*line 1"),
        ("a\n{% for %}{{ text }}", "no jinja2 template: .*line 2"),
        ("{{ text|nothing }}", "no jinja2 template: No filter named 'nothing'"),
        ("{{ text|random }}", "No filter named 'random'"),
        ("{% include 'a.txt' %}{{ text }}", "reads another one"),
        ("{% extends text %}", "reads another one"),
        ("{{ 7 * 7 }}", "has no field"),
        ("{{ range(3) }}", "has no field"),
    ],
)
def test_jinja_templates_that_cannot_work_are_one_error(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        PromptTemplate(template, syntax="jinja")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ text.__class__.__mro__ }}", "{{ text.format.__globals__ }}", "{{ text.absent }}", "{{ text[99] }}",
        "{{ 1 // (text|length - 1) }}", "{{ text + 1 }}", "{{ range(10 ** 9) }}{{ text }}",
    ],
)  # fmt: skip
def test_values_that_a_jinja_template_cannot_use_are_errors_of_the_record(template: str) -> None:
    made = PromptTemplate(template, syntax="jinja")
    with pytest.raises(CorpusError, match="values that the template cannot use"):
        made.prompt({"text": "a"})
    reason = fit(made, tokenizer_of("tiny"), {"text": "a"}, 9, "refuse")
    assert isinstance(reason, str)
    assert "values that the template cannot use" in reason


def test_jinja_that_is_not_installed_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'jinja2>=3\.1'"):
        PromptTemplate("{{ text }}", syntax="jinja")
    assert PromptTemplate("{text}").prompt({"text": "a"}) == "a"


def test_a_text_has_its_examples_before_it() -> None:
    made = PromptTemplate("{title}\n{text}\nTopic:", examples=EXAMPLES)
    assert made.prompt({"title": "T", "text": "x"}) == (
        "{title}\nIt rains.\nTopic: weather\n\n\n2:1\nTopic: a {b}\n\nT\nx\nTopic:"
    )
    for end in ("\n", " ", "\t", "\u00a0"):
        made = PromptTemplate("{text}" + end, examples=EXAMPLES[:1])
        assert made.prompt({"text": "x"}) == f"It rains.{end}weather\n\nx{end}"
    assert PromptTemplate("{text}", examples=EXAMPLES[:1]).prompt({"text": "x "}) == "It rains. weather\n\nx "


def test_a_chat_has_a_message_for_each_part() -> None:
    template = "{title}: {text}"
    turns = [
        {"role": "user", "content": "{title}: It rains."}, {"role": "assistant", "content": "weather"},
        {"role": "user", "content": ": 2:1"}, {"role": "assistant", "content": "a {b}"},
    ]  # fmt: skip
    asked, values = {"role": "user", "content": "T: {text}"}, {"title": "T", "text": "{text}"}
    system = {"role": "system", "content": "Name {the} topic."}
    assert PromptTemplate(template, chat=True).prompt(values) == [asked]
    assert PromptTemplate(template, chat=True, examples=EXAMPLES).prompt(values) == [*turns, asked]
    made = PromptTemplate(template, system="Name {the} topic.", examples=EXAMPLES)
    assert made.prompt(values) == [system, *turns, asked]
    made.prompt(values)[0]["content"] = "changed"  # type: ignore[index]
    assert made.prompt(values) == [system, *turns, asked]


def test_examples_may_have_numbers_and_another_name_of_the_answer() -> None:
    made = PromptTemplate("{n}?", examples=[{"n": 1.5, "label": True}, {"n": 12, "label": 0}], answer="label")
    assert made.prompt({"n": "7"}) == "1.5? true\n\n12? 0\n\n7?"


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([EXAMPLES[0], {"text": "a", "answer": "b"}], "example 2 of 2 has no field 'title', only 'text', 'answer'"),
        ([{"text": "a", "title": "b"}], "example 1 of 1 has no answer 'answer', only 'text', 'title'"),
        ([{}], "example 1 of 1 has no answer 'answer', only none"),
        ([{**EXAMPLES[0], "text": None}], "example 1 of 1 has null under 'text', not a text"),
        ([{**EXAMPLES[0], "answer": ["a"]}], "example 1 of 1 has a list under 'answer', not a text"),
        ([{**EXAMPLES[0], "text": float("nan")}], "example 1 of 1 has a number under 'text', not a text"),
        (["a"], "example 1 of 1 is a str, not a record"),
        ("examples.jsonl", "must be a list of records, got a str; read a file by read_examples"),
        (EXAMPLES[0], "must be a list of records, got an object"),
    ],
)
def test_examples_without_what_they_need_are_one_error(examples: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTemplate("{text} {title}", examples=examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": ""}, "has no field"),
        ({"template": "Hello {{text}}"}, "has no field"),
        ({"template": 7}, "template must be a text, got a number"),
        ({"template": None}, "template must be a text, got null"),
        ({"template": "{text}", "system": 7}, "system must be a text"),
        ({"template": "{text}", "answer": None}, "answer must be a text"),
        ({"template": "{text}", "chat": "yes"}, "chat must be True, False or None"),
        ({"template": "{text}", "syntax": "mustache"}, "syntax must be 'format' or 'jinja', got 'mustache'"),
        ({"template": "{text}", "system": "s", "chat": False}, "only a chat has a system message"),
    ],
)
def test_wrong_settings_are_one_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(**settings)


@pytest.mark.parametrize("syntax", ["format", "jinja"])
def test_a_record_without_a_field_is_an_error_that_names_the_others(syntax: Any) -> None:
    template = PromptTemplate("{text} {title}" if syntax == "format" else "{{ text }} {{ title }}", syntax=syntax)
    for values, message in (
        ({"text": "a", "id": "b"}, "has no field 'title', only 'text', 'id'"),
        ({}, "has no field 'text', only none"),
        ({"text": "a", "title": None}, "has null under 'title', not a text"),
        ({"text": 7, "title": "a"}, "has a number under 'text', not a text"),
        ("text title", "is a str, not a record"),
    ):
        with pytest.raises(CorpusError, match=message):
            template.prompt(values)  # type: ignore[arg-type]
        reason = fit(template, tokenizer_of("tiny"), values, 9, "refuse")  # type: ignore[arg-type]
        assert isinstance(reason, str)
        assert message in reason


def test_descriptions_differ_where_prompts_do() -> None:
    made = [
        PromptTemplate("{text}"), PromptTemplate("{text} "), PromptTemplate("{text}", chat=True),
        PromptTemplate("{text}", system=""), PromptTemplate("{text}", system="s"),
        PromptTemplate("{{ text }}{text}", syntax="jinja"), PromptTemplate("{{ text }}{text}"),
        PromptTemplate("{text}", examples=EXAMPLES), PromptTemplate("{text}", examples=EXAMPLES[::-1]),
        PromptTemplate("{text}", examples=EXAMPLES[:1]), PromptTemplate("{text}", examples=EXAMPLES[:1], chat=True),
        PromptTemplate("{text}", examples=EXAMPLES[:1], answer="title"),
    ]  # fmt: skip
    shown = [json.dumps(each.description, sort_keys=True) for each in made]
    assert len(set(shown)) == len(made)
    for each in made:
        assert json.loads(json.dumps(each.description)) == each.description
    assert PromptTemplate("{text}", examples=EXAMPLES).description == made[7].description
    assert PromptTemplate("{text}", chat=False).description == made[0].description  # the same prompts
    assert repr(made[7]) == "PromptTemplate(text: text, 2 examples)"


# -- files of examples ------------------------------------------------------------------------------------


def test_examples_are_read_from_json_lines_and_csv(tmp_path: Path) -> None:
    expected = [{"text": 'a "b"\nc, {d}', "answer": "é"}, {"text": "", "answer": "2"}]
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in expected)
    table = 'text,answer\n"a ""b""\nc, {d}",é\n,2\n'
    for name, text in (("a.jsonl", lines), ("a.ndjson", "\n" + lines.strip()), ("a.csv", table), ("B.CSV", table[:-1])):
        path = tmp_path / name
        for raw in (text.encode(), b"\xef\xbb\xbf" + text.encode()):
            path.write_bytes(raw)
            assert read_examples(path) == expected
            assert read_examples(str(path)) == expected
    (tmp_path / "crlf.csv").write_bytes(b"text,answer\r\na,b\r\n\r\n")
    assert read_examples(tmp_path / "crlf.csv") == [{"text": "a", "answer": "b"}]
    (tmp_path / "n.jsonl").write_text('{"text": "a\u2028b", "answer": 3}', encoding="utf-8")
    assert read_examples(tmp_path / "n.jsonl") == [{"text": "a\u2028b", "answer": 3}]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3, is a list, not an object"),
        ("a.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2, is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "not UTF-8|NUL"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), "NUL bytes"),
        ("a.jsonl", b"\n \n", "holds no examples"),
        ("a.csv", b"", "holds no examples"),
        ("a.csv", b"a,b\n", "holds no examples"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3, is not a CSV row"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3, has 1 cells where the header has 2"),
        ("a.csv", b"a,a\n1,2\n", "line 1, has the name of a column twice"),
        ("a.csv", b"a,b\r1,2\r", "line 1, is not a CSV row"),
        ("a.txt", b"a", r"from .jsonl, .ndjson and .csv files, got '.*a.txt'"),
    ],
)
def test_a_damaged_file_of_examples_is_one_error(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as raised:
        read_examples(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_file_of_examples_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, message in (("absent.jsonl", "No such file"), ("folder.csv", "directory"), ("a\0.csv", "null byte")):
        with pytest.raises(ConfigError, match=f"cannot be read: .*{message}"):
            read_examples(tmp_path / name)


# -- prompts of a limited length --------------------------------------------------------------------------

LIMITED = PromptTemplate("{title}<{text}|{title}> end", examples=EXAMPLES)
TWICE = PromptTemplate("a{text}b{text}c {title}")
TRIMMED = PromptTemplate("{{ title }} <{{ text.strip()[:300] }}>", syntax="jinja")
AT_THE_ENDS = PromptTemplate("{text}")
TEMPLATES = {"examples": LIMITED, "twice": TWICE, "jinja": TRIMMED, "alone": AT_THE_ENDS}


def records(count: int, seed: int) -> list[dict[str, str]]:
    """Return records of random texts, short, long, empty, or without a field."""
    draw, made = random.Random(seed), list[dict[str, str]]()
    for _ in range(count):
        texts = ["".join(random_text(draw) for _ in range(draw.choice((0, 1, 1, 3, 9)))) for _ in range(2)]
        made.append({"text": texts[0], "title": texts[1][: draw.choice((0, 9, 999))], "id": "i"})
        if draw.random() < 0.02:
            made[-1].pop(draw.choice(("text", "title")))
        if draw.random() < 0.02:
            made[-1]["text"] = draw.choice(("", " \n", "\ud800", "\u00a0"))
    return made


@pytest.mark.parametrize("too_long", ["refuse", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_records_are_fitted_as_each_one(kind: str, too_long: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    many = records(1000 if kind == "gpt2" else 300, 3)
    monkeypatch.setattr("llmcache.decoders.prompts._MOST_AT_ONCE", 9999)
    found = fit_all(LIMITED, tokenizer, many, 120, too_long)
    assert found == [fit(LIMITED, tokenizer, values, 120, too_long) for values in many]
    assert {type(each) for each in found} == {str, tuple}
    for each in found:
        if not isinstance(each, str):
            assert each[1] == prompt_ids(tokenizer, each[0])
            assert 0 < len(each[1]) <= 120


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_takes_the_end_of_the_longest_field_and_nothing_else(kind: str, name: str, side: Any) -> None:
    tokenizer, template = tokenizer_of(kind), TEMPLATES[name]
    cut = 0
    for values in records(60, 4):
        if any(field not in values for field in template.fields) or "\ud800" in values["text"]:
            continue
        whole = rendered(tokenizer, template.prompt(values))
        tokens = len(prompt_ids(tokenizer, whole))
        field = max(template.fields, key=lambda name: len(values[name]))
        for most in (tokens, tokens - 1, tokens * 3 // 4, tokens // 3, 3):
            found = fit(template, tokenizer, values, max(1, most), side)
            if isinstance(found, str):
                empty = prompt_ids(tokenizer, rendered(tokenizer, template.prompt({**values, field: ""})))
                rest = "".join(values[name] for name in template.fields if name != field)
                blank = not rest.strip()
                assert len(empty) > most or blank, found
                continue
            text, ids = found
            assert len(ids) <= most
            assert ids == prompt_ids(tokenizer, text)
            if most >= tokens:
                assert text == whole
                continue
            cut += 1
            kept = [
                part for part in parts_of(values[field], side)
                if rendered(tokenizer, template.prompt({**values, field: part})) == text
            ]  # fmt: skip
            assert kept, "something else than the longest field has changed"
            if name in ("examples", "alone") and len(ids) < most:
                longest = max(kept, key=len)
                fitting = [
                    part for part in parts_of(values[field], side)
                    if len(prompt_ids(tokenizer, rendered(tokenizer, template.prompt({**values, field: part})))) <= most
                ]  # fmt: skip
                assert len(longest) >= len(max(fitting, key=len)) - 24, "more of the field would have fitted"
    assert cut > 30


def parts_of(text: str, side: str) -> list[str]:
    return [text[:i] if side == "right" else text[i:] for i in range(len(text) + 1)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bytes"])
def test_running_text_is_cut_to_the_limit_itself(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    template = PromptTemplate("Title: {title}\nText: {text}\nTopic:")
    text = " ".join(f"The {i}th cat saw {i * i} dogs, and ran." for i in range(200))
    for side in ("left", "right"):
        for most in (60, 100, 777):
            found = fit(template, tokenizer, {"title": "Cats", "text": text}, most, side)
            assert not isinstance(found, str)
            shown = found[0].text
            assert most - 2 <= len(found[1]) <= most
            assert shown.startswith("Title: Cats\nText: ")
            assert shown.endswith("\nTopic:")
            kept = shown.removeprefix("Title: Cats\nText: ").removesuffix("\nTopic:")
            assert kept
            assert text.startswith(kept) if side == "right" else text.endswith(kept)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bytes"])
def test_a_cut_never_parts_a_letter_from_its_marks(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    template = PromptTemplate("[{text}]")
    for letter in ("e\u0301\u0323", "👩\u200d🚀", "❤\ufe0f", "क\u094d\u200d"):
        for most in range(8, 40):
            for side in ("left", "right"):
                found = fit(template, tokenizer, {"text": letter * 30}, most, side)
                if not isinstance(found, str):
                    assert found[0].text[1:-1].replace(letter, "") == ""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_cut_in_its_longest_field(kind: str, side: Any) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = CHAT.replace("m['content'] }}", "m['content'] | trim }}")  # as many templates do
    template = PromptTemplate("{title}: {text}", system="sys", examples=EXAMPLES)
    values = {"title": "w1 w2", "text": " ".join(f"w{i}" for i in range(250))}
    empty = len(prompt_ids(tokenizer, rendered(tokenizer, template.prompt({**values, "text": ""}))))
    found = fit(template, tokenizer, values, empty + 40, side)
    assert not isinstance(found, str)
    assert empty + 36 <= len(found[1]) <= empty + 40
    assert not found[0].special
    texts = (rendered(tokenizer, template.prompt({**values, "text": part})) for part in parts_of(values["text"], side))
    assert found[0] in texts


def test_a_chat_of_a_real_model_is_cut() -> None:
    tokenizer = smollm2()
    template = PromptTemplate("{title}: {text}", system="sys", examples=EXAMPLES)
    values = {"title": "one", "text": "the cat sat. " * 300}
    found = fit(template, tokenizer, values, 200, "right")
    assert not isinstance(found, str)
    assert 198 <= len(found[1]) <= 200
    assert found[0].text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_reasons_say_what_is_wrong_and_what_to_do() -> None:
    tokenizer = tokenizer_of("tiny")  # two special tokens
    template = PromptTemplate("w1 w2 {title} {text}")
    long = {"title": "w3", "text": "w4 " * 1500}
    assert fit(template, tokenizer, long, 9, "refuse") == (
        "has a prompt of 1,505 tokens, and 9 fit; shorten it, or cut its longest field, 'text', with "
        "too_long='right' or 'left'"
    )
    assert fit(template, tokenizer, long, 4, "right") == (
        "has a prompt of 1,505 tokens, and 4 fit, but it has 5 of them without field 'text'; shorten the template, its "
        "examples or the other fields"
    )
    fitted = fit(template, tokenizer, long, 6, "right")
    assert not isinstance(fitted, str)
    assert fitted[0] == Rendered("w1 w2 w3 w4", special=True)
    assert "leaves no room for its longest field, 'text'" in str(
        fit(PromptTemplate("w1 {text}"), tokenizer, {"text": "w4 w5"}, 3, "left")
    )
    for blank in ("", " ", "\n\t\u00a0\u2003"):
        assert "an empty document" in str(fit(template, tokenizer, {"title": "", "text": blank}, 99, "right"))
    assert not isinstance(fit(template, tokenizer, {"title": "", "text": "a"}, 99, "right"), str)
    assert fit(PromptTemplate("{text}"), tokenizer_of("gpt2"), {"text": "\ud83d"}, 9, "refuse") == (
        "is not Unicode text: it has half of a surrogate pair"
    )
    bare = tokenizer_of("gpt2")
    bare.chat_template = "{{ '' }}"
    assert fit(PromptTemplate("{text}", chat=True), bare, {"text": "a"}, 9, "left") == "has a prompt without tokens"


def test_a_chat_template_that_fails_for_a_record_is_its_reason() -> None:
    tokenizer = tokenizer_of("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'w13' in m['content'] or m['content']|trim == '' %}"
        "{{ raise_exception('unlucky') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    template = PromptTemplate("{text}", chat=True)
    texts = ["w1", "w13", "w2 w3 w4 w5", ""]
    found = fit_all(template, tokenizer, [{"text": text} for text in texts], 3, "right")
    assert [each if isinstance(each, str) else each[0].text for each in found] == [
        "w1", found[1], "w2 w3 w4", found[3]
    ]  # fmt: skip
    assert "has a prompt that fails: the tokenizer's chat template refuses" in str(found[1])
    assert str(found[1]).endswith("unlucky")
    assert "an empty document" in str(found[3])


def test_settings_that_fit_no_record_are_errors() -> None:
    tokenizer, template = tokenizer_of("tiny"), PromptTemplate("{text}")
    for most in (0, -5, 2.5, None, True):
        with pytest.raises(ConfigError, match="tokens of a prompt must be a positive integer"):
            fit(template, tokenizer, {"text": "a"}, most, "refuse")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too_long must be 'refuse', 'left' or 'right', got 'middle'"):
        fit_all(template, tokenizer, [], 3, "middle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no chat template"):
        fit(PromptTemplate("{text}", chat=True), tokenizer, {"text": "a"}, 9, "refuse")
    assert fit_all(template, tokenizer, [], 3, "right") == []
