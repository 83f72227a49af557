"""OpenStack Swift with the s3api middleware: no SSE-C, no storage classes, wants Content-MD5; the odd one out.

One node and one replica, in a directory; the file system has to have user extended attributes.
"""

import os
from pathlib import Path

from tests.servers.process import (
    ServerFailed,
    ServerProcess,
    ServerRun,
    free_port,
    give_to,
    http_answers,
    own_user,
    port_answers,
    programs_missing,
    user_exists,
    wait_until,
    which,
)
from tests.servers.s3 import S3Server
from tests.servers.tls import VIRTUAL_HOST_DOMAIN

REMEDY = "apt-get install swift-proxy swift-account swift-container swift-object memcached"
KINDS = ("account", "container", "object")

STORAGE_CONFIGURATION = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 1
user = {user}
swift_dir = {home}/etc
devices = {home}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = ERROR
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
replication_server = false
container_update_timeout = 5
"""

PROXY_CONFIGURATION = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 2
user = {user}
swift_dir = {home}/etc
log_level = ERROR
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
storage_domain = {domain}
max_multi_delete_objects = 1000
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache_port}
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:slo]
use = egg:swift#slo
rate_limit_segments_per_sec = 0
"""

PLAIN_FILTERS = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "copy",
    "dlo",
    "symlink",
)
PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo"
    " versioned_writes symlink proxy-server"
)


RINGS = """\
import sys
from swift.common.ring import RingBuilder
for argument in sys.argv[1:]:
    kind, port = argument.split(":")
    builder = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
    device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "one", "weight": 1}
    builder.add_dev({**device, "replication_ip": "127.0.0.1", "replication_port": int(port)})
    builder.rebalance()
    builder.get_ring().save(kind + ".ring.gz")
"""


def missing() -> str | None:
    absent = programs_missing(
        *("swift-proxy-server", "swift-ring-builder", "memcached"),
        *(f"swift-{kind}-server" for kind in KINDS),
        remedy=REMEDY,
    )
    if absent is None and os.geteuid() == 0 and not user_exists("swift"):
        return f"no user swift; {REMEDY}"
    return absent


def start(run: ServerRun) -> tuple[S3Server, ...]:
    user = "swift" if os.geteuid() == 0 else own_user()
    home = run.directory / "swift"
    for directory in (home, home / "etc", home / "devices", home / "devices" / "one"):
        directory.mkdir()
    _require_attributes(home)

    cache_port = free_port()
    cache = run.start(
        "swift-memcached",
        *("memcached", "-u", user, "-l", "127.0.0.1", "-p", str(cache_port), "-m", "64"),
    )
    ports = {kind: free_port() for kind in ("proxy", *KINDS)}
    for kind in KINDS:
        _configure(home, kind, STORAGE_CONFIGURATION.format(home=home, kind=kind, port=ports[kind], user=user))
    proxy_configuration = PROXY_CONFIGURATION.format(
        home=home,
        port=ports["proxy"],
        cache_port=cache_port,
        user=user,
        pipeline=PIPELINE,
        domain=VIRTUAL_HOST_DOMAIN,
    ) + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in PLAIN_FILTERS)
    _configure(home, "proxy", proxy_configuration)
    (home / "etc" / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    _make_rings(run, home / "etc", ports)
    if os.geteuid() == 0:
        give_to(user, home)

    processes: list[ServerProcess] = [cache]
    for kind in ("proxy", *KINDS):
        configuration = home / "etc" / f"{kind}-server.conf"
        processes.append(run.start(f"swift-{kind}", f"swift-{kind}-server", configuration, "-v"))
    every_port = (cache_port, *ports.values())
    wait_until("swift", lambda: all(map(port_answers, every_port)), *processes)
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    wait_until("swift-proxy", lambda: http_answers(f"{endpoint}/healthcheck"), *processes)
    return (
        S3Server(
            name="swift",
            endpoint=endpoint,
            access_key="test:tester",
            secret_key="testing",
            domain=VIRTUAL_HOST_DOMAIN,
        ),
    )


def _configure(home: Path, kind: str, text: str) -> None:
    (home / "etc" / f"{kind}-server.conf").write_text(text)


def _make_rings(run: ServerRun, folder: Path, ports: dict[str, int]) -> None:
    """Writes all rings in one process: `swift-ring-builder` takes a second for each of its nine steps."""
    program = which("swift-ring-builder")
    if program is None:
        raise ServerFailed("swift-ring-builder not found")
    # Swift is installed for the interpreter of its own scripts, which is not ours.
    interpreter = Path(program).read_text().splitlines()[0].removeprefix("#!").split()
    run.call(*interpreter, "-c", RINGS, *(f"{kind}:{ports[kind]}" for kind in KINDS), cwd=folder)


def _require_attributes(directory: Path) -> None:
    try:
        os.setxattr(directory, "user.test", b"1")
    except OSError as error:
        raise ServerFailed(
            f"{directory} has no user extended attributes, where Swift keeps an object's metadata"
            f" ({error.strerror}); set TMPDIR to a directory on ext4, xfs or btrfs"
        ) from error
