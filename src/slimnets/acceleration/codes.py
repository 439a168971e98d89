"""What a table of the engine says: its steps, the columns they use, and the register tiles.

``build`` writes a row for each step, which ``engine`` and ``glue`` read. A column means the same in
every step that uses it.
"""

try:
    from numba import config
    from numba.core.codegen import get_host_cpu_features  # without what its variables turn off

    _chosen = config.CPU_FEATURES  # type: ignore[attr-defined]
    _features = (get_host_cpu_features() if _chosen is None else _chosen).split(",")
    NO_ENGINE = ""
except Exception as error:  # also OSError and SystemError, where it does not fit LLVM or NumPy
    _features = []
    if isinstance(error, ModuleNotFoundError) and error.name == "numba":
        NO_ENGINE = "Numba is missing, and with it the engine: pip install slimnets[fast]"
    else:
        NO_ENGINE = f"Numba, and with it the engine, cannot be used here: {error}"

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

WIDE = "+avx512f" in _features
"""Whether there are 32 registers of 16 floats; else a fourth of that, as in AVX2 and NEON."""

FEW = 16
"""Least outputs of a group, which DENSE computes together."""

DENSE_KINDS = (
    *((FEW, *size) for size in (((1, 16),) if WIDE else ()) + ((1, 4), (2, 2), (1, 1))),
    *((2 * FEW, *size) for size in ((1, 8), (2, 4), (1, 4), (2, 2), (1, 1)) if WIDE),
)
"""The register tiles of DENSE, as (outputs, rows, width)."""
