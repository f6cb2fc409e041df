"""Launches flash2_combine (combine.cu), which merges attention over disjoint sets of keys.

CombinePlan is made by DecodePlan (decode.py) for the splits of a decode, and for
`flash_attn_combine` from the caller's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._common.ask.problem import Target
from .._common.launch import kernels
from .._common.launch.plan_values import TORCH_DTYPES, template
from . import decode_tiles

DTYPES = {**TORCH_DTYPES, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def device_of(target: Target) -> torch.device:
    """Where the target's tensors live."""
    if target.simulated:
        return torch.device("cpu")
    return torch.device("cuda", target.device_index)


@dataclass(frozen=True)
class CombineProblem:
    """One merge, without its data. Strides count elements."""

    num_splits: int  # 1 .. 256
    batch: int  # 1 for packed sequences: rows are merged one by one, whoever owns them
    seqlen: int
    num_heads: int
    head_dim_v: int
    out_dtype: str  # "fp32" | "fp16" | "bf16"
    partial_strides: tuple[int, int, int, int]  # of (split, batch, seqlen, head)
    lse_partial_strides: tuple[int, int, int]  # of (split, batch, head); that of seqlen is 1
    out_strides: tuple[int, int, int]  # of (batch, seqlen, head)
    wide_loads: bool = False  # see decode_tiles.combine_spec
    wide_stores: bool = False
    return_lse: bool = True
    sink: bool = False

    @classmethod
    def of(cls, out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> CombineProblem:
        """Of float32 (num_splits, batch, seqlen, num_heads, head_dim_v) and (num_splits, batch,
        seqlen, num_heads) with stride 1 along seqlen, into out (batch, seqlen, num_heads,
        head_dim_v); last dims contiguous.
        """
        num_splits, batch, seqlen, num_heads, head_dim_v = out_partial.shape
        split, b, s, h, _ = out_partial.stride()
        lse_split, lse_b, _, lse_h = lse_partial.stride()
        out_b, out_s, out_h, _ = out.stride()
        return cls(
            num_splits,
            batch,
            seqlen,
            num_heads,
            head_dim_v,
            DTYPE_NAMES[out.dtype],
            (split, b, s, h),
            (lse_split, lse_b, lse_h),
            (out_b, out_s, out_h),
            wide_loads=_four_at_a_time(out_partial),
            wide_stores=_four_at_a_time(out),
        )

    @property
    def num_rows(self) -> int:
        return self.batch * self.seqlen * self.num_heads


def _four_at_a_time(tensor: Tensor) -> bool:
    """Whether each row consists of whole, aligned vectors of four elements."""
    elements = (tensor.shape[-1], *tensor.stride()[:-1])
    aligned = tensor.data_ptr() % (4 * tensor.element_size()) == 0
    return aligned and all(count % 4 == 0 for count in elements)


class CombinePlan:
    """One merge on one target. Not shared between threads; compiles nothing before a run."""

    def __init__(self, problem: CombineProblem, target: Target) -> None:
        p = self.problem = problem
        if not 1 <= p.num_splits <= decode_tiles.MAX_SPLITS:
            raise ValueError(
                f"num_splits is {p.num_splits}: expected 1 to {decode_tiles.MAX_SPLITS}"
            )
        self.target = target
        self.spec = decode_tiles.combine_spec(
            target.arch,
            p.out_dtype,
            p.head_dim_v,
            p.num_splits,
            p.wide_loads,
            p.wide_stores,
            p.sink,
        )
        rows_per_cta = int(self.spec["num_threads"]) // 32 // int(self.spec["warps_per_row"])
        self.grid = -(-p.num_rows // rows_per_cta)
        if self.grid >= 2**31:
            raise NotImplementedError(
                f"{p.num_rows} rows exceed the launch grid of 2**31 - 1 CTAs: split the batch"
            )
        self.device = device_of(target)
        self._kernel: kernels.Kernel | None = None  # loaded, maybe compiled, by the first run

    def prepare(self) -> kernels.Kernel:
        """Loads the kernel and makes all that runs share."""
        kernel = kernels.load(self.spec, self.target)
        p = self.problem
        self._lse_like = template((p.batch, p.num_heads, p.seqlen), torch.float32, self.device)
        self._block = kernel.layout.block()
        values: dict[str, int] = {
            "num_rows": p.num_rows,
            "seqlen": p.seqlen,
            "num_heads": p.num_heads,
            "num_splits": p.num_splits,
            "lse_batch_stride": p.num_heads * p.seqlen,
            "lse_head_stride": p.seqlen,
        }
        for name, axes, strides in (
            ("partial", ("split", "batch", "row", "head"), p.partial_strides),
            ("lse_partial", ("split", "batch", "head"), p.lse_partial_strides),
            ("out", ("batch", "row", "head"), p.out_strides),
        ):
            for axis, stride in zip(axes, strides, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        for field, value in values.items():
            self._block.set(field, value)
        slot = self._block.pointer_slot
        self._out_partial, self._lse_partial = slot("out_partial"), slot("lse_partial")
        self._out, self._lse, self._s_aux = slot("out"), slot("softmax_lse"), slot("s_aux")
        self._kernel = kernel
        return kernel

    def run(self, out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
        """Fills out; returns softmax_lse (batch, seqlen, num_heads), stride 1 along seqlen."""
        if self.problem.num_rows == 0:
            shape = (self.problem.batch, self.problem.num_heads, self.problem.seqlen)
            return torch.empty(shape, dtype=torch.float32, device=self.device).transpose(1, 2)
        tensors = (out_partial, lse_partial)
        lse = self.launch(out_partial.data_ptr(), lse_partial.data_ptr(), tensors, out)
        assert lse is not None
        return lse.transpose(1, 2)

    def launch(
        self,
        partial_address: int,
        lse_address: int,
        tensors: tuple[Tensor, ...],
        out: Tensor,
        s_aux: Tensor | None = None,
    ) -> Tensor | None:
        """Fills out; returns softmax_lse (batch, num_heads, seqlen), None if it is not wanted.

        tensors: that hold what lies at the addresses.
        """
        kernel = self._kernel or self.prepare()
        self._out_partial.value = partial_address
        self._lse_partial.value = lse_address
        self._out.value = out.data_ptr()
        if s_aux is not None:
            self._s_aux.value = s_aux.data_ptr()
        lse = None
        if self.problem.return_lse:
            lse = torch.empty_like(self._lse_like, memory_format=torch.contiguous_format)
            self._lse.value = lse.data_ptr()
        kernel.launch(self.grid, self._block, (*tensors, out, lse, s_aux))
        return lse

    def describe(self) -> str:
        """Two lines for people: kernel and grid."""
        return (
            f"{self.spec.describe()}\n"
            f"grid: {self.grid} CTAs of {self.spec['num_threads']} threads for "
            f"{self.problem.num_rows} rows"
        )
