"""The live page of a folder: what runs now, what waits, and buttons for what can be done.

    command.py   `stgfast serve`: an address, a link, a server
    guard.py     which requests are allowed
    app.py       the routes
    answers.py   the responses: a folder as JSON, and changes of it
    files.py     clips for a browser, images from it
    metrics.py   the folder for Prometheus
    live.html, live.css, live.js   the page

The state of the folder is in `stgfast.queue` only: a server may be started and stopped at any time. Nothing here loads
torch.
"""
