"""What the steps in a table of the engine are called, and the register tiles there are.

``build`` writes these fields of a step, which ``engine`` and ``glue`` read by their numbers.
Places, rows (from one to the next), planes (from one channel to the next) and bases (from the start
of a plane to its first pixel) count floats in the arena; pairs are vertical and horizontal.

============== ==================================================================================
IMPORT, EXPORT 1 number of the tensor, 2 place, 3 channels, 4-5 size, 6 samples, 7 plane, 8 row,
               9 base
CONV           1 source, 2 target, 3 values*, 4 where each reads*, 5 pointers to the rows*, 6 rows*,
               7 blocks, 8 outputs, 9-10 steps from row to row of a tile in source and target,
               11 starts of tiles*, 12 tiles, 13 kind of tile, 14 bias*, 15 residual or -1,
               16 mask* or 0, 17 plane of the target; * is an address in bytes
DENSE          as CONV, but 3 values of one group of outputs after the other*, 4 where each column
               reads*, 5 where blocks of columns begin*, 6 first outputs of groups*, 8 groups,
               16 is 0, 18 groups whose values stay in the second-level cache
POOL           1 source, 2 target, 3 channels, 4 samples; of the source 5-6 size, 7 row, 8 base,
               9 plane; of the target 10-11 size, 12 row, 13 base, 14 plane; 15-16 kernel,
               17-18 stride, 19-20 padding, 21-22 dilation, 23 what it does
PHASE          1 source, 2 target, 3 channels, 4 samples; of the source 5-6 size, 7 row, 8 base,
               9 plane; of the target 10 row, 11 plane; 12-13 stride, 14-15 first pixel,
               16-17 size of the target
ADD, COPY      1 source, 2 target, 3 other source, 4 floats
============== ==================================================================================
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
