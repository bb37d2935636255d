"""The forward pass in fewer and larger steps: the same numbers but for rounding, each lever switched by itself.

In: a model as inference.load_model gives it. Out: the same with `lean`, which computes what transformers' ViTModel computes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import inference
import torch
from inference import Device, LoadedModel, Outputs, Preprocess

# What changes how a forward pass is computed, not what it computes; --without switches one off, --with one of the last on:
# no NPU has confirmed their kernels for this model yet, and on a GPU torch.compile makes them at each start.
LEVERS = ("folded_patches", "fused_attention", "stacked_qkv", "packed_weights", "fused_norms", "fused_mlp")
DEFAULT_LEVERS = LEVERS[:4]
Step = Callable[[torch.Tensor], torch.Tensor]  # of a layer: tokens to tokens
Watch = Callable[[str, torch.Tensor], torch.Tensor]  # is told of each stage and what it leaves; gives what goes on


def add_lever_arguments(parser: ArgumentParser) -> None:
    """The flags that mean the same in every script that encodes many batches."""
    add = parser.add_argument_group("levers of the forward pass").add_argument
    off, on = ", ".join(DEFAULT_LEVERS), LEVERS[len(DEFAULT_LEVERS) :]
    add("--without", nargs="+", choices=LEVERS, default=[], metavar="LEVER", help=f"switch off any of {off}")
    more = f"switch on any of {', '.join(on)}: fused kernels of an NPU, the first of a GPU too"
    add("--with", nargs="+", choices=on, default=[], metavar="LEVER", dest="with_levers", help=more)


def asked_levers(args: Namespace) -> tuple[str, ...]:
    return tuple(lever for lever in (*DEFAULT_LEVERS, *args.with_levers) if lever not in args.without)


def load_as_asked(args: Namespace, device: Device, **changes: Any) -> LoadedModel:
    """inference.load_as_asked, with the levers that are asked for."""
    use_large_pages(device)
    return with_levers(inference.load_as_asked(args, device, **changes), asked_levers(args))


def load_from_args(args: Namespace, device: Device) -> LoadedModel:
    """inference.load_from_args, with the levers that are asked for."""
    use_large_pages(device)
    model = with_levers(inference.load_from_args(args, device), asked_levers(args))
    inference.log.info(f"Levers: {', '.join(model.levers) or 'none'}")
    return model


def use_large_pages(device: Device) -> None:
    """On the CPU, have torch ask Linux for pages of 2 MiB: products whose weights lie in them ran up to a tenth faster.

    torch reads the variable once, as it makes the first tensor of a process.
    """
    if device.kind == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def with_levers(model: LoadedModel, levers: Sequence[str]) -> LoadedModel:
    """The model with those of `levers` that it has on its device in its dtype; as it is where there are none.

    With packed_weights the given model's own weights are gone. Code that came with a checkpoint has no levers. Raises
    UsageError where the device has too little memory.
    """
    used = fitting(model, levers)
    if not used:
        return model
    try:
        return dataclasses.replace(model, levers=used, lean=Lean(model, used))
    except Exception as error:
        inference.raise_if_lost(error)
        if not inference.is_out_of_memory(error):
            raise
        raise inference.too_little_memory(model.device) from error


def fitting(model: LoadedModel, levers: Sequence[str]) -> tuple[str, ...]:
    """Those of `levers` that a model has."""
    if type(model.module).__name__ != "ViTModel":
        return ()
    found = {"folded_patches", "stacked_qkv"}
    if model.device.kind == "npu":
        found |= {"fused_attention", "fused_norms"}
        if model.dtype.itemsize == 2 and model.module.config.hidden_act == "gelu":  # by erf
            found.add("fused_mlp")
    if model.device.kind == "cpu" and model.dtype == torch.float32 and can_pack():
        found.add("packed_weights")
    if model.device.kind == "cuda" and "fused_norms" in levers and can_compile_norms(model.module.layernorm):
        found.add("fused_norms")
    return tuple(lever for lever in LEVERS if lever in levers and lever in found)


class Lean:
    """A forward pass over transformers' modules, taken apart. Nothing of a call stays here: another thread may be using it."""

    def __init__(self, model: LoadedModel, levers: Sequence[str]) -> None:
        module, heads = model.module, model.module.config.num_attention_heads
        self.patches: Any = module.embeddings.patch_embeddings
        self.is_folded = "folded_patches" in levers
        if self.is_folded:
            self.patches = FoldedPatches(self.patches.projection, model.preprocess)
        self.blocks = [Block(layer, heads, levers) for layer in inference.layers_of(module)]

    def forward(self, model: LoadedModel, crops: torch.Tensor, layers: Sequence[str], watch: Watch | None = None) -> Outputs:
        """inference.forward's work. `watch` is told of each stage: patch embedding, position embedding, layer 1 attention..."""
        with torch.inference_mode():
            pixels = crops.permute(0, 3, 1, 2) if self.is_folded else inference.pixel_values(model, crops)
            return self._forward(model.module, pixels, layers, watch or (lambda _stage, tokens: tokens))

    def _forward(self, module: Any, pixels: torch.Tensor, layers: Sequence[str], watch: Watch) -> Outputs:
        """What ViTModel.forward computes."""
        embeddings, kept = module.embeddings, {}
        patches = watch("patch embedding", self.patches(pixels))
        tokens = torch.cat((embeddings.cls_token.expand(len(patches), -1, -1), patches), 1) + embeddings.position_embeddings
        tokens = watch("position embedding", tokens)
        normed = self.blocks[0].norm_before(tokens)
        following = [*(block.norm_before for block in self.blocks[1:]), module.layernorm]
        for number, (block, norm) in enumerate(zip(self.blocks, following), 1):
            for stage, add, norm_behind in (("attention", block.attend, block.norm_after), ("MLP", block.mlp, norm)):
                left, normed = block.add(add(normed), tokens, norm_behind)
                tokens = watch(f"layer {number} {stage}", left)
                if tokens is not left:  # something else goes on: its norm by the same way
                    _, normed = block.add(torch.zeros_like(tokens), tokens, norm_behind)
            kept |= {str(number): tokens} if str(number) in layers else {}
            kept |= {f"{number}_normed": module.layernorm(tokens)} if f"{number}_normed" in layers else {}
        hidden = watch("final norm", normed)
        return Outputs(hidden, None if module.pooler is None else module.pooler(hidden), kept)


class FoldedPatches:
    """Patch embedding of raw pixels [N, 3, H, W], strided as uint8 crops are, as one matrix product.

    Normalisation is folded into weight and bias in float64. No permutation, no convolution, so no HF32 or TF32 either.
    Pixels are centred first: left between 0 and 255, their mean would cancel against the bias and cost digits.
    """

    def __init__(self, projection: torch.nn.Conv2d, preprocess: Preprocess) -> None:
        weight = projection.weight.detach().cpu().double()
        std = torch.tensor(preprocess.std, dtype=torch.float64).view(1, 3, 1, 1)
        mean = torch.tensor(preprocess.mean, dtype=torch.float64).view(1, 3, 1, 1)
        folded = weight * (preprocess.rescale_factor / std)
        bias = projection.bias.detach().cpu().double() + (folded * (128 - mean / preprocess.rescale_factor)).sum((1, 2, 3))
        self.patch_size = projection.weight.shape[-1]
        self.weight = folded.permute(0, 2, 3, 1).flatten(1).to(projection.weight)
        self.bias = bias.to(projection.bias)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        count, _, height, width = pixels.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        patches = (pixels.permute(0, 2, 3, 1).to(self.weight.dtype) - 128).reshape(count, rows, self.patch_size, columns, -1)
        patches = patches.transpose(2, 3).reshape(count, rows * columns, -1)
        return torch.nn.functional.linear(patches, self.weight, self.bias)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fused: bool) -> torch.Tensor:
    """softmax(query key^T / sqrt(d)) value without a mask; all [N, T, heads, d]. `fused`: by the NPU's kernel.

    Its layout BSND needs no copy; sync=True leaves out the event with which torch_npu 2.9.0 forks a stream that no graph
    capture can join. A mask of all true, as transformers gives a ViT while it is traced, would cost SDPA its fast kernels.
    """
    scale = query.shape[-1] ** -0.5
    if fused:
        kernel = sys.modules["torch_npu"].npu_fusion_attention
        return kernel(query, key, value, query.shape[2], "BSND", scale=scale, sync=True)[0]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


class Block:
    """A layer of transformers' ViT as what it computes, each step as the levers have it; tokens are [N, T, D]."""

    def __init__(self, layer: torch.nn.Module, heads: int, levers: Sequence[str]) -> None:
        linears = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        out, up, down = linears[3:]  # query, key and value come first, in transformers 4 and 5
        self.norm_before, self.norm_after = layer.layernorm_before, layer.layernorm_after
        self.heads, self.levers = heads, levers
        activation = layer.mlp.activation_fn if hasattr(layer, "mlp") else layer.intermediate.intermediate_act_fn
        projections = [(part.weight, part.bias) for part in linears[:3]]
        if "stacked_qkv" in levers:
            projections = [stacked(linears[:3])]
        if "packed_weights" in levers:
            self.projections = [packed(*pair) for pair in projections]
            out, up, down = (packed(part.weight, part.bias) for part in (out, up, down))
            for part in linears:
                part.weight = None  # it would stand in memory twice
        else:
            linear = torch.nn.functional.linear
            self.projections = [partial(linear, weight=weight, bias=bias) for weight, bias in projections]
        self.out, self.steps = out, (fused_mlp(up, down),) if "fused_mlp" in levers else (up, activation, down)

    def attend(self, normed: torch.Tensor) -> torch.Tensor:
        """What the attention adds to the tokens whose norm it is given."""
        count, length, width = normed.shape
        shape = count, length, -1, self.heads, width // self.heads
        query, key, value = (part for product in self.projections for part in product(normed).view(shape).unbind(2))
        return self.out(attention(query, key, value, "fused_attention" in self.levers).reshape(count, length, width))

    def mlp(self, normed: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to the tokens whose norm it is given."""
        for step in self.steps:
            normed = step(normed)
        return normed

    def add(self, more: torch.Tensor, tokens: torch.Tensor, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """more + tokens, and the norm of it."""
        if "fused_norms" not in self.levers:
            added = more + tokens
            return added, norm(added)
        if tokens.device.type != "npu":
            return compiled_norms(more, tokens, norm)
        kernel = sys.modules["torch_npu"].npu_add_layer_norm
        normed, _mean, _spread, added = kernel(more, tokens, norm.weight, norm.bias, norm.eps, True)
        return added, normed


def stacked(linears: Sequence[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of linear layers as those of one, of which their own become views."""
    return joined([part.weight for part in linears]), joined([part.bias for part in linears])


def joined(parts: Sequence[torch.nn.Parameter | None]) -> torch.Tensor | None:
    """Parameters below each other, of which they become views; None where a layer has none."""
    if any(part is None for part in parts):
        return None
    whole = torch.cat(parts).detach()
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole


def fused_mlp(up: torch.nn.Linear, down: torch.nn.Linear) -> Step:
    """The MLP in one kernel of an NPU, which wants weights as columns."""
    columns = [part.weight.t().contiguous() for part in (up, down)]
    options = {"bias1": up.bias, "bias2": down.bias, "inner_precise": 0}
    return lambda tokens: sys.modules["torch_npu"].npu_ffn(tokens, *columns, "gelu", **options)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Step:
    """A linear layer in float32 on the CPU whose weight is laid out once as oneDNN multiplies it.

    torch.nn.functional.linear does that anew at each call. The operators are those into which torch.compile puts frozen weights
    (torch/_inductor/fx_passes/mkldnn_fusion.py); their own GELU takes four times as long as torch's behind them.
    """
    kernels = torch.ops.mkldnn
    weight = kernels._reorder_linear_weight(weight.detach())
    return lambda tokens: kernels._linear_pointwise(tokens, weight, bias, "none", [], "none")


@cache
def can_pack() -> bool:
    """Whether this torch has those operators and they compute what they should: they are no public interface."""
    try:
        tokens, weight, bias = (torch.linspace(-1, 1, count) for count in (2 * 5 * 64, 48 * 64, 48))
        tokens, weight = tokens.view(2, 5, 64), weight.view(48, 64)
        expected = torch.nn.functional.linear(tokens, weight, bias)
        return torch.allclose(packed(weight, bias)(tokens), expected, rtol=1e-5, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False


def compiled_norms(more: torch.Tensor, tokens: torch.Tensor, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """more + tokens, and the norm of it, in one kernel that torch.compile makes at first use, in some seconds."""
    rows = [values.reshape(-1, values.shape[-1]) for values in (more, tokens)]
    for values in rows:
        torch._dynamo.mark_dynamic(values, 0)  # one kernel for all batch sizes
    added, normed = _add_norm()(*rows, norm.weight, norm.bias, norm.eps)
    return added.view(tokens.shape), normed.view(tokens.shape)


@cache
def _add_norm() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def add_norm(more: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple:
        added = more + tokens
        return added, torch.nn.functional.layer_norm(added, added.shape[-1:], weight, bias, eps)

    return torch.compile(add_norm)


def can_compile_norms(norm: torch.nn.LayerNorm) -> bool:
    """Whether torch.compile works here: it needs Triton and a C compiler, which not every machine has."""
    weight = norm.weight
    try:
        with torch.inference_mode():
            tokens = torch.linspace(-1, 1, 2 * 5 * len(weight), device=weight.device).view(2, 5, -1).to(weight.dtype)
            (added, normed), expected = compiled_norms(tokens, tokens, norm), norm(2 * tokens)
            room = 32 * torch.finfo(weight.dtype).eps * expected.abs().max()
            if not torch.equal(added, 2 * tokens) or (normed - expected).abs().max() > room:
                raise ArithmeticError("its numbers are wrong")
            return True
    except Exception as error:  # noqa: BLE001 (the compilers' own errors are many)
        inference.raise_if_lost(error)
        inference.log.warning(f"fused_norms stays off: torch.compile does not work here ({inference.first_line(error)})")
        return False
