"""Benchmarks of lgd_kernels: `python -m bench` measures, `python -m bench table` and `plot` show what was measured.

workloads.py     what is measured, as data: sizes, peers, goals
goals.py         what a goal is and when it is met
peers/           what is timed: for every operation the same result by PyTorch, torch.compile and lgd_kernels
correctness.py   a peer whose result is wrong gets no time
timing.py        the timing loop: interleaved peers, medians
floors.py        what the machine could do at best
measure.py       one workload from its data to its rows of results
machine.py       the machine, the versions, the commit
results.py       the rows, kept in results/<device>.csv
report.py        the report on the terminal
table.py         the README's table
plot.py          the picture, results/<device>.png
"""
