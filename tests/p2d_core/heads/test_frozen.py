import pytest

from p2d_core.heads.frozen import frozen
from tests.tiny import tiny_llama


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_model_is_after_an_error_too_what_it_was_before(training):
    model = tiny_llama().train(training)
    model.lm_head.requires_grad_(False)
    moved = [parameter.requires_grad for parameter in model.parameters()]

    def fail():
        with frozen(model):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model.lm_head.requires_grad_(True)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert model.training == training
    assert [parameter.requires_grad for parameter in model.parameters()] == moved
