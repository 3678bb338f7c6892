"""Two threads decode with one model at the same time: each call writes what it writes alone."""

import threading

import pytest
import torch

from modeling_pdt.callbacks import ParallelDecodingCallback
from modeling_pdt.decoding_kernels import GROUPED
from modeling_pdt.readings import ReadingRecorder

IDS = torch.tensor([[5, 6, 7, 8]])


class Numbers:
    """A tokenizer that reads any text as an outline of one item."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}

    def decode(self, ids, **kwargs):
        return "1. A: " + " ".join(str(int(i)) for i in ids if i > 1) + "\n\n"


class Turns:
    """Two threads go on in turn, from one decoder layer to the next, until one of them ends."""

    def __init__(self, model):
        self.condition, self.turn, self.left, self.numbers = threading.Condition(), 0, set(), {}
        self.handles = [layer.input_layernorm.register_forward_pre_hook(self.pass_on) for layer in model.stack.layers]

    def pass_on(self, *_):
        number = self.numbers[threading.get_ident()]
        with self.condition:
            self.turn = 1 - number
            self.condition.notify_all()
            assert self.condition.wait_for(lambda: self.turn == number or self.left, timeout=20)

    def run(self, *calls):
        outputs = [None, None]

        def work(number):
            self.numbers[threading.get_ident()] = number
            try:
                outputs[number] = calls[number]()
            finally:
                with self.condition:
                    self.left.add(number)
                    self.condition.notify_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for handle in self.handles:
            handle.remove()
        return outputs


class Attention(ParallelDecodingCallback):
    """Which attention every trunk call used."""

    def __init__(self):
        self.names = set()

    def on_token(self, decoder, *_):
        self.names.add(decoder.model.trunk.config._attn_implementation)


@pytest.fixture
def decode(make_model, randomize, monkeypatch):
    """`decode(**options)` with a model that conditions inside its layers and writes outlines without a real text."""
    model = randomize(make_model("llama", snc_placement="after_attention"), scale=0.3)
    model.trunk.set_attn_implementation("eager")
    model.config._adapter_config.trained_parts = ["agreement"]
    generate = model.trunk.generate

    def without_stop_strings(generation_config, tokenizer=None, **inputs):
        generation_config.stop_strings = None
        return generate(generation_config=generation_config, **inputs)

    monkeypatch.setattr(model.trunk, "generate", without_stop_strings)

    def call(**options):
        options = {
            "tokenizer": Numbers(),
            "do_sample": True,
            "agreement_threshold": 0.999,
            "num_streams": 2,
            **options,
        }
        seen = Attention()
        call = {"eos_token_id": None, "return_dict_in_generate": True, "callbacks": [ReadingRecorder(), seen]}
        return seen, model.generate(IDS, **call, **options)

    call.model = model
    return call


def test_calls_that_take_turns_write_what_each_writes_alone(decode):
    calls = [{"max_new_tokens": 10}, {"max_new_tokens": 6, "seed": 3, "plan": "trunk", "outline_max_new_tokens": 9}]
    alone = [decode(**options)[1] for options in calls]
    together = Turns(decode.model).run(*(lambda options=options: decode(**options) for options in calls))
    for (seen, output), expected in zip(together, alone, strict=True):
        assert torch.equal(output.sequences, expected.sequences)
        for mine, other in zip(output.trace.readings, expected.trace.readings, strict=True):
            assert mine["gate"] == other["gate"] and mine["sink"] == pytest.approx(other["sink"], abs=1e-6)
        assert output.trace.model == expected.trace.model
        assert seen.names == {GROUPED}
    assert decode.model.trunk.config._attn_implementation == "eager"
