"""Verify the facts about a pipeline, and find them if nobody wrote them down.

watch.py     run one call of a pipeline on a copy of it, step by step, with other outputs for the denoiser
measure.py   how the pipeline combines the predictions of a step, measured without its model
claims.py    what an adapter says about that
links.py     what blocks pass on to each other
plain.py     the plain method: each branch alone, through the whole model
plain_step.py, engine_step.py  one step by each
check.py     the comparison
suspects.py  which fact is wrong if they differ
verdict.py   the result of a check
look.py      one step of an unknown pipeline
blocks.py    the facts about its blocks
find.py      all its facts, proposed and verified
written.py   facts as Python code
"""
