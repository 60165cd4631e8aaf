"""The `torch.autograd.Function`s around the ops, one file per op."""
