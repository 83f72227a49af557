"""Ceph RGW: real signatures, SSE-C, a second storage class, http and https; one monitor, one OSD, no manager.

Everything is a plain process on loopback. The monitor's and the gateway's ports are asked of the kernel; the
OSD finds ports of its own.
"""

import signal
import uuid
from pathlib import Path

from tests.servers.process import (
    ServerRun,
    free_port,
    http_answers,
    port_answers,
    programs_missing,
    wait_until,
)
from tests.servers.s3 import S3Server
from tests.servers.tls import VIRTUAL_HOST_DOMAIN

REMEDY = "apt-get install ceph-mon ceph-osd radosgw ceph-common"
ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY", "testsecretkey1234"

CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}/0
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_allow_insecure_global_id_reclaim = false
keyring = {home}/keyring
run_dir = {home}
log_file = {home}/$name.log
admin_socket = {home}/$name.$pid.asok
pid_file =
crash_dir = {home}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
# A new pool becomes usable at the next proposal of the monitor; by default that takes a second, for each pool.
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_warn_on_pool_no_redundancy = false
# A developer's disk may be nearly full; the defaults would stop all writing at 95 %.
mon_data_avail_crit = 1
mon_data_avail_warn = 1
[mon]
mon_data = {home}/mon
[osd]
osd_data = {home}/osd
osd_objectstore = bluestore
# A sparse file. What is deleted stays for hours, and the benchmarks write some 13 GiB.
bluestore_block_size = 34359738368
bluestore_block_create = true
osd_memory_target = 1073741824
osd_op_num_shards = 2
osd_class_update_on_start = false
[client]
rgw_dns_name = {domain}
# SSE-C over http as well, for tests.
rgw_crypt_require_ssl = false
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_data = {home}/rgw
"""

KEYS = {
    "mon.": ("mon=allow *",),
    "client.admin": ("mon=allow *", "osd=allow *", "mds=allow *", "mgr=allow *"),
    "osd.0": ("mon=allow profile osd", "osd=allow *", "mgr=allow profile osd"),
    "client.rgw.a": ("mon=allow rw", "osd=allow rwx", "mgr=allow rw"),
}


def missing() -> str | None:
    return programs_missing(
        *("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin"),
        *("ceph", "ceph-authtool", "monmaptool"),
        remedy=REMEDY,
    )


def start(run: ServerRun) -> tuple[S3Server, ...]:
    home = run.directory / "ceph"
    for directory in (home, home / "mon", home / "osd", home / "rgw"):
        directory.mkdir()
    environment = {"CEPH_CONF": str(home / "ceph.conf")}
    mon_port, http_port, https_port = free_port(), free_port(), free_port()
    _make_cluster(run, home, environment, mon_port)

    # SIGKILL ends these at once; what they would save on the way out is thrown away with the run.
    mon = run.start("ceph-mon", "ceph-mon", "-i", "a", "-f", env=environment, stop_signal=signal.SIGKILL)
    wait_until("ceph-mon", lambda: port_answers(mon_port), mon)
    osd_uuid = str(uuid.uuid4())
    run.call("ceph", "--connect-timeout", "60", "osd", "new", osd_uuid, env=environment)
    run.call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid, env=environment)
    osd = run.start("ceph-osd", "ceph-osd", "-i", "0", "-f", env=environment, stop_signal=signal.SIGKILL)

    # These wait for the OSD by themselves: the first one makes pools and writes to them. It also makes the zone
    # that the other two add a storage class to; a gateway that runs already would not see the class.
    run.call(
        *("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test"),
        *("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY),
        env=environment,
    )
    storage_class = ("--placement-id", "default-placement", "--storage-class", "STANDARD_IA")
    run.call(
        *("radosgw-admin", "zonegroup", "placement", "add", "--rgw-zonegroup", "default"),
        *storage_class,
        env=environment,
    )
    run.call(
        *("radosgw-admin", "zone", "placement", "add", "--rgw-zone", "default"),
        *(*storage_class, "--data-pool", "default.rgw.buckets.ia"),
        env=environment,
    )
    tls = run.certificates
    # Without tcp_nodelay every GET takes 40 ms.
    frontend = (
        f"beast endpoint=127.0.0.1:{http_port} ssl_endpoint=127.0.0.1:{https_port}"
        f" ssl_certificate={tls.certificate_file} ssl_private_key={tls.key_file} tcp_nodelay=1"
    )
    gateway = run.start(
        "radosgw",
        *("radosgw", "-n", "client.rgw.a", "-f", f"--rgw-frontends={frontend}"),
        env=environment,
        stop_signal=signal.SIGKILL,
    )
    faces = tuple(
        S3Server(
            name=name,
            endpoint=endpoint,
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            ca_file=ca_file,
            sse_c=True,
            storage_classes=("STANDARD_IA",),
            domain=VIRTUAL_HOST_DOMAIN,
        )
        for name, endpoint, ca_file in (
            ("ceph", f"http://127.0.0.1:{http_port}", None),
            ("ceph-https", f"https://127.0.0.1:{https_port}", tls.ca_file),
        )
    )
    wait_until("radosgw", lambda: http_answers(faces[0].endpoint), gateway, osd, mon)
    return faces


def _make_cluster(run: ServerRun, home: Path, environment: dict[str, str], mon_port: int) -> None:
    fsid = str(uuid.uuid4())
    (home / "ceph.conf").write_text(
        CONFIGURATION.format(home=home, fsid=fsid, mon_port=mon_port, domain=VIRTUAL_HOST_DOMAIN)
    )
    keyring = home / "keyring"
    for entity, capabilities in KEYS.items():
        words = [word for text in capabilities for word in ("--cap", *text.split("=", 1))]
        create = () if keyring.exists() else ("--create-keyring",)
        run.call("ceph-authtool", keyring, *create, "--gen-key", "-n", entity, *words, env=environment)
    address = f"[v2:127.0.0.1:{mon_port}]"
    monmap = home / "monmap"
    run.call("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap, env=environment)
    run.call(
        *("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring),
        env=environment,
    )
