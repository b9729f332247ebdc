"""The transformer layer of M3Ret: rotary positions, attention within each scan of a pack, MLP and stochastic depth.

It is the pre-norm layer of ViT (arXiv 2010.11929) with rotary positions in three axes (arXiv 2104.09864). Encoder and
decoder are stacks of it. Shapes and the terms pack and position are defined in `packing_m3ret`.

This file is copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_m3ret import M3RetConfig
from .packing_m3ret import PackLayout, ScanSubset, put, take


Rotary = tuple[Tensor, Tensor]  # result of `rotary_tables`


def rotary_tables(coordinates: Tensor, head_dim: int, theta: float, axes: str = "separate") -> Rotary:
    """Return the cosines and signed sines that rotate the channel pairs of a head by the coordinates of each token.

    This is RoFormer (arXiv 2104.09864) in three axes. The periods of an axis are those of DINOv3 (arXiv 2508.10104):
    geometric from 1 to `theta`, in units of half a scan. Coordinates of zero, which CLS and registers have, rotate
    nothing.

    Args:
        coordinates: `(N, 3)` or more columns, from `patch_coordinates`.
        head_dim: channels of one head, even and at least 6; a multiple of 4 for "shared".
        theta: ratio of the longest to the shortest period.
        axes: "separate": each axis rotates head_dim // 6 pairs, and the remaining ones carry no position. "shared":
            height and width rotate half of the pairs each, as in DINOv3, and depth is added to every second pair.

    Returns:
        Cosines and sines, both `(N, head_dim)`; float32 for float32 coordinates.
    """
    pairs = head_dim // (6 if axes == "separate" else 4)
    exponents = torch.arange(pairs, dtype=torch.float32, device=coordinates.device) / pairs
    angles = 2 * math.pi * coordinates[:, :3, None] * theta**-exponents  # (N, 3, pairs)
    if axes == "shared":
        is_even = torch.arange(pairs, device=coordinates.device) % 2 == 0
        angles = angles[:, 1:] + angles[:, :1] * is_even  # (N, 2, pairs)
    angles = nn.functional.pad(angles.flatten(1), (0, head_dim // 2 - angles[0].numel()))  # (N, head_dim / 2)
    sines = torch.sin(angles)
    return torch.cos(angles).repeat(1, 2), torch.cat([-sines, sines], dim=1)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the channel pairs `(i, i + head_dim / 2)` of `(..., head_dim)` by the tables of `rotary_tables`."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cosines, torch.cat([second, first], dim=-1), sines)


class _RotateQueriesAndKeys(torch.autograd.Function):
    """Split `(N, 3, heads, head_dim)` into rotated queries, rotated keys, and values.

    Autograd would fill two tensors of the size of the input with zeros and add them. The gradient of a rotation is the
    rotation by the opposite angle.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        query, key = rotate(qkv[:, :2], cosines, sines).unbind(1)
        return query, key, qkv[:, 2]

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        gradient = torch.stack([query, key, value], dim=1)
        rotated = gradient[:, :2]
        swapped = torch.cat(rotated.chunk(2, dim=-1)[::-1], dim=-1)
        rotated.mul_(cosines).addcmul_(swapped, sines, value=-1)
        return gradient, None, None


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a linear layer does nothing but multiply by its weight, so that a part of the weight can be used.

    Adapters and quantised layers are of another type, or hold their weight in another type of tensor. Hooks must run.
    """
    return type(layer) is nn.Linear and not hasattr(layer.weight, "__tensor_flatten__") and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class's `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__  # Accelerate replaces `forward`


@functools.cache
def variable_length_attention() -> Callable[..., Tensor] | None:
    """Return PyTorch's attention over scans of different lengths in one call, for CUDA; None in older versions."""
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention of `(B, heads, L, head_dim)` explicitly: `(B, L, heads, head_dim)` and its weights."""
    weights = ((query * scaling) @ key.transpose(2, 3)).softmax(dim=-1)  # (B, heads, L, L)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2), weights


class M3RetAttention(nn.Module):
    """Multi-head self-attention within each scan of a pack."""

    def __init__(self, config: M3RetConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def project_qkv(self, tokens: Tensor, *rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `(N, d)` to queries, keys and values `(N, heads, head_dim)`; queries and keys are rotated, if at all.

        `rotary` are the two tables of `rotary_tables`, or nothing.
        """
        qkv = self.qkv(tokens).view(-1, 3, self.num_heads, self.head_dim)
        if not rotary:
            query, key, value = qkv.unbind(1)
            return query, key, value
        tables = [table.to(qkv.dtype)[:, None, None] for table in rotary]
        if torch.compiler.is_compiling():  # fuses these operations and their gradients
            query, key = rotate(qkv[:, :2], *tables).unbind(1)
            return query, key, qkv[:, 2]
        return _RotateQueriesAndKeys.apply(qkv, *tables)

    def forward(
        self, tokens: Tensor, layout: PackLayout, rotary: Rotary | None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Attend within each scan: `(N, d)` -> `(N, d)` by position, weights `(scans, heads, L, L)` of each group.

        The weights are None if the attention implementation returns none.
        """
        N, d = tokens.shape
        query, key, value = self.project_qkv(tokens, *(rotary or ()))
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs |= {
            "attention_mask": None,
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "is_causal": False,
        }
        if len(layout.groups) > 1 and layout.starts is not None:
            longest = layout.groups[-1][1]
            kernel = variable_length_attention() if implementation == "sdpa" and query.is_cuda else None
            if kernel and query.dtype in (torch.bfloat16, torch.float16) and not kwargs["dropout"]:
                starts, lengths = (layout.starts, layout.starts), (longest, longest)
                mixed = kernel(query, key, value, *starts, *lengths, scale=self.scaling)  # (N, heads, head_dim)
                return self.out_proj(mixed.reshape(N, d)), None
            if "flash" in implementation:  # the same in one call of another library: (1, heads, N, head_dim)
                kwargs |= {"cu_seq_lens_q": layout.starts, "cu_seq_lens_k": layout.starts}
                kwargs |= {"max_length_q": longest, "max_length_k": longest}
                mixed, _ = attend(self, *(x.transpose(0, 1)[None] for x in (query, key, value)), **kwargs)
                return self.out_proj(mixed.reshape(N, d)), None

        # PyTorch's fused CPU attention is slow in bfloat16: forward and backward took 5 times as long as the explicit
        # form for 64 crops of 41 tokens, 1.3 times for 1,600 tokens. Above 2,048 the weights need too much memory.
        is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and layout.groups[-1][1] <= 2048
        if without_weights := is_slow and implementation == "sdpa":
            attend = eager_attention_forward

        outputs: list[Tensor] = []
        all_weights: list[Tensor] = []
        for group in zip(*(layout.split_groups(x) for x in (query, key, value)), strict=True):
            mixed, weights = attend(self, *(x.transpose(1, 2) for x in group), **kwargs)
            outputs.append(mixed.reshape(-1, d))
            all_weights.append(weights)
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.out_proj(attended), None if without_weights or weights is None else tuple(all_weights)


class M3RetLayerScale(nn.Module):
    """Learned gain per channel on each residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, config: M3RetConfig, hidden_size: int):
        super().__init__()
        self.gain = nn.Parameter(torch.full((hidden_size,), float(config.layer_scale_init)))

    def forward(self, tokens: Tensor, branch: Tensor, rescale: float = 1.0) -> Tensor:
        """Return `tokens + branch * gain * rescale`, in one pass over memory."""
        return torch.addcmul(tokens, branch.to(tokens.dtype), self.gain if rescale == 1 else self.gain * rescale)


class M3RetMLP(nn.Module):
    """Two-layer perceptron of a transformer block, with a gate if `config.gated_mlp` (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: M3RetConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(tokens)))
        return self.down_proj(self.activation(self.gate_proj(tokens)) * self.up_proj(tokens))


class M3RetLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block (ViT, arXiv 2010.11929) with stochastic depth per scan (arXiv 1603.09382).

    In training, each branch skips an exact fraction of the scans of a pack, drawn at random, and runs on the others
    only, as in DINOv2 (arXiv 2304.07193, section 4). Skipped scans cost nothing. See `PackLayout.sample_subsets`.
    """

    def __init__(self, config: M3RetConfig, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = M3RetAttention(config, hidden_size, num_heads)
        self.attention_scale = M3RetLayerScale(config, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = M3RetMLP(config, hidden_size, intermediate_size)
        self.mlp_scale = M3RetLayerScale(config, hidden_size)

    def forward(
        self,
        tokens: Tensor,
        layout: PackLayout,
        rotary: Rotary | None,
        cls_only: bool = False,
        subsets: tuple[ScanSubset | None, ScanSubset | None] = (None, None),
        **kwargs: Any,
    ) -> Tensor:
        """Apply the block: `(N, d)` -> `(N, d)` by position, or with `cls_only` the CLS tokens only, `(B, d)`.

        For scans of equal length, tokens and result may have the shape `(B, L, d)`. Attention and MLP run on the scans
        of `subsets`, by default on all.
        """
        rows = tokens.flatten(0, -2)
        if cls_only and is_plain_linear(self.attention.qkv) and not has_hooks(self.attention):
            return self.forward_cls(rows, layout, rotary, subsets)
        output = self.forward_all(rows, layout, rotary, subsets, **kwargs)
        if cls_only:
            return layout.first_tokens(output)
        return output if tokens.ndim == 2 else output.view_as(tokens)  # FSDP2 warns of layers that return views

    def forward_all(
        self,
        tokens: Tensor,
        layout: PackLayout,
        rotary: Rotary | None,
        subsets: tuple[ScanSubset | None, ScanSubset | None],
        **kwargs: Any,
    ) -> Tensor:
        """Apply the block to all tokens: `(N, d)` -> `(N, d)` by position."""
        of_attention, of_mlp = subsets
        if of_attention is None:
            attended, _ = self.attention(self.attention_norm(tokens), layout, rotary, **kwargs)
            tokens = self.attention_scale(tokens, attended)
        else:
            running, others = take(tokens, of_attention.tokens)
            tables = None
            if rotary is not None:
                cosines, sines = (table.index_select(0, of_attention.tokens) for table in rotary)
                tables = (cosines, sines)
            attended, _ = self.attention(self.attention_norm(running), of_attention.layout, tables, **kwargs)
            running = self.attention_scale(running, attended, of_attention.rescale)
            tokens = put(others, of_attention.tokens, running)
        if of_mlp is None:
            return self.mlp_scale(tokens, self.feed_forward(tokens))
        running, others = take(tokens, of_mlp.tokens)
        return put(others, of_mlp.tokens, self.mlp_scale(running, self.feed_forward(running), of_mlp.rescale))

    def forward_cls(
        self,
        tokens: Tensor,
        layout: PackLayout,
        rotary: Rotary | None,
        subsets: tuple[ScanSubset | None, ScanSubset | None] = (None, None),
    ) -> Tensor:
        """Apply the block and return the CLS tokens only: `(N, d)` -> `(B, d)` by position.

        Keys and values are computed for all tokens; queries, output and MLP for the CLS tokens only. This is about one
        sixth of the work. Branches run on all scans and are then multiplied by the weights of `subsets`.
        """
        attention, normed = self.attention, self.attention_norm(tokens)
        heads = (attention.num_heads, attention.head_dim)
        d = tokens.shape[1]
        bias = attention.qkv.bias
        query_bias, key_value_bias = (None, None) if bias is None else bias.split([d, 2 * d])
        query_weight, key_value_weight = attention.qkv.weight.split([d, 2 * d])
        # CLS has coordinates of zero, so its query needs no rotation
        query = nn.functional.linear(layout.first_tokens(normed), query_weight, query_bias).view(-1, *heads)
        key, value = nn.functional.linear(normed, key_value_weight, key_value_bias).view(-1, 2, *heads).unbind(1)
        if rotary is not None:
            key = rotate(key, *(table.to(key.dtype)[:, None] for table in rotary))
        attended = []
        counts = [scans for scans, _ in layout.groups]
        for q, k, v in zip(query.split(counts), layout.split_groups(key), layout.split_groups(value), strict=True):
            weights = ((q * attention.scaling)[:, :, None] @ k.permute(0, 2, 3, 1)).softmax(-1)  # (scans, heads, 1, L)
            weights = nn.functional.dropout(weights, attention.config.attention_dropout, self.training)
            attended.append((weights @ v.transpose(1, 2)).flatten(1))  # (scans, d)
        attended, feed = attention.out_proj(torch.cat(attended)), self.feed_forward
        cls, (of_attention, of_mlp) = layout.first_tokens(tokens), subsets
        cls = self.attention_scale(cls, attended if of_attention is None else attended * of_attention.weight)
        return self.mlp_scale(cls, feed(cls) if of_mlp is None else feed(cls) * of_mlp.weight)

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """Return the MLP branch before its gain: `(N, d)` -> `(N, d)`."""
        return self.mlp(self.mlp_norm(tokens))

    def compile_tokenwise(self) -> None:
        """Compile the operations that treat each token by itself, for packs of any layout.

        A compiled layer would specialise on the number of groups, and torch stops recompiling after eight layouts.
        """
        attention = self.attention
        attention.project_qkv = torch.compile(attention.project_qkv, dynamic=True)  # type: ignore[method-assign]
        self.feed_forward = torch.compile(self.feed_forward, dynamic=True)  # type: ignore[method-assign]
