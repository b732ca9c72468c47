"""Layers on packed rows: the padded batch's outputs and gradients, rows that do not meet, and what is refused."""

import copy

import pytest
import torch
from accuracy import rel_l2
from torch import nn

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv
from seqconv.layers.packing import unpadded
from seqconv.nested import pack, pad

D = 6
LAYERS = {
    "s4d": lambda **o: S4D(D, d_state=8, **o),
    "s4d-two-sided": lambda **o: S4D(D, d_state=8, heads=2, bidirectional=True, **o),
    "sgconv": lambda **o: SGConv(D, l_max=160, init_scale=1, **o),
    "long_conv": lambda **o: LongConv(D, l_max=70, kernel_dropout=0.0, **o),
    "long_conv-smooth": lambda **o: LongConv(D, l_max=70, kernel_dropout=0.0, smooth="time", **o),
    "hyena": lambda **o: Hyena(D, l_max=70, order=3, **o),
    "butterfly": lambda **o: ButterflyConv(D, l_max=70, kernel_dropout=0.0, **o),
}
LENGTHS = torch.tensor([20, 0, 70, 1, 33])


def packed_and_padded(dtype=torch.float64):
    x = torch.randn(int(LENGTHS.sum()), D, dtype=dtype)
    offsets = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)])
    return x, offsets, pad(x, offsets)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_a_pack_is_the_padded_batch(name):
    layer = LAYERS[name]().double()
    x, offsets, padded = packed_and_padded()
    leaf = x.clone().requires_grad_()
    y = layer(leaf, cu_seqlens=offsets)
    wanted, _ = pack(layer(padded, lengths=LENGTHS), LENGTHS)
    assert y.shape == x.shape and rel_l2(y, wanted) < 1e-11
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    padded.requires_grad_()
    again, _ = pack(layer(padded, lengths=LENGTHS), LENGTHS)
    theirs = torch.autograd.grad(again, [padded, *layer.parameters()], dy)
    assert rel_l2(ours[0], pack(theirs[0], LENGTHS)[0]) < 1e-10
    for (path, _), a, b in zip(layer.named_parameters(), ours[1:], theirs[1:], strict=True):
        assert rel_l2(a, b) < 1e-9, path


@pytest.mark.parametrize("name", LAYERS)
def test_rows_do_not_meet(name):
    layer = LAYERS[name]()
    x, offsets, _ = packed_and_padded(torch.float32)
    y = layer(x, cu_seqlens=offsets, max_seqlen=70)
    spoilt = x.clone()
    spoilt[20:90] = torch.nan
    other = layer(spoilt, cu_seqlens=offsets, max_seqlen=70)
    assert torch.equal(other[:20], y[:20]) and torch.equal(other[90:], y[90:])
    assert other[20:90].isnan().any()


@pytest.mark.parametrize("name", ["s4d", "s4d-two-sided", "sgconv"])
def test_rows_have_rates_of_their_own(name):
    layer = LAYERS[name]().double()
    x, offsets, padded = packed_and_padded()
    rate = torch.tensor([1.0, 0.5, 2.0, 1.0, 2.0])
    y = layer(x, cu_seqlens=offsets, rate=rate)
    dense = layer(padded, lengths=LENGTHS, rate=rate)
    for i in range(len(LENGTHS)):
        alone = layer(padded[i : i + 1], lengths=LENGTHS[i : i + 1], rate=rate[i].item())
        n = int(LENGTHS[i])
        torch.testing.assert_close(dense[i], alone[0])
        torch.testing.assert_close(y[offsets[i] : offsets[i + 1]], alone[0, :n])
    made = []
    layer.kernel.register_forward_hook(lambda *_: made.append(1))
    layer(x, cu_seqlens=offsets, rate=rate)
    assert len(made) == 3
    for wrong, text in (
        (rate[:4], r"rate must be \(batch=5,\), got \(4,\)"),
        (-rate, "rate must be positive and finite, got -"),
        (rate.clone().requires_grad_(), "rate must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=text):
            layer(x, cu_seqlens=offsets, rate=wrong)
    with pytest.raises(ValueError, match="its taps have no time scale"):
        LAYERS["long_conv"]().double()(x, cu_seqlens=offsets, rate=rate)


def test_dropout_of_whole_channels_is_drawn_for_each_row():
    layer = LongConv(D, l_max=70, kernel_dropout=0.0, dropout=0.5, tie_dropout=True)
    layer.linear = nn.Identity()
    layer.postact = None
    x, offsets, _ = packed_and_padded(torch.float32)
    zero = layer(x, cu_seqlens=offsets) == 0
    first, third = zero[:20], zero[20:90]
    assert (first == first[0]).all() and (third == third[0]).all() and zero.any() and not zero.all()


@pytest.mark.parametrize("name", ["s4d", "hyena"])
def test_compiled_with_the_longest_row_given(name):
    layer = LAYERS[name]().eval()
    x, offsets, _ = packed_and_padded(torch.float32)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = layer(x, cu_seqlens=offsets, max_seqlen=70)
        torch.testing.assert_close(compiled(x, cu_seqlens=offsets, max_seqlen=70), wanted)
    with pytest.raises(Exception, match="must be given inside of torch"):
        compiled(x, cu_seqlens=offsets)


@pytest.mark.parametrize("name", LAYERS)
def test_exported_once_for_all_packs(name):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS[name]().eval()

        def forward(self, x, offsets):
            return self.layer(x, cu_seqlens=offsets, max_seqlen=70)

    module, some = Module(), torch.export.Dim.DYNAMIC
    given = torch.randn(124, D), torch.tensor([0, 20, 20, 90, 91, 124])
    exported = torch.export.export(module, given, dynamic_shapes=({0: some}, {0: some}))
    given = torch.randn(73, D), torch.tensor([0, 70, 73])
    torch.testing.assert_close(exported.module()(*given), module(*given))


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_refused(name):
    layer = LAYERS[name]()
    x, offsets, padded = packed_and_padded(torch.float32)
    refused = [
        ((x,), {"cu_seqlens": offsets, "lengths": LENGTHS}, "lengths must be None with cu_seqlens"),
        ((x,), {"max_seqlen": 70}, "max_seqlen must be None without cu_seqlens, got 70"),
        ((padded,), {"cu_seqlens": offsets}, r"x must be \(total, d_model=6\), got \(5, 70, 6\)"),
        (
            (x[1:],),
            {"cu_seqlens": offsets},
            r"cu_seqlens\[5\] must be the number of steps, 123, got 124",
        ),
        (
            (x,),
            {"cu_seqlens": offsets, "max_seqlen": 60},
            "max_seqlen must be at least the length of every row",
        ),
    ]
    for args, options, text in refused:
        with pytest.raises(ValueError, match=f"^{type(layer).__name__}: {text}"):
            layer(*args, **options)


@pytest.mark.parametrize("name", ["s4d", "sgconv", "long_conv", "hyena"])
def test_prefill_takes_packs(name):
    layer = LAYERS[name]().double().eval()
    x, offsets, padded = packed_and_padded()
    with torch.no_grad():
        state = layer.init_state(len(LENGTHS))
        y, packed = layer.prefill(x, state, cu_seqlens=offsets)
        wanted, other = layer.prefill(padded, state, lengths=LENGTHS)
        assert rel_l2(y, pack(wanted, LENGTHS)[0]) < 1e-12
        now = torch.randn(len(LENGTHS), D, dtype=torch.float64)
        assert rel_l2(layer.step(now, packed)[0], layer.step(now, other)[0]) < 1e-12


def test_prefill_pads_rows_of_similar_lengths_together():
    """One long prompt among many short ones costs time and memory for itself alone."""
    layer = S4D(D).eval()
    lengths, sizes = [300, 1, 2, 0, 1, 3], []
    x, offsets = torch.randn(sum(lengths), D), torch.tensor([0, *lengths]).cumsum(0)
    state = layer.init_state(len(lengths))

    def watched(rows, state, *, lengths, rate):
        sizes.append(rows.shape[:2].numel())
        return type(layer).prefill(layer, rows, state, lengths=lengths, rate=rate)

    one = layer.init_state(len(lengths))
    layer.prefill = watched
    y, after = type(layer).prefill(layer, x, state, cu_seqlens=offsets)
    del layer.prefill
    assert sum(sizes) < 2 * sum(lengths) and len(sizes) > 2
    padded, row_lengths = pad(x, offsets)
    wanted, expected = layer.prefill(padded, one, lengths=row_lengths)
    torch.testing.assert_close(y, unpadded(wanted, row_lengths), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(after.leaves(), expected.leaves(), strict=True):
        torch.testing.assert_close(ours, theirs)
