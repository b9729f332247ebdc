"""The M3Ret encoder: a vision transformer (ViT, arXiv 2010.11929) for packs of scans of any size (arXiv 2509.01360).

A pack holds the tokens of all scans of a batch in one matrix. Each scan has its own CLS and register tokens, and
attention never crosses scans. Nothing is padded, and a scan's embedding does not depend on the rest of the batch.

Shapes and the terms row, pack, position and grid are defined in `packing_m3ret`. This file is copied into every
checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_m3ret import M3RetConfig
from .packing_m3ret import PackLayout, patch_coordinates, patchify


def rotary_tables(coordinates: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and signed sines that rotate the channel pairs of a head by the coordinates of each token.

    This is RoFormer (arXiv 2104.09864) in three axes. Each axis rotates head_dim // 6 channel pairs. Their periods are
    those of DINOv3 (arXiv 2508.10104): geometric from 1 to `theta`, in units of half a scan. The remaining pairs carry
    no position. Coordinates of zero, which CLS and registers have, rotate nothing.

    Args:
        coordinates: `(N, 3)`, from `patch_coordinates`.
        head_dim: channels of one head, even and at least 6.
        theta: ratio of the longest to the shortest period.

    Returns:
        Cosines and sines, both `(N, head_dim)`; float32 for float32 coordinates.
    """
    pairs = head_dim // 6
    exponents = torch.arange(pairs, dtype=torch.float32, device=coordinates.device) / pairs
    angles = 2 * math.pi * coordinates[:, :, None] * theta**-exponents  # (N, 3, pairs)
    angles = nn.functional.pad(angles.flatten(1), (0, head_dim // 2 - 3 * pairs))  # (N, head_dim / 2)
    sines = torch.sin(angles)
    return torch.cos(angles).repeat(1, 2), torch.cat([-sines, sines], dim=1)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the channel pairs `(i, i + head_dim / 2)` of `(..., head_dim)` by the tables of `rotary_tables`."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cosines, torch.cat([second, first], dim=-1), sines)


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

    def project_qkv(self, tokens: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `(N, d)` to queries, keys and values `(N, heads, head_dim)`; queries and keys are rotated."""
        qkv = self.qkv(tokens).view(-1, 3, self.num_heads, self.head_dim)
        tables = (table.to(qkv.dtype)[:, None, None] for table in (cosines, sines))
        query, key = rotate(qkv[:, :2], *tables).unbind(1)
        return query, key, qkv[:, 2]

    def forward(
        self, tokens: Tensor, layout: PackLayout, rotary: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Attend within each scan: `(N, d)` -> `(N, d)` by position, weights `(scans, heads, L, L)` of each group.

        The weights are None if the attention implementation returns none.
        """
        N, d = tokens.shape
        query, key, value = self.project_qkv(tokens, *rotary)
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs |= {
            "attention_mask": None,
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "is_causal": False,
        }
        if "flash" in implementation and not layout.is_uniform:
            # one variable-length kernel for all scans: (1, heads, N, head_dim) and the first token of each scan
            lengths = layout.lengths
            starts = torch.tensor([0, *lengths], dtype=torch.int32, device=tokens.device).cumsum(0, dtype=torch.int32)
            kwargs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            kwargs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
            mixed, weights = attend(self, *(x.transpose(0, 1)[None] for x in (query, key, value)), **kwargs)
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
        attended = outputs[0] if layout.is_uniform else torch.cat(outputs)
        return self.out_proj(attended), None if without_weights or weights is None else tuple(all_weights)


class M3RetLayerScale(nn.Module):
    """Learned gain per channel on each residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, config: M3RetConfig, hidden_size: int):
        super().__init__()
        self.gain = nn.Parameter(torch.full((hidden_size,), float(config.layer_scale_init)))

    def forward(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """Return `tokens + branch * gain`, in one pass over memory."""
        return torch.addcmul(tokens, branch.to(tokens.dtype), self.gain)


class M3RetMLP(nn.Module):
    """Two-layer perceptron of a transformer block."""

    def __init__(self, config: M3RetConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(tokens)))


class M3RetLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block (ViT, arXiv 2010.11929) with stochastic depth per scan (arXiv 1603.09382).

    In training, each branch skips an exact fraction of the scans of a pack, drawn at random, and runs on the others
    only, as in DINOv2 (arXiv 2304.07193, section 4). Skipped scans cost nothing.
    """

    def __init__(
        self, config: M3RetConfig, hidden_size: int, num_heads: int, intermediate_size: int, drop_path: float = 0.0
    ):
        super().__init__()
        self.drop_path = drop_path
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = M3RetAttention(config, hidden_size, num_heads)
        self.attention_scale = M3RetLayerScale(config, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = M3RetMLP(config, hidden_size, intermediate_size)
        self.mlp_scale = M3RetLayerScale(config, hidden_size)

    def forward(
        self, tokens: Tensor, layout: PackLayout, rotary: tuple[Tensor, Tensor], cls_only: bool = False, **kwargs: Any
    ) -> Tensor:
        """Apply the block: `(N, d)` -> `(N, d)` by position, or with `cls_only` the CLS tokens only, `(B, d)`."""
        if cls_only:
            return self.forward_cls(tokens, layout, rotary)
        sampled = self._sample_scans(layout)
        if sampled is None:
            attended, _ = self.attention(self.attention_norm(tokens), layout, rotary, **kwargs)
            tokens = self.attention_scale(tokens, attended)
        else:
            indices = layout.token_indices(sampled, tokens.device)
            tables = (rotary[0].index_select(0, indices), rotary[1].index_select(0, indices))
            normed = self.attention_norm(tokens.index_select(0, indices))
            attended, _ = self.attention(normed, layout.subset(sampled), tables, **kwargs)
            tokens = self._add_branch(tokens, indices, attended, self.attention_scale, len(layout.order) / len(sampled))
        sampled = self._sample_scans(layout)
        if sampled is None:
            return self.mlp_scale(tokens, self.feed_forward(tokens))
        indices = layout.token_indices(sampled, tokens.device)
        branch = self.feed_forward(tokens.index_select(0, indices))
        return self._add_branch(tokens, indices, branch, self.mlp_scale, len(layout.order) / len(sampled))

    def forward_cls(self, tokens: Tensor, layout: PackLayout, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the block and return the CLS tokens only: `(N, d)` -> `(B, d)` by position.

        Keys and values are computed for all tokens; queries, output and MLP for the CLS tokens only. This is about one
        sixth of the work.
        """
        attention, normed = self.attention, self.attention_norm(tokens)
        heads = (attention.num_heads, attention.head_dim)
        d = tokens.shape[1]
        bias = attention.qkv.bias
        query_bias, key_value_bias = (None, None) if bias is None else bias.split([d, 2 * d])
        query_weight, key_value_weight = attention.qkv.weight.split([d, 2 * d])
        cls_normed = torch.cat([group[:, 0] for group in layout.split_groups(normed)])  # (B, d)
        # CLS has coordinates of zero, so its query needs no rotation
        query = nn.functional.linear(cls_normed, query_weight, query_bias).view(-1, *heads)
        key, value = nn.functional.linear(normed, key_value_weight, key_value_bias).view(-1, 2, *heads).unbind(1)
        key = rotate(key, *(table.to(key.dtype)[:, None] for table in rotary))
        attended = []
        counts = [scans for scans, _ in layout.groups]
        for q, k, v in zip(query.split(counts), layout.split_groups(key), layout.split_groups(value), strict=True):
            weights = ((q * attention.scaling)[:, :, None] @ k.permute(0, 2, 3, 1)).softmax(-1)  # (scans, heads, 1, L)
            weights = nn.functional.dropout(weights, attention.config.attention_dropout, self.training)
            attended.append((weights @ v.transpose(1, 2)).flatten(1))  # (scans, d)
        branch = attention.out_proj(torch.cat(attended))
        cls = torch.cat([group[:, 0] for group in layout.split_groups(tokens)])
        cls = self.attention_scale(cls, self._drop_scans(branch, layout))
        return self.mlp_scale(cls, self._drop_scans(self.feed_forward(cls), layout))

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

    def _drop_scans(self, branch: Tensor, layout: PackLayout) -> Tensor:
        """Zero the dropped scans of a branch with one vector per scan `(B, d)` and rescale the others."""
        if (sampled := self._sample_scans(layout)) is None:
            return branch
        weight = torch.zeros(len(branch), 1)
        weight[sampled] = len(branch) / len(sampled)
        return branch * weight.to(branch)

    def _sample_scans(self, layout: PackLayout) -> list[int] | None:
        """Return the ascending positions of the scans that a branch runs on, or None for all."""
        if not self.training or self.drop_path == 0:
            return None
        scans = len(layout.order)
        count = max(1, scans - round(scans * self.drop_path))
        return None if count == scans else sorted(torch.randperm(scans)[:count].tolist())

    @staticmethod
    def _add_branch(tokens: Tensor, indices: Tensor, branch: Tensor, scale: M3RetLayerScale, rescale: float) -> Tensor:
        """Add a branch to the tokens it ran on, rescaled so that its expectation over draws is unchanged."""
        return tokens.index_add(0, indices, branch.to(tokens.dtype) * (scale.gain * rescale))


class M3RetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the capabilities that transformers asks for."""

    config_class = M3RetConfig
    base_model_prefix = "m3ret"
    main_input_name = "pixel_values"
    input_modalities = ["image", "video"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["M3RetEmbeddings", "M3RetLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": M3RetLayer, "attentions": M3RetAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, M3RetEmbeddings):
            init.trunc_normal_(module.cls_token, mean=0.0, std=std)
            init.trunc_normal_(module.register_tokens, mean=0.0, std=std)
        elif isinstance(module, M3RetWhitening):
            init.zeros_(module.mean)
            init.eye_(module.matrix)
        elif isinstance(module, M3RetLayerScale):
            init.constant_(module.gain, float(self.config.layer_scale_init))


class M3RetEmbeddings(nn.Module):
    """Patch embedding, CLS token and register tokens."""

    def __init__(self, config: M3RetConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = nn.Linear(config.patch_values, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.zeros(config.num_register_tokens, config.hidden_size))

    def prefix_tokens(self, scans: int) -> Tensor:
        """Return the CLS and register tokens of each scan: `(B, 1 + registers, d)`."""
        return torch.cat([self.cls_token, self.register_tokens]).expand(scans, -1, -1)

    def forward(self, rows: Tensor) -> Tensor:
        """Embed patch rows: `(P, C*t*p*p)` -> `(P, d)`.

        Compact rows of images `(P, C*p*p)` hold the single slice of their patch once instead of t times. They are
        embedded by the sum of the weights over depth, which gives the same result for a t-th of the work.
        """
        config = self.config
        weight = self.patch_embeddings.weight  # (d, C*t*p*p)
        if rows.shape[1] != config.patch_values:
            weight = weight.unflatten(1, (config.num_channels, config.patch_depth, -1)).sum(2).flatten(1)
        return nn.functional.linear(rows.to(weight.dtype), weight, self.patch_embeddings.bias)

    def repeat_slices(self, rows: Tensor) -> Tensor:
        """Expand compact rows of images `(P, C*p*p)` to `(P, C*t*p*p)`; return full rows unchanged."""
        if rows.shape[1] == self.config.patch_values:
            return rows
        channels, depth = self.config.num_channels, self.config.patch_depth
        return rows.view(len(rows), channels, 1, -1).expand(-1, -1, depth, -1).flatten(1)


def mean_and_std(patches: Tensor) -> Tensor:
    """Pool patch tokens by mean and standard deviation: `(B, patches, d)` -> `(B, 2*d)`.

    This is statistics pooling (Snyder et al., Interspeech 2017). The deviation of equal patches is 0.001 instead of 0,
    because the gradient of the square root is infinite at 0.
    """
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    return torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1).to(patches.dtype)


class M3RetWhitening(nn.Module):
    """Centre and whiten pooled features, so that cosine similarity measures what differs between scans.

    Pooled features share a large mean and a few strong directions that say little about a case. Removing them improves
    retrieval without any label (Jégou and Chum, ECCV 2012). Pretraining fits the whitening to training scans; users can
    fit it to their own. Before `fit` it is the identity; for statistics pooling it selects the means. The output has
    the hidden size `d`; wider features are reduced to the d directions of largest variance.
    """

    mean: Tensor  # (pooled,)
    matrix: Tensor  # (d, pooled)

    def __init__(self, config: M3RetConfig):
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.pooled_size))
        self.register_buffer("matrix", torch.eye(config.hidden_size, config.pooled_size))

    def forward(self, pooled: Tensor) -> Tensor:
        """Whiten `pooler_output (B, pooled)` to `(B, d)` float32."""
        with torch.autocast(pooled.device.type, enabled=False):
            return (pooled.float() - self.mean.float()) @ self.matrix.float().T

    @torch.no_grad()
    def fit(self, pooled: Tensor, shrinkage: float = 0.01) -> None:
        """Fit to pooled features of mean m and covariance V diag(c) V^T: x -> diag(c + e)^(-1/2) V^T (x - m).

        Args:
            pooled: `(n, pooled)` features of n scans, before whitening.
            shrinkage: e as a fraction of the largest variance. Small variances are noise, and some are zero if there
                are fewer scans than dimensions. On phantom scans, 0.001 to 0.1 changed mAP by at most 0.02.
        """
        pooled = pooled.cpu().double()  # MPS has no float64
        centred = pooled - pooled.mean(0)
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(pooled))
        scale = (variances.clamp(min=0) + shrinkage * variances[-1].clamp(min=1e-12)).rsqrt()
        self.mean.copy_(pooled.mean(0))
        self.matrix.copy_((scale[:, None] * directions.T)[-len(self.matrix) :])


class M3RetEncoder(M3RetPreTrainedModel):
    """Stack of transformer blocks over a pack of tokens."""

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        # linear in depth, as in DeiT and DINO: the first layer drops nothing
        rates = [config.drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        self.layers = nn.ModuleList(
            M3RetLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size, rate)
            for rate in rates
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, tokens: Tensor, layout: PackLayout, rotary: tuple[Tensor, Tensor], cls_only: bool = False, **kwargs: Any
    ) -> BaseModelOutput:
        """Run all layers: `(N, d)` -> `(N, d)` by position, or with `cls_only` the CLS tokens only, `(B, d)`."""
        for layer in self.layers[:-1]:
            tokens = layer(tokens, layout, rotary, **kwargs)
        tokens = self.layers[-1](tokens, layout, rotary, cls_only, **kwargs)
        return BaseModelOutput(last_hidden_state=tokens)


class M3RetModel(M3RetPreTrainedModel):
    """Embed scans of any kind and size with one transformer that does not know the modality.

    Example:

    ```python
    >>> import torch
    >>> from modeling_m3ret import M3RetConfig, M3RetModel
    >>> model = M3RetModel(M3RetConfig.vitt()).eval()
    >>> with torch.no_grad():
    ...     model.get_image_features(torch.rand(2, 3, 20, 96, 64)).shape
    torch.Size([2, 192])

    ```
    """

    # a pretraining checkpoint also holds the decoder, which this model does not have
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        self.embeddings = M3RetEmbeddings(config)
        self.encoder = M3RetEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.whitening = M3RetWhitening(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode scans given as packed rows or as a dense batch.

        Args:
            pixel_values: normalised floats in one of two forms. Packed, with `grid_thw`: rows `(P, C*t*p*p)` from the
                processor; if all scans are images also `(P, C*p*p)`, with the single slice stored once. Dense:
                `(B, C, D, H, W)` or `(B, C, H, W)`, H and W multiples of the patch size.
            grid_thw: int64 `(B, 3)`, patches of each scan along depth, height and width. Only with packed rows.
            kwargs: `output_hidden_states`, `output_attentions` (needs `attn_implementation="eager"`), `return_dict`.

        Returns:
            `pooler_output` is `(B, config.pooled_size)`. The tokens of a scan are CLS, registers and patches in raster
            order, L in all.

            - Dense input: `last_hidden_state (B, L, d)`, attentions `(B, heads, L, L)` for each layer.
            - Packed input: `last_hidden_state (N, d)`, scan after scan in the given order (see `split_tokens`);
              attentions are a tuple of `(heads, L, L)`, one for each scan, for each layer.

        Raises:
            ValueError: if `pixel_values` and `grid_thw` have wrong or inconsistent shapes.
        """
        dense = grid_thw is None
        rows, grids = self.prepare_rows(pixel_values, grid_thw)
        layout = PackLayout.from_patch_counts([math.prod(grid) for grid in grids], self.config.num_prefix_tokens)
        tokens, encoded = self.encode(rows, patch_coordinates(grids, rows.device), layout, **kwargs)

        def arrange(state: Tensor) -> Tensor:
            return state.unflatten(0, (len(grids), -1)) if dense else layout.to_caller_order(state)

        attentions: Any = encoded.attentions  # for each layer one tensor per group
        if attentions is not None and dense:
            attentions = tuple(weights[0] for weights in attentions)
        elif attentions is not None:
            by_position = [[weights for group in layer for weights in group] for layer in attentions]
            attentions = tuple(tuple(layer[position] for position in layout.positions) for layer in by_position)
        hidden_states: Any = encoded.hidden_states  # None for each layer that the caller does not select
        if hidden_states is not None:
            hidden_states = tuple(state if state is None else arrange(state) for state in hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=arrange(tokens),
            pooler_output=self.pool(tokens, layout),
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def embed(self, pixel_values: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """Return `pooler_output (B, pooled)` only. With CLS pooling the last layer computes nothing but the CLS tokens.

        Args and errors are those of `forward`.
        """
        rows, grids = self.prepare_rows(pixel_values, grid_thw)
        layout = PackLayout.from_patch_counts([math.prod(grid) for grid in grids], self.config.num_prefix_tokens)
        return self.embed_rows(rows, patch_coordinates(grids, rows.device), layout)

    def embed_rows(self, rows: Tensor, coordinates: Tensor, layout: PackLayout) -> Tensor:
        """Embed patch rows `(P, C*t*p*p)` at `coordinates (P, 3)`, as `embed` does: `(B, pooled)`."""
        is_cls = self.config.pooling == "cls"
        tokens, _ = self.encode(rows, coordinates, layout, cls_only=is_cls)
        if not is_cls:
            return self.pool(tokens, layout)
        return tokens if layout.is_uniform else tokens[layout.positions]

    def get_image_features(self, pixel_values: Tensor, grid_thw: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the retrieval embedding: `pooler_output`, whitened and L2-normalised.

        Args and errors are those of `forward`.

        Returns:
            `(B, d)` float32 of unit length.
        """
        if kwargs:  # options of `forward`, for example of the attention implementation
            pooled = self(pixel_values, grid_thw, **(kwargs | {"return_dict": True})).pooler_output
        else:
            pooled = self.embed(pixel_values, grid_thw)
        return nn.functional.normalize(self.whitening(pooled), dim=-1)

    def split_tokens(self, last_hidden_state: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """Split a packed output `(N, d)` into the tokens `(L, d)` of each scan: CLS, registers, patches."""
        return list(last_hidden_state.split((grid_thw.prod(-1) + self.config.num_prefix_tokens).tolist()))

    def prepare_rows(self, pixel_values: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Validate either form of input and return its patch rows and the grid of each scan.

        Rows are `(P, C*t*p*p)`, or compact `(P, C*p*p)` for dense images `(B, C, H, W)` and `(B, C, 1, H, W)`. Args and
        errors are those of `forward`.
        """
        config = self.config
        if grid_thw is not None:
            is_grid = grid_thw.ndim == 2 and grid_thw.shape[1] == 3 and not grid_thw.is_floating_point()
            grids = [(t, h, w) for t, h, w in grid_thw.tolist()] if is_grid else []
            if min((min(grid) for grid in grids), default=0) < 1:
                raise ValueError(
                    f"invalid grid_thw: expected integers of at least 1 of shape (B, 3), got {grid_thw.dtype} of shape "
                    f"{tuple(grid_thw.shape)}, smallest {min(grid_thw.flatten().tolist(), default=None)}. Use the "
                    "grid_thw of the processor"
                )
            patches = sum(math.prod(grid) for grid in grids)
            widths = [config.patch_values]
            if all(t == 1 for t, _, _ in grids):  # compact rows of images are valid too
                widths.append(config.patch_values // config.patch_depth)
            if pixel_values.ndim != 2 or len(pixel_values) != patches or pixel_values.shape[1] not in widths:
                raise ValueError(
                    "pixel_values do not fit grid_thw: expected "
                    f"{' or '.join(str((patches, width)) for width in widths)} (patches, values of a patch), got "
                    f"{tuple(pixel_values.shape)}. Use a processor with this model's patch_depth, patch_size and "
                    "num_channels"
                )
            return pixel_values, grids
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[1] != config.num_channels:
            channels = config.num_channels
            raise ValueError(
                f"dense pixel_values have a wrong shape: expected (B, {channels}, D, H, W) or (B, {channels}, H, W), "
                f"got {tuple(pixel_values.shape)}. Pass packed pixel_values together with grid_thw"
            )
        volumes = pixel_values if pixel_values.ndim == 5 else pixel_values[:, :, None]
        B, _, D, H, W = volumes.shape
        grids = [(-(-D // config.patch_depth), H // config.patch_size, W // config.patch_size)] * B
        return patchify(volumes, 1 if D == 1 else config.patch_depth, config.patch_size).flatten(0, 1), grids

    def encode(
        self, rows: Tensor, coordinates: Tensor, layout: PackLayout, **kwargs: Any
    ) -> tuple[Tensor, BaseModelOutput]:
        """Run the layers and the last norm on all patch rows of each scan, or on the visible ones of a mask.

        Args:
            rows: `(P, C*t*p*p)`, scan after scan, or compact rows of images `(P, C*p*p)`.
            coordinates: `(P, 3)`, from `patch_coordinates`.
            layout: arrangement of the scans, from the number of rows of each.
            kwargs: passed to the attention implementation.

        Returns:
            The normalised tokens `(N, d)` by position, and the output of the layers before the norm.
        """
        patches = self.embeddings(rows)  # (P, d)
        scans = sum(scans for scans, _ in layout.groups)
        tokens = layout.join(self.embeddings.prefix_tokens(scans).to(patches.dtype), patches)  # (N, d)
        prefix_coordinates = coordinates.new_zeros(scans, layout.prefix, 3)
        config = self.config
        rotary = rotary_tables(
            layout.join(prefix_coordinates, coordinates),
            config.hidden_size // config.num_attention_heads,
            float(config.rope_theta),
        )
        output = self.encoder(tokens, layout, rotary, **kwargs)
        return self.norm(output.last_hidden_state), output

    def pool(self, tokens: Tensor, layout: PackLayout) -> Tensor:
        """Pool normalised tokens `(N, d)` by position to `(B, pooled)` in the caller's order."""
        groups = layout.split_groups(tokens)  # (scans, L, d) each
        if self.config.pooling == "cls":
            pooled = torch.cat([group[:, 0] for group in groups])
        elif self.config.pooling == "mean":
            pooled = torch.cat([group[:, layout.prefix :].mean(1) for group in groups])
        else:
            pooled = torch.cat([mean_and_std(group[:, layout.prefix :]) for group in groups])
        return pooled if layout.is_uniform else pooled[layout.positions]


__all__ = ["M3RetModel", "M3RetPreTrainedModel"]
