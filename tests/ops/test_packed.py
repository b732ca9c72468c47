"""Packed rows: each as if it stood alone, in every bit; gradients, bad offsets, and mistakes."""

import pytest
import torch
from accuracy import rel_l2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqconv import fftconv, reference, use_backend
from seqconv.backends import cpu

F64 = torch.float64
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
BACKENDS = [pytest.param("auto", id="kernels"), "reference"]


def cut(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tensors(
    lengths,
    channels=3,
    K=40,
    heads=None,
    per_row=False,
    K_rev=None,
    gates="",
    skip=True,
    bias=True,
    dtype=F64,
):
    total, rows = sum(lengths), len(lengths)
    lead = (rows, heads or 1) if per_row else (heads,) if heads else ()
    out = (*lead[-1:], channels, total) if lead else (channels, total)
    kernel = torch.promote_types(dtype, torch.float32)
    found = {"u": torch.randn(channels, total, dtype=dtype)}
    found["k"] = torch.randn(*lead, channels, K, dtype=kernel)
    if skip:
        found["skip"] = torch.randn(*(lead[-1:] if heads else ()), channels, dtype=kernel)
    if bias:
        found["bias"] = torch.randn(*(lead[-1:] if heads else ()), channels, dtype=kernel)
    if K_rev is not None:
        found["k_rev"] = torch.randn(*lead, channels, K_rev, dtype=kernel)
    if "pre" in gates:
        found["pre_gate"] = torch.randn(channels, total, dtype=dtype)
    if "post" in gates:
        found["post_gate"] = torch.randn(*out, dtype=dtype)
    return found


def run(t: dict, lengths, **options) -> Tensor:
    return fftconv(**t, cu_seqlens=cut(lengths), **options)


def row_of(t: dict, lengths, i: int) -> dict:
    begin = sum(lengths[:i])
    own = {}
    for name, x in t.items():
        if name in ("u", "pre_gate", "post_gate"):
            x = x[..., begin : begin + lengths[i]].unsqueeze(0)
        elif name in ("k", "k_rev") and x.dim() == 4:
            x = x[i : i + 1]
        own[name] = x
    return own


CASES = [
    ({"lengths": [5, 0, 40, 1, 300, 7, 64, 65]}, {}),
    (
        {"lengths": [5, 0, 40, 1, 300, 7, 64, 65], "K": 500, "K_rev": 20, "gates": "pre post"},
        {"activation": "gelu"},
    ),
    ({"lengths": [90, 33, 90, 2], "heads": 2, "K": 64, "gates": "post"}, {"activation": "silu"}),
    ({"lengths": [90, 33, 90, 0, 2], "heads": 2, "per_row": True, "K": 64, "K_rev": 70}, {}),
    ({"lengths": [700, 33, 2000, 701], "K": 50, "channels": 9}, {"activation": "relu"}),  # blocks
    ({"lengths": [12, 3, 31], "K": 9, "K_rev": 3, "gates": "pre"}, {}),  # direct sums
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bhl", "blh"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]["lengths"]))
def test_rows_are_as_if_alone(case, layout, backend):
    """Values against the rows one by one by their definition, gradients against torch's of that."""
    sizes, options = case
    lengths = sizes["lengths"]
    t = {name: x.requires_grad_() for name, x in tensors(**sizes).items()}
    given = dict(t)
    if layout == "blh":
        given = {
            n: x.movedim(-1, 0) if n in ("u", "pre_gate", "post_gate") else x for n, x in t.items()
        }
    exact = reference.fftconv_packed(**given, cu_seqlens=cut(lengths), layout=layout, **options)
    with use_backend(backend):
        y = fftconv(**given, cu_seqlens=cut(lengths), layout=layout, **options)
        assert y.shape == exact.shape and rel_l2(y, exact) < 1e-12
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, [*t.values()], dy)
    expected = torch.autograd.grad(exact, [*t.values()], dy)
    for name, ours, theirs in zip(t, grads, expected, strict=True):
        assert ours.shape == theirs.shape and rel_l2(ours, theirs) < 1e-11, name


@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=9),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 120),
    st.sampled_from([None, 0, 5, 60]),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
    st.sampled_from(["", "pre", "post", "pre post"]),
)
@settings(max_examples=60, deadline=None)
def test_any_pack(lengths, dtype, K, K_rev, heads, per_row, gates):
    t = tensors(lengths, 2, K, heads, per_row, K_rev, gates, dtype=dtype)
    t = {name: x.requires_grad_() for name, x in t.items()}
    y = run(t, lengths, activation="gelu")
    wide = {name: x.detach().double().requires_grad_() for name, x in t.items()}
    exact = reference.fftconv_packed(**wide, cu_seqlens=cut(lengths), activation="gelu")
    assert y.dtype == dtype and y.shape == exact.shape
    if not y.numel():
        return
    assert rel_l2(y, exact) <= BOUNDS[dtype]
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [*t.values()], dy)
    expected = torch.autograd.grad(exact, [*wide.values()], dy.double(), materialize_grads=True)
    for name, ours, theirs in zip(t, grads, expected, strict=True):
        assert ours.dtype == t[name].dtype
        if theirs.any():
            assert rel_l2(ours, theirs) <= 20 * BOUNDS[dtype], name


@pytest.mark.parametrize("K", [20, 70, 3000])
def test_no_bit_of_a_row_depends_on_others(K):
    lengths = [100, 1500, 101, 3, 30, 2048]
    t = tensors(lengths, 5, K, gates="post", dtype=torch.float32)
    y = run(t, lengths, activation="silu")
    for i in range(len(lengths)):
        begin, end = sum(lengths[:i]), sum(lengths[: i + 1])
        spoilt = dict(t, u=torch.full_like(t["u"], torch.nan))
        spoilt["u"][..., begin:end] = t["u"][..., begin:end]
        assert torch.equal(
            run(spoilt, lengths, activation="silu")[..., begin:end], y[..., begin:end]
        )
        alone = {n: x[..., begin:end] if n in ("u", "post_gate") else x for n, x in t.items()}
        assert torch.equal(run(alone, lengths[i : i + 1], activation="silu"), y[..., begin:end])


def test_threads_change_no_bit():
    lengths = [100, 1500, 101, 3, 1501, 30, 2048, 100, 100]
    for channels in (1, 5, 16):
        t = {
            n: x.requires_grad_()
            for n, x in tensors(lengths, channels, 900, dtype=torch.float32).items()
        }
        found = []
        before = torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = run(t, lengths)
            found.append([y, *torch.autograd.grad(y.square().sum(), [*t.values()])])
        torch.set_num_threads(before)
        for more in found[1:]:
            assert all(map(torch.equal, more, found[0]))


def test_second_derivatives():
    lengths = [4, 0, 9, 4]
    t = tensors(lengths, 2, 6, K_rev=3, gates="pre post")
    inputs = [x.requires_grad_() for x in t.values()]
    call = lambda *x: run(dict(zip(t, x, strict=True)), lengths, activation="gelu")  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code for jvp
def test_transforms():
    lengths = [4, 0, 9]
    offsets = cut(lengths)
    u, k = torch.randn(3, 2, 13, dtype=F64), torch.randn(2, 5, dtype=F64)
    call = lambda u: fftconv(u, k, cu_seqlens=offsets)  # noqa: E731
    mapped = torch.vmap(call)(u)
    torch.testing.assert_close(mapped, torch.stack([call(x) for x in u]))
    _, tangent = torch.func.jvp(call, (u[0],), (u[1],))
    torch.testing.assert_close(tangent, call(u[1]))
    each = torch.vmap(torch.func.grad(lambda u: call(u).square().sum()))(u)
    for x, g in zip(u, each, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(g, torch.autograd.grad(call(x).square().sum(), x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code for jvp
def test_forward_mode_of_forward_mode():
    offsets, u = cut([4, 0, 9]), torch.randn(2, 13, dtype=F64)
    k = torch.randn(2, 5, dtype=F64)
    call = lambda u: fftconv(u, k, cu_seqlens=offsets, activation="gelu").sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(call, u)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(outer(torch.func.jacfwd(call))(u), expected)


@pytest.mark.parametrize("return_history", [False, True])
def test_a_vmap_has_one_set_of_offsets(return_history):
    u, k = torch.randn(2, 10), torch.randn(2, 3)

    def call(offsets):
        return fftconv(u, k, cu_seqlens=offsets, return_history=return_history)

    with pytest.raises(ValueError, match="cu_seqlens must be the same for all calls of a vmap"):
        torch.vmap(call)(torch.stack([cut([4, 6]), cut([5, 5])]))


def test_exported_once_for_all_packs():
    class Module(torch.nn.Module):
        def forward(self, u, k, offsets):
            return fftconv(u, k, cu_seqlens=offsets, max_seqlen=40)

    k, some = torch.randn(2, 50), torch.export.Dim.DYNAMIC
    given = torch.randn(2, 35), k, cut([5, 30])
    exported = torch.export.export(Module(), given, dynamic_shapes=({1: some}, None, {0: some}))
    u, offsets = torch.randn(2, 61), cut([20, 0, 40, 1])
    ours = exported.module()(u, k, offsets)
    torch.testing.assert_close(ours, fftconv(u, k, cu_seqlens=offsets))


def test_opcheck():
    lengths = [4, 0, 9]
    t = tensors(lengths, 2, 6, dtype=torch.float32)
    inputs = [t["u"], t["k"], None, t["skip"], None, None, torch.randn(2), cut(lengths)]
    for heads in (False, True):
        if heads:
            inputs[1] = torch.randn(2, 2, 6)
        own = [
            x.clone().requires_grad_() if x is not None and x.is_floating_point() else x
            for x in inputs
        ]
        given = sum(1 << i for i, x in enumerate(own) if x is not None)
        torch.library.opcheck(
            torch.ops.seqconv.fftconv_packed_fwd.default, (*own, given, "gelu", False, -1)
        )


def test_compiled_once_for_all_packs():
    k = torch.randn(2, 50, requires_grad=True)

    def step(u, k, offsets):
        return fftconv(u, k, cu_seqlens=offsets, activation="gelu").square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 30], [100, 3, 0], [7, 7, 7, 80]):
        u = torch.randn(2, sum(lengths))
        with torch._dynamo.config.patch(error_on_recompile=lengths != [5, 30]):
            (ours,) = torch.autograd.grad(compiled(u, k, cut(lengths)), k)
        (theirs,) = torch.autograd.grad(step(u, k, cut(lengths)), k)
        torch.testing.assert_close(ours, theirs)


BAD = {
    "first": ([1, 5], ValueError, r"cu_seqlens\[0\] must be 0, got 1"),
    "last": ([0, 4], ValueError, r"cu_seqlens\[1\] must be the number of steps, 10, got 4"),
    "decreasing": (
        [0, 7, 5, 10],
        ValueError,
        r"cu_seqlens\[2\] must be >= cu_seqlens\[1\]=7, got 5",
    ),
    "beyond": ([0, 20, 10], ValueError, r"cu_seqlens\[2\] must be >= cu_seqlens\[1\]=20, got 10"),
    "negative": ([0, -3, 10], ValueError, r"cu_seqlens\[1\] must be >= cu_seqlens\[0\]=0, got -3"),
    "empty": ([], ValueError, r"must be \(rows \+ 1,\), got \(0,\)"),
    "floats": ([0.0, 10.0], TypeError, "must be one of int32, int64, got float32"),
    "a list of lists": ([[0, 10]], ValueError, r"must be \(rows \+ 1,\), got \(1, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_offsets_are_named(name):
    values, error, text = BAD[name]
    offsets = torch.tensor(values, dtype=None if values else torch.int64)
    with pytest.raises(
        error, match=f"fftconv: {'' if 'must be' not in text[:9] else 'cu_seqlens '}{text}"
    ):
        fftconv(torch.randn(2, 10), torch.randn(2, 3), cu_seqlens=offsets)


def test_what_is_refused():
    u, k, offsets = torch.randn(2, 10), torch.randn(2, 3), torch.tensor([0, 4, 10])
    refused = [
        (
            {"max_seqlen": 5},
            ValueError,
            "max_seqlen must be at least the length of every row, got 5 and 6 .* row 1",
        ),
        ({"max_seqlen": -1}, ValueError, "max_seqlen must be an integer >= 0, got -1"),
        ({"mode": "circular"}, ValueError, "mode must be 'causal' with cu_seqlens, got 'circular'"),
        (
            {"exact_causal": True},
            ValueError,
            "exact_causal must be False with cu_seqlens, got True",
        ),
        (
            {"k": torch.randn(3, 1, 2, 3)},
            ValueError,
            r"or \(rows=2, heads, channels=2, K\), got \(3, 1, 2, 3\)",
        ),
        (
            {"u": torch.randn(1, 2, 10)},
            ValueError,
            r"u must be \(channels, total\), got \(1, 2, 10\)",
        ),
        ({"post_gate": torch.randn(2, 9)}, ValueError, "post_gate must be .*total=10.*, got"),
    ]
    for changed, error, text in refused:
        with pytest.raises(error, match=text):
            fftconv(**({"u": u, "k": k, "cu_seqlens": offsets} | changed))
    with pytest.raises(ValueError, match="max_seqlen must be None without cu_seqlens, got 5"):
        fftconv(torch.randn(1, 2, 10), k, max_seqlen=5)


def _moved(offsets: Tensor) -> Tensor:
    offsets = offsets.clone()
    offsets[1] += 1
    return offsets


MISTAKES = {
    "an offset shifted by one": _moved,
    "two rows joined": lambda offsets: offsets[[0, *range(2, len(offsets))]].contiguous(),
    "a row skipped": lambda offsets: torch.cat([offsets[1:2], offsets[1:]]),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.skipif(bool(cpu.missing), reason="mistakes around the CPU kernels")
def test_mistakes_are_noticed(name, monkeypatch):
    real = cpu.fftconv_packed

    def wrong(y, inputs, offsets, activation):
        y.zero_()
        real(y, inputs, MISTAKES[name](offsets), activation)

    monkeypatch.setattr(cpu, "fftconv_packed", wrong)
    lengths = [10, 40, 90]
    t = tensors(lengths)
    assert rel_l2(run(t, lengths), reference.fftconv_packed(**t, cu_seqlens=cut(lengths))) > 1e-3
