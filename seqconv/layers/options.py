"""What to say of a keyword that a layer does not know: most are other repositories' names for something."""

import difflib

_MEANT = {  # there: here, where the layer has it
    "L": "l_max",
    "l_seq": "l_max",
    "seq_len": "l_max",
    "max_seq_len": "l_max",
    "H": "d_model",
    "dim": "d_model",
    "d_input": "d_model",
    "hidden_size": "d_model",
    "N": "d_state",
    "state_size": "d_state",
    "channels": "heads",
    "n_heads": "heads",
    "num_heads": "heads",
    "nhead": "heads",
    "disc": "discretization",
    "measure": "init",
    "weight_init": "init",
    "final_act": "postact",
    "smooth_kernel": "smooth",
    "causal": "bidirectional",
    "lr": "kernel_lr",
    "learning_rate": "kernel_lr",
    "kernel_learning_rate": "kernel_lr",
    "filter_order": "filter_width",
    "num_inner_mlps": "filter_layers",
    "w": "filter_frequency",
}
_OUTSIDE = "it is not part of the layer: put it around"
_MAMBA = "it belongs to Mamba, whose parameters depend on the input; nothing here does that"
_FIXED = "it is not a choice here"
_ELSEWHERE = {
    "transposed": "x is always (batch, length, d_model)",
    "batch_first": "x is always (batch, length, d_model)",
    "wd": "weight decay is seqconv.param_groups's",
    "weight_decay": "weight decay is seqconv.param_groups's",
    "device": "move the layer by .to(device)",
    "dtype": "cast the layer by .to(dtype)",
    "weight_norm": "apply torch.nn.utils.parametrizations.weight_norm to layer.linear",
    "return_state": "init_state, prefill and step of a causal S4D have the state",
    "rank": "A is diagonal here: S4's low rank part is not there",
    "deltas": "A is diagonal here: S4's shift kernel is not there",
    "shift": "A is diagonal here: S4's shift kernel is not there",
    "dt_fast": "dt_sinh is what became of it in S4",
    **dict.fromkeys(
        ("bottleneck", "gate", "gate_act", "mult_act", "ln", "norm", "residual"), _OUTSIDE
    ),
    **dict.fromkeys(("prenorm", "layer_norm", "inner_factor", "post_order_ffn"), _OUTSIDE),
    **dict.fromkeys(("d_conv", "expand", "dt_rank", "headdim", "ngroups", "conv_bias"), _MAMBA),
    **dict.fromkeys(("dt_init", "dt_scale", "dt_init_floor"), _MAMBA),
    **dict.fromkeys(
        ("layer", "linear", "hyper_act", "verbose", "use_fast_path", "jit_filter"), _FIXED
    ),
    **dict.fromkeys(("use_fast_fftconv", "fused_fft_conv", "fused_bias_fc", "num_blocks"), _FIXED),
    **dict.fromkeys(("short_filter_order", "outer_mixing", "filter_cls", "initializer"), _FIXED),
}
_OF_A_LAYER = {
    "S4D": dict.fromkeys(("l_max", "L", "l_seq", "seq_len", "max_seq_len"), "S4D takes any length")
    | {"mode": "S4D is s4's mode='s4d' or 'diag'; init has the initial modes"},
    "SGConv": {
        "mode": "its words are the options upsample, combine, init and decay: see SGConvKernel"
    },
    "LongConv": {"mode": "the kernel's form is set by init, lam and smooth"},
    "ButterflyConv": {"bidirectional": "learned transforms have no past and future to tell apart"},
    "Hyena": dict.fromkeys(("heads", "channels", "num_heads", "nhead"), "Hyena has one head")
    | dict.fromkeys(("bidirectional", "causal"), "Hyena is causal")
    | dict.fromkeys(("dropout", "filter_dropout"), "Hyena has no dropout: put it around")
    | dict.fromkeys(("activation", "postact"), "Hyena has gates in the place of activations"),
}


def hint(layer: type, name: str, known: list[str]) -> str:
    """What to use in the place of keyword `name`, which is none of those known to a layer's class."""
    if _MEANT.get(name) in known:
        return f"did you mean {_MEANT[name]}?"
    for base in layer.__mro__:
        if name in _OF_A_LAYER.get(base.__name__, ()):
            return _OF_A_LAYER[base.__name__][name]
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    near = difflib.get_close_matches(name, known)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
