"""The tests test: each deliberate mistake in the operator must make a case of its suite fail."""

import pytest
import torch
from mutations import BACKWARD, FORWARD, planted
from operator_cases import CASES, check_accuracy

from seqconv.backends import cpu


def first_failure() -> str | None:
    """What the first of the operator's cases that fails says, seeded as each test of the suite is."""
    for case in CASES:
        torch.manual_seed(0)
        try:
            check_accuracy(case)
        except AssertionError as error:
            return f"{case}: {error}"
    return None


def test_the_cases_pass_without_a_mutation():
    assert first_failure() is None


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_mutation_is_caught(name, monkeypatch):
    monkeypatch.setattr(cpu, *planted(name))
    assert first_failure() is not None
