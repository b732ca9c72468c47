"""Layers on sequences in pieces: each piece with the history that the last one returned, against the whole."""

import pytest
import torch
from torch import Tensor

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv

D, F64 = 4, torch.float64
LAYERS = {
    "S4D": lambda: S4D(D),
    "S4D heads, no GLU": lambda: S4D(D, heads=2, postact=None),
    "SGConv": lambda: SGConv(D, l_max=60),
    "LongConv": lambda: LongConv(D, l_max=60),
    "Hyena": lambda: Hyena(D, l_max=60),
    "Hyena order 3": lambda: Hyena(D, l_max=60, order=3),
}
PACKED = [name for name in LAYERS if "Hyena" not in name]
# Taps are the same for all lengths from l_max on; a shorter first piece would have others.
CUTS = [80, 81, 150]
pytestmark = pytest.mark.filterwarnings("ignore:.*taps .l_max.*")


def layer_of(name: str):
    torch.manual_seed(0)
    return LAYERS[name]().to(F64).eval()


def in_pieces(layer, x: Tensor, cuts: list[int], **options):
    found, kept = [], None
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, kept = layer(x[:, begin:end], history=kept, return_history=True, **options)
        found.append(y)
    return torch.cat(found, 1), kept


@pytest.mark.parametrize("name", LAYERS)
def test_pieces_are_the_whole(name):
    layer = layer_of(name)
    x = torch.randn(2, 170, D, dtype=F64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    whole = layer(x)
    dy = torch.randn_like(whole)
    y, kept = in_pieces(layer, x, CUTS)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(whole, leaves, dy, allow_unused=True)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    for ours, theirs in zip(grads, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert torch.equal(kept, x[:, 170 - kept.shape[1] :])
    assert kept.shape[1] == (170 if "S4D" in name else kept.shape[1]) and kept.shape[1] >= 59


@pytest.mark.parametrize("name", [name for name in LAYERS if "S4D" not in name])
def test_no_more_is_kept_than_taps_reach(name):
    """What lies further back changes no later output; one step less would."""
    layer = layer_of(name)
    x = torch.randn(1, 400, D, dtype=F64)
    y, kept = in_pieces(layer, x, [300])
    assert kept.shape[1] < 200
    again, _ = layer(x[:, 300:], history=x[:, 300 - kept.shape[1] : 300], return_history=True)
    torch.testing.assert_close(again, y[:, 300:], rtol=1e-10, atol=1e-10)
    _, before = in_pieces(layer, x[:, :300], [100])
    assert torch.equal(before, x[:, 300 - kept.shape[1] : 300])
    assert before.untyped_storage().nbytes() == before.nbytes


def cut(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("name", PACKED)
def test_documents_go_on_in_the_next_pack(name):
    layer = layer_of(name)
    first, second = [90, 7, 0, 61], [5, 64, 3, 0]
    lengths = [a + b for a, b in zip(first, second, strict=True)]
    documents = [torch.randn(n, D, dtype=F64) for n in lengths]
    whole = layer(torch.cat(documents), cu_seqlens=cut(lengths)).split(lengths)
    starts = [d[:n] for d, n in zip(documents, first, strict=True)]
    ends = [d[n:] for d, n in zip(documents, first, strict=True)]
    y1, kept = layer(torch.cat(starts), cu_seqlens=cut(first), return_history=True)
    y2, _ = layer(torch.cat(ends), cu_seqlens=cut(second), history=kept, return_history=True)
    for a, b, w in zip(y1.split(first), y2.split(second), whole, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), w, rtol=1e-10, atol=1e-10)


def test_rates_of_rows_hold_for_their_history():
    layer = layer_of("S4D")
    x, rate = torch.randn(3, 50, D, dtype=F64), torch.tensor([1.0, 0.5, 1.0])
    y, _ = in_pieces(layer, x, [20], rate=rate)
    torch.testing.assert_close(y, layer(x, rate=rate), rtol=1e-10, atol=1e-10)


X = torch.randn(2, 10, D, dtype=F64)
REFUSED = {
    "two-sided": (
        lambda: S4D(D, bidirectional=True).double()(X, return_history=True),
        "S4D: history must be None and return_history False, because its outputs see later inputs",
    ),
    "butterfly": (
        lambda: ButterflyConv(D, l_max=20).double()(X, history=X),
        "ButterflyConv: history must be None and return_history False",
    ),
    "a mask": (
        lambda: layer_of("S4D")(X, torch.zeros(2, 10).bool(), history=X),
        "S4D: mask must be None with a history, got a Tensor",
    ),
    "lengths": (
        lambda: layer_of("Hyena")(X, lengths=torch.tensor([1, 2]), history=X),
        "Hyena: lengths must be None with a history, got a Tensor",
    ),
    "other samples": (
        lambda: layer_of("SGConv")(X, history=X[:1]),
        r"SGConv: history must be \(batch=2, steps, d_model=4\), got \(1, 10, 4\)",
    ),
    "a pack of Hyena": (
        lambda: layer_of("Hyena")(X[0], cu_seqlens=cut([4, 6]), return_history=True),
        "Hyena: history must be None and return_history False with cu_seqlens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_compiled_once_for_histories_of_all_lengths():
    layer = layer_of("SGConv").float()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for before, lengths in ((7, [4, 9]), (8, [3, 0, 20]), (30, [1, 1, 1, 14])):
        x, history = torch.randn(sum(lengths), D), torch.randn(len(lengths), before, D)
        options = {"cu_seqlens": cut(lengths), "max_seqlen": 20, "return_history": True}
        with torch._dynamo.config.patch(error_on_recompile=before > 7):
            ours = compiled(x, history=history, **options)
        torch.testing.assert_close(ours, layer(x, history=history, **options))
