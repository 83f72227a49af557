"""`python -m tests.servers moto minio …` runs servers until Ctrl-C; `--missing` names those that cannot run."""

import argparse
import signal
import sys
import time

from tests.servers import SERVERS, PostgresServer, S3Server, ServerPool, ServerUnavailable


def describe(server: S3Server | PostgresServer) -> str:
    if isinstance(server, PostgresServer):
        return server.url("postgres")
    return (
        f"endpoint={server.endpoint} region={server.region} access_key={server.access_key}"
        f" secret_key={server.secret_key} ca_file={server.ca_file or '-'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(SERVERS))
    parser.add_argument("--missing", action="store_true", help="start nothing; say what is absent")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.servers if name not in SERVERS]
    if unknown:
        parser.error(f"no server {unknown[0]!r}; there are {', '.join(SERVERS)}")
    if arguments.missing:
        for server in SERVERS.values():
            reason = server.missing()
            if reason is not None:
                print(f"{server.name}: {reason}")
        return 0
    if not arguments.servers:
        parser.error("name the servers to start")

    # So that a plain `kill` cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = ServerPool()
    try:
        for name in arguments.servers:
            begun = time.monotonic()
            pool.start(SERVERS[name].faces[0])
            print(f"{name} started in {time.monotonic() - begun:.1f} s", file=sys.stderr)
        for name in arguments.servers:
            for face in SERVERS[name].faces:
                print(f"{face}: {describe(pool.start(face))}")
        sys.stdout.flush()
        signal.pause()
    except ServerUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
