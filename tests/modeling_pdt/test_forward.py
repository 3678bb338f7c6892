"""Arguments of `forward` that it does not have."""

import pytest
import torch

IDS = torch.tensor([[5, 6, 7]])


# They had no effect; the message on embeddings asked for what had been given.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions is not available here, got bool, allowed: None"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds is not available here, got Tensor"),
        ({"use_cache": True}, "use_cache=True, allowed: with past_key_values"),
    ],
)
def test_arguments_without_effect_are_refused(make_model, arguments, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        model(IDS, **arguments)
    quiet = dict.fromkeys(arguments, None if "inputs_embeds" in arguments else False)
    assert torch.equal(model(IDS, **quiet).logits, model(IDS).logits)
