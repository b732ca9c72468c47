"""Mistakes in the CPU backend, one at a time: the operator's tests must catch each of them."""

import torch

from seqconv.backends import cpu
from seqconv.backends.inputs import Inputs

_forward, _backward = cpu.fftconv, cpu.fftconv_gradients


def forward(y, *args):
    *inputs, activation = args
    _forward(y, Inputs(*inputs), activation)


def backward(grads, dy, *args):
    *inputs, activation = args
    _backward(Inputs(*grads), dy, Inputs(*inputs), activation)


def zeros(y, u, *rest):
    y.zero_()


def shifted_tap(y, u, k, *rest):
    forward(y, u, k.roll(1, -1), *rest)


def dropped_skip(y, u, k, k_rev, skip, *rest):
    forward(y, u, k, k_rev, None, *rest)


def dropped_bias(y, *rest):
    forward(y, *rest[:6], None, rest[-1])


def swapped_gates(y, u, k, k_rev, skip, pre_gate, post_gate, *rest):
    if pre_gate is not None and post_gate is not None and pre_gate.shape == post_gate.shape:
        pre_gate, post_gate = post_gate, pre_gate
    forward(y, u, k, k_rev, skip, pre_gate, post_gate, *rest)


def leaked_future(y, u, *rest):
    forward(y, u, *rest)
    if y.shape == u.shape:
        y[..., :-1] += 1e-2 * u[..., 1:]


def one_wrong_element(y, *rest):
    forward(y, *rest)
    if y.numel() > 1000:
        y.view(-1)[y.numel() // 2] += y.abs().mean() if y.is_contiguous() else 0


def swapped_heads(y, u, k, *rest):
    forward(y, u, k.flip(-3) if k.dim() > 2 else k, *rest)


def dropped_activation(*args):
    forward(*args[:-1], "none")


def zero_gradients(grads, *rest):
    for grad in grads:
        if grad is not None:
            grad.zero_()


def _one_gradient(index, change):
    def mutant(grads, *rest):
        backward(grads, *rest)
        if grads[index] is not None and grads[index].numel():
            change(grads[index])

    return mutant


def last_sample_only(grads, dy, u, *rest):
    """dk as if the batch had not been summed over."""
    backward(grads, dy, u, *rest)
    if grads[1] is not None and len(u) > 1 and grads[1].dim() < 4:
        only = [None, torch.empty_like(grads[1]), *[None] * 5]
        gates = [t if t is None else t[-1:] for t in rest[3:5]]
        backward(only, dy[-1:], u[-1:], *rest[:3], *gates, *rest[5:])
        grads[1].copy_(only[1])


FORWARD = {
    f.__name__: f
    for f in (zeros, shifted_tap, dropped_skip, swapped_gates, leaked_future, dropped_bias)
}
FORWARD |= {f.__name__: f for f in (one_wrong_element, swapped_heads, dropped_activation)}
BACKWARD = {f.__name__: f for f in (zero_gradients, last_sample_only)}
BACKWARD |= {
    "shifted_dk": _one_gradient(1, lambda g: g.copy_(g.roll(1, -1))),
    "shifted_dk_rev": _one_gradient(2, lambda g: g.copy_(g.roll(-1, -1))),
    "negative_du": _one_gradient(0, lambda g: g.neg_()),
    "scaled_dskip": _one_gradient(3, lambda g: g.mul_(1.01)),
    "swapped_dgates": _one_gradient(4, lambda g: g.copy_(g.flip(-1))),
    "scaled_dpost": _one_gradient(5, lambda g: g.mul_(0.5)),
    "scaled_dbias": _one_gradient(6, lambda g: g.mul_(1.01)),
}


def planted(name: str):
    """Which function of the CPU backend a mistake takes the place of, and what it puts there."""
    if name in FORWARD:
        return "fftconv", lambda y, inputs, activation: FORWARD[name](y, *inputs, activation)
    return "fftconv_gradients", lambda grads, dy, inputs, activation: BACKWARD[name](
        grads, dy, *inputs, activation
    )
