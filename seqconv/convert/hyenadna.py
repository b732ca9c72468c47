"""HyenaDNA from its published checkpoints, those of its own repository and of the Hugging Face port."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqconv.convert.checkpoint import Checkpoint, check_state_dict
from seqconv.convert.hyena import load_hyena
from seqconv.models.hyenadna import HyenaDNA

_EMBEDDING = "backbone.embeddings.word_embeddings.weight"
_SHIFT = 0.05  # of the decay, in HyenaDNA's standalone file and in the port
_NAME = "load_hyenadna"
_FILES = ("model.safetensors", "weights.ckpt", "pytorch_model.bin")
_HF = {  # options of the mixers in the port's configuration: their names in the repository's
    "hyena_order": "order",
    "max_seq_len": "l_max",
    "filter_order": "filter_order",
    "emb_dim": "emb_dim",
    "num_inner_mlps": "num_inner_mlps",
    "short_filter_order": "short_filter_order",
    "activation_freq": "w",
    "hyena_dropout": "dropout",
}


def load_hyenadna(
    source: dict[str, Tensor] | str | os.PathLike,
    config: dict[str, Any] | None = None,
    *,
    shift: float | None = None,
    interleaved: bool | None = None,
) -> HyenaDNA:
    """The language model of a HyenaDNA checkpoint, which computes the same and generates step by step.

    Takes the keys of HyenaDNA's repository (backbone.layers.0.mixer..., also after "model.", and with the ".layer"
    that gradient checkpointing puts there) and those of its Hugging Face port (hyena.backbone.layers.0.mixer...), with
    or without lm_head. Sizes follow from shapes.

    Args:
        source: a state_dict, or the path of a folder with config.json and one of model.safetensors, weights.ckpt or
            pytorch_model.bin. The first needs the package safetensors and is left to the others without it. The
            others are read by torch.load with weights_only=True.
        config: the dictionary of config.json, in place of the folder's. Without one the norms add 1e-5 to the
            variance, and there is no dropout.
        shift: what the filters add to their decay, which the checkpoint does not hold: by default that of the
            configuration's "layer", and otherwise 0.05, as in HyenaDNA's standalone file and in the port.
        interleaved: for layers of order > 2, see load_hyena. Published models have order 2.

    Returns:
        A seqconv.models.HyenaDNA in evaluation mode, on the embedding's device and in its dtype. The sum of the
        blocks is float32 in half precision if the configuration says residual_in_fp32, and for the port's keys.

    Raises:
        ValueError: a key is missing or unknown (those of attention, of positions and of other heads), sizes differ
            from the configuration's, or a layer has an option that Hyena has no counterpart of.
        TypeError: source is neither of both, a value in it is no tensor, or config is no dictionary.
        FileNotFoundError: the folder lacks a file.

    Source: arXiv 2306.15794.
    """
    if not isinstance(source, Mapping):
        if not isinstance(source, (str, os.PathLike)):
            wanted = "source must be a state_dict or the path of a folder"
            raise TypeError(f"{_NAME}: {wanted}, got {type(source).__name__}")
        folder = Path(source)
        config = json.loads((folder / "config.json").read_text()) if config is None else config
        source = _weights(folder)
    if config is not None and not isinstance(config, Mapping):
        wanted = "config must be the dictionary of config.json"
        raise TypeError(f"{_NAME}: {wanted}, got {type(config).__name__}")
    check_state_dict(_NAME, source)
    config = {} if config is None else dict(config)
    embedding = next((key for key in source if key.endswith(_EMBEDDING)), None)
    if embedding is None:
        raise ValueError(f"{_NAME}: state_dict must have a key that ends in {_EMBEDDING!r}")
    prefix = embedding.removesuffix(_EMBEDDING)
    ported = prefix.endswith("hyena.")
    above = prefix.removesuffix("hyena.")
    unknown = [key for key in source if not key.startswith((prefix, above + "lm_head."))]
    if unknown:
        raise ValueError(f"{_NAME}: unknown keys in state_dict: {', '.join(unknown[:4])}")
    plain = {}
    for key, tensor in source.items():
        key = key.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")
        plain[key.removeprefix(prefix if key.startswith(prefix) else above)] = tensor

    checkpoint = Checkpoint(_NAME, plain, "")
    words = checkpoint.take(_EMBEDDING)
    vocab, d = checkpoint.check(_EMBEDDING, words, (("vocab_size", None), ("d_model", None))).shape
    head = checkpoint.take("lm_head.weight") if checkpoint.find("lm_head.weight") else None
    tied = config.get("tie_word_embeddings", not ported) or head is None
    if head is not None:
        checkpoint.check("lm_head.weight", head, (("vocab_size", vocab), ("d_model", d)))
        if tied and not torch.equal(head, words):
            wanted = "lm_head.weight must be the embedding's, because they are tied"
            raise ValueError(f"{_NAME}: {wanted}, but differs")
    options = _mixer_options(config, ported, shift)
    mixers, parts, depth = [], [], 0
    while any(key.startswith(f"backbone.layers.{depth}.") for key in checkpoint.rest):
        block = f"backbone.layers.{depth}."
        own = {k: checkpoint.take(k) for k in list(checkpoint.rest) if k.startswith(block)}
        mixer = {k: t for k, t in own.items() if k.startswith(block + "mixer.")}
        mixers.append(
            load_hyena(mixer, prefix=block + "mixer.", interleaved=interleaved, **options)
        )
        parts.append(Checkpoint(_NAME, {k: t for k, t in own.items() if k not in mixer}, block))
        depth += 1
    if not depth:
        raise ValueError(f"{_NAME}: state_dict must have keys {prefix}backbone.layers.0....")
    d_inner = parts[0].rest["mlp.fc1.weight"].shape[0] if "mlp.fc1.weight" in parts[0].rest else 0
    multiple = config.get("pad_vocab_size_multiple", 1)
    sizes = {"d_model": d, "n_layer": depth, "d_inner": d_inner}
    if "vocab_size" in config:
        sizes["vocab_size"] = config["vocab_size"]
        padded = -(-config["vocab_size"] // multiple) * multiple
        if padded != vocab:
            wanted = f"must have {padded} rows, vocab_size in steps of pad_vocab_size_multiple"
            raise ValueError(f"{_NAME}: {_EMBEDDING} {wanted}, got {vocab}")
    for size, value in sizes.items():
        if config.get(size, value) not in (value, None):
            raise ValueError(f"{_NAME}: config's {size} must be {value}, got {config[size]!r}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    model = HyenaDNA(
        mixers,
        vocab=vocab,
        d_inner=d_inner or None,
        tied=bool(tied),
        epsilon=1e-5 if ported else epsilon,  # The port's configuration reaches the last norm only.
        last_epsilon=epsilon,
        wide_sum=ported or bool(config.get("residual_in_fp32", False)),
        embed_dropout=config.get("embed_dropout", 0.1) if config and not ported else 0.0,
        resid_dropout=config.get("resid_dropout", 0.0) if not ported else 0.0,
    ).to(device=words.device, dtype=words.dtype)
    with torch.no_grad():
        model.embedding.weight.copy_(words)
        if head is not None and not tied:
            model.head.weight.copy_(head)
        _fill(model.norm, checkpoint, "backbone.ln_f.")
        for block, part in zip(model._blocks(), parts, strict=True):
            for i in range(2):
                _fill(block.norms[i], part, f"norm{i + 1}.")
                _fill(block.network[i], part, f"mlp.fc{i + 1}.")
            part.refuse_rest()
    checkpoint.refuse_rest()
    return model.eval()


def _fill(module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    for key, parameter in module.named_parameters():
        sizes = [(f"axis {i}", size) for i, size in enumerate(parameter.shape)]
        tensor = checkpoint.check(name + key, checkpoint.take(name + key), tuple(sizes))
        parameter.copy_(tensor)


def _mixer_options(config: dict, ported: bool, shift: float | None) -> dict[str, Any]:
    """The options of load_hyena that the configuration says."""
    options = dict(config.get("layer") or {})
    if ported or "layer" not in config:
        options = {ours: config[theirs] for theirs, ours in _HF.items() if theirs in config}
    for rate in ("lr", "lr_pos_emb"):
        if rate in options:  # A configuration may hold "6e-4" as text.
            options[rate] = float(options[rate])
    default = options.pop("shift", _SHIFT)
    return options | {"shift": default if shift is None else shift}


def _weights(folder: Path) -> dict[str, Tensor]:
    missing = ""
    for name in _FILES:
        path = folder / name
        if not path.exists():
            continue
        if name.endswith(".safetensors"):
            try:
                from safetensors.torch import load_file
            except ImportError:
                missing = " (model.safetensors is there, but the package safetensors is not)"
                continue
            return load_file(str(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found.get("state_dict", found)
    wanted = ", ".join(_FILES)
    raise FileNotFoundError(f"{_NAME}: {folder} must hold one of {wanted}, got none{missing}")
