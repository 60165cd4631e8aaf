"""What goes on inside a decoupled net, layer by layer.

A residual that vanishes does not say that the layers learn the right thing, and neither does accuracy on an easy data
set: look at the cosine of each layer's gradient with backpropagation's.

measure.py    the measurements
plot.py       a picture of them
"""

from lgd_kernels.diagnostics.measure import (
    Comparison,
    Diagnostics,
    SampleGradientNorms,
    compare_with_backpropagation,
    diagnose,
    feed_forward_gap,
    sample_gradient_norms,
)
from lgd_kernels.diagnostics.plot import plot_diagnostics

__all__ = [
    "Comparison",
    "Diagnostics",
    "SampleGradientNorms",
    "compare_with_backpropagation",
    "diagnose",
    "feed_forward_gap",
    "plot_diagnostics",
    "sample_gradient_norms",
]
