"""posmlp data view: a dataset in the browser, served on this machine alone.

The pages hold no script and load nothing but from this server; Ctrl-C ends it.
"""

from pathlib import Path

import click

from jobs.errors import JobError
from jobs.recipe import Recipe
from jobs.view_http import Server
from jobs.view_items import Items
from jobs.view_pages import DatasetPages
from jobs.view_tensor import Training
from pipeline.location import Location


def run(root: Location, *, port: int, recipe: Recipe | None) -> None:
    """Serves until Ctrl-C. port: 0 takes a free one. recipe: of the training whose order and tensors are shown.

    Raises DatasetError when there is no dataset or it does not have the recipe's split, JobError when the port is taken.
    """
    items = Items(root)
    try:
        pages = DatasetPages(items, None if recipe is None else Training(recipe, items.dataset), Path(root).resolve().name)
        with _listen(port, pages) as server:
            try:
                click.echo(f"{root}: {len(items)} items. Open this address; Ctrl-C ends it.\n{server.url}")
                server.serve_forever(poll_interval=0.1)
            except KeyboardInterrupt:
                click.echo("ended", err=True)
    finally:
        items.close()


def _listen(port: int, pages: DatasetPages) -> Server:
    try:
        return Server(port, pages)
    except OSError as error:
        raise JobError(f"Port {port} of 127.0.0.1 cannot be used ({error.strerror}). Choose another, or leave --port out.") from None
