"""StreamBatch: boundaries, commit, withdrawal and rollback of rows that run in lock step."""

import torch

from modeling_pdt.streams import StreamBatch

EOS = torch.tensor([1])


class CacheSpy:
    def __init__(self):
        self.counts, self.kept = [], []

    def rollback(self, counts):
        self.counts.append(counts.tolist())

    def batch_select_indices(self, places):
        self.kept.append(places.tolist())


def batch(max_new_tokens=10, block_size=4, headers=((7,), (), (8, 9))):
    streams = StreamBatch([[2, 3, 4]], [list(h) for h in headers], max_new_tokens, block_size, 2, torch.device("cpu"))
    streams.cache = CacheSpy()
    return streams


def write(streams, tokens):
    """Chooses and consumes one token per row of the batch; the tap state of a row is its token, twice."""
    streams.drop_finished()
    rows = streams.batch_A
    streams.choose(rows, torch.tensor(tokens)[rows])
    streams.append_mask()
    streams.consume(streams.next_R[rows, None, None].expand(-1, 1, 2).float())


def test_rows_know_prompt_and_stream():
    streams = StreamBatch([[5], [6, 7]], [[9], [], [], [8]], 4, 2, 2, torch.device("cpu"))
    assert streams.prompt_R.tolist() == [0, 0, 1, 1]
    assert streams.stream_R.tolist() == [0, 1, 0, 1]


def test_a_block_ends_when_full_or_with_eos_or_at_the_limit():
    streams = batch(max_new_tokens=6)
    write(streams, [20, 1, 30])
    assert streams.at_boundary(EOS).tolist() == [False, True, False]
    streams.commit(torch.tensor([1]))
    streams.finish(torch.tensor([1]), EOS)
    assert streams.sections[1].tokens == [1] and streams.sections[1].blocks == [(0, 1)]
    assert streams.sections[1].finished
    assert streams.live_rows == [0, 2]
    for token in (21, 22):
        write(streams, [token, 0, token])
        assert not streams.at_boundary(EOS).any()
    write(streams, [23, 0, 23])
    assert streams.at_boundary(EOS).tolist() == [True, False, True]
    streams.commit(torch.tensor([0, 2]))
    assert streams.round_R.tolist() == [1, 1, 1]
    assert not streams.at_boundary(EOS).any()
    write(streams, [24, 0, 24])
    write(streams, [25, 0, 25])
    assert streams.at_boundary(EOS).tolist() == [True, False, True]
    streams.commit(torch.tensor([0, 2]))
    assert streams.sections[0].blocks == [(0, 4), (4, 6)]
    assert streams.sections[0].tokens == [20, 21, 22, 23, 24, 25]
    assert streams.fed_R.tolist() == [6, 1, 6]


def test_a_stopped_row_closes_its_block():
    streams = batch()
    streams.stop_R[2] = True
    write(streams, [20, 21, 22])
    assert streams.at_boundary(EOS).tolist() == [False, False, True]


def test_no_eos_at_all():
    streams = batch()
    write(streams, [1, 1, 1])
    assert not streams.at_boundary(torch.tensor([], dtype=torch.long)).any()


def test_withdrawal_goes_back_to_the_token_before_the_block():
    streams = batch()
    streams.position_R += 4
    for token in (20, 21, 22, 23):
        write(streams, [token, token + 10, token + 20])
    streams.commit(torch.tensor([2]))
    streams.withdraw(torch.tensor([0, 1]))
    assert streams.cache.counts == [[4, 4, 0]]
    assert streams.attempt_R.tolist() == [1, 1, 0]
    assert streams.fed_R.tolist() == [0, 0, 4]
    assert streams.position_R.tolist() == [4, 4, 8]
    assert [section.retries for section in streams.sections] == [1, 1, 0]
    write(streams, [24, 34, 44])
    assert streams.fed_R.tolist() == [1, 1, 5]
    assert not streams.at_boundary(EOS).any()
    assert streams.sections[0].tokens == [] and streams.sections[2].tokens == [40, 41, 42, 43]


def test_withdrawal_of_a_later_block_keeps_what_is_committed():
    streams = batch(block_size=2)
    for token in (20, 21):
        write(streams, [token] * 3)
    streams.commit(torch.tensor([0, 1, 2]))
    for token in (22, 23):
        write(streams, [token] * 3)
    streams.withdraw(torch.tensor([1]))
    assert streams.cache.counts == [[0, 2, 0]]
    assert streams.fed_R.tolist() == [4, 2, 4]
    assert streams.attempt_R.tolist() == [0, 1, 0]
    assert streams.tap_RLD[1, streams.fed_R[1]].tolist() == [21, 21]


def test_rollback_moves_the_mask_of_its_rows_only():
    streams = batch()
    streams.mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    streams.rollback(torch.tensor([2, 0, 1]))
    assert streams.mask.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_states_of_a_block_and_of_the_position_before():
    streams = batch(max_new_tokens=6)
    streams.tap_RLD[:, 0] = 99
    for token in (20, 21, 22, 23):
        write(streams, [token] * 3)
    rows = torch.tensor([0, 2])
    states, previous, mask = streams.block_states(rows)
    assert states[..., 0].tolist() == [[20, 21, 22, 23]] * 2
    assert previous[..., 0].tolist() == [[99, 20, 21, 22]] * 2
    assert mask.all()
    streams.commit(rows)
    write(streams, [24] * 3)
    states, previous, mask = streams.block_states(rows[:1])
    assert mask.tolist() == [[True, False, False, False]]
    assert (states[0, 0, 0], previous[0, 0, 0]) == (24, 23)
    text, filled = streams.own_text(torch.tensor([0, 2]))
    assert text[1, :, 0].tolist() == [20, 21, 22, 23, 24]
    assert filled.all()


def test_histories_follow_withdrawal():
    streams = batch(block_size=2)
    write(streams, [20, 21, 22])
    write(streams, [30, 31, 32])
    assert [h.tolist() for h in streams.histories(torch.tensor([1, 2]))] == [
        [2, 3, 4, 21, 31],
        [2, 3, 4, 8, 9, 22, 32],
    ]
    streams.withdraw(torch.tensor([1]))
    assert streams.histories(torch.tensor([1]))[0].tolist() == [2, 3, 4]


def test_only_rows_of_the_batch_advance():
    streams = batch()
    write(streams, [20, 1, 30])
    streams.commit(torch.tensor([1]))
    streams.finish(torch.tensor([1]), EOS)
    write(streams, [21, 0, 31])
    assert streams.fed_R.tolist() == streams.position_R.tolist() == [2, 1, 2]
    assert streams.mask.tolist() == [[1, 1]] * 2
    assert streams.tap_RLD[:, :, 0].tolist()[1] == [0, 1] + [0] * 9


def test_a_row_that_ends_leaves_its_place_to_the_last_one():
    streams = batch(headers=((), (), (), (), ()))
    write(streams, [20, 1, 30, 1, 40])
    streams.mask = torch.arange(5)[:, None]
    assert streams.drop_finished() is None
    streams.commit(torch.tensor([1, 3]))
    streams.finish(torch.tensor([1, 3]), EOS)
    assert streams.drop_finished().tolist() == [0, 4, 2]
    assert streams.batch_rows == streams.batch_A.tolist() == [0, 4, 2]
    assert streams.cache.kept == [[0, 4, 2]]
    assert streams.mask.tolist() == [[0], [4], [2]]
    streams.position_R += 5
    streams.rollback(torch.tensor([0, 0, 0, 0, 1]))
    assert streams.cache.counts == [[0, 1, 0]]
    assert streams.position_R.tolist() == [6, 6, 6, 6, 5]
