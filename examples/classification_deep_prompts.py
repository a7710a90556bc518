# %% [markdown]
# # Who wrote this?
#
# Text classification with deep prompts: 8 vectors before every row's tokens, as many that are added to what each of the 12 remote blocks
# gets there, and a new head of two outputs are trained; the model itself stays as it is, on the servers. It learns to tell Shakespeare
# from Jane Austen by some 150 characters without names of speakers or line breaks.
#
# Two servers are started on this machine. To use a swarm that runs already: `--initial-peers MADDR …` after the script's name.

# %%
import own_swarm
import texts
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from petalnet import AutoDistributedModelForSequenceClassification
from petalnet.models.checkpoint import DEMO_MODEL

peers = own_swarm.peers()

# %%
AUTHORS = ("Austen", "Shakespeare")
torch.manual_seed(7)
tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
model = AutoDistributedModelForSequenceClassification.from_pretrained(
    str(DEMO_MODEL),
    initial_peers=peers,
    dtype=torch.float32,
    show_route=False,
    num_labels=len(AUTHORS),
    tuning_mode="deep_ptune",
    pre_seq_len=8,
)
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        print(f"trained: {name}, {parameter.numel():,} numbers")

# %% [markdown]
# The passages are from the last pages of plays and novels, which the model has not seen; those to test with are from other works.


# %%
def collate(passages):
    batch = tokenizer([passage["text"] for passage in passages], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([AUTHORS.index(passage["author"]) for passage in passages])}


train = torch.utils.data.DataLoader(
    texts.load("passages", "train"), batch_size=8, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(7)
)
test = torch.utils.data.DataLoader(texts.load("passages", "test"), batch_size=30, collate_fn=collate)


@torch.no_grad()
def accuracy():
    model.eval()
    right = sum(int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum()) for batch in test)
    model.train()
    return right / len(test.dataset)


before = accuracy()
print(f"{len(train.dataset)} passages to train on, {len(test.dataset)} to test with")
print(f"right before training: {before:.0%}")

# %% [markdown]
# A loop in the manner of `accelerate`, which takes a distributed model as it takes any other.

# %%
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
model, optimizer, train = accelerator.prepare(model, optimizer, train)
total = 0.0
for step, batch in enumerate(train, start=1):
    loss = model(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total += loss.item()
    if step % 10 == 0:
        print(f"step {step}: loss {total / 10:.2f}")
        total = 0.0

# %%
after = accuracy()
print(f"right on passages from other works: {before:.0%} before, {after:.0%} after training")
for text in (
    "I have been thinking of it ever since, and I am quite determined to call upon her to-morrow.",
    "What, will the heavens not weep for such a deed, and drown the murderer in his own foul blood?",
):
    with torch.no_grad():
        scores = model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(dim=-1)[0]
    print(f"{AUTHORS[int(scores.argmax())]} ({float(scores.max()):.0%}): {text}")
model.close()
