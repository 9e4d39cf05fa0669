"""Devices: process start-up, the mesh, and which array lies where."""
