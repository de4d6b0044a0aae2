"""What a user of the command line may do wrong that no room below knows about."""

import errno


class JobError(Exception):
    """Base: a command cannot do what was asked. The text says what, where, what was expected and the next step."""


class RecipeError(JobError):
    """A recipe does not say what a recipe must say."""


def user_errors() -> tuple[type[Exception], ...]:
    """Errors of every room whose text is for the user: shown as a message, never as a traceback."""
    from cluster.errors import ClusterError  # imported late: that these are ours is checked first (`packages`)
    from model.errors import ModelError
    from pipeline.errors import PipelineError

    return (PipelineError, ClusterError, ModelError, JobError)


def explained(error: OSError) -> str:
    """What an operating system says of a disk or a path, and what to do about it."""
    full, closed = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
    if error.errno in full:
        advice = " Free some space and run the same command again."
    elif error.errno in closed:
        advice = " Choose another folder, or let this user write there."
    else:
        advice = ""
    return f"{error.filename or 'a file'}: {error.strerror or error}.{advice}"
