"""A purge by text removes all pairs of a CrossEncoder that contain the text, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from llmcache import LLMCache
from llmcache.errors import ConfigError
from llmcache.planning.purging import purge_documents
from tests import kinds
from tests.conftest import Command
from tests.small_sentences import sentences, tiny_folder

SECRET = "the secret of the zebra"
LONG = "this text of a private letter is longer than the model reads, " * 6
OTHERS = sentences(4)
KEPT = [(OTHERS[0], OTHERS[1]), (OTHERS[1], SECRET + " and more"), ("the secret", OTHERS[2]), ("of the zebra", "")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return kinds.cross_encoder(tiny_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def stored(tmp_path: Path, model: CrossEncoder) -> Path:
    """A store with `KEPT`, and with pairs of the two texts to purge."""
    path = tmp_path / "store"
    with LLMCache.open(path, model) as cache:
        cache.predict(KEPT)
        cache.predict([(SECRET, OTHERS[0]), (OTHERS[0], SECRET), (SECRET, SECRET)])
        cache.predict([(SECRET, OTHERS[1])], prompt="judge: ")
        cache.predict([(OTHERS[3], LONG), (LONG, OTHERS[3])])
    return path


def traces(path: Path, model: Any, text: str) -> list[str]:
    """Return the names of the files that contain the token ids of the beginning of a text."""
    ids = np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"][:24], "<i4").tobytes()
    return [file.name for file in path.rglob("*") if file.is_file() and ids in file.read_bytes()]


def computed(path: Path, model: CrossEncoder, pairs: Any, **settings: Any) -> int:
    """Return how many of these pairs a read-only opening computes."""
    with LLMCache.open(path, model, read_only=True) as cache:
        cache.predict(pairs, **settings)
        return cache.stats().counters.misses


@pytest.mark.parametrize("reader", ["model", "tokenizer"])
def test_a_text_is_purged_on_either_side_and_with_prompts(stored: Path, model: CrossEncoder, reader: str) -> None:
    given = model if reader == "model" else model.tokenizer
    assert computed(stored, model, [(SECRET, OTHERS[0]), *KEPT]) == 0
    assert purge_documents(stored, texts=[SECRET], prompts=["judge: "], reader=given).rows == 4
    assert computed(stored, model, KEPT) == 0
    assert computed(stored, model, [(SECRET, OTHERS[0]), (OTHERS[0], SECRET), (SECRET, SECRET)]) == 3
    assert computed(stored, model, [(SECRET, OTHERS[1])], prompt="judge: ") == 1


def test_no_bytes_of_a_purged_text_are_left(tmp_path: Path, model: CrossEncoder) -> None:
    path = tmp_path / "store"
    with LLMCache.open(path, model) as cache:
        cache.predict([(OTHERS[0], SECRET), (SECRET, OTHERS[0]), (OTHERS[0], OTHERS[1])])
    assert traces(path, model, SECRET)
    purge_documents(path, texts=[SECRET], reader=model)
    assert traces(path, model, SECRET) == []
    assert traces(path, model, OTHERS[1])


def test_a_truncated_text_is_purged(stored: Path, model: CrossEncoder) -> None:
    assert traces(stored, model, LONG)
    assert purge_documents(stored, texts=[LONG], reader=model).rows == 2
    assert traces(stored, model, LONG) == []
    assert computed(stored, model, [*KEPT, (SECRET, OTHERS[0])]) == 0


def test_a_text_with_a_special_token_written_out_is_purged(tmp_path: Path, model: CrossEncoder) -> None:
    path, odd = tmp_path / "store", "before [SEP] after"
    with LLMCache.open(path, model) as cache:
        cache.predict([(odd, OTHERS[0]), (OTHERS[1], odd), (OTHERS[0], OTHERS[1])])
    assert purge_documents(path, texts=[odd], reader=model).rows == 2


def test_a_purge_of_pairs_without_their_model_is_refused(stored: Path) -> None:
    with pytest.raises(ConfigError, match="pairs of texts"):
        purge_documents(stored, texts=[SECRET])


def test_a_model_that_reads_a_text_differently_in_pairs_is_refused(stored: Path, model: CrossEncoder) -> None:
    class Joined:
        """A tokenizer that writes both sides into one sentence."""

        def __init__(self, tokenizer: Any) -> None:
            self.all_special_ids = tokenizer.all_special_ids
            self.unk_token_id, self.mask_token_id = tokenizer.unk_token_id, tokenizer.mask_token_id
            self._tokenizer = tokenizer

        def __call__(self, *texts: Any, **settings: Any) -> Any:
            if len(texts) == 2:
                texts = (f"is {texts[0]} like {texts[1]}",)
            return self._tokenizer(*texts, **settings)

    with pytest.raises(ConfigError, match="purge the whole namespace"):
        purge_documents(stored, texts=[SECRET], reader=Joined(model.tokenizer))


def test_the_command_purges_pairs_with_a_model(
    stored: Path, model: CrossEncoder, tmp_path: Path, llmcache: Command
) -> None:
    model.save(str(tmp_path / "saved"))
    (tmp_path / "secret.txt").write_text(SECRET)
    arguments = ("purge", stored, "--text-file", tmp_path / "secret.txt")
    refused = llmcache(*arguments)
    assert refused.code == 2
    assert "--model" in refused.err
    done = llmcache(*arguments, "--model", tmp_path / "saved", "--prompt", "judge: ", "--json")
    assert done.code == 0, done.err
    assert '"rows": 4' in done.out
