"""moto: an S3 server from PyPI that starts in a second; it checks neither signatures nor checksums."""

import sys

from tests.servers.process import ServerRun, free_port, http_answers, wait_until
from tests.servers.s3 import S3Server


def missing() -> str | None:
    return None


def start(run: ServerRun) -> tuple[S3Server, ...]:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    process = run.start("moto", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    wait_until("moto", lambda: http_answers(f"{endpoint}/moto-api/data.json"), process)
    return (
        S3Server(
            name="moto",
            endpoint=endpoint,
            access_key="testing",
            secret_key="testing-secret",
            storage_classes=("STANDARD_IA", "REDUCED_REDUNDANCY"),
            checks_signatures=False,
        ),
    )
