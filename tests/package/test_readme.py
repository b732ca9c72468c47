"""The README's Python runs as printed, its commands exist, and its numbers of parameters are right."""

import re
from pathlib import Path

import torch

import seqconv

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order():
    channels, length = 256, 300
    u = torch.randn(2, channels, length)
    padding = torch.zeros(2, length, dtype=torch.bool)
    names = {
        "x": torch.randn(2, length, channels),
        "length": length,
        "padding": padding,
        "model": seqconv.S4D(8),
        "u": u,
        "k": torch.randn(channels, length),
        "skip": torch.randn(channels),
        "k_rev": torch.randn(channels, 100),
        "pre": torch.randn_like(u),
        "post": torch.randn_like(u),
        "log_dt": torch.randn(channels) - 4,
        "A": -torch.rand(channels, 4, 2),
        "B": torch.ones(channels, 4, 2),
        "C": torch.randn(1, channels, 4, 2),
    }
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 5
    for snippet in snippets:
        exec(snippet, names)
    assert names["y"].shape == u.shape
    logits = names["Classifier"](3, 32, 10)(torch.randn(2, length, 3))
    assert logits.shape == (2, 10)


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test", "lint"} <= named <= targets


def test_parameter_counts():
    from bench.lra.model import SequenceClassifier
    from bench.lra.recipes import recipe

    for layer in ("s4d", "long_conv"):
        made = recipe("mnist5k", layer)
        sizes = {"classes": 10, "l_max": 784, "channels": 1}
        model = SequenceClassifier(layer, made.model, made.kernel, **sizes)
        count = sum(p.numel() for p in model.parameters())
        assert f"| {count:,} |" in README, f"{layer} has {count:,} parameters"
