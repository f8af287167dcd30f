"""Which solver, how many steps and what to carry on: the cheapest recipe that is as near to converged clips as asked.

search.py   which recipes are tried, which are given up, which one is chosen
run.py      clips by each of them, held against converged ones; a run goes on where it was stopped
page.py     what was found, drawn, with clips side by side
command.py  `stgfast tune`
"""
