"""Many processes as one run: ranks and batch arithmetic, Ray tasks, the gang, the DeepSpeed engine, checkpoints, metrics.

Reading order: `options` (what a recipe may say), `topology` and `schedule` (pure arithmetic), `checkpoint` and `metrics`
(what a run leaves on disk), `engine` (one optimizer step), `job`, `worker`, `launch`, `local_gang` and
`ray_gang` (a gang of workers and what happens when one dies).
Nothing here knows videos or models.
"""
