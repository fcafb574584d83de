"""`memserve dashboard`: a cluster on web pages. Needs NiceGUI (`memserve[ui]`).

`run.py` serves, `guard.py` lets in, `frame.py` is what all pages share; a page is a file, and what
it draws comes from `memserve.watch`.
"""
