"""Parts of a chat's answer: content, reasoning and tool calls, found in the model's text.

`format.py` is the contract: what a call says of the answer's format. `parser.py` puts the parsers
of reasoning and tool calls together.
"""
