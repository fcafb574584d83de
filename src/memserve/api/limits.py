"""What one request may ask for. Whoever decodes requests or calls refuses more by the field's
name, before it is tokenised or queued. `docs/limits.md` has what clients see.

Each number is far above what applications use, and so low that the most that a request may ask
for costs the others nothing that they notice.
"""

from __future__ import annotations

# Looked for at each character of an answer; OpenAI takes 4.
MAX_STOP_STRINGS = 64
# Characters. So much text may be held back while an answer streams.
MAX_STOP_CHARACTERS = 256
# Each may be any token of the model; a vocabulary has some thousand that end a sentence.
MAX_STOP_TOKEN_IDS = 1024
# Added to the logits of every step; OpenAI takes 300.
MAX_LOGIT_BIASES = 1024
# `n`; OpenAI's limit.
MAX_SAMPLES = 128
# Prompts times samples: a batch of the usual evaluation tools. An instance takes fewer if its
# queue (`max_waiting`) does; gateways know from its `Limits`.
MAX_SEQUENCES = 1024
# Sequences that an instance's queue takes unless its operator says otherwise.
DEFAULT_MAX_WAITING = 256
# Alternatives at each token; OpenAI's limit of `top_logprobs`.
MAX_LOGPROBS = 20
# Turns of a chat: longer than the contexts of today's models for anything but one-word turns.
MAX_MESSAGES = 4096
# Parts of one message.
MAX_PARTS = 256
# Characters of a name, an id, a salt: what is kept for as long as a request lives, or longer.
MAX_NAME_CHARACTERS = 1024
# Of `metadata`; OpenAI's limit.
MAX_METADATA_ENTRIES = 16
# Arrays and objects in each other. The deepest that any request needs is 6.
MAX_DEPTH = 32
# Fields of a request, known or not; there are about 80.
MAX_FIELDS = 128
# Arrays, objects and their elements in a chat's messages: 7 for a message with one part.
MAX_MESSAGE_VALUES = 65_536
# The same of any other field that has no limit of its own.
MAX_VALUES = 4096

# A body up to this size is decoded as it is: its worst costs a millisecond or two. Of a larger
# one the arrays, objects and elements are counted first, in one to three nanoseconds per byte.
COUNTED_BODY_BYTES = 64 * 1024
# What is larger is worked on beside the event loop (decoding it would hold up every stream for
# milliseconds), and only so many at a time: each may take ten times its size of memory.
LARGE_BODY_BYTES = 256 * 1024
LARGE_BODIES_AT_ONCE = 2
# Further ones wait, each with its body in memory; beyond that they are answered 429.
LARGE_BODIES_WAITING = 32
# Characters of texts from smaller bodies that are tokenised or wait for it, together: 64 of the
# largest. Some seconds of one thread; whoever came behind them would wait for all of that.
MAX_TOKENISED_CHARACTERS = 64 * LARGE_BODY_BYTES

# Of an answer that is not streamed: 50,000 tokens with MAX_LOGPROBS each, and a gateway has it
# whole before it passes any of it on.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
# Log-probabilities in an answer that an instance encodes on its event loop, in 2 ms. What has more
# of them is encoded beside it, one answer at a time.
INLINE_LOGPROBS = 1024

# --- calls between our own processes -------------------------------------------------------

# Characters of the ids that gateways and instances give to calls, instances and pools, and of
# their addresses.
MAX_ID_CHARACTERS = 256
# Instances that a call names for its prompt: more than a cluster has.
MAX_PEERS = 1024
# The largest number of a token, and of tokens: what the engine's int32 holds.
MAX_INT32 = 2**31 - 1

# Characters of what was sent that an error repeats.
MAX_ECHO_CHARACTERS = 256
