"""What a served model computes with, told without a line of the product: an oracle for updates.

Scripts that run in an engine's environment import it as well; it needs torch and nothing else.
"""
