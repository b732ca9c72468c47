"""The ways the CPU kernels go: long rows, blocks, shared rows, panels of channels, parts of the batch, every radix."""

import pytest
import torch
from accuracy import assert_accurate, rel_l2
from cases import Case, double, fftconv, oracle

from seqconv import reference

WAYS = {
    # Blocks: a kernel much shorter than the row.
    "blocks": Case(length=3000, taps=100, skip="h"),
    "blocks, two-sided": Case(length=3001, taps=90, taps_rev=61, skip="h", channels=2),
    "blocks, reversed only": Case(length=2000, taps=0, taps_rev=70, channels=2),
    # All of a block's points are taps of the future, and skip comes on top.
    "blocks, no room for tap 0": Case(length=4096, taps=0, taps_rev=256, skip="h", channels=2),
    "blocks, everything": Case(
        length=2050,
        taps=64,
        taps_rev=40,
        heads=2,
        skip="ch",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
        channels=2,
    ),
    "blocks, per sample": Case(length=1500, taps=50, heads=2, per_sample=True, skip="h", batch=3),
    "blocks, blh": Case(length=1999, taps=80, taps_rev=9, layout="blh", channels=21, skip="h"),
    "blocks, half": Case(length=1500, taps=77, dtype=torch.float16, skip="h", post_gate=True),
    # Rows long enough to be shared among threads, then to have compact tables, then radix eight.
    "shared": Case(length=40_000, taps=40_000, taps_rev=1000, channels=1, skip="h"),
    "shared, gated": Case(
        length=33_333,
        taps=33_333,
        heads=2,
        pre_gate=True,
        post_gate=True,
        activation="silu",
        skip="h",
        channels=1,
        batch=1,
    ),
    "shared, blh": Case(length=33_000, taps=33_000, layout="blh", channels=3, skip="h", batch=1),
    "compact": Case(length=300_000, taps=300_000, channels=1, skip="h"),
    "large": Case(length=530_000, taps=530_000, channels=2, skip="h", batch=1),
    "large, bfloat16": Case(
        length=524_288, taps=524_288, channels=1, skip="h", batch=1, dtype=torch.bfloat16
    ),
    # Few channels: the batch in parts, whose sums are added afterwards.
    "parts": Case(batch=11, length=500, taps=500, channels=2, skip="h", taps_rev=20),
    "parts, direct": Case(batch=9, length=500, taps=7, heads=2, channels=1, skip="ch"),
    "parts, per sample": Case(
        batch=6, length=300, taps=300, heads=2, per_sample=True, channels=1, skip="h"
    ),
    # The same with rows that could be shared: what a few threads do part by part, many do together.
    "long parts": Case(batch=5, length=33_000, taps=33_000, channels=1, skip="h", taps_rev=70),
    "long parts, gated": Case(
        batch=4,
        length=32_769,
        taps=32_769,
        channels=1,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
    ),
    "long parts, per sample": Case(
        batch=4, length=33_000, taps=33_000, per_sample=True, channels=1, skip="h"
    ),
    "too many heads for parts": Case(
        batch=4, length=33_000, taps=33_000, heads=5, channels=1, skip="h"
    ),
    # Panels of neighbouring channels, whole groups of four and rests.
    "panels": Case(layout="blh", channels=16, length=257, taps=257, skip="h", taps_rev=3),
    "panels, rest": Case(layout="blh", channels=7, length=130, taps=130, heads=2, skip="ch"),
    "panels, gates": Case(
        layout="blh",
        channels=18,
        length=1001,
        taps=1001,
        pre_gate=True,
        post_gate=True,
        activation="gelu",
        skip="h",
    ),
    "panels, double": Case(
        layout="blh", channels=19, length=100, taps=100, dtype=torch.float64, post_gate=True
    ),
    "panels, half": Case(layout="blh", channels=9, length=999, taps=999, dtype=torch.bfloat16),
    # Two channels that are all there are, and the same past the caches, aligned and not.
    "pairs": Case(
        layout="blh",
        channels=2,
        length=1003,
        taps=1003,
        taps_rev=7,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="silu",
    ),
    "pairs, heads": Case(layout="blh", channels=2, length=517, taps=517, heads=3, skip="ch"),
    "pairs, double": Case(
        layout="blh", channels=2, length=140, taps=140, dtype=torch.float64, post_gate=True
    ),
    "pairs, half": Case(layout="blh", channels=2, length=999, taps=999, dtype=torch.bfloat16),
    "pairs, streamed": Case(
        layout="blh", channels=2, length=350_001, taps=350_001, batch=3, skip="h"
    ),
    # Short rows of many channels, taken a few channels at a time.
    "groups": Case(channels=35, length=257, taps=257, taps_rev=3, skip="h", batch=3),
    "groups, heads": Case(channels=33, length=130, taps=130, heads=2, skip="ch", pre_gate=True),
    "groups, gates": Case(
        channels=41,
        length=256,
        taps=256,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="silu",
        batch=1,
    ),
    "groups, per sample": Case(channels=34, length=99, taps=99, per_sample=True, skip="h"),
    "groups, half": Case(channels=40, length=512, taps=512, dtype=torch.float16, taps_rev=9),
    # Results of more than 8 MiB, rows at every alignment: stores past the caches.
    "streamed, gated": Case(
        length=25_601,
        taps=25_601,
        channels=83,
        batch=1,
        skip="h",
        pre_gate=True,
        post_gate=True,
    ),
    "streamed, heads": Case(
        length=1031, taps=1031, channels=1018, batch=1, heads=2, skip="ch", activation="relu"
    ),
    "streamed, plain heads": Case(length=1031, taps=1031, channels=1018, batch=1, heads=2),
    "streamed, shared": Case(
        length=700_001, taps=700_001, channels=3, batch=1, skip="h", post_gate=True
    ),
    "streamed, double": Case(
        length=1025, taps=20, channels=1030, batch=1, dtype=torch.float64, pre_gate=True
    ),
    # float64 long enough for every stage.
    "double": Case(length=70_000, taps=70_000, channels=1, dtype=torch.float64, taps_rev=5),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_accurate(way, isa):
    case = WAYS[way]
    tensors = case.tensors()
    y, grads, dy = case.with_gradients(fftconv, tensors)
    exact, definition = oracle(case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    assert_accurate(y, y_fft, y64)
    for name, grad in grads.items():
        assert_accurate(grad, grads_fft[name], grads64[name], what=f"gradient of {name}")


@pytest.mark.parametrize("way", WAYS)
def test_the_number_of_threads_changes_no_bit(way):
    case, before = WAYS[way], torch.get_num_threads()
    tensors, results = case.tensors(), []
    dy = torch.randn_like(case.run(fftconv, tensors))
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y, grads, _ = case.with_gradients(fftconv, tensors, dy)
            results.append([y, *grads.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Transform lengths that together contain every radix in the first pass and in a stage.
RADIX_LENGTHS = (
    48,
    56,
    80,
    96,
    112,
    160,
    192,
    224,
    320,
    400,
    448,
    480,
    560,
    1000,
    1120,
    1792,
    2000,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_radix(isa, dtype):
    for length in RADIX_LENGTHS:
        case = Case(length=length, taps=length, taps_rev=length - 1, channels=1, dtype=dtype)
        tensors = case.tensors()
        exact, definition = oracle(case)
        wanted = exact.run(definition, double(tensors))
        assert rel_l2(case.run(fftconv, tensors), wanted) < (
            4e-7 if dtype == torch.float32 else 1e-14
        )


@pytest.mark.parametrize("length", [256, 4096, 65_536, 1 << 20])
def test_error_stays_below_the_bound(isa, length):
    """Relative L2 error 3e-7 up to 65,536 steps, 4.5e-7 beyond."""
    case = Case(length=length, taps=length, channels=1, batch=1, skip="h")
    tensors = case.tensors()
    wanted = reference.fftconv_fft(*(tensors[n].double() for n in ("u", "k", "skip")))
    assert rel_l2(case.run(fftconv, tensors), wanted) <= (3e-7 if length <= 65_536 else 4.5e-7)


def test_no_tap_reads_what_the_definition_does_not():
    """A direct sum without tap 0 and skip does not touch x[t], not even to multiply it by zero."""
    u = torch.tensor([[[1.0, 2.0, torch.nan, 4.0, 5.0]]])
    y = fftconv(u, torch.zeros(1, 0), k_rev=torch.tensor([[10.0, 1.0]]))
    assert y[0, 0, 2] == 45 and y[0, 0, 3:].tolist() == [50.0, 0.0]
    assert not fftconv(u, torch.zeros(1, 0)).any()


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A signal (batch, length, channels) in the memory that the layout has."""
    return (t if layout == "blh" else t.movedim(1, -1).contiguous()).clone()


@pytest.mark.parametrize("channels", [64, 72, 40])
def test_panels_of_large_results_have_the_bits_of_rows(channels, isa):
    """Lines that go past the caches where the channels fill them, 16 times and channels at a time and what is left."""
    length = 2100
    batch = (8 << 20) // (4 * length * channels) + 1
    u, dy = torch.randn(2, batch, length, channels)
    k, skip = torch.randn(channels, length) / 40, torch.randn(channels)
    found = []
    for layout in ("blh", "bhl"):
        x, grad = laid_out(u, layout).requires_grad_(), laid_out(dy, layout)
        taps = k.clone().requires_grad_()
        y = fftconv(x, taps, skip, layout=layout, activation="gelu")
        dx, dk = torch.autograd.grad(y, [x, taps], grad)
        rows = (y.detach(), dx)
        found.append([*(t if layout == "blh" else t.movedim(-1, 1) for t in rows), dk])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "length", "taps", "taps_rev"),
    [
        (16, 64, 3, 0),
        (64, 333, 4, 0),
        (20, 130, 1, 7),
        (150, 97, 32, 0),
        (40, 70, 16, 15),
        (16, 70, 0, 3),
    ],
)
@pytest.mark.parametrize("with_skip", [True, False])
def test_short_kernels_on_lines_have_the_bits_of_rows(
    channels, length, taps, taps_rev, with_skip, dtype, isa
):
    """Lines of channels, whole and in part, blocks of times and what is left of them."""
    u, dy = torch.randn(2, 3, length, channels).to(dtype)
    k, bias = torch.randn(channels, taps), torch.randn(channels)
    k_rev = torch.randn(channels, taps_rev) if taps_rev else None
    found = []
    for layout in ("blh", "bhl"):
        x, grad = (laid_out(t, layout) for t in (u, dy))
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, k, k_rev, bias)]
        x, taps_of, rev_of, bias_of = leaves
        skip = bias_of if with_skip else None
        y = fftconv(x, taps_of, skip, bias=bias_of, k_rev=rev_of, layout=layout)
        dx, *sums = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
        rows = (y.detach(), dx)
        found.append(([t if layout == "blh" else t.movedim(-1, 1) for t in rows], sums))
    (lines, sums), (rows, row_sums) = found
    assert all(map(torch.equal, lines, rows))
    for one, other in zip(sums, row_sums, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * length**0.5)


def test_a_short_kernel_on_lines_reads_nothing_beyond_its_tensors():
    """Lines that end a tensor, whose last block of times is not a multiple of those summed together."""
    whole = torch.full((1, 70, 64), torch.nan)
    whole[:, 5:66, 16:48] = torch.randn(1, 61, 32)
    u, k = whole[:, 5:66, 16:48].detach().requires_grad_(), torch.randn(32, 5, requires_grad=True)
    y = fftconv(u, k, layout="blh")
    dy = torch.full((1, 70, 32), torch.nan)
    dy[:, 4:65] = torch.randn(1, 61, 32)
    grads = torch.autograd.grad(y, [u, k], dy[:, 4:65])
    assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_gates_in_panels_have_the_bits_of_rows(activation, isa):
    """The gradient of a gate takes the gate's place in its panel."""
    length, channels = 700, 40
    u, pre_gate, post_gate, dy = torch.randn(4, 2, length, channels)
    k = torch.randn(channels, length) / 20
    found = []
    for layout in ("blh", "bhl"):
        signals = [laid_out(t, layout).requires_grad_() for t in (u, pre_gate, post_gate)]
        grad = laid_out(dy, layout)
        gates = dict(zip(("pre_gate", "post_gate"), signals[1:], strict=True))
        y = fftconv(signals[0], k, layout=layout, activation=activation, **gates)
        rows = [y.detach(), *torch.autograd.grad(y, signals, grad)]
        found.append([t if layout == "blh" else t.movedim(-1, 1) for t in rows])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("alone", ["u", "k", "skip", "bias"])
@pytest.mark.parametrize("length", [1, 2, 67])
def test_one_gradient_of_a_short_kernel_on_lines(alone, length):
    tensors = {
        "u": torch.randn(2, length, 17),
        "k": torch.randn(17, 3),
        "skip": torch.randn(17),
        "bias": torch.randn(17),
    }
    whole = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    one = tensors | {alone: tensors[alone].clone().requires_grad_()}
    dy = torch.randn(2, length, 17)
    grads = torch.autograd.grad(fftconv(**whole, layout="blh"), whole.values(), dy)
    (grad,) = torch.autograd.grad(fftconv(**one, layout="blh"), one[alone], dy)
    assert torch.equal(grad, dict(zip(whole, grads, strict=True))[alone]) and grad.any()


def test_short_kernels_on_lines_of_no_samples():
    u, k = torch.randn(0, 9, 16, requires_grad=True), torch.randn(16, 3, requires_grad=True)
    y = fftconv(u, k, layout="blh")
    du, dk = torch.autograd.grad(y.sum(), [u, k])
    assert y.shape == du.shape == u.shape and not dk.any()
