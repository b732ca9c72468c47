"""How long the way is from a layer's forward to the kernels, for somebody who follows it in the source."""

import sys
from itertools import pairwise
from pathlib import Path

import torch

import seqconv


def test_following_s4d_takes_few_functions_and_files():
    """The package's own functions are counted, torch's are not; kernel generation is included."""
    layer, x = seqconv.S4D(16), torch.randn(2, 100, 16)
    root, entered = str(Path(seqconv.__file__).parent), []

    def profile(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(root):
            entered.append(file)

    for _ in range(2):  # the first call fills caches
        entered.clear()
        usual = sys.getprofile()
        sys.setprofile(profile)
        try:
            layer(x)
        finally:
            sys.setprofile(usual)
    changes = sum(a != b for a, b in pairwise(entered))
    assert 20 < len(entered) <= 60 and 5 < changes <= 12
