"""The pages for people: runs, one run, runs beside each other, objectives. They read the JSON API.

``assets`` serves the files, ``session`` takes a browser's token, ``events`` tells what changes, ``routes`` puts
them together. What is shown and how is up to the scripts in ``static/``.
"""
