"""The operations in which an off-policy trainer spends what an ordinary trainer does not.

`reference.py` is the definition of each, in plain torch.
"""
