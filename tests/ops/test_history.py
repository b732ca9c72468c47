"""A sequence given in pieces, each with the history that the last one returned, against the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqconv import fftconv, use_backend
from seqconv.ops import history as histories

F64 = torch.float64
BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.1}


def signals(batch, length, layout="bhl", heads=None, gates="", dtype=F64, channels=3) -> dict:
    def signal(*inner):
        return torch.randn(batch, *inner, channels, length, dtype=dtype)

    found = {"u": signal()}
    if "pre" in gates:
        found["pre_gate"] = signal()
    if "post" in gates:
        found["post_gate"] = signal(*([heads] if heads else []))
    return {n: t.movedim(-1, 1) if layout == "blh" else t for n, t in found.items()}


def kernels(taps, heads=None, dtype=F64, channels=3) -> dict:
    several, wide = [heads] if heads else [], torch.promote_types(dtype, torch.float32)
    found = {"k": torch.randn(*several, channels, taps, dtype=wide) / max(1, taps) ** 0.5}
    found["skip"] = torch.randn(channels, dtype=wide)
    found["bias"] = torch.randn(*several, channels, dtype=wide)
    return found


def in_pieces(tensors: dict, given: dict, cuts: list[int], layout="bhl", **options):
    """y, put together, and the last history."""
    time = -1 if layout == "bhl" else 1
    length = tensors["u"].shape[time]
    ends, found, kept = [*cuts, length], [], None
    for begin, end in zip([0, *cuts], ends, strict=True):
        piece = {n: t.narrow(time, begin, end - begin) for n, t in tensors.items()}
        options |= {"layout": layout, "history": kept, "return_history": True}
        y, kept = fftconv(**piece, **given, **options)
        found.append(y)
    return torch.cat(found, time), kept


@given(
    st.integers(0, 90),
    st.lists(st.integers(0, 90), max_size=4),
    st.sampled_from([0, 1, 2, 4, 33, 60, 120]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["", "pre", "post", "pre post"]),
    st.sampled_from(["bhl", "blh"]),
    st.sampled_from([*BOUNDS]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_pieces_are_the_whole(length, cuts, taps, heads, gates, layout, dtype, exact):
    cuts = sorted(min(cut, length) for cut in cuts)
    t, k = signals(2, length, layout, heads, gates, dtype), kernels(taps, heads, dtype)
    options = {"activation": "gelu", "exact_causal": exact}
    whole = fftconv(**t, **k, layout=layout, **options)
    y, kept = in_pieces(t, k, cuts, layout, **options)
    assert y.dtype == dtype and y.shape == whole.shape
    torch.testing.assert_close(y, whole, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    x = t["u"] * t.get("pre_gate", 1)
    x = x if layout == "bhl" else x.movedim(1, -1)
    x = torch.nn.functional.pad(x, (max(taps - 1, 0), 0))[..., length:]
    assert torch.equal(kept if layout == "bhl" else kept.movedim(1, -1), x)


def test_gradients_pass_from_piece_to_piece():
    t, k = signals(2, 70, gates="pre post"), kernels(50)
    leaves = {n: x.requires_grad_() for n, x in (t | k).items()}
    whole = fftconv(**t, **k, activation="silu")
    dy = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, [*leaves.values()], dy)
    y, _ = in_pieces(t, k, [3, 40], activation="silu")
    grads = torch.autograd.grad(y, [*leaves.values()], dy)
    for name, ours, theirs in zip(leaves, grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_second_derivatives():
    k, before = torch.randn(2, 4, dtype=F64), torch.randn(1, 2, 3, dtype=F64)
    u = torch.randn(1, 2, 5, dtype=F64)
    inputs = [x.requires_grad_() for x in (u, k, before)]

    def call(u, k, before):
        return fftconv(u, k, history=before, return_history=True, activation="gelu")

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def cut(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def joined(rows: list[Tensor], layout: str) -> Tensor:
    packed = torch.cat(rows, -1)
    return packed.movedim(-1, 0) if layout == "blh" else packed


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6),
    st.sampled_from([0, 1, 4, 50]),
    st.sampled_from([None, 2]),
    st.sampled_from(["bhl", "blh"]),
    st.sampled_from(["auto", "reference"]),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_documents_go_on_in_the_next_pack(lengths, taps, heads, layout, backend):
    first, second = zip(*lengths, strict=True)
    k = kernels(taps, heads)
    documents = [torch.randn(3, a + b, dtype=F64) for a, b in lengths]
    gates = [torch.randn(3, a + b, dtype=F64) for a, b in lengths]
    options = {"layout": layout, "activation": "gelu", "return_history": True}
    found, kept = [], None
    with use_backend(backend):
        for sizes in (first, second):
            begins = [0] * len(first) if sizes is first else first
            parts = [slice(b, b + n) for b, n in zip(begins, sizes, strict=True)]
            u = joined([d[:, p] for d, p in zip(documents, parts, strict=True)], layout)
            gate = joined([g[:, p] for g, p in zip(gates, parts, strict=True)], layout)
            rows = {"cu_seqlens": cut(sizes), "max_seqlen": max(sizes)}
            y, kept = fftconv(u, **k, pre_gate=gate, history=kept, **rows, **options)
            y = y.movedim(0, -1) if layout == "blh" else y
            found.append(y.split(sizes, -1))
    kept = kept.movedim(1, -1) if layout == "blh" else kept
    for i, (document, gate) in enumerate(zip(documents, gates, strict=True)):
        alone = fftconv(document[None], **k, pre_gate=gate[None], activation="gelu")[0]
        ours = torch.cat([found[0][i], found[1][i]], -1)
        torch.testing.assert_close(ours, alone, rtol=1e-11, atol=1e-11)
        x = torch.nn.functional.pad(document * gate, (max(taps - 1, 0), 0))
        assert torch.equal(kept[i], x[:, document.shape[1] :])


def test_compiled():
    k = torch.randn(3, 9)

    def step(u, before, offsets):
        rows = {"cu_seqlens": offsets, "max_seqlen": 40}
        return fftconv(u, k, history=before, return_history=True, **rows)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 30, 0, 1, 2], [8, 3], [9, 0, 1, 7]):
        given = torch.randn(3, sum(lengths)), torch.randn(len(lengths), 3, 8), cut(lengths)
        with torch._dynamo.config.patch(error_on_recompile=lengths[0] > 5):
            ours = compiled(*given)
        torch.testing.assert_close(ours, step(*given))
    with pytest.raises(RuntimeError, match="cu_seqlens must be 0, then not decrease"):
        compiled(torch.randn(3, 11), torch.randn(2, 3, 8), torch.tensor([0, 12, 11]))


@pytest.mark.parametrize("packed", [False, True])
def test_gates_of_another_dtype_under_autocast(packed):
    u, gate = torch.randn(1, 3, 10).bfloat16(), torch.randn(1, 3, 10)
    history, rows = torch.randn(1, 3, 4), {}
    if packed:
        u, gate, rows = u[0], gate[0], {"cu_seqlens": cut([10])}
    with torch.autocast("cpu", torch.bfloat16):
        options = {"pre_gate": gate, "history": history, "return_history": True}
        y, kept = fftconv(u, K, **options, **rows)
    assert y.dtype == kept.dtype == torch.bfloat16
    torch.testing.assert_close(kept.squeeze(0), (u * gate.bfloat16()).squeeze(0)[..., 6:])


@pytest.mark.parametrize("history", [None, torch.empty(2, 3, 4, device="meta")])
def test_shapes_without_values(history):
    u, k = torch.empty(3, 10, device="meta"), torch.empty(3, 5, device="meta")
    for offsets in (cut([4, 6]), cut([4, 6]).to("meta")):
        given = {"pre_gate": u, "history": history, "return_history": True}
        y, kept = fftconv(u, k, cu_seqlens=offsets, **given)
        assert y.is_meta and y.shape == (3, 10) and kept.is_meta and kept.shape == (2, 3, 4)


def test_steps_in_front_may_be_more_than_int32_counts():
    rows = histories.lengthened("fftconv", cut([4, 6]).int(), 10, 5, torch.device("cpu"))
    assert rows.cu_seqlens.dtype == torch.int64


U, K = torch.randn(2, 3, 10), torch.randn(3, 5)
REFUSED = {
    "too few steps": (
        {"history": torch.randn(2, 3, 3)},
        ValueError,
        r"history must be \(batch=2, channels=3, K - 1=4\), got \(2, 3, 3\)",
    ),
    "other dtype": (
        {"history": torch.randn(2, 3, 4).double()},
        TypeError,
        "history must be float32, got float64",
    ),
    "circular": ({"return_history": True, "mode": "circular"}, ValueError, "in circular mode"),
    "no flag": ({"return_history": 1}, ValueError, "return_history must be True or False, got 1"),
    "other rows": (
        {"u": U[0], "cu_seqlens": cut([4, 6]), "history": torch.randn(3, 3, 4)},
        ValueError,
        r"history must be \(rows=2, channels=3, K - 1=4\), got \(3, 3, 4\)",
    ),
    "steps first": (
        {"u": U[0].mT, "layout": "blh", "cu_seqlens": cut([4, 6]), "history": torch.randn(2, 3, 4)},
        ValueError,
        r"history must be \(rows=2, K - 1=4, channels=3\), got \(2, 3, 4\)",
    ),
    "longer rows": (
        {"u": U[0], "cu_seqlens": cut([4, 6]), "history": torch.randn(2, 3, 4), "max_seqlen": 5},
        ValueError,
        "max_seqlen must be at least the length of every row, got 5 and 6 steps in row 1",
    ),
    "an offset that decreases by less than a history": (
        {
            "u": U[0],
            "cu_seqlens": torch.tensor([0, 6, 5, 10]),
            "history": torch.randn(3, 3, 4),
        },
        ValueError,
        r"cu_seqlens\[2\] must be >= cu_seqlens\[1\]=6, got 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    given, error, text = REFUSED[name]
    with pytest.raises(error, match=f"fftconv: .*{text}"):
        fftconv(**({"u": U, "k": K} | given))


def _late(call, inputs, history, layout):
    return call(inputs), histories.continued(call, inputs, history, layout)[1]


def _shifted(call, inputs, history, layout):
    y, kept = histories.continued(call, inputs, history, layout)
    return y, kept.roll(1, -1)


@pytest.mark.parametrize("mistake", [_late, _shifted])
def test_mistakes_are_noticed(mistake, monkeypatch):
    monkeypatch.setattr("seqconv.ops.fftconv.continued", mistake)
    t, k = signals(2, 70), kernels(9)
    y, _ = in_pieces(t, k, [30])
    assert (y - fftconv(**t, **k)).abs().max() > 1e-2
