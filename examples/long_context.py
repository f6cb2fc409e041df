"""A small decoder, trained on packed documents that the ranks of a group divide among each other.

Every rank holds its part of the tokens, FSDP2 shards the parameters over the same ranks, and rank 0
trains the same model alone beside it: the losses of the two agree.

    python examples/long_context.py                            # a process per GPU, or 2 on the CPU
    torchrun --nproc-per-node 4 examples/long_context.py       # as a job of torchrun
    python examples/long_context.py --tokens 65536 --steps 20  # larger

What a model needs for this is short: tokens, labels and positions go through `layout.shard` and
`layout.positions`, attention is `context_parallel.attention`, and each rank's loss is its tokens'
part of the mean over all tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flash_attn_interface.context_parallel import Layout, attention

IGNORED = -100


@dataclass(frozen=True)
class Config:
    """Layers take turns: every second one sees a window only."""

    vocabulary: int = 64
    width: int = 64
    layers: int = 2
    heads: tuple[int, int, int] = (4, 2, 2)  # of q, k, v
    head_dims: tuple[int, int] = (32, 48)  # of q and k, of v
    window: int = 128
    dtype: torch.dtype = torch.bfloat16  # of attention


class Layer(nn.Module):
    def __init__(self, config: Config, windowed: bool) -> None:
        super().__init__()
        self.config = config
        self.window_size = (config.window, 0) if windowed else (-1, -1)
        h_q, h_k, h_v = config.heads
        d, d_v = config.head_dims
        self.shapes = ((h_q, d), (h_k, d), (h_v, d_v))
        self.norm = nn.LayerNorm(config.width)
        self.inputs = nn.Linear(config.width, sum(h * n for h, n in self.shapes))
        self.output = nn.Linear(h_q * d_v, config.width)
        self.sinks = nn.Parameter(torch.zeros(h_q))
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor, layout: Layout, rotation: Tensor) -> Tensor:
        parts = self.inputs(self.norm(x)).split([h * n for h, n in self.shapes], -1)
        q, k, v = (p.unflatten(-1, s) for p, s in zip(parts, self.shapes, strict=True))
        q, k, v = (t.to(self.config.dtype) for t in (rotate(q, rotation), rotate(k, rotation), v))
        out = attention(
            q,
            k,
            v,
            layout,
            causal=True,
            window_size=self.window_size,
            s_aux=self.sinks,
            method="ring",
        )
        assert isinstance(out, Tensor)
        x = x + self.output(out.to(x.dtype).flatten(-2))
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, i % 2 == 1) for i in range(config.layers))
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Logits of this rank's tokens, (tokens,)."""
        x = self.embedding(tokens)
        rotation = rotations(layout.positions(tokens.device), self.config.head_dims[0])
        for layer in self.layers:
            x = layer(x, layout, rotation)
        return self.head(x)


def rotations(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary embedding: complex (tokens, 1, head_dim / 2)."""
    frequencies = 10_000 ** -(torch.arange(head_dim // 2, device=positions.device) * 2 / head_dim)
    angles = positions[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def documents(total: int, generator: torch.Generator) -> list[int]:
    """Long-tailed lengths that add up to `total`."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        share = float(torch.rand((), generator=generator)) ** 3
        lengths.append(min(left, 8 + int(share * total)))
    return lengths


def batch(total: int, vocabulary: int, step: int) -> tuple[list[int], Tensor, Tensor]:
    """(lengths, tokens, labels) of packed documents, the same on every rank. Documents repeat
    short phrases, so there is something to learn; a document's last token has no label."""
    generator = torch.Generator().manual_seed(step)
    lengths = documents(total, generator)
    texts, labels = [], []
    for length in lengths:
        phrase = torch.randint(vocabulary, (min(length, 16),), generator=generator)
        text = phrase.repeat(length // len(phrase) + 1)[:length]
        texts.append(text)
        labels.append(torch.cat([text[1:], torch.tensor([IGNORED])]))
    return lengths, torch.cat(texts), torch.cat(labels)


def loss_of(
    model: nn.Module, group: dist.ProcessGroup, total: int, step: int, device: torch.device
) -> Tensor:
    """This rank's part of the mean loss over all tokens."""
    vocabulary = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings
    lengths, tokens, labels = batch(total, vocabulary, step)
    layout = Layout(group, cu_seqlens=[0, *accumulate(lengths)], min_tokens_per_rank=16)
    logits = model(layout.shard(tokens.to(device)), layout)
    local_labels = layout.shard(labels.to(device))
    part = nn.functional.cross_entropy(
        logits.float(), local_labels, ignore_index=IGNORED, reduction="sum"
    )
    return part / int((labels != IGNORED).sum())


def train(
    model: nn.Module,
    group: dist.ProcessGroup,
    total: int,
    steps: int,
    device: torch.device,
    gradient_divisor: int,
) -> list[float]:
    """The mean loss of each step. gradient_divisor: by which a wrapper of the model divides the sum
    of the ranks' gradients; their sum is what this loss wants."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(steps):
        part = loss_of(model, group, total, step, device)
        (part * gradient_divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = part.detach().clone()
        dist.all_reduce(mean, group=group)
        curve.append(mean.item())
    return curve


def run(rank: int, world: int, store: str, tokens: int, steps: int) -> None:
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    device = torch.device(kind, rank % torch.cuda.device_count()) if on_gpu else torch.device(kind)
    if on_gpu:
        torch.cuda.set_device(device)
    start = f"file://{store}" if store else "env://"
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=start, rank=rank, world_size=world)
    mesh = init_device_mesh(kind, (world,), mesh_dim_names=("cp",))
    alone = [dist.new_group([r]) for r in range(world)][rank]

    torch.manual_seed(0)
    config = Config()
    model = Decoder(config).to(device)
    single = Decoder(config).to(device)
    single.load_state_dict(model.state_dict())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["cp"])
    fully_shard(model, mesh=mesh["cp"])

    divided = train(model, mesh.get_group("cp"), tokens, steps, device, world)
    undivided = train(single, alone, tokens, steps, device, 1) if rank == 0 else []
    dist.barrier()
    if rank == 0:
        print(f"{world} processes on {kind}, {tokens} tokens of packed documents a step")
        print("step   loss of all ranks   loss of one")
        for step, (ours, theirs) in enumerate(zip(divided, undivided, strict=True)):
            print(f"{step:4d} {ours:19.5f} {theirs:13.5f}")
        worst = max(abs(a - b) for a, b in zip(divided, undivided, strict=True))
        print(f"largest difference {worst:.1e}")
        if worst > 5e-3:
            raise SystemExit("the losses differ by more than rounding in bf16 explains")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="in a step, on all ranks together")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        run(rank, world, "", arguments.tokens, arguments.steps)
        return
    world = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        mp.spawn(run, (world, store, arguments.tokens, arguments.steps), nprocs=world)


if __name__ == "__main__":
    main()
