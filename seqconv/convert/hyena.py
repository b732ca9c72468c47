"""Hyena layers of safari and of HyenaDNA from their checkpoints."""

from typing import Any

import torch
from torch import Tensor

from seqconv.convert.checkpoint import Checkpoint
from seqconv.layers.hyena import Hyena
from seqconv.layers.hyena_filter import time_features
from seqconv.ops.checks import check_flag

# Options of HyenaOperator and of its filter which Hyena has with these values only. The state_dict holds none.
_ONLY: dict[str, Any] = {
    "num_heads": 1,
    "inner_factor": 1,
    "num_blocks": 1,
    "outer_mixing": False,
    "post_order_ffn": False,
    "activation": "id",
    "dropout": 0.0,
    "normalized": False,
    "linear_mixer": False,
    "bidirectional": False,
    "short_filter_order": 3,
    "filter_cls": "hyena-filter",
}
# Those which change no output, or which shapes and tensors of the state_dict say.
_IDLE = {"_name_", "local_order", "fused_bias_fc", "fused_fft_conv", "jit_filter", "return_state"}
_IDLE |= {"filter_dropout", "wd", "layer_idx", "device", "dtype", "channels"}
_IDLE |= {"fast_decay_pct", "slow_decay_pct", "target", "modulation_lr"}


def load_hyena(
    state_dict: dict[str, Tensor],
    *,
    prefix: str = "",
    shift: float,
    modulate: bool = True,
    bias: bool = True,
    interleaved: bool | None = None,
    w: float | None = None,
    lr: float = 1e-3,
    lr_pos_emb: float = 0.0,
    **options,
) -> Hyena:
    """A Hyena with the weights of a HyenaOperator of safari, or of HyenaDNA, that computes the same.

    Takes, below prefix, the keys in_proj, short_filter and out_proj (weight and bias each), filter_fn.bias,
    filter_fn.pos_emb.z and .t, filter_fn.implicit_filter.0, .2, .4, ..., the frequency of its sines (.1.freq, and
    .3.freq and so on, which are the same tensor), and filter_fn.modulation.deltas. Sizes and the order follow from
    shapes. The time features become a formula if z is what the formula says and has no learning rate, and a table
    otherwise. The decay stays a tensor, because that of order > 2 and that of other options differ from Hyena's.

    The outputs are the same for inputs of up to l_max steps. From longer inputs HyenaOperator returns l_max outputs,
    and Hyena returns all, with a warning.

    Args:
        state_dict: the state_dict of the layer, or of a model that holds it.
        prefix: the prefix of the layer's keys, "backbone.layers.0.mixer." for instance.
        shift: what the filter adds to its decay, which the checkpoint does not hold. It is 0.0 if safari's layer was
            made without one, and 0.05 in HyenaDNA's standalone file and in its Hugging Face port.
        modulate, bias: the options of its filter. With modulate=False there is no decay, with bias=False no skip.
        interleaved: for order > 2, how filters and channels share an axis of filter_fn: True if the filters are
            innermost (the repositories of safari and HyenaDNA), False if the channels are (their standalone files).
        w: the frequency of the sines, if the checkpoint holds none because it was not trained.
        lr, lr_pos_emb: the learning rates that param_groups gives to the filter's network, and to the table of time
            features. With lr_pos_emb=0 the features are not trained.
        options: other options that the layer was made with, a configuration for instance. They are checked: one that
            Hyena has no counterpart of is refused by name.

    Returns:
        A Hyena in the dtype of filter_fn.bias, on its device. Inputs and outputs are (batch, length, d_model).

    Raises:
        ValueError: a key is missing or unknown, has a shape that does not fit the others, or an option has a value
            with which the layer computes what Hyena does not.
        TypeError: an option is unknown, or state_dict is no dict of tensors by name.

    Source: arXiv 2302.10866.
    """
    name = "load_hyena"
    check_flag(name, modulate=modulate, bias=bias)
    checkpoint = Checkpoint(name, state_dict, prefix)
    if checkpoint.find("ord_proj_w"):
        raise ValueError(f"{name}: post_order_ffn must be False, got a checkpoint with ord_proj_w")

    in_proj = checkpoint.take("in_proj.weight")
    wide, d = checkpoint.check("in_proj.weight", in_proj, (("wide", None), ("d_model", None))).shape
    order = wide // d - 1
    if wide % d or order < 2:
        wanted = f"in_proj.weight must have (order + 1) d_model rows for d_model={d} and order >= 2"
        raise ValueError(f"{name}: {wanted}, got {wide}")
    in_bias = checkpoint.check("in_proj.bias", checkpoint.take("in_proj.bias"), (("wide", wide),))
    out_weight = checkpoint.take("out_proj.weight")
    checkpoint.check("out_proj.weight", out_weight, (("d_model", d), ("d_model", d)))
    out_bias = checkpoint.check(
        "out_proj.bias", checkpoint.take("out_proj.bias"), (("d_model", d),)
    )
    short = checkpoint.take("short_filter.weight")
    checkpoint.check("short_filter.weight", short, (("wide", wide), ("single", 1), ("taps", 3)))
    short_bias = checkpoint.take("short_filter.bias")
    checkpoint.check("short_filter.bias", short_bias, (("wide", wide),))

    skip = checkpoint.take("filter_fn.bias")
    heads = order - 1
    both = (("heads d_model", heads * d),)
    checkpoint.check(
        "filter_fn.bias", skip, both
    )  # fewer with num_heads > 1, more with inner_factor
    deltas = checkpoint.take("filter_fn.modulation.deltas").reshape(-1)
    checkpoint.check("filter_fn.modulation.deltas", deltas, both)
    if interleaved is not None:
        check_flag("load_hyena", interleaved=interleaved)
    if heads > 1 and interleaved is None:
        wanted = "interleaved must be True or False for a checkpoint of order > 2"
        raise ValueError(f"{name}: {wanted}, got None")
    heads_first = not interleaved

    def split(t: Tensor) -> Tensor:
        """(heads d_model, ...) in the checkpoint's order -> (heads, d_model, ...)."""
        return (
            t.unflatten(0, (heads, d))
            if heads_first
            else t.unflatten(0, (d, heads)).transpose(0, 1)
        )

    network, sines = _network(checkpoint)
    width, emb_dim = network[0][0].shape
    for i, (weight, b) in enumerate(network):
        last = i == len(network) - 1
        rows = heads * d if last else width
        columns = emb_dim if i == 0 else width
        checkpoint.check(
            "a weight of implicit_filter", weight, (("rows", rows), ("columns", columns))
        )
        if b is not None:
            checkpoint.check("a bias of implicit_filter", b, (("rows", rows),))
    frequency = _frequency(name, sines, width, w)

    z, t = checkpoint.take("filter_fn.pos_emb.z"), checkpoint.take("filter_fn.pos_emb.t")
    checkpoint.check(
        "filter_fn.pos_emb.z", z, (("single", 1), ("l_max", None), ("emb_dim", emb_dim))
    )
    l_max = z.shape[1]
    checkpoint.check("filter_fn.pos_emb.t", t, (("single", 1), ("l_max", l_max), ("single", 1)))
    spaced = time_features(l_max, l_max, emb_dim, "spaced", device=z.device)
    eps = torch.finfo(z.dtype).eps
    if not torch.allclose(t[0].double(), spaced[:, :1], rtol=0, atol=4 * eps):
        raise ValueError(f"{name}: filter_fn.pos_emb.t must be l / (l_max - 1), but is not")
    # The formula's phases are rounded in the checkpoint's precision.
    phase = 2 * torch.pi * max((emb_dim - 1) // 2 - 1, 1)
    formula = torch.allclose(z[0].double(), spaced, rtol=0, atol=2 * eps * (1 + phase))
    features = "spaced" if formula and not lr_pos_emb else "table"

    sizes = {"d_model": d, "order": order, "l_max": l_max, "filter_order": width}
    sizes |= {"emb_dim": emb_dim, "num_inner_mlps": len(network) - 2}
    _check_options(name, options, sizes | {"seq_len": l_max})
    layer = Hyena(
        d,
        l_max=l_max,
        order=order,
        emb_dim=emb_dim,
        filter_width=width,
        filter_layers=len(network) - 2,
        filter_features=features,
        filter_decay="free",
        filter_shift=shift if modulate else 0.0,
        filter_table_lr=lr_pos_emb,
        kernel_lr=lr,
    )

    def turned(t: Tensor) -> Tensor:
        """The last gate is first there, and v is last in both."""
        *gates, v = t.chunk(order + 1)
        return torch.cat([*reversed(gates), v])

    values = {
        "in_proj.weight": turned(in_proj),
        "in_proj.bias": turned(in_bias),
        "short": turned(short.squeeze(1)).flip(-1),  # a correlation there
        "short_bias": turned(short_bias),
        "skip": split(skip if bias else torch.zeros_like(skip)),
        "out_proj.weight": out_weight,
        "out_proj.bias": out_bias,
        "filter.frequency": frequency,
        "filter.deltas": split(deltas if modulate else torch.zeros_like(deltas)),
    }
    if features == "table":
        values["filter.table"] = z[0]
    for i, (weight, b) in enumerate(network):
        last = i == len(network) - 1
        values[f"filter.linears.{i}.weight"] = split(weight).flatten(0, 1) if last else weight
        if b is not None:
            values[f"filter.linears.{i}.bias"] = b
    return checkpoint.fill(layer, values)


def _network(checkpoint: Checkpoint) -> tuple[list, list[Tensor]]:
    """The linear maps of the filter, as (weight, bias or None), and the frequencies between them."""
    linears, sines, i = [], [], 0
    part = "filter_fn.implicit_filter."
    while i == 0 or checkpoint.find(f"{part}{i}.weight"):
        weight = checkpoint.take(f"{part}{i}.weight")
        checkpoint.check(f"{part}{i}.weight", weight, (("rows", None), ("columns", None)))
        bias = checkpoint.find(f"{part}{i}.bias")
        linears.append((weight, checkpoint.take(bias) if bias else None))
        if checkpoint.find(f"{part}{i + 1}.freq"):
            sines.append(checkpoint.take(f"{part}{i + 1}.freq"))
        i += 2
    biases = [b is not None for _, b in linears]
    if len(linears) < 3 or biases != [True] * (len(linears) - 1) + [False]:
        wanted = (
            "implicit_filter must have three linear maps or more, and biases in all but the last"
        )
        raise ValueError(
            f"{checkpoint.function}: {wanted}, got {len(linears)} with biases {biases}"
        )
    return linears, sines


def _frequency(name: str, sines: list[Tensor], width: int, w: float | None) -> Tensor:
    if not sines:
        if w is None:
            raise ValueError(
                f"{name}: w must be the sines' frequency, which is no key here, got None"
            )
        return torch.full((width,), float(w))
    first = sines[0].reshape(-1)
    if first.shape != (width,) or any(not torch.equal(t.reshape(-1), first) for t in sines):
        raise ValueError(f"{name}: the frequencies of all sines must be one ({width},), but differ")
    return first


def _check_options(name: str, options: dict[str, Any], sizes: dict[str, int]) -> None:
    for option, value in options.items():
        if option in _ONLY or option in sizes:
            wanted = _ONLY.get(option, sizes.get(option))
            if value != wanted:
                why = "of this state_dict" if option in sizes else "because Hyena has no other"
                raise ValueError(f"{name}: {option} must be {wanted!r} ({why}), got {value!r}")
        elif option not in _IDLE:
            known = ", ".join(sorted({*_ONLY, *sizes, *_IDLE}))
            raise TypeError(f"{name}: unknown option {option!r}; there are {known}")
