# %% [markdown]
# # A partner for a dialogue
#
# Prompt tuning: the model stays as it is, on the servers, and 16 vectors are trained that stand before every row's tokens. The demo model
# writes plays, with names in capitals and a line of their own; here it learns to answer in a chat, `You: … Player: …`, and then chats for
# several turns in one session.
#
# Two servers are started on this machine. To use a swarm that runs already: `--initial-peers MADDR …` after the script's name.

# %%
import tempfile

import own_swarm
import texts
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from petalnet import AutoDistributedModelForCausalLM
from petalnet.models.checkpoint import DEMO_MODEL

peers = own_swarm.peers()

# %% [markdown]
# `tuning_mode="ptune"` adds the trainable vectors; nothing else of the model requires gradients.

# %%
torch.manual_seed(7)
tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
model = AutoDistributedModelForCausalLM.from_pretrained(
    str(DEMO_MODEL), initial_peers=peers, dtype=torch.float32, show_route=False, tuning_mode="ptune", pre_seq_len=16
)
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        print(f"trained: {name}, {parameter.numel():,} numbers")

# %% [markdown]
# Exchanges from the last pages of Shakespeare's plays, which the model has not seen. Only the answer counts for the loss. Those to test
# with come from other plays.


# %%
def encode(exchange):
    said = tokenizer(f"You: {exchange['said']}\nPlayer:")["input_ids"]
    answered = tokenizer(f" {exchange['answered']}\n")["input_ids"]
    return torch.tensor(said + answered), torch.tensor([-100] * len(said) + answered)


def collate(exchanges):
    ids, labels = zip(*map(encode, exchanges), strict=True)
    padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": padded,
        "attention_mask": (padded != tokenizer.pad_token_id).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


train, test = texts.load("exchanges", "train"), texts.load("exchanges", "test")
batches = torch.utils.data.DataLoader(
    train, batch_size=8, shuffle=True, drop_last=True, collate_fn=collate, generator=torch.Generator().manual_seed(7)
)


@torch.no_grad()
def test_loss():
    model.eval()
    parts = [collate(test[first : first + 31]) for first in range(0, len(test), 31)]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    losses = [float(model(**part, use_cache=False).loss) for part in parts]
    model.train()
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


before = test_loss()
print(f"{len(train)} exchanges to train on, {len(test)} to test with")
print(f"loss on test exchanges before training: {before:.2f}")

# %% [markdown]
# The loop that one writes for any model: the forward pass goes through the servers' blocks and the backward pass comes back through them.

# %%
EPOCHS = 2
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=EPOCHS * len(batches))
for epoch in range(EPOCHS):
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
    print(f"epoch {epoch + 1}: loss {total / len(batches):.2f} in training, {test_loss():.2f} on test exchanges")

# %% [markdown]
# What is saved is what was trained, a few kilobytes. The folder is all that is needed to go on from it, here or elsewhere.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    model.close()
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=peers, show_route=False)
after = test_loss()
print(f"loss on test exchanges: {before:.2f} before, {after:.2f} after training, saving and loading")

# %% [markdown]
# A chat in one session: the servers keep the keys and values of what was said, so each turn sends only the new tokens. An answer ends with
# its line.

# %%
model.eval()
torch.manual_seed(3)
end_of_line = tokenizer("\n")["input_ids"][-1]
with model.inference_session(max_length=400) as session:
    for said in ("Who goes there?", "Where is the king?", "Is he dead?", "Then farewell, good friend."):
        turn = tokenizer(f"You: {said}\nPlayer:", return_tensors="pt")["input_ids"]
        answer = model.generate(
            turn, session=session, min_new_tokens=4, max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=end_of_line
        )
        print(tokenizer.decode(answer[0]).strip())
    print(f"({session.position} entries in the session's cache, {model.prompt_length} of them trained prompts)")
model.close()
