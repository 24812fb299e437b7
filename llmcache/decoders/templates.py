"""Templates that make a prompt of each record of a corpus, and prompts cut to the length that a model reads."""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llmcache.decoders.prompts import Prompt, RefusedMessages, Rendered, parts, prompts_ids, rendered
from llmcache.decoders.template_syntax import format_template, jinja_template
from llmcache.document import kind
from llmcache.errors import ConfigError, CorpusError

TooLong: TypeAlias = Literal["refuse", "left", "right"]
"""Treatment of a prompt with too many tokens: the record is refused, or its longest field is cut on this side."""
Fitted: TypeAlias = tuple[Rendered, list[int]]
"""Prompt and its token ids."""
_FIRST_COMBINING = "\u0300"
_JOINER = "\u200d"  # joins the characters on both sides of it into one


class PromptTemplate:
    """Template of prompts, filled with the fields of a record.

    template: text with the names of fields. Syntax "format": names in braces, `{text}`, and doubled braces for braces;
        a name is one of Python, without attributes, indices, conversions or format specifications. Syntax "jinja": a
        template of jinja2, run in its sandbox without other files and without random values. A variable that a
        template only tests, as in `{% if title is defined %}`, is a field like any other.
    system: text of the system message of a chat, which is not filled.
    chat: whether prompts are chats instead of plain texts; None: if there is a system message.
    examples: records with their answers, which come before the record in every prompt. In a chat each is a message of
        the user and one of the assistant. In a plain text a blank line follows each example, and its answer follows
        the filled template: after one blank, or at once if the template ends or the answer begins with white space.
    answer: name of the field of the examples that holds their answer.
    fields: names of the fields that a record must have, in the order of their first use in the template.
    description: JSON values that differ between any two templates that could make different prompts.
    ConfigError for a template that cannot be read or has no field, and for examples without all fields and the answer.
    """

    def __init__(
        self,
        template: str,
        *,
        system: str | None = None,
        chat: bool | None = None,
        examples: Sequence[Mapping[str, Any]] = (),
        answer: str = "answer",
        syntax: Literal["format", "jinja"] = "format",
    ) -> None:
        for name, value in (("template", template), ("answer", answer), ("system", system)):
            if not isinstance(value, str) and (value is not None or name != "system"):
                raise ConfigError(f"{name} must be a text, got {kind(value)}")
        if chat not in (None, True, False):
            raise ConfigError(f"chat must be True, False or None, got {chat!r}")
        if system is not None and chat is False:
            raise ConfigError("only a chat has a system message; give chat=True, or write it into the template")
        if syntax not in ("format", "jinja"):
            raise ConfigError(f"syntax must be 'format' or 'jinja', got {syntax!r}")
        self.fields, self._fill = (format_template if syntax == "format" else jinja_template)(template)
        if not self.fields:
            form = "{text}" if syntax == "format" else "{{ text }}"
            raise ConfigError(f"the template has no field, so all prompts would be equal; name one, such as {form}")
        self.chat = system is not None if chat is None else bool(chat)
        filled = self._examples(examples, answer)
        self.description: dict[str, Any] = {
            "template": template,
            "syntax": syntax,
            "system": system,
            "chat": self.chat,
            "examples": [list(pair) for pair in filled],
        }
        between = "" if template[-1:].isspace() else " "
        self._before = "".join(
            f"{asked}{'' if answered[:1].isspace() else between}{answered}\n\n" for asked, answered in filled
        )
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in filled:
            self._messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]

    def __repr__(self) -> str:
        form, examples = "chat" if self.chat else "text", len(self.description["examples"])
        return f"PromptTemplate({', '.join(self.fields)}: {form}, {examples} examples)"

    def prompt(self, values: Mapping[str, str]) -> Prompt:
        """Return the prompt of a record: a text, or the messages of a chat.

        values: texts by field; other fields than those of the template have no effect.
        CorpusError for a missing field, a value that is no text, and values that a jinja template cannot use.
        """
        text = self._filled(values)
        if self.chat:
            return [*({**message} for message in self._messages), {"role": "user", "content": text}]
        return self._before + text

    def _filled(self, values: Mapping[str, str]) -> str:
        if not isinstance(values, Mapping):
            raise CorpusError(f"is {kind(values)}, not a record with fields")
        for name in self.fields:
            if name not in values:
                seen = ", ".join(repr(str(each)[:40]) for each in list(values)[:10])
                raise CorpusError(f"has no field {name!r}, only {seen or 'none'}")
            if not isinstance(values[name], str):
                raise CorpusError(f"has {kind(values[name])} under {name!r}, not a text")
        return self._fill(values)

    def _examples(self, examples: Sequence[Mapping[str, Any]], answer: str) -> list[tuple[str, str]]:
        """Return filled template and answer of each example."""
        if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Sequence):
            raise ConfigError(f"examples must be a list of records, got {kind(examples)}; read a file by read_examples")
        pairs = []
        for number, example in enumerate(examples, 1):
            if not isinstance(example, Mapping):
                raise ConfigError(f"example {number} of {len(examples)} is {kind(example)}, not a record with fields")
            texts = {name: _example_text(example[name]) for name in (*self.fields, answer) if name in example}
            try:
                if answer not in texts:
                    seen = ", ".join(repr(str(each)[:40]) for each in list(example)[:10])
                    raise CorpusError(f"has no answer {answer!r}, only {seen or 'none'}")
                if not isinstance(texts[answer], str):
                    raise CorpusError(f"has {kind(texts[answer])} under {answer!r}, not a text")
                pairs.append((self._filled({**example, **texts}), texts[answer]))
            except CorpusError as error:
                raise ConfigError(f"example {number} of {len(examples)} {error}") from error
        return pairs


def _example_text(value: Any) -> Any:
    """Return numbers and truth values as JSON writes them, other values as they are."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return value


# -- examples of a file -----------------------------------------------------------------------------------


def read_examples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read examples from a file of JSON lines (.jsonl, .ndjson) or of CSV with a header (.csv), in UTF-8.

    ConfigError for a file that cannot be read, has no examples, or is damaged; it names the line.
    """
    readers = {".jsonl": _json_examples, ".ndjson": _json_examples, ".csv": _csv_examples}
    name = os.fspath(path)
    reader = readers.get(Path(name).suffix.lower())
    if reader is None:
        raise ConfigError(f"examples are read from .jsonl, .ndjson and .csv files, got {name!r}; convert the file")
    try:
        lines = Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the examples {name!r} cannot be read: {reason}") from error
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}, line {number}, is not UTF-8 text; convert the file") from error
    if any("\0" in text for text in texts):
        raise ConfigError(f"{name} holds NUL bytes, so it is no text in UTF-8; convert the file")
    examples = list(reader(name, texts))
    if not examples:
        raise ConfigError(f"{name} holds no examples; write one record a line")
    return examples


def _json_examples(name: str, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number}, is not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{name}, line {number}, is {kind(record)}, not an object with fields")
        yield record


def _csv_examples(name: str, lines: list[str]) -> Iterator[dict[str, Any]]:
    rows = csv.reader((f"{line}\n" for line in lines[: -1 if lines[-1] == "" else None]), strict=True)
    header: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ConfigError(f"{name}, line {number}, is not a CSV row ({error})") from error
        if row is None:
            return
        if header and row and len(row) != len(header):
            raise ConfigError(f"{name}, line {number}, has {len(row)} cells where the header has {len(header)}")
        if header and row:
            yield dict(zip(header, row, strict=True))
        elif len(set(row)) < len(row):
            raise ConfigError(f"{name}, line {number}, has the name of a column twice; rename one")
        header = header or row


# -- prompts of at most so many tokens --------------------------------------------------------------------


def fit(
    template: PromptTemplate, tokenizer: Any, values: Mapping[str, str], most: int, too_long: TooLong
) -> Fitted | str:
    """Return the prompt of a record with its token ids, at most `most`, or the reason why it has none.

    values: texts by field. too_long: with "left" or "right" the longest field (in characters) is cut on this side, to
    the most of its tokens that fit, never before a combining character. A record is refused whose fields are all
    empty or white space, before or after the cut.
    ConfigError for wrong settings, and for a chat when the tokenizer has no chat template.
    """
    return fit_all(template, tokenizer, [values], most, too_long)[0]


def fit_all(
    template: PromptTemplate, tokenizer: Any, records: Sequence[Mapping[str, str]], most: int, too_long: TooLong
) -> list[Fitted | str]:
    """Return `fit` of each record. The prompts are tokenised together, and only those too long once more."""
    if too_long not in ("refuse", "left", "right"):
        raise ConfigError(f"too_long must be 'refuse', 'left' or 'right', got {too_long!r}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ConfigError(f"the tokens of a prompt must be a positive integer, got {most!r}; ask for fewer new tokens")
    made = [_rendered(template, tokenizer, values) for values in records]
    fitted: list[Fitted | str] = []
    for part in parts([len(each if isinstance(each, str) else each.text) for each in made]):
        some = [records[i] for i in part]
        fitted += _part(template, tokenizer, some, [made[i] for i in part], most, too_long)
    return fitted


def _part(
    template: PromptTemplate,
    tokenizer: Any,
    records: Sequence[Mapping[str, str]],
    made: Sequence[Rendered | str],
    most: int,
    too_long: TooLong,
) -> list[Fitted | str]:
    """Return prompts with their ids, or reasons, in the order of the records; the cuts are found side by side."""
    found: dict[int, Fitted | str] = {i: each for i, each in enumerate(made) if isinstance(each, str)}
    whole = {i: each for i, each in enumerate(made) if isinstance(each, Rendered)}
    long: dict[int, tuple[str, int]] = {}  # the longest field, and the tokens of the prompt
    for (i, text), ids in zip(whole.items(), prompts_ids(tokenizer, list(whole.values())), strict=True):
        field = max(template.fields, key=lambda name, i=i: len(records[i][name]))  # type: ignore[misc]
        if not ids:
            found[i] = "has a prompt without tokens"
        elif len(ids) <= most:
            found[i] = text, ids
        elif too_long == "refuse":
            cut = f"cut its longest field, {field!r}, with too_long='right' or 'left'"
            found[i] = f"has a prompt of {len(ids):,} tokens, and {most:,} fit; shorten it, or {cut}"
        else:
            long[i] = field, len(ids)
    places = _places(tokenizer, [records[i][field] for i, (field, _) in long.items()], too_long)
    searches = {
        i: _cut(template, tokenizer, records[i], field, at, tokens, most, too_long)
        for at, (i, (field, tokens)) in zip(places, long.items(), strict=True)
    }
    answers: dict[int, Any] = dict.fromkeys(searches)  # None starts a search
    while answers:
        trials: dict[int, Rendered] = {}
        for i, ids in answers.items():
            try:
                trials[i] = searches[i].send(ids)
            except StopIteration as end:
                found[i] = end.value
        answers = dict(zip(trials, prompts_ids(tokenizer, list(trials.values())), strict=True))
    return [found[i] for i in range(len(records))]


def _rendered(template: PromptTemplate, tokenizer: Any, values: Mapping[str, str]) -> Rendered | str:
    """Return the text of a record's prompt, or the reason why it has none."""
    try:
        prompt = template.prompt(values)
        if not any(values[name].strip() for name in template.fields):
            return "is an empty document: it has only white space, or nothing, in the fields of the template"
        text = rendered(tokenizer, prompt)
        _ = text.text.isascii() or text.text.encode()
        return text
    except UnicodeEncodeError:
        return "is not Unicode text: it has half of a surrogate pair"
    except (CorpusError, RefusedMessages) as error:
        return _reason(error)


def _reason(error: CorpusError | RefusedMessages) -> str:
    return f"has a prompt that fails: {error}" if isinstance(error, RefusedMessages) else str(error)


def _cut(
    template: PromptTemplate,
    tokenizer: Any,
    values: Mapping[str, str],
    field: str,
    places: Sequence[int],
    tokens: int,
    most: int,
    side: TooLong,
) -> Generator[Rendered, list[int], Fitted | str]:
    """Search the longest part of a field with which a prompt fits; yields prompts, and is sent their token ids.

    places: where the field may be cut, ascending, its ends among them. tokens: of the prompt with the whole field.
    Returns the prompt and its ids, or the reason why the record has none.
    """
    start = f"has a prompt of {tokens:,} tokens, and {most:,} fit"
    best: Fitted | None = None
    low, high, fewest, excess = 0, len(places) - 1, 0, tokens  # pieces kept, and tokens of the prompt with them
    kept = ""
    for step in count():
        if step and (high - low < 2 or (fewest == most and getattr(tokenizer, "is_fast", False))):
            break
        share = 0.5 if step % 3 == 0 else (most - fewest) / (excess - fewest)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1) if step else 0  # at first nothing
        text = values[field][: places[middle]] if side == "right" else values[field][places[-1 - middle] :]
        try:
            made = rendered(tokenizer, template.prompt({**values, field: text}))
        except (CorpusError, RefusedMessages) as error:
            if middle:
                return _reason(error)
            continue  # an empty field may be refused where a short one is not
        ids = yield made
        if len(ids) <= most:
            low, fewest, best, kept = middle, len(ids), (made, ids), text
        elif middle:
            high, excess = middle, len(ids)
        else:
            others = f"{len(ids):,} of them without field {field!r}"
            return f"{start}, but it has {others}; shorten the template, its examples or the other fields"
    if (
        best is None
        or not best[1]
        or not any((kept if name == field else values[name]).strip() for name in template.fields)
    ):
        return f"{start}, which leaves no room for its longest field, {field!r}; shorten the template or its examples"
    return best


def _places(tokenizer: Any, texts: Sequence[str], side: TooLong) -> list[Sequence[int]]:
    """Return the places where each text may be cut, ascending, its ends among them: between tokens where known.

    A slow tokenizer does not tell; then between characters. There is no place before a combining character.
    """
    inner: list[Iterable[int]] = [range(len(text)) for text in texts]
    if texts and getattr(tokenizer, "is_fast", False):
        spans = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inner = [sorted({span[side == "right"] for span in of_text}) for of_text in spans]
    return [
        [
            0,
            *(i for i in each if 0 < i < len(text) and (text.isascii() or not _joined(text[i - 1], text[i]))),
            len(text),
        ]
        for text, each in zip(texts, inner, strict=True)
    ]


def _joined(before: str, after: str) -> bool:
    """Return whether two characters stand for one."""
    if after < _FIRST_COMBINING:
        return before == _JOINER
    return _JOINER in (before, after) or unicodedata.category(after)[0] == "M"
