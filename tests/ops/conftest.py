"""The fixtures of the emulated CUDA kernels, for the tests of ops."""

from cuda.conftest import cuda_on_cpu, emulated  # noqa: F401
