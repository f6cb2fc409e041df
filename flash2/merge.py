"""Launches flash2_merge (merge.cu): attention over more keys, added to a result in place.

MergePlan is made by `flash_attn_interface/context_parallel/kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._common.ask.problem import Target
from .._common.launch import kernels
from .._common.runtime.spec import KernelSpec
from .combine import DTYPE_NAMES

_NUM_THREADS = 256


@dataclass(frozen=True)
class MergeProblem:
    """One merge, without its data. Strides count elements."""

    batch: int  # 1 for packed sequences
    seqlen: int  # rows of the part
    num_heads: int
    head_dim_v: int
    dtype: str  # of the part: "fp16" | "bf16"
    out_f32: bool  # out is float32, else of the part's dtype
    indexed: bool  # the part's rows are those of an index
    wide: bool  # four columns at a time, of out and part
    out_strides: tuple[int, int, int]  # of (batch, seqlen, head)
    part_strides: tuple[int, int, int]
    lse_strides: tuple[int, int]  # of (batch, head); that of seqlen is 1
    lse_part_strides: tuple[int, int]

    @classmethod
    def of(
        cls, out: Tensor, lse: Tensor, part: Tensor, lse_part: Tensor, rows: Tensor | None
    ) -> MergeProblem:
        """Of out and part (batch, seqlen, num_heads, head_dim_v), last dims contiguous, and lse and
        lse_part (batch, num_heads, seqlen), float32, likewise; part may have other rows than out,
        those that rows, int64 (seqlen,), names.
        """
        batch, seqlen, num_heads, head_dim_v = part.shape
        return cls(
            batch,
            seqlen,
            num_heads,
            head_dim_v,
            DTYPE_NAMES[part.dtype],
            out.element_size() == 4,
            rows is not None,
            _four_at_a_time(out) and _four_at_a_time(part),
            _three(out),
            _three(part),
            (lse.stride(0), lse.stride(1)),
            (lse_part.stride(0), lse_part.stride(1)),
        )

    @property
    def num_rows(self) -> int:
        return self.batch * self.seqlen * self.num_heads


def _three(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _four_at_a_time(tensor: Tensor) -> bool:
    """Whether each row consists of whole, aligned vectors of four elements."""
    elements = (tensor.shape[-1], *tensor.stride()[:-1])
    aligned = tensor.data_ptr() % (4 * tensor.element_size()) == 0
    return aligned and all(count % 4 == 0 for count in elements)


def merge_spec(arch: str, dtype: str, out_f32: bool, head_dim_v: int, wide: bool) -> KernelSpec:
    return KernelSpec.make(
        "flash2/merge.cu",
        "flash2_merge",
        "MergeParams",
        arch,
        bf16=dtype == "bf16",
        out_f32=out_f32,
        head_dim_v=head_dim_v,
        wide=wide,
        num_threads=_NUM_THREADS,
        min_ctas_per_sm=1,
        smem_bytes=0,
    )


class MergePlan:
    """One merge on one target. Not shared between threads; compiles nothing before a run."""

    def __init__(self, problem: MergeProblem, target: Target) -> None:
        p = self.problem = problem
        self.target = target
        self.spec = merge_spec(target.arch, p.dtype, p.out_f32, p.head_dim_v, p.wide)
        self.grid = -(-p.num_rows // (_NUM_THREADS // 32))
        self._kernel: kernels.Kernel | None = None  # loaded, maybe compiled, by the first run

    def prepare(self) -> kernels.Kernel:
        """Loads the kernel and makes all that runs share."""
        kernel = kernels.load(self.spec, self.target)
        p = self.problem
        self._block = kernel.layout.block()
        values = {"num_rows": p.num_rows, "seqlen": p.seqlen, "num_heads": p.num_heads}
        for name, axes, strides in (
            ("out", ("batch", "row", "head"), p.out_strides),
            ("part", ("batch", "row", "head"), p.part_strides),
            ("lse", ("batch", "head"), p.lse_strides),
            ("lse_part", ("batch", "head"), p.lse_part_strides),
        ):
            for axis, stride in zip(axes, strides, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        for field, value in values.items():
            self._block.set(field, value)
        slot = self._block.pointer_slot
        self._slots = [slot(n) for n in ("out", "softmax_lse", "part", "lse_part", "rows")]
        self._kernel = kernel
        return kernel

    def run(
        self, out: Tensor, lse: Tensor, part: Tensor, lse_part: Tensor, rows: Tensor | None
    ) -> None:
        """Changes out and lse. Arguments as `MergeProblem.of` had them."""
        if self.problem.num_rows == 0:
            return
        kernel = self._kernel or self.prepare()
        tensors = (out, lse, part, lse_part, rows)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            slot.value = 0 if tensor is None else tensor.data_ptr()
        kernel.launch(self.grid, self._block, tensors)
