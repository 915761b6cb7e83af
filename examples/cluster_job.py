"""Run an extraction on a Ray cluster, from Python.

python cluster_job.py SHARDS RUN [ADDRESS]

ADDRESS is that of a cluster to join (HOST:PORT); without one a cluster is started on this machine. Call it again to
resume. From outside the cluster use `saltern submit` instead.
"""

import os
import sys

import saltern


def main(shards: str, out: str, address: str | None = None, **more: object) -> int:
    """Return the exit code: 0 if every shard is done, 1 otherwise."""
    result = saltern.extract(
        shards,
        out,
        **{
            "model": "efficientnet_lite0",
            "method": "grad-cam",
            "target": "top1",
            "engine": "ray",
            "address": address or os.environ.get("RAY_ADDRESS"),
            "workers": 2,
            "shard_timeout_s": 3600,
            **more,
        },
    )
    print(f"{result.done} of {result.shards} shards done in {result.path}; rows by status: {result.rows}")
    for shard, reason in result.failures.items():
        print(f"{shard}: {reason}", file=sys.stderr)
    return result.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
