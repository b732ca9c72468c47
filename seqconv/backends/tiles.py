"""Steps of a stream in torch, on any device (see seqconv.ops.stream). Spectra are those of torch.fft.rfft."""

import torch
from torch import Tensor

from seqconv.backends.protocol import BLOCK
from seqconv.reference import activate

TOGETHER = 4  # neighbouring channels that have one clock
GROUP = TOGETHER * BLOCK // 2  # channels
GOLDEN = 0x9E3779B1  # odd: its multiples have all residues modulo a power of two equally often


def sizes(period: int) -> list[int]:
    """The points of tiles."""
    return [BLOCK << i for i in range((period // BLOCK).bit_length())]


def clocks(clock: Tensor, channels: int, period: int, spread: bool) -> Tensor:
    """Of every row, (batch, channels). With `spread` channels are ahead of their sample by different numbers of steps
    and blocks, as csrc/cpu/stream.h says."""
    if not spread:
        return clock.unsqueeze(1).expand(-1, channels)
    channel = torch.arange(channels, device=clock.device)
    group, place = channel // GROUP, channel % GROUP // TOGETHER
    ahead = 2 * place + group % 2 + BLOCK * (group // 2 * GOLDEN)
    return (clock.unsqueeze(1) + ahead) % period


def first_clocks(batch: int, channels: int, period: int, spread: bool) -> Tensor:
    """The samples' clocks before any input. With `spread` the groups of all samples are apart as those of one sample
    are, one sample's behind those of the sample before."""
    if not spread:
        return torch.zeros(batch, dtype=torch.int64)
    groups = -(-channels // GROUP)
    before = torch.arange(batch) * (groups if groups < 2 else groups + groups % 2)
    return (before % 2 + BLOCK * (before // 2 * GOLDEN)) % period


def spectra(k: Tensor, period: int) -> Tensor:
    if not k.numel():  # which torch's transforms refuse
        return k.new_zeros(k.shape[:-1].numel() * sum(2 * (n + 1) for n in sizes(period)))
    found = []
    for n in sizes(period):
        spectrum = torch.fft.rfft(k[..., : 2 * n], 2 * n)  # (c h n + 1)
        found.append(torch.view_as_real(spectrum).flatten())
    return torch.cat(found)


def _spectrum(spectra: Tensor, n: int, heads: int, channels: int) -> Tensor:
    rows, begin = heads * channels, 0
    for m in sizes(n)[:-1]:
        begin += rows * 2 * (m + 1)
    part = spectra[begin : begin + rows * 2 * (n + 1)]
    return torch.view_as_complex(part.view(heads, channels, n + 1, 2))


def step(y, u, pre_gate, post_gate, rings, taps, spectra, activation, spread) -> None:
    inputs, sums, clock = rings
    batch, heads, channels = y.shape
    period = inputs.shape[1] * BLOCK
    end = clocks(clock, channels, period, spread) + 1  # (b h), where the clock is
    now = (end - 1).to(u.device)
    sample = torch.arange(batch, device=u.device).unsqueeze(1)
    channel = torch.arange(channels, device=u.device)
    block, s = now // BLOCK, now % BLOCK

    x = u.to(inputs.dtype)
    x = x if pre_gate is None else x * pre_gate.to(x.dtype)
    inputs[sample, block, channel, s] = x

    place = torch.arange(BLOCK, device=u.device)
    window = BLOCK - s.unsqueeze(-1) + place  # zeros, then k[0] from place s on
    window = window.unsqueeze(1).expand(-1, heads, -1, -1)
    near = taps.expand(batch, -1, -1, -1).gather(-1, window) * x[:, None, :, None]  # (b c h BLOCK)
    old = sums[sample, block, :, channel].movedim(-2, 1)
    here = (place == s.unsqueeze(-1)).unsqueeze(1)
    after = (place > s.unsqueeze(-1)).unsqueeze(1)
    v = torch.where(here, old + near, 0.0).sum(-1)
    new = torch.where(after, old + near, torch.where(here, 0.0, old))
    sums[sample, block, :, channel] = new.movedim(1, -2)
    v = activate(v, activation)
    y.copy_(v if post_gate is None else v * post_gate.to(v.dtype))

    for n in sizes(period):
        due = (end % n == 0) & ((end // n % 2 == 1) | (n == period))
        rows = due.nonzero()
        if len(rows):
            rows, ends = rows.to(u.device), end[due].to(u.device)
            _tile(inputs, sums, rows, ends, n, _spectrum(spectra, n, heads, channels))
    clock.add_(1).remainder_(period)


def _tile(
    inputs: Tensor, sums: Tensor, rows: Tensor, end: Tensor, n: int, spectrum: Tensor
) -> None:
    """The tiles of n points of some rows, (rows, 2): sample and channel."""
    count = inputs.shape[1]
    b, h = (t.unsqueeze(1) for t in rows.unbind(1))
    blocks = end.unsqueeze(1) // BLOCK + torch.arange(n // BLOCK, device=end.device)
    x = inputs[b, (blocks - n // BLOCK) % count, h].flatten(1)  # (rows, n)
    product = torch.fft.rfft(x, 2 * n).unsqueeze(1) * spectrum[:, h.squeeze(1)].movedim(0, 1)
    out = torch.fft.irfft(product, 2 * n)[..., n:].unflatten(
        -1, (-1, BLOCK)
    )  # (rows c blocks BLOCK)
    sums[b, blocks % count, :, h] += out.movedim(1, 2)
