"""Columns that nothing conditions pass the trunk once per step, and once for siblings that begin alike."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.adapter_layer import PDTStack
from modeling_pdt.note_states import NoteStates

LOSSES = {"atol": 1e-6, "rtol": 1e-6}
PROMPT = 7


def pad_left(batch, columns: int = 3):
    """The batch with its rows at the right edge and, in all of them, `columns` of padding before the first."""

    def move(values_RT: torch.Tensor, filler: int) -> torch.Tensor:
        values_RT = torch.nn.functional.pad(values_RT, (columns, 0), value=filler)
        rows = [
            row.roll(int((mask == 0).sum()))
            for row, mask in zip(values_RT, batch.inputs["attention_mask"], strict=True)
        ]
        return torch.stack(rows)

    rollout = batch.rollout
    rollout = replace(
        rollout, write_round_RT=move(rollout.write_round_RT, -1), read_round_RT=move(rollout.read_round_RT, -1)
    )
    batch.labels = move(batch.labels, -100)
    fillers = {"input_ids": 0, "stream_ids": -1, "attention_mask": 0}
    batch.inputs = {name: move(batch.inputs[name], filler) for name, filler in fillers.items()} | {"rollout": rollout}
    batch.rollout = rollout
    return batch


def begin_alike(batch, streams: int = 3):
    """The batch with the same prompt in all rows of a document."""
    ids = batch.inputs["input_ids"]
    ids[:, : PROMPT - 1] = ids[::streams, : PROMPT - 1].repeat_interleave(streams, dim=0)
    return batch


def step(model, batch, monkeypatch, shares: bool = True) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """
    Losses and gradients of a step: a student, a teacher and the trunk without gradient, a pass that learns with
    another lag.
    """
    if not shares:
        monkeypatch.setattr(PDTStack, "share_prefix", lambda stack, tap, *choices: stack.lower_from(tap))
    model.zero_grad(set_to_none=True)
    wanted = {"labels": batch.labels}
    student = model(**batch.inputs, **wanted)
    same = {"tap": student.tap.detach(), "stream_ids": batch.inputs["stream_ids"], **wanted}
    with torch.no_grad():
        silent = model(**same, rollout=replace(batch.rollout, keep_RV=torch.zeros(6, 4, dtype=torch.bool))).loss
        trunk = model(tap=student.tap, **wanted).loss
    older = model(**same, rollout=replace(batch.rollout, lag_R1=batch.rollout.lag_R1 + 1)).loss
    (student.loss + 0.5 * older).backward()
    learnt = {name: parameter.grad for name, parameter in model.pdt_parameters().items()}
    gradients = {name: gradient.clone() for name, gradient in learnt.items() if gradient is not None}
    return [student.loss.detach(), silent, trunk, older.detach()], gradients


@pytest.mark.parametrize("side", ["left", "right", "alike"])
@pytest.mark.parametrize("placement", ["between", "after_attention"])
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("gpt_oss", None), ("llama", None), ("qwen3", None), ("llama", "reentrant"), ("llama", "not reentrant")],
)
def test_losses_and_gradients_are_those_of_whole_rows(
    make_model, make_rollout, monkeypatch, name, placement, side, checkpointing
):
    model = make_model(name, trained=True, snc_placement=placement).train()
    batch = make_rollout(prompt=PROMPT, items=4)
    batch = {"left": pad_left, "right": lambda same: same, "alike": begin_alike}[side](batch)
    with monkeypatch.context() as patches:
        expected_losses, expected = step(model, batch, patches, shares=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    losses, gradients = step(model, batch, monkeypatch)
    for one, other in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(one, other, **LOSSES)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[key], gradient, atol=max(1e-6 * scale, 1e-7), rtol=1e-5, msg=key)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_without_padding_need_no_mask_of_their_own(make_trunk, make_rollout, randomize, implementation):
    # Without padding the trunk makes no mask and relies on causal attention, which is another thing after a prefix.
    trunk = make_trunk("llama", attn_implementation=implementation)
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, notes_dim=16, block_size=4))
    batch = make_rollout(streams=1, documents=6, prompt=PROMPT, lengths=[12, 11, 10, 12, 11, 10])
    batch.inputs["attention_mask"] = torch.ones_like(batch.inputs["attention_mask"])
    whole = model(**batch.inputs, output_hidden_states=True).logits
    torch.testing.assert_close(model(**batch.inputs).logits, whole, atol=1e-5, rtol=1e-5)


def sizes(model, layer: int = -1) -> list[tuple[int, ...]]:
    """Rows and tokens of the calls of a layer of the trunk, by default the last."""
    seen = []
    model.stack.layers[layer].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("heads_only", [False, True])
def test_siblings_that_begin_alike_share_their_first_columns(model, make_rollout, heads_only):
    batch = begin_alike(make_rollout(prompt=PROMPT))
    tokens = batch.ids.shape[1]
    lower, upper = sizes(model, 0), sizes(model, -1)
    model(**batch.inputs, heads_only=heads_only)
    assert lower == [(2, PROMPT - 1), (6, tokens - PROMPT + 1)]
    assert upper == ([] if heads_only else lower)
    batch.inputs["input_ids"][4, PROMPT - 2] += 1
    lower.clear()
    model(**batch.inputs, heads_only=heads_only)
    assert lower == [(6, PROMPT - 1), (6, tokens - PROMPT + 1)]


@torch.no_grad()
def test_passes_after_the_first_run_the_other_columns_only(model, make_rollout):
    batch, seen = make_rollout(prompt=PROMPT), sizes(model)
    tokens = batch.ids.shape[1]
    first = model(**batch.inputs)
    same = {"tap": first.tap, "stream_ids": batch.inputs["stream_ids"], "rollout": batch.rollout}
    again = model(**same)
    assert [length for _, length in seen] == [PROMPT - 1, tokens - PROMPT + 1, tokens - PROMPT + 1]
    assert torch.equal(again.logits, first.logits)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, PROMPT])
def test_calls_of_layers_do_not_depend_on_the_rows(model, make_rollout, prompt):
    batch, seen, lower = make_rollout(prompt=prompt), sizes(model), sizes(model, 0)
    shared = model(**batch.inputs)
    assert len(seen) == len(lower) == 2
    whole = model(**batch.inputs, output_hidden_states=True)
    torch.testing.assert_close(shared.logits, whole.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_conditioned_prompt_is_not_skipped(model, make_rollout):
    batch = make_rollout(prompt=PROMPT)
    tap = model(**batch.inputs).tap
    assert tap.prefix is not None
    bare = replace(tap, prefix=None)
    everywhere = torch.arange(6) % 3
    window = {"notes": torch.randn(6, 5, 16)}
    for inputs in ({"stream_ids": everywhere}, window, {"stream_ids": everywhere, "rollout": batch.rollout}):
        assert torch.equal(model(tap=tap, **inputs).logits, model(tap=bare, **inputs).logits)


@torch.no_grad()
def test_a_cache_and_ready_masks_leave_rows_whole(model, make_rollout):
    batch = make_rollout(prompt=PROMPT)
    cache = DynamicCache(config=model.trunk.config)
    assert model(**batch.inputs, past_key_values=cache).tap.prefix is None
    assert cache.get_seq_length(3) == batch.ids.shape[1]
    tap = model(**batch.inputs).tap
    ready = {**batch.inputs, "attention_mask": tap.masks, "position_ids": tap.position_ids}
    assert model(**ready).tap.prefix is None


def test_only_columns_before_the_first_reader_can_be_left_out():
    part = torch.zeros(2, 1, 4, 8)
    states = NoteStates((part,), (part,), torch.ones(2, 6, 3, dtype=torch.bool), first_reader=4)
    assert states.after(3).mask.shape == (2, 3, 3) and states.after(3).first_reader == 1
    with pytest.raises(ValueError, match="columns must be <= first_reader=4"):
        states.after(5)
