"""Small models with the structure of Open-Sora 1.2 and 2.0, as far as guidance depends on it, and their samplers.

Like the real ones are: the names and the order of blocks and arguments; text packed without padding along one dimension
in 1.2; arguments that the model repeats for the rows of CFG; a forward set on the instance in 2.0; the order and the
scales with which the samplers stack and combine rows.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tests import models


def timestep_features(t, width):
    angles = t.float()[:, None] * torch.exp(-torch.arange(width // 2) / 3.0)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


# 1.2


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj, self.proj_drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (heads_of(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj_drop(self.proj(attend(q, k, v)))


class CrossAttention(nn.Module):
    """Each sample attends to its own text tokens, which lie one sample after another."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x, cond, mask):
        assert cond.shape[0] == 1
        assert len(mask) == len(x)
        assert sum(mask) == cond.shape[1]
        outputs = []
        for sample, text in zip(x, self.kv_linear(cond)[0].split(mask), strict=True):
            k, v = (heads_of(part, self.heads) for part in text.chunk(2, dim=-1))
            outputs.append(attend(heads_of(self.q_linear(sample), self.heads), k, v))
        return self.proj(torch.stack(outputs))


class STDiT3Block(nn.Module):
    def __init__(self, width, heads, temporal):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross_attn = Attention(width, heads), CrossAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width))

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        now = (self.scale_shift_table + t.unflatten(1, (6, -1))).unsqueeze(2).unbind(1)
        if x_mask is not None:  # given frames have time 0
            frames = x_mask.repeat_interleave(S, dim=1)[..., None]
            given = (self.scale_shift_table + t0.unflatten(1, (6, -1))).unsqueeze(2).unbind(1)
            now = [torch.where(frames, one, other) for one, other in zip(now, given, strict=True)]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = now
        tokens = (self.norm1(x) * (1 + scale) + shift).unflatten(1, (T, S))
        if self.temporal:
            tokens = tokens.transpose(1, 2)
        attended = self.attn(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        x = x + gate * (attended.transpose(1, 2) if self.temporal else attended).flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class STDiT3(nn.Module):
    def __init__(self, depth=4, width=16, heads=2, text=8):
        super().__init__()
        self.width = width
        self.x_embedder, self.y_embedder = nn.Linear(4, width), nn.Linear(text, width)
        self.t_embedder, self.fps_embedder = nn.Linear(8, width), nn.Linear(8, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads, False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(width, heads, True) for _ in range(depth))
        self.final_layer = nn.Linear(width, 8)  # the output also has a learned sigma
        self.final_table = nn.Parameter(torch.randn(2, width))

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        rows, _, T, H, W = x.shape
        fps = fps.repeat(rows // len(fps))
        assert len(fps) == rows
        t = self.t_embedder(timestep_features(timestep / 1000, 8)) + self.fps_embedder(timestep_features(fps, 8))
        t0 = None
        if x_mask is not None:
            t0 = self.t_embedder(timestep_features(0 * timestep, 8)) + self.fps_embedder(timestep_features(fps, 8))
        y = self.y_embedder(y).squeeze(1)
        if mask is None:
            mask = torch.ones(y.shape[:2])
        elif len(mask) != rows:
            mask = mask.repeat(rows // len(mask), 1)
        lengths = mask.sum(dim=1).long().tolist()
        y = y[mask != 0][None]
        x = self.x_embedder(x.flatten(2).transpose(1, 2)) * (height[0] / width[0])
        t_mlp, t0_mlp = self.t_block(t), None if t0 is None else self.t_block(t0)
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                x = block(x, y, t_mlp, lengths, x_mask, t0_mlp, T, H * W)
        shift, scale = (self.final_table + t[:, None]).chunk(2, dim=1)
        x = self.final_layer(nn.functional.layer_norm(x, (self.width,)) * (1 + scale) + shift)
        return x.transpose(1, 2).unflatten(2, (T, H, W)).float()


def rflow(model, z, text, steps, scale, mask=None):
    """The loop of 1.2: `[cond | uncond]`; given frames join at the time in their mask."""
    arguments = {name: value for name, value in text.items() if name != "y_null"}
    arguments["y"] = torch.cat([text["y"], text["y_null"]])
    times = [torch.full((len(z),), (1 - step / steps) * 1000) for step in range(steps)]
    for step, t in enumerate(times):
        before = z
        if mask is not None:
            open_now = mask * 1000 >= t[:, None]
            arguments["x_mask"] = open_now.repeat(2, 1)
        predicted = model(torch.cat([z, z]), torch.cat([t, t]), **arguments).chunk(2, dim=1)[0]
        cond, uncond = predicted.chunk(2)
        after = times[step + 1] if step + 1 < steps else torch.zeros_like(t)
        z = z + (uncond + scale * (cond - uncond)) * ((t - after) / 1000)[:, None, None, None, None]
        if mask is not None:
            z = torch.where(open_now[:, None, :, None, None], z, before)
    return z


# 2.0


class DoubleStreamBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.img_mod, self.txt_mod = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.img_qkv, self.txt_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.img_proj, self.txt_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, img, txt, vec, pe, **kwargs):
        parts, gates = [], []
        for x, mod, qkv in ((txt, self.txt_mod, self.txt_qkv), (img, self.img_mod, self.img_qkv)):
            shift, scale, gate = mod(vec)[:, None].chunk(3, dim=-1)
            normed = nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            parts.append([heads_of(part, self.heads) for part in qkv(normed).chunk(3, dim=-1)])
            gates.append(gate)
        q, k, v = (torch.cat(both, dim=2) for both in zip(*parts, strict=True))
        out = attend(rotated(q, pe), rotated(k, pe), v)
        words = txt.shape[1]
        return img + gates[1] * self.img_proj(out[:, words:]), txt + gates[0] * self.txt_proj(out[:, :words])


class SingleStreamBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulation, self.linear1 = nn.Linear(width, 3 * width), nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, x, vec, pe, **kwargs):
        shift, scale, gate = self.modulation(vec)[:, None].chunk(3, dim=-1)
        normed = nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        *qkv, mlp = self.linear1(normed).chunk(4, dim=-1)
        q, k, v = (heads_of(part, self.heads) for part in qkv)
        out = attend(rotated(q, pe), rotated(k, pe), v)
        return x + gate * self.linear2(torch.cat([out, nn.functional.gelu(mlp)], dim=-1))


def rotated(x, pe):
    cos, sin = (part[:, None] for part in pe)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class MMDiTModel(nn.Module):
    def __init__(self, double=3, single=4, width=16, heads=2, channels=8, text=8):
        super().__init__()
        self.img_in, self.cond_in = nn.Linear(channels, width), nn.Linear(channels + 2, width)
        self.time_in, self.vector_in, self.txt_in = nn.Linear(8, width), nn.Linear(6, width), nn.Linear(text, width)
        self.guidance_in = nn.Linear(8, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(width, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(width, heads) for _ in range(single))
        self.modulation, self.final_layer = nn.Linear(width, 2 * width), nn.Linear(width, channels)
        self.angles = width // heads // 2
        self.forward = self.forward_ckpt  # the class itself has no forward

    def forward_ckpt(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, **kwargs):
        img = self.img_in(img)
        if cond is not None:
            img = img + self.cond_in(cond)
        vec = self.time_in(timestep_features(timesteps, 8)) + self.vector_in(y_vec)
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_features(guidance, 8))
        txt = self.txt_in(txt)
        places = torch.cat([txt_ids, img_ids], dim=1).sum(dim=-1, keepdim=True) / torch.arange(1, self.angles + 1)
        pe = places.cos(), places.sin()
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec, pe)
        shift, scale = self.modulation(vec).chunk(2, dim=1)
        img = nn.functional.layer_norm(img[:, txt.shape[1] :], img.shape[-1:])
        return self.final_layer(img * (1 + scale[:, None]) + shift[:, None])


def oscillating(scale, step):
    return scale if step % 2 == 0 else 1.0


def image_to_video(model, noise, given, text, steps, scale, image_scale):
    """The loop of 2.0: `[cond | uncond | uncond without image]`; scales alternate; the image's grows over tokens."""
    img, times = torch.cat([noise] * 3), torch.linspace(1, 0, steps + 1).tolist()
    cond = torch.cat([given, given, torch.zeros_like(given)])
    for step, (now, after) in enumerate(itertools.pairwise(times)):
        img = torch.cat([img[: len(noise)]] * 3)
        t = torch.full((len(img),), now)
        predicted = model(img=img, **text, cond=cond, timesteps=t, guidance=torch.full((len(img),), scale))
        cond_, uncond, nothing = predicted.chunk(3)
        image = torch.linspace(1.0, oscillating(image_scale, step), noise.shape[1])[None, :, None]
        v = nothing + image * (uncond - nothing) + oscillating(scale, step) * (cond_ - uncond)
        img = img + (after - now) * torch.cat([v] * 3)
    return img[: len(noise)]


def built(cls, **settings):
    torch.manual_seed(3)
    model = cls(**settings)
    models.spread(model)
    for parameter in model.parameters():  # gates and CFG amplify rounding
        parameter.data *= 0.5 if parameter.ndim > 1 else 1.0
    return model.eval()
