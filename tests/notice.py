#!/usr/bin/env python3
"""Writes and reads peer notices, from docs/formats.md alone.

    notice.py encode KEY_ID:HEX < fields.json     prints the datagram in hexadecimal
    notice.py decode KEY_ID:HEX < hexadecimal     prints the fields, or `refused: CAUSE`

Fields are those of the table in docs/formats.md; `node`, `cluster` and `by` are names of at most 16 bytes, or 32
hexadecimal digits with `hex:` before them; `endpoints` is an array of `[address, port]`.
"""

import hashlib
import hmac
import ipaddress
import json
import struct
import sys

HEAD = struct.Struct(">4sBBBBHBBQQQI16s16sB")
TYPES = {1: "leaving", 2: "ack", 3: "return"}


def name(text):
    if text.startswith("hex:"):
        return bytes.fromhex(text[4:])
    raw = text.encode()
    return raw.ljust(16, b"\0") if len(raw) <= 16 else hashlib.sha256(raw).digest()[:16]


def shown(raw):
    text = raw.rstrip(b"\0")
    return text.decode() if text.isascii() and text.decode().isprintable() and text else "hex:" + raw.hex()


def mac(key, content):
    return hmac.new(key, b"sdpn-v1" + content, hashlib.sha256).digest()


def encode(fields, key_id, key):
    number = {text: code for code, text in TYPES.items()}[fields["type"]]
    rest = b""
    if fields["type"] == "ack":
        rest = name(fields["by"])
    for address, port in fields["endpoints"]:
        ip = ipaddress.ip_address(address)
        rest += bytes([ip.version]) + ip.packed + struct.pack(">H", port)
    total = HEAD.size + len(rest) + 32
    if fields["type"] != "ack":
        total = max(total, 128)
    flags = 1 * fields["ack_wanted"] | 2 * fields["restarting"]
    content = HEAD.pack(
        b"SDPN", 1, number, flags, key_id, total, fields["reason"], fields["attempt"], fields["incarnation"],
        fields["seq"], fields["sent_at"], fields["drain_ms"], name(fields["node"]), name(fields["cluster"]),
        len(fields["endpoints"]),
    ) + rest
    content = content.ljust(total - 32, b"\0")
    return content + mac(key, content)


def decode(datagram, key_id, key):
    if not 121 <= len(datagram) <= 512:
        return "length"
    content, tag = datagram[:-32], datagram[-32:]
    (magic, version, number, flags, used, total, reason, attempt, incarnation, seq, sent_at, drain_ms, node,
     cluster, count) = HEAD.unpack_from(datagram)
    if magic != b"SDPN":
        return "magic"
    if version != 1:
        return "version"
    if total != len(datagram):
        return "total_length"
    if used != key_id:
        return "unknown_key"
    if not hmac.compare_digest(mac(key, content), tag):
        return "mac"
    rest = content[HEAD.size:]
    fields = {
        "type": TYPES.get(number), "ack_wanted": bool(flags & 1), "restarting": bool(flags & 2), "reason": reason,
        "attempt": attempt, "incarnation": incarnation, "seq": seq, "sent_at": sent_at, "drain_ms": drain_ms,
        "node": shown(node), "cluster": shown(cluster), "endpoints": [],
    }
    if number == 2:
        if flags or reason or drain_ms or count or len(rest) != 16:
            return "layout"
        fields["by"] = shown(rest)
        return fields
    if number not in TYPES or flags & ~3 or count > 8:
        return "layout"
    for _ in range(count):
        size = {4: 4, 6: 16}.get(rest[0] if rest else None)
        if size is None or len(rest) < size + 3:
            return "layout"
        ip = ipaddress.ip_address(rest[1:1 + size])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        fields["endpoints"].append([str(ip), struct.unpack_from(">H", rest, 1 + size)[0]])
        rest = rest[size + 3:]
    return "layout" if any(rest) else fields


def main():
    _, verb, key = sys.argv
    key_id, secret = key.split(":")
    arguments = int(key_id), bytes.fromhex(secret)
    for line in sys.stdin:
        if verb == "encode":
            print(encode(json.loads(line), *arguments).hex(), flush=True)
        else:
            read = decode(bytes.fromhex(line.strip()), *arguments)
            print(json.dumps(read) if isinstance(read, dict) else f"refused: {read}", flush=True)


if __name__ == "__main__":
    main()
