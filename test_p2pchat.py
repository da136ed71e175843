"""Tests of p2pchat: python -m pytest. Also: python test_p2pchat.py bench|simulate|soak|hostile|fuzz."""

import json
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
