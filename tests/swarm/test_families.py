"""Every family that the table in docs/models.md names, served by two nodes and held against the model on this machine.

With `PETALNET_FAMILIES_RESULTS` naming a folder, what was found is written there, a file a row, for scripts/make_families_table.py.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import petalnet
from petalnet.blocks.probe import probe

from .clients import join
from .family_rows import LAYERS, ROWS, Row, ids, padded, save
from .fleet import Fleet

TOLERANCE = 1e-3
"""Relative to the spread of what is compared, in float32."""
NEW_TOKENS = 5
LENGTHS = (2, 11, 21, 30)
"""Tokens of the prompts that are answered at once."""
LABELS = 3
SERVED = [row for row in ROWS if not row.refused]
REFUSED = [row for row in ROWS if row.refused]


@dataclass
class Found:
    """What the test has found out about a row; differences are the largest, relative to the spread of what was compared."""

    family: str
    variant: str
    prefill: float = 0.0
    decode: float = 0.0
    sessions: float = 0.0
    gradients: float = 0.0
    classification: float | None = None
    packs: bool = False
    refused: str = ""

    def write(self) -> None:
        folder = os.environ.get("PETALNET_FAMILIES_RESULTS")
        if folder:
            name = f"{self.family} {self.variant}".strip().replace(" ", "-")
            (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(self)))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("families")
    with Fleet(folder, [(row.name, lambda row=row: save(row, folder / row.name.replace(" ", "-")), LAYERS) for row in SERVED]) as started:
        yield started


@pytest.fixture
def one_cache(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nodes find out about a family and remember is found here, too."""
    monkeypatch.setenv("PETALNET_CACHE_DIR", fleet.environment["PETALNET_CACHE_DIR"])


@pytest.mark.long
@pytest.mark.usefixtures("one_cache")
@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
def test_family(row: Row, fleet: Fleet) -> None:
    with fleet.serving(row.name) as (path, peers):
        found = Found(row.family, row.variant, packs=probe(row.config()).packs)
        local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with petalnet.AutoDistributedModelForCausalLM.from_pretrained(
            path, initial_peers=peers, dtype=torch.float32, show_route=False
        ) as remote:
            assert isinstance(remote, type(local)) and type(remote).__name__ == f"Distributed{type(local).__name__}"
            join(remote)
            found.prefill = compare_prefill(local, remote)
            found.decode = max(compare_answers(local, remote, ids(1, 9, seed=1), None), compare_answers(local, remote, *padded("left")))
            found.sessions = compare_sessions(local, remote)
            found.gradients = compare_gradients(local, remote)
        if type(row.config()) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            found.classification = compare_classification(path, peers)
    found.write()


@pytest.mark.long
@pytest.mark.usefixtures("one_cache")
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_family_that_is_refused(row: Row, fleet: Fleet, tmp_path: Path) -> None:
    status, log = fleet.refuse(save(row, tmp_path))
    assert status == 2
    assert log.splitlines()[-1] == f"petalnet: a {row.family} model cannot be split into blocks: {probe(row.config()).reason}"
    assert row.refused in log
    Found(row.family, row.variant, refused=row.refused).write()


def test_the_table_has_the_rows_of_this_test() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    assert [(family.strip().strip("`"), variant.strip()) for family, variant in lines] == [(row.family, row.variant) for row in ROWS]


def test_classes_by_name() -> None:
    """Each has them for whatever the library has, and makes models of the library's class, without any swarm."""
    for row in ROWS:
        config = row.config()
        for auto in (transformers.AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
            if type(config) not in auto._model_mapping:
                continue
            library_class = auto._model_mapping[type(config)]
            library_class = library_class[0] if isinstance(library_class, tuple) else library_class
            made = getattr(petalnet, f"Distributed{library_class.__name__}")
            assert issubclass(made, library_class) and made.__name__ == f"Distributed{library_class.__name__}"
        assert issubclass(getattr(petalnet, f"Distributed{type(config).__name__}"), type(config))
    with torch.device("meta"):
        assert isinstance(
            petalnet.DistributedQwen3ForCausalLM(next(row for row in ROWS if row.family == "qwen3").config()), transformers.Qwen3ForCausalLM
        )
    with pytest.raises(AttributeError, match="DistributedNothing"):
        _ = petalnet.DistributedNothing


def test_what_is_no_text_is_refused() -> None:
    with torch.device("meta"):
        model = petalnet.DistributedGemma3ForConditionalGeneration(next(row for row in ROWS if row.family == "gemma3").config())
    with pytest.raises(ValueError, match="pixel_values is not possible: of a gemma3 model, the swarm runs the text part alone"):
        model(input_ids=ids(1, 4, seed=0), pixel_values=torch.zeros(1, 3, 28, 28))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the spread."""
    largest = float((found.detach() - expected.detach()).abs().max() / expected.detach().std())
    assert largest < TOLERANCE
    return largest


def compare_prefill(local: Any, remote: Any) -> float:
    """Logits of rows of unequal lengths, padded on either side."""
    errors = []
    for side in ("left", "right"):
        tokens, mask = padded(side)
        with torch.inference_mode():
            expected, answer = (model(tokens, attention_mask=mask, use_cache=False).logits for model in (local, remote))
        errors.append(difference(answer[mask.bool()], expected[mask.bool()]))
    return max(errors)


def compare_answers(local: Any, remote: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> float:
    """A greedy answer, and the logits of each of its steps."""
    theirs, ours = (answer_of(model, tokens, mask) for model in (local, remote))
    assert torch.equal(ours.sequences, theirs.sequences)
    return difference(torch.stack(ours.logits), torch.stack(theirs.logits))


def answer_of(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> Any:
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def compare_sessions(local: Any, remote: Any) -> float:
    """Answers to prompts of unequal lengths, all at once, so that servers have their steps side by side."""
    prompts = [ids(1, length, seed=length) for length in LENGTHS]
    expected = [answer_of(local, prompt, None) for prompt in prompts]
    answers = at_once([lambda prompt=prompt: answer_of(remote, prompt, None) for prompt in prompts])
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer.sequences, right.sequences)
    return max(difference(torch.stack(answer.logits), torch.stack(right.logits)) for answer, right in zip(answers, expected, strict=True))


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of all of these, each done on a thread of its own, begun together."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def compare_gradients(local: Any, remote: Any) -> float:
    """Gradients of the embeddings of padded rows, by the loss of what comes next."""
    tokens, mask = padded("left")
    targets = tokens.masked_fill(mask == 0, -100)[:, 1:]
    found = []
    for model in (local, remote):
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets)
        found.append(torch.autograd.grad(loss, [embeddings])[0][mask.bool()])
    return difference(found[1], found[0])


def compare_classification(path: Path, peers: list[str]) -> float:
    """Scores of classes, and the gradient of the head that gives them."""
    tokens, mask = padded("right")
    labels = torch.tensor([0, 2, 1])
    local = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=LABELS).eval()
    with petalnet.AutoDistributedModelForSequenceClassification.from_pretrained(
        path, initial_peers=peers, dtype=torch.float32, num_labels=LABELS, show_route=False
    ) as remote:
        assert isinstance(remote, type(local))
        join(remote)
        remote.score.load_state_dict(local.score.state_dict())
        outputs = [model(tokens, attention_mask=mask, labels=labels, use_cache=False) for model in (local, remote)]
        gradients = [
            torch.autograd.grad(output.loss, [model.score.weight])[0] for model, output in zip((local, remote), outputs, strict=True)
        ]
        return max(difference(outputs[1].logits, outputs[0].logits), difference(gradients[1], gradients[0]))
