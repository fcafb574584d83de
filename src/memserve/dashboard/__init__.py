"""`memserve dashboard`: a cluster on web pages. Needs NiceGUI (`memserve[ui]`).

`run.py` serves, `guard.py` lets in, `frame.py` is what all pages share, `pages.py` shows and
`actions_page.py` acts; what they draw comes from `memserve.watch`. `child.py`: beside a cluster.
"""
