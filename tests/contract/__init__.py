"""Tests that hold the simulator and a real ComfyUI to the same protocol."""
