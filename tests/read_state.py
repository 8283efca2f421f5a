#!/usr/bin/env python3
"""Reads a state.json: read_state.py FILE prints it as JSON, or says in one sentence what is wrong and exits with 1.

Written from docs/formats.md, apart from the program that writes the file. It does not read the legacy file.
"""
import json, re, sys, zlib


def unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def moment(value):
    return type(value) is int and 0 <= value < 2**53


def read(data):
    """The document as a dict. ValueError: it is damaged."""
    text, decoder = data.decode(), json.JSONDecoder()
    document = json.loads(text, object_pairs_hook=unique, parse_constant=lambda word: int(word))
    get = document.get if type(document) is dict else {}.get
    if type(get("schema")) is not int or get("schema") != 1:
        raise ValueError("it has no schema that is known here")
    for key in re.finditer(r'"sections"[ \t\n\r]*:[ \t\n\r]*', text):
        head = text[:key.end()].encode()
        sections = text[key.end():decoder.raw_decode(text, key.end())[1]].encode()
        if get("crc32") == zlib.crc32(sections) and get("head_crc32", zlib.crc32(head)) == zlib.crc32(head):
            break
    else:
        raise ValueError("a checksum does not fit its bytes, or there are no sections")
    older = get("sections_saved_at", {})
    fits = type(get("node_id")) is str and type(get("clean")) is bool and type(get("sections")) is dict
    fits = fits and type(older) is dict and all(map(moment, [get("incarnation"), get("saved_at"), *older.values()]))
    if not (fits and (get("shutdown_at") is None or moment(get("shutdown_at")))):
        raise ValueError("a field is missing, or has a value that it cannot have")
    return document


if __name__ == "__main__":
    try:
        print(json.dumps(read(open(sys.argv[1], "rb").read())))
    except (ValueError, OSError, RecursionError) as error:
        sys.exit(f"{sys.argv[1]} is no state that can be trusted: {error}")
