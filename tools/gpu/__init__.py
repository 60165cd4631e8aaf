"""Everything at once on a machine with a CUDA device: `make gpu`. It installs and downloads nothing."""
