"""Measure clips, and what guidance changes about them.

measures.py    measures of one clip
statistics.py  statistics over many clips, with intervals
run.py         the clips of an output folder, by setting
command.py     `stgfast evaluate`
judged.py      measures for clips of the toy model
study.py       what guidance does to that model
"""

from stgfast.evaluate.measures import Measure, Measured, plain
from stgfast.evaluate.run import Evaluation, Setting, Summary, evaluate, summed_up
from stgfast.evaluate.statistics import Cloud, Estimate

__all__ = [
    "Cloud",
    "Estimate",
    "Evaluation",
    "Measure",
    "Measured",
    "Setting",
    "Summary",
    "evaluate",
    "plain",
    "summed_up",
]
