"""Tokenizers with a token more than their model knows, as Gemma 3's text models have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from p2d_core.errors import DataError, ModelError
from p2d_core.models import CapturedModel, check_loads
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.synthetic.world import BASE_FOLDER

PICTURE = "<image_soft_token>"


def base_with(folder: Path, **special: str) -> Path:
    """The demo's base, whose tokenizer has a token that the model has no embedding of."""
    base = folder / "base"
    shutil.copytree(BASE_FOLDER, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([PICTURE], special_tokens=True)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(base)
    return base


def test_a_token_that_no_text_names_is_no_fault(tmp_path):
    base = base_with(tmp_path)
    assert check_loads(base)
    sample = Sample(sample_id_of("a b", "c"), "s", "a b", "c", 0, "{}")
    plain, more = (CapturedModel(each).encode([sample]) for each in (BASE_FOLDER, base))
    assert more[0].input_ids == plain[0].input_ids


def test_a_text_that_names_it_is_refused_with_its_row(tmp_path):
    text = f"what is {PICTURE}"
    sample = Sample(sample_id_of(text, "c"), "s", text, "c", 6, "{}")
    with pytest.raises(DataError, match=f"row 7 of source 's' has the token '{PICTURE}', which"):
        CapturedModel(base_with(tmp_path)).encode([sample])


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "bos_token"])
def test_one_that_every_sample_would_have_is_refused(tmp_path, name):
    with pytest.raises(ModelError, match="its tokenizer has the token 93, but the model knows 93"):
        check_loads(base_with(tmp_path, **{name: PICTURE}))
