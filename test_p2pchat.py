"""Tests of p2pchat: python -m pytest. Also: python test_p2pchat.py bench|simulate|soak|hostile|fuzz."""

import argparse
import ast
import collections
import concurrent.futures
import errno
import gc
import hashlib
import heapq
import itertools
import json
import logging
import os
import random
import resource
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time

import pytest

import p2pchat

# -- codec ---------------------------------------------------------------------------------------------




ALICE = {"id": "Alice@192.168.1.10:10001", "ip": "192.168.1.10", "port": 10001, "username": "Alice"}
BOB = {"id": "Bob@192.168.1.11:10002", "ip": "192.168.1.11", "port": 10002, "username": "Bob",
       "instance": "00ff", "incarnation": 7}


def codec_message(**changes):
    """A valid chat message as a dict, with something changed; None as a value takes the key away."""
    message = {"type": "MSG_CHAT", "sender_id": ALICE["id"], "to": "*", "content": "Hi!", "id": 3}
    message.update(changes)
    return {key: value for key, value in message.items() if value is not Ellipsis}


def codec_line(**changes):
    return json.dumps(codec_message(**changes)).encode()


VALID_CONTENTS = [
    ("MSG_REGISTER", {"username": "Alice", "port": 10001}),
    ("MSG_REGISTER", {"username": "Zoë 李", "port": 1, "instance": "abc", "incarnation": 0}),
    ("MSG_REGISTER_ACK", {"peer_id": ALICE["id"], "peer_list": [ALICE, BOB]}),
    ("MSG_HEARTBEAT", None),
    ("MSG_UNREGISTER", None),
    ("MSG_PEER_LIST_UPDATE", {"joined": [BOB], "left": [{"id": ALICE["id"], "reason": "timed out"}]}),
    ("MSG_CHAT", "text"),
    ("MSG_CHAT", ""),
    ("MSG_CHAT_ACK", {"upto": 5}),
    ("MSG_CHAT_REFUSED", {"id": 1, "upto": 5, "reason": "slow down"}),
    ("MSG_SYNC_PEERS_REQUEST", None),
    ("MSG_SYNC_PEERS_REQUEST", {"digest": "00", "count": 1}),
    ("MSG_SYNC_PEERS_RESPONSE", {"peer_list": []}),
    ("MSG_PEER_NEWS", {"peers": [dict(BOB, status="dead", age=3)]}),
    ("MSG_HELLO", {"peer": BOB, "you": {"ip": "10.0.0.1"}}),
    ("MSG_PROBE", {"number": 1, "incarnation": 2, "status": "suspect"}),
    ("MSG_PROBE_ACK", {"number": 1}),
    ("MSG_PROBE_REQUEST", {"peer": BOB}),
    ("MSG_PROBE_RESULT", {"peer": BOB}),
    ("MSG_BEACON", {"role": "peer", "port": 5, "instance": "a"}),
    ("MSG_ERROR", {"reason": "because"}),
    ("MSG_FROM_THE_FUTURE", {"anything": [1, 2, {"x": None}]}),
]


@pytest.mark.parametrize("kind, content", VALID_CONTENTS)
def test_codec_round_trip(kind, content):
    data = p2pchat.create_message(kind, ALICE["id"], content, "*", extra=1)
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    expected = {"type": kind, "sender_id": ALICE["id"], "to": "*", "content": content, "extra": 1}
    assert p2pchat.parse_message(data) == p2pchat.parse_message(data.strip()) == expected


@pytest.mark.parametrize("text", ["Hi Bob!", "", "a\nb\tc", 'quo"te\\', "Grüße 李 🎉 مرحبا", "\x00\x1b[2J", "\u2028"])
def test_codec_chat_shortcut_is_the_general_way(text):
    general = p2pchat.create_message("MSG_CHAT", "Zoë@10.0.0.1:5", text, "*", id=9)
    assert p2pchat.create_chat("Zoë@10.0.0.1:5", text, "*", 9) == general
    assert p2pchat.parse_message(general)["content"] == text


def test_codec_raw_content_is_the_general_way():
    content = {"peer_list": [ALICE, BOB]}
    raw = p2pchat.create_raw("MSG_SYNC_PEERS_RESPONSE", "server", "x", json.dumps(content))
    assert p2pchat.parse_message(raw) == p2pchat.parse_message(
        p2pchat.create_message("MSG_SYNC_PEERS_RESPONSE", "server", content, "x"))


BAD_LINES = [
    b"", b" ", b"hello", b"{}", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b"{'type': 1}",
    codec_line(type=...), codec_line(sender_id=...), codec_line(to=...), codec_line(content=...),
    codec_line(type=5), codec_line(sender_id=None), codec_line(to=["*"]), codec_line(type="x" * 200),
    codec_line(sender_id="x" * 200), codec_line(content=5), codec_line(content=None), codec_line(content={}),
    codec_line(content="x" * (p2pchat.MAX_TEXT + 1)), codec_line(content="李" * 6000),
    codec_line(id="3"), codec_line(id=-1), codec_line(id=1.5), codec_line(id=True), codec_line(id=2**53),
    codec_line() + codec_line(), codec_line() + b" x", codec_line() + b"\n" + codec_line(),
    b'{"type":"MSG_CHAT","sender_id":"a","to":"*","content":NaN}',
    b'{"type":"MSG_CHAT","sender_id":"a","to":"*","content":"x","id":Infinity}',
    b'{"type":"X","sender_id":"a","to":"*","content":1e999}',
    b'{"type":"X","sender_id":"a","to":"*","content":' + b"9" * 5000 + b"}",
    b"[" * 100_000, b'{"type":"X","sender_id":"a","to":"*","content":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"type":"X","sender_id":"a","to":"*","content":"' + b"x" * p2pchat.MAX_LINE + b'"}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:40]))
def test_codec_bad_line_is_none_and_says_why(line):
    assert p2pchat.parse_message(line) is None
    with pytest.raises(p2pchat.BadMessage) as caught:
        p2pchat.parse_line(line)
    assert 3 < len(str(caught.value)) < 200


WRONG_VALUES = [None, True, 0, -1, 1.5, 70000, 2**63, "", "x", "x" * 200, [], [None], [[]], {}, {"a": 1}, "\ud800"]


def codec_fields(content, path=()):
    """Every place in a content: the paths to it and to all that is in it."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from codec_fields(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from codec_fields(value, (*path, index))


def codec_replaced(content, path, value):
    """A deep copy of a content with another value at a path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = codec_replaced(content[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("kind, content", VALID_CONTENTS)
def test_codec_every_field_with_every_wrong_value(kind, content):
    """A wrong value is refused by BadMessage or is no harm; nothing else is ever raised."""
    refused = 0
    for path in codec_fields(content):
        for wrong in WRONG_VALUES:
            line = json.dumps(codec_message(type=kind, content=codec_replaced(content, path, wrong))).encode()
            refused += p2pchat.parse_message(line) is None
    unchecked = ("MSG_HEARTBEAT", "MSG_UNREGISTER", "MSG_FROM_THE_FUTURE")
    assert (refused > 0) is (kind not in unchecked)


@pytest.mark.parametrize("change", [
    {"id": "Alice@192.168.1.10:10002"}, {"id": "Bob@192.168.1.10:10001"}, {"id": None}, {"ip": "192.168.1.010"},
    {"ip": "224.0.0.1"}, {"ip": "255.255.255.255"}, {"ip": "0.0.0.0"}, {"ip": "::1"}, {"ip": "lab-3"}, {"ip": 5},
    {"port": 0}, {"port": 70000}, {"port": "80"}, {"port": True}, {"port": 1.0}, {"username": ""}, {"username": "a@b"},
    {"username": "x" * 33}, {"username": "a\x1b[2J"}, {"username": "\u202eevil"}, {"username": " Alice"},
    {"username": "\u0301\u0301"}, {"instance": 5}, {"instance": "x" * 33}, {"instance": "a b"},
    {"incarnation": -1}, {"incarnation": 2**63}, {"incarnation": "1"}, {"status": "undead"}, {"status": []},
    {"age": -5}, {"age": "1"},
])
def test_codec_a_peer_on_the_wire_is_checked(change):
    peer = dict(BOB, **change)
    if "id" not in change:
        peer["id"] = f"{peer['username']}@{peer['ip']}:{peer['port']}"
    with pytest.raises(p2pchat.BadMessage):
        p2pchat.check_peer(peer)
    p2pchat.check_peer(BOB)


@pytest.mark.parametrize("peer_id, parts", [
    ("Alice@192.168.1.10:10001", ("Alice", "192.168.1.10", 10001)), ("a b@10.0.0.1:1", ("a b", "10.0.0.1", 1)),
    ("Alice", None), ("Alice@10.0.0.1", None), ("@10.0.0.1:5", None), ("a@b@10.0.0.1:5", None), ("a@10.0.0.1:", None),
    ("a@10.0.0.1:0", None), ("a@10.0.0.1:99999", None), ("a@10.0.0.1:05", None), ("a@10.0.0.1:٣", None),
    ("a@224.1.1.1:5", None), ("", None),
])
def test_codec_split_id(peer_id, parts):
    assert p2pchat.split_id(peer_id) == parts


# Streams: what the reader makes of them, whole, byte by byte, and with more behind.

GOOD = codec_line()
STREAMS = [
    ("one", GOOD + b"\n", 1, False),
    ("several", GOOD + b"\n" + GOOD + b"\r\n\n  \n" + GOOD + b"\n", 3, False),
    ("blanks around", b"  " + GOOD + b" \t\n", 1, False),
    ("good before bad", GOOD + b"\n" + b"garbage\n" + GOOD + b"\n", 1, True),
    ("good before not UTF-8", GOOD + b"\n" + b"\xff\n" + GOOD + b"\n", 1, True),
    ("two on a line", GOOD + b" " + GOOD + b"\n", 0, True),
    ("a value over two lines", GOOD.replace(b', "id"', b',\n "id"') + b"\n", 0, True),
    ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 0, True),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n" + b"x\n", 0, True),
    ("unfinished", GOOD + b"\n" + GOOD[:20], 1, False),
]


@pytest.mark.parametrize("name, stream, count, spoilt", STREAMS, ids=[row[0] for row in STREAMS])
@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_codec_reader_is_the_same_however_the_stream_is_cut(name, stream, count, spoilt, step):
    reader = p2pchat.MessageReader()
    messages = []
    for start in range(0, len(stream), step):
        messages += reader.feed(stream[start:start + step])
    assert messages == [codec_message()] * count
    assert (reader.error is not None) is spoilt


def test_codec_end_of_stream_ends_a_message():
    reader = p2pchat.MessageReader()
    assert reader.feed(GOOD) == []
    assert reader.finish() == [codec_message()]
    assert reader.finish() == [] and reader.error is None


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_codec_a_line_without_end_is_cut_off(tail):
    reader = p2pchat.MessageReader()
    piece = b"x" * 65536
    for _ in range(p2pchat.MAX_LINE // len(piece)):
        assert reader.feed(piece) == []
    assert reader.feed(piece + tail) == []
    assert reader.error is not None and reader.partial == 0
    assert reader.feed(GOOD + b"\n") == []


def test_codec_lists_too_long_for_a_message_are_split():
    records = [json.dumps(dict(BOB, username="x" * 32))] * 12_000
    lists = p2pchat.in_lists(records)
    assert len(lists) > 1 and all(len(text) < p2pchat.MAX_LINE for text in lists)
    assert json.loads("[" + ",".join(lists) + "]") == [json.loads(records[0])] * 12_000
    assert p2pchat.in_lists([]) == [""]


def test_codec_too_long_a_message_is_not_made():
    with pytest.raises(ValueError):
        p2pchat.create_message("X", "a", "x" * p2pchat.MAX_LINE)


# -- membership ----------------------------------------------------------------------------------------





def member_record(name="Bob", host=2, instance="b1", incarnation=100, **more):
    """A record as it comes over the wire."""
    ip = f"10.0.0.{host}"
    return {"id": f"{name}@{ip}:5000", "ip": ip, "port": 5000, "username": name,
            "instance": instance, "incarnation": incarnation, **more}


def member_list():
    """An empty list, of a peer called Alice."""
    return p2pchat.PeerList(p2pchat.Peer("Alice", "10.0.0.1", 5000, "a1", 100))


def member_state(peers, key="b1"):
    """What a list holds of an instance: (status, incarnation, id), or None."""
    peer = peers.by_key(key)
    return peer and (peer.status, peer.incarnation, peer.id)


BOB_ID, BOB_MOVED = "Bob@10.0.0.2:5000", "Bob@10.0.0.9:5000"
HEARSAY = [  # what is known, what is heard then, the verdict, what is known after it, the changes
    ("new", [], {}, "new", ("alive", 100, BOB_ID), ["joined"]),
    ("known", [{}], {}, "known", ("alive", 100, BOB_ID), []),
    ("newer", [{}], {"incarnation": 101}, "new", ("alive", 101, BOB_ID), []),
    ("older", [{}], {"incarnation": 99}, "stale", ("alive", 100, BOB_ID), []),
    ("suspected", [{}], {"status": "suspect"}, "accused", ("alive", 100, BOB_ID), []),
    ("called dead", [{}], {"status": "dead"}, "accused", ("alive", 100, BOB_ID), []),
    ("called left", [{}], {"status": "left", "incarnation": 105}, "accused", ("alive", 100, BOB_ID), []),
    ("called dead long ago", [{}], {"status": "dead", "incarnation": 99}, "stale", ("alive", 100, BOB_ID), []),
    ("renamed", [{}], {"name": "Rob", "incarnation": 101}, "new", ("alive", 101, "Rob@10.0.0.2:5000"), ["renamed"]),
    ("renamed, older", [{}], {"name": "Rob", "incarnation": 99}, "stale", ("alive", 100, BOB_ID), []),
    ("moved by hearsay", [{}], {"host": 9, "incarnation": 101}, "conflict", ("alive", 100, BOB_ID), []),
    ("another instance there", [{}], {"instance": "b2"}, "conflict", None, []),
    ("forged incarnation", [{}], {"incarnation": 2**53 - 1}, "implausible", ("alive", 100, BOB_ID), []),
    ("forged death", [{}], {"incarnation": 2**53 - 1, "status": "dead"}, "implausible", ("alive", 100, BOB_ID), []),
    ("a tombstone of nobody", [], {"status": "dead"}, "known", ("dead", 100, BOB_ID), []),
    ("a stale list", [{"status": "dead"}], {}, "stale", ("dead", 100, BOB_ID), []),
    ("an older list", [{"status": "left"}], {"incarnation": 50}, "stale", ("left", 100, BOB_ID), []),
    ("it denies", [{"status": "dead"}], {"incarnation": 101}, "new", ("alive", 101, BOB_ID), ["joined"]),
    ("dead again", [{"status": "dead"}], {"status": "dead", "incarnation": 104}, "known", ("dead", 104, BOB_ID), []),
    ("too old to be believed", [], {"age": 4000}, "implausible", None, []),
    ("a dead of long ago", [], {"age": 4000, "status": "dead"}, "implausible", None, []),
    ("with no instance", [], {"instance": ""}, "new", None, ["joined"]),
]


@pytest.mark.parametrize("known, heard, verdict, state, kinds", [row[1:] for row in HEARSAY],
                         ids=[row[0] for row in HEARSAY])
def test_membership_hearsay(known, heard, verdict, state, kinds):
    peers = member_list()
    for record in known:
        peers.hear(member_record(**record), 5.0)
    told, _, changes = peers.hear(member_record(**heard), 10.0)
    assert (told, [change.kind for change in changes]) == (verdict, kinds)
    if heard.get("instance", "b1") == "b1":
        assert member_state(peers) == state


def test_membership_hearsay_removes_nobody():
    """Whatever anybody says of a third peer, it stays until it is removed for cause."""
    rng = random.Random(1)
    for _ in range(300):
        peers = member_list()
        peers.hear(member_record(), 0.0)
        for step in range(10):
            peers.hear(member_record(host=rng.choice([2, 9]), instance=rng.choice(["b1", "b2", ""]),
                                     incarnation=rng.choice([0, 99, 100, 101, 2**52]),
                                     status=rng.choice(["alive", "suspect", "dead", "left"])), float(step))
        assert not peers.by_key("b1").gone and BOB_ID in [peer.id for peer in peers.present()]


OWN_WORD = [
    ("new", [], {}, "new", ("alive", 100, BOB_ID), ["joined"]),
    ("known", [{}], {}, "known", ("alive", 100, BOB_ID), []),
    ("moved", [{}], {"host": 9, "incarnation": 101}, "new", ("alive", 101, BOB_MOVED), ["renamed"]),
    ("must deny its death first", [{"status": "dead"}], {}, "stale", ("dead", 100, BOB_ID), []),
    ("denies its death", [{"status": "dead"}], {"incarnation": 101}, "new", ("alive", 101, BOB_ID), ["joined"]),
    ("an absurd tombstone", [{"status": "dead", "incarnation": 2**52}], {}, "new", ("alive", 100, BOB_ID), ["joined"]),
    ("others know a later one", [{"incarnation": 103}], {}, "stale", ("alive", 103, BOB_ID), []),
    ("in place of a former one", [{"instance": "b0"}], {}, "new", ("alive", 100, BOB_ID), ["left", "joined"]),
]


@pytest.mark.parametrize("known, said, verdict, state, kinds", [row[1:] for row in OWN_WORD],
                         ids=[row[0] for row in OWN_WORD])
def test_membership_own_word(known, said, verdict, state, kinds):
    peers = member_list()
    for record in known:
        peers.hear(member_record(**record), 5.0)
    told, _, changes = peers.confirm(member_record(**said), 10.0)
    assert (told, [change.kind for change in changes]) == (verdict, kinds)
    assert member_state(peers) == state


def test_membership_a_removed_peer_is_not_brought_back_by_old_lists():
    peers = member_list()
    peers.hear(member_record(), 0.0)
    assert [change.kind for change in peers.remove(peers.by_key("b1"), "left", "left", 10.0)] == ["left"]
    for now in (10.0, 60.0, p2pchat.TOMBSTONE_TIME):
        assert peers.hear(member_record(), now)[0] == "stale"
    assert len(peers) == 0 and peers.remove(peers.by_key("b1"), "dead", "again", 11.0) == []


def test_membership_tombstones_are_bounded_in_time_and_number():
    peers = member_list()
    peers.hear(member_record(), 0.0)
    peers.remove(peers.by_key("b1"), "dead", "silent", 0.0)
    peers.hear(member_record("Carol", 3, "c1"), 0.0)
    peers.remove(peers.by_key("c1"), "dead", "silent", p2pchat.TOMBSTONE_TIME + 1)
    assert [peer.key for peer in peers.tombstones()] == ["c1"]
    for number in range(3 * p2pchat.MAX_PEERS):
        peers.hear(member_record("X", 4, f"x{number}", status="dead"), 9.0)
    assert len(peers.tombstones()) <= 2 * p2pchat.MAX_PEERS


def test_membership_the_list_is_bounded():
    peers = member_list()
    for number in range(p2pchat.MAX_PEERS + 50):
        peers.hear({"id": f"x@10.0.0.2:{number + 1}", "ip": "10.0.0.2", "port": number + 1, "username": "x",
                    "instance": f"i{number}"}, 0.0)
    assert len(peers) == len(peers.present()) == p2pchat.MAX_PEERS


def test_membership_digest_is_of_the_set_and_the_incarnations():
    one, other = member_list(), p2pchat.PeerList(p2pchat.Peer("Bob", "10.0.0.2", 5000, "b1", 100))
    one.hear(member_record(), 0.0)
    other.hear(member_record("Alice", 1, "a1"), 0.0)
    carol, dan = member_record("Carol", 3, "c1"), member_record("Dan", 4, "d1")
    for peers, records in ((one, (carol, dan)), (other, (dan, carol))):
        for record in records:
            peers.hear(record, 0.0)
    assert one.digest() == other.digest()
    other.hear(dict(carol, incarnation=101), 0.0)
    assert one.digest() != other.digest()
    one.hear(dict(carol, incarnation=101), 0.0)
    assert one.digest() == other.digest()
    one.remove(one.by_key("d1"), "dead", "silent", 0.0)
    assert one.digest() != other.digest()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 60])
def test_membership_everybody_is_probed_by_two_others(size):
    """On the ring each has as many neighbours ahead as behind, and everybody sees the same ring."""
    records = [member_record(f"P{number}", number + 1, f"i{number}") for number in range(size)]
    probed = {record["id"]: 0 for record in records}
    for own in records:
        peers = p2pchat.PeerList(p2pchat.Peer.from_wire(own))
        for record in records:
            peers.hear(record, 0.0)
        ahead, behind = peers.neighbours(2)
        assert len(ahead) == len(behind) == min(2, size - 1)
        for peer in ahead:
            probed[peer.id] += 1
    assert set(probed.values()) == {min(2, size - 1)}


NAMES = [("Alice", 2, "i1"), ("Bob", 3, "i2"), ("Bob", 4, "i3"), ("Carol", 5, "i4"), ("carol", 6, "i5"), ("Zoë", 7, "i6")]


@pytest.mark.parametrize("typed, found", [
    ("Bob", ["10.0.0.3", "10.0.0.4"]), ("bob@10.0.0.3", ["10.0.0.3"]), ("@Bob@10.0.0.4:5000", ["10.0.0.4"]),
    ("Carol", ["10.0.0.5"]), ("carol", ["10.0.0.6"]), ("CAROL", ["10.0.0.5", "10.0.0.6"]), ("Zoe\u0308", ["10.0.0.7"]),
    ("Alice", ["10.0.0.2"]), ("Bo", []), ("", []), ("@", []), ("Bob@10.0.0", []),
])
def test_membership_find_and_labels(typed, found):
    peers = member_list()
    for name, host, instance in NAMES:
        peers.hear(member_record(name, host, instance), 0.0)
    assert sorted(peer.ip for peer in peers.find(typed)) == found
    labels = {peer.ip: peers.label(peer) for peer in peers.present()}
    assert labels == {"10.0.0.2": "Alice@10.0.0.2", "10.0.0.3": "Bob@10.0.0.3", "10.0.0.4": "Bob@10.0.0.4",
                      "10.0.0.5": "Carol@10.0.0.5", "10.0.0.6": "carol@10.0.0.6", "10.0.0.7": "Zoë"}
    assert all(peers.find(label) == [peers.get(f"{label.split('@')[0]}@{ip}:5000")] for ip, label in labels.items())


def test_membership_labels_on_one_machine_need_the_port():
    peers = member_list()
    for port in (1, 2):
        peers.hear({"id": f"Bob@10.0.0.2:{port}", "ip": "10.0.0.2", "port": port, "username": "Bob"}, 0.0)
    assert [peers.label(peer) for peer in peers.present()] == ["Bob@10.0.0.2:1", "Bob@10.0.0.2:2"]


def test_membership_news_is_told_as_often_as_the_rule_says():
    news, bob = p2pchat.News(), p2pchat.Peer("Bob", "10.0.0.2", 5000, "b1", 100)
    news.add(bob, "suspect", 40)
    news.add(bob, "dead", 40)
    told = 0
    while news:
        records = news.take(2, 0.0)
        assert [record["status"] for record in records] == ["dead"]
        told += 2
    assert told == p2pchat.NEWS_ROUNDS * 2 and news.take(2, 0.0) == []


def test_pure_sections_use_neither_sockets_nor_clocks():
    """The sections that are said to be pure are: nothing in them reaches for the system."""
    source = open(p2pchat.__file__, encoding="utf-8").read()
    banned = {"socket", "time", "selectors", "curses", "os", "signal", "sys"}
    for section in ("Text", "Messages", "Membership", "Chat view"):
        start = source.index(f"\n# {section}\n")
        end = source.find("\n# ====", source.index("# ====", start) + 10)
        tree = ast.parse(source[start:end])
        used = {node.value.id for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
        calls = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
                 and node.func.value.id == "random"}
        assert not used & banned and not calls, (section, used & banned, calls)


# ======================================================================================================
# Simulator
#
# A network in one process: many hosts, one virtual clock, one heap of things to come, one seed. Servers
# and peers run on it unchanged, because all that they know of time, chance and sockets is their loop.
# Time jumps to the next event, so an hour of fifty peers passes in seconds, and the same seed gives the
# same run to the last byte.
#
# SimHost is a machine: addresses, a cable, a firewall. SimLoop is one process on it, with the methods of
# p2pchat.Loop. SimConnection is TCP as a program sees it; what the kernel does (handshakes, taking data for
# a process that is stopped, sending again what a cut cable swallowed, resets for the dead) goes on without
# the process. Each event is one turn of one process: what it queues on a connection leaves as one segment.
#
# Corners cut: bandwidth is endless; acknowledgements of the kernel cost no time and are never lost, so a
# cut in one direction stops only what goes in that direction, besides new handshakes; a kernel never gives
# up on a connection by itself. An exception in a handler is not logged but leaves SimNetwork.run: the test fails.
# ======================================================================================================




SIM_EPOCH = 1_700_000_000.0  # Unix time at which every simulation begins
SIM_KERNEL_BUFFER = 256 * 1024  # bytes that the two kernels of a connection hold for a reader that does not read
SIM_SAME_HOST = 0.00005  # seconds from process to process on one machine
SIM_TURNS_AT_ONCE = 200_000  # events at one and the same moment: past that something calls itself for ever
SEG_ACCEPT, SEG_END, SEG_RESET = "accept", "end", "reset"  # what travels on a connection besides bytes


class SimNetwork:
    """Hosts, what connects them, and what is wrong with that. `delay` is a range of seconds, one way;
    `link_life` the mean time after which a connection breaks; `lan_loss` the share of datagrams lost."""

    def __init__(self, seed=0, delay=(0.0005, 0.005), link_life=None, lan_loss=0.0, trace=False):
        self.seed = seed
        self.random = random.Random(f"network {seed}")
        self.time = 0.0
        self.delay_range = delay
        self.link_life = link_life
        self.lan_loss = lan_loss
        self.lan_works = True
        self.hosts = {}  # by name
        self.by_ip = {}
        self.cuts = []  # pairs of frozensets: nothing passes from a host in the first to one in the second
        self.blocked = {}  # connections with segments that a cut holds up, and since when
        self.lans = []
        self.census = None  # bytes sent by message type, when a test wants to know
        self._heap = []
        self._count = itertools.count()
        self._trace = hashlib.sha256() if trace else None

    # -- time ------------------------------------------------------------------------------------------

    def post(self, delay, call, *args):
        """Something that no process does happens in `delay` seconds."""
        heapq.heappush(self._heap, (self.time + delay, next(self._count), None, call, args))

    def post_timer(self, loop, timer):
        """A timer of a process; its deadline is on that process's clock."""
        when = max(self.time, timer.when - loop.skew)
        heapq.heappush(self._heap, (when, next(self._count), loop, timer, ()))

    def run(self, seconds):
        """Let `seconds` pass."""
        end, heap, pop = self.time + seconds, self._heap, heapq.heappop
        turns = 0
        while heap and heap[0][0] <= end:
            when, number, loop, call, args = pop(heap)
            turns = turns + 1 if when == self.time else 0
            if turns > SIM_TURNS_AT_ONCE:
                raise AssertionError(f"time stands still at {when}: {call}")
            self.time = when
            if self._trace is not None:
                self._note(number, loop, call, args)
            if loop is None:
                call(*args)
            else:
                loop.timer_due(call)
        self.time = end

    def run_until(self, condition, limit, step=0.05):
        """Let time pass until `condition()`; return how long that took. Fails after `limit` seconds."""
        start = self.time
        while not condition():
            assert self.time - start < limit, f"seed {self.seed}: not within {limit} s: {condition}"
            self.run(step)
        return self.time - start

    def trace(self):
        """A hash of all that happened: equal for equal seeds."""
        return self._trace.hexdigest()

    def _note(self, number, loop, call, args):
        who = loop.name if loop else getattr(getattr(call, "__self__", None), "name", "-")
        self._trace.update(f"{self.time:.9f} {number} {who} {getattr(call, '__name__', '')}\n".encode())
        for piece in args:
            self._trace.update(piece if isinstance(piece, bytes) else b"")

    def reschedule(self, loop):
        """A process's clock was set: its timers come at other times now."""
        entries, self._heap[:] = self._heap[:], []
        for when, number, owner, call, args in sorted(entries):
            if owner is loop:
                when = max(self.time, call.when - loop.skew)
            self._heap.append((when, number, owner, call, args))
        heapq.heapify(self._heap)

    # -- what there is ---------------------------------------------------------------------------------

    def host(self, name, *addresses):
        """A machine; its address is chosen if none is given."""
        number = len(self.hosts) + 1
        host = SimHost(name, list(addresses or [f"10.0.{number // 250}.{number % 250 + 1}"]))
        self.hosts[name] = host
        self.by_ip.update((ip, host) for ip in host.addresses)
        return host

    def start(self, host, name=None):
        """A new process on a host: a loop of its own."""
        return SimLoop(self, host, name or host.name)

    def move(self, host, *addresses):
        """A host gets other addresses; what was connected at the old ones falls silent."""
        for ip in host.addresses:
            self.by_ip.pop(ip, None)
        host.addresses = list(addresses)
        self.by_ip.update((ip, host) for ip in host.addresses)
        for loop in host.processes:
            for connection in loop.connections:
                connection.stranded = connection.local[0] not in [*addresses, "127.0.0.1"]

    # -- what goes wrong -------------------------------------------------------------------------------

    def cut(self, some, others, both=True):
        """Nothing passes from `some` hosts to `others` any more, and nothing back if `both`."""
        some, others = frozenset(some), frozenset(others)
        self.cuts.append((some, others))
        if both:
            self.cuts.append((others, some))

    def heal(self):
        """All cuts are mended, and hosts that were dark are not any more."""
        for host in self.hosts.values():
            host.dark = False
        self.mend()

    def mend(self):
        """The cuts are mended."""
        self.cuts.clear()
        self.release()

    def release(self):
        """Kernels send again what was held up: the later, the longer they had tried in vain."""
        for connection, since in self.blocked.items():
            patience = min(60.0, max(0.2, self.time - since))
            self.post(patience * self.random.random(), connection.release)
        self.blocked.clear()

    def unplug(self, host):
        """Pull out its cable."""
        host.dark = True

    def plug(self, host):
        """And in again."""
        host.dark = False
        self.release()

    def break_link(self, connection):
        """A connection breaks: both sides hear of it, what was under way is lost."""
        for side in (connection, connection.far):
            if side is not None and side.state != p2pchat.CLOSED:
                side.broken = True
                self.post(self.delay(None, None), side.loop.enter, side.reset)

    def passes(self, source, target):
        """Whether a packet gets from one host to another now."""
        if source is target:
            return True
        if source.dark or target.dark:
            return False
        return not any(source in some and target in others for some, others in self.cuts)

    def delay(self, source, target):
        """How long a packet takes, seconds."""
        if source is target and source is not None:
            return SIM_SAME_HOST
        low, high = self.delay_range
        return low + (high - low) * self.random.random()

    # -- handshakes, which are the kernels' business ------------------------------------------------------

    def syn(self, connection, again=1.0):
        """A dial's first packet leaves; if nothing comes back it is sent again after 1, 2, 4 s."""
        if connection.state != p2pchat.CONNECTING or connection.loop.dead:
            return
        target = self._target(connection)
        reaches = target is not None and self.passes(connection.loop.host, target)
        if reaches and not (target.walled and target is not connection.loop.host):
            self.post(self.delay(connection.loop.host, target), self._syn_arrived, connection, target, again)
        else:
            self.post(again, self.syn, connection, 2 * again)

    def _target(self, connection):
        ip = connection.remote[0]
        return connection.loop.host if ip.startswith("127.") else self.by_ip.get(ip)

    def _syn_arrived(self, connection, target, again):
        listener = target.listening(*connection.remote)
        if self.passes(target, connection.loop.host) and not connection.stranded:
            self.post(self.delay(target, connection.loop.host), self._answered, connection, listener)
        else:
            self.post(again, self.syn, connection, 2 * again)

    def _answered(self, connection, listener):
        """Nobody listens, or a kernel has taken the connection for its process, which may be asleep."""
        if connection.state != p2pchat.CONNECTING or connection.loop.dead:
            return
        if listener is None:
            connection.loop.enter(connection.abort, p2pchat.REFUSED)
            return
        far = SimConnection(listener.loop, connection.local, p2pchat.OPEN)
        far.local = connection.remote
        connection.far, far.far = far, connection
        far.listener = listener
        connection.transmit(SEG_ACCEPT)
        connection.loop.enter(connection.established)
        if self.link_life is not None:
            self.post(self.random.expovariate(1 / self.link_life), self.break_link, connection)

    # -- datagrams -------------------------------------------------------------------------------------

    def datagram(self, source, target, data):
        """One datagram from one beacon socket to another, or nothing."""
        here, there = source.loop.host, target.loop.host
        walled = there.walled and here is not there
        if not self.lan_works or walled or not self.passes(here, there) or self.random.random() < self.lan_loss:
            return
        self.post(self.delay(here, there), target.loop.enter, target.hear, source, data)


class SimHost:
    """A machine."""

    def __init__(self, name, addresses):
        self.name = name
        self.addresses = addresses
        self.dark = False  # its cable is out
        self.walled = False  # a firewall drops what others begin; it can dial out
        self.processes = []
        self.listeners = {}  # by port
        self._ports = itertools.count(40001)

    def free_port(self):
        """A port for who does not care."""
        return next(self._ports)

    def listening(self, ip, port):
        """Who takes connections to this address."""
        listener = self.listeners.get(port)
        return listener if listener is not None and listener.address[0] in ("0.0.0.0", ip) else None


class SimLoop:
    """One process: what p2pchat.Loop offers to servers and peers, on the simulated network."""

    def __init__(self, network, host, name):
        self.network = network
        self.host = host
        self.name = name
        number = len(host.processes)
        self.random = random.Random(f"{name} {number} {network.seed}")
        self.skew = 0.0  # of the clock that only goes forward, against the network's time
        self.wall_skew = 0.0
        self.dead = False
        self.frozen = False
        self.connections = {}  # those not closed
        self.sent = 0  # bytes
        self._turning = False
        self._unflushed = []
        self._backlog = []  # what a frozen process will find when it runs again
        self._late = []  # and the timers that came due meanwhile
        host.processes.append(self)

    # -- what p2pchat.Loop has -------------------------------------------------------------------------

    def now(self):
        return self.network.time + self.skew

    def wall(self):
        return SIM_EPOCH + self.network.time + self.wall_skew

    def call_later(self, delay, callback, *args):
        timer = p2pchat.Timer(self.network.time + self.skew + delay, callback, args)
        self.network.post_timer(self, timer)
        return timer

    def listen(self, host, port, accept):
        port = port or self.host.free_port()
        if port in self.host.listeners:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener = self.host.listeners[port] = SimListener(self, (host, port), accept)
        return listener

    def connect(self, address, handler, timeout):
        connection = SimConnection(self, address, p2pchat.CONNECTING)
        connection.handler = handler
        ip = "127.0.0.1" if address[0].startswith("127.") else self.host.addresses[0]
        connection.local = (ip, self.host.free_port())
        connection.set_deadline(timeout, f"no answer within {timeout:g} s")
        self.network.syn(connection)
        return connection

    def lan(self, host, port, heard):
        return SimLan(self, heard)

    def local_addresses(self):
        return [*self.host.addresses, "127.0.0.1"]

    # -- turns -----------------------------------------------------------------------------------------

    def enter(self, callback, *args):
        """A turn for something that came from outside."""
        if self.dead:
            return
        if self.frozen:
            self._backlog.append((callback, args))
            return
        self._turning = True
        callback(*args)
        self._end_turn()

    def timer_due(self, timer):
        """A turn for a timer."""
        if self.frozen:
            self._late.append(timer)
        elif timer.active and not self.dead:
            self._turning = True
            timer.fire()
            self._end_turn()

    def flush_later(self, connection):
        """Send what it has queued at the end of this turn; a test that calls a node is a turn of its own."""
        self._unflushed.append(connection)
        if not self._turning:
            self.network.post(0, self.enter, self._end_turn)

    def _end_turn(self):
        self._turning = False
        if self._unflushed:
            queued, self._unflushed = self._unflushed, []
            for connection in queued:
                connection.flush()

    # -- what happens to processes ---------------------------------------------------------------------

    def freeze(self):
        """SIGSTOP: it runs no more; its kernel goes on."""
        self.frozen = True

    def thaw(self):
        """SIGCONT. As in the real loop one turn handles all that has come, then the timers that are due."""
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        late, self._late = self._late, []
        self._turning = True
        for callback, args in backlog:
            callback(*args)
        for timer in sorted(late, key=lambda timer: timer.when):
            timer.fire()
        self._end_turn()

    def crash(self, reset=True):
        """kill -9: the kernel ends its connections. Without `reset` the machine dies: silence."""
        self.dead = True
        for port, listener in list(self.host.listeners.items()):
            if listener.loop is self:
                del self.host.listeners[port]
        for connection in list(self.connections):
            connection.state = p2pchat.CLOSED
            if reset and connection.far is not None:
                connection.transmit(self.network.random.choice((SEG_END, SEG_RESET)))
        self.connections.clear()
        self.network.lans = [lan for lan in self.network.lans if lan.loop is not self]
        self.host.dark = self.host.dark or not reset

    def jump(self, seconds, wall=None):
        """Set its clock forward (or back); both clocks, unless the jump of the wall clock is given as well."""
        self.skew += seconds
        self.wall_skew += seconds if wall is None else wall
        self.network.reschedule(self)


class SimConnection(p2pchat.Connection):
    """One end of a connection. What `transmit` takes arrives at the far end, in order, or waits for a cut
    to heal, or is lost with the connection."""

    def __init__(self, loop, remote, state):
        super().__init__(loop, remote, state)
        self.far = None
        self.listener = None  # of an end that was accepted
        self.broken = False  # nothing passes any more, for good
        self.stranded = False  # its address is not ours any more
        self._output = []
        self._owed = 0
        self._queued = False
        self._reason = ""
        self._deadline = None
        self._in_flight = 0  # bytes that the far end has not read
        self._arrives = 0.0  # when the last segment arrives: none overtakes another
        self._held = []
        self._end_sent = self._end_came = False
        loop.connections[self] = None

    @property
    def name(self):
        """For the trace."""
        return f"{self.loop.name}:{self.local[1]}"

    # -- what p2pchat.Connection promises --------------------------------------------------------------

    def send(self, data):
        if self.state not in (p2pchat.OPEN, p2pchat.CONNECTING):
            return
        self._output.append(data)
        self._owed += len(data)
        if self._owed > p2pchat.MAX_OUTPUT:
            self.abort("it does not read what it is sent")
        elif self.state == p2pchat.OPEN:
            self._flush_later()

    def close(self, reason):
        if self.state == p2pchat.CONNECTING:
            self.abort(reason)
        if self.state != p2pchat.OPEN:
            return
        self.state = p2pchat.DRAINING
        self._reason = reason
        self.set_deadline(p2pchat.DRAIN_TIMEOUT, reason)
        self._flush_later()

    def abort(self, reason):
        if self.state == p2pchat.CLOSED:
            return
        if self.far is not None and not self._end_sent:
            self._end_sent = True
            self.transmit(SEG_END)  # behind what the kernel has taken already
        self.state = p2pchat.CLOSED
        self._output.clear()
        self._owed = 0
        self._forget_timers()
        self.set_deadline(None, "")
        self.loop.connections.pop(self, None)
        self.loop.call_later(0, self.handler.closed, self._reason or reason)

    # -- turns of its process --------------------------------------------------------------------------

    def established(self):
        """The dial has succeeded."""
        if self.state != p2pchat.CONNECTING:
            return
        self.set_deadline(None, "")
        self.state = p2pchat.OPEN
        self.handler.opened()
        self._flush_later()

    def accepted(self):
        """A connection that a kernel has taken for us."""
        if self.listener.loop.host.listeners.get(self.listener.address[1]) is not self.listener:
            self._reset_far()
            return
        handler = self.listener.accept(self)
        if handler is None:
            self.abort("turned away")
        else:
            self.handler = handler

    def read(self, data):
        """Bytes have come."""
        if self.state == p2pchat.CLOSED:
            self._reset_far()
            return
        self.far.consumed(len(data))
        self.feed(data)

    def ended(self):
        """The far end sends no more."""
        self._end_came = True
        if self.state == p2pchat.OPEN:
            self.end_of_stream()
        elif self.state == p2pchat.DRAINING and not self._output:
            self.abort(self._reason)

    def reset(self):
        """The connection is broken."""
        self._end_sent = True  # there is nobody to tell
        self.abort("connection reset")

    def consumed(self, size):
        """The far end has read so much: there is room for more."""
        self._in_flight -= size
        if self._output and self.state != p2pchat.CLOSED:
            self.loop.network.post(0, self.loop.enter, self.flush)

    def flush(self):
        """The end of a turn: all that is queued goes as one segment, if the kernels have room for it."""
        self._queued = False
        if self.state not in (p2pchat.OPEN, p2pchat.DRAINING):
            return
        if self._output and (not self._in_flight or self._in_flight + self._owed <= SIM_KERNEL_BUFFER):
            data = b"".join(self._output)
            self._output.clear()
            self._owed = 0
            self._in_flight += len(data)
            self.transmit(data)
            if self.state == p2pchat.OPEN and self._deadline is not None:
                self.set_deadline(None, "")
        if self._output:
            if self._deadline is None:
                self.set_deadline(p2pchat.STALL_TIMEOUT, "it does not read what it is sent")
        elif self.state == p2pchat.DRAINING:
            self._all_sent()

    def set_deadline(self, timeout, reason):
        """So long, and it is aborted; None takes the deadline away."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if timeout is None else self.loop.call_later(timeout, self.abort, reason)

    def _flush_later(self):
        if not self._queued:
            self._queued = True
            self.loop.flush_later(self)

    def _all_sent(self):
        if not self._end_sent:
            self._end_sent = True
            self.transmit(SEG_END)
        if self._end_came:
            self.abort(self._reason)

    # -- what kernels do -------------------------------------------------------------------------------

    def transmit(self, segment):
        """A segment leaves for the far end."""
        loop, network = self.loop, self.loop.network
        loop.sent += len(segment)
        if network.census is not None and isinstance(segment, bytes):
            sim_count(network.census, segment)
        when = max(self._arrives, network.time + network.delay(loop.host, self.far.loop.host))
        self._arrives = when
        network.post(when - network.time, self._arrive, segment)

    def _arrive(self, segment):
        if self.broken:
            return
        network, far = self.loop.network, self.far
        passes = network.passes(self.loop.host, far.loop.host) and not (self.stranded or far.stranded)
        if self._held or not passes:
            self._held.append(segment)
            network.blocked.setdefault(self, network.time)
        else:
            far.take(segment)

    def release(self):
        """The cut may be healed: what was held up arrives, if so."""
        held, self._held = self._held, []
        for segment in held:
            self._arrive(segment)

    def take(self, segment):
        """A segment has arrived: hand it to the process, or answer for one that is no more."""
        loop = self.loop
        if segment is SEG_RESET:
            loop.enter(self.reset)
        elif loop.dead or self.state == p2pchat.CLOSED:
            if segment is not SEG_END or loop.dead:
                self._reset_far()
        elif segment is SEG_ACCEPT:
            loop.enter(self.accepted)
        elif segment is SEG_END:
            loop.enter(self.ended)
        else:
            loop.enter(self.read, segment)

    def _reset_far(self):
        self.state = p2pchat.CLOSED
        self.loop.connections.pop(self, None)
        self.transmit(SEG_RESET)


class SimListener:
    """Takes connections for a process."""

    def __init__(self, loop, address, accept):
        self.loop = loop
        self.address = address
        self.accept = accept

    def close(self):
        """Stop listening."""
        if self.loop.host.listeners.get(self.address[1]) is self:
            del self.loop.host.listeners[self.address[1]]


class SimLan:
    """The beacon sockets of a process."""

    def __init__(self, loop, heard):
        self.loop = loop
        self.heard = heard
        self.port = loop.host.free_port()
        loop.network.lans.append(self)

    def refresh(self):
        """Addresses are looked up with each datagram."""

    def shout(self, data):
        """To everybody who listens, oneself included."""
        for lan in list(self.loop.network.lans):
            self.loop.network.datagram(self, lan, data)

    def hear(self, source, data):
        """A datagram came; the answer goes straight back."""
        if self not in self.loop.network.lans:
            return
        answer = self.heard(data, (source.loop.host.addresses[0], source.port))
        if answer is not None and source in self.loop.network.lans:
            self.loop.network.datagram(self, source, answer)

    def close(self):
        """Hear no more."""
        if self in self.loop.network.lans:
            self.loop.network.lans.remove(self)


def sim_count(census, segment):
    """Add a segment's bytes to the count of each message type in it."""
    for line in segment.splitlines(True):
        kind = line[9:line.index(b'"', 9)].decode()
        census[kind] = census.get(kind, 0) + len(line)


# -- the simulator and the real loop, side by side -----------------------------------------------------
#
# Each script below is played on the real Loop over 127.0.0.1 and on the simulated one, and must give the
# same log: what a simulation proves is worth as much as these agree.


def chat_line(text):
    """One message, as bytes."""
    return p2pchat.create_message("MSG_CHAT", "t@127.0.0.1:1", str(text))


class LoggingHandler(p2pchat.Handler):
    """Writes down what a connection tells its owner. `reactions` maps an event's name to a call."""

    def __init__(self, name, log, **reactions):
        self.name = name
        self.log = log
        self.reactions = reactions
        self.connection = None

    def opened(self):
        self._note("opened", "")

    def received(self, messages):
        self._note("received", " ".join(str(message["content"]) for message in messages))

    def spoilt(self, reason):
        self._note("spoilt", "half" if reason.startswith("half") else "bad")

    def closed(self, reason):
        self._note("closed", "reset" if reason.startswith("connection reset") else reason)

    def _note(self, event, detail):
        self.log.append(f"{self.name} {event} {detail}".strip())
        reaction = self.reactions.get(event)
        if reaction is not None:
            reaction(self.connection)


class LoopScript:
    """What a script plays on: two ends `a` (dials) and `b` (listens), a log, and time."""

    def __init__(self, dialler, listening, run_until):
        self.loop = dialler
        self.listening = listening
        self.run_until = run_until
        self.log = []
        self.a = self.b = None
        self.listener = None

    def accept_with(self, **reactions):
        """Listen; what is accepted becomes `b`."""
        def accept(connection):
            self.b = connection
            handler = LoggingHandler("b", self.log, **reactions)
            handler.connection = connection
            return handler
        self.listener = self.listening.listen("127.0.0.1", 0, accept)

    def dial(self, address=None, timeout=2.0, **reactions):
        """Dial; the connection becomes `a`."""
        handler = LoggingHandler("a", self.log, **reactions)
        self.a = handler.connection = self.loop.connect(address or self.listener.address, handler, timeout)

    def pair(self, a=None, b=None):
        """Two ends, open; the log begins afterwards."""
        self.accept_with(**(b or {}))
        self.dial(**(a or {}))
        self.run_until(lambda: self.b is not None and self.a.state == p2pchat.OPEN)
        self.log.clear()

    def wait(self, *lines):
        """Until the log holds these lines."""
        self.run_until(lambda: all(line in self.log for line in lines))


def real_script():
    loop = p2pchat.Loop()

    def run_until(condition):
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, script.log
            loop.turn(0.05)

    script = LoopScript(loop, loop, run_until)
    return script


def simulated_script():
    network = SimNetwork(1)
    host = network.host("h", "10.0.0.1")
    return LoopScript(network.start(host), network.start(host), lambda condition: network.run_until(condition, 5, 0.001))


def script_order(play):
    """Three messages in three turns."""
    play.pair()
    for text in "one two three".split():
        play.a.send(chat_line(text))
        play.wait(f"b received {text}")
    return ["b received one", "b received two", "b received three"]


def script_one_segment(play):
    """What is queued in one turn comes as one piece."""
    play.pair()
    play.loop.call_later(0, lambda: [play.a.send(chat_line(text)) for text in "xyz"])
    play.wait("b received x y z")
    return ["b received x y z"]


def script_queued_before_open(play):
    """What is sent before the dial has succeeded leaves once it has."""
    play.accept_with()
    play.dial()
    play.a.send(chat_line("early"))
    play.wait("b received early")
    return ["a opened", "b received early"]


def script_close_drains(play):
    """What was queued before a close arrives, though the other side's words are unread."""
    play.pair()
    play.a.send(chat_line("unread") * 50)
    play.b.send(chat_line("last words"))
    play.b.close("enough")
    play.wait("a closed closed by the other side", "b closed enough")
    return ["a received last words", "a closed closed by the other side", "b closed enough"]


def script_abort_drops(play):
    """What was queued in the same turn as an abort does not arrive; closed comes later than the call."""
    play.pair()
    play.a.send(chat_line("never"))
    play.a.abort("changed my mind")
    assert play.log == []
    play.wait("a closed changed my mind", "b closed closed by the other side")
    return ["a closed changed my mind", "b closed closed by the other side"]


def script_closed_once(play):
    """However often it is closed and aborted."""
    play.pair(a={"closed": lambda connection: connection.abort("again")})
    for _ in range(3):
        play.a.close("first")
        play.a.abort("second")
        play.a.send(chat_line("nothing"))
    play.wait("a closed first", "b closed closed by the other side")
    play.b.abort("late")
    return ["a closed first", "b closed closed by the other side"]


def script_refused(play):
    """Nobody listens there."""
    play.accept_with()
    play.listener.close()
    play.dial()
    assert play.log == []
    play.wait(f"a closed {p2pchat.REFUSED}")
    return [f"a closed {p2pchat.REFUSED}"]


def script_abort_of_a_dial(play):
    """A dial that is given up at once: never opened, closed once; close is as good as abort."""
    play.accept_with()
    play.dial()
    play.a.close("not any more")
    play.wait("a closed not any more")
    play.run_until(lambda: play.loop.call_later(0, play.log.append, "later") and "later" in play.log)
    return [line for line in play.log if line.startswith("a opened")] + ["a closed not any more", "later"]


def script_end_of_stream(play):
    """The end of the stream ends a message, too, and the answer still goes out."""
    play.pair(b={"received": lambda connection: connection.send(chat_line("answer"))})
    play.a.send(chat_line("question")[:-1])
    play.a.close("asked")
    play.wait("a closed asked", "b closed closed by the other side")
    return ["b received question", "b closed closed by the other side", "a closed asked"]


def script_half_a_message(play):
    """Half a message, and then nothing."""
    play.pair()
    play.a.send(chat_line("whole") + chat_line("half")[:20])
    play.wait("b closed half a message, and then nothing", "a closed closed by the other side")
    return ["b received whole", "b spoilt half", "a closed closed by the other side",
            "b closed half a message, and then nothing"]


def script_bad_message(play):
    """What comes before a bad line counts, the line does not, and the words about it arrive."""
    play.pair(b={"spoilt": lambda connection: connection.send(chat_line("that was bad"))})
    play.a.send(chat_line("good") + b"bad\n" + chat_line("behind it"))
    play.wait("a closed closed by the other side", "b closed not JSON")
    return ["b received good", "b spoilt bad", "a received that was bad", "a closed closed by the other side",
            "b closed not JSON"]


def script_both_close(play):
    """Both at once."""
    play.pair()
    play.a.send(chat_line("bye from a"))
    play.b.send(chat_line("bye from b"))
    play.a.close("a is done")
    play.b.close("b is done")
    play.wait("a closed a is done", "b closed b is done")
    return ["a closed a is done", "b closed b is done"]


def script_abort_in_handler(play):
    """From within the handler, with more behind it: nothing further comes."""
    play.pair(b={"received": lambda connection: connection.abort("I have heard enough")})
    play.a.send(chat_line("one"))
    play.wait("b closed I have heard enough")
    play.a.send(chat_line("two"))
    play.run_until(lambda: play.a.state == p2pchat.CLOSED)
    play.run_until(lambda: any(line.startswith("a closed") for line in play.log))
    return ["b received one", "b closed I have heard enough", play.log[-1]]


def script_timers(play):
    """By deadline, then in the order in which they were made; what a timer schedules waits a turn."""
    log, later = play.log, play.loop.call_later
    later(0.02, log.append, "second")
    later(0.01, log.append, "first")
    cancelled = later(0.005, log.append, "cancelled")
    later(0, lambda: (log.append("now"), later(0, log.append, "a turn later")))
    later(0, log.append, "now, too")
    cancelled.cancel()
    cancelled.cancel()
    assert not cancelled.active
    play.wait("second")
    return ["now", "now, too", "a turn later", "first", "second"]


LOOP_SCRIPTS = [script_order, script_one_segment, script_queued_before_open, script_close_drains, script_abort_drops,
                script_closed_once, script_refused, script_abort_of_a_dial, script_end_of_stream, script_half_a_message,
                script_bad_message, script_both_close, script_abort_in_handler, script_timers]
LOOP_SCRIPTS_UNORDERED = {script_both_close, script_abort_drops, script_closed_once, script_close_drains,
                          script_end_of_stream, script_bad_message, script_half_a_message}


@pytest.mark.parametrize("make", [real_script, simulated_script])
@pytest.mark.parametrize("script", LOOP_SCRIPTS)
def test_loop_script(script, make, monkeypatch):
    monkeypatch.setattr(p2pchat, "LINE_TIMEOUT", 0.2)
    play = make()
    expected = script(play)
    if script in LOOP_SCRIPTS_UNORDERED:  # the two ends' lines may mix; each end's own order is fixed
        by_end = [[line for line in lines if line.startswith(end)] for lines in (expected, play.log) for end in "ab"]
        assert by_end[:2] == by_end[2:]
    else:
        assert play.log == expected


# -- what only the simulator does ----------------------------------------------------------------------


def sim_pair(network, **reactions):
    """Two hosts, a connection between them: (script, network hosts)."""
    one, two = network.host("one"), network.host("two")
    play = LoopScript(network.start(one), network.start(two), lambda condition: network.run_until(condition, 5, 0.001))
    play.accept_with(**reactions)
    play.listener.address = ("0.0.0.0", play.listener.address[1])
    play.dial((two.addresses[0], play.listener.address[1]))
    play.run_until(lambda: play.b is not None and play.a.state == p2pchat.OPEN)
    play.log.clear()
    return play, one, two


def test_sim_a_cut_connection_is_silent_and_its_data_arrives_after_healing():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    network.cut([one], [two])
    for text in "abc":
        play.a.send(chat_line(text))
        network.run(100)
    assert play.log == [] and play.b.state == p2pchat.OPEN
    network.heal()
    play.a.send(chat_line("d"))
    network.run(61)
    assert play.log == ["b received a", "b received b", "b received c", "b received d"]


def test_sim_a_cut_in_one_direction():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    network.cut([one], [two], both=False)
    play.a.send(chat_line("lost for now"))
    play.b.send(chat_line("arrives"))
    network.run(1)
    assert play.log == ["a received arrives"]


def test_sim_who_gave_up_during_a_cut_ends_the_other_when_it_heals():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    network.cut([one], [two])
    play.a.abort("gave up")
    network.run(100)
    assert play.log == ["a closed gave up"]
    network.heal()
    network.run(61)
    assert play.log == ["a closed gave up", "b closed closed by the other side"]


@pytest.mark.parametrize("obstacle", ["dark", "walled", "cut", "unknown"])
def test_sim_a_dial_into_nothing_times_out(obstacle):
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    two.dark, two.walled = obstacle == "dark", obstacle == "walled"
    if obstacle == "cut":
        network.cut([two], [one], both=False)
    ip = "10.9.9.9" if obstacle == "unknown" else two.addresses[0]
    play.dial((ip, play.listener.address[1]), timeout=3)
    network.run(2.9)
    assert play.log == []
    network.run(0.2)
    assert play.log == ["a closed no answer within 3 s"]


def test_sim_a_frozen_process_takes_connections_and_data_but_runs_nothing():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    frozen = play.b.loop
    frozen.call_later(1, play.log.append, "a timer of b")
    frozen.freeze()
    play.dial((two.addresses[0], play.listener.address[1]))
    play.a.send(chat_line("hello?"))
    network.run(60)
    assert play.log == ["a opened"]
    frozen.thaw()
    assert play.log == ["a opened", "b received hello?", "a timer of b"]


def test_sim_crashes_with_and_without_a_reset():
    for reset in (True, False):
        network = SimNetwork(1)
        play, one, two = sim_pair(network)
        play.b.loop.crash(reset=reset)
        network.run(10)
        assert len(play.log) == reset
        if reset:
            play.dial((two.addresses[0], play.listener.address[1]))
            network.run(1)
            assert play.log[-1] == f"a closed {p2pchat.REFUSED}"
        else:  # the machine is started again: it knows nothing of the connection
            network.plug(two)
            play.a.send(chat_line("are you there?"))
            network.run(10)
            assert play.log == ["a closed reset"]


def test_sim_a_broken_link_is_reset_on_both_sides_and_loses_what_was_under_way():
    network = SimNetwork(1, link_life=5)
    play, one, two = sim_pair(network)
    network.run_until(lambda: len(play.log) == 2, 100)
    assert sorted(play.log) == ["a closed reset", "b closed reset"]


def test_sim_a_new_address_silences_the_old_connections():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    network.move(two, "10.7.7.7")
    play.a.send(chat_line("x"))
    network.run(5)
    assert play.log == []
    play.dial(("10.7.7.7", play.listener.address[1]))
    network.run(1)
    assert play.log == ["a opened"]


def test_sim_a_jump_of_the_clock_fires_what_is_due():
    network = SimNetwork(1)
    loop, fired = network.start(network.host("h")), []
    loop.call_later(100, fired.append, "in 100 s")
    loop.call_later(3600, fired.append, "in an hour")
    before = loop.now()
    loop.jump(200)
    network.run(0.001)
    assert fired == ["in 100 s"] and loop.now() - before > 200
    loop.jump(-50, wall=7200)
    network.run(3449)
    assert fired == ["in 100 s"]
    network.run(2)
    assert fired == ["in 100 s", "in an hour"]


def test_sim_a_reader_that_does_not_read_is_cut_off():
    network = SimNetwork(1)
    play, one, two = sim_pair(network)
    play.b.loop.freeze()
    for _ in range(60):
        play.a.send(chat_line("x" * 10_000))
        network.run(0.1)
    assert play.log == []
    network.run(p2pchat.STALL_TIMEOUT)
    assert play.log == ["a closed it does not read what it is sent"]


def test_sim_segments_never_overtake_each_other():
    network = SimNetwork(1, delay=(0.001, 0.5))
    play, one, two = sim_pair(network)
    for number in range(200):
        play.a.send(chat_line(number))
        network.run(0.01)
        if number == 50:
            network.cut([one], [two])
        elif number == 150:
            network.heal()
    network.run(10)
    words = " ".join(line.replace("b received ", "") for line in play.log).split()
    assert words == [str(number) for number in range(200)]


def test_sim_an_exception_in_a_handler_fails_the_test():
    network = SimNetwork(1)
    network.start(network.host("h")).call_later(1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.run(2)


SIM_TRACE_PROGRAM = """
import test_p2pchat as t
print(t.sim_trace_of_a_mess(7))
"""


def sim_trace_of_a_mess(seed):
    """The trace of a network in which much goes wrong."""
    network = SimNetwork(seed, delay=(0.001, 0.3), link_life=20, lan_loss=0.2, trace=True)
    hosts = [network.host(f"h{number}") for number in range(8)]
    nodes = []
    for host in hosts:
        loop = network.start(host)
        nodes.append(p2pchat.PeerNode(loop, p2pchat.Settings(username=host.name), lambda event: None))
        nodes[-1].start()
    network.run(15)
    network.cut(hosts[:3], hosts[3:])
    network.run(20)
    network.heal()
    nodes[0].loop.crash()
    nodes[1].loop.freeze()
    network.run(15)
    nodes[1].loop.thaw()
    nodes[2].chat("hello")
    network.run(10)
    return network.trace()


def test_sim_same_seed_same_trace():
    """Within one process, and in another, whose hashes of strings are others."""
    here = sim_trace_of_a_mess(7)
    assert here == sim_trace_of_a_mess(7) != sim_trace_of_a_mess(8)
    environment = dict(os.environ, PYTHONHASHSEED="99", PYTHONPATH=os.path.dirname(os.path.abspath(__file__)))
    there = subprocess.run([sys.executable, "-c", SIM_TRACE_PROGRAM], env=environment, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, timeout=30)
    assert there.stdout.decode().strip() == here, there.stderr.decode()


# -- the real loop ---------------------------------------------------------------------------------------


class LoopRig:
    """A real loop, one connection of the program's at one end, a plain socket at the other."""

    def __init__(self, small_buffers=False):
        self.loop = p2pchat.Loop()
        self.log = []
        self.handler = LoggingHandler("c", self.log)
        self.sockets = []
        ours, self.far = self._small_pair() if small_buffers else self.tcp_pair()
        self.connection = p2pchat.SocketConnection(self.loop, ours, ("127.0.0.1", 1), p2pchat.OPEN)
        self.connection.handler = self.handler

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.connection.abort("the test is over")
        for sock in self.sockets:
            sock.close()
        self.loop.close()

    def _small_pair(self):
        """Two ends with tiny kernel buffers (TCP's grow by themselves, and crawl when they may not)."""
        self.sockets += socket.socketpair()
        for sock in self.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return self.sockets

    def tcp_pair(self):
        """Two ends of a connection over the loopback."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            far = socket.create_connection(listener.getsockname())
            ours = listener.accept()[0]
        far.settimeout(5)
        self.sockets += [ours, far]
        return ours, far

    def turn_until(self, condition, limit=5.0):
        """Turn until it holds; fails after `limit` seconds."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit} s: {self.log}"
            self.loop.turn(0.02)

    def read(self, size):
        """What has arrived at the far end, at most so many bytes; None at the end of the stream."""
        self.far.setblocking(False)
        try:
            return self.far.recv(size) or None
        except BlockingIOError:
            return b""

    def read_all(self, size=None):
        """What arrives at the far end, until the end of the stream or so many bytes, while the loop turns."""
        pieces = []

        def more():
            pieces.append(self.read(100_000))
            return pieces[-1] is None or size is not None and sum(map(len, pieces)) >= size
        self.turn_until(more, 10)
        return b"".join(piece for piece in pieces if piece)


def test_loop_partial_writes_arrive_whole_and_in_order():
    with LoopRig(small_buffers=True) as rig:
        lines = [chat_line(f"{number} {'x' * 1000}") for number in range(300)]
        for line in lines:
            rig.connection.send(line)
        rig.loop.turn(0)
        assert rig.connection.state == p2pchat.OPEN and not rig.log
        assert rig.read_all(sum(map(len, lines))) == b"".join(lines)
        rig.connection.close("all said")
        assert rig.read_all() == b""
        rig.far.close()
        rig.turn_until(lambda: rig.log == ["c closed all said"])


def test_loop_reads_byte_by_byte():
    with LoopRig() as rig:
        for byte in chat_line("slowly") + chat_line("but surely"):
            rig.far.send(bytes([byte]))
            rig.loop.turn(1)
        assert rig.log == ["c received slowly", "c received but surely"]


def test_loop_reset_by_the_far_end():
    with LoopRig() as rig:
        rig.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rig.far.close()
        rig.turn_until(lambda: rig.log == ["c closed reset"])


def test_loop_a_reader_that_stalls_is_cut_off(monkeypatch):
    monkeypatch.setattr(p2pchat, "STALL_TIMEOUT", 0.2)
    with LoopRig(small_buffers=True) as rig:
        rig.connection.send(b"x" * 1_000_000)
        rig.turn_until(lambda: rig.log == ["c closed it does not read what it is sent"])


def test_loop_a_reader_that_is_slow_is_not(monkeypatch):
    monkeypatch.setattr(p2pchat, "STALL_TIMEOUT", 0.3)
    with LoopRig(small_buffers=True) as rig:
        rig.connection.send(b"x" * 200_000)
        begin, received = time.monotonic(), 0
        while time.monotonic() < begin + 1.0:
            received += len(rig.read(2000))
            rig.loop.turn(0.02)
        assert rig.log == [] and 0 < received < 200_000


def test_loop_output_is_bounded(monkeypatch):
    monkeypatch.setattr(p2pchat, "MAX_OUTPUT", 100_000)
    with LoopRig() as rig:
        for _ in range(11):
            rig.connection.send(b"x" * 10_000)
        rig.turn_until(lambda: rig.log == ["c closed it does not read what it is sent"])


def test_loop_last_words_arrive_though_input_is_unread():
    """miniircd loses them: a close with input unread makes the kernel reset the connection."""
    with LoopRig() as rig:
        rig.handler.reactions["received"] = lambda: None
        rig.far.sendall(b"rubbish\n" + chat_line("unread") * 5000)
        rig.handler.reactions = {"spoilt": lambda _: rig.connection.send(chat_line("that was rubbish"))}
        assert rig.read_all() == chat_line("that was rubbish")
        rig.far.close()
        rig.turn_until(lambda: rig.log == ["c spoilt bad", "c closed not JSON"])


def test_loop_draining_ends_though_the_far_end_says_nothing(monkeypatch):
    monkeypatch.setattr(p2pchat, "DRAIN_TIMEOUT", 0.1)
    with LoopRig() as rig:
        rig.connection.close("bye")
        rig.turn_until(lambda: rig.log == ["c closed bye"])


@pytest.mark.parametrize("pieces", [1, 30])
def test_loop_half_a_message(monkeypatch, pieces):
    """Whether it comes at once or a byte at a time: it must be whole in time."""
    monkeypatch.setattr(p2pchat, "LINE_TIMEOUT", 0.2)
    with LoopRig() as rig:
        half = chat_line("half")[:30]
        size = len(half) // pieces
        for start in range(0, len(half), size):
            if rig.connection.state == p2pchat.OPEN:
                rig.far.send(half[start:start + size])
                rig.loop.turn(0.02)
        rig.turn_until(lambda: rig.log == ["c spoilt half"] and rig.connection.state != p2pchat.OPEN)


def test_loop_an_exception_costs_only_its_connection(caplog):
    with LoopRig() as rig, LoopRig() as other:
        other.connection.abort("not needed")
        second = p2pchat.SocketConnection(rig.loop, other.tcp_pair()[0], ("127.0.0.1", 1), p2pchat.OPEN)
        second.handler = LoggingHandler("second", rig.log, received=lambda _: 1 / 0)
        fired = []
        rig.loop.call_later(0, lambda: 1 / 0)
        rig.loop.call_later(0, fired.append, "still")
        for sock in (rig.far, other.sockets[-1]):
            sock.sendall(chat_line("hi"))
        rig.turn_until(lambda: "second closed an error in the program" in rig.log)
        assert "c received hi" in rig.log and fired == ["still"] and rig.connection.state == p2pchat.OPEN
        assert "ZeroDivisionError" in caplog.text or not p2pchat.log.propagate


def test_loop_accepting_pauses_when_descriptors_are_used_up(monkeypatch):
    """Those who are connected go on, nothing spins, and the newcomers get in once there is room."""
    monkeypatch.setattr(p2pchat, "ACCEPT_PAUSE", 0.1)
    with LoopRig() as rig:
        accepted, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
        listener = rig.loop.listen("127.0.0.1", 0, loop_taker(accepted))
        dialled = [socket.create_connection(listener.address) for _ in range(3)]
        rig.sockets += dialled
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (dialled[-1].fileno() + 1, limits[1]))
            turns = loop_turns_in(rig.loop, 0.35)
            rig.far.sendall(chat_line("still here"))
            rig.turn_until(lambda: rig.log == ["c received still here"])
            assert accepted == [] and turns < 30
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        rig.turn_until(lambda: len(accepted) == 3)
        for connection in accepted:
            connection.abort("the test is over")
        listener.close()


def loop_taker(accepted):
    """Accepts everybody, and keeps the connections in a list."""
    return lambda connection: accepted.append(connection) or p2pchat.Handler()


def loop_turns_in(loop, seconds):
    """How often a loop turns in so many seconds."""
    deadline, turns = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        loop.turn(deadline - time.monotonic())
        turns += 1
    return turns


def test_loop_does_not_turn_for_nothing():
    with LoopRig() as rig:
        rig.far.sendall(chat_line("x"))
        rig.connection.send(chat_line("y"))
        assert loop_turns_in(rig.loop, 0.2) <= 4


def test_loop_a_signal_wakes_it():
    with LoopRig() as rig:
        former = signal.getsignal(signal.SIGUSR1)
        heard = []
        try:
            rig.loop.on_signal(signal.SIGUSR1, lambda: heard.append("signal"))
            program = f"import os; os.kill({os.getpid()}, {int(signal.SIGUSR1)})"
            child = subprocess.Popen([sys.executable, "-c", program])
            rig.turn_until(lambda: heard == ["signal"], 10)
            child.wait(10)
        finally:
            signal.signal(signal.SIGUSR1, former)


def test_loop_refuses_an_address_that_is_in_use():
    with LoopRig() as rig:
        listener = rig.loop.listen("127.0.0.1", 0, lambda connection: None)
        with pytest.raises(OSError) as caught:
            rig.loop.listen("127.0.0.1", listener.address[1], lambda connection: None)
        assert caught.value.errno == errno.EADDRINUSE
        listener.close()


def test_loop_a_burst_of_connections_is_taken_at_once():
    with LoopRig() as rig:
        accepted = []
        listener = rig.loop.listen("127.0.0.1", 0, loop_taker(accepted))
        rig.sockets += [socket.create_connection(listener.address) for _ in range(200)]
        begin = time.monotonic()
        rig.turn_until(lambda: len(accepted) == 200)
        assert time.monotonic() - begin < 2
        for connection in accepted:
            connection.abort("the test is over")
        listener.close()


# -- discovery server ----------------------------------------------------------------------------------


class ServerRig:
    """A server on the simulated network, and clients that speak the bare protocol."""

    def __init__(self, **settings):
        self.network = SimNetwork(delay=(0.001, 0.002))
        self.loop = self.network.start(self.network.host("server", "10.0.0.100"))
        self.server = p2pchat.DiscoveryServer(self.loop, p2pchat.ServerSettings(**settings))
        self.server.start()

    def client(self, ip="10.0.0.1", host=None):
        """A connection to the server, open."""
        host = host or self.network.by_ip.get(ip) or self.network.host(ip, ip)
        client = ServerClient()
        address = ("127.0.0.1" if host is self.loop.host else "10.0.0.100", 9999)
        client.connection = self.network.start(host).connect(address, client, 5.0)
        self.network.run(0.01)
        assert client.connection.state == "open"
        return client

    def registered(self, name, ip="10.0.0.1", port=5000, **content):
        """A client that has registered and been answered."""
        client = self.client(ip)
        client.say("MSG_REGISTER", {"username": name, "port": port, **content})
        self.network.run(0.1)
        return client


class ServerClient(p2pchat.Handler):
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []
        self.ended = None
        self.id = "somebody"

    def received(self, messages):
        self.heard += messages
        for message in messages:
            if message["type"] == "MSG_REGISTER_ACK":
                self.id = message["content"]["peer_id"]

    def closed(self, reason):
        self.ended = reason

    def say(self, kind, content, sender=None):
        self.connection.send(p2pchat.create_message(kind, sender or self.id, content))

    def take(self, kind):
        """The contents of all messages of a type heard since the last time."""
        taken = [message["content"] for message in self.heard if message["type"] == kind]
        self.heard = [message for message in self.heard if message["type"] != kind]
        return taken


def test_server_registers_introduces_and_tells_the_others():
    rig = ServerRig()
    alice = rig.registered("Alice", "10.0.0.1", instance="a1", incarnation=7)
    assert alice.take("MSG_REGISTER_ACK") == [{"peer_id": "Alice@10.0.0.1:5000", "peer_list": [
        {"id": "Alice@10.0.0.1:5000", "ip": "10.0.0.1", "port": 5000, "username": "Alice", "instance": "a1",
         "incarnation": 7}]}]
    bob = rig.registered("Bob", "10.0.0.2")
    assert [peer["id"] for peer in bob.take("MSG_REGISTER_ACK")[0]["peer_list"]] == [alice.id, "Bob@10.0.0.2:5000"]
    (update,) = alice.take("MSG_PEER_LIST_UPDATE")
    assert [peer["id"] for peer in update["joined"]] == [bob.id] and update["left"] == []
    assert bob.take("MSG_PEER_LIST_UPDATE") == []


def test_server_a_second_registration_replaces_the_first():
    rig = ServerRig()
    first = rig.registered("Alice", instance="a1")
    second = rig.registered("Alice", instance="a2")
    rig.network.run(1)
    assert first.ended and first.take("MSG_ERROR")
    assert second.ended is None and rig.server.peer_ids == ["Alice@10.0.0.1:5000"]


def test_server_the_same_peer_under_another_name():
    rig = ServerRig()
    bob, alice = rig.registered("Bob", "10.0.0.2"), rig.registered("Alice")
    bob.take("MSG_PEER_LIST_UPDATE")
    alice.say("MSG_REGISTER", {"username": "Alicia", "port": 5000})
    rig.network.run(0.1)
    (update,) = bob.take("MSG_PEER_LIST_UPDATE")
    assert [peer["username"] for peer in update["joined"]] == ["Alicia"]
    assert [(gone["id"], gone["reason"]) for gone in update["left"]] == [("Alice@10.0.0.1:5000", "renamed")]


def leave_by_word(rig, peer):
    peer.say("MSG_UNREGISTER", None)


def leave_by_breaking(rig, peer):
    peer.connection.abort("gone")


def leave_by_silence(rig, peer):
    peer.connection.loop.freeze()


@pytest.mark.parametrize("leave, reason, within", [
    (leave_by_word, "left", 0.1), (leave_by_breaking, "connection lost", 0.1), (leave_by_silence, "timed out", 40.1)])
def test_server_tells_who_left_and_why(leave, reason, within):
    rig = ServerRig()
    alice, bob = rig.registered("Alice"), rig.registered("Bob", "10.0.0.2")
    alice.take("MSG_PEER_LIST_UPDATE")
    leave(rig, bob)
    for _ in range(int(within * 10)):
        alice.say("MSG_HEARTBEAT", None)
        rig.network.run(0.1)
    (update,) = alice.take("MSG_PEER_LIST_UPDATE")
    assert update["joined"] == [] and [gone["id"] for gone in update["left"]] == ["Bob@10.0.0.2:5000"]
    assert update["left"][0]["reason"].startswith(reason)
    assert rig.server.peer_ids == ["Alice@10.0.0.1:5000"] and alice.take("MSG_HEARTBEAT") != []


def test_server_answers_anybody_who_asks_for_the_list():
    rig = ServerRig()
    rig.registered("Alice")
    asker = rig.client("10.0.0.9")
    asker.say("MSG_SYNC_PEERS_REQUEST", None, "nobody")
    rig.network.run(0.1)
    assert [peer["id"] for peer in asker.take("MSG_SYNC_PEERS_RESPONSE")[0]["peer_list"]] == ["Alice@10.0.0.1:5000"]


@pytest.mark.parametrize("kind, sender", [("MSG_HEARTBEAT", "Bob@10.0.0.2:5000"), ("MSG_UNREGISTER", "Bob@10.0.0.2:5000"),
                                          ("MSG_UNREGISTER", "")])
def test_server_nobody_speaks_for_another(kind, sender):
    rig = ServerRig()
    rig.registered("Bob", "10.0.0.2")
    mallory = rig.registered("Mallory", "10.0.0.3")
    mallory.say(kind, None, sender or "x")
    rig.network.run(1)
    assert mallory.take("MSG_ERROR") and mallory.ended and rig.server.peer_ids == ["Bob@10.0.0.2:5000"]


@pytest.mark.parametrize("kind", ["MSG_HEARTBEAT", "MSG_UNREGISTER"])
def test_server_who_has_not_registered_is_told_to(kind):
    rig = ServerRig()
    stranger = rig.client()
    stranger.say(kind, None)
    rig.network.run(1)
    assert "register" in stranger.take("MSG_ERROR")[0]["reason"] and stranger.ended


@pytest.mark.parametrize("claimed, introduced", [
    ("10.0.0.100", "10.0.0.100"), (None, "10.0.0.100"), ("8.8.8.8", "10.0.0.100"), ("127.0.0.1", "127.0.0.1"), (5, "10.0.0.100")])
def test_server_a_peer_on_its_own_machine_is_introduced_at_an_address_that_others_reach(claimed, introduced):
    rig = ServerRig()
    local = rig.client(host=rig.loop.host)
    local.say("MSG_REGISTER", {"username": "Alice", "port": 5000, "ip": claimed})
    rig.network.run(0.1)
    assert local.id == f"Alice@{introduced}:5000"


def test_server_believes_no_address_from_afar():
    rig = ServerRig()
    assert rig.registered("Alice", ip="10.0.0.1", **{}).id == "Alice@10.0.0.1:5000"
    liar = rig.client("10.0.0.3")
    liar.say("MSG_REGISTER", {"username": "Bob", "port": 5000, "ip": "10.0.0.1"})
    rig.network.run(0.1)
    assert liar.id == "Bob@10.0.0.3:5000"


def test_server_silent_strangers_are_sent_away_and_bounded(monkeypatch):
    monkeypatch.setattr(p2pchat, "MAX_STRANGERS", 5)
    rig = ServerRig()
    rig.server._strangers = p2pchat.Strangers(5)
    silent = [rig.client("10.0.0.9") for _ in range(8)]
    rig.network.run(0.1)
    assert [client.ended is not None for client in silent] == [True] * 3 + [False] * 5
    rig.network.run(45)
    assert all(client.ended for client in silent)
    assert rig.registered("Alice").id == "Alice@10.0.0.1:5000"


def test_server_a_thousand_at_once_cost_each_of_them_little():
    """Linear in the news: what a newcomer receives is near the size of the list that it must learn."""
    rig = ServerRig()
    first = rig.registered("First", "10.0.9.9")
    first.heard.clear()
    clients = [rig.client(f"10.0.{number // 200 + 1}.{number % 200 + 1}") for number in range(300)]
    for client in clients:
        client.say("MSG_REGISTER", {"username": "x", "port": 5000})
    rig.network.run(1)
    assert len(rig.server.peer_ids) == 301
    assert len(first.heard) <= 5, "the joins were gathered"
    learned = {peer["id"] for message in first.heard for peer in message["content"]["joined"]}
    assert learned == {client.id for client in clients}


def test_server_a_beacon_is_answered_by_no_more_than_it_brought():
    rig = ServerRig()
    question = {"role": "peer", "port": 5, "instance": "a", "server_wanted": True}
    for size in (150, 300, 512):
        data = p2pchat.make_beacon("Alice@10.0.0.1:5", question, size)
        answer = rig.server._beacon(data, ("10.0.0.1", 5))
        assert len(answer or b"") <= len(data)
        if answer:
            assert p2pchat.parse_message(answer)["content"] == {"role": "server", "port": 9999}
    content = dict(question, server_wanted=False)
    assert rig.server._beacon(p2pchat.make_beacon("a", content, 512), ("10.0.0.1", 5)) is None
    assert rig.server._beacon(b"garbage", ("10.0.0.1", 5)) is None


# ======================================================================================================
# Scenarios
#
# What the network of peers must show, on the simulator. A scenario is a function of a seed and of sizes;
# it returns figures, and fails by AssertionError. The suite runs each with few seeds and small sizes;
# `python test_p2pchat.py simulate --seeds 300` runs them as the issues ask, and prints the figures.
#
# The Witness checks, at every event of every peer, what must always hold: who is told of as gone is gone,
# no ghost returns, nothing is shown twice or out of order. When a scenario ends, it checks that every
# message was either shown or reported to its sender.
# ======================================================================================================




CRASH_KNOWN = 15.0  # seconds in which a crash must be known to all
LEAVE_KNOWN = 2.0  # and a leave
SIM_SERVER = "10.200.0.1"


class Witness:
    """What happened to every message and every peer, and whether that may be."""

    def __init__(self):
        self.peers = {}  # SimPeer by instance
        self.strict = True  # whether nobody living may be removed
        self.sent = {}  # (message id, receiver's instance) -> (sender, text)
        self.shown = {}  # the same -> when
        self.failed = {}
        self.delivered = set()
        self.last = collections.defaultdict(int)  # (sender's, receiver's instance) -> sequence last shown
        self.detection = collections.defaultdict(float)  # "crash", "leave" -> longest time until somebody knew

    def on_sent(self, peer, event):
        for receiver in event["receivers"]:
            self.sent[event["id"], peer.known[receiver]] = (peer, event["text"])

    def on_chat(self, peer, event):
        key = (event["id"], peer.instance)
        sender, number = event["id"].split("-")
        assert key in self.sent, f"{peer} was shown {event}, which was not sent to it"
        assert self.sent[key][1] == event["text"]
        assert key not in self.shown, f"{peer} was shown {event['id']} twice"
        assert int(number) > self.last[sender, peer.instance], f"{peer} was shown {event['id']} out of order"
        self.last[sender, peer.instance] = int(number)
        self.shown[key] = peer.world.network.time

    def on_delivered(self, peer, event):
        key = (event["id"], peer.known[event["to"]["id"]])
        assert key in self.shown, f"{peer} believes {key} delivered, but it was not shown"
        assert key not in self.failed and key not in self.delivered, f"{key} has two ends"
        self.delivered.add(key)

    def on_failed(self, peer, event):
        key = (event["id"], peer.known[event["to"]["id"]])
        assert key in self.sent, f"{peer} reports {key}, which it has not sent"
        assert key not in self.failed and key not in self.delivered, f"{key} has two ends"
        self.failed[key] = event["reason"]

    def on_joined(self, peer, event):
        key = event["peer"]["id"]
        instance = peer.known[key] = peer.node.peers.get(key).instance
        other = self.peers.get(instance)
        if other is None or other.died is None:
            return
        since = peer.world.network.time - other.died
        # What it said of itself in its last seconds may still be on its way; what it said before may not count.
        old = peer.node.peers.by_key(instance).incarnation <= peer.removed.get(instance, -1)
        assert not old, f"{peer}: {other}, gone for {since:.1f} s, was brought back"
        if self.strict:
            # A server knows of a death only when it misses heartbeats, and may introduce a ghost to a newcomer.
            late = since > CRASH_KNOWN and peer.world.by != "server"
            assert not late, f"{peer} is told of {other}, gone for {since:.1f} s"
            peer.world.network.post(CRASH_KNOWN, peer.must_have_noticed, other)

    def on_renamed(self, peer, event):
        if event["peer"]["id"] != peer.node.me.id:
            peer.known[event["peer"]["id"]] = peer.node.peers.get(event["peer"]["id"]).instance

    def on_left(self, peer, event):
        instance = peer.known[event["peer"]["id"]]
        peer.removed[instance] = peer.node.peers.by_key(instance).incarnation
        other = self.peers.get(instance)
        if other is None:
            return
        if other.died is None:
            assert not self.strict, f"{peer} removed {other}, which lives: {event['reason']}"
            return
        kind = "leave" if other.left else "crash"
        self.detection[kind] = max(self.detection[kind], peer.world.network.time - other.died)

    def check_messages(self):
        """At the end: each message of a sender that lived was shown or reported. Returns the figures."""
        both = 0
        for key, (sender, text) in self.sent.items():
            shown, failed = key in self.shown, key in self.failed
            both += shown and failed
            if not (shown or failed or (sender.died is not None and not sender.left)):
                raise AssertionError(f"{sender}: {text!r} ({key}) to {self.peers[key[1]]} was lost in silence")
        return {"messages": len(self.sent), "shown": len(self.shown), "failed": len(self.failed), "both": both}


class SimPeer:
    """A peer on the simulated network, and what its interface was told."""

    def __init__(self, world, machine, username, **settings):
        self.world = world
        self.host = machine
        self.known = {}  # peer ids, and whose they were last
        self.removed = {}  # instances, and their incarnation when they were removed
        self.log = []  # events
        self.born = world.network.time
        self.died = None  # when it crashed, or began to leave
        self.left = False
        self.loop = world.network.start(machine, username)
        self.node = p2pchat.PeerNode(self.loop, p2pchat.Settings(username=username, **settings), self._event)
        self.instance = self.node.me.instance
        world.witness.peers[self.instance] = self
        self.loop.enter(self.node.start)

    def __repr__(self):
        return f"[seed {self.world.network.seed}, {self.world.network.time:.2f} s] {self.node.me.id}"

    def _event(self, event):
        if self.world.keep_log:
            self.log.append((self.world.network.time, event))
        note = getattr(self.world.witness, f"on_{event['event']}", None)
        if note is not None:
            note(self, event)

    def saw(self, kind, **keys):
        """The events of one kind that have these values."""
        return [event for _, event in self.log
                if event["event"] == kind and all(event[key] == value for key, value in keys.items())]

    def sees(self):
        """The instances of those it holds to be present."""
        return {peer.instance for peer in self.node.present()}

    def chat(self, text, to=None):
        """Send; None if nobody is there to receive."""
        if to is not None and self.node.peers.by_key(to.instance) not in self.node.present():
            return None
        if not self.node.present():
            return None
        return self.node.chat(text, self.node.peers.by_key(to.instance).id if to else None)

    def must_have_noticed(self, gone):
        """By now it must know, if it runs, that another is gone."""
        if self.died is None:
            how = "left" if gone.left else "crashed"
            assert gone.instance not in self.sees(), f"{self} still sees {gone}, which {how} at {gone.died:.2f} s"

    def leave(self):
        """Go, saying so."""
        self.died, self.left = self.world.network.time, True
        self.loop.enter(self.node.leave)
        self.world.network.post(self.node.settings.timeout + 5, self.loop.crash)

    def crash(self, reset=True):
        """Go without a word."""
        self.died = self.world.network.time
        self.loop.crash(reset=reset)

    def restart(self, same_address=True):
        """The same user again: another process, at the same id or at another address."""
        self.world.network.plug(self.host)
        port = self.node.me.port
        if not same_address:
            self.world.move(self)
            port = 0
        settings = self.node.settings._replace(port=port)._asdict()
        peer = SimPeer(self.world, self.host, **settings)
        self.world.peers.append(peer)
        return peer


class SimWorld:
    """A network with peers on it, who find each other `by` beacons ("lan"), a "server", or "join"."""

    def __init__(self, seed, count=0, by="lan", keep_log=True, gossip_interval=5.0, **network):
        self.network = SimNetwork(seed, **network)
        self.random = random.Random(f"scenario {seed}")
        self.witness = Witness()
        self.keep_log = keep_log
        self.by = by
        self.gossip_interval = gossip_interval
        self.numbers = itertools.count(1)
        self.peers = []
        self.server = None
        if by == "server":
            self.start_server()
        for _ in range(count):
            self.add()

    def start_server(self):
        """A discovery server, at its usual address."""
        host = self.network.hosts.get("server") or self.network.host("server", SIM_SERVER)
        host.dark = False
        loop = self.network.start(host)
        self.server = p2pchat.DiscoveryServer(loop, p2pchat.ServerSettings(lan=False))
        loop.enter(self.server.start)

    def add(self, username=None, **settings):
        """A peer on a machine of its own."""
        username = username or f"u{next(self.numbers)}"
        ways = {"lan": {}, "server": {"server": (SIM_SERVER, p2pchat.DEFAULT_PORT)}, "none": {"lan": False},
                "join": {"lan": False, "join": tuple(peer.node.me.address for peer in self.peers[:2])}}
        settings = {"gossip_interval": self.gossip_interval, **ways[self.by], **settings}
        peer = SimPeer(self, self.network.host(f"host of {username}"), username, **settings)
        self.peers.append(peer)
        return peer

    def add_settled(self, count):
        """Many peers that know each other already, as after a long time."""
        added = [self.add() for _ in range(count)]
        records = [peer.node.me.wire(0) for peer in added]
        for peer in added:
            for record in records:
                if record["instance"] != peer.instance:
                    peer.known[record["id"]] = record["instance"]
                    peer.node.peers.hear(record, peer.loop.now())
        return added

    def move(self, peer):
        """Its machine gets an address that nobody has had."""
        number = next(self.numbers)
        self.network.move(peer.host, f"10.77.{number // 250}.{number % 250 + 1}")

    def living(self):
        """Those who have neither crashed nor begun to leave."""
        return [peer for peer in self.peers if peer.died is None]

    def agreed(self, peers=None):
        """Whether each of these sees all the others, and nobody else."""
        peers = self.living() if peers is None else peers
        everybody = {peer.instance for peer in peers}
        return all(peer.sees() | {peer.instance} == everybody for peer in peers)

    def settle(self, limit=60.0, peers=None):
        """Until all see all; return how long that took."""
        return self.network.run_until(lambda: self.agreed(peers), limit, 0.25)

    def chatter(self, mean_gap, until):
        """Somebody says something now and then, to all or to one, sometimes in a burst."""
        def speak():
            if self.network.time < until:
                self.network.post(self.random.expovariate(1 / mean_gap), speak)
                peers = self.living()
                speaker, listener = self.random.sample(peers, 2)
                for number in range(self.random.choice((1, 1, 1, 7))):
                    text = f"{number} at {self.network.time:.3f}"
                    speaker.loop.enter(speaker.chat, text, self.random.choice((None, listener)))
        self.network.post(self.random.expovariate(1 / mean_gap), speak)

    def finish(self, calm=60.0):
        """Everything is mended; a while later all agree, and no message is unaccounted for."""
        self.network.link_life = None
        self.network.heal()
        for peer in self.living():
            if peer.loop.frozen:
                peer.loop.thaw()
        self.network.run(calm)
        assert self.agreed(), self.disagreement()
        return self.witness.check_messages()

    def disagreement(self):
        """Who misses or imagines whom, in words."""
        everybody = {peer.instance: peer for peer in self.living()}
        lines = [f"seed {self.network.seed}, at {self.network.time:.1f} s:"]
        for peer in self.living():
            missing = [everybody[each].node.me.id for each in set(everybody) - peer.sees() - {peer.instance}]
            ghosts = [self.witness.peers[each].node.me.id for each in peer.sees() - set(everybody)]
            if missing or ghosts:
                lines.append(f"{peer.node.me.id} misses {missing}, has ghosts {ghosts}")
        return "\n".join(lines)


# -- 1. a newcomer ---------------------------------------------------------------------------------------


def ideal_push_pull(seed, size):
    """Rounds until all of `size` nodes know what one of them knows, if each exchanges what it knows with one
    random other once an interval, at a random offset of its own."""
    rng = random.Random(f"ideal {seed}")
    known = [False] * size
    known[rng.randrange(size)] = True
    turns = sorted((rng.random(), node) for node in range(size))
    for interval in itertools.count():
        for offset, node in turns:
            other = (node + rng.randrange(1, size)) % size
            if known[node] != known[other]:
                known[node] = known[other] = True
                if all(known):
                    return interval + offset


def scenario_newcomer(seed, size=16, limit=15.0):
    """A newcomer that knows one of many peers, and no server: rounds until all know it, and it knows all."""
    world = SimWorld(seed, by="none", keep_log=False)
    settled = world.add_settled(size)
    world.network.run(12)
    begin = world.network.time
    contact = world.random.choice(settled)
    newcomer = world.add(join=(contact.node.me.address,))
    unaware = set(settled)

    def all_know():
        unaware.difference_update([peer for peer in unaware if peer.node.peers.by_key(newcomer.instance)])
        return not unaware

    world.network.run_until(all_know, limit * world.gossip_interval, 0.02)
    rounds = (world.network.time - begin) / world.gossip_interval
    world.network.run_until(lambda: len(newcomer.node.peers) == size, limit * world.gossip_interval, 0.02)
    knows_all = (world.network.time - begin) / world.gossip_interval
    return {"rounds": rounds, "ideal": ideal_push_pull(seed, size + 1), "knows all": knows_all}


def scenario_hundred(seed, size=100):
    """100 peers and a newcomer: known to all within 15 rounds; then one leaves, and nobody brings it back."""
    world = SimWorld(seed, by="none", keep_log=False)
    settled = world.add_settled(size)
    world.network.run(5)
    newcomer = world.add(join=(world.random.choice(settled).node.me.address,))
    took = world.settle(15 * world.gossip_interval)
    leaver = world.random.choice(settled)
    leaver.leave()
    gone = world.settle(15 * world.gossip_interval)
    world.network.run(60)
    assert world.agreed(), world.disagreement()
    assert newcomer.died is None
    return {"known after s": took, "left after s": gone}


# -- 2. churn --------------------------------------------------------------------------------------------


def churn_plan(world, crashes, leaves, restarts, span):
    """When what happens: at random times, far enough from the end to be seen by all."""
    events = ["crash"] * crashes + ["leave"] * leaves + ["restart"] * restarts
    world.random.shuffle(events)
    times = sorted(30 + world.random.random() * span for _ in events)
    for when, event in zip(times, events):
        world.network.post(when, churn_event, world, event)


def churn_event(world, event):
    """One peer goes, and perhaps comes again."""
    peer = world.random.choice([each for each in world.living() if world.network.time - each.born > 10])
    if event == "leave":
        peer.leave()
        world.network.post(LEAVE_KNOWN, churn_must_be_known, world, peer)
        return
    peer.crash(reset=world.random.random() < 0.5)
    world.network.post(CRASH_KNOWN, churn_must_be_known, world, peer)
    if event == "restart":
        world.network.post(1 + 20 * world.random.random(), peer.restart, world.random.random() < 0.5)


def churn_must_be_known(world, gone):
    """By now nobody who was there holds it to be there."""
    for peer in world.living():
        if peer.born < gone.died:
            peer.must_have_noticed(gone)


def scenario_churn(seed, size=50, minutes=60, crashes=10, leaves=10, restarts=10, link_life=600.0):
    """Links break at random, packets take up to 500 ms, peers crash, leave and come again."""
    by = ("lan", "server", "join")[seed % 3]
    world = SimWorld(seed, size, by=by, keep_log=False, delay=(0.001, 0.5), link_life=link_life, lan_loss=0.1)
    world.settle(120)
    churn_plan(world, crashes, leaves, restarts, minutes * 60 - 90)
    world.chatter(mean_gap=10.0, until=world.network.time + minutes * 60 - 30)
    world.network.run(minutes * 60)
    figures = world.finish()
    detection = world.witness.detection
    return {"crash max": detection["crash"], "leave max": detection["leave"], **figures}


# -- 3. partitions ---------------------------------------------------------------------------------------


def scenario_halves(seed, size=20, minutes=10):
    """Cut into halves, healed later, no server: all see all within 60 s."""
    world = SimWorld(seed, size, by="none", delay=(0.001, 0.05))
    for peer in world.peers[1:]:
        peer.node.links.dial(world.peers[0].node.me.address)
    world.settle(60)
    half, other = world.peers[:size // 2], world.peers[size // 2:]
    world.witness.strict = False
    world.chatter(mean_gap=5.0, until=world.network.time + minutes * 60)
    world.network.cut([peer.host for peer in half], [peer.host for peer in other])
    parted = world.network.run_until(lambda: world.agreed(half) and world.agreed(other), 30)
    world.network.run(minutes * 60)
    assert world.agreed(half) and world.agreed(other), world.disagreement()
    world.network.heal()
    healed = world.settle(60)
    return {"parted after s": parted, "healed after s": healed, **world.finish(30)}


def scenario_cut_off(seed, size=10, seconds=120):
    """One peer's cable is pulled: it says that its own network is gone, keeps its list, and is back soon."""
    world = SimWorld(seed, size, by=("lan", "none")[seed % 2], delay=(0.001, 0.05))
    for peer in world.peers[1:]:
        peer.node.links.dial(world.peers[0].node.me.address)
    world.settle(60)
    world.network.run(10)
    victim, others = world.peers[-1], world.peers[:-1]
    world.witness.strict = False
    world.network.unplug(victim.host)
    noticed = world.network.run_until(lambda: victim.saw("network", gone=True), 20)
    dropped = world.network.run_until(lambda: world.agreed(others), CRASH_KNOWN)
    world.network.run(seconds)
    assert not victim.saw("left") and len(victim.sees()) == size - 1
    world.network.plug(victim.host)
    back = world.settle(10)
    assert victim.saw("network", gone=False) and not victim.saw("left")
    return {"noticed after s": noticed, "dropped after s": noticed + dropped, "back after s": back}


def scenario_partly(seed, size=12, seconds=180):
    """A third of the others can't reach one peer: nobody removes it, and what can't be sent is reported."""
    world = SimWorld(seed, size, delay=(0.001, 0.05))
    world.settle(60)
    victim = world.random.choice(world.peers)
    others = [peer for peer in world.peers if peer is not victim]
    cut = world.random.sample(others, (size - 1) // 3)
    world.network.cut([peer.host for peer in cut], [victim.host])
    world.network.run(seconds)
    assert world.agreed(), world.disagreement()
    for peer in world.peers:
        peer.loop.enter(peer.chat, f"from {peer.node.me.username}")
    world.network.run(40)
    figures = world.witness.check_messages()
    assert figures["failed"] == 2 * len(cut), figures
    return {**figures, **world.finish(60)}


# -- 5. delivery -----------------------------------------------------------------------------------------


def delivery_mishap(world, until, kinds):
    """Every few seconds something goes wrong, and is mended some time later."""
    network, rng = world.network, world.random
    if network.time < until:
        network.post(3 + 20 * rng.random(), delivery_mishap, world, until, kinds)
        MISHAPS[rng.choice(kinds)](world, rng.choice(world.living()), 25 * rng.random())


def mishap_crash(world, peer, seconds):
    """It crashes; a moment later it is started again, there or elsewhere."""
    if len(world.living()) > 4:
        peer.crash(reset=world.random.random() < 0.5)
        world.network.post(1 + seconds, peer.restart, world.random.random() < 0.7)


def mishap_leave(world, peer, seconds):
    """It leaves, and comes again."""
    if len(world.living()) > 4:
        peer.leave()
        world.network.post(7 + seconds, peer.restart)


def mishap_freeze(world, peer, seconds):
    """It is stopped for a while."""
    if not peer.loop.frozen:
        peer.loop.freeze()
        world.network.post(seconds, lambda: peer.loop.frozen and not peer.loop.dead and peer.loop.thaw())


def mishap_unplug(world, peer, seconds):
    """Its cable is out for a while."""
    world.network.unplug(peer.host)
    world.network.post(seconds, world.network.plug, peer.host)


def mishap_split(world, peer, seconds):
    """Two are cut off from all others, sometimes in one direction only."""
    some = [each.host for each in world.random.sample(world.living(), 2)]
    others = [each for each in world.network.hosts.values() if each not in some]
    world.network.cut(some, others, both=world.random.random() < 0.7)
    world.network.post(seconds, world.network.mend)


def mishap_jump(world, peer, seconds):
    """Somebody sets its clock."""
    peer.loop.jump(world.random.choice((0, 11, 3600)), wall=world.random.choice((0, -86400, 3600)))


def mishap_move(world, peer, seconds):
    """It gets another address."""
    world.move(peer)


MISHAPS = {"crash": mishap_crash, "leave": mishap_leave, "freeze": mishap_freeze, "unplug": mishap_unplug,
           "split": mishap_split, "jump": mishap_jump, "move": mishap_move}


def scenario_delivery(seed, size=8, minutes=10, link_life=40.0, kinds=("crash", "leave"), calm=60):
    """Breaking links, crashes, restarts: every message is shown once and in order, or reported."""
    world = SimWorld(seed, size, by=("lan", "server")[seed % 2], keep_log=False, delay=(0.001, 0.3),
                     link_life=link_life, lan_loss=0.1)
    world.settle(60)
    world.witness.strict = not set(kinds) - {"crash", "leave"}
    until = world.network.time + minutes * 60
    world.chatter(mean_gap=0.3, until=until)
    world.network.post(5, delivery_mishap, world, until, kinds)
    world.network.run(minutes * 60)
    return world.finish(calm)


def scenario_mess(seed, **sizes):
    """All at once: freezes, cuts, new addresses and clocks as well. Who is cut off or stopped for longer than
    it takes to be given up may show a message late that was reported: that is counted, and not limited."""
    figures = scenario_delivery(seed, kinds=tuple(MISHAPS), calm=150, **sizes)
    figures["late"] = figures.pop("both")
    return figures


# -- 6. the cost of a settled network ----------------------------------------------------------------------


def scenario_bytes(seed, size=16, seconds=60):
    """Bytes of a gossip round (question and answer), and all bytes that one peer sends in a minute."""
    world = SimWorld(seed, by="none", keep_log=False)
    world.add_settled(size)
    world.network.run(30)
    census = world.network.census = {}
    world.network.run(seconds)
    rounds = size * seconds / world.gossip_interval
    gossip = census.get("MSG_SYNC_PEERS_REQUEST", 0) + census.get("MSG_SYNC_PEERS_RESPONSE", 0)
    assert gossip, "nobody gossips"
    return {"bytes a round": gossip / rounds, "bytes a peer and minute": sum(census.values()) / size * 60 / seconds}


# -- cases that went wrong in other programs ---------------------------------------------------------------


def scenario_dial_at_once(seed, seconds=60):
    """Two peers dial each other at the same moment and talk at once: working links, and nothing lost."""
    world = SimWorld(seed, by="none", delay=(0.01, 0.2))
    one = world.add(port=5001)
    two = world.add(port=5002)
    for here, there in ((one, two), (two, one)):
        for _ in range(3):
            here.loop.enter(here.node.links.dial, (there.host.addresses[0], there.node.me.port))
    for number in range(40):
        world.network.run(0.05)
        for peer in (one, two):
            peer.loop.enter(peer.chat, f"{number}")
    world.network.run(seconds)
    figures = world.finish(1)
    assert figures["failed"] == 0 and figures["shown"] == figures["messages"] > 20, figures
    return figures


def scenario_walled(seed, size=6, minutes=5):
    """A peer that can dial but not be dialled takes part: its links serve both directions."""
    world = SimWorld(seed, size, by=("server", "join")[seed % 2], delay=(0.001, 0.05), link_life=120)
    world.peers[-1].host.walled = True
    world.settle(60)
    for _ in range(minutes * 6):
        world.network.run(10)
        for peer in world.peers:
            peer.loop.enter(peer.chat, "hello")
    assert world.agreed(), world.disagreement()
    figures = world.finish()
    assert figures["failed"] <= figures["messages"] / 100, figures
    return figures


def scenario_clock(seed, size=6, seconds=60):
    """Clocks jump: nobody loses anybody, chat goes on."""
    world = SimWorld(seed, size, by=("lan", "server")[seed % 2], delay=(0.001, 0.05))
    world.settle(60)
    jumps = [(3600, None), (0, -86400), (0, 86400), (11, None), (-30, 0)]
    for seconds_forward, wall in jumps:
        peer = world.random.choice(world.peers)
        peer.loop.jump(seconds_forward, wall)
        for each in world.peers:
            each.loop.enter(each.chat, "still here")
        world.network.run(seconds)
        assert world.agreed(), world.disagreement()
    figures = world.finish()
    assert figures["failed"] == 0, figures
    return figures


def scenario_sleep(seed, size=6, seconds=600):
    """A laptop sleeps: dropped meanwhile, and back within 10 s of waking, knowing all."""
    world = SimWorld(seed, size, by=("lan", "server", "none")[seed % 3], delay=(0.001, 0.05))
    for peer in world.peers[1:]:
        peer.node.links.dial(world.peers[0].node.me.address)
    world.settle(60)
    sleeper = world.random.choice(world.peers)
    world.witness.strict = False
    sleeper.loop.freeze()
    world.network.unplug(sleeper.host)
    world.network.run(seconds)
    assert world.agreed([peer for peer in world.peers if peer is not sleeper]), world.disagreement()
    sleeper.loop.jump(-seconds, wall=0)  # Linux stops the one clock while it sleeps
    world.network.plug(sleeper.host)
    sleeper.loop.thaw()
    return {"back after s": world.settle(10)}


def scenario_new_address(seed, size=6, seconds=120):
    """A new lease: the same instance at another address. Known to all there soon, and nothing is lost."""
    world = SimWorld(seed, size, by=("lan", "server")[seed % 2], delay=(0.001, 0.05))
    world.settle(60)
    world.network.run(20)
    mover = world.random.choice(world.peers)
    world.witness.strict = False
    world.network.move(mover.host, "10.50.0.1")

    def moved():
        found = [peer.node.peers.by_key(mover.instance) for peer in world.peers if peer is not mover]
        return all(peer is not None and not peer.gone and peer.ip == "10.50.0.1" for peer in found)

    for peer in world.peers:
        peer.loop.enter(peer.chat, "during the change")
    took = world.network.run_until(moved, 30)
    renamed = sum(bool(peer.saw("renamed")) for peer in world.peers if peer is not mover)
    for peer in world.peers:
        peer.loop.enter(peer.chat, "after the change")
    world.network.run(seconds)
    figures = world.finish()
    assert figures["failed"] == 0, figures
    return {"known there after s": took, "renamed": renamed / (size - 1), **figures}


def scenario_restart(seed, size=5):
    """Killed, and at once back at the same id: another instance, whose messages count anew."""
    world = SimWorld(seed, size, by=("lan", "server")[seed % 2], delay=(0.001, 0.05))
    world.settle(60)
    for number in range(4):
        victim = world.random.choice(world.living())
        for _ in range(3):
            victim.loop.enter(victim.chat, "before")
        world.network.run(1)
        victim.crash(reset=world.random.random() < 0.7)
        world.network.run(world.random.choice((0.01, 0.5, 3, 20)))
        again = victim.restart()
        assert again.node.me.id == victim.node.me.id or world.by == "lan"
        world.settle(30)
        again.loop.enter(again.chat, "after")
        for peer in world.living():
            peer.loop.enter(peer.chat, f"welcome {number}")
        world.network.run(5)
        shown = [peer for peer in world.living() if peer.saw("chat", text="after")]
        assert len(shown) >= size - 1
    return world.finish()


class SimStranger(p2pchat.Handler):
    """A program that speaks the protocol by hand."""

    def __init__(self, world, target, **record):
        self.loop = world.network.start(world.network.host(f"stranger {next(world.numbers)}"))
        ip = self.loop.host.addresses[0]
        self.me = {"id": f"Eve@{ip}:7", "ip": ip, "port": 7, "username": "Eve", "instance": "eeee", **record}
        self.got = []
        self.connection = self.loop.connect(target.node.me.address, self, 5)

    def opened(self):
        self.send("MSG_HELLO", {"peer": self.me})

    def received(self, messages):
        self.got += messages

    def send(self, kind, content):
        """Say something."""
        self.connection.send(p2pchat.create_message(kind, self.me["id"], content))


def scenario_stale_list(seed, size=5):
    """A stale list does not bring back who was removed, and who offers it is answered with the tombstone."""
    world = SimWorld(seed, size, delay=(0.001, 0.05))
    world.settle(60)
    gone, *rest = world.random.sample(world.peers, size)
    stale = gone.node.me.wire(gone.loop.now())
    gone.leave() if seed % 2 else gone.crash()
    world.settle(CRASH_KNOWN)
    stranger = SimStranger(world, rest[0])
    world.network.run(2)
    for kind, content in (("MSG_PEER_NEWS", {"peers": [stale]}), ("MSG_SYNC_PEERS_RESPONSE", {"peer_list": [stale]})):
        stranger.got.clear()
        stranger.loop.enter(stranger.send, kind, content)
        world.network.run(2)
        told = [record for message in stranger.got if message["type"] == "MSG_PEER_NEWS"
                for record in message["content"]["peers"] if record["instance"] == gone.instance]
        assert told and told[0]["status"] in ("dead", "left"), stranger.got
    world.network.run(10)
    assert not any(gone.instance in peer.sees() for peer in rest)
    return {}


def scenario_frozen(seed, size=5, count=200):
    """One peer is stopped: nobody waits for it; it is dropped in time, and back soon after it runs again."""
    world = SimWorld(seed, size, by=("lan", "server")[seed % 2], delay=(0.001, 0.02))
    world.settle(60)
    frozen, *rest = world.peers
    frozen.loop.freeze()
    world.witness.strict = False
    begin = world.network.time
    for number in range(count):
        rest[number % len(rest)].loop.enter(rest[number % len(rest)].chat, f"{number}")
    world.network.run(1)
    late = [when for (_, receiver), when in world.witness.shown.items() if when - begin > 0.1]
    assert not late and len(world.witness.shown) == count * (size - 2)
    dropped = world.network.run_until(lambda: world.agreed(rest), CRASH_KNOWN)
    world.network.run(20)
    frozen.loop.thaw()
    back = world.settle(10)
    figures = world.finish()
    return {"dropped after s": dropped, "back after s": back, "failed": figures["failed"], "late": figures["both"]}


def scenario_server(seed, size=3):
    """The server dies: chat goes on, all say so; it comes back: all are registered within 35 s."""
    world = SimWorld(seed, size, by="server", delay=(0.001, 0.02))
    world.settle(10)
    world.server.loop.crash(reset=seed % 2 == 0)
    world.network.run(60)
    assert all(peer.saw("server")[-1]["online"] is False for peer in world.peers)
    for peer in world.peers:
        peer.loop.enter(peer.chat, "without a server")
    world.network.run(1)
    assert len(world.witness.shown) == size * (size - 1) and world.agreed()
    world.start_server()
    took = world.network.run_until(lambda: len(world.server.peer_ids) == size, 35)
    return {"registered after s": took, **world.finish(10)}


# -- running them ------------------------------------------------------------------------------------------

# name: (scenario, sizes in the suite, seeds in the suite, sizes when asked for, the most seeds that make sense)
SCENARIOS = {
    "newcomer-16": (scenario_newcomer, {"size": 16}, 3, {"size": 16}, 300),
    "newcomer-64": (scenario_newcomer, {"size": 64}, 1, {"size": 64}, 300),
    "newcomer-256": (scenario_newcomer, None, 0, {"size": 256}, 40),
    "newcomer-1000": (scenario_newcomer, None, 0, {"size": 1000}, 10),
    "hundred": (scenario_hundred, {"size": 100}, 1, {"size": 100}, 50),
    "churn": (scenario_churn, {"size": 12, "minutes": 6, "crashes": 2, "leaves": 2, "restarts": 2, "link_life": 120}, 3,
              {}, 300),
    "halves": (scenario_halves, {"size": 10}, 2, {}, 300),
    "cut-off": (scenario_cut_off, {"size": 8}, 2, {}, 300),
    "partly": (scenario_partly, {}, 2, {}, 300),
    "delivery": (scenario_delivery, {"minutes": 3}, 3, {}, 300),
    "mess": (scenario_mess, {"minutes": 3}, 2, {}, 300),
    "bytes-16": (scenario_bytes, {"size": 16}, 1, {"size": 16}, 1),
    "bytes-64": (scenario_bytes, {"size": 64}, 1, {"size": 64}, 1),
    "bytes-256": (scenario_bytes, None, 0, {"size": 256}, 1),
    "bytes-1000": (scenario_bytes, None, 0, {"size": 1000}, 1),
    "dial-at-once": (scenario_dial_at_once, {}, 5, {}, 300),
    "walled": (scenario_walled, {}, 2, {}, 300),
    "clock": (scenario_clock, {}, 2, {}, 300),
    "sleep": (scenario_sleep, {}, 3, {}, 300),
    "new-address": (scenario_new_address, {}, 2, {}, 300),
    "restart": (scenario_restart, {}, 3, {}, 300),
    "stale-list": (scenario_stale_list, {}, 4, {}, 300),
    "frozen": (scenario_frozen, {}, 2, {}, 300),
    "server": (scenario_server, {}, 2, {}, 300),
}


@pytest.mark.parametrize("name", [name for name, (_, sizes, *_) in SCENARIOS.items() if sizes is not None])
def test_scenario(name):
    scenario, sizes, seeds, _, _ = SCENARIOS[name]
    for seed in range(1, seeds + 1):
        scenario(seed, **sizes)


def test_ideal_gossip_is_what_the_issue_says():
    for size, rounds in ((16, 2.6), (64, 4.0), (256, 5.1)):
        mean = statistics.mean(ideal_push_pull(seed, size) for seed in range(60))
        assert abs(mean - rounds) < 0.4


def test_gossip_bytes_do_not_grow():
    small, large = scenario_bytes(1, size=16, seconds=30), scenario_bytes(1, size=64, seconds=30)
    assert large["bytes a round"] <= 1.1 * small["bytes a round"] < 1000


def simulate_one(job):
    """One scenario with one seed, in a process of its own: (name, seed, figures or the failure's words, seconds)."""
    name, seed = job
    scenario, _, _, sizes, _ = SCENARIOS[name]
    logging.getLogger("p2pchat").setLevel(logging.CRITICAL)
    gc.set_threshold(200_000)
    begin = time.process_time()
    try:
        figures = scenario(seed, **sizes)
    except Exception as error:  # whatever it is, it belongs to this seed and the others go on
        figures = f"{type(error).__name__}: {error}"
    gc.collect()
    return name, seed, figures, time.process_time() - begin


def simulate(arguments):
    """`simulate [--seeds N] [--seed S] [--jobs J] [NAME...]`: print a table; the number of failures."""
    parser = argparse.ArgumentParser(prog="test_p2pchat.py simulate")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}, or the beginning of some")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--seed", type=int, help="just this one")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    chosen = [name for name in SCENARIOS if not options.names or name.startswith(tuple(options.names))]
    failures = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for name in chosen:
            most = min(options.seeds, SCENARIOS[name][4])
            seeds = [options.seed] if options.seed is not None else range(1, most + 1)
            failures += simulate_report(name, pool.map(simulate_one, [(name, seed) for seed in seeds]))
    return failures


def simulate_report(name, results):
    """Print the line of one scenario, and its failures; return how many there were."""
    columns, failed, count, cpu = collections.defaultdict(list), [], 0, 0.0
    for _, seed, figures, seconds in results:
        count, cpu = count + 1, cpu + seconds
        if isinstance(figures, str):
            failed.append((seed, figures))
            print(f"{name} seed {seed} FAILED: {figures}\n  again: python test_p2pchat.py simulate --seed {seed} {name}",
                  flush=True)
        else:
            for key, value in figures.items():
                columns[key].append(value)
    shown = [f"{key} {statistics.mean(values):.4g} (max {max(values):.4g})" for key, values in columns.items()]
    print(f"{name:14} {count - len(failed)}/{count} ok  {cpu / count:.1f} s each  {'; '.join(shown)}", flush=True)
    return len(failed) + simulate_limits(name, columns)


def simulate_limits(name, columns):
    """What is judged over all seeds: gossip against the ideal, and messages both shown and reported."""
    problems = []
    if columns.get("ideal") and statistics.mean(columns["rounds"]) > 1.2 * statistics.mean(columns["ideal"]):
        problems.append("more than 1.2 times the rounds of ideal push-pull gossip")
    if columns.get("both") and 1000 * sum(columns["both"]) > sum(columns["messages"]):
        problems.append("more than 1 message in 1,000 both shown and reported undelivered")
    for problem in problems:
        print(f"{name} FAILED: {problem}", flush=True)
    return len(problems)
