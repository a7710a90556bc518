"""`transformers.Trainer` and `accelerate` train a distributed model as they train any other: with checkpoints, and going on from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import petalnet

from . import models
from .conftest import Families

STEPS, SAVED_AT = 6, 3
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value", "dense_4h_to_h"], task_type="CAUSAL_LM")
TUNED = ("lora", "ptune", *(pytest.param(tuned, marks=pytest.mark.long) for tuned in ("deep_ptune", "peft", "embeddings")))
"""What is trained: prompts, an adapter that the model holds or that is wrapped around it, or the embeddings."""


def data(rows: int, seed: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Random rows to train on, all of a few tokens, so that something can be learnt."""
    tokens = torch.randint(4, 20, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    chosen = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    } | options
    return TrainingArguments(output_dir=str(folder), **chosen)


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def distributed(families: Families) -> Iterator[Callable[[str], Any]]:
    """`distributed("ptune")`: the small BLOOM over the swarm, with that to be trained."""
    with ExitStack() as opened:

        def connect(tuned: str) -> Any:
            options = {"tuning_mode": tuned, "pre_seq_len": 4} if "ptune" in tuned else {}
            set_seed(5)
            return prepared(opened.enter_context(models.connected(families.paths["bloom"], families.peers, **options)), tuned)

        yield connect


def prepared(model: Any, tuned: str) -> Any:
    if tuned == "lora":
        model.add_adapter(LORA)
    elif tuned == "peft":
        model = get_peft_model(model, LORA)
    elif tuned == "embeddings":
        model.requires_grad_(False)
        model.transformer.word_embeddings.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("tuned", ["lora", pytest.param("embeddings", marks=pytest.mark.long)])
def test_it_learns_what_a_local_model_learns(families: Families, distributed: Callable[[str], Any], tuned: str, tmp_path: Path) -> None:
    curves = []
    for model in (distributed(tuned), prepared(models.load_local(families.paths["bloom"]), tuned)):
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # in the same order in both
                    parameter.normal_(std=0.05)
        trainer = Trainer(
            model, arguments(tmp_path, eval_strategy="steps", eval_steps=3), train_dataset=data(24, seed=1), eval_dataset=data(8, seed=2)
        )
        trainer.train()
        curves.append((logged(trainer), logged(trainer, "grad_norm"), logged(trainer, "eval_loss")))
    for ours, local in zip(*curves, strict=True):
        assert ours == pytest.approx(local, rel=1e-3)
    losses = curves[0][0]
    assert len(losses) == STEPS and losses[-1] < losses[0] and len(curves[0][2]) == 2


@pytest.mark.parametrize("tuned", TUNED)
def test_going_on_from_a_checkpoint_changes_nothing(distributed: Callable[[str], Any], tuned: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": SAVED_AT, "lr_scheduler_type": "linear"}
    whole = Trainer(distributed(tuned), arguments(tmp_path, **options), train_dataset=data(24, seed=1))
    whole.train()
    again = Trainer(distributed(tuned), arguments(tmp_path, **options), train_dataset=data(24, seed=1))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED_AT}"))
    assert logged(again) == pytest.approx(logged(whole), rel=1e-4) and len(logged(again)) == STEPS
    for (name, ours), (_, theirs) in zip(trainable(again.model), trainable(whole.model), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4), name


def test_accelerate_with_accumulated_gradients(families: Families, distributed: Callable[[str], Any]) -> None:
    """Two micro-batches a step, a scheduler, clipping: the same parameters as on a local model."""
    trained = []
    for model in (distributed("embeddings"), prepared(models.load_local(families.paths["bloom"]), "embeddings")):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        batches = torch.utils.data.DataLoader(data(16, seed=3), batch_size=2)  # type: ignore[arg-type]
        model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, scheduler)
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        trained.append(accelerator.unwrap_model(model).transformer.word_embeddings.weight.detach())
    before = models.load_local(families.paths["bloom"]).transformer.word_embeddings.weight
    change = (trained[1] - before).abs().max()
    assert change > 1e-3 and (trained[0] - trained[1]).abs().max() <= 1e-3 * change


@pytest.mark.long
@pytest.mark.parametrize("tuned", ["lora", "deep_ptune"])
def test_a_state_that_accelerate_saved(families: Families, distributed: Callable[[str], Any], tuned: str, tmp_path: Path) -> None:
    """`load_state` brings model and optimizer back; the model that `accelerate` hands out is saved and goes on elsewhere."""
    accelerator = Accelerator(cpu=True)
    model = distributed(tuned)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02))
    (batch,) = torch.utils.data.DataLoader(data(4, seed=1), batch_size=4)  # type: ignore[arg-type]

    def step() -> float:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    first = step()
    accelerator.save_state(str(tmp_path / "state"))
    losses = [step(), step()]
    accelerator.load_state(str(tmp_path / "state"))
    assert [step(), step()] == pytest.approx(losses, rel=1e-4) and losses[1] < first
    accelerator.load_state(str(tmp_path / "state"))
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "trained", save_function=accelerator.save, state_dict=state)
    with models.connected(tmp_path / "trained", families.peers) as again:
        assert float(again(**batch).loss) == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"dataloader_num_workers": 2},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=["checkpointing", "checkpointing-not-reentrant", "accumulation", "workers", "adafactor"],
)
def test_options_of_the_trainer(families: Families, distributed: Callable[[str], Any], options: dict[str, Any], tmp_path: Path) -> None:
    curves = []
    for model in (distributed("embeddings"), prepared(models.load_local(families.paths["bloom"]), "embeddings")):
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data(24, seed=1))
        trainer.train()
        curves.append(logged(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.long
def test_half_precision(distributed: Callable[[str], Any], tmp_path: Path) -> None:
    """Under autocast the local part computes in bfloat16, where every sum is rounded: it learns, and nearly what it learns without."""
    curves = []
    for bf16 in (True, False):
        trainer = Trainer(distributed("lora"), arguments(tmp_path, bf16=bf16), train_dataset=data(24, seed=1))
        trainer.train()
        curves.append(logged(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=0.03) and curves[0][-1] < curves[0][0]


@pytest.mark.long
def test_the_best_checkpoint_is_loaded_in_the_end(distributed: Callable[[str], Any], tmp_path: Path) -> None:
    model = distributed("ptune")
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}

    class Spoil(TrainerCallback):
        """After the second evaluation the prompts are ruined, so that the last one is not the best."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    model.transformer.prompt_embeddings.weight.normal_(std=100.0)

    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=data(24, seed=1), eval_dataset=data(8, seed=2), callbacks=[Spoil()]
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[-1] > min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.long
def test_a_classifier_with_metrics(families: Families, tmp_path: Path) -> None:
    options = {"initial_peers": families.peers, "dtype": torch.float32, "show_route": False}
    set_seed(5)
    model = petalnet.AutoDistributedModelForSequenceClassification.from_pretrained(
        str(families.paths["bloom"]), num_labels=2, tuning_mode="deep_ptune", pre_seq_len=4, **options
    )
    rows = [
        {"input_ids": row["input_ids"] + 100 * (number % 2), "labels": torch.tensor(number % 2)}
        for number, row in enumerate(data(40, seed=4))
    ]
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=30, learning_rate=0.03),
        train_dataset=rows[:24],
        eval_dataset=rows[24:],
        compute_metrics=lambda predicted: {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())},
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.8
    trainer.save_model(str(tmp_path / "trained"))
    again = petalnet.AutoDistributedModelForSequenceClassification.from_pretrained(str(tmp_path / "trained"), **options)
    for (name, ours), (_, theirs) in zip(trainable(again), trainable(model), strict=True):
        assert torch.equal(ours, theirs), name
    model.close()
    again.close()


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Trained parameters by name, the head's and the prompts' and the adapters'."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
