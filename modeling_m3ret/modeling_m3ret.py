"""The M3Ret encoder: a vision transformer (ViT, arXiv 2010.11929) for packs of scans of any size (arXiv 2509.01360).

A pack holds the tokens of all scans of a batch in one matrix. Each scan has its own CLS and register tokens, and
attention never crosses scans. Nothing is padded, and a scan's embedding does not depend on the rest of the batch.

Shapes and the terms row, pack, position and grid are defined in `packing_m3ret`. This file is copied into every
checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_m3ret import ENCODER_FIELDS, M3RetConfig
from .layers_m3ret import M3RetAttention, M3RetLayer, M3RetLayerScale, Rotary, is_plain_linear, rotary_tables
from .packing_m3ret import PackLayout, grid_coordinates, patch_coordinates, patchify
from .pipeline_m3ret import register_pipelines
from .pooling_m3ret import M3RetAttentionPooling, M3RetWhitening, mean_and_std


logger = logging.get_logger(__name__)

# What may be passed to `forward` beside the scans: what libraries pass to every model, what this file passes on, and an
# option of other encoders that has its effect here always.
OPTIONS = {*TransformersKwargs.__annotations__, "return_dict", "cls_only", "interpolate_pos_encoding"}


def check_options(options: Mapping[str, Any], attn_implementation: str | None) -> None:
    """Check further arguments of `forward`. An attention function that a user has registered may take any.

    Raises:
        TypeError: if one is not None and has no effect, such as `bool_masked_pos`, which masks patches in DINOv3.
    """
    unknown = [name for name, value in options.items() if value is not None and name not in OPTIONS]
    if unknown and attn_implementation in (None, "eager", "sdpa", "flex_attention"):
        raise TypeError(
            "unknown argument: expected pixel_values, grid_thw, output_hidden_states, output_attentions or "
            f"return_dict, got {', '.join(unknown)}. Leave it out."
        )


# options of `from_pretrained` that say where a config is
LOCATION_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# options of `save_pretrained` that its `push_to_hub` takes
HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

# With these files, `SentenceTransformer(checkpoint)` calls `embed_scans`; without, it averages the rows of a pack.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "embed_scans", "method_output_name": None}},
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
        "prompts": {},
        "default_prompt_name": None,
    },
}

# with remote code, the Auto classes find these classes in every checkpoint; the package registers them instead
AUTO_CLASSES = {
    "AutoModel": "modeling_m3ret.M3RetModel",
    "AutoModelForImageClassification": "classification_m3ret.M3RetForImageClassification",
}


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

    def __init__(self, config: M3RetConfig, *args: Any, **kwargs: Any):
        config.validate_architecture()  # `from_pretrained(..., pooling="max")` sets fields of a config that was valid
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as every model does, and check that its whitening was fitted to the features that it will have.

        Raises:
            ValueError: if pooling or encoder differ from the config of the checkpoint. With
                `ignore_mismatched_sizes=True`, the whitening is reset instead, with a warning.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, fields = loaded[0], ("pooling", *ENCODER_FIELDS)
        whitening = next((part for part in model.modules() if isinstance(part, M3RetWhitening)), None)
        if (
            whitening is not None
            and not whitening.is_identity()
            and any(name in kwargs for name in ("config", *fields))
        ):
            location = {name: kwargs[name] for name in LOCATION_OPTIONS if name in kwargs}
            try:
                stored = M3RetConfig.from_pretrained(model.name_or_path, **location)
            except OSError:  # weights without a config: it must be the given one
                stored = model.config
            fitted = {name: getattr(stored, name) for name in fields}
            if changed := {name: value for name, value in fitted.items() if value != getattr(model.config, name)}:
                given = {name: getattr(model.config, name) for name in changed}
                problem = f"the whitening of {model.name_or_path} does not fit: expected {changed}, got {given}."
                if not kwargs.get("ignore_mismatched_sizes"):
                    raise ValueError(f"{problem} Pass ignore_mismatched_sizes=True to load the model without it.")
                whitening.reset()
                logger.warning(f"{problem} It is left out. Fit it to your own scans by `model.whitening.fit`.")
        return loaded if with_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, M3RetEmbeddings):
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, mean=0.0, std=std)
            init.trunc_normal_(module.register_tokens, mean=0.0, std=std)
        elif isinstance(module, M3RetPositionTable):
            init.trunc_normal_(module.plane_table, mean=0.0, std=std)
            init.zeros_(module.depth_table)
        elif isinstance(module, M3RetAttentionPooling):
            init.trunc_normal_(module.probe, mean=0.0, std=std)
        elif isinstance(module, M3RetWhitening):
            init.zeros_(module.mean)
            init.eye_(module.matrix)
        elif isinstance(module, M3RetLayerScale):
            init.constant_(module.gain, float(self.config.layer_scale_init))

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save the model as every model does, and what `pipeline`, `SentenceTransformer` and a head need to load it."""
        push_to_hub = kwargs.pop("push_to_hub", False)
        of_hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if push_to_hub and name in kwargs}
        self.config.auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map |= AUTO_CLASSES
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if not is_main_process:
            return
        from .classification_m3ret import M3RetForImageClassification  # imports this file

        custom_object_save(M3RetForImageClassification, save_directory)
        for name, content in SENTENCE_TRANSFORMERS_FILES.items():
            Path(save_directory, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(of_hub.pop("repo_id", Path(save_directory).name), **of_hub)


def interpolation_weights(centres: Tensor, sizes: Tensor, table_size: int, antialias: bool) -> Tensor:
    """Return the weights by which bicubic interpolation computes samples from a table: `(P, table_size)` float32.

    They are those of `torch.nn.functional.interpolate(mode="bicubic", antialias=antialias)`, here for samples of grids
    of different sizes at once. The cubic kernel (Keys, 1981) has the parameter -0.75, and -0.5 with antialiasing.

    Args:
        centres: position of each sample along the axis, from -1 to 1, `(P,)`.
        sizes: number of samples of its grid along the axis, `(P,)`.
        table_size: number of values of the table along the axis.
    """
    indices = (((centres + 1) * sizes - 1) / 2).round()
    scale = table_size / sizes
    a, stretch = (-0.5, scale.clamp(min=1)) if antialias else (-0.75, torch.ones_like(scale))
    source = scale * (indices + 0.5) - 0.5
    border = 0 if antialias else 2  # without antialiasing, the table continues with its first and last value
    taps = torch.arange(-border, table_size + border, dtype=torch.float32, device=centres.device)
    x = ((taps - source[:, None]) / stretch[:, None]).abs()  # (P, taps)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    if antialias:
        return weights / weights.sum(1, keepdim=True)
    inside = weights[:, 2:-2].clone()
    inside[:, 0] += weights[:, 0] + weights[:, 1]
    inside[:, -1] += weights[:, -2] + weights[:, -1]
    return inside


class M3RetPositionTable(nn.Module):
    """Learned positions of patches, as in ViT (arXiv 2010.11929): one for each place of a slice, one for each depth.

    Both tables are interpolated to the grid of each scan and added. The depths are zero at first, so that a table of a
    2D encoder gives the patches of all slices the positions of one.
    """

    def __init__(self, config: M3RetConfig):
        super().__init__()
        assert config.position_grid is not None
        self.grid, self.antialias = config.position_grid, config.position_antialias
        self.plane_table = nn.Parameter(torch.zeros(self.grid[1] * self.grid[2], config.hidden_size))
        self.depth_table = nn.Parameter(torch.zeros(self.grid[0], config.hidden_size))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the positions `(P, d)` of patches at the coordinates `(P, 6)` of `patch_coordinates`."""
        with torch.autocast(coordinates.device.type, enabled=False):
            depth, height, width = (
                interpolation_weights(coordinates[:, axis], coordinates[:, 3 + axis], size, self.antialias)
                for axis, size in enumerate(self.grid)
            )
            plane = (height[:, :, None] * width[:, None]).flatten(1).to(self.plane_table.dtype)  # (P, H*W)
            return plane @ self.plane_table + depth.to(self.depth_table.dtype) @ self.depth_table


class M3RetEmbeddings(nn.Module):
    """Patch embedding, CLS token, register tokens, and the table of positions and the norm of some encoders."""

    def __init__(self, config: M3RetConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = nn.Linear(config.patch_values, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.zeros(config.num_register_tokens, config.hidden_size))
        self.positions = M3RetPositionTable(config) if config.position_grid else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else None

    def prefix_tokens(self, scans: int) -> Tensor:
        """Return the CLS and register tokens of each scan: `(B, prefix, d)`."""
        parts: list[Tensor] = [self.register_tokens]
        if self.cls_token is not None:
            parts.insert(0, self.cls_token)
        return torch.cat(parts).expand(scans, -1, -1)

    def add_positions(self, patches: Tensor, coordinates: Tensor) -> Tensor:
        """Add the positions of a table to embedded patches `(P, d)`, at the coordinates that `encode` takes."""
        if self.positions is None:
            return patches
        positions = self.positions(coordinates)  # (P, d), or of one scan for all
        return (patches.unflatten(0, (-1, positions.shape[0])) + positions.to(patches.dtype)).flatten(0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Embed patch rows: `(P, C*t*p*p)` -> `(P, d)`.

        Compact rows of images `(P, C*p*p)` hold the single slice of their patch once instead of t times. A plain linear
        layer embeds them by the sum of its weights over depth, which gives the same result for a t-th of the work.
        """
        config, embed = self.config, self.patch_embeddings
        if rows.shape[1] == config.patch_values or not is_plain_linear(embed):
            dtype = embed.weight.dtype if is_plain_linear(embed) else self.register_tokens.dtype
            return embed(self.repeat_slices(rows).to(dtype))
        weight = embed.weight.unflatten(1, (config.num_channels, config.patch_depth, -1)).sum(2).flatten(1)
        return nn.functional.linear(rows.to(weight.dtype), weight, embed.bias)

    def repeat_slices(self, rows: Tensor) -> Tensor:
        """Expand compact rows of images `(P, C*p*p)` to `(P, C*t*p*p)`; return full rows unchanged."""
        if rows.shape[1] == self.config.patch_values:
            return rows
        channels, depth = self.config.num_channels, self.config.patch_depth
        return rows.view(len(rows), channels, 1, -1).expand(-1, -1, depth, -1).flatten(1)


def drop_path_rates(config: M3RetConfig) -> list[float]:
    """Return the stochastic depth rate of each layer: linear in depth from 0, as in DeiT and DINO."""
    return [
        config.drop_path_rate * layer / max(config.num_hidden_layers - 1, 1)
        for layer in range(config.num_hidden_layers)
    ]


class M3RetEncoder(M3RetPreTrainedModel):
    """Stack of transformer blocks over a pack of tokens."""

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            M3RetLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, tokens: Tensor, layout: PackLayout, rotary: Rotary | None, cls_only: bool = False, **kwargs: Any
    ) -> BaseModelOutput:
        """Run all layers: `(N, d)` -> `(N, d)` by position, or with `cls_only` the CLS tokens only, `(B, d)`."""
        subsets = layout.subsets or ((None, None),) * len(self.layers)
        for layer, of_layer in zip(self.layers[:-1], subsets, strict=False):
            tokens = layer(tokens, layout, rotary, False, of_layer, **kwargs)
        tokens = self.layers[-1](tokens, layout, rotary, cls_only, subsets[-1], **kwargs)
        return BaseModelOutput(last_hidden_state=tokens)


def recorded(encoded: BaseModelOutput, layout: PackLayout, dense: bool) -> dict[str, Any]:
    """Return the recorded hidden states and attentions of the layers in the form of `M3RetModel.forward`."""
    attentions: Any = encoded.attentions  # for each layer one tensor per group
    if attentions is not None and dense:
        attentions = tuple(weights[0] for weights in attentions)
    elif attentions is not None:
        by_position = [[weights for group in layer for weights in group] for layer in attentions]
        positions = range(layout.scans) if layout.positions is None else layout.positions.tolist()
        attentions = tuple(tuple(layer[position] for position in positions) for layer in by_position)
    hidden_states: Any = encoded.hidden_states  # None for each layer that the caller does not select
    if hidden_states is not None and not dense:
        hidden_states = tuple(
            state if state is None else layout.to_caller_order(state.view(-1, state.shape[-1]))
            for state in hidden_states
        )
    return {"hidden_states": hidden_states, "attentions": attentions}


class M3RetModel(M3RetPreTrainedModel):
    """Embed scans of any kind and size with one transformer that does not know the modality.

    Example:

    ```python
    >>> import torch
    >>> from modeling_m3ret import M3RetConfig, M3RetModel
    >>> model = M3RetModel(M3RetConfig.vitt()).eval()
    >>> with torch.no_grad():
    ...     model.embed_scans(torch.rand(2, 3, 20, 96, 64)).shape
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
        self.built_with = config.pooling
        self.pooler = M3RetAttentionPooling(config) if config.pooling == "attention" else None
        self.whitening = M3RetWhitening(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @classmethod
    def from_vit(cls, source: str, **overrides: Any) -> M3RetModel:
        """Convert a published 2D vision transformer: `M3RetModel.from_vit("facebook/dinov3-vits16-pretrain-lvd1689m")`.

        One slice gives the tokens of the source. Needs the package `m3ret`, which also converts the image processor:
        see `load_pretrained` in `modeling_m3ret.hub`.

        Args:
            source: folder or Hub id of a checkpoint, see docs/start-from-a-vit.md for the kinds.
            overrides: fields of [`M3RetConfig`], such as `pooling` or `patch_depth`.

        Raises:
            ImportError: if the package is not installed.
            EncoderError: if the source cannot be converted.
        """
        try:  # not by an import statement, with which transformers would look for the file in every checkpoint
            convert = importlib.import_module("modeling_m3ret.convert")
        except ImportError as error:
            raise ImportError("from_vit needs the package m3ret: expected it to be installed, got none.") from error
        return convert.convert_vit(source, **overrides)[0]

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
            kwargs: `output_hidden_states`, `output_attentions` (needs `attn_implementation="eager"`), `return_dict`,
                and arguments of an attention function of your own.

        Returns:
            `pooler_output` is `(B, config.pooled_size)`. The tokens of a scan are CLS, registers and patches in raster
            order, L in all.

            - Dense input: `last_hidden_state (B, L, d)`, attentions `(B, heads, L, L)` for each layer.
            - Packed input: `last_hidden_state (N, d)`, scan after scan in the given order (see `split_tokens`);
              attentions are a tuple of `(heads, L, L)`, one for each scan, for each layer.

        Raises:
            ValueError: if `pixel_values` and `grid_thw` have wrong or inconsistent shapes, or are not numbers of the
                kinds above.
            TypeError: if an argument is unknown, or no tensor.
        """
        dense = grid_thw is None
        rows, coordinates, layout = self.lay_out(pixel_values, grid_thw)
        tokens, encoded = self.encode(rows, coordinates, layout, **kwargs)

        last_hidden_state = tokens.unflatten(0, layout.groups[0]) if dense else layout.to_caller_order(tokens)
        if layout.order is None:  # the pooled tokens are those of the output, so that its gradients are theirs
            tokens = last_hidden_state.view_as(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool(tokens, layout),
            **recorded(encoded, layout, dense),
        )

    def embed(self, pixel_values: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """Return `pooler_output (B, pooled)` only. With CLS pooling the last layer computes nothing but the CLS tokens.

        Args and errors are those of `forward`.
        """
        return self.embed_rows(*self.lay_out(pixel_values, grid_thw))

    def embed_rows(self, rows: Tensor, coordinates: Tensor, layout: PackLayout) -> Tensor:
        """Embed patch rows `(P, C*t*p*p)` as `embed` does: `(B, pooled)`. The other args are those of `encode`."""
        is_cls = self.pooling == "cls"
        tokens, _ = self.encode(rows, coordinates, layout, cls_only=is_cls)
        return layout.scans_to_caller_order(tokens) if is_cls else self.pool(tokens, layout)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the output of `forward` with the retrieval embedding of `embed_scans` as `pooler_output (B, d)`.

        Args and errors are those of `forward`.
        """
        output = self(pixel_values, grid_thw, **kwargs | {"return_dict": True})
        output.pooler_output = self.embed_pooled(output.pooler_output)
        return output

    def embed_scans(self, pixel_values: Tensor, grid_thw: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the retrieval embedding: `pooler_output`, whitened and L2-normalised.

        Args and errors are those of `forward`.

        Returns:
            `(B, d)` float32 of unit length.
        """
        if kwargs:  # options of `forward`, for example of the attention implementation
            return self.get_image_features(pixel_values, grid_thw, **kwargs | {"return_dict": True}).pooler_output
        return self.embed_pooled(self.embed(pixel_values, grid_thw))

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Return the retrieval embedding `(B, d)` float32 of `pooler_output (B, pooled)`: whitened, L2-normalised."""
        return nn.functional.normalize(self.whitening(pooled), dim=-1)

    def split_tokens(self, last_hidden_state: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """Split a packed output `(N, d)` into the tokens `(L, d)` of each scan: CLS, registers, patches."""
        return list(last_hidden_state.split((grid_thw.prod(-1) + self.config.num_prefix_tokens).tolist()))

    def lay_out(self, pixel_values: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, Tensor, PackLayout]:
        """Return the patch rows, their coordinates and the layout of either form of input, as `encode` takes them.

        For dense input no operation depends on the batch size, so that one compiled graph serves all.
        """
        prefix = self.config.num_prefix_tokens
        rows, grids = self.prepare_rows(pixel_values, grid_thw)
        if grid_thw is None:
            coordinates = grid_coordinates(grids[0], rows.device)
            return rows, coordinates, PackLayout(((pixel_values.shape[0], prefix + coordinates.shape[0]),), prefix)
        layout = PackLayout.from_patch_counts([math.prod(grid) for grid in grids], prefix)
        return rows, patch_coordinates(grids, rows.device), layout.to(rows.device)

    def prepare_rows(self, pixel_values: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Validate either form of input and return its patch rows and grids: one per scan, or a single one if dense.

        Rows are `(P, C*t*p*p)`, or compact `(P, C*p*p)` for dense images `(B, C, H, W)` and `(B, C, 1, H, W)`. Args and
        errors are those of `forward`.
        """
        config = self.config
        for name, value in (("pixel_values", pixel_values), ("grid_thw", grid_thw)):
            if not isinstance(value, Tensor) and not (value is None and name == "grid_thw"):
                raise TypeError(
                    f"{name} is of a wrong type: expected a tensor, got {type(value).__name__}. Pass the processor's "
                    "output as `model(**inputs)`."
                )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are not normalised: expected floating-point numbers, got {pixel_values.dtype}. Use the "
                "pixel_values of the processor."
            )
        if grid_thw is not None:
            is_grid = grid_thw.ndim == 2 and grid_thw.shape[1] == 3 and not grid_thw.is_floating_point()
            grids = [(t, h, w) for t, h, w in grid_thw.tolist()] if is_grid else []
            if min((min(grid) for grid in grids), default=0) < 1:
                raise ValueError(
                    f"invalid grid_thw: expected integers of at least 1 of shape (B, 3), got {grid_thw.dtype} of shape "
                    f"{tuple(grid_thw.shape)}, smallest {min(grid_thw.flatten().tolist(), default=None)}. Use the "
                    "grid_thw of the processor."
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
                    "num_channels."
                )
            return pixel_values, grids
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[1] != config.num_channels:
            channels = config.num_channels
            raise ValueError(
                f"dense pixel_values have a wrong shape: expected (B, {channels}, D, H, W) or (B, {channels}, H, W), "
                f"got {tuple(pixel_values.shape)}. Pass packed pixel_values together with grid_thw."
            )
        volumes = pixel_values if pixel_values.ndim == 5 else pixel_values[:, :, None]
        _, _, D, H, W = volumes.shape
        grid = (-(-D // config.patch_depth), H // config.patch_size, W // config.patch_size)
        return patchify(volumes, 1 if D == 1 else config.patch_depth, config.patch_size).flatten(0, 1), [grid]

    def encode(
        self, rows: Tensor, coordinates: Tensor, layout: PackLayout, **kwargs: Any
    ) -> tuple[Tensor, BaseModelOutput]:
        """Run the layers and the last norm on all patch rows of each scan, or on the visible ones of a mask.

        Args:
            rows: `(P, C*t*p*p)`, scan after scan, or compact rows of images `(P, C*p*p)`.
            coordinates: of all rows `(P, 6)`, from `patch_coordinates`; or of one scan, if all have the same.
            layout: arrangement of the scans, from the number of rows of each. Its subsets are drawn here if it has
                none and the encoder trains with stochastic depth.
            kwargs: passed to the attention implementation.

        Returns:
            The normalised tokens `(N, d)` by position, and the output of the layers before the norm.

        Raises:
            TypeError: if one of the kwargs is unknown.
        """
        check_options(kwargs, self.config._attn_implementation)
        scans, config, embeddings = layout.scans, self.config, self.embeddings
        patches = embeddings.add_positions(embeddings(rows), coordinates)  # (P, d)
        tokens = layout.join(embeddings.prefix_tokens(scans).to(patches.dtype), patches)  # (N, d)
        if embeddings.norm is not None:
            tokens = embeddings.norm(tokens)
        rotary = None
        if config.rotary_axes != "none":
            coordinates = coordinates.repeat(rows.shape[0] // coordinates.shape[0], 1)
            positions = layout.join(coordinates.new_zeros(scans, layout.prefix, coordinates.shape[1]), coordinates)
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = rotary_tables(positions, head_dim, float(config.rope_theta), config.rotary_axes)
        if not self.training or config.drop_path_rate == 0:
            layout = replace(layout, subsets=())
        elif not layout.subsets:
            layout = layout.sample_subsets(drop_path_rates(cast(M3RetConfig, config)), torch.rand(8)).to(rows.device)
        if layout.order is None:  # recorded as (B, L, d), so that gradients reach the recorded states
            tokens = tokens.unflatten(0, layout.groups[0])
        output = self.encoder(tokens, layout, rotary, **kwargs | {"return_dict": True})
        return self.norm(output.last_hidden_state).view(-1, tokens.shape[-1]), output

    @property
    def pooling(self) -> str:
        """How the model pools, by the config.

        Raises:
            ValueError: if the config was changed since the model was built: its whitening is that of another pooling.
        """
        if self.config.pooling != self.built_with:
            raise ValueError(
                f"config.pooling was changed after the model was built: expected {self.built_with!r}, got "
                f"{self.config.pooling!r}. Pass `pooling` to `from_pretrained`, or build a new model."
            )
        return self.built_with

    def pool(self, tokens: Tensor, layout: PackLayout) -> Tensor:
        """Pool normalised tokens `(N, d)` by position to `(B, pooled)` in the caller's order."""
        if self.pooling == "cls":
            return layout.scans_to_caller_order(layout.first_tokens(tokens))
        mean = functools.partial(torch.mean, dim=1)
        pool = self.pooler or (mean_and_std if self.pooling == "statistics" else mean)
        pooled = []
        for group in layout.split_groups(tokens):  # (scans, L, d)
            _, patches = group.split([layout.prefix, group.shape[1] - layout.prefix], dim=1)
            pooled.append(pool(patches))
        return layout.scans_to_caller_order(torch.cat(pooled))


register_pipelines()

__all__ = ["M3RetModel", "M3RetPreTrainedModel"]
