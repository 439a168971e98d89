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
POOL           1 source, 2 target, 3 channels, 4 samples; of the source 5-6 size, 7 row, 8 base,
               9 plane; of the target 10-11 size, 12 row, 13 base, 14 plane; 15-16 kernel,
               17-18 stride, 19-20 padding, 21-22 dilation, 23 what it does
PHASE          1 source, 2 target, 3 channels, 4 samples; of the source 5-6 size, 7 row, 8 base,
               9 plane; of the target 10 row, 11 plane; 12-13 stride, 14-15 first pixel,
               16-17 size of the target
ADD, COPY      1 source, 2 target, 3 other source, 4 floats
============== ==================================================================================
"""

IMPORT, EXPORT, CONV, POOL, ADD, PHASE, COPY = range(7)

SUM, LARGEST, HALVE = range(3)
"""What a pooling step does; the last is the largest of every 2 x 2 pixels."""

KINDS = ((1, 1), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (2, 32), (4, 16), (8, 8), (4, 4))
"""The register tiles, as (rows, width): width floats in each of some rows."""
