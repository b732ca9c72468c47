"""Every example does what it says."""

import importlib

import pytest

EXAMPLES = {"transformer_encoder": 0.1, "checkpointing": 0.8, "bert": 0.75, "gpt2": 0.6}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES][1:]


@pytest.mark.parametrize("name", ["transformer_encoder", *SLOW])
def test_example(name, capsys):
    if name in ("bert", "gpt2"):
        pytest.importorskip("transformers")
    first, last, change = importlib.import_module(f"bench.examples.{name}").main()
    assert last < EXAMPLES[name] * first
    assert change < (1e-4 if name == "gpt2" else 1e-6)  # the future goes through a transform
    assert "loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.one_of(4)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_layer_runs_in_a_program_without_python(capsys):
    """The example compares the outputs, and exits where they differ."""
    importlib.import_module("bench.examples.aot_inductor").main()
    assert "(3, 1000, 16)" in capsys.readouterr().out
