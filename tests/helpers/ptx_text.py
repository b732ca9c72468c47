"""Small kernels written as PTX, to run on the PTX machine."""

import ptx_device
import torch

HEAD = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 shared[];
.visible .entry k(
\t.param .align 8 .b8 k_param_0[16]
)
.maxntid 512, 1, 1
{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %d<9>;
ld.param.u64 %d1, [k_param_0]; ld.param.u64 %d2, [k_param_0+8];
mov.u32 %r1, %tid.x; mul.wide.u32 %d3, %r1, 64; add.s64 %d1, %d1, %d3; add.s64 %d2, %d2, %d3;
shl.b32 %r2, %r1, 2; mov.u32 %r3, shared; add.s32 %r2, %r2, %r3;
"""  # d1, d2: the thread's 16 words of the input and of the output; r2: a word of shared memory of its own


WORD = torch.int32


OWN = "st.shared.u32 [%r2], %r1; "


def run(
    body,
    given=None,
    threads=32,
    grid=1,
    order=0,
    shared=1024,
    races=3,
    copies=0,
    mma=0,
    bounded=True,
    rows=None,
):
    """The output, 16 words for every thread, of a kernel that reads `given`."""
    rows = threads if rows is None else rows
    given = torch.zeros(rows, 16, dtype=WORD) if given is None else given
    out = torch.zeros(rows, 16, dtype=WORD)
    arguments = torch.tensor([given.data_ptr(), out.data_ptr()])
    options = ptx_device.Launch(grid, threads, shared, order, races, mma, copies)
    program = ptx_device.Program(HEAD + body + "\nret;\n}\n")
    program.launch(options, arguments.data_ptr(), ptx_device.living_memory() if bounded else [])
    return out


def loads(*names: str, kind: str = "u32") -> str:
    return "".join(f"ld.global.{kind} {name}, [%d1+{4 * i}];\n" for i, name in enumerate(names))


def stores(*names: str, kind: str = "u32") -> str:
    return "".join(f"st.global.{kind} [%d2+{4 * i}], {name};\n" for i, name in enumerate(names))
