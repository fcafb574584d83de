"""`memserve top`: a cluster in a terminal. Needs Textual (`memserve[ui]`)."""
