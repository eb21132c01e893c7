"""Fine-tuning a pretrained model: losses by a second way, resumed runs, bad days."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from causalmix_pipeline.adapters import pretrained_model
from causalmix_pipeline.adapters.model_tokens import describe_model
from causalmix_pipeline.adapters.packed_samples import SequenceRows
from causalmix_pipeline.adapters.pretrained_model import check_isolation, load_model, summed_loss
from causalmix_pipeline.adapters.pretrained_proxy import train_pretrained
from causalmix_pipeline.adapters.pretrained_trainer import Checkpoints, Feed, Trainer
from causalmix_pipeline.adapters.run_store import EvalWindows
from causalmix_pipeline.core.errors import ConfigError, ProxyError
from causalmix_pipeline.core.tasks import Question
from causalmix_pipeline_tests.adapters import pretrained_runs
from causalmix_pipeline_tests.adapters.pretrained_runs import (
    real_model_folder,
    save_lm,
    small_config,
    with_changes,
    write_run,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_lm(folder / kind, kind=kind) for kind in ("qwen2", "llama")}


@pytest.fixture
def model(models):
    return models["qwen2"]


def trainer_of(root, config, **changes) -> Trainer:
    store, spec, _ = write_run(root, config, **changes)
    feed = Feed.of(store, spec)
    return Trainer(load_model(config, "cpu"), config, "cpu", feed, Checkpoints(root / "scratch"))


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def alone(row: SequenceRows) -> list[tuple[np.ndarray, np.ndarray]]:
    """The documents of a packed sequence: ids, and which have loss."""
    starts = [i for i in range(row.n_tokens) if row.position_L[i] == 0]
    return [
        (row.ids_L[a:b], row.has_loss_L[a:b])
        for a, b in zip(starts, [*starts[1:], row.n_tokens], strict=True)
    ]


def loss_of(model, row: SequenceRows) -> float:
    """Loss of a packed sequence."""
    with torch.no_grad():
        return float(summed_loss(model, [row], "cpu"))


def unpacked_nats(model, row: SequenceRows) -> float:
    """Loss of a packed sequence's documents one by one, by transformers itself."""
    total = 0.0
    for ids, has_loss in alone(row):
        if has_loss.any():
            labels = torch.from_numpy(np.where(has_loss, ids, -100))[None]
            with torch.no_grad():
                found = model(input_ids=torch.from_numpy(ids)[None], labels=labels)
            total += float(found.loss) * int(has_loss.sum())
    return total


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_documents_have_the_losses_that_they_have_alone(models, tmp_path, kind):
    trainer = trainer_of(tmp_path, small_config(models[kind], sequence_length=160))
    rows = [row for step in range(trainer.feed.n_steps) for row in trainer.feed.rows(step)]
    assert sum(len(alone(row)) for row in rows) > 2 * len(rows)

    for row in rows:
        packed = loss_of(trainer.model, row)
        assert packed == pytest.approx(unpacked_nats(trainer.model, row), rel=1e-5, abs=1e-4)


def test_a_model_whose_documents_see_each_other_is_refused(model, monkeypatch):
    config = small_config(model)
    lm = load_model(config, "cpu")
    attend = lm.forward

    def leaking(**inputs):
        return attend(**{name: v for name, v in inputs.items() if name != "position_ids"})

    monkeypatch.setattr(lm, "forward", leaking)

    with pytest.raises(ProxyError, match=r"documents .* apart, got logits that change by \d+%"):
        check_isolation(lm, config, "cpu")


def test_a_model_that_caps_its_logits_has_the_loss_of_its_own_head(models, tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        final_logit_softcapping=2.0, initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    lm = transformers.Gemma2ForCausalLM(config).eval()
    row = trainer_of(tmp_path, small_config(models["qwen2"])).feed.rows(0)[0]

    assert loss_of(lm, row) == pytest.approx(unpacked_nats(lm, row), rel=1e-4)


def test_what_a_prompt_says_is_read_but_never_predicted(model, tmp_path):
    """Only labels of the response count; another prompt gives another loss."""
    trainer = trainer_of(tmp_path, small_config(model), mixture=(1.0, 0.0))
    row = trainer.feed.rows(0)[0]
    ids, has_loss = alone(row)[0]
    labels = torch.from_numpy(np.where(has_loss, ids, -100))[None]

    one = SequenceRows(ids, np.arange(len(ids)), has_loss, len(ids))
    with torch.no_grad():
        expected = trainer.model(input_ids=torch.from_numpy(ids)[None], labels=labels).loss
    assert not has_loss[:5].any()
    assert loss_of(trainer.model, one) == pytest.approx(float(expected) * has_loss.sum(), rel=1e-5)


def test_the_gradient_of_a_sample_that_is_all_prompt_is_zero(model, tmp_path):
    trainer = trainer_of(tmp_path, small_config(model))
    row = trainer.feed.rows(0)[0]
    silent = replace(row, has_loss_L=np.zeros_like(row.has_loss_L))

    summed_loss(trainer.model, [silent], "cpu").backward()

    for value in trainer.model.parameters():
        assert value.grad is None or not value.grad.any()


def test_eight_micro_batches_of_one_give_the_gradient_of_one_of_eight(model, tmp_path):
    config = small_config(model, batch_sequences=8, tokens=8 * 64)
    gradients = []
    for micro_batch in (1, 8):
        trainer = trainer_of(tmp_path / str(micro_batch), replace(config, micro_batch=micro_batch))
        rows = trainer.feed.rows(0)
        n_losses = [int(row.has_loss_L.sum()) for row in rows]
        assert len(rows) >= 8 and len(set(n_losses)) > 2
        nats = trainer._gradients(rows, sum(n_losses))
        gradients.append((nats, [p.grad.clone() for p in trainer.trained.values()]))

    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for one, eight in zip(gradients[0][1], gradients[1][1], strict=True):
        assert torch.allclose(one, eight, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(model, tmp_path):
    gradients = []
    for recompute in (False, True):
        config = small_config(model, gradient_checkpointing=recompute)
        trainer = trainer_of(tmp_path / str(recompute), config)
        trainer.model.train()
        trainer._gradients(trainer.feed.rows(0), 1)
        gradients.append([p.grad.clone() for p in trainer.trained.values()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_learns_and_says_what_it_read(model, tmp_path):
    store, spec, evaluation = write_run(tmp_path, small_config(model, tokens=64 * 4 * 30))

    record = train_pretrained(store, spec, device="cpu", evaluation=evaluation)

    assert record.train_loss[-1] < record.train_loss[0] - 1
    assert not record.diverged
    assert record.nats_per_token["talk"] < 5
    assert record.bits_per_byte["talk"] == pytest.approx(
        record.nats_per_token["talk"] / 2 / np.log(2)
    )
    assert record.epochs[0] > 1
    assert record.seconds > 0 and record.cpu_seconds > 0
    store.put(record)
    assert store.get(spec.key) == record
    assert not store.scratch(spec.key).exists()


def test_held_out_loss_is_the_sum_over_all_predicted_tokens(model, tmp_path):
    config = small_config(model, learning_rate=1e-12)
    store, spec, evaluation = write_run(tmp_path, config)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)

    record = train_pretrained(store, spec, device="cpu", evaluation=evaluation)

    windows = torch.from_numpy(evaluation.windows["talk"].astype(np.int64))
    with torch.no_grad():
        expected = float(lm(input_ids=windows, labels=windows).loss)
    assert record.nats_per_token["talk"] == pytest.approx(expected, rel=1e-5)


def test_questions_are_asked_of_the_trained_model(model, tmp_path):
    store, spec, evaluation = write_run(tmp_path, small_config(model))
    asked = Question(
        kind="choice", prompt=(5, 6, 7), options=((8,), (9, 10)), option_bytes=(1, 2), label=0,
        answer="", pattern="", numeric=False, max_new_tokens=0,
    )  # fmt: skip
    evaluation = replace(evaluation, questions={"quiz": [asked]}, tokenizer=str(model))

    record = train_pretrained(store, spec, device="cpu", evaluation=evaluation)

    assert 0 <= record.scores["quiz"] <= 1
    assert set(record.bits_per_byte) == {"talk"}


def test_bf16_keeps_fp32_weights_and_almost_the_same_losses(model, tmp_path):
    losses = []
    for bf16 in (False, True):
        config = small_config(model, bf16=bf16)
        trainer = trainer_of(tmp_path / str(bf16), config)
        losses.append(trainer.train().train_loss())
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        moments = trainer.optimiser.state_dict()["state"][0]
        assert moments["exp_avg"].dtype == torch.float32

    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_lora_trains_its_additions_and_leaves_the_model_as_it_was(model, tmp_path):
    trainer = trainer_of(tmp_path, small_config(model, method="lora", learning_rate=1e-2))
    before = weights_of(trainer)

    history = trainer.train()

    after = weights_of(trainer)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert all("lora_" in name for name in trainer.trained)
    assert history.train_loss()[-1] < history.train_loss()[0]


def test_a_mixture_decides_what_is_read(model, tmp_path):
    store, spec, _ = write_run(tmp_path, small_config(model), mixture=(0.25, 0.75))

    feed = Feed.of(store, spec)

    read = np.zeros(2)
    for step in range(feed.n_steps):
        for row in feed.rows(step):
            is_chat = not row.has_loss_L[1]
            read[0 if is_chat else 1] += row.n_tokens
    assert np.abs(read - np.array([0.25, 0.75]) * spec.config.tokens).max() <= 64
    assert feed.n_steps == spec.config.steps


def test_a_domain_of_prompts_longer_than_a_sequence_is_refused(model, tmp_path):
    config = small_config(model, sequence_length=8, tokens=64)
    store, spec, _ = write_run(tmp_path, config)

    with pytest.raises(ProxyError, match=r"domain 0 .*proxy\.sequence_length \(8\), got none"):
        Feed.of(store, spec)
    assert len(Feed.of(store, replace(spec, mixture=(0.0, 1.0))).domain_W)


# --- killed and resumed


def train_killed(root, model, changes, after: int) -> None:
    """Train in a process of its own and kill it after some steps."""
    command = [sys.executable, "-m", pretrained_runs.__name__, str(root), str(model)]
    with subprocess.Popen([*command, json.dumps(changes)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL


def outcome(record):
    return (record.train_loss, record.bits_per_byte, record.epochs)


def test_a_killed_run_goes_on_and_gives_the_bits_of_an_unbroken_one(model, tmp_path):
    train_killed(tmp_path / "killed", model, {}, after=5)
    store, spec, evaluation = write_run(tmp_path / "killed", small_config(model))
    kept = sorted(path.name for path in store.scratch(spec.key).glob("step-*"))
    steps = []

    resumed = train_pretrained(
        store, spec, device="cpu", evaluation=evaluation, progress=lambda s, _: steps.append(s)
    )
    fresh = write_run(tmp_path / "whole", small_config(model))
    unbroken = train_pretrained(fresh[0], fresh[1], device="cpu", evaluation=fresh[2])

    assert kept == ["step-00000002", "step-00000004"]
    assert steps == [5, 6]
    assert outcome(resumed) == outcome(unbroken)
    assert resumed.key == unbroken.key


def test_dropout_goes_on_where_it_was(tmp_path):
    """Random state is part of a checkpoint."""
    model = save_lm(tmp_path / "m", attention_dropout=0.3)
    config = small_config(model)
    whole = trainer_of(tmp_path / "whole", config)
    whole.train()
    halves = trainer_of(tmp_path / "halves", config)
    halves.feed = replace(halves.feed, n_steps=6)

    class StopError(Exception):
        pass

    def stop(step, loss):
        if step == 4:
            halves.checkpoints.save(halves)
            raise StopError

    with pytest.raises(StopError):
        halves.train(stop)
    torch.manual_seed(99)
    again = trainer_of(tmp_path / "halves", config)
    assert again.history.step == 4
    again.train()

    assert again.history.nats == whole.history.nats
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(again)[name])


@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_used(model, tmp_path, file):
    config = small_config(model)
    whole = trainer_of(tmp_path, config)
    whole.train()
    path = tmp_path / "scratch" / "step-00000006" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 if file != "state.json" else 0x80
    path.write_bytes(content)

    again = trainer_of(tmp_path, config)
    assert again.history.step == 4
    again.train()

    assert again.history.nats == whole.history.nats


def test_a_checkpoint_that_cannot_be_written_says_so(model, tmp_path):
    trainer = trainer_of(tmp_path, small_config(model))
    (tmp_path / "scratch").write_text("in the way")

    with pytest.raises(ProxyError, match="can't be written to"):
        trainer.train()


# --- bad days


def test_a_loss_that_is_not_a_number_stops_the_run_without_an_outcome(model, tmp_path):
    trained = []
    store, spec, evaluation = write_run(tmp_path, small_config(model))
    folder = save_lm(tmp_path / "broken")
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    lm.save_pretrained(folder)
    facts = describe_model(str(folder))
    broken = with_changes(spec, model=str(folder), weights_hash=facts.weights_hash)

    # The check for leaks would refuse it before: a model breaks while it trains.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_model, "check_isolation", lambda *_: None)
        record = train_pretrained(
            store, broken, device="cpu", evaluation=evaluation,
            progress=lambda step, loss: trained.append(step),
        )  # fmt: skip

    assert record.diverged
    assert (record.bits_per_byte, record.nats_per_token, record.scores) == ({}, {}, {})
    assert trained == []
    store.put(record)
    assert store.get(spec.key) is None and store.get(broken.key) == record


def test_a_recipe_that_explodes_is_marked_diverged(model, tmp_path):
    config = small_config(model, learning_rate=1e4, grad_clip=1e9, tokens=64 * 4 * 12)
    store, spec, evaluation = write_run(tmp_path, config)

    record = train_pretrained(store, spec, device="cpu", evaluation=evaluation)

    assert record.diverged
    assert record.bits_per_byte == {}


class Hungry(transformers.Qwen2ForCausalLM):
    """Runs out of memory above a number of sequences."""

    most = 1
    seen: list[int]

    def get_decoder(self):
        decoder = super().get_decoder()

        def forward(**inputs):
            n = len(inputs["input_ids"])
            self.seen.append(n)
            if n > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return decoder(**inputs)

        return forward


def hungry(trainer: Trainer, most: int) -> Trainer:
    """The trainer with a model that fits `most` sequences."""
    trainer.model._causalmix_plain_head = True
    trainer.model.__class__ = Hungry
    trainer.model.most, trainer.model.seen = most, []
    return trainer


def test_a_step_that_runs_out_of_memory_is_repeated_with_half_as_many_sequences(model, tmp_path):
    config = small_config(model, micro_batch=4)
    trainer = hungry(trainer_of(tmp_path / "hungry", config), 1)
    by_one = trainer_of(tmp_path / "one", replace(config, micro_batch=1))

    history = trainer.train()
    by_one.train()

    assert trainer.model.seen[:3] == [4, 2, 1]
    assert history.micro_batch == 1
    assert history.nats == by_one.history.nats
    for name, value in weights_of(by_one).items():
        assert torch.equal(value, weights_of(trainer)[name])


def test_a_resumed_run_keeps_the_micro_batch_that_fitted(model, tmp_path):
    config = small_config(model, micro_batch=4)
    hungry(trainer_of(tmp_path, config), 2).train()

    assert trainer_of(tmp_path, config).history.micro_batch == 2


def test_a_sequence_that_does_not_fit_alone_names_the_way_out(model, tmp_path):
    trainer = hungry(trainer_of(tmp_path, small_config(model)), 0)

    with pytest.raises(ProxyError, match=r"1 sequence of 64 tokens.*gradient_checkpointing"):
        trainer.train()


LIMITED = """
import resource, sys
from pathlib import Path
from causalmix_pipeline_tests.adapters.pretrained_runs import *
from causalmix_pipeline.adapters.pretrained_model import load_model, summed_loss
from causalmix_pipeline.adapters.pretrained_trainer import Checkpoints, Feed, Trainer
root, model = Path(sys.argv[1]), sys.argv[2]
config = small_config(model, batch_sequences=256, micro_batch=256, tokens=256 * 64 * 2)
store, spec, _ = write_run(root, config)
trainer = Trainer(load_model(config, "cpu"), config, "cpu", Feed.of(store, spec),
                  Checkpoints(root / "scratch"))
summed_loss(trainer.model, trainer.feed.rows(0)[:2], "cpu").backward()  # libraries are loaded
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20, -1))
history = trainer.train()
print(history.micro_batch, len(history.nats))
"""


def test_a_cpu_that_is_out_of_memory_for_real_goes_on_with_fewer_sequences(tmp_path):
    model = save_lm(tmp_path / "wide", intermediate_size=1024)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(model)], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    micro_batch, n_steps = map(int, done.stdout.split())
    assert 1 <= micro_batch < 256
    assert n_steps == 2


def test_a_model_that_changed_since_the_design_is_refused(model, tmp_path):
    config = replace(small_config(model), weights_hash="0" * 32)

    with pytest.raises(ConfigError, match=r"proxy\.pretrained must be the model .*0{32}"):
        load_model(config, "cpu")


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_lm(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ConfigError, match=r"got none for model\.norm\.weight"):
        load_model(small_config(folder), "cpu")


# --- a real model


def test_a_real_model_packs_exactly_and_resumes_with_the_same_loss(tmp_path):
    folder = real_model_folder()
    if folder is None:
        pytest.skip("no model: set CAUSALMIX_TEST_MODEL, or run `causalmix fetch-scorer`")
    changes = {
        "sequence_length": 96, "tokens": 96 * 2 * 2, "batch_sequences": 2, "micro_batch": 1,
        "method": "lora", "checkpoint_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    train_killed(tmp_path / "killed", folder, changes, after=2)
    store, spec, evaluation = write_run(tmp_path / "killed", small_config(folder, **changes))
    evaluation = EvalWindows(
        {"talk": evaluation.windows["talk"][:1]}, evaluation.n_bytes, evaluation.unigram_nats
    )
    resumed = train_pretrained(store, spec, device="cpu", evaluation=evaluation)
    whole = write_run(tmp_path / "whole", small_config(folder, **changes))
    unbroken = train_pretrained(whole[0], whole[1], device="cpu", evaluation=evaluation)

    assert outcome(resumed) == outcome(unbroken)
    lm = load_model(small_config(folder, **changes | {"method": "full"}), "cpu")
    rows = [row for row in Feed.of(store, spec).rows(0) if not row.has_loss_L[1]]
    packed, expected = loss_of(lm, rows[0]), unpacked_nats(lm, rows[0])
    n_losses = int(rows[0].has_loss_L.sum())
    assert len(alone(rows[0])) > 1
    assert packed / n_losses == pytest.approx(expected / n_losses, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_resumes_with_the_same_bits_and_packs_exactly(model, tmp_path):
    config = small_config(model, bf16=True)
    store, spec, evaluation = write_run(tmp_path / "a", config)
    feed = Feed.of(store, spec)
    lm = load_model(replace(config, bf16=False), "cuda")
    for row in feed.rows(0):
        with torch.no_grad():
            packed = float(summed_loss(lm, [row], "cuda"))
        assert packed == pytest.approx(unpacked_nats(lm.cpu(), row), rel=1e-4)
        lm.cuda()
    whole = train_pretrained(store, spec, device="cuda", evaluation=evaluation)
    last = sorted(store.scratch(spec.key).glob("step-*"))[-1]
    for file in last.iterdir():
        file.unlink()

    again = train_pretrained(store, spec, device="cuda", evaluation=evaluation)

    assert outcome(again) == outcome(whole)
