#!/usr/bin/env python3
"""Holds listening sockets and starts a program with them, as systemd does: activate.py NAMES PROGRAM ARGUMENTS…

NAMES are separated by commas, each a socket on a free port, of loopback or of NAME@HOST. It prints "sockets ADDR…".
Each line of stdin is an order: "start" prints "started PID"; "wait" waits for its end and prints "ended CODE". The
program ends with this one at the latest.
"""
import fcntl, os, socket, sys

specs = [name.partition("@") for name in sys.argv[1].split(",")]
sockets = [socket.create_server((host or "127.0.0.1", 0), backlog=128) for _, _, host in specs]
print("sockets", *("%s:%d" % held.getsockname() for held in sockets), flush=True)

pid = None
for order in sys.stdin:
    if order.strip() == "start":
        pid = os.fork()
        if pid == 0:
            # Out of the way of the numbers that they are to have.
            high = [fcntl.fcntl(held, fcntl.F_DUPFD_CLOEXEC, 100) for held in sockets]
            for number, held in enumerate(high, start=3):
                os.dup2(held, number, inheritable=True)
            os.environ["LISTEN_PID"] = str(os.getpid())
            os.environ["LISTEN_FDS"] = str(len(high))
            os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _, _ in specs)
            os.execvp("setpriv", ["setpriv", "--pdeathsig", "KILL", *sys.argv[2:]])
        print("started", pid, flush=True)
    elif order.strip() == "wait":
        _, status = os.waitpid(pid, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)
