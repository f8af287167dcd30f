"""A folder's page that lives: what runs now, what waits, and buttons for what can be asked of it.

command.py   `stgfast serve`: an address, a link, a server on it
guard.py     who may ask
app.py       what may be asked
answers.py   and what is said: a folder as JSON
files.py     clips that a browser shows, images that it sends
metrics.py   the folder for Prometheus
live.html, live.css, live.js   the page

The state of the folder is in `stgfast.queue`, and nowhere else: a server is started and stopped as one likes. Nothing
here loads torch.
"""
