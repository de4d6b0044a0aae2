"""Videos in, batches out: verify and transcode, write shards, index them, order samples, read, decode, augment.

Reading order: `manifest` (what the user has), `media` (one video), `shards` and `index` (what is on disk), `order` and
`keyed` (which sample, which frames, which crop: pure functions of a position), `reader`, `software_decode`, `dali`, and
`loader`, which composes them into batches. Nothing here knows the model, the cluster or the command line.
"""
