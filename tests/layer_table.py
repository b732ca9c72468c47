"""Every layer, by name, as the common tests make it: a new layer is a row here."""

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv

D = 6
LAYERS = {
    "s4d": lambda **options: S4D(D, **options),
    "long_conv": lambda **options: LongConv(D, l_max=80, **{"kernel_dropout": 0.0} | options),
    "sgconv": lambda **options: SGConv(D, l_max=80, **options),
}
EVERY = LAYERS | {
    "hyena": lambda **options: Hyena(D, l_max=80, **options),
    "butterfly": lambda **options: ButterflyConv(D, l_max=80, **{"kernel_dropout": 0.0} | options),
    "sgconv, power": lambda **options: SGConv(D, l_max=80, decay="power", **options),
    "s4d, real": lambda **options: S4D(D, init="real", is_real=True, **options),
}
