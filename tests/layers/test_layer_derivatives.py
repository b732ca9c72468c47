"""Derivatives of layers: per sample on padded data, and of the second order in every mixture of modes."""

import pytest
import torch
from layer_table import EVERY, LAYERS, D
from torch.func import jacfwd, jacrev

OPTIONS = {"plain": {}, "two-sided": {"bidirectional": True}, "heads": {"heads": 3}}


@pytest.mark.parametrize("name", EVERY)
def test_per_sample_gradients_of_padded_data(name):
    """vmap over lengths, and over masks of both kinds, which checks them as eager calls do."""
    layer = EVERY[name]().double()
    x = torch.randn(3, 20, D, dtype=torch.float64)
    lengths = torch.tensor([20, 7, 0])
    padding = torch.arange(20) >= lengths[:, None]
    floats = torch.zeros(3, 20, dtype=torch.float64).masked_fill(padding, -torch.inf)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, given, option):
        options = {option: given.unsqueeze(0)}
        return torch.func.functional_call(layer, parameters, (x.unsqueeze(0),), options).square()

    def per_sample(given, option):
        call = torch.func.grad(lambda *args: loss(*args, option).sum())
        return torch.func.vmap(call, (None, 0, 0))(parameters, x, given)

    found = [
        per_sample(lengths, "lengths"),
        per_sample(padding, "mask"),
        per_sample(floats, "mask"),
    ]
    for i in range(3):
        y = layer(x[i : i + 1], padding[i : i + 1])
        wanted = torch.autograd.grad(y.square().sum(), parameters.values(), allow_unused=True)
        for n, g in zip(parameters, wanted, strict=True):
            for grads in found:
                torch.testing.assert_close(grads[n][i], g, rtol=1e-8, atol=1e-10)
    for given, option, text in (
        (lengths + 1, "lengths", "lengths must be between 0 and length=20"),
        (floats + torch.tensor([[1.0], [0.0], [0.0]]), "mask", "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=text):
            per_sample(given, option)
        with pytest.raises(ValueError, match=text):
            layer(x, **{option: given})
    nested = torch.func.vmap(torch.func.vmap(lambda x, n: layer(x, lengths=n)))
    y = nested(torch.stack([x, 2 * x]).unsqueeze(2), lengths.expand(2, 3).unsqueeze(2))
    torch.testing.assert_close(y[1, :, 0], layer(2 * x, lengths=lengths))


SECOND = {
    "forward over forward": lambda g: jacfwd(jacfwd(g, 0), 1),
    "forward over reverse": lambda g: jacfwd(jacrev(g, 0), 1),
    "reverse over forward": lambda g: jacrev(jacfwd(g, 0), 1),
    "reverse over reverse": lambda g: jacrev(jacrev(g, 0), 1),
}
TWICE = [
    *((name, {}) for name in EVERY),
    *((name, {"activation": "silu"}) for name in LAYERS),
    *(
        ("s4d", {"discretization": name, "d_state": 8})
        for name in ("bilinear", "dss", "dss_softmax")
    ),
    (
        "s4d",
        {"dt_transform": "softplus", "real_transform": "softplus", "imag_transform": "softplus"},
    ),
    ("s4d", {"bidirectional": True, "heads": 2, "bandlimit": 0.5, "real_transform": "sigmoid"}),
    ("s4d", {"init": "legs", "d_state": 8, "dt_tie": False, "dt_sinh": True, "postact": None}),
    ("long_conv", {"smooth": "time", "bidirectional": True}),
    ("long_conv", {"smooth": "frequency"}),
    ("sgconv", {"combine": "sum", "bidirectional": True}),
    ("hyena", {"order": 3}),
    ("butterfly", {"additive": True, "dft_activation": "gelu", "butterfly_heads": 2}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("name, options", TWICE, ids=str)
def test_second_derivatives_of_layers(name, options, how):
    """Of every parameter and the input at once, along two directions, against finite differences."""
    layer = EVERY[name](**options).double()
    x = torch.randn(1, 12, D, dtype=torch.float64)
    point = {"x": x} | {n: p.detach() for n, p in layer.named_parameters()}
    first, second = ({n: 0.3 * torch.randn_like(t) * t for n, t in point.items()} for _ in range(2))

    def along(s, t):
        moved = {n: p + s * first[n] + t * second[n] for n, p in point.items()}
        x = moved.pop("x")
        return torch.func.functional_call(layer, moved, (x,)).square().sum()

    zero, h = torch.zeros((), dtype=torch.float64), 2e-4
    with torch.no_grad():
        corners = [[along(zero + s, zero + t) for t in (-h, h)] for s in (-h, h)]
    wanted = (corners[1][1] - corners[1][0] - corners[0][1] + corners[0][0]) / (4 * h * h)
    found = SECOND[how](along)(zero, zero)
    assert abs(wanted) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=3e-5, atol=1e-5)
