"""Models that are no SentenceTransformer: pairs, sparse vectors and token vectors are those of the model itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import BertForSequenceClassification

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError, LLMCacheError, ModelMismatch
from llmcache.model.loading import encoder_class
from llmcache.verification import verify_model
from tests import kinds
from tests.small_sentences import sentences, tiny_folder, with_prompts

TEXTS = ["a blue card", "", *sentences(12), "a blue card", "the same, but longer than the others: " + "x y z " * 30]
PAIRS = [(query, document) for query in TEXTS[:5] for document in TEXTS[3:9]]
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(request: pytest.FixtureRequest, folder: str) -> Any:
    return kinds.MAKERS[request.param](folder)


def close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether a result has the type, form and values of the model's own."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(close(*pair, tolerance) for pair in zip(ours, theirs, strict=True))
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(close(ours[name], theirs[name], tolerance) for name in theirs)
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.layout, ours.device, ours.is_inference()) == (
            theirs.dtype, theirs.shape, theirs.layout, theirs.device, theirs.is_inference()
        )  # fmt: skip
        ours, theirs = (each.to_dense() if each.is_sparse else each for each in (ours, theirs))
        return bool(torch.allclose(ours, theirs, atol=tolerance))
    if isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        return bool(np.allclose(ours, theirs, atol=tolerance))
    return bool(ours == theirs) if isinstance(theirs, str | int) else bool(abs(ours - theirs) <= tolerance)


class Float32Head(torch.nn.Linear):
    """A scoring head in float32 for states of another dtype."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features)
        self.load_state_dict(head.state_dict())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states.float())


Ask = Callable[[Any], Any]

ASKED: list[tuple[str, str, Ask]] = [
    ("CrossEncoder", "scores", lambda m: m.predict(PAIRS)),
    ("CrossEncoder", "lists as pairs", lambda m: m.predict([list(pair) for pair in PAIRS])),
    ("CrossEncoder", "an array of pairs", lambda m: m.predict(np.array(PAIRS))),
    ("CrossEncoder", "one pair", lambda m: m.predict(PAIRS[2])),
    ("CrossEncoder", "one pair as array", lambda m: m.predict(np.array(PAIRS[2]))),
    ("CrossEncoder", "no pairs", lambda m: m.predict([])),
    ("CrossEncoder", "a tensor", lambda m: m.predict(PAIRS, convert_to_tensor=True)),
    ("CrossEncoder", "a list of tensors", lambda m: m.predict(PAIRS, convert_to_numpy=False)),
    ("CrossEncoder", "another activation", lambda m: m.predict(PAIRS, activation_fn=torch.nn.Identity())),
    ("CrossEncoder", "softmax of one label", lambda m: m.predict(PAIRS, apply_softmax=True)),
    ("CrossEncoder", "a prompt", lambda m: m.predict(PAIRS, prompt="compare: ")),
    ("CrossEncoder", "a ranking", lambda m: m.rank(TEXTS[0], TEXTS[2:9])),
    ("CrossEncoder", "the best with texts", lambda m: m.rank(TEXTS[0], TEXTS[2:9], top_k=3, return_documents=True)),
    ("SparseEncoder", "sparse tensor", lambda m: m.encode(TEXTS)),
    ("SparseEncoder", "list of sparse tensors", lambda m: m.encode(TEXTS, convert_to_tensor=False)),
    ("SparseEncoder", "dense tensor", lambda m: m.encode(TEXTS, convert_to_sparse_tensor=False)),
    ("SparseEncoder", "few dimensions", lambda m: m.encode(TEXTS, max_active_dims=7)),
    ("SparseEncoder", "compressed rows", lambda m: m.encode(TEXTS, max_active_dims=7).to_sparse_csr().to_dense()),
    ("SparseEncoder", "entries of a text", lambda m: m.encode(TEXTS, convert_to_tensor=False)[0].coalesce().values()),
    ("SparseEncoder", "one text", lambda m: m.encode(TEXTS[0])),
    ("SparseEncoder", "no texts", lambda m: m.encode([])),
    ("SparseEncoder", "queries", lambda m: m.encode_query(TEXTS)),
    ("SparseEncoder", "documents", lambda m: m.encode_document(TEXTS)),
    ("SparseEncoder", "positional arguments", lambda m: m.encode(TEXTS, "query", None, 4, False, True, False)),
    ("MultiVectorEncoder", "tensors", lambda m: m.encode(TEXTS)),
    ("MultiVectorEncoder", "arrays", lambda m: m.encode(TEXTS, convert_to_numpy=True)),
    ("MultiVectorEncoder", "normalised", lambda m: m.encode(TEXTS, normalize_embeddings=True)),
    ("MultiVectorEncoder", "queries", lambda m: m.encode_query(TEXTS)),
    ("MultiVectorEncoder", "documents", lambda m: m.encode_document(TEXTS)),
    ("MultiVectorEncoder", "one text", lambda m: m.encode_query(TEXTS[0])),
    ("MultiVectorEncoder", "no texts", lambda m: m.encode([])),
    ("MultiVectorEncoder", "all features", lambda m: m.encode(TEXTS, output_value=None)),
    ("SentenceTransformer", "token embeddings", lambda m: m.encode(TEXTS, output_value="token_embeddings")),
    ("SentenceTransformer", "one text's", lambda m: m.encode(TEXTS[0], output_value="token_embeddings")),
    (
        "SentenceTransformer", "of queries", lambda m: m.encode_query(TEXTS, output_value="token_embeddings"),
    ),
]  # fmt: skip
CASES = [pytest.param(kind, ask, id=f"{kind}: {name}") for kind, name, ask in ASKED]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(("model", "ask"), CASES, indirect=["model"])
def test_results_are_the_models_own_cold_warm_and_reopened(model: Any, ask: Ask, tmp_path: Path) -> None:
    expected = ask(model)
    with LLMCache.open(tmp_path / "store", model) as cache:
        cold, warm = ask(cache), ask(cache)
    with LLMCache.open(tmp_path / "store", model) as cache:
        reopened = ask(cache)
        assert cache.stats().counters.misses == 0
    assert close(cold, expected)
    assert close(warm, cold, 0)
    assert close(reopened, cold, 0)


@pytest.mark.parametrize("labels", [1, 3])
def test_logits_of_several_labels_are_stored_before_the_activation(folder: str, labels: int, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder, labels)
    with LLMCache.open(tmp_path / "store", model) as cache:
        for settings in ({}, {"apply_softmax": True}, {"activation_fn": torch.nn.Tanh()}):
            assert close(cache.predict(PAIRS, **settings), model.predict(PAIRS, **settings))
        assert cache.stats().counters.misses == len(set(PAIRS))


def test_the_two_sides_of_a_pair_are_not_exchanged(folder: str, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder)
    turned = [(b, a) for a, b in PAIRS]
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict(PAIRS)
        assert close(cache.predict(turned), model.predict(turned))
        assert cache.stats().counters.misses == len({*PAIRS, *turned})


@pytest.mark.parametrize(
    ("one", "other"), [(("ab", "c"), ("a", "bc")), (("a", ""), ("", "a")), (("a\x00", "b"), ("a", "\x00b"))]
)
def test_pairs_with_the_same_letters_have_different_keys(one: Any, other: Any, folder: str, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict([one])
        assert close(cache.predict([other]), model.predict([other]))


def test_only_the_unknown_half_of_a_grid_is_computed(folder: str, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder)
    queries, documents = sentences(6), sentences(10, seed=1)
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict([(query, document) for query in queries[:3] for document in documents])
        grid = [(query, document) for query in queries for document in documents]
        assert close(cache.predict(grid), model.predict(grid))
        assert cache.stats().counters.misses == 60


def test_ranking_by_several_labels_is_refused_as_by_the_model(folder: str, tmp_path: Path) -> None:
    with (
        LLMCache.open(tmp_path / "store", kinds.cross_encoder(folder, 3)) as cache,
        pytest.raises(ValueError, match="3"),
    ):
        cache.rank("a query", ["a document"])


def test_a_method_of_another_kind_names_the_right_one(folder: str, tmp_path: Path) -> None:
    with (
        LLMCache.open(tmp_path / "pairs", kinds.cross_encoder(folder)) as cache,
        pytest.raises(ConfigError, match="predict"),
    ):
        cache.encode(["a text"])
    with (
        LLMCache.open(tmp_path / "texts", with_prompts(folder)) as cache,
        pytest.raises(ConfigError, match="CrossEncoder"),
    ):
        cache.predict([("a", "b")])


def test_a_store_of_one_kind_is_refused_to_every_other(folder: str, tmp_path: Path) -> None:
    models = {kind: make(folder) for kind, make in kinds.MAKERS.items()}
    for kind, model in models.items():
        LLMCache.open(tmp_path / kind, model).close()
        for other, given in models.items():
            if other != kind:
                with pytest.raises(ModelMismatch, match=f"made with a {kind} .* is a {other}"):
                    LLMCache.open(tmp_path / kind, given)


def test_a_store_loads_the_model_of_its_own_kind(folder: str, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder)
    model.save(str(tmp_path / "saved"))
    with LLMCache.open(tmp_path / "store", tmp_path / "saved") as cache:
        expected = cache.predict(PAIRS)
    with LLMCache.open(tmp_path / "store") as cache:
        assert isinstance(cache.model, CrossEncoder)
        assert close(cache.predict(PAIRS), expected, 0)
        assert cache.stats().counters.misses == 0


@pytest.mark.parametrize("kind", list(kinds.MAKERS))
def test_the_kind_is_found_in_the_models_folder(kind: str, folder: str, tmp_path: Path) -> None:
    kinds.MAKERS[kind](folder).save(str(tmp_path / "saved"))
    assert encoder_class(str(tmp_path / "saved")).__name__ == kind


def test_a_plain_classifier_is_a_cross_encoder_unless_another_kind_is_named(folder: str, tmp_path: Path) -> None:
    BertForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    assert encoder_class(str(tmp_path / "plain")) is CrossEncoder
    assert encoder_class(str(tmp_path / "plain"), "sentence-transformer") is SentenceTransformer
    with pytest.raises(ConfigError, match="cross-encoder"):
        encoder_class(str(tmp_path / "plain"), "reranker")


# -- changes of the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"], indirect=True)
def test_a_changed_model_is_refused(model: Any, tmp_path: Path) -> None:
    pairs = isinstance(model, CrossEncoder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        ask: Callable[[], Any] = (lambda: cache.predict(PAIRS)) if pairs else (lambda: cache.encode(TEXTS))
        before = ask()
        model.max_seq_length = 8
        with pytest.raises(ModelMismatch, match="max_seq_length"):
            ask()
        model.max_seq_length = 160
        assert close(ask(), before, 0)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        with pytest.raises(ModelMismatch):
            ask()


def test_settings_of_the_way_out_do_not_change_the_model(folder: str, tmp_path: Path) -> None:
    model = kinds.cross_encoder(folder)
    with LLMCache.open(tmp_path / "pairs", model) as cache:
        cache.predict(PAIRS)
        model.activation_fn = torch.nn.Identity()
        assert close(cache.predict(PAIRS), model.predict(PAIRS))
    sparse = kinds.sparse_encoder(folder)
    with LLMCache.open(tmp_path / "sparse", sparse) as cache:
        cache.encode(TEXTS)
        sparse.max_active_dims = 5
        assert close(cache.encode(TEXTS), sparse.encode(TEXTS))
        assert cache.stats().counters.misses == len(set(TEXTS))


@pytest.mark.parametrize("model", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"], indirect=True)
def test_wrong_entries_are_found_by_an_audit(model: Any, tmp_path: Path) -> None:
    pairs = isinstance(model, CrossEncoder)
    given: Any = PAIRS[:3] if pairs else TEXTS[2:5]
    with LLMCache.open(tmp_path / "store", model) as cache:
        for text in given:
            by_text, by_tokens, tokens = cache._execution.keys_of(text, None, None)
            width = cache._bank.facts.width
            value = np.ones(1 if pairs else (3, width), np.float32).reshape(1, -1 if pairs else 3, width)
            cache._storing.put(
                cache._bank, by_tokens, value[:, 0] if pairs else list(value), by_text, tokens=tokens.ids,
                sources=[""], features=np.ones((1, cache._bank.facts.feature_width), np.float32),
                cost=np.ones(1, np.float32),
            )  # fmt: skip
    with LLMCache.open(tmp_path / "store", model) as cache, pytest.raises(ModelMismatch):
        cache.predict(given) if pairs else cache.encode(given)


# -- odd outputs --------------------------------------------------------------------------------------------


def test_a_sparse_row_without_entries_is_stored_and_served(folder: str, tmp_path: Path) -> None:
    model = kinds.sparse_encoder(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("predictions.decoder.bias") or name.endswith("predictions.bias"):
                weight.fill_(-1000.0)  # no dimension is above zero
    assert model.encode(TEXTS[:3]).to_dense().count_nonzero() == 0
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(TEXTS[:3])
    with LLMCache.open(tmp_path / "store", model) as cache:
        assert close(cache.encode(TEXTS[:3]), model.encode(TEXTS[:3]))
        assert cache.stats().counters.misses == 0


@pytest.mark.parametrize("model", ["CrossEncoder", "MultiVectorEncoder"], indirect=True)
def test_outputs_that_are_no_numbers_are_given_and_not_stored(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with LLMCache.open(tmp_path / "store", model) as cache:
        given = cache.predict(PAIRS[:2]) if isinstance(model, CrossEncoder) else cache.encode(TEXTS[:2])[0].numpy()
        assert np.isnan(given).all()
        assert len(cache) == 0


def test_bytes_of_a_sparse_row_follow_its_entries(folder: str, tmp_path: Path) -> None:
    model = kinds.sparse_encoder(folder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        entries = int(cache.encode(sorted(set(TEXTS))).to_dense().count_nonzero())
        cache.commit()
        facts = cache._bank.facts
    assert sum(segment.payload for segment in facts.segments) == 8 * entries


def test_token_vectors_are_stored_in_half_precision_where_the_user_allows_it(folder: str, tmp_path: Path) -> None:
    model = kinds.multi_vector_encoder(folder)
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(dtype="float16")) as cache:
        cache.encode(TEXTS)
        assert close(cache.encode(TEXTS), model.encode(TEXTS), 2e-3)
        cache.commit()
        stored = sum(segment.payload for segment in cache._bank.facts.segments)
    assert stored == 2 * sum(vectors.numel() for vectors in model.encode(sorted(set(TEXTS))))


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_every_tier_of_every_kind_is_verified_against_the_model_itself(model: Any, tmp_path: Path) -> None:
    given: Any = PAIRS if isinstance(model, CrossEncoder) else TEXTS
    checks = list(verify_model(model, model.tokenizer, given, tmp_path / "store"))
    assert [check.tier for check in checks] == ["model", "output", "output", "output", "layer-0", "layer-1"]
    assert all(check.passed for check in checks)
    assert [check.same for check in checks] == [None, None, True, True, None, None]
    assert [check.reused for check in checks[2:4]] == [len(given)] * 2


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_a_wrong_result_of_any_kind_is_found(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "predict" if isinstance(model, CrossEncoder) else "encode"
    right, calls = getattr(LLMCache, method), 0

    def wrong_when_warm(self: LLMCache, *arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        found = right(self, *arguments, **settings)
        if calls == 1:
            return found
        first = np.asarray(found if isinstance(found, np.ndarray) else found[0]).reshape(-1)
        first[0] = np.nextafter(first[0], np.float32(99))
        return found

    monkeypatch.setattr(LLMCache, method, wrong_when_warm)
    given: Any = PAIRS[:6] if isinstance(model, CrossEncoder) else TEXTS[:6]
    checks = list(verify_model(model, model.tokenizer, given, tmp_path / "store", layers="output"))
    assert [check.passed for check in checks[:4]] == [True, True, False, False], "one bit is enough"


def test_verification_uses_the_default_prompt(folder: str, tmp_path: Path) -> None:
    model = with_prompts(folder)
    model.default_prompt_name = "topic"
    assert all(check.passed for check in verify_model(model, model.tokenizer, TEXTS, tmp_path / "store"))


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_documents_that_a_model_does_not_read_are_not_verified(model: Any, tmp_path: Path) -> None:
    pairs = isinstance(model, CrossEncoder)
    given: Any = [*PAIRS[:1], TEXTS[0]] if pairs else [TEXTS[0], PAIRS[0]]
    said = f"a {type(model).__name__} reads {'pairs of texts' if pairs else 'single texts'}, and document 1"
    with pytest.raises(ConfigError, match=said):
        list(verify_model(model, model.tokenizer, given, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_token_embeddings_beside_padding_on_the_left_are_the_models_own(folder: str, tmp_path: Path) -> None:
    """The model's own results contain the padding, so they depend on the other texts of a batch."""
    model = with_prompts(folder)
    model.tokenizer.padding_side = "left"
    with LLMCache.open(tmp_path / "store", model) as cache:
        for texts in (TEXTS[2:3], TEXTS, TEXTS[2:5]):
            expected = model.encode(texts, output_value="token_embeddings")
            assert close(cache.encode(texts, output_value="token_embeddings"), expected)


def test_scores_of_a_head_in_float32_on_a_model_in_bfloat16_are_stored_unrounded(folder: str, tmp_path: Path) -> None:
    model: Any = kinds.cross_encoder(folder).bfloat16()
    model.transformers_model.classifier = Float32Head(model.transformers_model.classifier)
    expected = model.predict(PAIRS)
    assert len(set(torch.from_numpy(expected).bfloat16().tolist())) < len(set(expected))
    for _ in range(2):
        with LLMCache.open(tmp_path / "store", model) as cache:
            np.testing.assert_array_equal(cache.predict(PAIRS), expected)
    assert cache.stats().counters.misses == 0


# -- drop-ins -----------------------------------------------------------------------------------------------

AS: dict[str, Callable[[LLMCache], Any]] = {
    "SentenceTransformer": LLMCache.as_sentence_transformer,
    "CrossEncoder": LLMCache.as_cross_encoder,
    "SparseEncoder": LLMCache.as_sparse_encoder,
    "MultiVectorEncoder": LLMCache.as_multi_vector_encoder,
}


@pytest.fixture
def cache(model: Any, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_a_drop_in_answers_through_the_cache_as_an_instance_of_the_models_class(model: Any, cache: LLMCache) -> None:
    made = AS[type(model).__name__](cache)
    assert isinstance(made, type(model))
    assert "sentence_transformers" in str(type(made))  # KeyBERT and BERTopic look for it
    for _ in range(2):
        if isinstance(made, CrossEncoder):
            assert close(made.predict(PAIRS), model.predict(PAIRS))
            assert close(made.rank(TEXTS[0], TEXTS[2:]), model.rank(TEXTS[0], TEXTS[2:]))
        else:
            assert close(made.encode(TEXTS), model.encode(TEXTS))
            assert close(made.encode_query(TEXTS), model.encode_query(TEXTS))
            assert close(made.encode_document(TEXTS), model.encode_document(TEXTS))
    counters = cache.stats().counters
    assert counters.bypassed == 0
    assert counters.documents >= 2 * counters.misses


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_results_of_a_model_in_training_mode_are_those_in_evaluation_mode_which_it_keeps(
    model: Any, cache: LLMCache
) -> None:
    def ask(one: Any) -> Any:
        return one.predict(PAIRS) if isinstance(one, CrossEncoder) else one.encode(TEXTS)

    made = AS[type(model).__name__](cache)
    expected = ask(model)
    for _ in range(2):  # computed, and stored
        assert made.train() is made
        assert close(ask(made), expected)
        assert not model.training


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_a_setting_of_a_drop_in_is_the_models_and_is_noticed(model: Any, cache: LLMCache) -> None:
    made: Any = AS[type(model).__name__](cache)
    made.max_seq_length = 9
    assert model.max_seq_length == 9
    with pytest.raises(ModelMismatch, match="max_seq_length"):
        made.predict(PAIRS) if isinstance(made, CrossEncoder) else made.encode(TEXTS)


@pytest.mark.parametrize("model", list(kinds.MAKERS), indirect=True)
def test_a_drop_in_is_saved_as_the_model_and_copied_without_the_cache(
    model: Any, cache: LLMCache, tmp_path: Path
) -> None:
    made: Any = AS[type(model).__name__](cache)
    made.save(str(tmp_path / "saved"))
    assert type(copy.deepcopy(made)) is type(model)
    again = encoder_class(str(tmp_path / "saved"))(str(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert made.device == model.device
    assert made.max_seq_length == model.max_seq_length
    assert made.tokenizer is model.tokenizer


def test_a_pickled_drop_in_opens_the_store_again(folder: str, tmp_path: Path) -> None:
    model = with_prompts(folder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        made = cache.as_sentence_transformer()
        expected = made.encode(TEXTS)
        InformationRetrievalEvaluator({"q": "a blue card"}, {"1": "a card", "2": "a lamp"}, {"q": {"1"}})(made)
        cache.commit()
        again: Any = pickle.loads(pickle.dumps(made))  # noqa: S301
        assert close(again.encode(TEXTS), expected, 0)
        assert again.llmcache.stats().counters.misses == 0
        again.llmcache.close()


def test_a_drop_in_of_another_kind_is_refused(folder: str, tmp_path: Path) -> None:
    with (
        LLMCache.open(tmp_path / "store", with_prompts(folder)) as cache,
        pytest.raises(ConfigError, match="not a"),
    ):
        cache.as_cross_encoder()


def test_a_cache_of_a_drop_in_is_one_of_the_model_itself(folder: str, tmp_path: Path) -> None:
    model = with_prompts(folder)
    with (
        LLMCache.open(tmp_path / "one", model) as cache,
        LLMCache.open(tmp_path / "two", cache.as_sentence_transformer()) as other,
    ):
        assert other.model is model


def test_a_drop_in_of_a_closed_cache_says_so(folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", with_prompts(folder)) as cache:
        made = cache.as_sentence_transformer()
    with pytest.raises(LLMCacheError, match="closed"):
        made.encode(TEXTS)


def test_a_kind_that_the_store_does_not_have_is_refused(folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", folder, kind="sentence-transformer"):
        pass
    for kind in ("cross-encoder", "nope"):
        with pytest.raises(ConfigError, match="has a sentence-transformer, not a"):
            LLMCache.open(tmp_path / "store", kind=kind)
    LLMCache.open(tmp_path / "store", kind="sentence-transformer").close()


def test_a_model_of_token_vectors_gives_no_sentence_embedding(folder: str, tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="gives token embeddings only")
    with LLMCache.open(tmp_path / "store", kinds.multi_vector_encoder(folder)) as cache, refused:
        cache.run(TEXTS, output_value="sentence_embedding")
