"""Whether the facts of a pipeline are right, and what they are where nobody wrote them down.

watch.py     runs one call of a pipeline on a copy of it, step by step, with other answers in place of the denoiser's
measure.py   how the pipeline combines the predictions of a step, measured without its model
claims.py    what an adapter says of that
links.py     what blocks pass on to each other
plain.py     the plain method: every branch alone, through the whole model
plain_step.py, engine_step.py  one step by each
check.py     one against the other
suspects.py  which fact is wrong where they differ
verdict.py   what a check found
look.py      one step of a pipeline that nobody described
blocks.py    the facts of its blocks
find.py      all its facts, proposed and verified
written.py   facts as Python
"""
