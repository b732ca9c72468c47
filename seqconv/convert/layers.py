"""Layers of state-spaces/s4, safari and SGConv from their checkpoints."""

from typing import cast

import torch
from torch import Tensor

from seqconv.convert.checkpoint import Checkpoint
from seqconv.layers.long_conv import LongConv, LongConvKernel
from seqconv.layers.s4d import S4D
from seqconv.layers.sgconv import SGConv


def load_s4d(state_dict: dict[str, Tensor], *, prefix: str = "", **options) -> S4D:
    """An S4D with the weights of a layer of state-spaces/s4, or of safari, that computes the same.

    Takes, below prefix, the keys of the minimal S4D (D, kernel.log_dt, .log_A_real, .A_imag, .C), of
    S4Block with a diagonal kernel (layer.D, layer.kernel.inv_dt, .A_real, .A_imag, .B, .C) and of its
    predecessors (D, kernel.kernel.log_dt, .inv_A_real or .log_w_real, .A_imag or .w_imag, .C, and
    .B), each with output_linear's weight and bias. Sizes, heads, sides, ties, real modes (no
    imaginary part) and the GLU follow from names and shapes. Parameters keep their parameterisation,
    so that training can go on. If a checkpoint has no B, B is 1 and stays so.

    Args:
        state_dict: the state_dict of the layer, or of a model that holds it.
        prefix: the prefix of the layer's keys, "layers.0.layer." for instance.
        options: the options of S4D that a checkpoint does not hold: discretization ("zoh" is the default of the
            minimal S4D and of S4Block), real_transform ("exp" likewise), imag_transform, dt_sinh, bandlimit,
            dropout, tie_dropout, activation, kernel_lr and others. A checkpoint with inv_dt needs dt_transform,
            too: the default of its class ("exp") is not that of its configurations ("softplus").

    Returns:
        An S4D in D's dtype, on its device. Outputs are (batch, length, d_model).

    Raises:
        ValueError: a key is missing or unknown (P, for one: S4 with a low-rank term is not S4D), or has
            a shape that does not fit the others.
        TypeError: state_dict is no dict of tensors by name.

    Source: arXiv 2206.11893.
    """
    name = "load_s4d"
    checkpoint = Checkpoint(name, state_dict, prefix)
    values, shape = checkpoint.block()
    d, heads = shape["d_model"], shape["heads"]

    def named(*names: str) -> list[str]:
        return [p + n for n in names for p in ("layer.kernel.", "kernel.kernel.", "kernel.")]

    # S4Block stores the imaginary part's negative.
    conjugate = checkpoint.find(*named("A_real")) is not None
    is_real = conjugate and checkpoint.find(*named("A_imag")) is None
    parts = () if is_real else (("real and imaginary", 2),)
    A_real = checkpoint.take(*named("A_real", "inv_A_real", "log_A_real", "log_w_real"))
    checkpoint.check("A's real part", A_real, (("sets", None), ("modes", None)))
    n_ssm, modes = A_real.shape
    sets = (("sets", n_ssm), ("modes", modes))
    if d % n_ssm:
        raise ValueError(f"{name}: A must have sets that divide d_model={d}, got {n_ssm}")
    kernel = {"inv_A_real": A_real}
    if not is_real:
        A_imag = checkpoint.take(*named("A_imag", "w_imag"))
        kernel["inv_A_imag"] = checkpoint.check("A's imaginary part", A_imag, sets)

    C = checkpoint.take(*named("C"))
    C = C.unsqueeze(0) if C.dim() == 2 + len(parts) else C
    checkpoint.check("C", C, (("kernels", None), ("d_model", d), ("modes", modes), *parts))
    has_B = checkpoint.find(*named("B")) is not None
    B = checkpoint.take(*named("B")) if has_B else C.new_tensor([1.0, 0.0]).repeat(*A_real.shape, 1)
    B = B.squeeze(0) if B.dim() == 3 + len(parts) else B
    checkpoint.check("B", B, (*sets, *parts))
    if conjugate and not is_real:  # of all complex numbers, which leaves the kernel as it is
        B, C = (t * t.new_tensor([1.0, -1.0]) for t in (B, C))

    if checkpoint.find(*named("inv_dt")) and "dt_transform" not in options:
        wanted = "dt_transform must be 'exp' or 'softplus' for a checkpoint with inv_dt"
        raise ValueError(f"{name}: {wanted}, got none")
    dt = checkpoint.take(*named("inv_dt", "log_dt"))
    dt = dt.squeeze(-1) if dt.dim() == 2 and dt.shape[1] == 1 else dt
    checkpoint.check("dt", dt, (("d_model", d),), (("d_model", d), ("modes", modes)))
    kernel |= {"inv_dt": dt, "B": B, "C": C}

    decided = checkpoint.refuse_options(
        options,
        **shape,
        d_state=modes if is_real else 2 * modes,
        bidirectional=checkpoint.directions("C", len(C), heads),
        n_ssm=n_ssm,
        is_real=is_real,
        init="real" if is_real else "lin",  # all of it is replaced
        train_B=has_B,
        dt_tie=dt.dim() == 1,
    )
    return checkpoint.fill(S4D(**decided), values | {f"kernel.{n}": t for n, t in kernel.items()})


def load_longconv(
    state_dict: dict[str, Tensor], *, prefix: str = "", lam: float, **options
) -> LongConv:
    """A LongConv with the weights of safari's, or of its standalone one, that computes the same.

    Takes, below prefix, the keys D, kernel.kernel (kernels, d_model, l_max), and output_linear's weight and
    bias; or those of the standalone file. Its kernel (heads, d_model, 2 l_max) is two-sided, because its
    transform is as long as the kernel: the second half, read backwards, is for the future.

    The outputs are the same for inputs of length l_max, and with a kernel.kernel also for longer ones. For shorter
    inputs safari's layers let the taps beyond the input wrap around to the future; here those taps are cut.

    Args:
        state_dict: the state_dict of the layer, or of a model that holds it.
        prefix: the prefix of the layer's keys, "layers.0.layer." for instance.
        lam: the threshold of the squash, which the checkpoint does not hold. It is 0.1 if safari's layer was made
            without one, and 0.001 to 0.004 in its Long Range Arena configurations.
        options: the options of LongConv that a checkpoint does not hold: smooth, smooth_window, kernel_dropout,
            dropout, tie_dropout, activation, kernel_lr.

    Returns:
        A LongConv in D's dtype, on its device. Outputs are (batch, length, d_model).

    Raises:
        ValueError: a key is missing or unknown, or has a shape that does not fit the others.
        TypeError: state_dict is no dict of tensors by name.

    Source: arXiv 2302.06646.
    """
    if not lam >= 0:
        raise ValueError(f"load_longconv: lam must be >= 0, got {lam}")
    checkpoint = Checkpoint("load_longconv", state_dict, prefix)
    values, shape = checkpoint.block()
    standalone = checkpoint.find("kernel") is not None
    kernel = checkpoint.take("kernel", "kernel.kernel")
    pattern = (("kernels", None), ("d_model", shape["d_model"]), ("taps", None))
    checkpoint.check("kernel", kernel, pattern)
    if standalone:
        if kernel.shape[-1] % 2:
            raise ValueError(
                f"load_longconv: kernel must have an even number of taps, got {kernel.shape[-1]}"
            )
        past, future = kernel.chunk(2, dim=-1)
        kernel = torch.cat([past, future.flip(-1)])
    two_sided = checkpoint.directions("kernel", len(kernel), shape["heads"])
    size = {"l_max": kernel.shape[-1], "bidirectional": two_sided}
    # The initial taps, which are replaced, need not survive the squash.
    layer = LongConv(**checkpoint.refuse_options(options, **shape, **size), lam=0.0)
    cast(LongConvKernel, layer.kernel).lam = lam
    return checkpoint.fill(layer, values | {"kernel.kernel": kernel})


def load_sgconv(
    state_dict: dict[str, Tensor],
    *,
    prefix: str = "",
    mode: str = "cat_randn",
    init_scale: int = 0,
    **options,
) -> SGConv:
    """An SGConv with the weights of the reference implementation's GConv that computes the same.

    Takes, below prefix, the keys D, kernel_list.0, .1, ... (kernels, d_model, kernel_dim), multiplier,
    kernel_norm, kernel_norm_initialized, decay (with "learnable" in the mode), and output_linear's
    weight and bias. Sizes, heads, sides, scales and the GLU follow from shapes.

    Args:
        state_dict: the state_dict of the layer, or of a model that holds it, after its first forward: only then
            does it hold the kernel's norm.
        prefix: the prefix of the layer's keys, "layers.0.layer." for instance.
        mode, init_scale: the options that the layer was made with, which its checkpoint does not hold.
        options: the options of SGConv that a checkpoint does not hold: dropout, tie_dropout, activation, kernel_lr.

    Returns:
        An SGConv in D's dtype, on its device. Outputs are (batch, length, d_model).

    Raises:
        ValueError: a key is missing or unknown, or has a shape that does not fit the others.
        TypeError: state_dict is no dict of tensors by name.

    Source: arXiv 2210.09298.
    """
    name = "load_sgconv"
    if "cat" not in mode and "sum" not in mode:
        raise ValueError(
            f"{name}: mode must be the layer's, with 'cat' or 'sum' in it, got {mode!r}"
        )
    checkpoint = Checkpoint(name, state_dict, prefix)
    values, shape = checkpoint.block()
    d = shape["d_model"]
    pieces = [checkpoint.take("kernel_list.0")]
    pattern = (("kernels", None), ("d_model", d), ("kernel_dim", None))
    kernels, _, dim = checkpoint.check("kernel_list.0", pieces[0], pattern).shape
    while key := checkpoint.find(f"kernel_list.{len(pieces)}"):
        pattern = (("kernels", kernels), ("d_model", d), ("kernel_dim", dim))
        pieces.append(checkpoint.check(key, checkpoint.take(key), pattern))
    if not checkpoint.take("kernel_norm_initialized"):
        raise ValueError(f"{name}: kernel_norm must be set by a first forward, but is not")
    norm, multiplier = checkpoint.take("kernel_norm"), checkpoint.take("multiplier")
    norm_of = (
        (("d_model", d), ("single", 1)),
        (("kernels", kernels), ("d_model", d), ("single", 1)),
    )
    checkpoint.check("kernel_norm", norm, *norm_of)  # the older had one norm for all heads
    power = "learnable" in mode
    if power:
        decay = checkpoint.check("decay", checkpoint.take("decay"), (("d_model", d),))
    else:
        pattern = (("single", 1), ("d_model", d), ("single", 1))
        decay = checkpoint.check("multiplier", multiplier, pattern).reshape(d)
        # There the last piece has weight 1, here the first.
        norm = norm * multiplier.reshape(d, 1) ** (1 - len(pieces))
    two_sided = checkpoint.directions("kernel_list.0", kernels, shape["heads"])
    decided = checkpoint.refuse_options(
        options,
        **shape,
        l_max=dim << (len(pieces) - 1 + init_scale),
        bidirectional=two_sided,
        kernel_dim=dim,
        n_scales=len(pieces),
        init_scale=init_scale,
        upsample="nearest" if "nearest" in mode else "linear",
        combine="sum" if "sum" in mode else "cat",
        decay=("power_fixed" if "fixed" in mode else "power") if power else "geometric",
    )
    values |= {"kernel.pieces": torch.stack(pieces), "kernel.decay": decay}
    return checkpoint.fill(SGConv(**decided), values | {"kernel.norm": norm.expand(kernels, d, 1)})
