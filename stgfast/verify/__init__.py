"""Verify accelerated guidance on one pipeline.

run.py      `stgfast.verify`
command.py  `stgfast verify`
"""
