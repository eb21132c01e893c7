"""Scores of a batch are those of one question at a time, on real models."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2, transformers_config
from causalmix_pipeline.adapters.task_scores import (
    generate_answers,
    option_log_likelihoods,
    score_questions,
    score_stack_questions,
)
from causalmix_pipeline.adapters.task_tokenizers import check_questions, open_task_tokenizer
from causalmix_pipeline.adapters.tokenizer import END_ID, train_tokenizer
from causalmix_pipeline.core.errors import ConfigError, PoolError, ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.tasks import QuestionText
from causalmix_pipeline_tests.adapters.small_models import TEXTS, save_model, small_lm

BPE = train_tokenizer(TEXTS, vocab_size=300)
CHOICES = [
    QuestionText("choice", "What is the sum of two and two?", ("The sum is four.", "ten"), 0),
    QuestionText("choice", "Name a prime.", ("Eleven", "ten", "the old mill and the sea"), 2),
    QuestionText("choice", "def add(left, right):\n    return ", ("left + right", "漢字"), 1),
]
EXACT = [
    QuestionText("exact", text, answer="4", max_new_tokens=n)
    for text, n in [("What is", 12), ("The river runs past the old mill, and past", 5), ("S", 1)]
]


def encode(texts, name=BPE):
    return [open_task_tokenizer(name).question(text) for text in texts]


def one_by_one(model, question) -> list[float]:
    """Log-likelihood of each option from the logits of that one sequence, whole."""
    values = []
    for option in question.options:
        ids = torch.tensor([[*question.prompt, *option]])
        with torch.no_grad():
            nats = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        n = len(option)
        values.append(float(nats[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum()))
    return values


def greedy(model, prompt, n) -> list[int]:
    """The likeliest tokens, the whole sequence computed again for each."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == END_ID:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_of_a_batch_are_those_of_one_sequence_at_a_time(batch_size):
    model, questions = small_lm().eval(), encode(CHOICES)
    found = option_log_likelihoods(model, questions, device="cpu", batch_size=batch_size)

    for values, question in zip(found, questions, strict=True):
        np.testing.assert_allclose(values, one_by_one(model, question), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_what_a_batch_generates_is_what_each_prompt_gives_by_itself(batch_size):
    model, tokenizer = small_lm(seed=1).eval(), open_task_tokenizer(BPE)
    model.generation_config.update(do_sample=True, repetition_penalty=5.0)  # not to be followed
    questions = encode(EXACT)
    found = generate_answers(model, questions, tokenizer, device="cpu", batch_size=batch_size)
    expected = [greedy(model, q.prompt, q.max_new_tokens) for q in questions]

    assert found == [tokenizer.decode(ids) for ids in expected]
    assert [len(ids) for ids in expected] == [12, 5, 1]  # none ended early: all of it was compared


def test_generation_ends_with_the_text():
    """A model that sees the end of text as likeliest everywhere writes nothing."""
    model = small_lm().eval()
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(32, 300, bias=True)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[END_ID] = 1.0
    found = generate_answers(
        model, encode(EXACT), open_task_tokenizer(BPE), device="cpu", batch_size=2
    )

    assert found == ["", "", ""]


def test_a_long_prompt_is_cut_from_the_left():
    """Where text beyond the context is cut, what stood there can't matter."""
    model = small_lm(max_position_embeddings=40).eval()
    long = replace(CHOICES[0], prompt=TEXTS[3] + CHOICES[0].prompt)
    other = replace(long, prompt="x" * 300 + long.prompt)
    first, second = (
        option_log_likelihoods(model, encode([q]), device="cpu", batch_size=4)[0]
        for q in (long, other)
    )
    generated = [
        generate_answers(
            model,
            encode([QuestionText("exact", q.prompt, answer="4", max_new_tokens=30)]),
            open_task_tokenizer(BPE),
            device="cpu",
            batch_size=4,
        )
        for q in (long, other)
    ]
    question = encode([long])[0]
    kept = replace(question, prompt=question.prompt[-(40 - len(question.options[0])) :])

    assert first == second
    assert generated[0] == generated[1]
    assert first[0] == pytest.approx(one_by_one(model, kept)[0], abs=1e-5)


def test_what_fills_the_context_is_refused_before_and_after_training():
    question = encode([replace(CHOICES[0], options=(TEXTS[3], "a"))])

    with pytest.raises(ProxyError, match=r"an option of question 1 must be shorter than .* 16"):
        option_log_likelihoods(
            small_lm(max_position_embeddings=16), question, device="cpu", batch_size=4
        )
    with pytest.raises(PoolError, match=r"tasks: options of 'qa' must be shorter .* question 1"):
        check_questions("qa", question, context=16)
    with pytest.raises(PoolError, match="max_new_tokens of 'qa' must be shorter"):
        check_questions("qa", encode(EXACT), context=12)


def test_each_task_gets_the_mean_score_of_its_questions():
    model = small_lm().train()
    tasks = {"a": encode(CHOICES), "b": encode(CHOICES[:1]), "c": encode(EXACT)}
    scores = score_questions(model, tasks, BPE, device="cpu")
    apart = [
        score_questions(model, {"x": [question]}, BPE, device="cpu")["x"] for question in tasks["a"]
    ]

    assert scores["a"] == pytest.approx(np.mean(apart), abs=1e-6)
    assert scores["b"] == pytest.approx(apart[0], abs=1e-6)
    assert scores["c"] == 0.0
    assert len(set(apart)) == 3
    assert model.training  # left as it was


def test_a_generated_answer_that_is_right_counts():
    model, tokenizer = small_lm(seed=1).eval(), open_task_tokenizer(BPE)
    written = tokenizer.decode(greedy(model, encode(EXACT)[0].prompt, 12))
    right = replace(EXACT[0], answer=written.strip() or "x")

    assert score_questions(model, {"t": encode([right, EXACT[1]])}, BPE, device="cpu") == {"t": 0.5}


@pytest.mark.parametrize("texts", [CHOICES, EXACT])
def test_a_model_whose_numbers_are_lost_has_no_score(texts):
    model = small_lm().eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)

    assert math.isnan(score_questions(model, {"t": encode(texts)}, BPE, device="cpu")["t"])


def test_each_model_of_a_stack_is_scored_as_its_export_is():
    config = ProxyConfig(hidden=32, layers=2, vocab_size=300, sequence_length=64, init_std=0.4)
    stack = StackedQwen2(config, 3)
    torch.manual_seed(0)
    for weight in stack.flat_weights.values():
        weight.add_(0.1 * torch.randn_like(weight))
    questions = {"a": encode(CHOICES), "b": encode(EXACT)}
    state = torch.random.get_rng_state()
    found = score_stack_questions(stack, questions, BPE)

    assert {name: values.shape for name, values in found.items()} == {"a": (3,), "b": (3,)}
    assert len(set(found["a"].tolist())) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
    for k in range(3):
        one = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**transformers_config(config))
        ).eval()
        one.load_state_dict(stack.to_transformers(k))
        values = [one_by_one(one, question) for question in questions["a"]]
        per_byte = [
            np.array(v) / q.option_bytes for v, q in zip(values, questions["a"], strict=True)
        ]
        right = [
            np.exp(v[q.label]) / np.exp(v).sum()
            for v, q in zip(per_byte, questions["a"], strict=True)
        ]
        assert found["a"][k] == pytest.approx(np.mean(right), abs=1e-6)


def test_without_questions_nothing_is_scored():
    assert score_questions(None, {}, "", device="cpu") == {}
    assert score_stack_questions(StackedQwen2(ProxyConfig(), 1), {}, "") == {}


# Tokens


def test_prompt_and_option_are_parted_where_words_are():
    tokenizer = open_task_tokenizer(BPE)
    for prompt, options in [("a b", ("c",)), ("a b ", ("c",)), ("a b", (" c",))]:
        question = tokenizer.question(QuestionText("choice", prompt, options, 0))
        assert tokenizer.decode(question.prompt) == "a b"
        assert tokenizer.decode(question.options[0]) == " c"
        assert question.option_bytes == (2,)
    body = tokenizer.question(QuestionText("choice", "def f():\n", ("    return",), 0))
    assert tokenizer.decode(body.options[0]) == "\n    return"


def test_a_prompt_begins_as_a_document_of_the_pool_does():
    assert encode(EXACT)[0].prompt[0] == END_ID


def test_a_pretrained_tokenizer_counts_each_byte_once(tmp_path):
    save_model(tmp_path, small_lm())
    tokenizer = open_task_tokenizer(str(tmp_path))
    ids, sizes = tokenizer.encode_with_bytes([*TEXTS, ""])
    pool_ids, pool_sizes = open_task_tokenizer(BPE).encode_with_bytes([*TEXTS, ""])

    for found, pool in zip(ids, pool_ids, strict=True):
        np.testing.assert_array_equal(found, pool)  # the same BPE, in a model's folder
    assert [int(s.sum()) for s in sizes] == [len(text.encode()) for text in [*TEXTS, ""]]
    assert [int(s.sum()) for s in pool_sizes] == [int(s.sum()) for s in sizes]
    assert tokenizer.decode(ids[0].tolist()) == TEXTS[0]
    assert tokenizer.question(CHOICES[0]).options == encode(CHOICES)[0].options


def test_a_first_token_of_a_model_stands_before_documents_and_prompts(tmp_path):
    save_model(tmp_path, small_lm())
    backend = transformers.AutoTokenizer.from_pretrained(tmp_path)
    backend.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.bos_token_id)]
    )
    backend.save_pretrained(tmp_path)
    tokenizer = open_task_tokenizer(str(tmp_path))
    ids, sizes = tokenizer.encode_with_bytes(["Short."])

    assert tokenizer.prefix == (backend.bos_token_id,)
    assert ids[0][0] == backend.bos_token_id
    assert (int(sizes[0][0]), int(sizes[0].sum())) == (0, 6)
    assert tokenizer.question(EXACT[0]).prompt[0] == backend.bos_token_id


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"proxy\.pretrained must"):
        open_task_tokenizer(str(tmp_path))


def test_an_answer_ends_where_the_chat_template_ends_it(tmp_path):
    """A base model's own end isn't what fine-tuning on chats taught it to write."""
    folder = save_model(tmp_path / "m", small_lm())
    assert open_task_tokenizer(str(folder)).stop_ids == (END_ID,)
    chat = transformers.AutoTokenizer.from_pretrained(folder)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    chat.save_pretrained(tmp_path / "chat")
    small_lm(vocab_size=304).save_pretrained(tmp_path / "chat")

    stops = open_task_tokenizer(str(tmp_path / "chat")).stop_ids

    assert stops == (END_ID, chat.convert_tokens_to_ids("<|im_end|>"))
