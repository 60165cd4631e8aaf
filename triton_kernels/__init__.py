"""Triton kernels, one file for each op; they know nothing of the package that installs them."""
