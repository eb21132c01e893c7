"""Facts of models, and documents in their tokens."""

import shutil

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from causalmix_pipeline.adapters.model_tokens import (
    describe_model,
    encode_documents,
    find_model,
    load_tokenizer,
    write_model_tokens,
)
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.profiler import PoolSpec
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline_tests.adapters.pretrained_runs import CHAT_TEMPLATE, save_lm


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("models") / "plain", chat=False)


def encode(model, text, prompt_chars, *, is_chat=False):
    """Text of the prompt's tokens and of those with loss."""
    tokenizer = load_tokenizer(find_model(str(model)))
    tokens, prompts = encode_documents(tokenizer, [text], [prompt_chars], is_chat=is_chat)
    return tokenizer.decode(tokens[0][: prompts[0]]), tokenizer.decode(tokens[0][prompts[0] :])


def test_facts_are_those_of_the_model(chat_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_model)

    facts = describe_model(str(chat_model))

    assert facts.n_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.vocab_size, facts.max_length) == (300, 256)
    assert (facts.layers, facts.hidden) == (2, 32)
    assert len(facts.weights_hash) == 32


def test_the_hash_follows_weights_and_tokenizer_and_not_the_folder(chat_model, tmp_path):
    first = describe_model(str(chat_model)).weights_hash
    moved = shutil.copytree(chat_model, tmp_path / "moved")
    assert describe_model(str(moved)).weights_hash == first

    (moved / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    assert describe_model(str(moved)).weights_hash != first


def test_pickled_weights_are_refused(tmp_path):
    folder = save_lm(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"proxy\.pretrained must .*got pytorch_model\.bin in"):
        describe_model(str(folder))


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    for name in (str(tmp_path / "absent"), "no-such-team/no-such-model"):
        with pytest.raises(ConfigError, match="must be a folder on this machine or the id"):
            describe_model(name)


def test_plain_text_ends_once_and_every_token_has_loss(chat_model):
    assert encode(chat_model, "the river runs", 0) == ("", "the river runs<|end|>")


def test_a_special_token_that_text_spells_is_only_text(plain_model):
    tokenizer = load_tokenizer(find_model(str(plain_model)))

    tokens, _ = encode_documents(tokenizer, ["a<|end|>b", "a?<|end|>\n\nb"], [0, 11], is_chat=False)

    for ids in tokens:
        assert (ids == tokenizer.eos_token_id).sum() == 1
        assert ids[-1] == tokenizer.eos_token_id


def test_a_prompt_and_its_response_become_a_chat_by_the_template(chat_model):
    prompt, response = encode(chat_model, "two and two?\n\nfour", len("two and two?\n\n"))

    assert prompt == "<user>two and two?<|end|><assistant>"
    assert response == "four<|end|>"


def test_messages_of_a_chat_get_their_roles_back(chat_model):
    before = "system\nbe brief\n\nuser\nhi\n\nassistant\nyes?\n\nuser\ntwo\n\nlines\n\n"

    prompt, response = encode(chat_model, before + "ok", len(before), is_chat=True)

    assert prompt == (
        "<system>be brief<|end|><user>hi<|end|><assistant>yes?<|end|>"
        "<user>two\n\nlines<|end|><assistant>"
    )
    assert response == "ok<|end|>"


def test_without_a_template_prompt_and_response_stand_apart(plain_model):
    prompt, response = encode(plain_model, "two and two?\n\nfour", len("two and two?\n\n"))

    assert (prompt, response) == ("two and two?\n\n", "four<|end|>")


def test_a_token_never_straddles_the_end_of_a_prompt(plain_model):
    """ " river" is one token of the tokenizer; a prompt that ends inside a word splits it."""
    tokenizer = load_tokenizer(find_model(str(plain_model)))
    text = "the river"
    whole = tokenizer(text)["input_ids"]
    cuts = [n for n in range(1, len(text)) if tokenizer(text[:n])["input_ids"] != whole[:n]]

    for n in cuts:
        assert encode(plain_model, text, n) == (text[:n], text[n:] + "<|end|>")
    assert len(cuts) > 2


def test_a_template_that_writes_answers_otherwise_still_masks_the_prompt(chat_model, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )

    assert encode(folder, "two?\n\nfour", 6) == ("[two?]<think>", "four<|end|>")


def test_roles_that_a_template_refuses_become_one_message_of_the_user(chat_model, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    before = "system\nbe brief\n\nuser\nhi\n\n"

    prompt, response = encode(folder, before + "ok", len(before), is_chat=True)

    assert prompt == "<user>system\nbe brief\n\nuser\nhi<|end|><assistant>"
    assert response == "ok<|end|>"


def write_chats(folder):
    folder.mkdir(parents=True)
    frame = pl.DataFrame(
        {
            "prompt": ["two and two?", "a prime?", "a river?"],
            "response": ["four", "eleven", "past the mill"],
        }
    )
    frame.write_ndjson(folder / "chat.jsonl")
    return PoolSpec(folder.parent, ColumnMap(prompt="prompt", response="response"))


def documents_of(spec):
    from causalmix_pipeline.adapters.pool_files import pool_files
    from causalmix_pipeline.adapters.profiler import pool_batches

    return pl.concat(
        batch for f in pool_files(spec.location) for batch, _, _ in pool_batches(f, spec)
    )


def test_a_pool_is_kept_in_the_tokens_of_the_model_with_its_prompts(chat_model, tmp_path):
    spec, store = write_chats(tmp_path / "pool" / "chat"), RunStore(tmp_path / "store")
    documents = documents_of(spec)

    name = write_model_tokens(store, spec, documents, str(chat_model), "hash")

    tokens = store.token_store(name)
    tokenizer = load_tokenizer(find_model(str(chat_model)))
    place = tokens.positions(np.array(documents["document_id"].to_list(), dtype="S"))[0]
    begin, end = tokens.offsets()[place : place + 2]
    ids = tokens.tokens()[begin:end]
    assert tokenizer.decode(ids[tokens.prompts()[place] :]) == "four<|end|>"
    assert name == write_model_tokens(store, spec, documents, str(chat_model), "hash")
    assert name != write_model_tokens(store, spec, documents, str(chat_model), "other")


def test_a_pool_that_lost_a_document_is_refused(chat_model, tmp_path):
    spec, store = write_chats(tmp_path / "pool" / "chat"), RunStore(tmp_path / "store")
    more = pl.concat(
        [documents_of(spec).select("document_id"), pl.DataFrame({"document_id": ["0" * 32]})]
    )

    with pytest.raises(PoolError, match="lacks 1 of 4 documents"):
        write_model_tokens(store, spec, more, str(chat_model), "hash")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    folder = save_lm(tmp_path / "m", vocab_size=100)
    spec, store = write_chats(tmp_path / "pool" / "chat"), RunStore(tmp_path / "store")

    with pytest.raises(ConfigError, match=r"got token \d+ and 100 embeddings"):
        write_model_tokens(store, spec, documents_of(spec), str(folder), "hash")


def test_prompts_are_kept_whole_in_object_storage(bucket, tmp_path):
    store = RunStore(bucket, cache=tmp_path / "cache")
    encoded = [np.arange(4), np.arange(3)]

    store.put_tokens("with", [(["a", "b"], encoded, [2, 0])], 100)
    store.put_tokens("without", [(["a", "b"], encoded)], 100)

    assert store.token_store("with").prompts().tolist() == [2, 0]
    assert store.token_store("without").prompts().tolist() == [0, 0]
    assert not (store.token_store("without").folder / "prompt.npy").exists()
