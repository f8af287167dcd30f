"""Whether accelerated guidance is what it claims to be, on one pipeline as it is.

run.py      `stgfast.verify`
command.py  `stgfast verify`
"""
