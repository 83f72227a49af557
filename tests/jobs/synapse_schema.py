"""Makes Synapse's schema in an empty database, by Synapse's own migrations: `python -m tests.jobs.synapse_schema …`.

A process of its own, because Synapse changes psycopg2 for the whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def make_schema(engine: str, arguments: Mapping[str, Any]) -> None:
    """Make the schema, in another process."""
    command = [sys.executable, "-m", "tests.jobs.synapse_schema", engine, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Synapse did not make its schema:\n{done.stderr}")


def main(engine_name: str, arguments: Mapping[str, Any]) -> None:
    from synapse.logging.context import LoggingContext  # type: ignore[attr-defined]
    from synapse.storage.database import LoggingDatabaseConnection
    from synapse.storage.engines import create_engine
    from synapse.storage.prepare_database import prepare_database

    engine = create_engine({"name": engine_name, "args": dict(arguments)})
    connection = engine.module.connect(**arguments)
    with LoggingContext(name="schema", server_name="test"):
        logged = LoggingDatabaseConnection(
            conn=connection, engine=engine, default_txn_name="schema", server_name="test"
        )
        engine.on_new_connection(logged)
        prepare_database(logged, engine, config=None)
    connection.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
