"""Find the cheapest recipe (solver, steps, reuse) whose clips are near enough to converged ones.

search.py   which recipes are tried, which are dropped, which one is chosen
run.py      makes clips by each of them and compares with converged ones; continues where it was stopped
page.py     a page of the results, with clips side by side
command.py  `stgfast tune`
"""
