"""Tokens in, tokens out: <bos> exactly once, templates that cannot escape or crash the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from memserve.errors import ConfigError, ModelError, RequestError
from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer

BOS, EOS, TURN = 0, 1, 2
TURNS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"


def backend(post_processor: bool = False) -> tokenizers.Tokenizer:
    """A byte-level vocabulary: three special tokens, then the 256 bytes."""
    specials = {"<bos>": BOS, "<eos>": EOS, "<turn>": TURN}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = specials | {char: 3 + i for i, char in enumerate(alphabet)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(list(specials))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if post_processor:
        made.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    return made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    backend().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<bos>", eos_token="<eos>")
    return tmp_path


def write(directory: Path, name: str, **content: object) -> None:
    (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("config", "post_processor", "expected_bos"),
    [
        ({"add_bos_token": True}, False, 1),  # as with tokenizers made from GGUF files
        ({"add_bos_token": True}, True, 1),
        ({"add_bos_token": False}, False, 0),
        ({"tokenizer_class": "GemmaTokenizerFast"}, False, 1),
        ({"tokenizer_class": "Qwen2Tokenizer"}, False, 0),
        ({}, True, 1),
    ],
)
@pytest.mark.parametrize("text", ["hello", "<bos>hello"])
def test_bos_stands_in_front_once_where_the_model_expects_it(
    tmp_path: Path, config: dict[str, object], post_processor: bool, expected_bos: int, text: str
) -> None:
    backend(post_processor).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<bos>", **config)
    ids = Tokenizer.load(tmp_path).encode(text)
    assert ids.count(BOS) == (expected_bos or text.count("<bos>"))
    assert BOS not in ids[1:]


def test_a_rendered_template_that_begins_with_bos_is_not_given_a_second(directory: Path) -> None:
    write(
        directory,
        "tokenizer_config.json",
        bos_token={"content": "<bos>", "special": True},
        add_bos_token=True,
        chat_template=TURNS,
    )
    tokenizer = Tokenizer.load(directory)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<bos>hi<turn>"
    assert tokenizer.encode(text) == [BOS, *tokenizer.encode("hi", False), TURN]


def test_every_end_token_of_the_model_ends_an_answer(directory: Path) -> None:
    write(directory, "config.json", eos_token_id=9)
    assert Tokenizer.load(directory).eos_token_ids == (9, EOS)
    write(directory, "generation_config.json", eos_token_id=[TURN, EOS])
    assert Tokenizer.load(directory).eos_token_ids == (TURN, EOS)


def test_the_newest_place_for_a_template_wins(directory: Path, tmp_path: Path) -> None:
    def rendered(override: str | None = None) -> str:
        tokenizer = Tokenizer.load(directory, override)
        return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])

    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "config"}]
    write(directory, "tokenizer_config.json", chat_template=named)
    assert rendered() == "config"
    write(directory, "chat_template.json", chat_template="json")
    assert rendered() == "json"
    (directory / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"
    (tmp_path / "mine.jinja").write_text("mine")
    assert rendered(str(tmp_path / "mine.jinja")) == "mine"
    with pytest.raises(ConfigError, match=r"absent\.jinja"):
        rendered(str(tmp_path / "absent.jinja"))


def test_the_default_template_extends_its_own_prefix_turn_by_turn(directory: Path) -> None:
    """What was prompt and answer in one turn is the next turn's prefix, or nothing is cached."""
    tokenizer = Tokenizer.load(directory)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    first = tokenizer.apply_chat_template(messages)
    assert first == "System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\n"
    messages += [{"role": "assistant", "content": "Yo!"}, {"role": "user", "content": "Bye"}]
    assert tokenizer.apply_chat_template(messages).startswith(first + "Yo!")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[7]['content'].x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ {}['absent'] + 'x' }}",
    ],
)
def test_a_template_that_refuses_is_the_clients_error(directory: Path, source: str) -> None:
    write(directory, "tokenizer_config.json", chat_template=source)
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_templates_may_use_what_transformers_gives_them(directory: Path) -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    write(directory, "tokenizer_config.json", chat_template=source)
    tokenizer = Tokenizer.load(directory)
    messages = [{"role": "user", "content": "<é>"}] * 2
    assert tokenizer.apply_chat_template(messages) == '{"role": "user", "content": "<é>"}4'


def test_decoding_restores_text_and_skips_special_tokens_on_request(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("  naïve 😀\n<turn>")
    assert tokenizer.decode(ids) == "  naïve 😀\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "  naïve 😀\n<turn>"
    assert tokenizer.special_ids == {BOS, EOS, TURN}


def test_a_lone_tokens_text_keeps_the_leading_space_that_decoders_strip() -> None:
    vocab = {"<unk>": 0, "▁a": 1, "▁hello": 2, "llo": 3}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(made)
    assert tokenizer.decode([2]) == "hello"
    assert [tokenizer.token_text(i) for i in (2, 3)] == [" hello", "llo"]


def test_words_may_be_of_any_length_and_other_tokens_not(directory: Path) -> None:
    words = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    assert Tokenizer(tokenizers.Tokenizer(words)).longest_token() is None
    tokenizer = Tokenizer.load(directory)
    longest = tokenizer.longest_token()
    assert longest == len("<turn>")
    for text in ("hello", "naïve 😀\n<turn><turn><turn>", "<turn>" * 5):
        assert len(text) <= len(tokenizer.encode(text)) * longest


def test_truncation_that_a_tokenizer_file_asks_for_is_ignored(tmp_path: Path) -> None:
    """A silently shortened prompt would be answered wrongly instead of being refused."""
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("x" * 20)) == 20


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    backend().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", chat_template="{% for %}")
    with pytest.raises(ModelError, match="does not compile"):
        Tokenizer.load(tmp_path)
    write(tmp_path, "tokenizer_config.json", bos_token=3)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json.*bos_token"):
        Tokenizer.load(tmp_path)


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(each, tokenizer.token_text(each)) for each in ids)


def test_parts_of_a_character_have_their_bytes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = " the 🫶 \ufffd lazy"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert bytes_of(tokenizer, ids).decode() == text
    assert any("\ufffd" in tokenizer.token_text(token_id) for token_id in ids)


def test_bytes_of_sentencepiece_are_bytes(tmp_path: Path) -> None:
    vocab: dict[str, int] = {"▁a": 0, "a": 1, **{f"<0x{at:02X}>": 2 + at for at in range(256)}}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = Tokenizer(backend)
    ids = [1, *(2 + byte for byte in "🫶".encode()), 0]
    assert bytes_of(tokenizer, ids).decode() == "a🫶 a"
