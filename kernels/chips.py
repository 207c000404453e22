"""What a plan needs to know of some chips.

The launchers ask the device itself (limits.device_limits). This table stands in for devices that
are not there, so that plans can be made and kernels compiled for them. Needs no triton.

Sources, by the words used beside the figures below:
  guide       CUDA C++ programming guide, table of technical specifications per compute capability
  data sheet  the vendor's data sheet or architecture white paper
"""

from typing import NamedTuple

from .plan import Limits


class Chip(NamedTuple):
    name: str
    target: str  # what Triton compiles for: sm_<compute capability> or gfx<...>
    sram: int  # bytes of shared memory (AMD: LDS) that one block may use
    sms: int  # streaming multiprocessors (AMD: compute units)

    @property
    def matrix_unit(self) -> str:
        nvidia = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(self.target, "mma")
        return nvidia if self.target.startswith("sm_") else "mfma"

    def limits(self) -> Limits:
        """What limits.device_limits would return for this chip."""
        nvidia = self.target.startswith("sm_")
        return Limits(self.name, self.sram, self.sms, nvidia, nvidia, self.matrix_unit)


_A100 = Chip(
    name="A100",
    target="sm_80",
    sram=163 * 1024,  # guide
    sms=108,  # data sheet
)
_RTX_4090 = Chip(
    name="RTX 4090",
    target="sm_89",
    sram=99 * 1024,  # guide
    sms=128,  # data sheet
)
_H100 = Chip(
    name="H100",  # SXM
    target="sm_90",
    sram=227 * 1024,  # guide
    sms=132,  # data sheet
)
_B200 = Chip(
    name="B200",
    target="sm_100",
    sram=227 * 1024,  # guide
    sms=148,  # data sheet
)
_MI300X = Chip(
    name="MI300X",
    target="gfx942",
    sram=64 * 1024,  # data sheet (CDNA 3 white paper)
    sms=304,  # data sheet
)

CHIPS = {chip.target: chip for chip in (_A100, _RTX_4090, _H100, _B200, _MI300X)}
