import pytest
from guarded import GuardedRecipe

from seqconv.backends.cuda import convolution


@pytest.fixture(autouse=True)
def guarded_scratch(request, monkeypatch):
    """Scratch memory on the host is watched; a GPU's memory cannot be looked at from here."""
    if request.path.parent.name != "gpu":
        monkeypatch.setattr(convolution, "Recipe", GuardedRecipe)
