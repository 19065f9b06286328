"""The definition: NumPy float64, slow and plain, what both backends are measured against.

A mixer's module gives `forward`, and `initial_state` and `step` for the recurrent form; a feed-forward's gives `forward`. They
are found by the `module` of their row in smedjan_common.model.mixers. There is no backward pass here: gradients are checked against
directional derivatives (derivative.py) of the loss defined here.
"""
