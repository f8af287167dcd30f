"""Jobs, and the state of a folder in which they are rendered. Nothing here loads torch.

job.py       a job, and everything that can be wrong with it
readers.py   job files, line by line
words.py     choices and variables in prompts
pack.py      a job file with its images and LoRAs, as one archive
state.py     the state of a folder, in SQLite beside the clips
taking.py    what a run is about: jobs that it takes up
store.py     what becomes of them
batches.py   which jobs are rendered together
placing.py   files that appear whole or not at all
desk.py      what is asked of a folder from outside of its runs
status.py    how it stands
listing.py   its jobs, some at a time
forecast.py  how long jobs will take
command.py   all of these from a shell
"""
