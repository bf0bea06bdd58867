import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from p2d_core.errors import DataError, DeviceMemoryError, SettingsError
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.tokens import (
    IGNORED_LABEL,
    EncodedSample,
    Encoder,
    TextFormat,
    TokenBudget,
    batches_by_tokens,
    collate,
    each_batch,
)
from tests.tiny_tokenizer import tiny_bpe, tiny_word_level

PLAIN = tiny_bpe()
WITH_BOS = tiny_bpe(bos="<s>")
TOKENIZERS = {"plain": PLAIN, "with bos": WITH_BOS}


def sample(prompt: str, response: str, row: int = 0) -> Sample:
    return Sample(sample_id_of(prompt, response), "mine", prompt, response, row)


def words(*texts: str, max_tokens: int = 1024) -> list[EncodedSample]:
    """Encoded by a tokenizer in which `a` is 3, `b` is 4 and so on; <s> is 1 and </s> is 2."""
    encoder = Encoder(tiny_word_level("abcdefgh"), TextFormat(max_tokens=max_tokens))
    return list(encoder.encode_all([sample(*text.split("|")) for text in texts]))


def test_a_sample_is_start_prompt_response_end():
    (encoded,) = words("a b|c d")
    assert encoded.input_ids == [1, 3, 4, 5, 6, 2]
    assert (encoded.n_prompt, encoded.n_response) == (3, 3)


@pytest.mark.parametrize(
    ("max_tokens", "ids", "n_prompt"),
    [
        (8, [1, 3, 4, 5, 6, 7, 8, 2], 4),  # fits
        (7, [1, 4, 5, 6, 7, 8, 2], 3),  # the prompt loses its beginning
        (6, [1, 5, 6, 7, 8, 2], 2),
        (5, [1, 5, 6, 7, 8], 2),  # one prompt token is left: the response loses its end
        (4, [1, 5, 6, 7], 2),
    ],
)
def test_what_is_too_long_is_cut(max_tokens, ids, n_prompt):
    (encoded,) = words("a b c|d e f", max_tokens=max_tokens)
    assert (encoded.input_ids, encoded.n_prompt) == (ids, n_prompt)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=st.text(min_size=1), response=st.text(min_size=1), max_tokens=st.integers(4, 30))
def test_what_holds_of_every_encoded_sample(name, prompt, response, max_tokens):
    tokenizer = TOKENIZERS[name]
    encoder = Encoder(tokenizer, TextFormat(max_tokens=max_tokens))
    encoded = encoder.encode(sample(prompt, response))
    n_start = 0 if tokenizer.bos_token_id is None else 1
    assert len(encoded) <= max_tokens
    assert encoded.n_prompt > n_start
    assert encoded.n_response >= 1
    if n_start:
        assert encoded.input_ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(encoded.input_ids[n_start : encoded.n_prompt])
    start = [tokenizer.bos_token_id] if n_start else []
    whole = start + tokenizer(prompt + "\n", add_special_tokens=False).input_ids
    if encoded.n_prompt == len(whole):
        assert text == prompt + "\n"
    assert whole[-encoded.n_prompt + n_start :] == encoded.input_ids[n_start : encoded.n_prompt]
    if encoded.input_ids[-1] == tokenizer.eos_token_id:
        assert tokenizer.decode(encoded.input_ids[encoded.n_prompt : -1]) == response
    else:
        assert len(encoded) == max_tokens
        assert encoded.n_prompt == n_start + 1


def test_a_batch_is_encoded_as_its_samples_are():
    samples = [sample(f"How many is {n}?" * (n % 5 + 1), f"#### {n}") for n in range(1100)]
    encoder = Encoder(WITH_BOS, TextFormat(max_tokens=32))
    assert list(encoder.encode_all(iter(samples))) == [encoder.encode(each) for each in samples]


def test_a_text_may_write_special_tokens():
    assert words("a b|c </s> d")[0].input_ids == [1, 3, 4, 5, 2, 6, 2]


def test_padding_ends_a_sample_where_nothing_else_does():
    encoder = Encoder(tiny_bpe(eos=None))
    assert encoder.encode(sample("p", "r")).input_ids[-1] == encoder.tokenizer.pad_token_id
    encoder = Encoder(tiny_bpe(pad=None))
    assert encoder.pad_id == encoder.end_id == encoder.tokenizer.eos_token_id


def test_a_tokenizer_without_end_and_padding_is_refused():
    with pytest.raises(DataError, match="neither an end-of-sequence nor a padding token"):
        Encoder(tiny_bpe(eos=None, pad=None))


@pytest.mark.parametrize(("text", "role"), [("?|a", "prompt"), ("a|?", "response")])
def test_a_text_that_the_tokenizer_refuses_is_named(text, role):
    with pytest.raises(
        DataError,
        match=rf"row 1 of source 'mine': the {role} '\?' cannot be said \(.*UNK.*\) by",
    ):
        words("a|a", text)


@pytest.mark.parametrize(("text", "role"), [("?|a", "prompt"), ("a|?", "response")])
def test_a_text_without_tokens_is_refused(text, role):
    letters = Tokenizer(models.BPE({"</s>": 0, "a": 1}, []))  # drops what it does not know
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    with pytest.raises(
        DataError, match=rf"the {role} '\?' has no tokens in this model's tokenizer"
    ):
        Encoder(tokenizer).encode(sample(*text.split("|")))


def test_too_few_tokens_for_a_sample_are_refused():
    with pytest.raises(SettingsError, match="max_tokens is 3; a sample needs at least 4"):
        TextFormat(max_tokens=3)


def of_length(length: int) -> EncodedSample:
    return EncodedSample("id", list(range(length)), 1)


@given(st.lists(st.integers(2, 50), max_size=60), st.integers(2, 200), st.integers(1, 70))
def test_batches_hold_every_index_once_within_budget_and_window(lengths, token_budget, window):
    encoded = [of_length(length) for length in lengths]
    batches = list(batches_by_tokens(encoded, token_budget, window))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= token_budget
        assert len({index // window for index in batch}) == 1


def test_batches_are_of_like_length_the_longest_first():
    encoded = [of_length(length) for length in (3, 9, 3, 9)]
    assert list(batches_by_tokens(encoded, token_budget=18)) == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("token_budget", "expected"),
    [
        # a batch costs a 32nd of the budget: 40 + 10 in one, 34 + 20 in two, 33 + 30 in three
        (320, [[0, 1, 2, 3]]),
        (80, [[0, 1], [2, 3]]),  # 42.5, 39, 40.5
        (20, [[0, 1], [2], [3]]),  # two do not fit into one; 35.25, 34.875
    ],
)
def test_batches_end_where_padding_and_batches_cost_least(token_budget, expected):
    """Worked by hand."""
    encoded = [of_length(length) for length in (10, 10, 7, 6)]
    assert list(batches_by_tokens(encoded, token_budget)) == expected


def test_what_fits_no_longer_is_planned_anew():
    encoded = [of_length(length) for length in [10] * 6]
    budget = TokenBudget(30)
    batches = batches_by_tokens(encoded, budget)
    assert next(batches) == [0, 1, 2]
    budget.tokens = 10
    assert list(batches) == [[3], [4], [5]]


@given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(12, 300))
def test_no_other_grouping_of_lengths_is_cheaper(lengths, token_budget):
    """Against every way to group the lengths that there are."""

    def cost(n: int, width: int) -> float:
        return n * width + math.ceil(n / (token_budget // width)) * token_budget / 32

    widths = sorted(set(lengths))
    cheapest = math.inf
    for ends in product([True, False], repeat=len(widths) - 1):
        total, n = 0.0, 0
        for width, is_end in zip(widths, (*ends, True), strict=True):
            n += lengths.count(width)
            if is_end:
                total, n = total + cost(n, width), 0
        cheapest = min(cheapest, total)
    found = sum(
        len(batch) * max(lengths[i] for i in batch) + token_budget / 32
        for batch in batches_by_tokens([of_length(length) for length in lengths], token_budget)
    )
    # less, where the shortest batch of a group is of shorter samples throughout
    assert found <= cheapest + 1e-6


@pytest.mark.parametrize("token_budget", [2048, 8192, 32_768])
def test_padding_is_below_a_tenth_at_lengths_like_gsm8ks(token_budget):
    rng = np.random.default_rng(0)
    lengths = (rng.lognormal(3.95, 0.4, 4096) + rng.lognormal(4.65, 0.5, 4096)).round().astype(int)
    real = padded = 0
    for shard in np.split(lengths, 4):
        encoded = [of_length(int(length)) for length in shard]
        batches = list(batches_by_tokens(encoded, token_budget))
        real += int(shard.sum())
        padded += sum(len(batch) * max(shard[i] for i in batch) for batch in batches)
    assert 1 - real / padded < 0.1


@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=30)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6), data=st.data())
def test_a_batch_gives_back_its_samples(side, lengths, data):
    encoded = []
    for n in lengths:
        n_prompt = data.draw(st.integers(1, n - 1))
        turns = sorted(data.draw(st.sets(st.integers(1, n_prompt), max_size=4)))
        earlier = tuple(zip(turns[::2], turns[1::2], strict=False))
        encoded.append(EncodedSample("id", list(range(5, 5 + n)), n_prompt, earlier))
    batch = collate(encoded, pad_id=0, side=side)
    assert all(part.shape == (len(lengths), max(lengths)) for part in batch.values())
    assert all(part.dtype == torch.int64 for part in batch.values())
    for row, each in enumerate(encoded):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == each.input_ids
        assert (batch["input_ids"][row][~mask] == 0).all()
        labels = batch["labels"][row]
        learnt = {*range(each.n_prompt, len(each))}
        for first, last in each.earlier:
            learnt |= {*range(first, last)}
        assert labels[mask].tolist() == [
            token if place in learnt else IGNORED_LABEL
            for place, token in enumerate(each.input_ids)
        ]
        assert (labels[~mask] == IGNORED_LABEL).all()
        assert mask[0 if side == "right" else -1]


def test_when_memory_runs_out_the_batch_and_the_budget_are_halved_and_the_rest_goes_on():
    encoded = [EncodedSample(str(i), [1] * 10, 5) for i in range(40)]
    budget = TokenBudget(200)
    tried = []

    def work(indices: list[int]) -> int:
        tried.append(len(indices))
        if len(indices) * 10 > 60:
            raise torch.OutOfMemoryError("no room")
        return len(indices)

    made = list(each_batch(encoded, budget, work))
    assert sorted(i for indices, _ in made for i in indices) == list(range(40))
    assert all(len(indices) == n for indices, n in made)
    assert budget.tokens == 50
    assert tried[-1] <= 5
    assert sum(n > 6 for n in tried) == 3  # 20, 10 and the other 10; then no more


def test_a_sample_that_does_not_fit_alone_is_an_error():
    def work(indices: list[int]) -> int:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(DeviceMemoryError, match=r"single sample of 10 .* lower format\.max_tokens"):
        list(each_batch([EncodedSample("a", [1] * 10, 5)], TokenBudget(100), work))


def test_padding_is_a_small_share_of_batches_of_like_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(4096, generator=generator).mul(0.45).add(5.1).exp().long().tolist()
    encoded = [EncodedSample(str(i), [1] * length, 1) for i, length in enumerate(lengths)]
    batches = batches_by_tokens(encoded, 8192)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.1
