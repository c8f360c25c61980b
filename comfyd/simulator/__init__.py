"""A ComfyUI that speaks the protocol and runs no models; it serves the demo and the tests."""

from comfyd.simulator.faults import SWITCHES, Faults, HowOften, parse_fault
from comfyd.simulator.server import Simulator

__all__ = ["SWITCHES", "Faults", "HowOften", "Simulator", "parse_fault"]
