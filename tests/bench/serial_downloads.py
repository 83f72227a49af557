"""Fetches objects with boto3's `download_file`, one after another, as users of their software do; prints the seconds.

Runs as a script in their environment, with the order as JSON on its standard input.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import boto3


def main() -> None:
    order = json.load(sys.stdin)
    client = boto3.client("s3", **order["client"])
    store = Path(order["store"])
    begun = time.monotonic()
    for key in order["keys"]:
        target = store / key
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(order["bucket"], key, str(target))
    print(time.monotonic() - begun)


if __name__ == "__main__":
    main()
