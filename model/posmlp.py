"""The network: stem, four stages of gated blocks with convolutions between them, and a linear head.

    stem        two strided convolutions with BatchNorm: a frame becomes a grid of tokens 4 times smaller
    stage 1-4   blocks on channels-last tokens (B, T, H, W, D); between stages a strided convolution halves H and W
    head        LayerNorm, mean over all tokens, Linear

All of it with ``block: parallel``, ``version: v1``, ``stem: 2d`` is [released], and parameters carry the released names. No
temporal down-sampling inside, no positional embedding, no class token, no channel MLP.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import NORM_EPS, Block, Stage
from model.errors import ModelError
from model.modality import see
from model.presets import NUM_STAGES, ModelConfig, ResolvedConfig
from model.products import gelu_fits, product_type
from model.stem_norm import StemNorm


class PatchEmbed(nn.Module):
    """Stem: conv, BatchNorm, GELU, conv, BatchNorm, no activation at the end; both convolutions halve H and W. [released]

    With ``stem`` ``3d`` the first convolution is (3, 3, 3) and also halves T. [inferred]
    """

    def __init__(self, in_channels: int, width: int, stem: str = "2d") -> None:
        super().__init__()
        half, depth = width // 2, 3 if stem == "3d" else 1
        self.proj1 = nn.Conv3d(in_channels, half, (depth, 3, 3), stride=(2 if stem == "3d" else 1, 2, 2), padding=(depth // 2, 1, 1))
        self.norm1 = StemNorm(half, NORM_EPS, gelu=True)
        self.proj2 = nn.Conv3d(half, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.norm2 = StemNorm(width, NORM_EPS, gelu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) floating to (B, D, T', H/4, W/4), stored channels-last."""
        for conv, norm in ((self.proj1, self.norm1), (self.proj2, self.norm2)):
            fold = not norm.training and gelu_fits(x.device, product_type(x))
            x = convolve(conv, x, norm) if fold else norm(convolve(conv, x))
        return x


class Downsample(nn.Module):
    """Between stages: a (1, 3, 3) convolution that halves H and W, then LayerNorm. [released]"""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_width, out_width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.norm = nn.LayerNorm(out_width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last (B, T, H, W, D) to (B, T, H/2, W/2, D')."""
        return cast(Tensor, self.norm(convolve(self.proj, x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)))


def convolve(conv: nn.Conv3d, x: Tensor, norm: StemNorm | None = None) -> Tensor:
    """``conv(x)`` on (B, C, T, H, W), as a 2-D convolution over frames where the kernel has no extent in time.

    The same sums; channels-last 2-D kernels are the fast ones, and leave tokens in the order the stages want. norm: what follows in
    evaluation, done by the convolution itself, GELU included, where :func:`model.products.gelu_fits`.
    """
    batch, _, frames, _, _ = x.shape
    weight, bias = (conv.weight, conv.bias) if norm is None else norm.folded(conv)
    flat = conv.kernel_size[0] == 1
    if flat:
        # One frame is squeezed, not transposed: its strides would leave the layout open, which batch norm's backward gets wrong.
        x = x.squeeze(2) if frames == 1 else x.transpose(1, 2).flatten(0, 1)
        weight = weight[:, :, 0]
    layout = torch.channels_last if flat else torch.channels_last_3d
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    stride, padding, dilation = conv.stride[flat:], conv.padding[flat:], conv.dilation[flat:]
    if norm is not None and norm.gelu:
        kind = product_type(x)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        x = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, 1, "gelu", [], "none")
    else:
        x = (F.conv2d if flat else F.conv3d)(x, weight, bias, stride, padding)
    if not flat:
        return x
    return x.unsqueeze(2) if frames == 1 else x.view(batch, frames, *x.shape[1:]).transpose(1, 2)


class PosMLPVideo(nn.Module):
    """PosMLP-Video of a :class:`model.presets.ModelConfig`: clips to logits.

    Input (B, C, T, H, W), floating, normalised, T = ``config.num_frames``, any H and W of at least 32 pixels; logits (B, K).
    Linear weights start at trunc_normal(.02), biases at 0, convolutions and BatchNorm at torch's defaults. [released]
    """

    def __init__(self, config: ModelConfig | ResolvedConfig) -> None:
        super().__init__()
        config = config.resolve() if isinstance(config, ModelConfig) else config
        self.config = config
        total = sum(config.depths)
        rates = [config.drop_path * i / max(1, total - 1) for i in range(total)]
        self.patch_embed1 = PatchEmbed(config.stem_channels, config.widths[0], config.stem)
        for stage in range(NUM_STAGES):
            if stage:
                self.add_module(f"patch_embed{stage + 1}", Downsample(config.widths[stage - 1], config.widths[stage]))
            own = [rates.pop(0) for _ in range(config.depths[stage])]
            blocks = [Block(config, stage, rate) for rate in own]
            self.add_module(f"blocks{stage + 1}", Stage(blocks, config.windows[stage], config.activation_checkpointing))
        self.norm = nn.LayerNorm(config.widths[-1], eps=NORM_EPS)
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) floating to logits (B, K). Raises ModelError if the clips do not fit."""
        features = self.norm(self.forward_features(clips))
        return cast(Tensor, self.head(features.mean(dim=(1, 2, 3))))

    def forward_features(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) floating to the last stage's channels-last map (B, T', H/32, W/32, D), before the final norm."""
        return self.forward_stages(clips)[-1]

    def forward_stages(self, clips: Tensor) -> list[Tensor]:
        """The channels-last maps (B, T', H/s, W/s, D) of all four stages, s = 4, 8, 16, 32."""
        self._check(clips)
        x = self.patch_embed1(see(clips, self.config.modality)).permute(0, 2, 3, 4, 1)
        maps: list[Tensor] = []
        for stage in range(NUM_STAGES):
            if stage:
                x = self.get_submodule(f"patch_embed{stage + 1}")(x)
            x = self.get_submodule(f"blocks{stage + 1}")(x)
            maps.append(x)
        return maps

    @property
    def num_layers(self) -> int:
        """Number of layer ids: the stem, every block, and the head with its norm."""
        return sum(self.config.depths) + 2

    def layer_id(self, name: str) -> int:
        """Depth of the parameter ``name`` for layer-wise decay: 0 the stem, 1.. the blocks in order, num_layers - 1 the head.

        A down-sampling layer counts with the first block behind it. Raises ModelError for an unknown name.
        """
        part, _, rest = name.partition(".")
        if part in ("norm", "head"):
            return self.num_layers - 1
        stem, number = part[:-1], part[-1:]
        if stem not in ("patch_embed", "blocks") or number not in ("1", "2", "3", "4"):
            raise ModelError(f"layer_id: got {name!r}, expected a parameter name such as blocks1.0.fc.encoder.fc1.weight")
        if part == "patch_embed1":
            return 0
        before = sum(self.config.depths[: int(number) - 1])
        return before + 1 + (int(rest.partition(".")[0]) if stem == "blocks" else 0)

    def no_weight_decay(self) -> frozenset[str]:
        """Names of the parameters that must not decay: all 1-D ones; dictionaries and token biases if configured so."""
        lrpe = ("window_relative_position_bias_table", "token_proj_n_bias")
        spared = () if self.config.decay_dictionaries else lrpe
        return frozenset(name for name, p in self.named_parameters() if p.ndim == 1 or name.endswith(spared))

    def _check(self, clips: Tensor) -> None:
        config = self.config
        if clips.ndim != 5 or clips.shape[1] != config.in_channels:
            hint = "; this looks like (B, T, C, H, W)" if clips.ndim == 5 and clips.shape[2] == config.in_channels else ""
            raise ModelError(f"clips: got shape {tuple(clips.shape)}, expected (B, {config.in_channels}, T, H, W){hint}")
        if clips.shape[0] == 0:
            raise ModelError("clips: got an empty batch, expected at least one clip")
        if not clips.is_floating_point():
            raise ModelError(f"clips: got {clips.dtype}, expected floating point; normalise pixels before the model")
        weights = self.patch_embed1.proj1.weight.dtype
        if clips.dtype != weights and not torch.is_autocast_enabled(clips.device.type):
            raise ModelError(f"clips: got {clips.dtype}, expected the weights' {weights}; convert one of them, or run under torch.autocast")
        if clips.shape[2] != config.num_frames:
            raise ModelError(
                f"clips: got {clips.shape[2]} frames, expected {config.num_frames}; build the model with num_frames: "
                f"{clips.shape[2]} and load the weights into it (model.weights), which resizes the temporal dictionaries"
            )
        if min(clips.shape[3:]) < 32:
            raise ModelError(f"clips: got {clips.shape[3]}x{clips.shape[4]} pixels, expected at least 32 on each side")
