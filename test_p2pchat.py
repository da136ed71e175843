"""Tests of p2pchat: python -m pytest. Also: python test_p2pchat.py bench|simulate|soak|hostile|fuzz."""

import json
import pytest
import p2pchat
import ast
import random

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
