"""Packs from and to padded batches, position ids, numbers of rows, and jagged tensors of torch.nested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqconv import fftconv, nested


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_there_and_back(lengths, more):
    lengths = torch.tensor(lengths)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x = torch.randn(int(lengths.sum()), 2, 3)
    padded, found = nested.pad(x, offsets, int(lengths.max()) + more, value=7.0)
    assert torch.equal(found, lengths) and (padded.shape[1] == lengths.max() + more)
    assert (padded == 7.0).sum() == 6 * (padded.shape[0] * padded.shape[1] - len(x))
    for again, cut in (
        nested.pack(padded, lengths),
        nested.pack(padded, mask=torch.arange(padded.shape[1]) >= lengths.unsqueeze(1)),
    ):
        assert torch.equal(again, x) and torch.equal(cut, offsets)
    ids = nested.position_ids(offsets)
    assert ids.tolist() == [i for n in lengths.tolist() for i in range(n)]
    filled = torch.cat(
        [offsets[:1], offsets[1:][lengths > 0]]
    )  # Rows without steps leave no trace.
    assert torch.equal(nested.rows_from_position_ids(ids), filled)
    rows = nested.seq_idx(offsets)
    assert rows.tolist() == [[i for i, n in enumerate(lengths.tolist()) for _ in range(n)]]
    assert torch.equal(nested.rows_from_seq_idx(rows), filled)


def test_jagged_tensors_are_packs():
    rows = [torch.randn(n, 3) for n in (4, 1, 7)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    k = torch.randn(3, 5)
    y = fftconv(jagged.values(), k, cu_seqlens=jagged.offsets(), layout="blh")
    whole = torch.cat([fftconv(x.unsqueeze(0), k, layout="blh").squeeze(0) for x in rows])
    torch.testing.assert_close(y, whole)


def test_what_is_refused():
    x, offsets = torch.randn(5, 2), torch.tensor([0, 2, 5])
    refused = [
        (lambda: nested.pack(torch.randn(2, 3)), "lengths or mask must be given"),
        (
            lambda: nested.pack(torch.randn(2, 3), torch.tensor([1, 4])),
            "lengths must be between 0 and length=3",
        ),
        (
            lambda: nested.pad(x, offsets, 2),
            "pad: length must be at least the length of every row, got 2 and 3 steps in row 1",
        ),
        (
            lambda: nested.pad(x[1:], offsets),
            r"pad: cu_seqlens\[2\] must be the number of steps, 4, got 5",
        ),
        (
            lambda: nested.position_ids(torch.tensor([1, 2])),
            r"position_ids: cu_seqlens\[0\] must be 0, got 1",
        ),
        (
            lambda: nested.seq_idx(torch.tensor([0, 2, 1])),
            r"seq_idx: cu_seqlens\[2\] must be >= cu_seqlens\[1\]=2, got 1",
        ),
        (lambda: nested.rows_from_position_ids(torch.tensor([1, 2])), "must begin with 0"),
        (lambda: nested.rows_from_position_ids(torch.tensor([0, 2])), "count up from every 0"),
        (lambda: nested.rows_from_seq_idx(torch.zeros(2, 3, dtype=torch.int32)), r"got \(2, 3\)"),
    ]
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()


def test_position_ids_with_an_axis_of_one_sample():
    ids = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert nested.rows_from_position_ids(ids).tolist() == [0, 3, 4, 6]


def test_pad_in_one_graph_for_all_packs():
    compiled = torch.compile(
        lambda x, offsets: nested.pad(x, offsets, 9), dynamic=True, backend="aot_eager"
    )
    for offsets in ([0, 2, 5], [0, 3, 3, 10]):
        given = torch.randn(offsets[-1], 6), torch.tensor(offsets)
        with torch._dynamo.config.patch(error_on_recompile=len(offsets) > 3):
            ours = compiled(*given)
        torch.testing.assert_close(ours, nested.pad(*given, 9))
    with pytest.raises(RuntimeError, match="pad: cu_seqlens must be 0, then not decrease"):
        compiled(torch.randn(5, 6), torch.tensor([0, 2, 6]))
