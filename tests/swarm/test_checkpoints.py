"""Real servers whose model is on a hub, stored in 4 bits, in less disk space than all of it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import petalnet
from petalnet.models.checkpoint import ModelSource
from petalnet.models.loading import build
from tests.models.hub_server import REPOSITORY, is_weights, serving


@pytest.mark.long
def test_a_swarm_of_a_rounded_model_on_a_hub(nodes, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
        initializer_range=0.15, tie_word_embeddings=False, pad_token_id=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    rounding = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=rounding)
    rounded.generation_config.eos_token_id = None
    rounded.save_pretrained(tmp_path / "rounded")
    source = ModelSource.open(tmp_path / "rounded")
    local = build(transformers.AutoModelForCausalLM, source, names=lambda parts: source.tensor_names()).model
    blocks = sum(info.nbytes for name, info in source.files.tensors().items() if "layers." in name)
    with serving(tmp_path / "rounded") as hub:
        environment = hub.environment(tmp_path / "home")
        environment = {name: environment[name] for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "NO_PROXY")}
        options = ["--dtype", "float32", "--throughput", "100", "--max-disk-space", str(blocks)]
        first = nodes.launch(REPOSITORY, "--serve", "0:3", "--new-swarm", *options, environment=environment).wait_ready()
        second = nodes.launch(REPOSITORY, "--serve", "3:6", "--initial-peers", *first.addrs, *options, environment=environment)
        second.wait_ready()
        weights = {name: size for name, size in hub.sent.items() if is_weights(name)}
        print(f"bytes of weights that the hub sent over all blocks' own: {sum(weights.values()) / blocks:.3f}")
        assert sum(weights.values()) < blocks * 1.05 + 3 * 65536
        with petalnet.AutoDistributedModelForCausalLM.from_pretrained(
            str(tmp_path / "rounded"), initial_peers=first.addrs, dtype=torch.float32, quantization="nf4"
        ) as remote:
            tokens = torch.randint(4, 512, (2, 9), generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(remote(tokens).logits, local(tokens).logits, atol=1e-3, rtol=1e-3)
            expected = local.generate(tokens, max_new_tokens=16, do_sample=False)
            assert torch.equal(remote.generate(tokens, max_new_tokens=16, do_sample=False), expected)
