"""The long convolution of a sequence that is divided among processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from seqconv.backends.inputs import Inputs
from seqconv.layers.base import ConvLayer, KernelGenerator
from seqconv.layers.hyena import Hyena
from seqconv.layers.packing import Pack
from seqconv.ops.checks import check_choice
from seqconv.ops.fftconv import packed_inputs, validate
from seqconv.parallel import exchange, packs
from seqconv.parallel.call import Call, most_taps, reach_of
from seqconv.parallel.meeting import meet, shape_of
from seqconv.parallel.shards import ORDERS, given
from seqconv.parallel.traffic import Explanation, Problem, explanation

NAME = "parallel.fftconv"
METHODS = ("auto", "a2a", "halo")


@_disable_dynamo
def fftconv(
    u: Tensor,
    k: Tensor | KernelGenerator,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    group=None,
    order: str = "contiguous",
    method: str = "auto",
    shards: tuple[int, ...] | None = None,
) -> Tensor:
    """seqconv.fftconv of a sequence of which every process of a group has some steps.

    The formula is that of seqconv.fftconv with u, the gates and y put together from all ranks. Every rank of the
    group calls it.

    Args:
        u, pre_gate, post_gate: this rank's steps, (batch, channels, steps), or (batch, steps, channels) with
            layout="blh"; post_gate as y, with heads where k has them. The number of steps may differ from
            rank to rank and be 0.
        k, skip, k_rev, bias: as in seqconv.fftconv, whole, and the same on every rank; K counts lags of the whole
            sequence. k may be a kernel generator: then k is its kernel for the length of the whole sequence, and by
            method "a2a" each rank makes the kernel of its channels only. y has an axis of heads then.
        activation, mode, layout: as in seqconv.fftconv. In circular mode K is at most the whole length.
        cu_seqlens, max_seqlen: as in seqconv.fftconv, those of the whole pack, and the same on every rank. u and the
            gates then have no axis of samples, the pack is divided along its steps, and a rank's steps may begin and
            end inside a row. A generator makes the kernel of the longest row, or of max_seqlen steps.
        group: a ProcessGroup, or a DeviceMesh of one axis; None is every process.
        order: which steps a rank has. "contiguous": those after the steps of the ranks before it. "zigzag": the
            parts r and 2 ranks - 1 - r of torch.chunk(2 ranks), which is how causal attention balances its work.
        method: "a2a" exchanges steps for channels, convolves whole sequences of some channels on each rank, and
            changes back. "halo" fetches the K - 1 steps before a shard (and those after it that k_rev reads) from the
            ranks that have them. "auto" takes what moves fewer bytes, but "halo" only for kernels that reach no
            further than a shard of average size: with longer ones a rank would hold most of the sequence.
        shards: the number of steps on every rank, if it is known. Nothing but the convolution's own data is exchanged
            then; otherwise the ranks exchange a few integers first, and compare what must agree.

    Returns:
        y: this rank's steps, shaped as in seqconv.fftconv, and equal to the same steps of one process up to round-off.

    Every tensor has a gradient: for u and the gates that of this rank's steps, for the others and the parameters of a
    generator the whole one, summed over the ranks, on every rank. What each rank differentiates is its own part of a
    sum over the ranks: the losses of the ranks add up to the one of one process. There are first derivatives only.

    Raises:
        ValueError, TypeError: an argument is not as above. Where ranks disagree about a shape, a dtype or an option,
            every rank raises the same error, which names what they disagree about.
        RuntimeError: torch.distributed is not initialized, or a rank does not come within the group's timeout; or the
            call is differentiated with create_graph=True, by torch.func or in forward mode.

    Example, on each of several processes:
        y = seqconv.parallel.fftconv(u.chunk(world, -1)[rank], k, group=mesh["cp"])

    Bytes: by "a2a" batch * channels numbers for each step, to other ranks and back; by "halo" batch * channels
    * (K - 1).
    See seqconv.parallel.explain. Twin: seqconv.fftconv of the whole sequence.
    """
    tensors = u, k, k_rev, skip, pre_gate, post_gate, bias
    options = activation, mode, layout, cu_seqlens, max_seqlen
    call = _begin(tensors, options, group, order, method, shards)
    parted = False
    if isinstance(k, KernelGenerator):
        made, parted = call.kernel(k, reduce=True)
        skip, bias = exchange.replicated(call.group, skip, bias)
    else:
        made, skip, k_rev, bias = exchange.replicated(call.group, k, skip, k_rev, bias)
    return call.convolve(
        u,
        made,
        skip,
        k_rev=k_rev,
        pre_gate=pre_gate,
        post_gate=post_gate,
        bias=bias,
        activation=activation,
        mode=mode,
        layout=layout,
        parted=parted,
    )


def explain(
    u: Tensor,
    k: Tensor | KernelGenerator | nn.Module,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    group=None,
    order: str = "contiguous",
    method: str = "auto",
    shards: tuple[int, ...] | None = None,
) -> Explanation:
    """Which method `seqconv.parallel.fftconv` takes for these arguments, and how many bytes it moves. It exchanges the
    sizes of the shards, unless they are given, and computes nothing else.

    With a layer under context parallelism in the place of k, u is the layer's input (batch, steps, d_model), or that
    of packed rows (steps, d_model) with cu_seqlens and max_seqlen. The other arguments are the layer's own.
    """
    context = getattr(k, "_context", None)
    if context is None and isinstance(k, (ConvLayer, Hyena)):
        text = "must be under context parallelism to be explained, call context_parallel first"
        raise ValueError(f"parallel.explain: the {type(k).__name__} {text}")
    if context is not None:
        call = context.begin(k, u, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return explanation(call.problem, call.method)
    tensors = u, k, k_rev, skip, pre_gate, post_gate, bias
    options = activation, mode, layout, cu_seqlens, max_seqlen
    call = _begin(tensors, options, group, order, method, shards)
    return explanation(call.problem, call.method)


def _begin(tensors, options, group, order, method, shards) -> Call:
    group = exchange.process_group(NAME, group)
    refused = known = pack = None
    try:
        pack = _check(tensors, options, order, method)
        known = given(NAME, shards, order)
    except (TypeError, ValueError) as error:
        text = str(error)
        refused = type(error)(text if text.startswith(NAME) else text.replace("fftconv", NAME, 1))
    u, k, k_rev, skip, pre_gate, post_gate, bias = tensors
    activation, mode, layout, *rows = options
    packed = _is_packed(rows)
    channel, step = (-2, -1) if layout == "bhl" else (-1, -2)
    axes = 2 if packed else 3
    size = lambda axis: u.shape[axis] if isinstance(u, Tensor) and u.dim() == axes else 0  # noqa: E731
    generated = isinstance(k, KernelGenerator)
    facts = packs.facts_of(rows, pack)
    facts |= {"order": order, "method": method, "mode": mode, "layout": layout}
    facts |= {
        "activation": activation,
        "u's batch": None if packed else size(0),
        "u's channels": size(channel),
    }
    facts |= {"u's dtype": getattr(u, "dtype", None), "k, a generator or not": generated}
    kernels = (("k", None if generated else k), ("k_rev", k_rev), ("skip", skip), ("bias", bias))
    for name, t in kernels:
        facts |= shape_of(name, t, 4)
    facts |= {"pre_gate's presence": pre_gate is not None}
    facts |= {"post_gate's presence": post_gate is not None}
    facts |= {"gradients being recorded": torch.is_grad_enabled()}
    trained = lambda *ts: any(getattr(t, "requires_grad", False) for t in ts)  # noqa: E731
    facts |= {"gradients of u or pre_gate": trained(u, pre_gate)}
    facts |= {
        f"the gradient of {n}": trained(t)
        for n, t in (("k", k), ("k_rev", k_rev), ("skip", skip), ("bias", bias))
    }
    found = meet(NAME, group, facts, size(step), order, refused, known, always=packed)
    rank = dist.get_rank(group)
    cut = None if pack is None else packs.divided(NAME, pack, found, rank)
    length, longest = (found.length,) * 2 if cut is None else (cut.longest, cut.longest_row)
    heads = k.heads if generated else k.shape[-3] if k.dim() > 2 else 1
    taps = most_taps(k, length) if generated else k.shape[-1]
    if mode == "circular" and taps > found.length:
        text = f"K <= length={found.length} in circular mode, got K={taps}"
        raise ValueError(f"{NAME}: k must have {text}")
    wide = torch.promote_types(u.dtype, torch.float32).itemsize
    problem = Problem(
        found,
        1 if packed else u.shape[0],
        u.shape[channel],
        heads,
        reach_of(taps, 0 if k_rev is None else k_rev.shape[-1], longest),
        mode == "circular",
        u.element_size() if pre_gate is None else wide,
        u.element_size() if post_gate is None else wide,
    )
    return Call(group, rank, problem, problem.choose(method), cut)


def _is_packed(rows) -> bool:
    return any(t is not None for t in rows)


def _check(tensors, options, order, method) -> Pack | None:
    """Raises where this rank refuses its arguments, and returns what it says of packed rows."""
    u, k, k_rev, skip, pre_gate, post_gate, bias = tensors
    activation, mode, layout, *rows = options
    check_choice(NAME, "order", order, ORDERS)
    check_choice(NAME, "method", method, METHODS)
    if isinstance(k, KernelGenerator):
        if k_rev is not None:
            raise TypeError("fftconv: k_rev must be None beside a kernel generator, got a tensor")
        axis = -2 if layout == "bhl" else -1
        if isinstance(u, Tensor) and u.dim() in (2, 3) and u.shape[axis] != k.d_model:
            raise ValueError(
                f"fftconv: k must make kernels of channels={u.shape[axis]}, got {k.d_model}"
            )
        if isinstance(u, Tensor):
            k = u.new_empty(k.heads, k.d_model, 0)
    if mode == "circular" and k_rev is not None:
        raise ValueError("fftconv: k_rev must be None in circular mode, got a tensor")
    if _is_packed(rows):
        packed_inputs(Inputs(*tensors)._replace(k=k), activation, mode, layout, *rows)
        return packs.offered("fftconv", u, rows)
    # K is compared with the whole length later.
    single = "causal" if mode == "circular" else mode
    validate(u, k, k_rev, skip, pre_gate, post_gate, bias, activation, single, layout)
    return None
