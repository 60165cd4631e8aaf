"""The long checks that `make gates` runs; `python -m tools.gates --help` lists them."""
