"""What is known of some chips: what a plan needs, and what bounds the time of a step.

The launchers ask the device itself (plan.device_limits). This table stands in for devices that
are not there, so that plans can be made and kernels compiled for them. Needs no triton.

Sources, by the words used beside the figures below:
  guide       CUDA C++ programming guide, table of technical specifications per compute capability
  data sheet  the vendor's data sheet or architecture white paper
  derived     from the data sheet's dense peak rate / (2 x SMs x clock), rounded to a power of two
  assumed     no source at hand; a plausible figure, right to perhaps a third
"""

from typing import NamedTuple

from .plan import Limits


class Chip(NamedTuple):
    """Rates are per streaming multiprocessor (AMD: compute unit) and clock."""

    name: str
    target: str  # what Triton compiles for: sm_<compute capability> or gfx<...>
    sram: int  # bytes of shared memory (AMD: LDS) that one block may use
    sms: int
    clock: float  # GHz
    sram_rate: int  # bytes from or to shared memory
    bf16_rate: int  # multiply-adds of the matrix unit, dense, summed in float32
    tf32_rate: int
    issue_rate: int  # instructions of one warp; AMD: vector instructions of one wave
    l2_trip: int  # clocks from a request to the answer out of L2

    @property
    def matrix_unit(self) -> str:
        nvidia = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(self.target, "mma")
        return nvidia if self.target.startswith("sm_") else "mfma"

    def limits(self) -> Limits:
        """What plan.device_limits would return for this chip."""
        nvidia = self.target.startswith("sm_")
        return Limits(self.name, self.sram, self.sms, nvidia, nvidia, self.matrix_unit)


# Shared memory has 32 banks of 4 bytes on every NVIDIA chip here, and an SM four schedulers that
# issue one instruction a clock each (guide). L2 trips: microbenchmarks of A100, H100 and RTX 4090
# report 200 to 280 clocks (arXiv 2402.13499); the exact figures here are assumed.
_A100 = Chip(
    name="A100",
    target="sm_80",
    sram=163 * 1024,  # guide
    sms=108,  # data sheet
    clock=1.410,  # data sheet: boost
    sram_rate=128,
    bf16_rate=1024,  # derived: 312 TFLOPS
    tf32_rate=512,  # derived: 156 TFLOPS
    issue_rate=4,
    l2_trip=260,
)
_RTX_4090 = Chip(
    name="RTX 4090",
    target="sm_89",
    sram=99 * 1024,  # guide
    sms=128,  # data sheet
    clock=2.520,  # data sheet: boost
    sram_rate=128,
    bf16_rate=256,  # derived: 165 TFLOPS with float32 sums
    tf32_rate=128,  # derived: 83 TFLOPS
    issue_rate=4,
    l2_trip=270,
)
_H100 = Chip(
    name="H100",  # SXM
    target="sm_90",
    sram=227 * 1024,  # guide
    sms=132,  # data sheet
    clock=1.755,  # assumed: between what it holds under load and its boost of 1.98
    sram_rate=128,
    bf16_rate=2048,  # derived: 989 TFLOPS at 1.83 GHz; mma.sync reaches about 60 % of it
    tf32_rate=1024,  # derived: 495 TFLOPS at 1.83 GHz
    issue_rate=4,
    l2_trip=260,
)
_B200 = Chip(
    name="B200",
    target="sm_100",
    sram=227 * 1024,  # guide
    sms=148,  # data sheet
    clock=1.850,  # assumed
    sram_rate=128,
    bf16_rate=4096,  # derived: 2250 TFLOPS at 1.85 GHz
    tf32_rate=2048,  # derived: 1125 TFLOPS at 1.85 GHz
    issue_rate=4,
    l2_trip=300,  # assumed: two dies share one L2
)
_MI300X = Chip(
    name="MI300X",
    target="gfx942",
    sram=64 * 1024,  # data sheet (CDNA 3 white paper)
    sms=304,  # data sheet
    clock=2.100,  # data sheet: peak engine clock
    sram_rate=128,  # data sheet (CDNA 3 white paper): 128 bytes a clock from the LDS
    bf16_rate=1024,  # derived: 1307 TFLOPS
    tf32_rate=512,  # derived: 654 TFLOPS
    issue_rate=1,  # assumed: four SIMDs of 16 lanes, each busy for 4 clocks with a wave of 64
    l2_trip=500,  # assumed: blocks on different dies meet beyond their own L2
)

CHIPS = {chip.target: chip for chip in (_A100, _RTX_4090, _H100, _B200, _MI300X)}
