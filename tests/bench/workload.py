#!/usr/bin/env python3
"""Fixed file-system workloads: one JSON line per workload on stdout.

    workload.py MOUNT_DIR [--only a,b] [--skip a,b] [--peer NAME] [--run N]
                [--remount CMD] [--pids CMD] [--scratch DIR] [--fast]

Pure standard library (Python 3.11).  Names and definitions are STABLE: change
a definition only together with its name, or old numbers stop comparing.

One file of standard library only, long on purpose: it is copied beside any file system
that one wants to compare.

Every workload runs in its own forked child with a hard timeout, works below
MOUNT_DIR/wl and reports {"w": name, "rate": .., "unit": ..} and, where it is
per-op, "p50_us"/"p99_us".  A failure gives {"w": name, "error": ..}.
Each line also carries the cost: "daemon_cpu_s" (user+sys of the pids printed
by --pids, with their descendants), "wl_cpu_s" (the workload itself),
"kernel_cpu_s" (kernel threads), "foreign_cpu_s" (all other processes of the
machine), "steal_s" (time the host took from this VM) and "rss_mib" (peak sum of RSS).
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

MIB = 1 << 20
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
A = None  # parsed arguments
pc = time.perf_counter

# ------------------------------------------------------------------ helpers


def drop_caches():
    """Kernel caches only; a user-space daemon keeps its own."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("3\n")
    except OSError:
        return False
    return True


def remount():
    if not A.remount:
        raise Skip("no --remount command")
    subprocess.run(
        A.remount,
        shell=True,
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    drop_caches()


class Skip(Exception):
    pass


def lat(xs, **more):
    """p50/p99 in microseconds of a list of seconds."""
    if not xs:
        return more
    s = sorted(xs)
    more.update(
        p50_us=round(s[len(s) // 2] * 1e6, 1),
        p99_us=round(s[min(len(s) - 1, int(len(s) * 0.99))] * 1e6, 1),
        n=len(s),
    )
    return more


def res(n, dt, unit, xs=None, **more):
    d = {"rate": round(n / dt, 2) if dt > 0 else None, "unit": unit, "secs": round(dt, 3)}
    d.update(more)
    return lat(xs, **d) if xs is not None else d


def p(*a):
    return os.path.join(A.dir, *a)


_seed = None


def blocks(k=8):
    """k different random MiB, fixed within the process."""
    global _seed
    if _seed is None:
        _seed = [os.urandom(MIB) for _ in range(k)]
    return _seed


def mib_block(i):
    """MiB number i: incompressible, and no two alike (a 16-byte counter hash
    stands at the head of every 4 KiB)."""
    b = bytearray(blocks()[i % 8])
    for o in range(0, MIB, 4096):
        b[o : o + 8] = (i * 256 + o // 4096).to_bytes(8, "little")
    return b


def put(path, data, sync=False):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        os.write(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------- bulk and random

SEQ_MIB = 1024


def seq_write():
    """1 GiB in 1 MiB writes + fsync + close."""
    blocks()
    t = pc()
    fd = os.open(p("seq"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    gen = 0.0
    for i in range(SEQ_MIB):
        g = pc()
        b = mib_block(i)
        gen += pc() - g
        n = os.write(fd, b)
        while n < MIB:
            n += os.write(fd, b[n:])
    tw = pc()
    os.fsync(fd)
    os.close(fd)
    e = pc()
    return res(SEQ_MIB, e - t - gen, "MiB/s", fsync_s=round(e - tw, 3), gen_s=round(gen, 3))


def _seq_read(check=True):
    buf = bytearray(MIB)
    fd = os.open(p("seq"), os.O_RDONLY)
    n = 0
    bad = 0
    t = pc()
    while True:
        k = os.readv(fd, [buf])
        if not k:
            break
        if k == MIB and int.from_bytes(buf[:8], "little") != (n // MIB) * 256:
            bad += 1
        n += k
    os.close(fd)
    e = pc() - t
    r = res(n / MIB, e, "MiB/s")
    if bad or n != SEQ_MIB * MIB:
        r["corrupt"] = [bad, n]
    return r


def seq_read_cold():
    """1 MiB reads after drop_caches (the daemons' own caches stay)."""
    drop_caches()
    return _seq_read()


def seq_read_warm():
    """The same again at once."""
    return _seq_read()


def seq_read_remount():
    """The same after unmount + mount + drop_caches."""
    remount()
    return _seq_read()


def rand_read_4k():
    """5 s of random 4 KiB preads on that file, kernel cache cold at the start."""
    drop_caches()
    rnd = random.Random(1)
    nblk = os.stat(p("seq")).st_size // 4096
    fd = os.open(p("seq"), os.O_RDONLY)
    xs = []
    t0 = pc()
    end = t0 + 5
    while True:
        off = rnd.randrange(nblk) * 4096
        t = pc()
        os.pread(fd, 4096, off)
        e = pc()
        xs.append(e - t)
        if e > end:
            break
    os.close(fd)
    return res(len(xs), e - t0, "IOPS", xs)


def rand_write_4k():
    """5 s of random 4 KiB pwrites on that file, then fsync (inside the span)."""
    rnd = random.Random(2)
    nblk = os.stat(p("seq")).st_size // 4096
    data = [os.urandom(4096) for _ in range(64)]
    fd = os.open(p("seq"), os.O_WRONLY)
    xs = []
    t0 = pc()
    end = t0 + 5
    while True:
        off = rnd.randrange(nblk) * 4096
        t = pc()
        os.pwrite(fd, data[len(xs) & 63], off)
        e = pc()
        xs.append(e - t)
        if e > end:
            break
    os.fsync(fd)
    f = pc()
    os.close(fd)
    return res(len(xs), f - t0, "IOPS", xs, fsync_s=round(f - e, 3))


def fsync_append():
    """5 s of append 4 KiB + fdatasync."""
    data = os.urandom(4096)
    fd = os.open(p("append"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    xs = []
    t0 = pc()
    while True:
        t = pc()
        os.write(fd, data)
        os.fdatasync(fd)
        e = pc()
        xs.append(e - t)
        if e - t0 > 5:
            break
    os.close(fd)
    return res(len(xs), e - t0, "ops/s", xs)


# ------------------------------------------------------------------ small files

NSMALL = 2000
CAP = 20


def _create(d, n, sync, cap=CAP):
    os.makedirs(d, exist_ok=True)
    data = os.urandom(4096)
    xs = []
    t0 = pc()
    for i in range(n):
        t = pc()
        put(f"{d}/f{i:05d}", data, sync)
        e = pc()
        xs.append(e - t)
        if e - t0 > cap:
            break
    return xs, pc() - t0


def small_create():
    """Create + write 4 KiB + close, 2000 files in one directory, 1 process."""
    xs, dt = _create(p("small"), NSMALL, False)
    return res(len(xs), dt, "files/s", xs)


def small_create_4p():
    """The same by 4 processes, 500 files each, in ONE directory."""
    d = p("small4")
    os.makedirs(d)
    rs = []
    t0 = pc()
    for k in range(4):
        r, w = os.pipe()
        pid = os.fork()
        if not pid:
            n = 0
            try:
                data = os.urandom(4096)
                for i in range(NSMALL // 4):
                    put(f"{d}/p{k}f{i:05d}", data)
                    n += 1
                    if pc() - t0 > CAP:
                        break
            finally:
                os.write(w, b"%d" % n)
                os._exit(0)
        os.close(w)
        rs.append((pid, r))
    n = 0
    for pid, r in rs:
        n += int(os.read(r, 20))
        os.waitpid(pid, 0)
    return res(n, pc() - t0, "files/s")


def small_create_fsync():
    """Create + write 4 KiB + fsync + close, 2000 files, 1 process."""
    xs, dt = _create(p("smallf"), NSMALL, True)
    return res(len(xs), dt, "files/s", xs)


def _names():
    n = len(os.listdir(p("small")))
    return [p("small", f"f{i:05d}") for i in range(n)]


def _small_read(names):
    xs = []
    t0 = pc()
    for f in names:
        t = pc()
        fd = os.open(f, os.O_RDONLY)
        k = len(os.read(fd, 65536))
        os.close(fd)
        xs.append(pc() - t)
        assert k == 4096, (f, k)
        if pc() - t0 > CAP:
            break
    return res(len(xs), pc() - t0, "files/s", xs)


def small_read_cold():
    """Open + read + close of each file after drop_caches."""
    names = _names()
    drop_caches()
    return _small_read(names)


def small_read_remount():
    """The same after unmount + mount + drop_caches."""
    names = _names()
    remount()
    return _small_read(names)


def _stat(names):
    xs = []
    t0 = pc()
    for f in names:
        t = pc()
        os.stat(f)
        xs.append(pc() - t)
        if pc() - t0 > CAP:
            break
    return res(len(xs), pc() - t0, "ops/s", xs)


def stat_cold():
    """os.stat of the 2000 files, in name order, after drop_caches."""
    names = _names()
    drop_caches()
    return _stat(names)


def stat_remount():
    """The same after unmount + mount + drop_caches."""
    names = _names()
    remount()
    return _stat(names)


def stat_warm():
    """The same twice; the second pass counts."""
    names = _names()
    _stat(names)
    return _stat(names)


def readdir_1k():
    """os.scandir + entry.stat of a directory of 1000 empty files, cold
    (drop_caches), and again warm ("warm_rate")."""
    d = p("dir1k")
    os.makedirs(d)
    for i in range(1000):
        os.close(os.open(f"{d}/entry{i:05d}", os.O_CREAT | os.O_WRONLY, 0o644))

    def scan():
        t = pc()
        n = 0
        with os.scandir(d) as it:
            for e in it:
                e.stat(follow_symlinks=False)
                n += 1
        return n, pc() - t

    drop_caches()
    n, dt = scan()
    m, wt = scan()
    return res(n, dt, "entries/s", warm_rate=round(m / wt, 1))


def rename():
    """Rename each of the 2000 files inside its directory."""
    names = _names()
    xs = []
    t0 = pc()
    for f in names:
        t = pc()
        os.rename(f, f + ".r")
        xs.append(pc() - t)
        if pc() - t0 > CAP:
            break
    return res(len(xs), pc() - t0, "ops/s", xs)


def unlink():
    """Unlink them."""
    names = [e.path for e in os.scandir(p("small"))]
    names.sort()
    xs = []
    t0 = pc()
    for f in names:
        t = pc()
        os.unlink(f)
        xs.append(pc() - t)
        if pc() - t0 > CAP:
            break
    return res(len(xs), pc() - t0, "ops/s", xs)


def mdtest():
    """Tree of depth 3, fan-out 4 (84 dirs), 10 empty files in each: rates of
    mkdir, create, stat, remove and rmdir; "rate" is all ops over all time."""
    root = p("mdtest")
    os.mkdir(root)
    dirs, level = [], [root]
    for _ in range(3):
        level = [f"{d}/d{i}" for d in level for i in range(4)]
        dirs += level
    files = [f"{d}/f{i}" for d in dirs for i in range(10)]
    out, ops, tt = {}, 0, 0.0

    def phase(name, fn, items):
        nonlocal ops, tt
        t = pc()
        for x in items:
            fn(x)
        dt = pc() - t
        out[name] = round(len(items) / dt, 1)
        ops += len(items)
        tt += dt

    phase("mkdir", os.mkdir, dirs)
    phase(
        "create", lambda f: os.close(os.open(f, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)), files
    )
    drop_caches()
    phase("stat", os.stat, files)
    phase("remove", os.unlink, files)
    phase("rmdir", os.rmdir, dirs[::-1])
    return res(ops, tt, "ops/s", phases=out)


# ------------------------------------------------------------------ real programs


def run(cmd, **kw):
    t = pc()
    r = subprocess.run(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **kw)
    dt = pc() - t
    if r.returncode:
        raise RuntimeError(f"{cmd[:3]}: rc {r.returncode}: {r.stderr[-200:]!r}")
    return dt


def git():
    """git init; write 2000 text files (40 dirs, 0.2-4 KiB); add; commit;
    status after drop_caches; clone (local, default options).  "rate" is the
    sum of add + commit + status + clone in seconds (lower is better)."""
    repo = p("repo")
    env = dict(
        os.environ,
        GIT_CONFIG_NOSYSTEM="1",
        HOME=A.scratch,
        GIT_AUTHOR_NAME="a",
        GIT_AUTHOR_EMAIL="a@example.org",
        GIT_COMMITTER_NAME="a",
        GIT_COMMITTER_EMAIL="a@example.org",
        GIT_CONFIG_COUNT="2",
        GIT_CONFIG_KEY_0="gc.auto",
        GIT_CONFIG_VALUE_0="0",
        GIT_CONFIG_KEY_1="safe.directory",
        GIT_CONFIG_VALUE_1="*",
    )
    o = {}
    o["init"] = run(["git", "init", "-q", repo], env=env)
    rnd = random.Random(3)
    t = pc()
    for i in range(2000):
        d = f"{repo}/m{i % 40:02d}"
        if i < 40:
            os.mkdir(d)
        txt = "".join(
            "line %d %x\n" % (j, rnd.getrandbits(64)) for j in range(rnd.randrange(8, 150))
        )
        put(f"{d}/s{i:04d}.txt", txt.encode())
    o["write"] = pc() - t
    g = ["git", "-C", repo]
    o["add"] = run(g + ["add", "-A"], env=env, timeout=90)
    o["commit"] = run(g + ["commit", "-q", "-m", "x"], env=env, timeout=90)
    drop_caches()
    o["status"] = run(g + ["status", "--porcelain"], env=env, timeout=90)
    o["clone"] = run(["git", "clone", "-q", repo, p("clone")], env=env, timeout=90)
    tot = o["add"] + o["commit"] + o["status"] + o["clone"]
    n = sum(len(f) for d, s, f in os.walk(p("clone")) if ".git" not in d)
    r = {"rate": round(tot, 2), "unit": "s", "phases": {k: round(v, 2) for k, v in o.items()}}
    if n != 2000:
        r["corrupt"] = n
    return r


def _tar():
    """3000 files, 60 dirs, 0.5-16 KiB, the same bytes at every run."""
    path = os.path.join(A.scratch, "wl-3000.tar")
    if not os.path.exists(path):
        rnd = random.Random(4)
        with tarfile.open(path + ".t", "w") as tf:
            import io

            for i in range(3000):
                b = rnd.randbytes(rnd.choice([512, 1024, 2048, 4096, 8192, 16384]))
                ti = tarfile.TarInfo(f"src/d{i % 60:02d}/f{i:04d}")
                ti.size, ti.mode, ti.mtime = len(b), 0o644, 1700000000
                tf.addfile(ti, io.BytesIO(b))
        os.rename(path + ".t", path)
    return path


def untar():
    """tar -xf of that archive."""
    a = _tar()
    os.mkdir(p("tree"))
    dt = run(["tar", "-xf", a, "-C", p("tree")], timeout=110)
    return res(3000, dt, "files/s")


def cp_r():
    """cp -r of the extracted tree, kernel cache cold at the start."""
    drop_caches()
    dt = run(["cp", "-r", p("tree"), p("tree2")], timeout=110)
    n = sum(len(f) for _, _, f in os.walk(p("tree2")))
    r = res(3000, dt, "files/s")
    if n != 3000:
        r["corrupt"] = n
    return r


def rm_rf():
    """rm -rf of the copy."""
    dt = run(["rm", "-rf", p("tree2")], timeout=110)
    return res(3000, dt, "files/s")


def _sqlite(mode):
    path = p(f"db-{mode}.sqlite")
    c = sqlite3.connect(path, isolation_level=None, timeout=5)
    got = c.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
    c.execute("PRAGMA synchronous=FULL")
    c.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)")
    xs = []
    v = "x" * 100
    t0 = pc()
    for i in range(2000):
        t = pc()
        c.execute("INSERT INTO t(v) VALUES(?)", (v,))
        e = pc()
        xs.append(e - t)
        if e - t0 > CAP / 2:
            break
    dt = pc() - t0
    n = c.execute("SELECT count(*) FROM t").fetchone()[0]
    c.close()
    r = res(len(xs), dt, "tx/s", xs)
    if got.upper() != mode:
        r["journal_mode"] = got
    if n != len(xs):
        r["corrupt"] = n
    return r


def sqlite_delete():
    """Up to 2000 single-row INSERT transactions (cap 10 s), journal_mode=DELETE,
    synchronous=FULL."""
    return _sqlite("DELETE")


def sqlite_wal():
    """The same, journal_mode=WAL."""
    return _sqlite("WAL")


def pgbench():
    """PostgreSQL 15, default settings, data directory on the mount: scale 10,
    pgbench -c 4 -j 2 -T 20 (TPC-B-like): tps.  Needs root and user postgres."""
    b = os.environ.get("PG_BIN", "/usr/lib/postgresql/15/bin")
    d = p("pg")
    os.mkdir(d)
    shutil.chown(d, "postgres", "postgres")
    sock = tempfile.mkdtemp(prefix="pgs")
    shutil.chown(sock, "postgres", "postgres")
    as_pg = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    init = run(as_pg + [f"{b}/initdb", "-D", d + "/data", "-A", "trust"], timeout=170, cwd="/")
    srv = subprocess.Popen(
        as_pg + [f"{b}/postgres", "-D", d + "/data", "-k", sock, "-c", "listen_addresses="],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        c = ["-h", sock, "-U", "postgres"]
        for _ in range(60):
            if subprocess.run([f"{b}/pg_isready", *c], stdout=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.5)
        load = run([f"{b}/pgbench", *c, "-i", "-q", "-s", "10", "postgres"], timeout=170)
        o = subprocess.run(
            [f"{b}/pgbench", *c, "-c", "4", "-j", "2", "-T", "20", "postgres"],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        get = lambda k: float(o.split(k)[1].split()[0])
        return {
            "rate": round(get("tps = "), 1),
            "unit": "tps",
            "latency_avg_ms": get("latency average = "),
            "initdb_s": round(init, 2),
            "load_s": round(load, 2),
        }
    finally:
        srv.send_signal(signal.SIGINT)
        try:
            srv.wait(30)
        except subprocess.TimeoutExpired:
            srv.kill()
        shutil.rmtree(sock, ignore_errors=True)


ORDER = [
    seq_write,
    seq_read_cold,
    seq_read_warm,
    seq_read_remount,
    rand_read_4k,
    rand_write_4k,
    fsync_append,
    small_create,
    small_create_4p,
    small_create_fsync,
    small_read_cold,
    small_read_remount,
    stat_cold,
    stat_remount,
    stat_warm,
    readdir_1k,
    rename,
    unlink,
    mdtest,
    git,
    untar,
    cp_r,
    rm_rf,
    sqlite_delete,
    sqlite_wal,
    pgbench,
]
LIMIT = {"seq_write": 150, "git": 240, "pgbench": 420}  # others: 120 s

# --------------------------------------------------------------------------- cost


class Cost:
    """CPU seconds and RSS of the pids that --pids prints, and descendants."""

    def __init__(self):
        self.cpu = {}  # (pid, start time) -> ticks, kept after its death
        self.kcpu = {}  # kernel threads
        self.peak = 0
        self.stop = threading.Event()
        self.lock = threading.Lock()
        if A.pids:
            threading.Thread(target=self.loop, daemon=True).start()

    def roots(self):
        if not A.pids:
            return set()
        try:
            o = subprocess.run(
                A.pids, shell=True, capture_output=True, text=True, timeout=20
            ).stdout
            return {int(x) for x in o.split()}
        except Exception:
            return set()

    def sample(self):
        with self.lock:
            st = {}
            for e in os.listdir("/proc"):
                if e.isdigit():
                    try:
                        s = open(f"/proc/{e}/stat").read()
                    except OSError:
                        continue
                    f = s[s.rindex(")") + 2 :].split()
                    st[int(e)] = f
            kids = {}
            for k, f in st.items():
                kids.setdefault(int(f[1]), []).append(k)
            todo, seen = [r for r in self.roots() if r in st], set()
            while todo:
                k = todo.pop()
                if k in seen:
                    continue
                seen.add(k)
                todo += kids.get(k, [])
            for k, f in st.items():
                if f[1] == "2":
                    self.kcpu[k] = int(f[11]) + int(f[12])
            rss = 0
            for k in seen:
                f = st[k]
                self.cpu[(k, f[19])] = int(f[11]) + int(f[12])
                rss += int(f[21]) * PAGE
            self.peak = max(self.peak, rss)

    def loop(self):
        while not self.stop.wait(1):
            self.sample()

    def total(self):
        self.sample()
        return sum(self.cpu.values()) / TICK

    def kernel(self):
        return sum(self.kcpu.values()) / TICK


def busy():
    f = open("/proc/stat").readline().split()
    v = [int(x) for x in f[1:9]]
    return (v[0] + v[1] + v[2]) / TICK, v[7] / TICK


def one(fn, cost):
    name = fn.__name__
    r, w = os.pipe()
    own0 = os.times()
    (b0, s0), c0, k0, t0 = busy(), cost.total(), cost.kernel(), pc()
    cost.peak = 0
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.close(r)
        os.setpgid(0, 0)
        try:
            d = fn()
        except Skip as e:
            d = {"skip": str(e)}
        except BaseException as e:
            d = {"error": f"{type(e).__name__}: {e}"[:400]}
        os.write(w, json.dumps(d).encode())
        os._exit(0)
    os.close(w)
    limit = LIMIT.get(name, 120)
    d = None
    killer = threading.Timer(limit, lambda: os.killpg(pid, signal.SIGKILL))
    killer.start()
    buf = b""
    while True:
        k = os.read(r, 65536)
        if not k:
            break
        buf += k
    os.close(r)
    os.waitpid(pid, 0)
    killer.cancel()
    d = json.loads(buf) if buf else {"error": f"killed after {limit} s"}
    own1 = os.times()
    wl = (own1.children_user + own1.children_system) - (own0.children_user + own0.children_system)
    me = (own1.user + own1.system) - (own0.user + own0.system)
    dc = cost.total() - c0
    kc = cost.kernel() - k0
    b1, s1 = busy()
    d = {
        "w": name,
        **d,
        "wall_s": round(pc() - t0, 2),
        "daemon_cpu_s": round(dc, 2),
        "wl_cpu_s": round(wl, 2),
        "kernel_cpu_s": round(kc, 2),
        "foreign_cpu_s": round(max(0, b1 - b0 - dc - wl - me - kc), 2),
        "steal_s": round(s1 - s0, 2),
        "rss_mib": round(cost.peak / MIB),
    }
    d.update(peer=A.peer, run=A.run, prio=bool(os.environ.get("BENCH_NICE")))
    return d


def main():
    global A
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("mount", nargs="?")
    ap.add_argument("--only", default="")
    ap.add_argument("--skip", default="")
    ap.add_argument("--peer", default="")
    ap.add_argument("--run", type=int, default=1)
    ap.add_argument("--remount", default="", help="shell command that unmounts and mounts again")
    ap.add_argument(
        "--pids", default="", help="shell command that prints the pids of daemons and client"
    )
    ap.add_argument(
        "--scratch", default="/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    )
    ap.add_argument("--keep", action="store_true", help="leave the files there at the end")
    ap.add_argument("--list", action="store_true")
    A = ap.parse_args()
    if A.list:
        for f in ORDER:
            print(f"{f.__name__:20s} {' '.join(f.__doc__.split())}")
        return
    if not A.mount:
        ap.error("MOUNT_DIR is missing")
    only = set(filter(None, A.only.split(",")))
    skip = set(filter(None, A.skip.split(",")))
    A.dir = os.path.join(os.path.abspath(A.mount), "wl")
    shutil.rmtree(A.dir, ignore_errors=True)
    os.makedirs(A.dir)
    _tar()
    drop_caches()
    cost = Cost()
    t, c = pc(), cost.total()
    peak = 0
    print(
        json.dumps(
            {
                "w": "_start",
                "peer": A.peer,
                "run": A.run,
                "time": time.strftime("%FT%TZ", time.gmtime()),
                "load": os.getloadavg(),
                "cpus": os.cpu_count(),
                "kernel": os.uname().release,
            }
        ),
        flush=True,
    )
    for f in ORDER:
        if (only and f.__name__ not in only) or f.__name__ in skip:
            continue
        d = one(f, cost)
        peak = max(peak, d["rss_mib"])
        print(json.dumps(d), flush=True)
    print(
        json.dumps(
            {
                "w": "_total",
                "peer": A.peer,
                "run": A.run,
                "secs": round(pc() - t, 1),
                "daemon_cpu_s": round(cost.total() - c, 1),
                "peak_rss_mib": peak,
                "load": os.getloadavg(),
            }
        ),
        flush=True,
    )
    cost.stop.set()
    if not A.keep:
        shutil.rmtree(A.dir, ignore_errors=True)


if __name__ == "__main__":
    main()
