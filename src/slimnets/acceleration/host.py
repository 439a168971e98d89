"""What there is to compute with here: whether the engine can be compiled, and for which vectors.

``NO_ENGINE`` says why it cannot; it is empty where it can.
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

WIDE = "+avx512f" in _features
"""Whether there are 32 registers of 16 floats; else a fourth of that, as in AVX2 and NEON."""
