"""What python-zeroconf makes of a service type: a judge that shares no code with us.

observe.py TYPE [ADDRESS…]   prints "ready", then a line for each change:
    MILLISECONDS + NAME
    MILLISECONDS - NAME
    MILLISECONDS ~ NAME PORT ADDRESSES TXT     (something new about it)
A line of stdin asks: "NAME" is answered by "= NAME PORT ADDRESSES TXT" or "= NAME none" from what it knows or finds out.
Run inside a network namespace only.
"""

import sys
import threading
import time

from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf


def said(info):
    txt = ",".join(
        f"{key.decode()}={(value or b'').decode()}" for key, value in info.properties.items()
    )
    return f"{info.port} {','.join(sorted(info.parsed_addresses()))} {txt}"


def write(line):
    # In one piece: two threads write.
    with lock:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def tell(sign, name, rest=""):
    write(f"{time.time() * 1000:.3f} {sign} {name} {rest}".rstrip())


class Listener(ServiceListener):
    def add_service(self, zc, kind, name):
        tell("+", name)

    def remove_service(self, zc, kind, name):
        tell("-", name)

    def update_service(self, zc, kind, name):
        info = ServiceInfo(kind, name)
        if info.load_from_cache(zc):
            tell("~", name, said(info))


lock = threading.Lock()
kind = sys.argv[1]
zeroconf = Zeroconf(interfaces=sys.argv[2:], ip_version=IPVersion.All)
browser = ServiceBrowser(zeroconf, kind, Listener())
write("ready")
for line in sys.stdin:
    name = line.strip()
    info = ServiceInfo(kind, name)
    # From its cache, or by asking for three seconds at most.
    known = info.request(zeroconf, 3000)
    write(f"= {name} {said(info) if known else 'none'}")
