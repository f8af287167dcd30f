"""What guidance costs compared with alternatives, and how far it is from the device's limit.

models.py    the measured models, as data, built with random weights
variants.py  the ways to make a clip
measure.py   rounds in turns, agreement, arithmetic, rates, and results as rows of JSON
steps.py     one result for each model: its variants agree, and are then timed
growth.py    how the cost of a step grows
overhead.py  the cost of our own Python code
report.py    results as a page
command.py   `stgfast bench`: arguments and output
"""
