"""What makes a compressed network run faster."""

from slimnets.acceleration.convert import accelerate as accelerate
from slimnets.acceleration.export import export as export
from slimnets.acceleration.module import Accelerated as Accelerated
from slimnets.acceleration.report import Report as Report

__all__ = ["Accelerated", "Report", "accelerate", "export"]
