"""What the model package raises, so that a caller can tell a wrong model from a wrong run.

    ValueError
    └── ModelError      a tensor, a checkpoint or a use of the model that does not fit; the message names
                        what, got, expected and the next step

A wrong *configuration* raises plain ``ValueError`` from :class:`model.presets.ModelConfig`, because recipe validators
collect exactly that type.
"""


class ModelError(ValueError):
    """A tensor, checkpoint or call that the model cannot serve; the message says what to change."""
