"""How often a call would wait for a device: what decoding reads back, counted on the CPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_pdt.callbacks import ParallelDecodingCallback

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.masked_select.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Transfers(TorchDispatchMode):
    """Counts what makes a device wait: values read back, and results whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += func in READS or masks
        return func(*args, **(kwargs or {}))


class Steps(ParallelDecodingCallback):
    """What was read back before each trunk call's tokens, by how many rows had ended a block."""

    def __init__(self, transfers):
        self.transfers, self.last, self.committed, self.counts = transfers, 0, 0, []

    def on_commit(self, decoder, event):
        self.committed += 1

    def on_token(self, decoder, *_):
        self.counts.append((self.committed, self.transfers.count - self.last))
        self.last, self.committed = self.transfers.count, 0


def transfers_by_rows(model, monkeypatch, **options):
    """Distinct counts of a call, by the number of rows that have ended a block with the token before."""
    transfers = Transfers()
    tolist = torch.Tensor.tolist

    def counted(self):
        transfers.count += 1
        return tolist(self)

    steps, ids = Steps(transfers), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    call = {"max_new_tokens": 10, "eos_token_id": None, "do_sample": True, "callbacks": [steps], **options}
    with monkeypatch.context() as patch, transfers:
        patch.setattr(torch.Tensor, "tolist", counted)
        model.generate(ids, **call)
    found = Counter(steps.counts[1:])
    return {rows: sorted({count for other, count in found if other == rows}) for rows, _ in found}


def test_a_token_reads_once_and_a_boundary_as_often_for_any_number_of_rows(make_model, monkeypatch):
    """With eager attention; for another one transformers looks at the padding once more in every trunk call."""
    model = make_model("llama", trained=True)
    model.trunk.set_attn_implementation("eager")
    for trained, options, boundary in (([], {}, 12), (["agreement"], {"agreement_threshold": 0.0}, 16)):
        model.config._adapter_config.trained_parts = trained
        found = [transfers_by_rows(model, monkeypatch, num_streams=streams, **options) for streams in (1, 3)]
        assert found == [{0: [1], 2: [boundary]}, {0: [1], 6: [boundary]}]
