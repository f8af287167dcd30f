"""Whether the facts of a pipeline are right, and what they are where nobody wrote them down.

watch.py    runs one call of a pipeline on a copy of it, step by step, with other answers in place of the denoiser's
combine.py  how the pipeline combines the predictions of a step, measured without its model
plain.py    the plain method: every branch alone, through the whole model
check.py    accelerated guidance against the plain method
find.py     the facts of a pipeline that nobody wrote down, from one observed step
"""
