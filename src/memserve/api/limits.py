"""Limits of one request. Decoders of requests and calls refuse more by the field's name, before
the request is tokenised or queued. `docs/limits.md` describes them for clients.

Each number is far above what applications use, and low enough that a request with the most of
all does not noticeably slow down others.
"""

from __future__ import annotations

# Stop strings, searched at each character of an answer; OpenAI takes 4.
MAX_STOP_STRINGS = 64
# Characters of a stop string, and so of the text that is held back while an answer streams.
MAX_STOP_CHARACTERS = 256
# Any tokens of the model; a vocabulary has some thousand that end a sentence.
MAX_STOP_TOKEN_IDS = 1024
# Texts that an answer must not have; each may become several tokens, in two ways. The tokens of all
# together are bounded: some tens of microseconds at each token of an answer, at the worst.
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 4096
# Tokens that an answer may have: those of a language, or of some labels. They travel with the call.
MAX_ALLOWED_TOKEN_IDS = 16_384
# Added to the logits of every step; OpenAI takes 300.
MAX_LOGIT_BIASES = 1024
# `n`; OpenAI's limit.
MAX_SAMPLES = 128
# Prompts times samples: a batch of the usual evaluation tools. An instance accepts fewer if its
# queue is shorter (`Limits.max_waiting`).
MAX_SEQUENCES = 1024
# Sequences in an instance's queue, by default.
DEFAULT_MAX_WAITING = 256
# Alternatives at each token; OpenAI's limit of `top_logprobs`.
MAX_LOGPROBS = 20
# Turns of a chat: longer than the contexts of today's models for anything but one-word turns.
MAX_MESSAGES = 4096
# Items of a `/v1/responses` input: a turn that calls a function has three.
MAX_ITEMS = 3 * MAX_MESSAGES
# Bytes of the stored conversation that a `/v1/responses` request goes on from: as the largest body.
MAX_CONVERSATION_BYTES = 16 * 1024 * 1024
# Parts of one message.
MAX_PARTS = 256
# Characters of a name, an id, a salt: kept for as long as a request lives, or longer.
MAX_NAME_CHARACTERS = 1024
# Entries of `metadata`; OpenAI's limit.
MAX_METADATA_ENTRIES = 16
# Log-probabilities of prompts in one answer: those of 12,000 tokens with MAX_LOGPROBS each.
MAX_PROMPT_SCORES = 256 * 1024
# Those of a stream, which an instance makes on its event loop, in some 10 ms.
MAX_STREAMED_SCORES = 4096
# Characters of a grammar or JSON schema: several times the largest schemas in use.
MAX_GRAMMAR_CHARACTERS = 256 * 1024
# Texts of a `choice`.
MAX_CHOICES = 1024
# Properties of one object in a JSON schema: compiling takes time with their square (70 ms for so
# many, 3.5 s for 5,000), and the first token of a key some milliseconds.
MAX_SCHEMA_PROPERTIES = 1000
# Rules and terminals of a grammar in Lark, whose compilation takes time with their square: 1 s.
MAX_LARK_RULES = 1000
# `multipleOf` in a schema, without its decimal point: an automaton has a state for each remainder.
MAX_MULTIPLE_OF = 10_000
# Symbols of a GBNF grammar, and of each rule with the rules that it uses written out: 0.2 s.
MAX_GRAMMAR_SYMBOLS = 20_000
# Regular parts of a grammar that leads back to itself; each is compared with all others.
MAX_TERMINALS = 500
# Parentheses in each other, and nesting of a structural tag.
MAX_GRAMMAR_DEPTH = 32
# Tools of a request; OpenAI takes 128.
MAX_TOOLS = 512
# Characters of a function's name; OpenAI takes 64.
MAX_FUNCTION_NAME = 128
# Characters of a request's tools as JSON, and of the variables for the chat template: a template
# writes each tool once, or twice.
MAX_TOOL_CHARACTERS = 1024 * 1024
MAX_TEMPLATE_CHARACTERS = 64 * 1024
# Characters of an answer that a prompt has already, as a message to continue; behind its last ones
# alone a format with a template goes on.
MAX_BEGUN_CHARACTERS = 64 * 1024
# Nesting depth of arrays and objects. No valid request needs more than 6.
MAX_DEPTH = 32
# Fields of a request, known or not; there are about 80.
MAX_FIELDS = 128
# Arrays, objects and their elements in a chat's messages: 7 for a message with one part.
MAX_MESSAGE_VALUES = 65_536
# Arrays, objects and their elements in any other field without a limit of its own.
MAX_VALUES = 4096

# A body up to this size is decoded at once: the worst one takes a millisecond or two. The arrays,
# objects and elements of a larger body are counted first, in 1 to 3 ns per byte.
COUNTED_BODY_BYTES = 64 * 1024
# A larger body is decoded on a thread (on the event loop it would hold up all streams for
# milliseconds), LARGE_BODIES_AT_ONCE at a time: each may take ten times its size of memory.
LARGE_BODY_BYTES = 256 * 1024
LARGE_BODIES_AT_ONCE = 2
# Further large bodies that wait in memory; requests beyond are answered 429.
LARGE_BODIES_WAITING = 32
# Characters of texts from smaller bodies that are tokenised or wait for it, together: 64 of the
# largest, or some seconds of one thread, for which a further text would wait.
MAX_TOKENISED_CHARACTERS = 64 * LARGE_BODY_BYTES

# Bytes of an answer that is not streamed: 50,000 tokens with MAX_LOGPROBS each. A gateway holds
# the whole answer before it sends any of it.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
# Bytes of a Response's chunks with log-probabilities, which its last events repeat four times.
MAX_SCORED_RESPONSE_BYTES = 8 * 1024 * 1024
# Log-probabilities in an answer that an instance encodes on its event loop, in 2 ms. An answer
# with more is encoded on a thread, one at a time.
INLINE_LOGPROBS = 1024

# --- calls between our own processes -------------------------------------------------------

# Characters of the ids that gateways and instances give to calls, instances and pools, and of
# their addresses.
MAX_ID_CHARACTERS = 256
# Prefill instances that a call names; gateways name `global_router.MAX_PREFILL`.
MAX_PEERS = 1024
# Largest token id, and largest number of tokens: the engine's int32.
MAX_INT32 = 2**31 - 1

# Characters of a request that an error repeats.
MAX_ECHO_CHARACTERS = 256
