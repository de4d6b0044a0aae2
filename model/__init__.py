"""PosMLP-Video in plain torch: presets, LRPE, the gating units, blocks, the network, its weights and objective.

Import from the modules (``from model.posmlp import PosMLPVideo``); importing the package itself loads no torch, so that
recipes can be validated by :mod:`model.presets` alone.
"""
