"""Triton kernels, one module per op; imported only when Triton is installed and the backend is chosen."""
