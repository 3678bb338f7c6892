"""SNC and stream adapter against plain loops; silence where nothing is visible; zero starts."""

import math

import pytest
import torch

from modeling_pdt.note_states import NoteStates, equal_runs
from modeling_pdt.snc import RMSNorm, SharedNotesCrossAttention, StreamAdapter, orthogonal_rows

ROWS, TOKENS, WINDOW, WIDTH, NOTES_DIM, HEADS = 6, 5, 7, 16, 12, 4


def make_snc(gate_mode: str = "per_head", seed: int = 1) -> SharedNotesCrossAttention:
    torch.manual_seed(seed)
    snc = SharedNotesCrossAttention(WIDTH, NOTES_DIM, HEADS, gate_mode, -0.5, "trunk_space")
    with torch.no_grad():
        for parameter in snc.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return snc


def read(snc, hidden, notes, mask, gate_scale=1.0) -> torch.Tensor:
    keys, values = snc.project(notes)
    return snc(hidden, NoteStates((keys,), (values,), mask, hidden.shape[0] // notes.shape[0], gate_scale), 0)


def plain_norm(norm: RMSNorm, vector: torch.Tensor) -> torch.Tensor:
    return vector / math.sqrt(float((vector * vector).mean()) + norm.eps) * norm.weight


def plain_snc(snc, hidden, notes, mask, gate_scale) -> torch.Tensor:
    """One row, token and head at a time, with a dictionary of visible notes instead of masks."""
    output = hidden.clone()
    rows_per_group = hidden.shape[0] // notes.shape[0]
    size = WIDTH // HEADS
    for row in range(hidden.shape[0]):
        group = row // rows_per_group
        for token in range(hidden.shape[1]):
            state = hidden[row, token]
            normed = plain_norm(snc.norm, state)
            query = snc.q_proj.weight @ normed
            visible = mask[row] if mask.dim() == 2 else mask[row, token]
            context = torch.zeros(WIDTH)
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                weights = {
                    note: math.exp(
                        float(query[part] @ (snc.k_proj.weight @ notes[group, note])[part]) / math.sqrt(size)
                    )
                    for note in range(notes.shape[1])
                    if visible[note]
                }
                total = sum(weights.values()) + math.exp(float(snc.sink[head]))
                logit = snc.gate.logit[head if snc.gate.logit.numel() > 1 else 0]
                if snc.gate.dynamic is not None:
                    logit = logit + snc.gate.dynamic.weight[head] @ normed
                scale = gate_scale if isinstance(gate_scale, float) else gate_scale[row]
                for note, weight in weights.items():
                    value = (snc.v_proj.weight @ notes[group, note])[part]
                    context[part] += torch.sigmoid(logit) * scale * weight / total * value
            rms = math.sqrt(float((state * state).mean()))
            output[row, token] = state + snc.o_proj.weight @ context * rms
    return output


@pytest.mark.parametrize("gate_mode", ["scalar", "per_head", "dynamic"])
@pytest.mark.parametrize("groups", [1, 2, ROWS])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, "rows"])
@torch.no_grad()
def test_snc_equals_a_plain_loop(gate_mode, groups, per_token, scale):
    snc = make_snc(gate_mode)
    hidden = torch.randn(ROWS, TOKENS, WIDTH) * 3
    notes = torch.randn(groups, WINDOW, NOTES_DIM)
    mask = torch.rand(ROWS, TOKENS, WINDOW) < 0.5 if per_token else torch.rand(ROWS, WINDOW) < 0.5
    mask[0] = False
    scale = torch.rand(ROWS) if scale == "rows" else scale
    expected = plain_snc(snc, hidden, notes, mask, scale)
    torch.testing.assert_close(read(snc, hidden, notes, mask, scale), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_notes_do_not_matter():
    snc = make_snc()
    hidden, notes = torch.randn(ROWS, TOKENS, WIDTH), torch.randn(ROWS, WINDOW, NOTES_DIM)
    mask = torch.rand(ROWS, WINDOW) < 0.5
    changed = torch.where(mask[..., None], notes, notes + 100.0)
    assert torch.equal(read(snc, hidden, notes, mask), read(snc, hidden, changed, mask))


@pytest.mark.parametrize("silence", ["mask", "token_mask", "no_notes", "gate"])
def test_silence_is_exact_and_differentiable(silence):
    snc = make_snc("dynamic")
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    notes = torch.randn(ROWS, 0 if silence == "no_notes" else WINDOW, NOTES_DIM, requires_grad=True)
    shape = (ROWS, TOKENS, notes.shape[1]) if silence == "token_mask" else (ROWS, notes.shape[1])
    mask = torch.full(shape, silence == "gate")
    output = read(snc, hidden, notes, mask, 0.0 if silence == "gate" else 1.0)
    assert torch.equal(output, hidden)
    output.square().sum().backward()
    for tensor in (hidden, notes, *snc.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    torch.testing.assert_close(hidden.grad, 2 * hidden.detach())


def test_every_parameter_and_the_notes_get_gradient():
    snc = make_snc("dynamic")
    hidden = torch.randn(ROWS, TOKENS, WIDTH)
    notes = torch.randn(2, WINDOW, NOTES_DIM, requires_grad=True)
    mask = torch.ones(ROWS, WINDOW, dtype=torch.bool)
    mask[:, 0] = False
    read(snc, hidden, notes, mask).square().sum().backward()
    for name, parameter in snc.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert torch.equal(notes.grad[:, 0], torch.zeros(2, NOTES_DIM)) and notes.grad[:, 1:].abs().sum() > 0


@torch.no_grad()
def test_starts():
    hidden, notes = torch.randn(2, 3, WIDTH), torch.randn(2, 1, WIDTH)
    mask = torch.ones(2, 1, dtype=torch.bool)
    zero = SharedNotesCrossAttention(WIDTH, WIDTH, HEADS, "scalar", 0.0, "zero")
    assert torch.equal(read(zero, hidden, notes, mask), hidden)
    # In trunk space an open gate and a closed sink add the note itself, in units of the state's RMS.
    snc = SharedNotesCrossAttention(WIDTH, WIDTH, HEADS, "scalar", 20.0, "trunk_space")
    snc.sink.fill_(-1e4)
    rms = hidden.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(read(snc, hidden, notes, mask), hidden + rms * notes, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dtype_of_the_state_is_kept():
    snc = make_snc()
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    output = read(snc, hidden, torch.randn(2, WINDOW, NOTES_DIM), torch.ones(2, WINDOW, dtype=torch.bool))
    assert output.dtype == torch.bfloat16
    full = read(snc, hidden.float(), torch.zeros(2, WINDOW, NOTES_DIM), torch.ones(2, WINDOW, dtype=torch.bool))
    assert torch.equal(full, hidden.float())


def test_orthogonal_rows():
    assert torch.equal(orthogonal_rows(5, 5), torch.eye(5))
    rows = orthogonal_rows(3, 8)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))


@torch.no_grad()
def test_selected_rows_of_note_states():
    snc = make_snc()
    hidden, notes = torch.randn(ROWS, TOKENS, WIDTH), torch.randn(ROWS, WINDOW, NOTES_DIM)
    mask = torch.rand(ROWS, WINDOW) < 0.5
    keys, values = snc.project(notes)
    states = NoteStates((keys,), (values,), mask, 1, torch.rand(ROWS))
    rows = torch.tensor([4, 1])
    expected = snc(hidden, states, 0)[rows]
    torch.testing.assert_close(snc(hidden[rows], states.select_rows(rows), 0), expected)
    with pytest.raises(ValueError, match="rows_per_group must be 1"):
        NoteStates((keys,), (values,), mask, 2).select_rows(rows)


@pytest.mark.parametrize(("places", "projected"), [([0, 0, 1, 0], 3), ([0, 0, 0, 0], 1), ([0, 1, 2, 3], 4)])
def test_equal_windows_next_to_each_other_are_projected_once(model, places, projected):
    notes, seen = torch.randn(4, WINDOW, 16)[places], []
    mask = torch.rand(4, WINDOW) < 0.5
    expected = model.project_notes(notes, mask)
    handle = model.stack.snc[0].k_proj.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        states = model.project_notes(notes, mask)
    model.project_notes(notes, mask)
    handle.remove()
    assert seen == [projected, 4], "with gradients, windows are projected one by one"
    assert torch.equal(states.mask, expected.mask) and states.rows_per_group == 1
    for mine, others in ((states.keys, expected.keys), (states.values, expected.values)):
        for site, other in zip(mine, others, strict=True):
            torch.testing.assert_close(site, other, atol=1e-6, rtol=0)


def test_windows_that_are_not_known_make_no_runs():
    assert equal_runs(torch.zeros(2, WINDOW, NOTES_DIM, device="meta")) is None
    first, run = equal_runs(torch.zeros(2, 0, NOTES_DIM))
    assert first.tolist() == [0] and run.tolist() == [0, 0]


def make_adapter(activation: str = "gelu", dropout: float = 0.0) -> StreamAdapter:
    adapter = StreamAdapter(3, WIDTH, 4, activation, dropout)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter


@pytest.mark.parametrize(("activation", "function"), [("gelu", torch.nn.functional.gelu), ("tanh", torch.tanh)])
@torch.no_grad()
def test_stream_adapter_equals_a_loop_over_rows(activation, function):
    adapter = make_adapter(activation)
    hidden = torch.randn(ROWS, TOKENS, WIDTH)
    streams = torch.tensor([0, 1, 2, 2, 0, -1])[:, None].repeat(1, TOKENS)
    streams[:, :2] = -1
    expected = hidden.clone()
    for row in range(ROWS):
        for token in range(TOKENS):
            stream = int(streams[row, token])
            if stream >= 0:
                normed = plain_norm(adapter.norm, hidden[row, token])
                inner = function(normed @ adapter.down[stream] + adapter.down_bias[stream])
                expected[row, token] += inner @ adapter.up[stream]
    output = adapter(hidden, streams)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output[streams < 0], hidden[streams < 0])


@torch.no_grad()
def test_streams_beyond_the_trained_ones_share_adapters():
    # Decoding with more streams than trained counts them modulo; a forward over the same rows must agree.
    adapter, hidden = make_adapter(), torch.randn(2, TOKENS, WIDTH)
    many, few = torch.tensor([[4], [3]]).expand(2, TOKENS), torch.tensor([[1], [0]]).expand(2, TOKENS)
    assert torch.equal(adapter(hidden, many), adapter(hidden, few))


@torch.no_grad()
def test_stream_adapter_drops_inner_values_in_training_only():
    adapter, hidden = make_adapter(dropout=0.5), torch.randn(3, TOKENS, WIDTH)
    streams = torch.arange(3)[:, None].expand(3, TOKENS)
    assert not torch.equal(adapter(hidden, streams), adapter(hidden, streams))
    adapter.eval()
    plain = make_adapter()
    plain.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(hidden, streams), plain(hidden, streams))


def test_stream_adapter_is_zero_at_the_start_and_can_learn():
    adapter = StreamAdapter(3, WIDTH, 4, "gelu", 0.0)
    hidden, streams = torch.randn(3, TOKENS, WIDTH), torch.arange(3)[:, None].expand(3, TOKENS)
    output = adapter(hidden, streams)
    assert torch.equal(output, hidden)
    output.square().sum().backward()
    assert (adapter.up.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_stream_adapter_trains_only_the_streams_it_saw():
    adapter = make_adapter()
    streams = torch.tensor([0, 2])[:, None].expand(2, TOKENS)
    adapter(torch.randn(2, TOKENS, WIDTH), streams).square().sum().backward()
    for name in ("down", "up", "down_bias"):
        moved = getattr(adapter, name).grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [True, False, True], name
