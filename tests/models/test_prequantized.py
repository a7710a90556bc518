"""Checkpoints whose weights are stored rounded, against the library's own reading of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from petalnet.blocks.probe import require_splittable
from petalnet.blocks.quantization import QuantizedLinear
from petalnet.blocks.span import Span
from petalnet.errors import ModelError
from petalnet.models.checkpoint import ModelSource
from petalnet.models.loading import build
from petalnet.models.prequantized import require_readable, stored_quantization

Saved = Callable[[str], Path]
FOUR_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
NF4 = FOUR_BITS | {"bnb_4bit_quant_type": "nf4"}
NESTED = NF4 | {"bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models with rows as long as a group of bitsandbytes: it makes shorter ones whole with other scales than it rounded them with."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
            if family == "gpt2":
                sizes = {"vocab_size": 99, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0}
            folders[family] = tmp_path_factory.mktemp(family)
            config = transformers.AutoConfig.for_model(family, **sizes)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return folder


def save_with_bitsandbytes(folder: Path, saved: Path, **fields: Any) -> transformers.PreTrainedModel:
    """Round a model as the library does, and save it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=transformers.BitsAndBytesConfig(**fields))
    model.save_pretrained(folder)
    return model


def whole(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its weights as the library makes them whole."""
    return {name: tensor.float() for name, tensor in model.dequantize(dtype=torch.float32).state_dict().items()}


@pytest.mark.parametrize("fields", [FOUR_BITS, NF4, NESTED, {"load_in_8bit": True}], ids=["fp4", "nf4", "nested", "int8"])
def test_bitsandbytes(fields: dict[str, Any], wider: Saved, tmp_path: Path) -> None:
    expected = whole(save_with_bitsandbytes(tmp_path / "rounded", wider("llama"), **fields))
    source = ModelSource.open(tmp_path / "rounded")
    built = build(transformers.AutoModelForCausalLM, source, names=lambda parts: source.tensor_names())
    assert not built.missing
    for name, tensor in built.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=2e-3)  # the library's go through half precision


def test_layers_that_are_stored_transposed(wider: Saved, tmp_path: Path) -> None:
    expected = whole(save_with_bitsandbytes(tmp_path / "rounded", wider("gpt2"), **NF4))
    source = ModelSource.open(tmp_path / "rounded")
    built = build(transformers.AutoModelForCausalLM, source, names=lambda parts: source.tensor_names())
    for name, tensor in built.model.state_dict().items():
        other = expected[name]
        torch.testing.assert_close(tensor, other.t() if "c_" in name and "weight" in name else other, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("fields", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_blocks_keep_the_numbers_that_are_stored(fields: dict[str, Any], wider: Saved, tmp_path: Path) -> None:
    save_with_bitsandbytes(tmp_path / "rounded", wider("llama"), **fields)
    source = ModelSource.open(tmp_path / "rounded")
    assert require_splittable(source.config).packs
    quantization = stored_quantization(source.config)
    assert quantization == ("nf4" if "load_in_4bit" in fields else "int8")
    span, plain = (Span.load(source, 1, 2, quantization=kind) for kind in (quantization, "none"))
    layers = {path: layer for path, layer in span._blocks[0].named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 7 and len(span.digests) == 1
    for path, layer in layers.items():
        expected = plain._blocks[0].get_submodule(path).weight
        torch.testing.assert_close(layer.dequantized(torch.float32), expected, atol=1e-6, rtol=1e-5)


def test_fp8_with_scales_of_blocks(saved: Saved, tmp_path: Path) -> None:
    source, expected = save_fp8(tmp_path / "fp8", saved("llama"), [16, 24])
    built = build(transformers.AutoModelForCausalLM, source, names=lambda parts: source.tensor_names())
    assert not built.missing
    for name, tensor in built.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_experts_in_fp8_are_made_whole_before_they_are_put_together(saved: Saved, tmp_path: Path) -> None:
    source, expected = save_fp8(tmp_path / "fp8", saved("mixtral"), [16, 16])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((saved("mixtral") / "config.json").read_bytes())
    save_file(expected, plain / "model.safetensors")
    models = [
        build(transformers.AutoModelForCausalLM, one, names=lambda parts, one=one: one.tensor_names()).model
        for one in (source, ModelSource.open(plain))
    ]
    for (name, left), right in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
    tokens = torch.arange(12).view(1, 12)
    library = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    torch.testing.assert_close(models[0](tokens).logits, library(tokens).logits, atol=1e-4, rtol=1e-4)


def save_fp8(folder: Path, saved: Path, block: list[int]) -> tuple[ModelSource, dict[str, torch.Tensor]]:
    """A model with its blocks' matrices in float8, a scale for each block of so many rows and columns; and what it stands for."""
    tensors, expected = {}, {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        expected[name] = tensors[name] = tensor
        if "layers." in name and tensor.ndim == 2 and "gate.weight" not in name:
            rows, columns = tensor.shape
            scales = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
            spread = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
            tensors[name], tensors[f"{name}_scale_inv"] = (tensor / spread).to(torch.float8_e4m3fn), scales
            expected[name] = tensors[name].float() * spread
    save_rounded(folder, saved, tensors, {"quant_method": "fp8", "weight_block_size": block, "modules_to_not_convert": ["lm_head", "gate"]})
    return ModelSource.open(folder), expected


def save_rounded(folder: Path, saved: Path, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    folder.mkdir()
    config = json.loads((saved / "config.json").read_text()) | {"quantization_config": description}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_mxfp4_as_the_library_reads_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from petalnet.models.prequantized import _from_mxfp4

    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 8, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(_from_mxfp4({"blocks": blocks, "scales": scales}, torch.float32), expected)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao", "hqq"])
def test_other_formats_are_refused_by_name(method: str, saved: Saved, tmp_path: Path) -> None:
    save_rounded(tmp_path / "other", saved("llama"), {"a": torch.zeros(1)}, {"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"^the weights of other are stored in the format {method}, which cannot be read here .*$"):
        ModelSource.open(tmp_path / "other")


@pytest.mark.parametrize(
    ("part", "damaged"),
    [
        ("absmax", torch.zeros(1)),
        ("quant_map", torch.zeros(3)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b"\xff{"), dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": [9, 9], "blocksize": 64}'), dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": [64, 32], "blocksize": 0}'), dtype=torch.uint8)),
    ],
)
def test_damaged_parts_are_named(part: str, damaged: torch.Tensor, saved: Saved, tmp_path: Path) -> None:
    save_with_bitsandbytes(tmp_path / "rounded", saved("llama"), **NF4)
    tensors = load_file(tmp_path / "rounded" / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    tensors[f"{weight}.{part}"] = damaged
    save_file(tensors, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"^the weight {weight} of rounded is stored rounded, and cannot be made whole: .*$"):
        Span.load(ModelSource.open(tmp_path / "rounded"), 1, 2)


def test_what_is_not_stored_rounded(saved: Saved) -> None:
    config = ModelSource.open(saved("llama")).config
    assert require_readable(config, "llama") == stored_quantization(config) == "none"
