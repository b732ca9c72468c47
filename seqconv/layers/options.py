"""The keyword options of layers: one place for each default, and advice for keywords that a layer does not have.

Most unknown keywords are the names that other repositories give to an option.
"""

import difflib
import inspect
from types import SimpleNamespace
from typing import Any

_MEANT = {  # the name in other repositories: the name here, of an option that some layers have
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
    | dict.fromkeys(("activation", "postact"), "Hyena has gates in the place of activations")
    | {"shift": "did you mean filter_shift?", "lr_pos_emb": "did you mean filter_table_lr?"},
}


class Defaults(SimpleNamespace):
    """The options of a class with their defaults: Defaults(S4DKernel).d_state is 64.

    A default is written in one signature, that of the class which uses the option. A layer that passes the
    option on spells it in its own signature, for editors and type checkers, and takes the default from here.
    """

    def __init__(self, owner: type):
        parameters = inspect.signature(owner).parameters.values()
        super().__init__(**{p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})

    def among(self, values: dict[str, Any], **others: Any) -> dict[str, Any]:
        """The options of the class that are among the values, a layer's locals(), and others in their place."""
        return {name: values[name] for name in vars(self) if name in values} | others


def refuse(layer: object, owner: type, unknown: dict[str, Any]) -> None:
    """Raises TypeError with advice if `unknown`, the keywords that owner.__init__ does not have, is not empty."""
    for name in unknown:
        text = f"unknown keyword {name!r}; {hint(owner, name)}"
        raise TypeError(f"{type(layer).__name__}: {text}")


def hint(layer: type, name: str) -> str:
    """Advice for the keyword `name`, which the class of a layer does not have."""
    parameters = inspect.signature(layer).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if _MEANT.get(name) in known:
        return f"did you mean {_MEANT[name]}?"
    for base in layer.__mro__:
        if name in _OF_A_LAYER.get(base.__name__, ()):
            return _OF_A_LAYER[base.__name__][name]
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    near = difflib.get_close_matches(name, known)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
