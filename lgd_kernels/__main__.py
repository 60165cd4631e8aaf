"""`python -m lgd_kernels`: what is built, and what serves which device."""

from lgd_kernels.backends import show_backends

show_backends()
