"""Ranks that disagree, refuse their arguments, hang or die: the others get an error that says what it can."""

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from context_cases import Model
from layer_table import D
from parallel_cases import case, part
from processes import run, run_fresh

from seqconv import S4D, parallel

SOMETIMES = pytest.mark.slow, pytest.mark.one_of(2)

SIZES = [6, 5, 4]


def differ(changes: dict, base: dict) -> str:
    """The message in this rank, where rank 1 has other arguments."""
    tensors, options, shards, _ = case(SIZES, **base)
    rank = dist.get_rank()
    tensors["u"] = part(tensors["u"], shards, rank, -1)
    own = tensors | options
    if rank == 1:
        own |= {name: change(own) for name, change in changes.items()}
    try:
        parallel.fftconv(**own)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def narrower(own):
    return own["u"][:, :4]


def float32(own):
    return own["u"].float()


def float32_kernel(own):
    return own["k"].float()


def float32_skip(own):
    return own["skip"].float()


def four_channels(own):
    return own["k"][:4]


def no_skip(own):
    return None


def trained(own):
    return own["k"].requires_grad_()


def a2a(own):
    return "a2a"


def gelu(own):
    return "gelu"


def circular(own):
    return "circular"


def one_tap_less(own):
    return own["k"][:, 1:]


def zigzag(own):
    return "zigzag"


DIFFERENT = {
    "dtype": (
        {"u": float32, "k": float32_kernel, "skip": float32_skip},
        "u's dtype",
        "float64",
        "float32",
    ),
    "kernel's dtype": ({"k": float32_kernel}, "k's dtype", "float64", "float32"),
    "channels": ({"u": narrower, "k": four_channels, "skip": no_skip}, "u's channels", "5", "4"),
    "skip": ({"skip": no_skip}, "skip's presence", "True", "False"),
    "gradient": ({"k": trained}, "the gradient of k", "False", "True"),
    "method": ({"method": a2a}, "method", "'auto'", "'a2a'"),
    "order": ({"order": zigzag}, "order", "'contiguous'", "'zigzag'"),
    "activation": ({"activation": gelu}, "activation", "nothing", "'gelu'"),
    "mode": ({"mode": circular}, "mode", "'causal'", "'circular'"),
    "taps": ({"k": one_tap_less}, "k's axis 1", "7", "6"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_rank_names_what_they_disagree_about(name):
    changes, fact, usual, other = DIFFERENT[name]
    base = {"method": "auto", "order": "contiguous", "activation": None, "mode": "causal"}
    got = f"{usual} on rank 0, {other} on rank 1, {usual} on rank 2"
    wanted = f"parallel.fftconv: the ranks of the group must agree about {fact}, got {got}"
    found = run(3, differ, changes, base)
    assert found == [f"ValueError: {wanted}"] * 3


def test_a_rank_that_refuses_its_arguments_tells_the_others():
    found = run(3, differ, {"u": narrower}, {})
    assert found[1].startswith("ValueError: parallel.fftconv: k must be (channels=4, K)")
    text = "ValueError: parallel.fftconv: rank 1 of the group has refused its arguments; its message says why"
    assert found[0] == found[2] == text
    works = run(3, differ, {}, {})
    assert works == ["nothing"] * 3


def checked(group=None) -> list[str]:
    """What is refused on every rank alike."""
    u, k = torch.randn(2, 3, 5), torch.randn(3, 4)
    calls = [
        dict(u=u, k=k, method="state"),
        dict(u=u, k=k, order="striped"),
        dict(u=u, k=k, shards=(5, 4)),
        dict(u=u, k=k, shards=(5,)),
        dict(u=u[0], k=k),
        dict(u=u, k=[1.0]),
        dict(u=u, k=torch.randn(3, 11), mode="circular"),
        dict(u=u, k=k, k_rev=k, mode="circular"),
        dict(u=u, k=S4D(4).kernel),
        dict(u=u, k=S4D(3).kernel, k_rev=k),
        dict(u=u, k=k, group="cp"),
        dict(u=u, k=k, pre_gate=u.double()),
    ]
    messages = []
    for options in calls:
        try:
            parallel.fftconv(**options)
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("nothing")
    return messages


def test_arguments_are_checked():
    wanted = [
        "ValueError: parallel.fftconv: method must be one of 'auto', 'a2a', 'halo', got 'state'",
        "ValueError: parallel.fftconv: order must be one of 'contiguous', 'zigzag', got 'striped'",
        "ValueError: parallel.fftconv: shards must be the steps on each of 2 ranks, 5 on rank .*got",
        "ValueError: parallel.fftconv: shards must be the steps on each of 2 ranks, 5 on rank .*got",
        r"ValueError: parallel.fftconv: u must be \(batch, channels, length\), got \(3, 5\)",
        "TypeError: parallel.fftconv: k must be a tensor, got list",
        "ValueError: parallel.fftconv: k must have K <= length=10 in circular mode, got K=11",
        "ValueError: parallel.fftconv: k_rev must be None in circular mode, got a tensor",
        "ValueError: parallel.fftconv: k must make kernels of channels=3, got 4",
        "TypeError: parallel.fftconv: k_rev must be None beside a kernel generator, got a tensor",
        "TypeError: parallel.fftconv: group must be a ProcessGroup, a DeviceMesh or None, got str",
        "TypeError: parallel.fftconv: pre_gate must be float32, got float64",
    ]
    for found in run(2, checked):
        for message, pattern in zip(found, wanted, strict=True):
            # One rank's own message, or that another has refused.
            assert re.match(pattern, message) or "has refused its arguments" in message, message


def test_without_processes():
    with pytest.raises(
        RuntimeError, match=r"parallel\.fftconv: torch\.distributed is not initialized"
    ):
        parallel.fftconv(torch.randn(1, 2, 3), torch.randn(2, 3))


def layers_differ(what: str) -> str:
    torch.manual_seed(0)
    rank = dist.get_rank()
    layer = parallel.context_parallel(S4D(D))
    x, options = torch.randn(2, 5, D), {}
    if rank == 1:
        if what == "batch":
            x = x[:1]
        elif what == "dtype":
            x = x.double()
        elif what == "rate":
            options["rate"] = 2.0
        elif what == "training":
            layer.eval()
        elif what == "lengths":
            options["lengths"] = torch.tensor([3, 4])
        elif what == "tensor":
            x = None
    if what.startswith("other"):
        options["lengths"] = torch.tensor([3, 15 + rank])
    if what == "other masks":
        options["mask"] = torch.arange(10) >= options.pop("lengths").unsqueeze(1) - 8
    try:
        layer(x, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_layers_name_disagreements():
    values = "mask and lengths, which are those of whole rows (a checksum of them)"
    wanted = {
        "batch": "x's batch, got 2 on rank 0, 1 on rank 1",
        "dtype": "x's dtype, got float32 on rank 0, float64 on rank 1",
        "rate": "rate, got 1.0 on rank 0, 2.0 on rank 1",
        "training": "training, got True on rank 0, False on rank 1",
        "lengths": "lengths's presence, got False on rank 0, True on rank 1",
        "other lengths": f"{values}, got 33 on rank 0, 35 on rank 1",
        "other masks": f"{values}, got 112 on rank 0, 94 on rank 1",
        "tensor": "x's batch, got 2 on rank 0, nothing on rank 1",
    }
    for what, text in wanted.items():
        assert (
            run(2, layers_differ, what)
            == [f"S4D: the ranks of the group must agree about {text}"] * 2
        )


def ends(when: str, how: str) -> str:
    """Rank 1 is killed, or sleeps, before the forward or the backward pass."""
    torch.manual_seed(0)
    rank = dist.get_rank()

    def end():
        if rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(15)

    model = parallel.context_parallel(Model())
    x = torch.randn(2, 5, 2)
    model(x).sum().backward()
    if when == "forward":
        end()
    y = model(x)
    if when == "backward":
        end()
    y.sum().backward()
    return "nothing"


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("killed", "backward"),
        pytest.param("killed", "forward", marks=SOMETIMES),
        pytest.param("asleep", "forward", marks=SOMETIMES),
        pytest.param("asleep", "backward", marks=SOMETIMES),
    ],
)
def test_the_living_get_an_error_within_the_timeout(when, how):
    found = run_fresh(3, ends, when, how, timeout=60, collective=5)
    for outcome in (found[0], found[2]):
        assert outcome.error and "RuntimeError" in outcome.error, outcome
    if how == "killed":
        assert found[1].code == -signal.SIGKILL
