"""The experiments behind docs/EVIDENCE.md, which `examples/evidence.py` runs.

plan.py         which experiments there are, and the runs that they are made of
problems.py     data sets and nets
measure.py      one run, and what is measured in it
results.py      results as data: one line of a CSV file per run
statistics.py   means over seeds, standard errors, and the choice of a learning rate
findings.py     what the numbers say: goals, and where decoupled training is worse
figures.py      the pictures
page.py         the page around them
"""
