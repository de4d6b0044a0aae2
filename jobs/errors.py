"""What a user of the command line may do wrong that no room below knows about."""


class JobError(Exception):
    """Base: a command cannot do what was asked. The text says what, where, what was expected and the next step."""


class RecipeError(JobError):
    """A recipe does not say what a recipe must say."""
