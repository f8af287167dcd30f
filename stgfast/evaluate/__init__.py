"""How good are clips, and what did guidance do to them?

measures.py    what is measured of one clip
statistics.py  what many clips say together, and how sure that is
run.py         the clips of an output folder, setting by setting
command.py     `stgfast evaluate`
judged.py      what is measured of clips of the toy model
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
