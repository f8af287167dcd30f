"""What guidance costs, beside what a user would otherwise run, and how far it is from the limit.

models.py    the models that are measured, as data, built with random weights
variants.py  the ways in which a clip can be made
measure.py   rounds in turns, agreement, arithmetic, rates, and a result as one row of JSON
steps.py     one result for every model: its variants, found to agree and then timed
growth.py    how the cost of a step grows
overhead.py  what our own Python takes
report.py    rows as a page
command.py   `stgfast bench`: arguments and what is shown
"""
