"""What the steps in a table of the engine are called, and the register tiles there are."""

IMPORT, EXPORT, CONV, POOL, ADD, PHASE, COPY = range(7)

SUM, LARGEST, HALVE = range(3)
"""What a pooling step does; the last is the largest of every 2 x 2 pixels."""

KINDS = ((1, 1), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (2, 32), (4, 16), (8, 8), (4, 4))
"""The register tiles, as (rows, width): width floats in each of some rows."""
