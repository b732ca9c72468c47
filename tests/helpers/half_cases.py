"""Problems for the kernels of 16-bit rows on tensor cores: one for every number of points and every form."""

import os
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from cases import Case
from emulated import forget_recipes

from seqconv.backends.cuda import plan
from seqconv.backends.cuda.kernels import half_shape

BOTH = {"pre_gate": True, "post_gate": True}
# What a form's rows do beside the convolution, and by how much they are shorter than the transform.
OF_FORMS = {
    "": (0, {}),
    "_gelu": (0, {"activation": "gelu"}),
    "_gated": (0, BOTH),
    "_ragged": (24, {}),
    "_ragged_gelu": (8, {"activation": "gelu"}),
    "_ragged_gated": (8, BOTH),
    "_any": (1, {"post_gate": True, "activation": "silu"}),
}


ASKED = os.environ.get("SEQCONV_COMPILE", "0")  # as in test_cuda_compile.py


def some(things, count: int) -> list:
    """`count` of the things, which are others at each commit, or all of them."""
    things = list(things)
    if ASKED == "all":
        return things
    return [things[(count * int(ASKED) + i) % len(things)] for i in range(min(count, len(things)))]


def sampled(parameters, count: int) -> list:
    """All parameters that are not marked slow, and `count` of those that are, which are others at each commit."""
    parameters = list(parameters)
    return [p for p in parameters if not p.marks] + some([p for p in parameters if p.marks], count)


def half_case(n: int, form: str, dtype=torch.bfloat16, batch: int = 3, channels: int = 2) -> Case:
    """A problem that the kernel of this form takes in one window."""
    less, options = OF_FORMS[form]
    # The skip's gradient has the errors of v then, and may be small by chance where channels are few.
    channels = 4 if "activation" in options else channels
    case = Case(batch, channels, n - less, n - less, skip="h", dtype=dtype, **options)
    return replace(case, taps_rev=case.length // 2 - 1)


def forms_of(n: int) -> list[str]:
    """The forms that forward has for n points; backward has some of them. Gradients of gelu's rows launch "_slope"."""
    return [form for form in OF_FORMS if half_shape(False, n, form)]


def half_launches(device) -> set[str]:
    return {kernel for kernel, *_ in device.launches if kernel.startswith("half")}


@contextmanager
def tensor_cores_only():
    """Within it the planner knows no kernels for float32 rows. So it takes others, whatever its model says."""
    with (
        patch.object(plan, "one_pass", lambda *_: None),
        patch.object(plan, "three_passes", lambda *_: []),
    ):
        plan.make_plan.cache_clear()
        forget_recipes()
        try:
            yield
        finally:
            plan.make_plan.cache_clear()
            forget_recipes()
