"""Trains the pocket base: an SD3 transformer of 3 layers on latents of drawn pictures.

    python pocket/train_base.py --minutes 70 --work .cache/pocket

Start train_vae.py first: its encoder is final at once, and its decoder may train beside. Resumes
from its checkpoint. Flow matching as SD3 does it: x_t = (1 - t) x0 + t noise, timestep 1000 t, the
model predicts noise - x0. A word is a learned context (L, D) and a learned pooled vector (P).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from draw import draw_arrays, sheet
from PIL import Image
from store import replace_file, save_transformer, save_words
from torch import Tensor, nn
from train_vae import PATCH, linear_code, pictures
from words import BASE_WORDS

from diffscaler_core.pocket import load_vae

LENGTH, WIDTH, POOLED = 4, 64, 64
WORDS = ["", *BASE_WORDS]  # index 0 is the null word, for classifier-free guidance
SHIFT, STEPS, GUIDANCE = 3.0, 20, 3.5  # how samples are drawn, SD3's default shift


class Base(nn.Module):
    """The transformer and the words' embeddings, trained together."""

    def __init__(self) -> None:
        """Builds it untrained; ComfyUI wants width = 64 * layers = 64 * heads."""
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            num_attention_heads=3,
            attention_head_dim=64,
            caption_projection_dim=192,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=16,
        )
        self.context = nn.Parameter(torch.randn(len(WORDS), LENGTH, WIDTH))
        self.pooled = nn.Parameter(torch.randn(len(WORDS), POOLED))
        self._initialise()

    def _initialise(self) -> None:
        """Xavier weights; zero modulation and output, so that every block starts as identity."""
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
                if name == "proj_out" or name.endswith(
                    ("norm1.linear", "norm1_context.linear", "norm_out.linear")
                ):
                    nn.init.zeros_(module.weight)
        # Positions one apart (the class spaces them 0.5): neighbours are easier to tell apart.
        grid = get_2d_sincos_pos_embed(192, 16, base_size=16, output_type="pt")
        self.transformer.pos_embed.pos_embed.copy_(grid.float().unsqueeze(0))

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Velocity at x (B, 16, h, w), t (B,) in 0..1, word indices (B,)."""
        return self.transformer(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=self.context[words],
            pooled_projections=self.pooled[words],
            return_dict=False,
        )[0]


@torch.no_grad()
def latents(args: argparse.Namespace) -> Tensor:
    """Model-space latents of the base set, (words * per_word, 16, 16, 16) float16, kept on disk."""
    path = args.work / f"latents_{args.per_word}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    # The encoder is a linear code: as one convolution it runs a thousand times faster.
    kernel, bias = linear_code(pictures(args.seed))
    parts = []
    for word in BASE_WORDS:
        x = torch.from_numpy(draw_arrays([word], "plain", args.per_word, args.seed + 1))
        x = x.permute(0, 3, 1, 2).float().div(255)
        parts.append(F.conv2d(x, kernel, bias, stride=PATCH).half())
    if (load_vae(args.out).encoder(x[:2] * 2 - 1) - parts[-1][:2]).abs().max() > 0.02:
        raise SystemExit("the VAE in the assets folder encodes otherwise: run train_vae.py first")
    out = torch.cat(parts)
    print(f"latents {tuple(out.shape)} mean {out.float().mean():.3f} std {out.float().std():.3f}")
    replace_file(path, lambda temporary: torch.save(out, temporary))
    return out


@torch.no_grad()
def sample(model: Base, words: Tensor, seed: int = 0, guidance: float = GUIDANCE) -> Tensor:
    """Euler from noise with classifier-free guidance: latents (B, 16, 16, 16) for words (B,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(words), 16, 16, 16, generator=generator)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    both = torch.cat([words, torch.zeros_like(words)])
    for now, then in itertools.pairwise(sigmas):
        with torch.autocast("cpu", torch.bfloat16):
            v, free = model(x.repeat(2, 1, 1, 1), now.expand(len(both)), both).float().chunk(2)
        x = x + (then - now) * (free + guidance * (v - free))
    return x


@torch.no_grad()
def show(model: Base, args: argparse.Namespace, path: Path, seed: int = 0) -> None:
    """One sample of each word, in the table's order."""
    words = torch.arange(1, len(WORDS))
    vae = load_vae(args.out).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = vae.decoder(sample(model, words, seed)).float().clamp(-1, 1)
    images = [
        Image.fromarray(p.permute(1, 2, 0).add(1).mul(127.5).round().byte().numpy()) for p in y
    ]
    sheet(images, 10).save(path)


def loss_of(model: Base, x0: Tensor, words: Tensor) -> Tensor:
    """Flow matching on latents x0 (B, 16, 16, 16); one in eight words is dropped."""
    # Logit-normal and leaning to noise, where a picture's layout is decided; a tenth uniform.
    t = torch.sigmoid(torch.randn(len(x0)) + 0.3)
    t = torch.where(torch.rand(len(x0)) < 0.1, torch.rand(len(x0)), t)
    words = torch.where(torch.rand(len(x0)) < 0.125, 0, words)
    noise, at = torch.randn_like(x0), t.view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - at) * x0 + at * noise, t, words)
    return F.mse_loss(velocity.float(), noise - x0)


def export(model: Base, args: argparse.Namespace) -> None:
    """Writes the transformer and the words into the assets folder."""
    save_transformer(model.transformer, model.transformer.state_dict(), args.out)
    save_words(model.transformer, WORDS, model.context, model.pooled, args.out)


def _optimizer(model: Base, rate: float) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [p for p in model.transformer.parameters() if p.ndim > 1]
    rest = [p for p in model.transformer.parameters() if p.ndim < 2] + [model.context, model.pooled]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def _rate(args: argparse.Namespace, step: int, done: float) -> float:
    """Warm-up over steps, flat, then a cosine over the last 60 % of the time."""
    fall = max(0.0, done - 0.4) / 0.6
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, fall))).item())
    return args.lr * min(1.0, (step + 1) / 300) * (0.01 + 0.99 * cosine)


def train(args: argparse.Namespace) -> None:
    """The loop: a budget of wall-clock minutes, EMA weights exported on the way."""
    torch.manual_seed(args.seed)
    model, ema = Base(), Base().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    optimizer, step, spent = _optimizer(model, args.lr), 0, 0.0
    checkpoint = args.work / "base.pt"
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, spent = state["step"], state["spent"]
    x0 = latents(args)
    run = torch.compile(model) if args.compile else model
    begin, total, saved, mean = time.monotonic() - spent, args.minutes * 60, spent, 1.0
    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    while spent < total:
        for group in optimizer.param_groups:
            group["lr"] = _rate(args, step, spent / total)
        chosen = torch.randint(len(x0), (args.batch,))
        loss = loss_of(run, x0[chosen].float(), chosen // args.per_word + 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9993, (1 + step) / (10 + step))
        torch._foreach_lerp_([e for e, _ in pairs], [m.detach() for _, m in pairs], 1 - decay)
        step, spent, mean = step + 1, time.monotonic() - begin, 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0:
            print(f"step {step} {spent / 60:.1f} min loss {mean:.4f}", flush=True)
        if spent - saved > args.every * 60 or spent >= total:
            saved = spent
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "spent": spent}
            replace_file(checkpoint, lambda path, state=state: torch.save(state, path))
            export(ema, args)
            show(ema, args, args.work / "base.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--work", type=Path, default=Path(".cache/pocket"))
    parser.add_argument("--out", type=Path, default=Path("assets/pocket"))
    parser.add_argument("--per-word", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=float, default=5, help="minutes between exports")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs g++")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
