"""A model as others use theirs: pipelines, `model.to(dtype)`, checkpointed activations, copies, interruptions."""

import copy
import pickle

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast, pipeline

from modeling_pdt import PDTForParallelDecoding

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(make_model):
    return make_model("llama", trained=True)


def decode(model, **kwargs):
    return model.generate(IDS, max_new_tokens=9, eos_token_id=None, pad_token_id=0, **kwargs).tolist()


def test_a_pipeline_takes_the_model(model):
    # Pipelines set up what generation needs only for models that say that they generate.
    letters = Tokenizer(models.WordLevel({chr(33 + index): index for index in range(97)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="!", pad_token="!")
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)("abc", num_streams=2, max_new_tokens=4)
    assert [sorted(entry) for entry in written] == [["generated_text"]] * 2


def test_adapters_that_were_cast_are_refused(model):
    # They met states in float32 somewhere inside, with an error about matrices.
    with pytest.raises(ValueError, match=r"adapters must be float32, got torch.bfloat16: load the model anew, dtype"):
        decode(model.to(torch.bfloat16))


def test_a_trunk_of_half_precision_decodes(make_trunk):
    half = PDTForParallelDecoding.from_trunk(make_trunk("llama").to(torch.bfloat16), block_size=4).eval()
    assert torch.tensor(decode(half)).shape == (6, 13)


def test_a_model_that_drops_its_cache_is_refused(model):
    # Layers under checkpointing leave the cache empty in training mode: every token then saw itself alone.
    plain = decode(model)
    model.gradient_checkpointing_enable()
    assert decode(model) == plain
    with pytest.raises(ValueError, match=r"checkpointing drops the cache in training mode: call model.eval\(\)"):
        decode(model.train())
    model.gradient_checkpointing_disable()
    assert decode(model) == plain


def test_copies_decode_alike(model):
    plain = decode(model)
    assert decode(copy.deepcopy(model)) == plain
    assert decode(pickle.loads(pickle.dumps(model))) == plain
    with torch.inference_mode():
        assert decode(model) == plain


class Interrupt(LogitsProcessor):
    """Ctrl-C in the middle of a block."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 10:
            raise KeyboardInterrupt
        return scores


def test_an_interrupted_call_leaves_nothing_behind(model):
    plain = decode(model)
    with pytest.raises(KeyboardInterrupt):
        decode(model, logits_processor=[Interrupt()])
    assert decode(model) == plain
