# %% [markdown]
# # A LoRA of blocks that are elsewhere
#
# The demo model writes plays and novels. Here it learns to write dictionary entries, after Ambrose Bierce's *The Devil's Dictionary*: LoRA
# layers around the linear modules of all 12 remote blocks, trained by `transformers.Trainer`. The parameters and the optimizer are on this
# machine; the servers are given the parameters and give back their gradients. What comes of it is an adapter in PEFT's format.
#
# Two servers are started on this machine. To use a swarm that runs already: `--initial-peers MADDR …` after the script's name.

# %%
import tempfile
from pathlib import Path

import own_swarm
import texts
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from petalnet import AutoDistributedModelForCausalLM
from petalnet.models.checkpoint import DEMO_MODEL

peers = own_swarm.peers()
folder = tempfile.TemporaryDirectory()
checkpoints, adapter = Path(folder.name) / "checkpoints", Path(folder.name) / "devil"

# %% [markdown]
# `add_adapter` is the library's own, and so are the names of the modules: those of a BLOOM block.

# %%
torch.manual_seed(7)
tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
model = AutoDistributedModelForCausalLM.from_pretrained(str(DEMO_MODEL), initial_peers=peers, dtype=torch.float32, show_route=False)
model.add_adapter(
    LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        task_type="CAUSAL_LM",
    )
)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"trained: {len(trained)} matrices, {sum(parameter.numel() for parameter in trained):,} numbers")

# %% [markdown]
# The Trainer is used as with any model.


# %%
def encode(split):
    return [tokenizer(record["text"] + tokenizer.eos_token) for record in texts.load("definitions", split)]


trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=20,
        learning_rate=3e-3,
        logging_steps=20,
        save_strategy="epoch",
        seed=7,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=encode("train"),
    eval_dataset=encode("test"),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"loss on entries that it has not seen: {before:.2f} before, {after:.2f} after training")

# %% [markdown]
# It is used at once, by the same model.


# %%
def define(model, word):
    inputs = tokenizer(f"{word}, n.", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


WORDS = ("LOVE", "KING", "MARRIAGE", "PHYSICIAN")
model.eval()
definitions = [define(model, word) for word in WORDS]
print("\n".join(definitions))

# %% [markdown]
# Saved, it is a LoRA adapter like any other: a local model takes it, a distributed one loads it again, and hosts may offer it to
# everybody, by its folder's name.

# %%
model.save_pretrained(adapter)
print(*sorted(file.name for file in adapter.iterdir()))
model.close()

local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), str(adapter)).eval()
print("the same on a local model:", [define(local, word) for word in WORDS] == definitions)

with AutoDistributedModelForCausalLM.from_pretrained(str(adapter), initial_peers=peers, show_route=False) as again:
    print("the same after loading:", [define(again.eval(), word) for word in WORDS] == definitions)

# %% [markdown]
# Two more servers, started with `petalnet node --serve … --adapters …/devil`. A client that names the adapter is routed through servers
# that have it; nothing of it is on the client.

# %%
own_swarm.serve(peers, adapters=[adapter])
with AutoDistributedModelForCausalLM.from_pretrained(
    str(DEMO_MODEL), initial_peers=peers, dtype=torch.float32, show_route=False, active_adapter=adapter.name
) as hosted:
    print("the same from the hosts' adapter:", [define(hosted, word) for word in WORDS] == definitions)
folder.cleanup()
