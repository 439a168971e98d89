"""What a table of the engine says: its steps, the columns they use, and the register tiles.

``build`` writes a row for each step, which ``engine`` and ``glue`` read. A column means the same in
every step that uses it.
"""

from slimnets.acceleration.host import WIDE

IMPORT, EXPORT, CONV, POOL, ADD, PHASE, COPY, DENSE = range(8)

# fmt: off
(
    CODE,  # one of the steps above
    SOURCE, OTHER, TARGET, PLACE,  # in the arena; the last of what comes in or goes out
    NUMBER,  # of the tensor that comes in or goes out
    CHANNELS, SAMPLES, HEIGHT, WIDTH, ROW, BASE, PLANE,  # of the source, or of what is at PLACE
    OUT_HEIGHT, OUT_WIDTH, OUT_ROW, OUT_BASE, OUT_PLANE,  # of the target
    FLOATS,  # of a sum or copy
    # pooling, and the phases of a strided convolution
    KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X,
    POOLING,  # what a pooling step does
    FIRST_Y, FIRST_X,  # the first pixel of a phase
    # convolutions
    VALUES,  # of the non-zeros; of DENSE, one group of outputs after the other
    OFFSETS,  # where each non-zero, or column of DENSE, reads
    POINTERS,  # where the rows of CONV begin, or the blocks of columns of DENSE
    ROWS,  # which output each of them is
    FIRSTS,  # the first outputs of groups
    BIAS, MASK,  # the second is 0 if there is none
    STARTS,  # of the tiles, in source and target
    BLOCKS, OUTPUTS, GROUPS, TILES,  # how many there are
    TILE,  # its kind
    X_STEP, Y_STEP,  # from row to row of a tile, in source and target
    RESIDUAL,  # its place, or -1
    AT_ONCE,  # groups whose values stay in the second-level cache
) = range(47)
# fmt: on
"""The columns. Places, rows (from one to the next), planes (from one channel to the next), bases
(from the start of a plane to its first pixel) and steps count floats in the arena."""

FIELDS = AT_ONCE + 1
ADDRESSES = (VALUES, OFFSETS, POINTERS, ROWS, FIRSTS, BIAS, MASK, STARTS)
"""The columns that are addresses, in bytes."""

SUM, LARGEST, HALVE = range(3)
"""What a pooling step does; the last is the largest of every 2 x 2 pixels."""

KINDS = ((1, 1), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (2, 32), (4, 16), (8, 8), (4, 4))
"""The register tiles of CONV, as (rows, width): width floats in each of some rows."""

FEW = 16
"""Least outputs of a group, which DENSE computes together."""

DENSE_KINDS = (
    *((FEW, *size) for size in (((1, 16),) if WIDE else ()) + ((1, 4), (2, 2), (1, 1))),
    *((2 * FEW, *size) for size in ((1, 8), (2, 4), (1, 4), (2, 2), (1, 1)) if WIDE),
)
"""The register tiles of DENSE, as (outputs, rows, width)."""
