"""Jobs, and the state of a folder in which they are rendered. Nothing here loads torch.

job.py       a job, and all checks of it
readers.py   job files, line by line
words.py     choices and variables in prompts
pack.py      a job file with its images and LoRAs, as one archive
state.py     the state of a folder, in SQLite beside the clips
taking.py    the jobs of a run: staged, and added to the folder
store.py     claiming jobs, and recording their results
batches.py   which jobs are rendered together
placing.py   files that appear whole or not at all
desk.py      changes of a folder from outside its runs
status.py    the status of a folder
listing.py   its jobs, in pages
forecast.py  estimates of time and bytes
command.py   all of these from a shell
"""
