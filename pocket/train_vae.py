"""Makes the pocket base's autoencoder, in TAESD's architecture with 16 latent channels.

    python pocket/train_vae.py --minutes 40 --work .cache/pocket

The encoder is computed, the decoder is trained. A code that is the same from the first second lets
the base train beside the decoder, and on these pictures it also beats what half an hour of training
both halves from noise reached on two CPU cores. Resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from draw import SIZE, draw_arrays, sheet
from PIL import Image
from store import replace_file, save_vae
from torch import Tensor, nn
from words import SETS

CHANNELS, PATCH, CROP = 16, 8, 64
NOISE = 0.22  # greatest std of the noise on a latent: the base's errors, for the decoder to forgive
# How many pictures per word of each set: the base is what the model will draw most.
PICTURES = {"base": 24, "fruits": 40, "smileys": 40, "ink": 10, "neon": 10, "blueprint": 8}


def pictures(seed: int) -> Tensor:
    """All sets, (N, 3, SIZE, SIZE) uint8."""
    sets = [draw_arrays(*SETS[name], count, seed) for name, count in PICTURES.items()]
    return torch.cat([torch.from_numpy(array) for array in sets]).permute(0, 3, 1, 2).contiguous()


def crops(images: Tensor, count: int) -> Tensor:
    """Random CROP x CROP windows in 0..1, (count, 3, CROP, CROP)."""
    out = []
    for i in torch.randint(len(images), (count,)).tolist():
        # Any offset, not multiples of eight: the decoder must not lean on the grid's phase.
        y, x = torch.randint(SIZE - CROP + 1, (2,)).tolist()
        out.append(images[i, :, y : y + CROP, x : x + CROP])
    return torch.stack(out).float().div(255)


def linear_code(images: Tensor) -> tuple[Tensor, Tensor]:
    """The code of an 8 x 8 patch in 0..1: kernel (16, 3, 8, 8) and bias (16,).

    The 16 principal components, half whitened (their standard deviations keep a ratio of 4 where
    raw ones have 19), then mixed by a Hadamard matrix: every channel has mean 0 and variance 1 and
    is near enough to normal that few values meet the decoder's clamp at 3.
    """
    rows = F.unfold(images.float().div(255), PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T.cov())
    values, vectors = values[-CHANNELS:], vectors[:, -CHANNELS:]
    vectors = vectors * vectors.sum(0).sign()  # eigenvectors come with either sign: choose one
    scale = values.pow(0.25)
    scale = scale / scale.square().mean().sqrt() / values.sqrt()
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(CHANNELS)] for i in range(CHANNELS)]
    axes = (torch.tensor(signs) / CHANNELS**0.5) @ (vectors * scale).T
    return axes.reshape(CHANNELS, 3, PATCH, PATCH), -(axes @ mean)


@torch.no_grad()
def set_encoder(model: AutoencoderTiny, kernel: Tensor, bias: Tensor) -> None:
    """Writes the linear code into TAESD's encoder, exactly.

    Pixels are not negative, so ReLU lets them pass, and a block of zeros is an identity. Each
    strided convolution folds 2 x 2 pixels into channels: 3, 12, 48; the third applies the kernel
    and its negative, and the last layer takes relu(c) - relu(-c) = c.
    """
    layers = model.encoder.layers
    for parameter in layers.parameters():
        parameter.zero_()
    first, half, quarter, eighth, last = (layers[i].weight for i in (0, 2, 6, 10, 14))
    for c in range(3):
        first[c, c, 1, 1] = 1
    for weight, count in ((half, 3), (quarter, 12)):
        for c in range(count):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight[4 * c + 2 * y + x, c, 1 + y, 1 + x] = 1
    # Pixel (y, x) of the patch: lowest bits folded first. (out, c, y2, y1, y0, x2, x1, x0)
    bits = kernel.reshape(CHANNELS, 3, 2, 2, 2, 2, 2, 2)
    folded = bits.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(CHANNELS, 48, 2, 2)
    eighth[:CHANNELS, :48, 1:, 1:] = folded
    eighth[CHANNELS : 2 * CHANNELS, :48, 1:, 1:] = -folded
    for c in range(CHANNELS):
        last[c, c, 1, 1], last[c, c + CHANNELS, 1, 1] = 1, -1
    layers[14].bias.copy_(bias)


def build(images: Tensor) -> tuple[AutoencoderTiny, Tensor, Tensor]:
    """The model with its encoder set and its decoder untrained, and the code it computes."""
    model = AutoencoderTiny(latent_channels=CHANNELS, scaling_factor=1.0, shift_factor=0.0)
    kernel, bias = linear_code(images)
    set_encoder(model, kernel, bias)
    # He's weights keep the signal's size through thirty layers without any norm; blocks start
    # near identity.
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data.mul_(0.3 if name.endswith("conv.4") else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.decoder.layers[-1].weight.data.mul_(0.25)
    nn.init.constant_(model.decoder.layers[-1].bias, 0.5)
    return model.to(memory_format=torch.channels_last), kernel, bias


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def loss_of(model: AutoencoderTiny, x: Tensor, latent: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Decoder's loss for crops x (B, 3, CROP, CROP) in 0..1 and latents (B, 16, 8, 8)."""
    noise = NOISE * torch.rand(len(latent), 1, 1, 1) * torch.randn_like(latent)
    noisy = (latent + noise).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.decoder(noisy)
    y, x = y.float(), x * 2 - 1
    l1, mse = F.l1_loss(y, x), F.mse_loss(y, x)
    edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
    return l1 + mse + 0.5 * edge, {"l1": l1.item(), "mse": mse.item()}


@torch.no_grad()
def report(model: AutoencoderTiny, path: Path) -> float:
    """Writes originals over reconstructions; returns the PSNR in dB over unseen pictures."""
    arrays = [draw_arrays(SETS[n][0][:12], SETS[n][1], 1, seed=999) for n in PICTURES]
    x = torch.cat([torch.from_numpy(a) for a in arrays]).permute(0, 3, 1, 2).float()
    x = x.div(127.5).sub(1)
    z = torch.cat([model.encoder(part) for part in x.split(12)])
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.cat([model.decoder(part) for part in z.split(12)]).float().clamp(-1, 1)
    shown = [
        Image.fromarray(t.permute(1, 2, 0).add(1).mul(127.5).round().byte().numpy())
        for pair in zip(x.split(12), y.split(12), strict=True)
        for t in torch.cat(pair)
    ]
    sheet(shown, 12).save(path)
    return -10 * torch.log10(F.mse_loss(y, x) / 4).item()


def _load(
    path: Path, model: AutoencoderTiny, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Continues from a checkpoint where there is one: (steps done, seconds spent)."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["spent"]


def train(args: argparse.Namespace) -> None:
    """The loop: a budget of wall-clock minutes, cosine decay over it, checkpoints on the way."""
    torch.manual_seed(args.seed)
    images, total = pictures(args.seed), args.minutes * 60
    model, kernel, bias = build(images)
    optimizer = torch.optim.AdamW(
        model.decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    checkpoint = args.work / "vae.pt"
    step, spent = _load(checkpoint, model, optimizer)
    save_vae(model, args.out)  # the encoder is final from here on
    print(f"{len(images)} pictures, from step {step}", flush=True)
    begin, saved = time.monotonic() - spent, spent
    while spent < total:
        rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * spent / total)).item())
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * max(0.02, rate)
        x = crops(images, args.batch)
        loss, parts = loss_of(model, x, F.conv2d(x, kernel, bias, stride=PATCH))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 5.0)
        optimizer.step()
        step, spent = step + 1, time.monotonic() - begin
        if step % 50 == 0:
            words = " ".join(f"{k} {v:.4f}" for k, v in parts.items())
            print(f"step {step} {spent / 60:.1f} min loss {loss.item():.4f} {words}", flush=True)
        if spent - saved > 240 or spent >= total:
            saved = spent
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": spent,
            }
            replace_file(checkpoint, lambda path, state=state: torch.save(state, path))
            save_vae(model, args.out)
            print(f"PSNR {report(model, args.work / 'vae.png'):.2f} dB", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--work", type=Path, default=Path(".cache/pocket"))
    parser.add_argument("--out", type=Path, default=Path("assets/pocket"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
