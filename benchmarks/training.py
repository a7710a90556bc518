"""Training through servers of the swarm, over training with local `transformers` in the same run.

    python benchmarks/training.py step --family bloom     # a prompt-tuning step with frozen weights, through 1 and 3 servers; also llama
    python benchmarks/training.py lora                    # a step that trains a LoRA of all blocks, over PEFT's
    python benchmarks/training.py forward                 # a forward pass of 8 × 128 tokens without gradients
    python benchmarks/training.py replicas                # what one trainer gets of two servers with the same blocks, over one
    python benchmarks/training.py memory                  # memory of the client and the servers over 200 steps

Real node processes on loopback, one compute thread in every process. The alternatives take turns in every round, and the tables have
medians over rounds. "over local" is an alternative's time over the local model's: 1.00 would be a swarm without overhead. The last columns
are processor time, which other work on the machine disturbs less: what this process and what the servers spend, and all of it over what
the local model takes. "recomputed" has servers keep no graphs: their backward passes run the forward pass again. `--quick` takes a tiny
model, which only shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from generate import used
from swarm_processes import Bench, bench, local_addrs, machine, make_llama, make_model, print_table

FAMILIES = {"bloom": (make_model, {"layers": 24}), "llama": (make_llama, {"layers": 16})}
FULL_SIZE = {"hidden": 1024, "heads": 16, "vocabulary": 8192}
QUICK_SIZE = {"layers": 4, "hidden": 64, "heads": 4, "vocabulary": 512}
PROJECTIONS = {"bloom": ["query_key_value"], "llama": ["q_proj", "v_proj"]}
"""Of a block, the modules that get LoRA parameters: PEFT's own choice for these families."""
LEARNING_RATE = 1e-3
SERVED = ("--dtype", "float32", "--throughput", "100")
"""A given throughput: the measurement at start is not what is compared here."""


@dataclass
class Side:
    """One alternative, and what its runs took.

    Attributes:
        run: what is measured, once.
        trained: the parameters whose gradients are compared.
        servers: that work for it.
        seconds, own, theirs: of each run, by the clock, and of processor time here and at the servers.
    """

    name: str
    run: Callable[[], Any]
    trained: Sequence[Any] = ()
    servers: Sequence[psutil.Process] = ()
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def measure(self) -> None:
        before, own = used(list(self.servers)), time.process_time()
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)
        self.own.append(time.process_time() - own)
        self.theirs.append(used(list(self.servers)) - before)


class Place:
    """The model's folder and the swarms that serve it."""

    def __init__(self, running: Bench, options: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(1)
        make, sizes = FAMILIES[options.family]
        self.family, self.running = options.family, running
        self.sizes = argparse.Namespace(**FULL_SIZE | sizes | (QUICK_SIZE if options.quick else {}))
        self.path = make(running.folder, self.sizes)
        size = f"{self.sizes.layers}×{self.sizes.hidden}, {self.sizes.heads} heads, vocabulary {self.sizes.vocabulary}, float32"
        print(f"{options.family} {size}; batch {options.rows} × {options.length}, {options.rounds} rounds; {machine()}", flush=True)

    def ids(self, options: argparse.Namespace) -> Any:
        import torch

        shape = (options.rows, options.length)
        return torch.randint(10, self.sizes.vocabulary, shape, generator=torch.Generator().manual_seed(options.length))

    def serve(self, count: int, replicas: int = 1) -> tuple[list[str], list[psutil.Process], list[str]]:
        """A swarm of `count` servers after one another, each so many times: bootstrap multiaddrs, processes, peer ids."""
        bounds = [round(self.sizes.layers * part / count) for part in range(count + 1)]
        peers: list[str] = []
        processes, peer_ids = [], []
        for first, end in zip(bounds, bounds[1:], strict=False):
            for _ in range(replicas):
                process, ready, _ = self.running.node(self.path, "--serve", f"{first}:{end}", *SERVED, peers=peers)
                processes.append(psutil.Process(process.pid))
                peer_ids.append(str(ready["peer_id"]))
                peers = peers or local_addrs(ready)
        return peers, processes, peer_ids

    def local(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).requires_grad_(False)

    def remote(self, peers: Sequence[str], **settings: Any) -> Any:
        import torch

        from petalnet import AutoDistributedModelForCausalLM

        return AutoDistributedModelForCausalLM.from_pretrained(
            self.path, initial_peers=list(peers), dtype=torch.float32, show_route=False, **settings
        ).requires_grad_(False)


def step_of(loss: Callable[[], Any], trained: Sequence[Any]) -> Callable[[], None]:
    """A training step: gradients of `loss`, and an update of what is trained."""
    import torch

    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def local_prompts(model: Any, ids: Any, length: int) -> tuple[Callable[[], Any], Any]:
    """The loss of a local model with trainable prompts before its inputs, and these prompts."""
    import torch

    prompts = torch.nn.Parameter(torch.randn(length, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.02)
    # Outputs of a tuned model begin at the first token, so it is nobody's next one.
    labels = torch.cat([torch.full((ids.shape[0], length + 1), -100), ids[:, 1:]], dim=1)

    def loss() -> Any:
        embeddings = torch.cat([prompts.expand(ids.shape[0], -1, -1), model.get_input_embeddings()(ids)], dim=1)
        return model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss

    return loss, prompts


def steps(place: Place, options: argparse.Namespace) -> list[Side]:
    import torch

    ids = place.ids(options)
    loss, prompts = local_prompts(place.local(), ids, options.pre_seq_len)
    start = prompts.detach().clone()
    sides = [Side("local", step_of(loss, [prompts]), [prompts])]
    for count in options.servers:
        peers, processes, _ = place.serve(count)
        for kept in (True, False):
            model = place.remote(peers, tuning_mode="ptune", pre_seq_len=options.pre_seq_len, kept_graphs=kept)
            weight = model.base_model.prompt_embeddings.weight
            with torch.no_grad():
                weight.copy_(start)
            name = f"{count} server{'s' if count > 1 else ''}, {'kept graphs' if kept else 'recomputed'}"
            sides.append(Side(name, step_of(lambda model=model: model(ids, labels=ids).loss, [weight]), [weight], processes))
    return sides


def lora(place: Place, options: argparse.Namespace) -> list[Side]:
    import torch
    from peft import LoraConfig

    ids = place.ids(options)

    def side(name: str, model: Any, processes: Sequence[psutil.Process] = ()) -> Side:
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(target_modules=PROJECTIONS[place.family], r=options.rank, init_lora_weights=False))
        trained = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
        return Side(name, step_of(lambda: model(ids, labels=ids).loss, trained), trained, processes)

    sides = [side("local", place.local())]
    for count in options.servers:
        peers, processes, _ = place.serve(count)
        for kept in (True, False):
            name = f"{count} server{'s' if count > 1 else ''}, {'kept graphs' if kept else 'recomputed'}"
            sides.append(side(name, place.remote(peers, kept_graphs=kept), processes))
            for own, first in zip(sides[-1].trained, sides[0].trained, strict=True):
                own.data.copy_(first)
    return sides


def forward(place: Place, options: argparse.Namespace) -> list[Side]:
    import torch

    ids = place.ids(options)

    def run(model: Any) -> Callable[[], Any]:
        @torch.inference_mode()
        def forward() -> Any:
            return model(ids, use_cache=False).logits

        return forward

    sides = [Side("local", run(place.local()))]
    for count in options.servers:
        peers, processes, _ = place.serve(count)
        sides.append(Side(f"{count} server{'s' if count > 1 else ''}", run(place.remote(peers)), (), processes))
    return sides


def replicas(place: Place, options: argparse.Namespace) -> list[Side]:
    """The reference is one server, not the local model."""
    ids = place.ids(options)
    peers, processes, peer_ids = place.serve(1, replicas=2)
    sides = []
    for name, chosen in (("1 server", slice(0, 1)), ("2 servers", slice(0, 2))):
        model = place.remote(peers, tuning_mode="ptune", pre_seq_len=options.pre_seq_len, allowed_servers=peer_ids[chosen])
        weight = model.base_model.prompt_embeddings.weight
        step = step_of(lambda model=model: model(ids, labels=ids).loss, [weight])
        sides.append(Side(name, step, (), processes[chosen]))
    return sides


def compare(sides: Sequence[Side], rounds: int, reference: str = "local") -> None:
    """Runs all sides in turn and prints the table."""
    import torch

    for side in sides:  # warms up: buffers, connections
        side.run()
    first, *others = [[parameter.grad.clone() for parameter in side.trained] for side in sides if side.trained] or [[]]
    apart = [
        max(float((own - theirs).abs().max() / theirs.abs().max()) for own, theirs in zip(gradients, first, strict=True))
        for gradients in others
    ]
    for number in range(rounds):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            side.measure()
    median = statistics.median
    base, base_cpu = median(sides[0].seconds), median(sides[0].own) + median(sides[0].theirs)
    rows = []
    for side in sides:
        each = [own / other for own, other in zip(side.seconds, sides[0].seconds, strict=True)]
        own, theirs = median(side.own), median(side.theirs)
        cells = [median(side.seconds), median(side.seconds) / base, min(each), max(each), own, theirs, (own + theirs) / base_cpu]
        rows.append([side.name, *cells])
    print_table(["", "seconds", f"over {reference}", "best", "worst", "cpu s", "servers'", f"over {reference}"], rows)
    if apart:
        print(f"gradients of the first step differ from local by at most {max(apart):.1e} of the largest")
    torch.set_grad_enabled(True)


def memory(place: Place, options: argparse.Namespace) -> None:
    """Prints what the processes hold, and how it grows: a straight line through it after the first third of the steps."""
    import torch
    from peft import LoraConfig

    ids = place.ids(options)
    peers, processes, _ = place.serve(max(options.servers))
    model = place.remote(peers, tuning_mode="deep_ptune", pre_seq_len=options.pre_seq_len)
    model.add_adapter(LoraConfig(target_modules=PROJECTIONS[place.family], r=options.rank))
    trained = [parameter for name, parameter in model.named_parameters() if ".lora_" in name or "prompt_embeddings" in name]
    step = step_of(lambda: model(ids, labels=ids).loss, trained)
    looked: list[list[int]] = []
    everybody = {"client": psutil.Process(), **{f"server {number}": process for number, process in enumerate(processes)}}
    for _ in range(options.steps):
        step()
        looked.append([process.memory_info().rss for process in everybody.values()])
    rows = []
    steady = torch.tensor(looked[len(looked) // 3 :], dtype=torch.float64)
    for number, name in enumerate(everybody):
        slope, _ = statistics.linear_regression(range(len(steady)), steady[:, number].tolist())
        held = [looked[at][number] / 2**20 for at in (0, len(looked) // 3, -1)]
        rows.append([name, *held, slope / 2**10, 100 * slope * len(steady) / float(steady[:, number].mean())])
    print_table(["MiB after", "a step", "a third", "all", "KiB a step", "% until the end"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "lora", "forward", "replicas", "memory"))
    parser.add_argument("--family", choices=sorted(FAMILIES), default="bloom")
    parser.add_argument("--rows", type=int, help="of a batch  [default: 4; 8 for forward and replicas]")
    parser.add_argument("--length", type=int, help="tokens of a row, prompts aside  [default: 64; 128 for forward]")
    parser.add_argument("--pre-seq-len", type=int, default=16, help="prompt positions")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA parameters")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 3], help="sizes of the swarms to compare")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="of which memory is looked at")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rows = options.rows or (8 if options.what in ("forward", "replicas") else 4)
    options.length = options.length or (128 if options.what == "forward" else 64)
    with bench() as running:
        # Before torch and petalnet are imported: the client in this process lives in the same surroundings as the nodes.
        os.environ.clear()
        os.environ.update(running.environment)
        place = Place(running, options)
        if options.what == "memory":
            memory(place, options)
        elif options.what == "replicas":
            compare(replicas(place, options), options.rounds, "one server")
        else:
            sides = {"step": steps, "lora": lora, "forward": forward}[options.what](place, options)
            compare(sides, options.rounds)


if __name__ == "__main__":
    main()
