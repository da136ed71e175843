#!/usr/bin/env python3
"""p2pchat: chat for a room full of machines on one network. One file, nothing to install.

    python3 p2pchat.py peer --user Alice      # the chat; needs no server
    python3 p2pchat.py server                 # discovery server, port 9999: introduces peers to one another

Peers talk directly to each other. A server only introduces them. When it is gone, gossip among the peers
keeps the network together. On the wire: TCP, one JSON object a line, UTF-8, at most 1 MiB:

    {"type": "MSG_CHAT", "sender_id": "Alice@192.168.1.10:10001", "to": "*", "content": "Hi!", "id": 7}

A peer's id is username@ip:port. In addition every process draws a random `instance`. A link between two
peers opens with MSG_HELLO in both directions. Chat messages on it are numbered (`id`), and MSG_CHAT_ACK
acknowledges them. Peers probe each other, pass on news of third peers (gossip), and answer
MSG_SYNC_PEERS_REQUEST from anyone. README.md has the whole format.

One thread, one loop, and no call that blocks. Each section uses only the sections above it:

    Constants          facts of the protocol, bounds and settings, each with its unit and its reason
    Text               what may be shown: cleaning, display width, wrapping
    Messages           the codec: bytes in, checked messages out
    Membership         who is present: records, merging, tombstones, digests
    Loop               selectors, timers, connections, datagrams, rate limits
    Closed room        certificates, the proof of the passphrase, guesses, TLS under a connection
    Discovery server   DiscoveryServer, and this file over HTTP
    Peer node          PeerNode: links, delivery, failure detection, gossip; reports by events
    History            what was said, in a file, if the user asked for it
    Chat view          the model behind the interfaces: messages, input line, commands, rendering
    Interfaces         curses, plain lines, JSON lines
    Command line       argparse and main()

An open room is not encrypted: whoever is on the network can read and can join. In a closed one, --room NAME, both need
its passphrase.
"""

import sys

if sys.version_info < (3, 8):  # so everything below must parse on 3.6; annotations of what stands below are quoted
    sys.exit("p2pchat.py needs Python 3.8 or newer, and this is {}.{}: look for python3.8, python3.9 and so on, "
             "or for python3 on another machine.".format(*sys.version_info))

import argparse
import codecs
import collections
import errno
import functools
import hashlib
import heapq
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import selectors
import shutil
import signal
import socket
import stat
import time
import unicodedata
from typing import (
    AbstractSet,
    Any,
    Callable,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
)

__version__ = "2.0"

# ======================================================================================================
# Constants
#
# Facts of the protocol, and bounds. Each comment says what the value bounds, in which unit, and why it
# has that value. Times are seconds and sizes are bytes where nothing else is said. What a user may change
# is a field of Settings or ServerSettings, which stand below; the option of the same name sets it.
# ======================================================================================================

DEFAULT_PORT = 9999  # TCP port of the server, and UDP port of all beacons
LAN_GROUP = "239.255.99.99"  # multicast group of the beacons: administratively scoped, so no router passes it on

# Defaults of the settings.
HEARTBEAT_INTERVAL = 10.0  # between two heartbeats to the server: three fit into its timeout, so two may be late
HEARTBEAT_TIMEOUT = 30.0  # the server drops a peer that is silent for this long; longer keeps ghosts in its list
GOSSIP_INTERVAL = 5.0  # between two comparisons with a random peer; shorter converges sooner and costs more
SOCKET_TIMEOUT = 5.0  # for a dial and its answer; longer makes a user wait for a machine that is switched off

# Sizes within one message.
MAX_LINE = 1024 * 1024  # of one message on the wire: a list of some 6,000 peers fits; each connection may hold one
MAX_TEXT = 16 * 1024  # of one chat text in UTF-8: several screenfuls of code
MAX_NAME = 32  # characters of a user name: more would not fit beside a message
MAX_NOTE = 200  # characters that say why a peer is away or leaves: it stands in its record, 4096 of which fit a list
MAX_ID = 128  # characters of a peer id: a name, an address and a port, with room to spare
MAX_PEERS = 4096  # records in a list, on the wire and in memory; each takes about 1 KiB of memory
MAX_CHANNELS = 16  # that a peer is in: with the longest names they take 2 KiB of its record, 6 KiB on the wire
MAX_INCARNATION = 2**53 - 1  # the largest integer that every JSON parser keeps exact
MAX_RAISE = 1 << 20  # how far hearsay may raise a known incarnation: an owner raises its own one by one

# Connections.
RECEIVE_SIZE = 32 * 1024  # one read: some 300 messages, a few ms of work; a flood must not delay a key press
SEND_SIZE = 256 * 1024  # queued pieces are joined up to this size for one send: what a socket's buffer takes at once
ACK_DELAY = 0.002  # an acknowledgement waits this long for something to travel with; a bot that waits for it, too
MAX_OUTPUT = 8 * 1024 * 1024  # queued to a far end that does not read; beyond it the connection is aborted
STALL_TIMEOUT = 10.0  # a connection is aborted when it takes none of its queued output for this long
LINE_TIMEOUT = 10.0  # a message that was begun must be complete by then; every 64 KiB of it allow as much again
NAME_TIME = 30.0  # an address that a name had is used for this long: longer than the wait between two dials of it
DRAIN_TIMEOUT = 3.0  # a closing connection has this long to deliver what is queued
TURN_TIME = 0.015  # for the ready sockets of one turn, and as much goes into telling of it: keys and timers wait for it
FLUSH_TIME = 0.008  # for sending, twice a turn: a list of 1,000 peers to as many newcomers is 100 MB
PROOF_TIME = 0.01  # for the handshakes and proofs of one turn
MERGE_TIME = 0.002  # for the lists that are merged in one turn: to tell of what that changed takes three times as long
STRANGERS_TIME = 0.005  # for the sockets of those who have not said yet who they are: others come first in a turn
ACCEPT_TIME = 0.003  # for accepting in one turn: some 70 connections, so a burst of 1,000 takes fifteen turns
ACCEPT_PAUSE = 0.5  # accepting pauses for this long when the descriptors are used up
MAX_PER_ADDRESS = 256  # peers at one address other than our own, so that no single machine fills the list
MAX_UNIDENTIFIED = 1500  # connections from one address without a hello: a class behind one NAT; each is a descriptor
MIN_DESCRIPTORS = 32  # the program itself has twelve open; each link takes one

# Membership: SWIM, with the lessons of Lifeguard.
PROBE_INTERVAL = 2.0  # between two probes of a neighbour; two may be lost before the neighbour counts as quiet
NEIGHBOURS = 2  # peers that each peer probes, and that probe it; each more costs two messages an interval
QUIET_AFTER = 5.0  # a neighbour silent for this long is suspected, and others are asked to probe it
BUSY_PATIENCE = 2  # times as long a peer may be silent while we have no time to read all that comes
QUIET_SHOWN = 1.5  # a suspect is shown as quiet, and called suspect to all, if nobody heard it for this long
WARN_INTERVAL = 0.25  # between two probes that tell a peer of an accusation, because others can cause them at will
PROBE_HELPERS = 3  # peers asked to probe one that we cannot reach
KEEP_TIME = 3600.0  # texts wait for so long for a peer that was lost
TOMBSTONE_TIME = KEEP_TIME + 60  # a removed peer is remembered for this long: no old list brings it back, no text twice
NEWS_INTERVAL = 0.2  # between two rounds of passing on news; memberlist's gossip interval
NEWS_FANOUT = 3  # peers told in one round; memberlist's gossip nodes
NEWS_ROUNDS = 4  # each item is sent this many times the number of digits of the number of peers
MAX_MERGING = 8 * MAX_PEERS  # records that wait to be merged: some 30 MB
NEWS_BATCH = 200  # items in one message, some 30 KiB
RECENT_TIME = 5.0  # peers that left this recently are told to each newly linked peer: it missed that news
CLOCK_JUMP = 10.0  # the machine slept if a probe is this late, or if the wall clock jumped by this much

# Questions, and links between peers.
MAX_QUESTIONS = 64  # unanswered ones over one connection; the oldest makes room
LIST_INTERVAL = 0.5  # between two lists sent over one link: a second request meanwhile is answered by the first
CONTEST_TIME = 1.0  # a peer has this long to answer when another claims its instance or its address
RETRY_MIN, RETRY_MAX = 1.0, 30.0  # between two dials of a peer; doubled each time
LINKS_TO_ONE = 4  # links to one peer, the newest: both ends may dial, and a broken link is not noticed at once
IDLE_LINKS = 64  # idle links kept open, so some fifty peers are all linked to each other; each is a descriptor
IDLE_TIMEOUT = 30.0  # beyond that number, a link unused for this long is closed
MAX_DIALS = 256  # dials in progress: many, because one to a machine that is off takes SOCKET_TIMEOUT to fail
HELLO_TIMEOUT = 10.0  # an accepted connection is closed if no hello came by then
MAX_PROOF_BYTES = 16 * 1024  # from one far end before its proof, which takes some 2 KiB: 32 MiB for all of them
MAX_EMPTY = 64 * 1024  # bytes beyond those that hold as much text: changes of the key take 46 ms, each 27 bytes
MAX_UNPROVED = 2000  # connections without proof; beyond it the address that has most of them loses its oldest

# Delivery.
OUTBOX_MESSAGES = 50_000  # messages that wait for one receiver's acknowledgement; further ones fail at once
OUTBOX_BYTES = 4 * 1024 * 1024  # the same in bytes
KEPT_MESSAGES = 1000  # that wait for one peer that was lost
KEPT_BYTES = 1024 * 1024  # the same in bytes
KEPT_BYTES_IN_ALL = 16 * 1024 * 1024  # for all that were lost; a text that waits for several counts once
CATCH_UP = 200  # messages of one conversation that newcomers are told at most; they are kept in memory for that
CATCH_UP_BYTES = 64 * 1024  # the same in bytes; kept are up to twice as many characters: 8 MiB in all, if all are emoji
CATCH_UP_TIME = 3600.0  # older ones are not told
LINK_TIME = PROBE_INTERVAL + 0.5  # between the first link and that question: all are linked by then, if they are few
CATCH_UP_TRIES = 3  # peers that are asked, until one of them has something to tell
MAX_REFUSALS = 32  # ranges of refused messages in one acknowledgement; with so many, all further ones are refused
CHAT_OVERHEAD = 128  # bytes that a budget counts for a message beside its text
GOODBYE_TIME = 0.5  # a peer that said goodbye is removed after this: its messages on a second link still count
UNREACHABLE_TIME = 15.0  # messages fail if a peer acknowledges none for this long, though others say that it lives
CUT_OFF_FACTOR = 4  # a sender is cut off once what was refused exceeds its budget this many times
BAN_TIME = 60.0  # a sender that was cut off may not link again for this long

# Discovery.
UPDATE_GATHER_TIME = 0.01  # the server gathers joins and leaves for this long and sends them as one message
RETRY_SERVER_MIN, RETRY_SERVER_MAX = 1.0, 20.0  # between two dials of the server; doubled each time
UPDATE_REST = 0.0001  # then it rests for this long for each peer that it told: each takes 10 us, in a closed room 30
SETTLE_TIME = 2.0  # a peer that starts waits this long for the local network; before that, for what was named
BEACON_INTERVAL_ALONE, BEACON_INTERVAL = 1.0, 10.0  # between two beacons, while nobody is known and later
BEACON_SIZE = 512  # every beacon is padded to this size, so that an answer is never longer than its question
BEACON_ANSWERS = 20  # answers to beacons in one second, so that nobody can use us to flood others
MAX_SERVERS = 8  # servers remembered; each one that is named or heard may be tried
MAX_TYPED = 64  # addresses from /connect that are dialled again until they answer; the oldest makes room
MAX_LOOKS = 16  # addresses dialled within QUIET_AFTER because others named them, so that nobody can make us scan

# The program over HTTP.
HTTP_AT_ONCE = 4  # downloads in progress from one address; further ones wait for their turn
HTTP_A_MINUTE = 60  # requests from one address, in the same way: thirty students press Enter together, twice
HTTP_SERVING = 64  # downloads in progress from all addresses; each may hold a copy of the file
HTTP_WAITING = 1000  # requests that wait for their turn; further ones are refused
HTTP_TIMEOUT = 60.0  # a download must be over by then: 7 KB/s are enough
MAX_REQUEST = 8 * 1024  # of one HTTP request: browsers send 1 KiB

# Closed rooms.
MAX_ROOM = 64  # bytes of a room's name in UTF-8: it stands in every beacon
GUESSES = 3  # wrong passphrases that an address may try in a minute; then one each 20 s
MEMBER_GUESSES = 10  # the same for an address that proved itself lately: members mistype, and share addresses
MEMBER_TIME = 3600.0  # for this long after its proof
MAX_PASSPHRASE = 1024  # bytes of a passphrase, so that a wrong file is noticed
BAR_MAX = 600.0  # between two dials of an address that is in another room; doubled each time, from QUIET_AFTER on
MAX_REFUSED = 3  # a passphrase that so many machines refuse and none accepts is wrong: the user is asked again
MAX_NOTICES = 12  # lines a minute about strangers, so that one with many addresses does not fill the screen
MAX_ELSEWHERE = 1024  # peers of other rooms that are remembered; each takes some 300 bytes
MAX_GUESSERS = 4096  # addresses whose guesses are counted; each takes about 600 bytes

# Rates.
MAX_MESSAGES = 100_000  # messages, and records in lists, over one link in a minute: some 5 s of work
MAX_RENAMES = 20  # changes of name over one connection in a minute, because each is told to everybody
LOG_REPEATS = 60  # lines of one kind that others may cause in a minute, so that nobody fills a disk

Address = Tuple[str, int]
Event = Dict[str, Any]  # what --json prints, without the time
Listener = Callable[[List[Event]], None]  # gets the events of one turn
Message = Dict[str, Any]  # one decoded JSON line

DETAIL = 15  # level of the log's lines about single messages: a log file has them, /log has sums

log = logging.getLogger("p2pchat")
log.addHandler(logging.NullHandler())  # silent unless the program sets up a log


class ServerSettings(NamedTuple):
    """Settings of a discovery server. Times are seconds."""

    host: str = "0.0.0.0"  # the address to listen on
    port: int = DEFAULT_PORT
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    check_interval: float = 10.0  # between two searches for silent peers: a drop may be this much late
    lan: bool = True  # answer peers that look for a server on the local network


class Settings(NamedTuple):
    """Settings of a peer. Times are seconds."""

    username: Optional[str] = None  # None: the interface asks for it
    server: Optional[Address] = None  # None: 127.0.0.1:9999, and servers found on the local network
    host: str = "0.0.0.0"  # the address to listen on; any other than 0.0.0.0 also becomes part of the id
    port: int = 0  # 0: the system chooses
    heartbeat_interval: float = HEARTBEAT_INTERVAL
    gossip_interval: float = GOSSIP_INTERVAL
    timeout: float = SOCKET_TIMEOUT  # for a dial and its answer, and for leaving
    join: Tuple[Address, ...] = ()  # addresses of peers or servers that the user named
    lan: bool = True  # look for others on the local network
    budget: int = 1024 * 1024  # bytes of chat accepted from one sender in a minute; 0: no limit
    channels: Tuple[str, ...] = ()  # joined from the start
    catch_up: int = CATCH_UP  # messages from before our start that we want to be told, at most
    log_file: Optional[str] = None
    history: Optional[str] = None  # the file that keeps what is said; None: nothing is kept


# ======================================================================================================
# Text
#
# Cleaning, display width and wrapping. Every name and text from the network goes through clean() once, as
# it comes in. After that it can be read and can do nothing else: it moves no cursor and hides nothing.
# Terminals disagree about the width of emoji that are joined, styled or newer than this Python. Each takes two
# columns here, and steady() puts in its place what takes two everywhere; the screen draws the emoji over that.
# Any other glyph is reduced to the part whose width is certain, so no line becomes too long.
# Pure functions without state.
# ======================================================================================================

MAX_CLUSTER = 32  # code points in one grapheme: the longest emoji in use have ten
MAX_MARKS = 6  # combining marks on one character: Hebrew and Tibetan need four or five

_ZWNJ, _ZWJ, _TEXT_STYLE, _EMOJI_STYLE, _UNKNOWN = "\u200c", "\u200d", "\ufe0e", "\ufe0f", "\ufffd"
_JOINERS = _ZWNJ + _ZWJ
_INVISIBLE = frozenset(map(chr, (
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0,
    *range(0xFE00, 0xFE0E), *range(0xFFF0, 0xFFF9))))
_JOINING_SCRIPTS = ((0x0600, 0x0DFF), (0x1000, 0x109F), (0x1780, 0x18AF), (0xA840, 0xA87F), (0xFB50, 0xFDFF),
                    (0xFE70, 0xFEFE), (0x11000, 0x114DF))  # Arabic, Indic, Myanmar, Khmer, Mongolian
_NEW_EMOJI = "\U0001f6d0-\U0001f6ff\U0001f7e0-\U0001f7ff\U0001f900-\U0001f9ff\U0001fa70-\U0001faff"  # where new ones go
_PICTURE = "[\u2190-\u2bff\U0001f000-\U0001f1e5\U0001f200-\U0001faff]\ufe0f?[\U0001f3fb-\U0001f3ff]?"
_SEQUENCE = re.compile(f"{_PICTURE}(\u200d{_PICTURE})*|[0-9#*]\ufe0f\u20e3|[©®]\ufe0f")
_IS_NEW = re.compile(f"[{_NEW_EMOJI}]").match
_MAY_BE_UNSTEADY = re.compile(f"[\u200d\ufe0f\U0001f3fb-\U0001f3ff{_NEW_EMOJI}]").search


def clean(text: str, newlines: bool = False) -> str:
    """Return a text that is safe to show: without controls, direction overrides and invisible characters.

    Control characters become their pictures (U+2400). Line breaks and tabs stay if `newlines`, else become blanks."""
    if text.isascii() and text.isprintable():
        return text
    if newlines:
        text = text.replace("\r\n", "\n").translate(_LINES)
    else:
        text = text.translate(_ONE_LINE)
    return text if text.isascii() else _clean_in_context("".join(map(_replacement, text)))


def check_username(name: str) -> str:
    """Return the name in NFC. Raises ValueError with a sentence that says what is allowed."""
    if not name.strip():
        raise ValueError(f"A name is needed: 1 to {MAX_NAME} characters.")
    if name != name.strip():
        raise ValueError("A name may not begin or end with a space.")
    name = unicodedata.normalize("NFC", name)
    if len(name) > MAX_NAME:
        raise ValueError(f"A name may have at most {MAX_NAME} characters; this one has {len(name)}.")
    for character in "@*:→":  # separators: ids and the interfaces put them beside names
        if character in name:
            raise ValueError(f"A name may not contain {character!r}; letters, digits and spaces are fine.")
    if name.startswith("/"):
        raise ValueError("A name may not begin with '/': a line that does is a command.")
    if name.startswith("#"):
        raise ValueError("A name may not begin with '#': channels do.")
    blanks = any(character.isspace() and character != " " for character in name)
    if blanks or clean(name) != name or _UNKNOWN in name:
        raise ValueError("A name may contain only characters that can be shown, no control or invisible ones.")
    if not any(unicodedata.category(character)[0] in "LNPSC" and character != "\u2800" for character in name):
        raise ValueError("A name needs a letter, digit or symbol that can be seen.")
    return name


def check_channel(name: str) -> str:
    """Return the name of a channel, with its '#', case-folded and in NFC. Raises ValueError with a sentence."""
    if not name.startswith("#") or name == "#":
        raise ValueError("The name of a channel is '#' and 1 to 32 characters, like #lab.")
    for _ in range(2):  # what was folded and composed may have to be folded again
        name = unicodedata.normalize("NFC", name.casefold())
    if any(map(str.isspace, name)):
        raise ValueError("The name of a channel may not contain a space.")
    return "#" + check_username(name[1:])


def is_channel(text: str) -> bool:
    """Whether a text that names a conversation names a channel: user names do not begin like this."""
    return text.startswith("#")


def check_room(name: str) -> str:
    """Return the name of a closed room in NFC. Raises ValueError with a sentence that says what is allowed."""
    name = check_username(name)
    if len(name.encode("utf-8")) > MAX_ROOM:
        raise ValueError(f"The name of a room may have at most {MAX_ROOM} bytes in UTF-8; this one has more.")
    return name


@functools.lru_cache(maxsize=4096)
def natural_key(name: str) -> List[Tuple[bool, int, str]]:
    """Return what to sort a name by: pc2 stands before pc10, and É beside E."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(each))
    parts = re.findall(r"\d+|\D+", plain)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts]


def check_note(text: str) -> str:
    """Return a note as it is sent and shown: one clean line of at most MAX_NOTE characters."""
    return clean(text).strip()[:MAX_NOTE]


def graphemes(text: str) -> List[str]:
    """Split a text into what a reader sees as one character: a base with marks, an emoji sequence, a flag."""
    if text.isascii():
        return list(text)
    clusters: List[str] = []
    for character in text:
        if clusters and len(clusters[-1]) < MAX_CLUSTER and _extends(clusters[-1], character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def width(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(glyph(cluster)[1] for cluster in graphemes(text))


def cut(text: str, cols: int, mark: str = "") -> str:
    """Return as much of a text as fits into `cols` columns. It ends with `mark` if something was cut off."""
    if text.isascii() and len(text) <= cols:
        return text
    room = cols - width(mark) if width(mark) < cols < width(text) else cols
    return _fitting(graphemes(text), room)[0] + (mark if room < cols else "")


def pad(text: str, cols: int) -> str:
    """Return a text cut or filled with blanks to exactly `cols` columns."""
    text = cut(text, cols)
    return text + " " * (cols - width(text))


def fit_columns(rows: Sequence[Sequence[str]], cols: int, optional: Sequence[int]) -> List[str]:
    """Return rows of cells as lines of at most `cols` columns.

    As long as there is no room, the optional columns are left out, one after the other; then the first is cut."""
    for count in range(len(optional) + 1):
        kept = [[cell for at, cell in enumerate(row) if at not in optional[:count]] for row in rows]
        sizes = [max(map(width, column)) for column in zip(*kept)]
        excess = sum(sizes) + 2 * (len(sizes) - 1) - cols
        if excess <= 0:
            break
    sizes[0] -= min(max(excess, 0), max(sizes[0] - 4, 0))
    lines = ["  ".join(pad(cut(cell, size, "…"), size) for cell, size in zip(row, sizes)).rstrip() for row in kept]
    return [cut(line, cols, "…") for line in lines]


def wrap(text: str, cols: int, table: bool = False) -> List[str]:
    """Return lines of at most `cols` columns. They break between words; a word longer than a line is split.

    With `table`, a line that goes on is indented to its second column, which two blanks separate from the first."""
    lines: List[str] = []
    for line in text.split("\n"):
        line = line.expandtabs(4).rstrip()
        if width(line) <= cols:
            lines.append(cut(line, cols))
        else:
            indent = width(line) - width(line.partition("  ")[2].lstrip()) if table and "  " in line else 0
            lines += _wrap_line(graphemes(line), max(1, cols), indent if indent <= cols // 2 else 0)
    return lines


@functools.lru_cache(maxsize=8192)
def glyph(cluster: str) -> Tuple[str, int]:
    """Return what is drawn for a grapheme and how many columns it takes: an emoji, or the part that is certain."""
    base = cluster[0]
    category = unicodedata.category(base)
    if is_unsteady(cluster):
        return cluster, 2
    if category in ("Cn", "Co", "Cc", "Cs"):
        return _UNKNOWN, 1
    wide = unicodedata.east_asian_width(base) in "WF"
    columns = 2 if wide else 0 if category in ("Mn", "Me", "Cf") else 1
    if _is_flag(base):
        return (cluster, 2) if len(cluster) == 2 else (_UNKNOWN, 1)
    if _is_pictograph(base):
        return base, columns
    rest = [character for character in cluster[1:] if character not in (_EMOJI_STYLE, _TEXT_STYLE)]
    spacing = sum(unicodedata.category(character) == "Mc" for character in rest)
    return base + "".join(rest), columns + spacing


def is_unsteady(cluster: str) -> bool:
    """Whether a grapheme is an emoji that takes one column, two or more, depending on the terminal."""
    if len(cluster) == 1:
        return unicodedata.category(cluster) == "Cn" and _IS_NEW(cluster) is not None
    return _SEQUENCE.fullmatch(cluster) is not None


def steady(text: str) -> str:
    """Return a text of the same width, in which each emoji stands as the part that every terminal knows."""
    if text.isascii() or not _MAY_BE_UNSTEADY(text):
        return text
    return "".join(_steady(cluster) if is_unsteady(cluster) else cluster for cluster in graphemes(text))


def most_columns(cluster: str) -> int:
    """Return how many columns an emoji takes where its parts are not joined."""
    return sum(2 for character in cluster if character not in "\u200d\ufe0f\u20e3")


def _steady(cluster: str) -> str:
    base = _UNKNOWN if unicodedata.category(cluster[0]) == "Cn" else cluster[0]
    return base + cluster[-1] * (cluster[-1] == "\u20e3") + " " * (unicodedata.east_asian_width(base) not in "WF")


def _wrap_line(clusters: List[str], cols: int, indent: int) -> List[str]:
    """Wrap one line that is too long. A break replaces the blanks around it; a word longer than a line is split."""
    lines: List[str] = []
    while clusters:
        margin = indent if lines else 0
        piece, count = _fitting(clusters, cols - margin)
        if count < len(clusters) and not clusters[count].isspace():
            blank = next((at for at in range(count - 1, 0, -1) if clusters[at].isspace()), 0)
            wide = next((at for at in range(count, 0, -1) if glyph(clusters[at - 1])[1] == 2), 0)
            count = max(blank + 1 if blank else 0, wide) or count  # a line may break after any ideograph
            piece = _fitting(clusters[:count], cols - margin)[0]
        lines.append(" " * margin + piece.rstrip())
        while count < len(clusters) and clusters[count] == " ":
            count += 1
        clusters = clusters[count:]
    return lines


def _fitting(clusters: List[str], cols: int) -> Tuple[str, int]:
    """Return the text of the graphemes that fit, and their number: at least 1, even if that one does not fit."""
    used, drawn = 0, []
    for cluster in clusters:
        text, columns = (cluster, 1) if cluster.isascii() else glyph(cluster)
        if used + columns > cols:
            break
        used += columns
        drawn.append(text)
    return "".join(drawn), len(drawn) or 1


def _clean_in_context(text: str) -> str:
    """Drop joiners and emoji styles that have no effect here, and marks beyond MAX_MARKS on one character."""
    kept: List[str] = []
    marks = 0
    for position, character in enumerate(text):
        before, stays = kept[-1] if kept else "\n", True
        if character in _JOINERS:
            stays = _joins(character, before, text[position + 1:position + 2])
        elif character in (_TEXT_STYLE, _EMOJI_STYLE):
            stays = _is_pictograph(before) or before in "0123456789#*©®"
        elif unicodedata.category(character)[0] == "M":
            marks += 1
            stays = marks <= MAX_MARKS
            if before == "\n":
                kept.append("\u25cc")  # a base for the mark, which would else combine with our own text
        else:
            marks = 0
        if stays:
            kept.append(character)
    return "".join(kept)


def _joins(joiner: str, before: str, after: str) -> bool:
    """Whether a joiner has an effect here: between emoji, or within a script that uses joiners."""
    if not after:
        return False
    if joiner == _ZWJ and _is_pictograph(after):
        return _is_pictograph(before) or before == _EMOJI_STYLE
    return _in_joining_script(before) and (_in_joining_script(after) or after.isspace())


def _in_joining_script(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _JOINING_SCRIPTS)


def _is_pictograph(character: str) -> bool:
    return "\U0001f000" <= character <= "\U0001faff" or "\u2190" <= character <= "\u2bff"


def _is_flag(character: str) -> bool:
    """Whether a character is a regional indicator; two of them make a flag."""
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _extends(cluster: str, character: str) -> bool:
    """Whether a character belongs to the grapheme before it."""
    if character.isascii() or cluster == "\n":
        return False
    if character in _JOINERS or unicodedata.category(character)[0] == "M":
        return True
    if "\U0001f3fb" <= character <= "\U0001f3ff":  # skin tones
        return _is_pictograph(cluster[0])
    if _is_flag(character):
        return len(cluster) == 1 and _is_flag(cluster)
    if cluster[-1] == _ZWJ:
        return _is_pictograph(character)
    korean = "\u1160" <= character <= "\u11ff"  # the vowel or the end of a syllable
    return korean and "\u1100" <= cluster[0] <= "\u11ff"


@functools.lru_cache(maxsize=4096)
def _replacement(character: str) -> str:
    """Return what replaces a character in a cleaned text, whatever stands around it."""
    if character in _INVISIBLE or "\U000e0000" <= character <= "\U000e0fff":
        return ""
    category = unicodedata.category(character)
    if category == "Cf":
        return character if character in _JOINERS else ""
    if category in ("Cs", "Co") or (category == "Cc" and character not in "\n\t"):
        return _UNKNOWN
    if category == "Cn" and (ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"):
        return _UNKNOWN  # never assigned; the other unassigned ones may exist in a newer Unicode than ours
    return character


# Each control character below 128 has a picture, from U+2400 on.
_LINES: Dict[int, Any] = {**{code: chr(0x2400 + code) for code in range(32)}, 9: "\t", 10: "\n", 13: "\n",
                          127: "\u2421", 0x85: "\n", 0x2028: "\n", 0x2029: "\n"}
_ONE_LINE: Dict[int, Any] = {**_LINES, **dict.fromkeys((9, 10, 13, 0x85, 0x2028, 0x2029), " ")}


# ======================================================================================================
# Messages
#
# The codec: bytes in, checked messages out, and back. It knows no sockets and no time. Whatever bytes come
# in, BadMessage is the only exception that leaves this section; any other is our bug. Every message that
# comes out has the four keys with values of the right types, and the content that its type requires. Whether
# its claims are true is for the caller to decide.
# ======================================================================================================

MSG_REGISTER = "MSG_REGISTER"
MSG_REGISTER_ACK = "MSG_REGISTER_ACK"
MSG_HEARTBEAT = "MSG_HEARTBEAT"
MSG_UNREGISTER = "MSG_UNREGISTER"
MSG_PEER_LIST_UPDATE = "MSG_PEER_LIST_UPDATE"
MSG_CHAT = "MSG_CHAT"
MSG_CHAT_ACK = "MSG_CHAT_ACK"
MSG_CHAT_SETTLED = "MSG_CHAT_SETTLED"
MSG_SYNC_PEERS_REQUEST = "MSG_SYNC_PEERS_REQUEST"
MSG_SYNC_PEERS_RESPONSE = "MSG_SYNC_PEERS_RESPONSE"
MSG_PEER_NEWS = "MSG_PEER_NEWS"
MSG_CATCH_UP_REQUEST = "MSG_CATCH_UP_REQUEST"
MSG_CATCH_UP_RESPONSE = "MSG_CATCH_UP_RESPONSE"
MSG_HELLO = "MSG_HELLO"
MSG_PROBE = "MSG_PROBE"
MSG_PROBE_ACK = "MSG_PROBE_ACK"
MSG_PROBE_REQUEST = "MSG_PROBE_REQUEST"
MSG_PROBE_RESULT = "MSG_PROBE_RESULT"
MSG_BEACON = "MSG_BEACON"
MSG_ROOM = "MSG_ROOM"
MSG_PAKE = "MSG_PAKE"
MSG_GUESSES = "MSG_GUESSES"
MSG_ERROR = "MSG_ERROR"

Fields = Dict[str, Tuple[Callable[[Any], bool], str]]  # name -> check of the value, and in words what is allowed

EVERYONE = "*"  # as `to`: the message is for all peers
ALIVE, SUSPECT, DEAD, LEFT = "alive", "suspect", "dead", "left"  # the status of a record
RANK = {ALIVE: 0, SUSPECT: 1, DEAD: 2, LEFT: 3}  # of two records with the same incarnation the higher rank wins


class BadMessage(Exception):
    """The bytes are not a valid message. The text says why, in words meant for their sender."""


def create_message(msg_type: str, sender_id: str, content: Any, to: str = EVERYONE, **extra: Any) -> bytes:
    """Return one message as the bytes that go on the wire, with the newline.

    Raises ValueError for a value that JSON cannot hold, and for a message longer than MAX_LINE."""
    message = {"type": msg_type, "sender_id": sender_id, "to": to, "content": content, **extra}
    data = _ENCODER.encode(message).encode("ascii") + b"\n"
    if len(data) > MAX_LINE:
        raise ValueError(f"a message of {len(data)} bytes is longer than {MAX_LINE}")
    return data


def create_chat(sender_id: str, text: str, to: str, sequence: int) -> bytes:
    """Return a chat message as bytes. Three times as fast as create_message(), because chat is sent most."""
    quote = json.encoder.encode_basestring_ascii
    head = f'{{"type":"MSG_CHAT","sender_id":{quote(sender_id)},"to":{quote(to)},"content":'
    return f'{head}{quote(text)},"id":{sequence}}}\n'.encode("ascii")


def create_raw(msg_type: str, sender_id: str, to: str, content: str, **extra: Any) -> bytes:
    """Return a message as bytes. `content` is JSON already, so a list for a thousand peers is encoded once."""
    quote = json.encoder.encode_basestring_ascii
    head = f'{{"type":"{msg_type}","sender_id":{quote(sender_id)},"to":{quote(to)}{encode_extra(extra)},"content":'
    return f"{head}{content}}}\n".encode("ascii")


def encode_extra(extra: Dict[str, Any]) -> str:
    """Return further keys as the piece of JSON that stands behind the first ones."""
    return "," + _ENCODER.encode(extra)[1:-1] if extra else ""


def reference(question: Message) -> Dict[str, Any]:
    """Return what an answer repeats of its question: its `re`, if it has one that is short."""
    number = question.get("re")
    is_short = is_count(number) or (type(number) is str and len(number) <= MAX_NAME)
    return {"re": number} if is_short else {}


def pack_lists(encoded: Iterable[str]) -> List[str]:
    """Join encoded records with commas into as few texts as possible, each short enough for one message.

    Nearly always that is one text; without records it is one empty text."""
    lists: List[List[str]] = [[]]
    size = 0
    for record in encoded:
        if (size + len(record) > MAX_LINE - 1024 and lists[-1]) or len(lists[-1]) >= MAX_PEERS:
            lists.append([])
            size = 0
        lists[-1].append(record)
        size += len(record) + 1
    return [",".join(records) for records in lists]


def parse_message(data: bytes) -> Optional[Message]:
    """Return the message in `data`, with or without its newline; None if that is not one valid message."""
    try:
        return parse_line(data)
    except BadMessage:
        return None


def parse_line(line: bytes) -> Message:
    """Return the message on one line. Raises BadMessage."""
    if len(line) > MAX_LINE:
        raise BadMessage(f"longer than {MAX_LINE} bytes")
    try:
        text = line.decode("utf-8").strip(_BLANKS)
    except UnicodeDecodeError:
        raise BadMessage("not UTF-8") from None
    if "\n" in text:
        raise BadMessage("more than one line")
    message, end = _decode(text, 0)
    if end != len(text):
        raise BadMessage("more than one JSON value on a line")
    return _check_message(message)


class Reader:
    """Turns a stream of bytes into messages, in whatever pieces the stream arrives."""

    __slots__ = ("partial", "error")
    ending = b"\n"  # what the end of the stream counts as: it completes a last message

    def __init__(self) -> None:
        self.partial = bytearray()  # an unfinished message
        self.error: Optional[str] = None  # why the stream is invalid; from then on feed() returns nothing

    def feed(self, data: bytes) -> List[Message]:
        """Take the next piece of the stream; return the messages that it completes. Bad input sets `error`.

        At the end of the stream feed `ending`; an empty line is ignored."""
        raise NotImplementedError


class MessageReader(Reader):
    """The reader of JSON lines."""

    __slots__ = ()

    def feed(self, data: bytes) -> List[Message]:
        messages: List[Message] = []
        if self.error is not None:
            return messages
        held = len(self.partial)
        self.partial += data
        end = self.partial.rfind(b"\n", held) + 1
        complete = bytes(self.partial[:end])
        del self.partial[:end]
        try:
            self._parse(complete, messages)
            if len(self.partial) > MAX_LINE:
                raise BadMessage(f"longer than {MAX_LINE} bytes")
        except BadMessage as error:
            self.error = str(error)
            self.partial.clear()
        return messages

    def _parse(self, data: bytes, messages: List[Message]) -> None:
        """Parse whole lines. They are decoded in one go, and each message is scanned where the last one ended."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:  # the lines before the bad one are still messages
            bad = data.rfind(b"\n", 0, error.start) + 1
            self._parse(data[:bad], messages)
            messages.append(parse_line(data[bad:data.index(b"\n", bad)]))
            return
        position, length = 0, len(text)
        while position < length:
            newline = text.find("\n", position)
            plain = text[position] == "{" and newline - position <= MAX_LINE // 4  # at most 4 bytes a character
            message, end = _decode(text, position) if plain else (None, -1)
            if end == newline:
                messages.append(_check_message(message))
            elif text[position:newline].strip(_BLANKS):  # an empty line is ignored
                messages.append(parse_line(text[position:newline].encode("utf-8")))
            position = newline + 1


def _check_message(message: Any) -> Message:
    """Return a decoded value that is a valid message, with the content that its type requires. Raises BadMessage."""
    if type(message) is not dict:
        raise BadMessage("not a JSON object")
    try:
        kind, sender, to, content = message["type"], message["sender_id"], message["to"], message["content"]
    except KeyError as key:
        raise BadMessage(f"no {key.args[0]!r} in it") from None
    if not (type(kind) is type(sender) is type(to) is str):
        raise BadMessage("type, sender_id and to must be strings")
    if len(kind) > MAX_ID or len(sender) > MAX_ID or len(to) > MAX_ID:
        raise BadMessage(f"type, sender_id or to longer than {MAX_ID} characters")
    check = _CHECKS.get(kind)
    if check is not None:
        check(message, content)
    return message


def _decode(text: str, position: int) -> Tuple[Any, int]:
    """Return the JSON value at `position`, and where it ends. Whatever the parser raises becomes BadMessage."""
    try:
        return _SCAN(text, position)
    except (ValueError, StopIteration, RecursionError, MemoryError) as error:
        raise BadMessage("nested too deep" if isinstance(error, RecursionError) else "not JSON") from None


def _reject_constant(name: str) -> Any:
    raise BadMessage(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise BadMessage("a number of more than 20 digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    if len(digits) > 40 or float(digits) in (float("inf"), float("-inf")):
        raise BadMessage("a number that is too large")
    return float(digits)


_BLANKS = " \t\r\n"
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_int=_parse_int, parse_float=_parse_float)
# What raw_decode() wraps in Python code: calling it directly saves a tenth of the time for a message.
_SCAN: Callable[[str, int], Tuple[Any, int]] = getattr(_DECODER, "scan_once", _DECODER.raw_decode)


# The content of each type: its fields, each with a check of the value and, in words, what is allowed. A field
# whose name ends in a question mark may be missing. Fields that are not named here may hold anything.


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer from 0 to MAX_INCARNATION; true and false are not."""
    return type(value) is int and 0 <= value <= MAX_INCARNATION


def is_port(value: Any) -> bool:
    """Whether a JSON value is a TCP port that one can dial."""
    return type(value) is int and 0 < value <= 65535


@functools.lru_cache(maxsize=MAX_PEERS)
def is_username(name: str) -> bool:
    """Whether a name is allowed, and is in NFC already."""
    return _passes(check_username, name)


@functools.lru_cache(maxsize=MAX_PEERS)
def is_channel_name(name: str) -> bool:
    """Whether the name of a channel is allowed, and is case-folded already."""
    return _passes(check_channel, name)


@functools.lru_cache(maxsize=MAX_PEERS)
def is_room(name: str) -> bool:
    """Whether the name of a room is allowed, and is in NFC already."""
    return _passes(check_room, name)


def _passes(check: Callable[[str], str], name: str) -> bool:
    """Whether a check returns a name as it is."""
    try:
        return check(name) == name
    except ValueError:
        return False


@functools.lru_cache(maxsize=MAX_PEERS)
def is_peer_ip(ip: str) -> bool:
    """Whether a text is an IPv4 address that one machine can have."""
    try:
        address = ipaddress.IPv4Address(ip)
    except ValueError:
        return False
    reserved = address.is_multicast or address.is_unspecified or address.is_reserved
    return not reserved and str(address) == ip


def is_loopback(ip: str) -> bool:
    """Whether packets to an IPv4 address stay on this machine."""
    return ip.startswith("127.")


def guesser_at(ip: str) -> str:
    """Return for which address strangers and their guesses are counted: those of this machine's loopback, 16 million,
    are one."""
    return "127.0.0.1" if is_loopback(ip) else ip


def split_id(peer_id: str) -> Optional[Tuple[str, str, int]]:
    """Return (username, ip, port) of a peer id; None if the text is not a peer id."""
    username, at, address = peer_id.rpartition("@")
    ip, colon, port = address.rpartition(":")
    if not (at and colon and port.isascii() and port.isdigit() and len(port) <= 5):
        return None
    valid = is_username(username) and is_peer_ip(ip) and is_port(int(port)) and str(int(port)) == port
    return (username, ip, int(port)) if valid else None


def check_peer(peer: Any) -> bool:
    """Check a peer's record; its id must match its name and address. Returns True or raises BadMessage."""
    _check_fields("a peer", peer, _PEER)
    if peer["id"] != f"{peer['username']}@{peer['ip']}:{peer['port']}":
        raise BadMessage("the id of a peer must be username@ip:port")
    return True


def _is_text(most: int, check: Callable[[str], Any] = lambda text: True) -> Callable[[Any], bool]:
    """Return a check: a text of at most `most` characters that passes `check`, whose cache sees no longer one."""
    return lambda value: type(value) is str and len(value) <= most and bool(check(value))


def _hex(size: int) -> Tuple[Callable[[Any], bool], str]:
    """Return the check of a field that holds `size` bytes, and what is allowed."""
    allowed = re.compile(f"[0-9a-f]{{{2 * size}}}")
    return _is_text(2 * size, allowed.fullmatch), f"{2 * size} hexadecimal digits in lower case"


def _is_list(check: Callable[[Any], bool], most: int = MAX_PEERS) -> Callable[[Any], bool]:
    """Return a check: a list of at most `most` items that each pass `check`."""
    return lambda value: type(value) is list and len(value) <= most and all(map(check, value))


def _is_object(fields: Fields) -> Callable[[Any], bool]:
    """Return a check: an object with these fields. The check raises BadMessage, which names the wrong field."""
    return lambda value: _check_fields("an item", value, fields)


def _check_fields(what: str, content: Any, fields: Fields) -> bool:
    """Check the fields of an object. Returns True, or raises BadMessage, which names the first wrong field."""
    if type(content) is not dict:
        raise BadMessage(f"{what} must be an object with {', '.join(fields)}")
    for name, (check, words) in fields.items():
        key = name.rstrip("?")
        if key not in content:
            if key == name:
                raise BadMessage(f"{what} must have {name}: {words}")
        elif not check(content[key]):
            raise BadMessage(f"{key} of {what} must be {words}")
    return True


def _check_chat(message: Message, text: Any) -> None:
    """Check a chat message, the most frequent type, without the table of fields."""
    if type(text) is not str:
        raise BadMessage("the content of MSG_CHAT must be a text")
    if len(text) > MAX_TEXT // 4 and len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
        raise BadMessage(f"a text longer than {MAX_TEXT} bytes")
    if not is_count(message.get("id", 0)):
        raise BadMessage("the id of MSG_CHAT must be an integer from 0 to 2**53 - 1")


def _is_refusals(ranges: Any) -> bool:
    """Whether a value is a list of [first, last, why], each range above the one before."""
    if type(ranges) is not list or len(ranges) > MAX_REFUSALS:
        return False
    before = -1
    for each in ranges:
        if not (type(each) is list and len(each) == 3 and is_count(each[0]) and is_count(each[1])
                and before < each[0] <= each[1] and _is_reason(each[2])):
            return False
        before = each[1]
    return True


def _are_channels(names: Any) -> bool:
    """Whether a value is a list of the names of channels, none twice."""
    return (type(names) is list and len(names) <= MAX_CHANNELS and all(map(_is_channel_text, names))
            and len(set(names)) == len(names))


def _check_content(message: Message, content: Any) -> None:
    kind = message["type"]
    if content is not None or kind != MSG_SYNC_PEERS_REQUEST:
        _check_fields(f"the content of {kind}", content, _CONTENTS[kind])


_NAME = (_is_text(MAX_NAME, is_username), "1 to 32 characters that can be shown, none of @*:, no / or # at the start")
_PORT = (is_port, "an integer from 1 to 65535")
_COUNT = (is_count, "an integer from 0 to 2**53 - 1")
_is_reason = _is_text(MAX_TEXT)
_is_channel_text = _is_text(MAX_NAME + 1, is_channel_name)
_CHANNELS = (_are_channels, f"at most {MAX_CHANNELS} names of channels in lower case, none twice")
_WORDS = (_is_reason, "a text")
_REFUSALS = (_is_refusals, f"at most {MAX_REFUSALS} of [first, last, why], in rising order")
_INSTANCE = (_is_text(32, lambda text: not text or text.isascii() and text.isalnum()), "at most 32 letters and digits")
_STATUS = (_is_text(MAX_NAME, RANK.__contains__), "alive, suspect, dead or left")
_IP = (_is_text(MAX_NAME, is_peer_ip), "the IPv4 address of one machine")
_ID = (_is_text(MAX_ID, split_id), "username@ip:port")
_IDENTITY: Fields = {"instance?": _INSTANCE, "incarnation?": _COUNT}
_PEER: Fields = {"username": _NAME, "ip": _IP, "port": _PORT, "id": _WORDS, **_IDENTITY, "status?": _STATUS,
                 "age?": _COUNT, "away?": (_is_text(MAX_NOTE), f"a text of at most {MAX_NOTE} characters"),
                 "channels?": _CHANNELS}
_ONE = (check_peer, "a peer")
_PEERS = (_is_list(check_peer), f"a list of at most {MAX_PEERS} peers")
_HELLO_PEER = (lambda peer: check_peer(peer) and bool(peer.get("instance")), "a peer with an instance")
_LEFT = (_is_list(_is_object({"id": _ID, "reason?": _WORDS, **_IDENTITY})), 'a list of {"id", "reason"}')
_YOU = (_is_object({"ip?": (_is_text(MAX_ID), "an address")}), "an object with the ip that was seen")
_ROOM = (_is_text(MAX_NAME, is_room), f"a name of at most {MAX_ROOM} bytes")
_CONVERSATION = (lambda name: name == EVERYONE or _is_channel_text(name), "* or a channel")
_is_message_id = _is_text(64, lambda text: re.fullmatch(r"[0-9A-Za-z]{1,32}-[0-9]{1,16}", text))
_SAID: Fields = {"id": (_is_message_id, "instance-number"), "from": _ONE, "to": _CONVERSATION,
                 "text": (_is_text(MAX_TEXT), "a text"), "age": _COUNT}
_CONTENTS: Dict[str, Fields] = {
    MSG_REGISTER: {"username": _NAME, "port": _PORT, **_IDENTITY, "channels?": _CHANNELS},
    MSG_REGISTER_ACK: {"peer_id": _ID, "peer_list": _PEERS},
    MSG_PEER_LIST_UPDATE: {"joined": _PEERS, "left": _LEFT},
    MSG_CHAT_ACK: {"upto": _COUNT, "refused?": _REFUSALS},
    MSG_CHAT_SETTLED: {"upto": _COUNT},
    MSG_SYNC_PEERS_REQUEST: {"digest?": _WORDS},
    MSG_SYNC_PEERS_RESPONSE: {"peer_list": _PEERS},
    MSG_PEER_NEWS: {"peers": _PEERS},
    MSG_CATCH_UP_REQUEST: {"of": (_is_list(_CONVERSATION[0], MAX_CHANNELS + 1), "a list of conversations"),
                           "most": _COUNT},
    MSG_CATCH_UP_RESPONSE: {"messages": (_is_list(_is_object(_SAID), CATCH_UP), f"at most {CATCH_UP} messages")},
    MSG_HELLO: {"peer": _HELLO_PEER, "you?": _YOU},
    MSG_PROBE: {"number": _COUNT, "incarnation?": _COUNT, "status?": _STATUS},
    MSG_PROBE_ACK: {"number": _COUNT},
    MSG_PROBE_REQUEST: {"peer": _ONE},
    MSG_PROBE_RESULT: {"peer": _ONE},
    MSG_BEACON: {"role": (lambda role: role in ("peer", "server"), "peer or server"), "port": _PORT, "room?": _ROOM,
                 **_IDENTITY},
    MSG_ROOM: {"room": _ROOM, "nonce": _hex(32)},
    MSG_PAKE: {"y?": _hex(32), "confirm?": _hex(64)},
    MSG_GUESSES: {"ip": _IP, "count": (lambda count: is_count(count) and 1 <= count <= MEMBER_GUESSES,
                                       f"an integer from 1 to {MEMBER_GUESSES}")},
    MSG_ERROR: {"reason": _WORDS, "you?": _YOU},
}
_CHECKS: Dict[str, Callable[[Message, Any], None]] = {**dict.fromkeys(_CONTENTS, _check_content), MSG_CHAT: _check_chat}


# ======================================================================================================
# Membership
#
# Which peers are present. A *record* describes a peer on the wire; a *Peer* is what we know of it; a
# *tombstone* is a Peer that is gone. The rules are those of SWIM (Das, Gupta, Motivala 2002) as HashiCorp's
# memberlist applies them, with one change: hearsay, which is what one peer says of another, adds peers but
# removes none. When a peer accuses another (suspect, dead, left), we probe the accused, which can refute it.
# So a liar or a bad cable empties nobody's list. Pure: time and randomness are arguments, changes are results.
# ======================================================================================================

# Kinds of Change, named like their events.
JOINED, GONE, RENAMED, AWAY, CHANNELS = "joined", "left", "renamed", "away", "channels"

RESTARTED = "restarted"  # the reason of a peer whose place another instance has taken

# Verdicts on a record.
NEW = "new"  # it changed the list and is worth passing on
KNOWN = "known"  # nothing new
STALE = "stale"  # we know something newer, which its sender should be told
ACCUSED = "accused"  # it calls a peer suspect or gone that we think is present: probe that peer
CONFLICT = "conflict"  # two instances claim one id, or a peer is said to have moved: dial to see which answers
IMPLAUSIBLE = "implausible"  # not believed and not answered


P = TypeVar("P", bound="Peer")


class Peer:
    """What we know of a peer. Times are seconds on the loop's clock."""

    __slots__ = ("username", "ip", "port", "id", "instance", "incarnation", "status", "added_at", "heard_at",
                 "confirmed_at", "unconfirmed_since", "removed_at", "quiet", "rtt", "away", "channels", "public",
                 "_encoded", "_weight")

    def __init__(self, username: str, ip: str, port: int, instance: str = "", incarnation: int = 0) -> None:
        self.instance = instance  # drawn at random by its process; "" for a program that has none
        self.incarnation = incarnation  # the version of its record; only its owner raises it
        self.status = ALIVE
        self.added_at = 0.0  # when we learned of it
        self.heard_at = 0.0  # when it last sent us anything itself; 0: never
        self.confirmed_at = 0.0  # when another peer last said that it lives
        self.unconfirmed_since: Optional[float] = None  # since when nobody has confirmed it; None: confirmed
        self.removed_at = 0.0  # when it became a tombstone
        self.quiet = False  # shown as quiet: nobody has heard it for a while
        self.rtt: Optional[float] = None  # round trip time of the last probe, or of the hellos, seconds
        self.away = ""  # why its user is away, by the peer's own word; empty: the user is here
        self.channels: Tuple[str, ...] = ()  # those that it is in, by its own word
        self.set_identity(username, ip, port)

    @classmethod
    def from_wire(cls: Type[P], record: Dict[str, Any]) -> P:
        """Make a peer from a checked record."""
        peer = cls(record["username"], record["ip"], record["port"],
                   record.get("instance", ""), record.get("incarnation", 0))
        if "away" in record:
            peer.away = check_note(record["away"])
        if "channels" in record:
            peer.channels = tuple(record["channels"])
        return peer

    def set_identity(self, username: str, ip: str, port: int) -> None:
        """Set name and address, and with them the id."""
        self.username, self.ip, self.port = username, ip, port
        self.id = f"{username}@{ip}:{port}"
        self.public = {"id": self.id, "ip": ip, "port": port, "username": username}  # for events: not to be changed
        self._encoded: Optional[Tuple[int, str]] = None
        self._weight = (-1, 0)

    def set_away(self, note: str) -> None:
        """Note why its user is away; "" for here."""
        self.away, self._encoded = note, None

    def set_channels(self, names: Iterable[str]) -> None:
        """Note which channels it is in."""
        self.channels, self._encoded = tuple(names), None

    @property
    def key(self) -> str:
        """What identifies it across changes of name and address: its instance, or its id if it has none."""
        return self.instance or self.id

    @property
    def address(self) -> Address:
        """The address in its id, where it listens."""
        return self.ip, self.port

    @property
    def weight(self) -> int:
        """The 64 bits that it adds to the digest of a list; they change with its incarnation."""
        if self._weight[0] != self.incarnation:
            self._weight = (self.incarnation, hash64(f"{self.id} {self.instance} {self.incarnation}"))
        return self._weight[1]

    @property
    def encoded(self) -> str:
        """Its record as JSON, as alive and confirmed. It is cached, because long lists consist of these."""
        if self._encoded is None or self._encoded[0] != self.incarnation:
            self._encoded = (self.incarnation, _ENCODER.encode(self.own_record()))
        return self._encoded[1]

    @property
    def ring(self) -> Tuple[int, str]:
        """Its position on the ring that decides who probes whom. Every peer computes the same one."""
        return hash64(self.id), self.id

    @property
    def gone(self) -> bool:
        """Whether this is a tombstone."""
        return self.status in (DEAD, LEFT)

    def last_sign_at(self) -> float:
        """When there was last a sign of life, from the peer itself or through others."""
        return max(self.added_at, self.heard_at, self.confirmed_at)

    def wire(self, now: float, status: Optional[str] = None) -> Dict[str, Any]:
        """Return its record. Ages are sent, never times of day, because clocks differ."""
        record = self.own_record()
        status = status or self.status
        if status != ALIVE:
            record["status"] = status
        since = self.removed_at if self.gone else self.unconfirmed_since
        if since is not None:
            record["age"] = max(0, int(now - since))
        return record

    def own_record(self) -> Dict[str, Any]:
        """Return what its owner says of itself."""
        record = dict(self.public, instance=self.instance, incarnation=self.incarnation)
        if self.away:
            record["away"] = self.away
        if self.channels:
            record["channels"] = list(self.channels)
        return record


class Change(NamedTuple):
    """A change of the list. `reason` says why a peer left, or is away; `old` is what `public` of a renamed peer was, or
    which channels it was in."""

    kind: str
    peer: Any  # of the class of the list's peers
    reason: str = ""
    old: Any = None


Merged = Tuple[str, P, List[Change]]  # verdict, the peer as the list holds it, what changed


class PeerList(Generic[P]):
    """All other peers that are present, and the tombstones of those that were. It never holds `me`."""

    def __init__(self, me: P) -> None:
        self.me = me
        self._make = type(me)  # what records become
        self._present: Dict[str, P] = {}  # by id
        self._by_key: Dict[str, P] = {}  # present peers and tombstones
        self._count_at: Dict[str, int] = {}  # IP address -> number of present peers there
        # Caches, made when they are needed.
        self._sorted: Optional[List[P]] = None  # present peers by name
        self._ring: Optional[List[P]] = None  # present peers by ring position, from our own position on
        self._names: Optional[Dict[str, List[P]]] = None  # case-folded name -> peers, `me` included

    def __len__(self) -> int:
        return len(self._present)

    def present(self) -> List[P]:
        """Return the present peers, sorted by name. The list may be kept but not changed."""
        if self._sorted is None:
            self._sorted = sorted(self._present.values(), key=lambda peer: (natural_key(peer.username), peer.id))
        return self._sorted

    def tombstones(self) -> List[P]:
        """Return the tombstones, the latest last."""
        return [peer for peer in self._by_key.values() if peer.gone]

    def get(self, peer_id: str) -> Optional[P]:
        """Return the present peer with this id."""
        return self._present.get(peer_id)

    def by_key(self, key: str) -> Optional[P]:
        """Return the peer with this key, present or gone."""
        return self._by_key.get(key)

    # -- merging records -------------------------------------------------------------------------------

    def merge_claim(self, record: Dict[str, Any], now: float) -> Merged[P]:
        """Merge a record that one peer sent about another: hearsay."""
        peer = self._make.from_wire(record)
        status, age = record.get("status", ALIVE), record.get("age", 0)
        known = self._by_key.get(peer.key)
        if known is None:
            return self._merge_unknown(peer, status, age, now)
        if peer.incarnation > known.incarnation + MAX_RAISE:
            return IMPLAUSIBLE, known, []
        if known.gone:
            return self._merge_tombstone(known, peer, status, now)
        if peer.incarnation < known.incarnation:
            return STALE, known, []
        if status != ALIVE:
            return ACCUSED, known, []
        if peer.incarnation == known.incarnation:
            return KNOWN, known, []
        if peer.address != known.address:
            return CONFLICT, known, []  # hearsay moves no peer to another address: that would divert its messages
        known.confirmed_at = now
        return self._update(known, peer)

    def merge_own_claim(self, record: Dict[str, Any], now: float) -> Merged[P]:
        """Merge a record that a peer sent about itself over its own connection. It is believed."""
        peer = self._make.from_wire(record)
        known = self._by_key.get(peer.key)
        changes = self._displace(peer, now)
        if known is not None and not known.gone:
            known.heard_at = now
            if known.incarnation > peer.incarnation + MAX_RAISE:
                known.incarnation = peer.incarnation - 1  # somebody lied: no peer is that far ahead of its own word
            if known.incarnation > peer.incarnation:
                return STALE, known, changes
            verdict, known, more = self._update(known, peer)
            return verdict, known, changes + more
        changes += self._make_room(now)
        if known is None:
            known = peer
            changes += self._add(peer, now)
        elif peer.incarnation <= known.incarnation <= peer.incarnation + MAX_RAISE:
            return STALE, known, changes  # it must raise its incarnation first, or others keep their tombstones
        else:
            changes += self._revive(known, peer, now)
        known.heard_at = now
        return (NEW if changes else KNOWN), known, changes

    def remove(self, peer: P, status: str, reason: str, now: float) -> List[Change]:
        """Turn a peer into a tombstone. Returns no change if it was gone already."""
        if peer.gone or self._present.get(peer.id) is not peer:
            return []
        self._take_out(peer)
        peer.status, peer.removed_at, peer.quiet = status, now, False
        self._by_key.pop(peer.key, None)
        self._by_key[peer.key] = peer  # moved to the end: tombstones are in order of entry
        self._bound_tombstones(now)
        return [Change(GONE, peer, reason)]

    # -- choosing --------------------------------------------------------------------------------------

    def digest(self) -> str:
        """Return 16 hexadecimal digits that are equal for two lists with the same peers, `me` included."""
        total = self.me.weight
        for peer in self.shared():
            total ^= peer.weight
        return f"{total:016x}"

    def shared(self) -> List[P]:
        """Return the peers that we tell others about: only confirmed ones, and none that only this machine reaches."""
        local = is_loopback(self.me.ip)
        return [peer for peer in self._present.values()
                if peer.unconfirmed_since is None and (local or not is_loopback(peer.ip))]

    def sample(self, rng: random.Random, count: int, among: Iterable[P]) -> List[P]:
        """Return up to `count` of the peers `among`, at random."""
        pool = sorted(among, key=lambda peer: peer.id)  # the same order in every run, so that a seed repeats a run
        return rng.sample(pool, min(count, len(pool)))

    def get_random_peer(self, rng: random.Random) -> Optional[P]:
        """Return one of the present peers, at random."""
        return next(iter(self.sample(rng, 1, self.present())), None)

    def neighbours(self, count: int) -> Tuple[List[P], List[P]]:
        """Return the `count` peers after us on the ring, which we probe, and those before us, which probe us.

        So every peer is probed by `count` others, and the cost for each does not grow with their number."""
        if self._ring is None:
            self._ring = sorted(self._present.values(), key=lambda peer: peer.ring)
            position = sum(peer.ring < self.me.ring for peer in self._ring)
            self._ring = self._ring[position:] + self._ring[:position]
        return self._ring[:count], self._ring[-count:]

    # -- names -----------------------------------------------------------------------------------------

    def label(self, peer: P) -> str:
        """Return the shortest text that names only this peer: its name, name@ip, or its id."""
        others = [other for other in self._namesakes(peer.username) if other.key != peer.key]
        if not others:
            return peer.username
        if all(other.ip != peer.ip for other in others):
            return f"{peer.username}@{peer.ip}"
        return peer.id

    def label_of(self, peer_id: str) -> str:
        """Return the same from a peer's id, which may be of one that has gone."""
        peer = self.me if peer_id == self.me.id else self.get(peer_id)
        if peer is None:
            parts = split_id(peer_id)
            if parts is None:
                return peer_id
            peer = self._make(*parts)
        return self.label(peer)

    def find(self, text: str) -> List[P]:
        """Return the present peers that a typed text names. Exact matches go before those in another case."""
        text = unicodedata.normalize("NFC", text.strip())
        text = text[1:] if text.startswith("@") else text
        name = text.partition("@")[0]
        matches = [peer for peer in self._namesakes(name) if peer is not self.me
                   and text[len(name):] in ("", f"@{peer.ip}", f"@{peer.ip}:{peer.port}")]
        exact = [peer for peer in matches if peer.username == name]
        return exact or matches

    def _namesakes(self, name: str) -> List[P]:
        if self._names is None:
            self._names = {}
            for peer in [self.me, *self.present()]:
                self._names.setdefault(peer.username.casefold(), []).append(peer)
        return self._names.get(name.casefold(), [])

    # -- the rules -------------------------------------------------------------------------------------

    def _merge_unknown(self, peer: P, status: str, age: int, now: float) -> Merged[P]:
        if age > TOMBSTONE_TIME:
            return IMPLAUSIBLE, peer, []  # its tombstone may be forgotten by now
        if status in (DEAD, LEFT):
            if len(self._by_key) < 2 * MAX_PEERS and peer.instance:
                peer.status, peer.removed_at = status, now - age
                self._by_key[peer.key] = peer
            return KNOWN, peer, []
        holder = self._present.get(peer.id)
        if holder is not None:
            return (CONFLICT if peer.instance else KNOWN), holder, []
        if age:
            peer.unconfirmed_since = now - age
        changes = self._add(peer, now)
        return (NEW if changes else IMPLAUSIBLE), peer, changes

    def _merge_tombstone(self, known: P, peer: P, status: str, now: float) -> Merged[P]:
        if status in (DEAD, LEFT):
            known.incarnation = max(known.incarnation, peer.incarnation)
            return KNOWN, known, []
        if peer.incarnation <= known.incarnation:
            return STALE, known, []
        if peer.id in self._present:
            return CONFLICT, self._present[peer.id], []
        changes = self._revive(known, peer, now)
        return (NEW if changes else IMPLAUSIBLE), known, changes

    def _add(self, peer: P, now: float) -> List[Change]:
        if not self._may_add(peer):
            return []
        peer.added_at = now
        self._put(peer)
        self._by_key[peer.key] = peer
        return [Change(JOINED, peer)]

    def _may_add(self, peer: P) -> bool:
        """Whether there is room for a peer, and it is not `me`."""
        if len(self._present) >= MAX_PEERS or peer.key == self.me.key or peer.id == self.me.id:
            return False
        if len(self._present) < MAX_PER_ADDRESS or peer.ip == self.me.ip:
            return True
        return self._count_at.get(peer.ip, 0) < MAX_PER_ADDRESS

    def _put(self, peer: P) -> None:
        self._present[peer.id] = peer
        self._count_at[peer.ip] = self._count_at.get(peer.ip, 0) + 1
        self.clear_caches()

    def _take_out(self, peer: P) -> None:
        del self._present[peer.id]
        self._count_at[peer.ip] -= 1
        if not self._count_at[peer.ip]:
            del self._count_at[peer.ip]
        self.clear_caches()

    def _revive(self, known: P, peer: P, now: float) -> List[Change]:
        if not self._may_add(peer):
            return []
        known.set_identity(peer.username, peer.ip, peer.port)
        known.status, known.incarnation = ALIVE, peer.incarnation
        known.set_away(peer.away)
        known.set_channels(peer.channels)
        known.unconfirmed_since = None
        return self._add(known, now)

    def _update(self, known: P, peer: P) -> Merged[P]:
        """Take over a newer record of a present peer, perhaps with another name or address."""
        if peer.incarnation <= known.incarnation:  # its own word: whoever passed it on may have dropped some of it
            return KNOWN, known, self._take_over(known, peer)
        if peer.id == known.id:
            known.incarnation = peer.incarnation
            return NEW, known, self._take_over(known, peer)
        if peer.id in self._present or peer.id == self.me.id:
            return CONFLICT, self._present.get(peer.id, known), []
        old = known.public
        self._take_out(known)
        known.set_identity(peer.username, peer.ip, peer.port)
        known.incarnation = peer.incarnation
        self._put(known)
        return NEW, known, [Change(RENAMED, known, old=old), *self._take_over(known, peer)]

    def _take_over(self, known: P, peer: P) -> List[Change]:
        """Take over what a record says of a peer besides its name and address."""
        changes: List[Change] = []
        if known.away != peer.away:
            known.set_away(peer.away)
            changes.append(Change(AWAY, known, peer.away))
        if known.channels != peer.channels:
            changes.append(Change(CHANNELS, known, old=known.channels))
            known.set_channels(peer.channels)
        return changes

    def _displace(self, peer: P, now: float) -> List[Change]:
        """Remove the peer that holds this id if it is another instance: its program was restarted."""
        holder = self._present.get(peer.id)
        if holder is None or holder.key == peer.key:
            return []
        return self.remove(holder, DEAD, RESTARTED, now)

    def _make_room(self, now: float) -> List[Change]:
        """If the list is full, remove a peer that is known only by hearsay, for one that is linked to us."""
        if len(self._present) < MAX_PEERS:
            return []
        unheard = next((peer for peer in self._present.values() if not peer.heard_at), None)
        return self.remove(unheard, DEAD, "never heard", now) if unheard is not None else []

    def _bound_tombstones(self, now: float) -> None:
        """Forget the tombstones that are too old, and the oldest ones if there are too many."""
        tombs = self.tombstones()
        excess = len(tombs) - MAX_PEERS
        for peer in sorted(tombs, key=lambda peer: peer.heard_at > 0):  # first those that we know by hearsay only
            if excess > 0 or now - peer.removed_at > TOMBSTONE_TIME:
                del self._by_key[peer.key]
                excess -= 1

    def clear_caches(self) -> None:
        """Call this after any peer, or `me`, has come, gone or changed its name."""
        self._sorted = self._ring = None
        self._names = None


class News:
    """Records that are being passed on, each a limited number of times: memberlist's retransmit rule.

    That is NEWS_ROUNDS times the digits of the number of peers. It reaches nearly all; gossip reaches the rest."""

    def __init__(self) -> None:
        self._left: Dict[str, List[Any]] = {}  # key -> [peer, status, how many more times to send it]

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, peer: Peer, status: str, size: int) -> None:
        """Pass on a peer's status; `size` peers are present. It replaces earlier news of that peer."""
        self._left.pop(peer.key, None)
        if len(self._left) < MAX_PEERS:
            self._left[peer.key] = [peer, status, NEWS_ROUNDS * len(str(size + 1))]

    def drop(self, peer: Peer, status: str) -> None:
        """Stop passing this status on: it is no longer true."""
        if self._left.get(peer.key, (None, ""))[1] == status:
            del self._left[peer.key]

    def take(self, sendings: int, now: float) -> List[Dict[str, Any]]:
        """Return the records to send to `sendings` peers now, those sent least often first."""
        items = sorted(self._left.items(), key=lambda item: -item[1][2])[:NEWS_BATCH]
        for key, item in items:
            item[2] -= sendings
            if item[2] <= 0:
                del self._left[key]
        return [item[0].wire(now, item[1]) for _, item in items]


def hash64(text: str) -> int:
    """Return 64 bits of BLAKE2b, the same on every machine (hash() differs in every process)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


# ======================================================================================================
# Loop
#
# One thread, one loop, no call that blocks. A turn waits until a socket is ready or a timer is due. Then it
# handles the ready sockets, then the due timers, and at last sends what each connection has queued, in one
# send. Everything that uses time, randomness or the network goes through a Loop, so a test can pass in a
# simulated one. This section knows nothing of chat. An exception in a socket's handler ends its
# connection, never the loop.
# ======================================================================================================

CONNECTING, OPEN, DRAINING, CLOSED = "connecting", "open", "draining", "closed"

_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
UNKNOWN_NAME = "its name is not known at the moment"
REFUSED = "refused"  # the reason given to on_close when nothing listens at the address; others are for people only


class Timer:
    """A call at a later time. Timer() is one that is over. To change a deadline, cancel it and make another."""

    __slots__ = ("when", "_callback", "_args")

    def __init__(self, when: float = 0.0, callback: Optional[Callable[..., None]] = None,
                 args: Tuple[Any, ...] = ()) -> None:
        self.when = when
        self._callback = callback
        self._args = args

    def cancel(self) -> None:
        """Prevent the call; without effect if it was made already."""
        self._callback = None
        self._args = ()

    @property
    def active(self) -> bool:
        """Whether the call is still to come."""
        return self._callback is not None

    def fire(self) -> None:
        """Make the call, once."""
        callback, args = self._callback, self._args
        self.cancel()
        if callback is not None:
            callback(*args)


class RateLimit:
    """A leaky bucket. It holds `amount`, and leaks that much every `per` seconds.

    So a burst of `amount` passes, and in the long run `amount` every `per` seconds. What does not fit takes no room:
    one big message that is refused does not keep the small ones behind it out. `now` is any clock in seconds that
    never goes back. An `amount` of 0 lets nothing pass."""

    __slots__ = ("level", "excess", "_amount", "_per", "_leaked_at")

    def __init__(self, amount: float, per: float = 60.0) -> None:
        self.level = 0.0  # what is in the bucket, as of the last take
        self.excess = 0.0  # what was refused lately; it leaks at the same rate
        self._amount = amount
        self._per = per
        self._leaked_at = 0.0

    def take(self, now: float, cost: float = 1) -> bool:
        """Take `cost` if it fits, and return whether it did; what did not fit is added to `excess`."""
        leaked = self._amount * (now - self._leaked_at) / self._per
        self._leaked_at = now
        self.level = max(0.0, self.level - leaked)
        self.excess = max(0.0, self.excess - leaked)
        if self.level + cost <= self._amount * (1 + 1e-9):  # what has leaked is rounded
            self.level += cost
            return True
        self.excess += cost
        return False

    def wait(self, now: float, cost: float = 1) -> float:
        """Return in how many seconds `cost` fits, 0.0 if it does now. It must not be more than the bucket holds."""
        self.take(now, 0)  # leaks
        missing = self.level + cost - self._amount
        return missing * self._per / self._amount if missing > self._amount * 1e-9 else 0.0


class Handler:
    """The owner of a connection, which calls these methods. `on_close` comes exactly once, and last."""

    __slots__ = ()

    def on_open(self) -> None:
        """The connection that we dialled is open."""

    def on_messages(self, messages: List[Message]) -> None:
        """Messages arrived, in order: all that one read has completed."""

    def on_bad_input(self, reason: str) -> None:
        """The far end sent something that is not a message. Nothing more is read, and the connection closes."""

    def on_close(self, reason: str) -> None:
        """The connection is closed. The reason is REFUSED if nothing listens at the address that we dialled."""


class Connection:
    """A connection that carries messages. It has a buffer in each direction, bounds and time limits.

    States: connecting -> open -> draining -> closed. `close` first sends what is queued, `abort` drops it.
    Both may be called in any state, and from within the handler."""

    is_stranger = False  # it was accepted, and the far end has not said yet who it is: others are read first

    def __init__(self, loop: "Loop", remote: Address, state: str) -> None:
        self.loop = loop
        self.remote = remote
        self.local: Address = ("", 0)
        self.state = state
        self.handler = Handler()
        self.reader: Reader = MessageReader()
        self._line_started = 0.0
        self._line_timer = Timer()
        self._output: Deque[bytes] = collections.deque()
        self.queued = 0  # bytes in _output
        self._flush_pending = False  # the loop will flush it at the end of this turn
        self._reason = ""  # why it is draining
        self._deadline = Timer()  # of the dial, of stalled output, or of draining

    @property
    def unsent(self) -> int:
        """How many bytes wait to be sent."""
        return self.queued

    def describe(self) -> str:
        """Return how it is encrypted; "" if it is not."""
        return ""

    def flush(self) -> None:
        """Send as much of the queue as the system takes. Each kind of connection overrides this."""

    def close_transport(self) -> None:
        """Close what carries the bytes, a socket for example. Each kind of connection overrides this."""

    def send(self, data: bytes, may_wait: bool = False) -> None:
        """Queue bytes, which are sent in this turn, or the next. Does nothing once the connection is closing.

        With `may_wait` they wait up to ACK_DELAY for more to send: that saves us a system call, and the far end a
        turn."""
        if self.state not in (OPEN, CONNECTING):
            return
        self._output.append(data)
        self.queued += len(data)
        if self.queued > MAX_OUTPUT:
            self.abort("it does not read what it is sent")
        elif not self._flush_pending and self.state == OPEN:  # tested here to spare a burst the calls
            if may_wait:
                self.loop.flush_soon(self)
            else:
                self._flush_later()

    def send_now(self, data: bytes) -> None:
        """Send bytes at once. A connection inside this one calls this while it is flushed itself."""
        self._flush_pending = True
        self.send(data)
        self.flush()

    def close(self, reason: str, timeout: float = 0.0) -> None:
        """Send what is queued, end the stream, wait for the far end to do the same, close.

        All this may take `timeout` seconds; 0.0: DRAIN_TIMEOUT."""
        if self.state == CONNECTING:
            self.abort(reason)
        elif self.state == OPEN:
            self.state = DRAINING
            self._reason = reason
            self.set_deadline(timeout or DRAIN_TIMEOUT, reason)
            self._flush_later()

    def abort(self, reason: str) -> None:
        """Close at once. The handler's on_close is called in the next turn."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self.close_transport()
        self._output.clear()
        self.queued = 0
        self._line_timer.cancel()
        self._deadline.cancel()
        self.loop.call_later(0, self._end, self.handler, self._reason or reason)

    def _end(self, handler: Handler, reason: str) -> None:
        """Tell the handler, and forget it: in a cycle both would wait for the collector, which a flood makes slow."""
        self.handler, self.reader = Handler(), MessageReader()
        handler.on_close(reason)

    def set_deadline(self, timeout: float, reason: str) -> None:
        """Abort in `timeout` seconds; this replaces an earlier deadline."""
        self._deadline.cancel()
        self._deadline = self.loop.call_later(timeout, self.abort, reason)

    def hand_over(self, handler: Handler, reason: str) -> None:
        """Give the connection to another handler. To the former one it is closed."""
        former, self.handler = self.handler, handler
        former.on_close(reason)

    def feed(self, data: bytes) -> None:
        """Take bytes from the network, and pass the messages in them to the handler."""
        if self.state != OPEN:
            return
        reader = self.reader
        held = len(reader.partial)
        messages = reader.feed(data)
        if messages:
            self.handler.on_messages(messages)
        if reader.error is not None:
            self._bad_input(reader.error)
        if reader.partial and self.state == OPEN:
            if not held or len(reader.partial) < held + len(data):  # a new message has begun
                self._line_started = self.loop.now()
            if not self._line_timer.active:
                self._line_timer = self.loop.call_later(LINE_TIMEOUT, self._check_line)

    def end_of_stream(self) -> None:
        """The far end sends no more, which also ends its last message. What this turn answers to it is still sent."""
        self.feed(self.reader.ending)
        self.loop.at_turn_end(functools.partial(self.close, "closed by the other side"))

    def _flush_later(self) -> None:
        if not self._flush_pending:
            self._flush_pending = True
            self.loop.flush_later(self)

    def _check_line(self) -> None:
        """Give up on a message that takes too long: nobody may hold a connection with one byte a second."""
        if self.state != OPEN or not self.reader.partial:
            return
        timeout = LINE_TIMEOUT * (1 + len(self.reader.partial) // 65536)  # a long list on a slow network takes longer
        left = self._line_started + timeout - self.loop.now()
        if left > 0:
            self._line_timer = self.loop.call_later(left, self._check_line)
        else:
            self._bad_input("half a message, and then nothing")

    def _bad_input(self, reason: str) -> None:
        if self.state == OPEN:
            self.handler.on_bad_input(reason)
            self.close(reason)


class SocketConnection(Connection):
    """A connection over a TCP socket."""

    def __init__(self, loop: "Loop", sock: socket.socket, remote: Address, state: str) -> None:
        super().__init__(loop, remote, state)
        self._socket = sock
        self._interest = 0
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # the far end is gone already; reading will report it
        if state == OPEN:
            self._learn_local()
            self._set_interest(selectors.EVENT_READ)

    def dial(self) -> None:
        """Dial the far end; if it is given by its name, once that was looked up."""
        if is_name(self.remote[0]):
            self._reason = "its name is still being looked up"  # if that takes longer than the dial may
            self.loop.look_up(self.remote[0], self._on_looked_up)
        else:
            self._connect()

    def _on_looked_up(self, ip: str) -> None:
        self._reason = ""
        if self.state != CONNECTING:
            return
        if ip:
            self.remote = (ip, self.remote[1])
            self._connect()
        else:
            self.abort(UNKNOWN_NAME)

    def _connect(self) -> None:
        self._set_interest(selectors.EVENT_WRITE)
        try:
            self._socket.connect(self.remote)
        except BlockingIOError:
            pass  # dialling goes on in the background
        except (OSError, OverflowError) as error:  # no route, or not an address
            self.abort(error_text(error))

    def close_transport(self) -> None:
        self._set_interest(0)
        self._socket.close()

    def flush(self) -> None:
        self._flush_pending = False
        before = self.queued
        while self._output and self._send_some():
            pass
        if self._output:
            if self.state == OPEN and (self.queued < before or not self._deadline.active):
                self.set_deadline(STALL_TIMEOUT, "it does not read what it is sent")
        elif self.state == DRAINING:
            try:
                self._socket.shutdown(socket.SHUT_WR)  # then read on: to close with unread input would be a reset
            except OSError as error:
                self.abort(error_text(error))
        else:
            self._deadline.cancel()
        if self.state != CLOSED:
            self._set_interest(selectors.EVENT_READ | (selectors.EVENT_WRITE if self._output else 0))

    def _on_ready(self, events: int) -> None:
        """The socket can be read or written."""
        if self.state == CONNECTING:
            self._on_connected()
            return
        if events & selectors.EVENT_WRITE:
            self.flush()
        if events & selectors.EVENT_READ and self.state != CLOSED:
            self._read()

    def _on_connected(self) -> None:
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.abort(error_text(OSError(code, os.strerror(code))))
            return
        self._deadline.cancel()
        self.state = OPEN
        self._learn_local()
        self._set_interest(selectors.EVENT_READ)
        self.handler.on_open()
        self._flush_later()

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.abort(error_text(error))
            return
        if data:
            self.feed(data)
        elif self.state != DRAINING:
            self.end_of_stream()
        elif self._output:
            self._set_interest(selectors.EVENT_WRITE)
        else:
            self.abort(self._reason)  # both ends have sent everything

    def _send_some(self) -> bool:
        """Send many queued pieces in one call. Returns False if the system takes no more for now."""
        data = self._output.popleft()
        if self._output and len(data) < SEND_SIZE:
            pieces, size = [data], len(data)
            while self._output and size < SEND_SIZE:
                pieces.append(self._output.popleft())
                size += len(pieces[-1])
            data = b"".join(pieces)
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.abort(error_text(error))
            return False
        self.queued -= sent
        if sent < len(data):
            self._output.appendleft(data[sent:])
            return False
        return True

    def _learn_local(self) -> None:
        try:
            self.local = self._socket.getsockname()[:2]
        except OSError:
            pass

    def _set_interest(self, interest: int) -> None:
        """Tell the selector what this connection waits for. Nothing else does."""
        if interest != self._interest:
            self.loop.set_interest(self._socket, interest, self._on_ready, self)
            self._interest = interest


Protocols = Dict[bytes, Callable[[Connection], None]]  # how a protocol begins -> what prepares a connection for it


class FirstBytes(Reader):
    """Tells by its first bytes what an accepted connection speaks. It holds them until that is certain.

    `protocols` maps the beginning of a protocol to a call that prepares the connection for it, with another reader
    or handler. All other beginnings are those of messages; `otherwise` is called for them."""

    __slots__ = ("_connection", "_protocols", "_otherwise")

    def __init__(self, connection: Connection, protocols: Protocols,
                 otherwise: Callable[[Connection], None] = lambda connection: None) -> None:
        super().__init__()
        self._connection = connection
        self._protocols = protocols
        self._otherwise = otherwise

    def feed(self, data: bytes) -> List[Message]:
        self.partial += data
        head = bytes(self.partial[:16])
        chosen = next((beginning for beginning in self._protocols if head.startswith(beginning)), None)
        if chosen is not None or not any(beginning.startswith(head) for beginning in self._protocols):
            self._connection.reader = MessageReader()
            (self._otherwise if chosen is None else self._protocols[chosen])(self._connection)
            held = bytes(self.partial)
            self.partial.clear()
            self._connection.feed(held)
        return []


class SocketListener:
    """Accepts connections. `accept(connection)` returns the handler of each."""

    def __init__(self, loop: "Loop", host: str, port: int, accept: Callable[[Connection], Handler]) -> None:
        """Listen on an address. Raises OSError."""
        self._loop = loop
        self._accept = accept
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # on Windows this option would let two programs share a port
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(4096)  # the system limits it; in a short backlog a burst waits for SYN retries
            self._socket.setblocking(False)
        except (OSError, OverflowError):
            self._socket.close()
            raise
        self.address: Address = self._socket.getsockname()[:2]
        self._watch()

    def close(self) -> None:
        """Stop listening; accepted connections stay."""
        self._loop.set_interest(self._socket, 0)
        self._socket.close()

    def _on_ready(self, events: int) -> None:
        end = self._loop.now() + ACCEPT_TIME
        while self._loop.now() < end:
            try:
                self._loop.check_descriptors()
                sock, remote = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EPROTO):
                    continue
                if error.errno in _NO_ROOM:
                    self._pause(error)
                return
            connection = SocketConnection(self._loop, sock, remote[:2], OPEN)
            connection.handler = self._accept(connection)

    def _pause(self, error: OSError) -> None:
        """Accept nobody while no descriptor is free: newcomers wait in the backlog; the loop does not spin."""
        limited_log("descriptors", logging.WARNING, "[P2P] accepting pauses: %s", error_text(error))
        self._loop.set_interest(self._socket, 0)
        self._loop.call_later(ACCEPT_PAUSE, self._watch)

    def _watch(self) -> None:
        if self._socket.fileno() >= 0:  # it may have been closed during the pause
            self._loop.set_interest(self._socket, selectors.EVENT_READ, self._on_ready)


class Unidentified:
    """Connections that have not said yet who they are or what they want; bounded for each address and in all."""

    def __init__(self, most: int = MAX_UNIDENTIFIED, in_all: float = float("inf")) -> None:
        self._most = most
        self._room = in_all
        self._by_ip: Dict[str, Dict[Connection, None]] = {}

    def __iter__(self) -> Iterator[Connection]:
        return itertools.chain.from_iterable([list(each) for each in self._by_ip.values()])

    def add(self, connection: Connection) -> None:
        """Add a connection. If there are too many, the oldest from its address, or from the fullest, is aborted."""
        ip = guesser_at(connection.remote[0])
        waiting = self._by_ip.setdefault(ip, {})
        waiting[connection] = None
        connection.is_stranger = True
        self._room -= 1
        if self._room < 0:
            ip, waiting = max(self._by_ip.items(), key=lambda item: len(item[1]))
        if len(waiting) > self._most or self._room < 0:
            oldest = next(iter(waiting))
            limited_log("strangers", logging.WARNING, "[P2P] too many silent connections from %s", ip)
            self.discard(oldest)
            oldest.abort("too many silent connections")

    def discard(self, connection: Connection) -> None:
        """Remove a connection that has identified itself or is closed."""
        ip = guesser_at(connection.remote[0])
        waiting = self._by_ip.get(ip, {})
        self._room += connection in waiting
        waiting.pop(connection, None)
        connection.is_stranger = False
        if not waiting:
            self._by_ip.pop(ip, None)


class Lan:
    """Sends and receives beacons: datagrams to all machines on the local network, and direct answers to them.

    One socket is bound to the shared port and receives multicasts and broadcasts. For each local address
    there is one more socket. It sends, so that a datagram leaves through every interface, and it receives
    the direct answers. While another program keeps the port for itself, only these work."""

    def __init__(self, loop: "Loop", host: str, port: int,
                 on_datagram: Callable[[bytes, Address], Optional[bytes]]) -> None:
        """Open the sockets. `on_datagram(data, sender)` returns the answer to send, or None."""
        self._loop = loop
        self._host = host
        self._port = port
        self._on_datagram = on_datagram
        self._senders: Dict[str, socket.socket] = {}
        self._shared: Optional[socket.socket] = None
        self.problem = ""  # in words, why beacons can't be received
        self.refresh()

    def refresh(self) -> None:
        """Adapt to changed local addresses (cables, leases), and try again for the shared port if it was taken."""
        current = set(self._addresses())
        if self._shared is None and self._open_shared():
            for ip in list(self._senders):
                self._drop_sender(ip)  # to add it again below, which joins the group on the new shared socket
        for ip in sorted(set(self._senders) - current):
            self._drop_sender(ip)
        for ip in sorted(current - set(self._senders)):
            self._add_sender(ip)

    def broadcast(self, data: bytes) -> None:
        """Send a datagram to the group and as a broadcast, from every local address."""
        for ip, sock in sorted(self._senders.items()):
            targets = [LAN_GROUP] if is_loopback(ip) else [LAN_GROUP, "255.255.255.255"]
            for target in targets:
                try:
                    sock.sendto(data, (target, self._port))
                except OSError as error:
                    log.debug("[P2P] no beacon from %s to %s: %s", ip, target, error_text(error))

    def close(self) -> None:
        """Close all sockets."""
        for ip in list(self._senders):
            self._drop_sender(ip)
        if self._shared is not None:
            self._close(self._shared)

    def _open_shared(self) -> bool:
        """Open the socket on the shared port. Returns False if another program keeps the port for itself."""
        # With --host 127.0.0.1: a socket bound to the group receives nothing that comes from outside this machine.
        ip = LAN_GROUP if is_loopback(self._host) and os.name == "posix" else ""
        try:
            self._shared, self.problem = self._open(ip, self._port), ""
        except OSError as error:
            problem = f"can't listen on UDP port {self._port}: {error_text(error)}"
            if problem != self.problem:
                log.warning("[Lan] %s; trying again", problem)
            self.problem = problem
        return self._shared is not None

    def _addresses(self) -> List[str]:
        if self._host not in ("", "0.0.0.0"):
            return [self._host]
        found = self._loop.local_addresses()
        return [ip for ip in found if not is_loopback(ip)] or found

    def _add_sender(self, ip: str) -> None:
        try:
            sock = self._open(ip, 0)
        except OSError as error:
            log.debug("[P2P] no beacons from %s: %s", ip, error_text(error))
            return
        self._senders[ip] = sock
        member = socket.inet_aton(LAN_GROUP) + socket.inet_aton(ip)
        try:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            if self._shared is not None:
                self._shared.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        except OSError as error:
            log.debug("[P2P] not in the group on %s: %s", ip, error_text(error))

    def _drop_sender(self, ip: str) -> None:
        self._close(self._senders.pop(ip))
        member = socket.inet_aton(LAN_GROUP) + socket.inet_aton(ip)
        if self._shared is None:
            return
        try:
            self._shared.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, member)
        except OSError:
            pass  # the interface is gone, and the membership with it

    def _open(self, ip: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.IPPROTO_IP, 49, 0)  # IP_MULTICAST_ALL off: only groups that this socket joined
            elif hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((ip, port))
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        self._loop.set_interest(sock, selectors.EVENT_READ, functools.partial(self._on_ready, sock))
        return sock

    def _close(self, sock: socket.socket) -> None:
        self._loop.set_interest(sock, 0)
        sock.close()

    def _on_ready(self, sock: socket.socket, events: int) -> None:
        for _ in range(64):
            try:
                data, sender = sock.recvfrom(2048)
            except OSError:
                return
            answer = self._on_datagram(data, sender[:2])
            if answer is not None:
                self._answer(sock, answer, sender[:2])

    def _answer(self, sock: socket.socket, data: bytes, to: Address) -> None:
        """Answer from the socket that received the question, or from the local address most similar to the asker's."""
        if sock is self._shared:
            asker = int(ipaddress.IPv4Address(to[0]))
            nearest = min(self._senders, key=lambda ip: int(ipaddress.IPv4Address(ip)) ^ asker, default=None)
            if nearest is None:
                return
            sock = self._senders[nearest]
        try:
            sock.sendto(data, to)
        except OSError as error:
            log.debug("[P2P] no answer to %s: %s", to[0], error_text(error))


class Resolver:
    """Looks up names of machines, and never waits for that: the system's call may take half a minute.

    So a lookup has a thread, the second exception to "one thread" beside the keyboard on Windows. The thread makes
    that one call, touches nothing of ours, and tells the loop by a socket what it found. A child process would
    cost a second Python. If we asked name servers ourselves, we would miss the names that the system knows from
    /etc/hosts, mDNS or NetBIOS, and these are the names in a room. The program can end while the thread waits.
    Names come from the user alone, so they are few."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._waiting: Dict[str, List[Callable[[str], None]]] = {}  # by name, while it is looked up
        self._found: Dict[str, Tuple[float, str]] = {}  # by name: when, and which address

    def look_up(self, name: str, then: Callable[[str], None]) -> None:
        """Call back in a later turn with the IPv4 address of a name, or "" if it has none."""
        found_at, ip = self._found.get(name, (float("-inf"), ""))
        if self._loop.now() - found_at < NAME_TIME:
            self._loop.call_later(0, then, ip)
            return
        if name not in self._waiting:
            try:
                self._start(name)
            except (OSError, RuntimeError):  # no descriptor, or no thread
                self._loop.call_later(0, then, "")
                return
        self._waiting.setdefault(name, []).append(then)

    def _start(self, name: str) -> None:
        import threading
        near, far = socket.socketpair()

        def call() -> None:
            with far:
                far.sendall(find_ip(name).encode("ascii"))
        threading.Thread(target=call, daemon=True).start()
        self._loop.set_interest(near, selectors.EVENT_READ, functools.partial(self._on_found, name, near))

    def _on_found(self, name: str, near: socket.socket, events: int) -> None:
        with near:
            self._loop.set_interest(near, 0)
            ip = near.recv(64).decode("ascii")
        if ip:
            self._found[name] = (self._loop.now(), ip)
        for then in self._waiting.pop(name):
            self._loop.call_later(0, then, ip)


class Loop:
    """The real loop, with the system's clock, randomness and sockets."""

    def __init__(self, rng: Optional[random.Random] = None) -> None:
        self.random = rng or random.Random()
        self._selector = selectors.DefaultSelector()
        self._timers: List[Tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._ready: Deque[Tuple[selectors.SelectorKey, int]] = collections.deque()  # sockets, not handled yet
        self._strangers: Deque[Tuple[selectors.SelectorKey, int]] = collections.deque()  # the same, of strangers
        self._unflushed: List[Connection] = []
        self._to_flush_soon: Dict[Connection, None] = {}
        self._turn_ends: List[Callable[[], None]] = []
        self._last: List[Timer] = []
        self._stopped = False
        self._addresses = ["127.0.0.1"]
        self._most = max(24, raise_descriptor_limit() - 32)  # descriptors to wait for; 32 are left for other files
        self.look_up = Resolver(self).look_up
        self._signals: Dict[int, Callable[[], None]] = {}
        self._wake: Optional[Tuple[socket.socket, socket.socket]] = None

    def now(self) -> float:
        """Return the time on a clock that never goes back, in seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Return Unix time in seconds: for people, for incarnations, and to notice that the machine slept."""
        return time.time()

    def slept(self) -> float:
        """Return for how many seconds the machine has slept since it was started: now() stood still. 0.0 if the system
        does not tell."""
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> Timer:
        """Call back after `delay` seconds; 0 means in the next turn."""
        timer = Timer(self.now() + delay, callback, args)
        heapq.heappush(self._timers, (timer.when, next(self._count), timer))
        return timer

    def listen(self, host: str, port: int, accept: Callable[[Connection], Handler]) -> SocketListener:
        """Listen on an address. Raises OSError."""
        return SocketListener(self, host, port, accept)

    def connect(self, address: Address, handler: Handler, timeout: float) -> Connection:
        """Dial an IPv4 address or a name. Within `timeout` seconds the handler's on_open or on_close is called."""
        connection = Connection(self, address, CONNECTING)  # to report the failure if there is no descriptor
        connection.handler = handler
        try:
            self.check_descriptors()
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            connection = SocketConnection(self, sock, address, CONNECTING)
            connection.handler = handler
            connection.set_deadline(timeout, f"no answer within {timeout:g} s")
            connection.dial()
        except OSError as error:  # no descriptor
            connection.abort(error_text(error))
        return connection

    def lan(self, host: str, port: int, on_datagram: Callable[[bytes, Address], Optional[bytes]]) -> Lan:
        """Open the beacon sockets. `on_datagram(data, sender)` returns the answer to send, or None."""
        return Lan(self, host, port, on_datagram)

    def local_addresses(self) -> List[str]:
        """Return this machine's IPv4 addresses: first the one of the default route, loopback last."""
        try:
            self._addresses = find_local_addresses()
        except OSError:
            pass  # no free descriptor: the last known addresses have to do
        return self._addresses

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        """Call back whenever a file can be read. An exception in the callback ends `run`: it concerns no connection.

        Raises PermissionError or ValueError for a file that can't be waited for."""
        self._selector.register(fileobj, selectors.EVENT_READ, (lambda events: callback(), self))

    def unwatch(self, fileobj: Any) -> None:
        """Stop watching a file."""
        self._selector.unregister(fileobj)

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Call back, from the loop, when a signal arrives. To be called in the main thread only."""
        if self._wake is None:
            self._wake = socket.socketpair()
            for end in self._wake:
                end.setblocking(False)
            signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
            self.watch(self._wake[0], self._on_signals)
        self._signals[signum] = callback
        signal.signal(signum, lambda *_: None)

    def run(self) -> None:
        """Run turns until `stop` is called."""
        self._stopped = False
        while not self._stopped:
            self.turn()

    def stop(self) -> None:
        """Make `run` return after this turn."""
        self._stopped = True

    def close(self) -> None:
        """Close the loop's own descriptors."""
        if self._wake is not None:
            signal.set_wakeup_fd(-1)
            for end in self._wake:
                end.close()
        self._selector.close()

    def turn(self, longest: Optional[float] = None) -> None:
        """Wait for a socket or a timer, at most `longest` seconds, then handle those that are ready or due.

        The ready sockets share TURN_TIME; each of two flushes has FLUSH_TIME. Sockets that are left come first in the
        next turn, after only the keyboard; so none waits long. Strangers come last, when all else is done and shown."""
        self._select(longest)
        self._handle(self._ready, TURN_TIME)
        now = self.now()
        due: List[Timer] = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:  # timers that these calls add wait for the next turn
            self._run(timer.fire, None)
        self._flush()  # first: the network is at work while listeners are told
        turn_ends, self._turn_ends = self._turn_ends, []
        for callback in turn_ends:
            self._run(callback, None)
        self._flush()
        self._handle(self._strangers, STRANGERS_TIME)
        last, self._last = self._last, []
        for timer in last:
            self._run(timer.fire, None)

    def _select(self, longest: Optional[float]) -> None:
        """Wait until something is ready, unless something is left of the turn before. Watched files come first."""
        left = {key.fileobj for key, _ in itertools.chain(self._ready, self._strangers)}
        for ready in self._selector.select(0.0 if left else self._wait_time(longest)):
            owner = ready[0].data[1]
            if ready[0].fileobj in left:
                continue
            if owner is self:
                self._ready.appendleft(ready)
            elif owner is None or owner.is_stranger:  # None: newcomers and datagrams
                self._strangers.append(ready)
            else:
                self._ready.append(ready)

    def _handle(self, waiting: Deque[Tuple[selectors.SelectorKey, int]], seconds: float) -> None:
        """Handle ready sockets for so long."""
        end = self.now() + seconds
        while waiting:
            key, events = waiting.popleft()
            callback, owner = key.data
            if owner is self:
                callback(events)
                end = self.now() + seconds  # keys do not use up the sockets' time
            else:
                self._run(callback, owner, events)
            if self.now() >= end:
                break

    @property
    def is_behind(self) -> bool:
        """Whether something has come, not from strangers, that there was no time to read in this turn."""
        return bool(self._ready)

    def at_turn_end(self, callback: Callable[[], None]) -> None:
        """Call back once, after this turn has handled everything; then what was queued by that is sent, too."""
        self._turn_ends.append(callback)

    def call_last(self, callback: Callable[[], None]) -> Timer:
        """Call back once, when all else of this turn, or the next, is done: work that can wait."""
        self._last.append(Timer(0.0, callback))
        return self._last[-1]

    def flush_later(self, connection: Connection) -> None:
        """Flush a connection at the end of this turn."""
        self._unflushed.append(connection)

    def flush_soon(self, connection: Connection) -> None:
        """Flush a connection within ACK_DELAY."""
        if not self._to_flush_soon:
            self.call_later(ACK_DELAY, self._on_flush_time)
        self._to_flush_soon[connection] = None

    def _on_flush_time(self) -> None:
        self._unflushed += self._to_flush_soon
        self._to_flush_soon.clear()

    def _flush(self) -> None:
        """Send what is queued. Connections for which there is no time come first in the next flush."""
        end = self.now() + FLUSH_TIME
        queued, self._unflushed = self._unflushed, []
        for number, connection in enumerate(queued, 1):  # one that has closed meanwhile has nothing queued
            self._run(connection.flush, connection)
            if self.now() >= end:
                self._unflushed[:0] = queued[number:]
                break

    def set_interest(self, sock: Any, interest: int, ready: Optional[Callable[[int], None]] = None,
                     owner: Optional[Connection] = None) -> None:
        """Set the events (EVENT_READ, EVENT_WRITE; 0: none) to wait for on a socket, and the callback for them."""
        known = sock in self._selector.get_map()
        if interest and known:
            self._selector.modify(sock, interest, (ready, owner))
        elif interest:
            self._selector.register(sock, interest, (ready, owner))
        elif known:
            self._selector.unregister(sock)

    def check_descriptors(self) -> None:
        """Raise OSError if no more sockets can be waited for: beyond 512 select() on Windows fails for all of them."""
        if len(self._selector.get_map()) >= self._most:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def on_error(self, connection: Optional[Connection]) -> None:
        """An exception reached the loop, which is our bug. It ends the connection, not the loop."""
        log.exception("[P2P] an error in the program; %s", "the connection is closed" if connection else "it goes on")
        if connection is not None:
            connection.abort("an error in the program")

    def _run(self, callback: Callable[..., None], connection: Optional[Connection], *args: Any) -> None:
        """Call back and catch exceptions. Only watched files are not called here."""
        try:
            callback(*args)
        except Exception:
            self.on_error(connection)

    def _wait_time(self, longest: Optional[float]) -> Optional[float]:
        while self._timers and not self._timers[0][2].active:
            heapq.heappop(self._timers)
        if self._unflushed or self._turn_ends or self._last:
            return 0.0
        if not self._timers:
            return longest
        wait = max(0.0, self._timers[0][0] - self.now())
        return wait if longest is None else min(wait, longest)

    def _on_signals(self) -> None:
        assert self._wake is not None
        try:
            signums = self._wake[0].recv(64)
        except OSError:
            return
        for signum in sorted(set(signums) & set(self._signals)):
            self._signals[signum]()


class Ticker:
    """Calls back every `interval` seconds, for the first time at a random offset into the first interval."""

    def __init__(self, loop: Loop, interval: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._interval = interval
        self._callback = callback
        self._timer = loop.call_later(interval * loop.random.random(), self._tick)

    def close(self) -> None:
        """Make no more calls."""
        self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._tick)  # first, so that an error does not end it
        self._callback()


class FairQueue:
    """Work that others cause, in pieces: the owners take turns, a piece each, for some time in each turn of the loop.

    While there is work, the loop does not wait for sockets, so this work also gets all idle time."""

    def __init__(self, loop: Loop, seconds: float, most: float = float("inf")) -> None:
        """It has so many `seconds` of a turn; `most` bounds the items of all lists that wait."""
        self._loop = loop
        self._seconds = seconds
        self._most = most
        self._waiting = 0  # items, and one more for each list
        self._count = itertools.count()
        self._by_owner: Dict[Any, List[Tuple[int, int, Callable[[], Optional[bool]], int]]] = {}  # heaps
        self._timer = Timer()  # of the next turn

    def add(self, owner: Any, number: int, work: Callable[[], Optional[bool]]) -> None:
        """Call `work` when it is its owner's turn, and again while it returns True. Of an owner's work that with the
        lowest number comes first: connections are opened one after the other, for all at once would take too long."""
        self._push(owner, number, work, 0)
        self._set_timer()

    def work_off(self, owner: Any, items: Sequence[Any], handle: Callable[[Any], None],
                 then: Callable[[], None]) -> None:
        """Call `handle` with each item, and `then` at the end, both in the order of the owner's lists.

        It begins at once, unless another list of the owner waits. If too many items wait, the new list's are dropped
        once the time of a turn is over."""
        rest, size = iter(items), len(items) + 1

        def work() -> bool:
            for item in rest:
                handle(item)
                return True
            then()
            return False
        is_too_much = self._waiting + size > self._most
        owner = object() if is_too_much else owner
        is_first = owner not in self._by_owner
        self._push(owner, 0, work, size)
        if is_first:
            self._spend_time(owner)
        if is_too_much and self._by_owner.pop(owner, None) is not None:
            self._waiting -= size
            then()
        self._set_timer()

    def close(self) -> None:
        """Drop what waits."""
        self._timer.cancel()
        self._by_owner.clear()

    def _push(self, owner: Any, number: int, work: Callable[[], Optional[bool]], size: int) -> None:
        heapq.heappush(self._by_owner.setdefault(owner, []), (number, next(self._count), work, size))
        self._waiting += size

    def _set_timer(self, has_begun: bool = False) -> None:
        """Go on when all else of this turn is done, or in a later one if this one had its share."""
        if self._by_owner and not self._timer.active:
            later, last = self._loop.call_later, self._loop.call_last
            self._timer = later(0.001, self._spend_time) if has_begun else last(self._spend_time)

    def _spend_time(self, owner: Any = None) -> None:
        """Do pieces of one owner's work, or of all in turn, until the time or the work is over: at least one piece."""
        end = self._loop.now() + self._seconds
        try:
            while owner in self._by_owner if owner else self._by_owner:
                self._do_piece(owner or next(iter(self._by_owner)))
                if self._loop.now() >= end:
                    break
        finally:
            self._set_timer(has_begun=owner is not None)

    def _do_piece(self, owner: Any) -> None:
        """Do a piece of an owner's work; the others come first then."""
        waiting = self._by_owner[owner]
        piece = heapq.heappop(waiting)
        has_more: Optional[bool] = False
        try:
            has_more = piece[2]()
        finally:  # an error ends this work, and no other
            if has_more:
                heapq.heappush(waiting, piece)
            else:
                self._waiting -= piece[3]
            if self._by_owner.pop(owner, None) is not None and waiting:  # else nothing is left, or it was closed
                self._by_owner[owner] = waiting


def find_local_addresses() -> List[str]:
    """Return this machine's IPv4 addresses: first the one of the default route, loopback last.

    Raises OSError if there is no free descriptor."""
    found: List[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; it only looks up the route
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no default route
        found += _interface_addresses(probe)
    unique = dict.fromkeys(ip for ip in found if is_peer_ip(ip))
    return sorted(unique, key=is_loopback) or ["127.0.0.1"]


def _interface_addresses(sock: socket.socket) -> List[str]:
    try:
        import array
        import fcntl
        import struct
    except ImportError:  # Windows, where the host name resolves to all addresses
        try:
            return socket.gethostbyname_ex(socket.gethostname())[2]
        except OSError:
            return []
    if sys.platform == "linux":  # SIOCGIFCONF lists an interface once for each of its addresses
        size, room = 40 if sys.maxsize > 2 ** 32 else 32, array.array("B", bytes(16000))  # `size`: of a struct ifreq
        try:
            answer = fcntl.ioctl(sock.fileno(), 0x8912, struct.pack("iP", len(room), room.buffer_info()[0]))
        except OSError:
            return []  # forbidden, in some sandboxes
        used = struct.unpack("iP", answer)[0]
        return [socket.inet_ntoa(room[start + 20:start + 24]) for start in range(0, used, size)]
    found = []
    for _, name in socket.if_nameindex():
        try:
            answer = fcntl.ioctl(sock.fileno(), 0xC0206921, name.encode()[:15].ljust(40, b"\0"))  # SIOCGIFADDR
            found.append(socket.inet_ntoa(answer[20:24]))
        except OSError:
            pass  # an interface without an IPv4 address
    return found


def raise_descriptor_limit() -> int:
    """Raise the limit of descriptors as far as the system allows without root. Returns the limit."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (65536, 10240, 4096):  # macOS refuses values below the hard limit that it reports
        if 256 <= soft < wanted and (hard == resource.RLIM_INFINITY or wanted <= hard):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
            except (OSError, ValueError):
                pass
    return 65536 if soft == resource.RLIM_INFINITY else soft


def parse_address(text: str) -> Address:
    """Parse HOST or HOST:PORT; a name is not looked up. Raises ValueError with a sentence that says what is allowed."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(DEFAULT_PORT))
    if not host or ":" in host:
        raise ValueError(f"{text!r} is not HOST or HOST:PORT (IPv4 or a name)")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and is_port(int(port))):
        raise ValueError(f"{port!r} is not a port: 1 to 65535")
    if host.lower() == "localhost":
        host = "127.0.0.1"
    if not (_HOST_NAME.fullmatch(host) if is_name(host) else is_peer_ip(host)):
        raise ValueError(f"{host!r} is not the IPv4 address or the name of a machine")
    return host, int(port)


_HOST_NAME = re.compile(r"\w([\w-]{0,61}\w)?(\.\w([\w-]{0,61}\w)?){0,15}\.?")


def is_name(host: str) -> bool:
    """Whether a host is given by its name, not by its IPv4 address."""
    return bool(host.strip("0123456789."))


def find_ip(name: str) -> str:
    """Look up an IPv4 address of a machine; "" if there is none. This may block for half a minute."""
    try:
        ip = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return ""
    return ip if is_peer_ip(ip) else ""


def format_address(address: Address) -> str:
    """Return an address as HOST:PORT."""
    return f"{address[0]}:{address[1]}"


def room_option(name: str) -> str:
    """Return how to name a closed room on the command line."""
    import shlex
    return f"--room {shlex.quote(name)}"


def start_line(option: str, address: Address, host: str, room: str = "") -> str:
    """Return the command that starts a peer and gives it our address by `option`; `host` and `room` are ours."""
    only = (f" --host {host}" if is_loopback(host) else "") + (f" {room_option(room)}" if room else "")
    return f"python3 p2pchat.py peer{only} {option} {format_address(address)}"


def check_reach(host: str, addresses: Iterable[Address]) -> None:
    """Raise ValueError if `host` is a loopback address, which limits us to this machine, and an address is not."""
    for ip, port in addresses:
        if is_loopback(host) and not is_loopback(ip):
            raise ValueError(f"--host {host} keeps everything on this machine, and {ip}:{port} is not 127.0.0.1: "
                             "leave out --host, or name 127.0.0.1")


def port_problem(host: str, port: int, error: OSError) -> str:
    """Return why listening failed, and what to do about it."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use already; choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} is not allowed without root; choose one above 1023 with --port"
    return f"can't listen on {host}, port {port}: {error_text(error)}; see --host and --port"


_log_limits: Dict[str, Tuple[RateLimit, RateLimit]] = {}  # kind -> of its lines, of the notes that some are missing


def limited_log(kind: str, level: int, text: str, *args: Any) -> None:
    """Log a line that another machine can cause: at most LOG_REPEATS of one kind a minute, so no disk fills up.

    Once a minute it says that lines were left out. `kind` is ours, never text from the network."""
    if not log.isEnabledFor(level):
        return
    if len(_log_limits) > 1000 and kind not in _log_limits:  # some kinds name an address
        kind = "others"
    lines, notes = _log_limits.setdefault(kind, (RateLimit(LOG_REPEATS), RateLimit(1)))
    now = time.monotonic()
    if lines.take(now):
        log.log(level, text, *args)
    elif notes.take(now):
        log.warning("[P2P] more lines of this kind (%s) are left out: at most %d a minute", kind, LOG_REPEATS)


def error_text(error: Exception) -> str:
    """Return the text of a system error; REFUSED for the one that proves that nothing listens at an address."""
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


ANSWERS = {MSG_REGISTER: MSG_REGISTER_ACK, MSG_HEARTBEAT: MSG_HEARTBEAT, MSG_PROBE: MSG_PROBE_ACK,
           MSG_PROBE_REQUEST: MSG_PROBE_RESULT, MSG_SYNC_PEERS_REQUEST: MSG_SYNC_PEERS_RESPONSE,
           MSG_CATCH_UP_REQUEST: MSG_CATCH_UP_RESPONSE}  # by type of question


class Question(NamedTuple):
    """A message that awaits an answer."""

    answer_type: str
    then: Callable[[Message], None]
    timer: Timer  # fires if the answer is late; one that is over if there is no timeout


class Endpoint(Handler):
    """One end of a connection that speaks messages: a table of handlers, a gate in front of it, questions.

    `handlers` maps a message's type to a function of the endpoint and the message. A subclass decides in
    `may_handle` which messages reach it, and sets `connection` before anything arrives."""

    connection: Connection

    def __init__(self, loop: Loop, tag: str, handlers: Mapping[str, Callable[[Any, Message], None]]) -> None:
        self.loop = loop
        self.tag = tag  # begins its lines in the log
        self.handlers = handlers
        self.heard_at = loop.now()  # when messages last arrived
        self.traffic = RateLimit(MAX_MESSAGES)  # messages, and records in lists
        self._questions: Dict[int, Question] = {}
        self._numbers = itertools.count(1)

    def sender_and_to(self) -> Tuple[str, str]:
        """Our id and that of the far end, for the fields `sender_id` and `to`."""
        raise NotImplementedError

    def may_handle(self, message: Message) -> bool:
        """Whether to handle a message. If not, this method has answered it."""
        return True

    def on_messages(self, messages: List[Message]) -> None:
        self.heard_at = self.loop.now()
        for message in messages:
            handle = self.handlers.get(message["type"])
            if handle is not None and self.may_handle(message):
                handle(self, message)
            if self.connection.state != OPEN:
                return

    def on_bad_input(self, reason: str) -> None:
        limited_log("bad input", logging.WARNING, "[%s] bad input from %s:%d: %s",
                    self.tag, *self.connection.remote, reason)
        self.error(reason)

    def send(self, kind: str, content: Any, **extra: Any) -> None:
        """Send one message to the far end."""
        sender, to = self.sender_and_to()
        self.connection.send(create_message(kind, sender, content, to, **extra))

    def ask(self, kind: str, content: Any, then: Callable[[Message], None], timeout: Optional[float] = None,
            otherwise: Callable[[], None] = lambda: None) -> None:
        """Send a question. `then` gets each message of the answer. If the last has not come within `timeout` seconds,
        `otherwise` is called. When MAX_QUESTIONS are open, the oldest is forgotten."""
        number, answer_type = next(self._numbers), ANSWERS[kind]
        if len(self._questions) >= MAX_QUESTIONS:
            self._end_question(next(iter(self._questions)))
        is_only_one = all(question.answer_type != answer_type for question in self._questions.values())
        timer = Timer() if timeout is None else self.loop.call_later(timeout, self._on_no_answer, number, otherwise)
        self._questions[number] = Question(answer_type, then, timer)
        self.send(kind, content, **({} if is_only_one else {"re": number}))  # the only one of its kind needs no number

    def answer(self, question: Message, kind: str, content: Any) -> None:
        """Answer a question; if it has a `re`, the answer repeats it."""
        self.send(kind, content, **reference(question))

    def handle_answer(self, message: Message) -> None:
        """Pass an answer to the question that `re` names, or to the oldest of its kind; ignore any other."""
        kind, number = message["type"], message.get("re")
        if number is None:
            number = next((each for each, question in self._questions.items() if question.answer_type == kind), None)
        question = self._questions.get(number) if type(number) is int else None
        if question is None or question.answer_type != kind or number is None:
            return
        content = message["content"]
        if type(content) is not dict or content.get("more") is not True:  # else another message continues the answer
            self._end_question(number)
        question.then(message)

    def error(self, reason: str, **more: Any) -> None:
        """Tell the far end what was wrong, in words."""
        self.send(MSG_ERROR, {"reason": clean(reason)[:500], **more})

    def refuse(self, reason: str) -> None:
        """Say what was wrong and close."""
        limited_log("refused", logging.WARNING, "[%s] refused %s:%d: %s", self.tag, *self.connection.remote, reason)
        self.error(reason)
        self.connection.close(reason)

    def fail_questions(self) -> None:
        """No answer will come any more."""
        for question in list(self._questions.values()):
            question.timer.fire()
        self._questions.clear()

    def drop_questions(self, answer_type: str = "") -> None:
        """Wait no longer for answers, or for those of one type."""
        for number in [each for each, question in self._questions.items() if answer_type in ("", question.answer_type)]:
            self._end_question(number)

    def _end_question(self, number: int) -> None:
        self._questions.pop(number).timer.cancel()

    def _on_no_answer(self, number: int, otherwise: Callable[[], None]) -> None:
        del self._questions[number]
        otherwise()


# ======================================================================================================
# Closed room
#
# Encrypted, and only for those who know the passphrase. Every process makes a key and a certificate for
# itself; that hides a conversation from listeners, but proves nothing to anybody. So both ends then prove that
# they know the passphrase, by CPACE-X25519-SHA512 as draft-irtf-cfrg-cpace has it. Its messages are of no use
# to anybody who does not know the passphrase: whoever takes part without it learns whether one guess was
# right, but gets nothing with which to try others at home. The proof is bound to the certificate, so a man
# in the middle, who must show one of his own, is refused at both ends. Guesses are counted by address. Proof
# and Guesses are pure. One corner is cut: the time of Python's arithmetic depends on the values. All secrets
# of the exchange are drawn anew for each run, so nobody can measure the same one twice.
# ======================================================================================================

_P = 2**255 - 19  # the prime of Curve25519


def x25519(scalar: bytes, u: bytes) -> bytes:
    """Return `scalar` times the point with the coordinate `u`: X25519 of RFC 7748, a Montgomery ladder."""
    number = int.from_bytes(scalar, "little") & (2**255 - 8) | 2**254
    x1 = int.from_bytes(u, "little") % 2**255 % _P
    x2, z2, x3, z3, swapped = 1, 0, x1, 1, 0
    for position in range(254, -1, -1):  # the letters are the RFC's
        bit = number >> position & 1
        if bit != swapped:
            x2, z2, x3, z3, swapped = x3, z3, x2, z2, bit
        a, b = x2 + z2, x2 - z2
        aa, bb = a * a % _P, b * b % _P
        da, cb, e = (x3 - z3) * a % _P, (x3 + z3) * b % _P, aa - bb
        plus, minus = da + cb, da - cb
        x3, z3 = plus * plus % _P, x1 * (minus * minus % _P) % _P
        x2, z2 = aa * bb % _P, e * (aa + 121665 * e) % _P
    if swapped:
        x2, z2 = x3, z3
    return (x2 * pow(z2, _P - 2, _P) % _P).to_bytes(32, "little")


def lv_cat(*parts: bytes) -> bytes:
    """Join byte strings, each behind its length in LEB128, so that nothing can pass from one to the next."""
    joined = bytearray()
    for part in parts:
        length = len(part)
        while length > 127:
            joined.append(length & 127 | 128)
            length >>= 7
        joined.append(length)
        joined += part
    return bytes(joined)


def cpace_generator(passphrase: bytes, channel: bytes, sid: bytes) -> bytes:
    """Return the point that passphrase, channel identifier and session are mapped to, by Elligator 2."""
    start = lv_cat(b"CPace255", passphrase)
    padding = bytes(max(0, 127 - len(start)))  # so the hash's first block holds nothing but domain and passphrase
    digest = hashlib.sha512(start + lv_cat(padding, channel, sid)).digest()[:32]
    r = int.from_bytes(digest, "little") % 2**255
    v = -486662 * pow(1 + 2 * r * r, -1, _P) % _P
    is_on_curve = pow(v * (v * v + 486662 * v + 1), (_P - 1) // 2, _P) == 1
    return (v if is_on_curve else (-v - 486662) % _P).to_bytes(32, "little")


def cpace_key(sid: bytes, shared: bytes, transcript: bytes) -> bytes:
    """Return ISK, the key that both ends have in common if they began with the same passphrase."""
    return hashlib.sha512(lv_cat(b"CPace255_ISK", sid, shared) + transcript).digest()


# P-256: the prime, the order of the generator, and the generator.
_P256 = 2**256 - 2**224 + 2**192 + 2**96 - 1
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P256_POINT = (0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
               0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5)


def make_certificate(rng: Callable[[int], bytes] = os.urandom) -> Tuple[bytes, bytes]:
    """Return a new self-signed certificate and its key, both as PEM. It names nobody and never expires.

    Nobody checks it: the proof of the passphrase vouches for its hash. Clocks in a lab are wrong, so its dates
    are as far apart as can be."""
    key, nonce = (int.from_bytes(rng(40), "big") % (_P256_ORDER - 1) + 1 for _ in range(2))
    serial = int.from_bytes(rng(16), "big") | 1
    curve, signing = bytes.fromhex("06082A8648CE3D030107"), _der(0x30, bytes.fromhex("06082A8648CE3D040302"))
    public = _der(0x03, b"\0\4", *(each.to_bytes(32, "big") for each in _p256_multiply(key)))
    name = _der(0x30, _der(0x31, _der(0x30, bytes.fromhex("0603550403"), _der(0x0C, b"p2pchat"))))
    dates = _der(0x30, _der(0x17, b"700101000000Z"), _der(0x18, b"99991231235959Z"))
    body = _der(0x30, _der(0xA0, _der_integer(2)), _der_integer(serial), signing, name, dates, name,
                _der(0x30, _der(0x30, bytes.fromhex("06072A8648CE3D0201"), curve), public))
    r = _p256_multiply(nonce)[0] % _P256_ORDER
    digest = int.from_bytes(hashlib.sha256(body).digest(), "big")
    s = pow(nonce, -1, _P256_ORDER) * (digest + r * key) % _P256_ORDER
    signature = _der(0x03, b"\0", _der(0x30, _der_integer(r), _der_integer(s)))
    private = _der(0x30, _der_integer(1), _der(0x04, key.to_bytes(32, "big")), _der(0xA0, curve), _der(0xA1, public))
    return _pem("CERTIFICATE", _der(0x30, body, signing, signature)), _pem("EC PRIVATE KEY", private)


def _p256_multiply(number: int) -> Tuple[int, int]:
    """Return `number`, from 1 to the order less 1, times the generator: double and add, from the highest bit on.

    In Jacobian coordinates, x / z**2 and y / z**3: one division in all instead of one a step, which is 10 ms."""
    p, (x0, y0) = _P256, _P256_POINT
    x, y, z = x0, y0, 1
    for bit in bin(number)[3:]:
        zz, yy = z * z % p, y * y % p
        slope, s = 3 * (x - zz) * (x + zz) % p, 4 * x * yy % p
        x, z = (slope * slope - 2 * s) % p, 2 * y * z % p
        y = (slope * (s - x) - 8 * yy * yy) % p
        if bit == "1":
            zz = z * z % p
            h, r = (x0 * zz - x) % p, (y0 * z * zz - y) % p
            hh = h * h % p
            hhh, v = h * hh % p, x * hh % p
            x, z = (r * r - hhh - 2 * v) % p, z * h % p
            y = (r * (v - x) - y * hhh) % p
    inverse = pow(z, -1, p)
    return x * inverse ** 2 % p, y * inverse ** 3 % p


def _der(tag: int, *parts: bytes) -> bytes:
    """Return an ASN.1 value in DER."""
    value = b"".join(parts)
    size = len(value).to_bytes(2, "big").lstrip(b"\0") or b"\0"
    return bytes([tag]) + (size if len(value) < 128 else bytes([128 + len(size)]) + size) + value


def _der_integer(number: int) -> bytes:
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _pem(label: str, data: bytes) -> bytes:
    import binascii

    text = binascii.b2a_base64(data, newline=False).decode()
    lines = [text[start:start + 64] for start in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


class Room(NamedTuple):
    """A closed room: its name, which is public, and its passphrase, which no text of ours shows."""

    name: str
    passphrase: bytes

    def __repr__(self) -> str:
        return f"Room({self.name!r}, ...)"


def normalise_passphrase(text: str) -> bytes:
    """Return a passphrase as the bytes that are proved: NFC, UTF-8, without the line end of a file's last line.

    Raises ValueError, whose text does not show it, if that is not possible."""
    text = text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith("\n") else text
    try:
        return unicodedata.normalize("NFC", text).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("The passphrase is not UTF-8.") from None


_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"  # none of them sounds like another, in most languages


def make_passphrase(rng: Callable[[int], bytes] = os.urandom) -> str:
    """Return four words that can be read out, as in "bako-lumi-tefo-rida".

    Each is two of 16 * 5 = 80 syllables; 80**8 possibilities are 50.6 bits."""
    number = int.from_bytes(rng(16), "big")  # 77 bits more than needed, so all are equally likely
    words = ["", "", "", ""]
    for position in range(8):
        number, vowel = divmod(number, len(_VOWELS))
        number, consonant = divmod(number, len(_CONSONANTS))
        words[position // 2] += _CONSONANTS[consonant] + _VOWELS[vowel]
    return "-".join(words)


class ProofError(Exception):
    """A run of the proof failed. The text says why, in words that either end may see; it shows no passphrase."""

    def __init__(self, about: str, reason: str) -> None:
        super().__init__(reason)
        self.about = about  # what differs, "room" or "passphrase"; or "protocol": the far end does not keep to it


_PROOF_STEPS = ((MSG_ROOM, "room"), (MSG_PAKE, "y"), (MSG_PAKE, "confirm"))  # what each end receives, in this order


def _proof_message(kind: str, **content: str) -> Message:
    return {"type": kind, "sender_id": "", "to": EVERYONE, "content": content}


class Proof:
    """One run of the proof, at one end of a connection. Each end sends and receives three messages:

        dialler                                          acceptor
           MSG_ROOM {room, nonce}  -->  <--  MSG_ROOM {room, nonce}      both at once
                     MSG_PAKE {y}  -->
                                        <--  MSG_PAKE {y}
               MSG_PAKE {confirm}  -->                                   the dialler is exposed from here
                                        <--  MSG_PAKE {confirm}          only if the dialler's was right

    Whoever gets a right `confirm` first knows that its guess was right, and may hang up. So ClosedRoom counts
    a guess if a run that we dialled ends while it is exposed: the far end may know whether it guessed right, and we
    do not. A run that failed takes no more messages.
    Messages of the run name no sender: names are for members, and whether the far end is one is not known yet."""

    __slots__ = ("room", "dialled", "proved", "_certificate", "_nonce", "_scalar", "_sid", "_y",
                 "_confirm", "_expected", "_step")

    def __init__(self, room: Room, dialled: bool, certificate: bytes,
                 random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        """`certificate` is the SHA-256 of the certificate that the accepting end has shown."""
        self.room = room
        self.dialled = dialled
        self.proved = False  # both ends know the passphrase
        self._certificate = certificate
        self._nonce, self._scalar = random_bytes(32), random_bytes(32)
        self._sid = self._y = self._confirm = self._expected = b""
        self._step = 0  # which of _PROOF_STEPS comes next

    @property
    def is_next_exposing(self) -> bool:
        """Whether to handle the next message is to answer a guess: Guesses.may_start() must allow it first."""
        return self._step == (1 if self.dialled else 2)

    def start(self) -> List[Message]:
        """Return the messages to send at once."""
        return [_proof_message(MSG_ROOM, room=self.room.name, nonce=self._nonce.hex())]

    def handle(self, message: Message) -> List[Message]:
        """Handle a message of the far end, and return what to send. Raises ProofError; then the run is over."""
        step, self._step = self._step, len(_PROOF_STEPS)
        kind, key = _PROOF_STEPS[step] if step < len(_PROOF_STEPS) else ("", "")
        if message["type"] != kind or (kind == MSG_PAKE and {"y", "confirm"} & message["content"].keys() != {key}):
            raise ProofError("protocol", f"not the time for {clean(message['type'])}: the passphrase is proved first")
        answer = (self._handle_room, self._handle_y, self._handle_confirm)[step](message["content"])
        self._step = step + 1
        return answer

    def _handle_room(self, content: Message) -> List[Message]:
        if content["room"] != self.room.name:
            raise ProofError("room", f"this is the closed room {self.room.name}, not {content['room']}")
        theirs = bytes.fromhex(content["nonce"])
        nonces = self._nonce + theirs if self.dialled else theirs + self._nonce
        self._sid = hashlib.sha512(b"p2pchat closed room 1" + self._certificate + nonces).digest()
        if not self.dialled:
            return []
        self._make_y()
        return [_proof_message(MSG_PAKE, y=self._y.hex())]

    def _make_y(self) -> None:
        generator = cpace_generator(self.room.passphrase, self.room.name.encode("utf-8"), self._sid)
        self._y = x25519(self._scalar, generator)

    def _handle_y(self, content: Message) -> List[Message]:
        import hmac

        theirs = bytes.fromhex(content["y"])
        if not self.dialled:
            self._make_y()
        shared = x25519(self._scalar, theirs)
        if theirs == self._y or int.from_bytes(theirs, "little") >= _P or shared == bytes(32):
            raise ProofError("protocol", "that y is not allowed")
        dialler, acceptor = (self._y, theirs) if self.dialled else (theirs, self._y)
        sent, sent_back = lv_cat(dialler, b"dialler"), lv_cat(acceptor, b"acceptor")  # what sets the roles apart
        key = hashlib.sha512(b"CPaceMac" + self._sid + cpace_key(self._sid, shared, sent + sent_back)).digest()
        confirms = [hmac.new(key, each, hashlib.sha512).digest() for each in (sent, sent_back)]
        self._confirm, self._expected = confirms if self.dialled else confirms[::-1]
        if not self.dialled:
            return [_proof_message(MSG_PAKE, y=self._y.hex())]
        return [_proof_message(MSG_PAKE, confirm=self._confirm.hex())]

    def _handle_confirm(self, content: Message) -> List[Message]:
        import hmac

        if not hmac.compare_digest(self._expected, bytes.fromhex(content["confirm"])):
            raise ProofError("passphrase", f"the passphrases for the closed room {self.room.name} differ")
        self.proved = True
        return [] if self.dialled else [_proof_message(MSG_PAKE, confirm=self._confirm.hex())]


class Guesser:
    """What Guesses keeps about one address."""

    __slots__ = ("guessed_at", "proved_at", "_limit", "_amount")

    def __init__(self) -> None:
        self.guessed_at: List[float] = []  # the latest guesses, at most MEMBER_GUESSES
        self.proved_at = float("-inf")
        self._amount = GUESSES
        self._limit = RateLimit(GUESSES)

    def limit(self, now: float) -> RateLimit:
        """Return the limit that holds now, with what was guessed so far."""
        amount = MEMBER_GUESSES if now - self.proved_at < MEMBER_TIME else GUESSES
        self._limit.take(now, 0)  # leaks
        if amount != self._amount:
            level = min(self._limit.level, amount)
            self._amount, self._limit = amount, RateLimit(amount)
            self._limit.take(now, level)
        return self._limit

    def guess(self, now: float) -> None:
        """Count a guess. Runs at the same time may be too many: then the next one waits so much longer."""
        limit = self.limit(now)
        limit.level = min(limit.level + 1, 2.0 * self._amount)
        self.guessed_at = [*self.guessed_at[1 - MEMBER_GUESSES:], now]


class Guesses:
    """How many passphrases each address has tried lately, and when it may try the next.

    Before a run handles a message that exposes it (Proof.is_next_exposing), may_start() must return 0.0; else the
    run waits that long, or until another run with the address ends, and asks again. count() is called when a run
    has failed and the far end may know whether it guessed right.

    Only a guess or a proof makes an entry, and those with the fewest guesses make room. So to have a count of three
    cleared takes some 3,600 addresses that guess three times each in the same minute: it costs more than it wins."""

    def __init__(self) -> None:
        self._guessers: Dict[str, Guesser] = {}

    def may_start(self, ip: str, now: float) -> float:
        """Return in how many seconds an address may guess again; 0.0: now."""
        guesser = self._guessers.get(ip)
        return guesser.limit(now).wait(now) if guesser is not None else 0.0

    def count(self, ip: str, now: float) -> None:
        """Count a guess of an address: a run with it failed."""
        self._find(ip, now).guess(now)

    def proved(self, ip: str, now: float) -> None:
        """An address has proved that it knows the passphrase."""
        self._find(ip, now).proved_at = now

    def wrong_in_last_minute(self, ip: str, now: float) -> int:
        """Return how many guesses of an address in the last minute were wrong, or may have been."""
        guesser = self._guessers.get(ip)
        return sum(now - at < 60.0 for at in guesser.guessed_at) if guesser is not None else 0

    def _find(self, ip: str, now: float) -> Guesser:
        if ip not in self._guessers and len(self._guessers) >= MAX_GUESSERS:
            by_guesses = sorted(self._guessers, key=lambda each: self._guessers[each].limit(now).level)
            for each in by_guesses[:MAX_GUESSERS // 8]:  # many at once, because sorting takes a few ms
                del self._guessers[each]
        return self._guessers.setdefault(ip, Guesser())


# -- connections of a closed room ----------------------------------------------------------------------
#
# A SealedConnection runs TLS over any other connection. For its owner it opens once the proof is over; until then
# nothing of the owner's is read or sent. OpenRoom and ClosedRoom have the same methods, so servers and peers do not
# know in which of the two they are. Only a closed room imports ssl.

ROOM, PASSPHRASE, PROTOCOL = "room", "passphrase", "protocol"  # what a failed proof was about
_BEFORE_PROOF = frozenset((MSG_ROOM, MSG_PAKE, MSG_ERROR))  # all that is read before it
IN_OPEN_ROOM = "an open room is there, and you are in a closed one"


SHORT_PASSPHRASE = 8  # characters; a shorter one is warned of
IS_SHORT = ("the passphrase is short: nobody can try passphrases at home, and each address may guess only three times "
            "a minute, but whoever has many addresses, or days, may find it")


def is_short(passphrase: bytes) -> bool:
    """Whether to warn of a passphrase."""
    return len(passphrase.decode("utf-8")) < SHORT_PASSPHRASE


class TlsError(Exception):
    """What came is not the TLS that we expect; the text says why."""


class Tls:
    """One end of TLS: bytes in, bytes out. It knows no sockets. TlsError is the only exception that leaves it."""

    __slots__ = ("_incoming", "_outgoing", "_object", "_errors", "is_open")

    def __init__(self, context: Any, is_server: bool) -> None:
        import ssl
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._errors = (ssl.SSLWantReadError, ssl.SSLError)
        self.is_open = False  # the handshake is over

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the far end; return the plaintext in them. An incomplete record waits for its rest.

        Everything is read: what stays inside the TLS object wakes no selector. Raises TlsError."""
        wants_more, failed = self._errors
        pieces = []
        try:
            self._incoming.write(data)
            if not self.is_open:
                self._object.do_handshake()
                self.is_open = True
            while True:
                piece = self._object.read(65536)
                if not piece:
                    break  # the far end says that it sends no more
                pieces.append(piece)
        except wants_more:
            pass
        except failed as error:
            raise TlsError(f"broken TLS: {clean(getattr(error, 'reason', None) or 'it does not fit')}") from None
        return b"".join(pieces)

    def seal(self, data: bytes = b"") -> bytes:
        """Return the bytes to send: what TLS itself has to say, and `data` sealed, which a broken one drops."""
        if data and self.is_open:
            try:
                self._object.write(data)
            except self._errors[1]:
                pass  # it failed before, and the connection closes
        return self._outgoing.read()

    def certificate(self) -> bytes:
        """Return the far end's certificate as DER."""
        return self._object.getpeercert(True) or b""

    def describe(self) -> str:
        """Return the version and the cipher."""
        cipher = self._object.cipher()
        return f"{cipher[1]}, {cipher[0]}" if cipher else ""


def make_context(certificate: bytes = b"") -> Any:
    """Return a context for TLS 1.3, or at least 1.2 with ciphers that also authenticate. With a certificate and its key
    (PEM) it is that of the accepting side. Certificates prove nothing here: the passphrase does. Raises OSError."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if certificate else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all those of 1.3 are good
    context.options |= ssl.OP_NO_TICKET | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if certificate:
        if hasattr(context, "num_tickets"):
            context.num_tickets = 0
        load_certificate(context, certificate)
    return context


def sha256_of_pem(certificate: bytes) -> bytes:
    """Return SHA-256 of a certificate, given as PEM."""
    import ssl
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))).digest()


def load_certificate(context: Any, pem: bytes) -> None:
    """Load a certificate and its key, which ssl reads from a file only: on Linux from one that exists in memory alone,
    elsewhere from one that nobody else may read and that is deleted at once. Raises OSError."""
    import tempfile
    if hasattr(os, "memfd_create"):
        try:
            with open(os.memfd_create("p2pchat"), "wb", buffering=0) as memory:
                memory.write(pem)
                context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}")
            return
        except OSError:
            pass  # forbidden, or without /proc
    descriptor, path = tempfile.mkstemp(prefix="p2pchat-")
    try:
        with open(descriptor, "wb") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)


class TlsReader(Reader):
    """Hands the bytes that arrive to a SealedConnection. The end of the stream adds none: half a record is lost."""

    __slots__ = ("_take",)
    ending = b""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        super().__init__()
        self._take = take

    def feed(self, data: bytes) -> List[Message]:
        self._take(data)
        return []


class SealedConnection(Connection, Handler):
    """A connection inside TLS, over `raw`, which is a connection of any kind and has this one as its handler.

    For its owner it is CONNECTING until both ends have proved that they know the passphrase. Until then it reads and
    sends nothing but _BEFORE_PROOF; what the owner sends waits."""

    def __init__(self, room: "ClosedRoom", remote: Address, accept: Optional[Callable[[Connection], Handler]]) -> None:
        """`accept` returns the owner of a connection that was accepted, once the proof is over."""
        super().__init__(room.loop, remote, CONNECTING)
        self.room = room
        self.address = remote  # as it was named, if we dialled
        self.number = next(room.numbers)  # the lower, the older
        self.is_trusted = False  # dialled, and not on a stranger's word: it need not wait until its address may guess
        self.raw = Connection(room.loop, remote, CLOSED)
        self.proof: Optional[Proof] = None
        self.is_exposed = False  # the far end that we dialled may know whether it guessed right, and we do not
        self._accept = accept
        self._speaks_tls = accept is None
        self._tls: Optional[Tls] = None  # made once there is work for it: strangers' ends would take too long
        self._taken = 0  # bytes from the far end before the proof
        self._empty = 0  # bytes after it beyond those that hold as much text
        self._unread: List[bytes] = []  # those that wait for their turn
        self._is_queued = False
        self._held: List[Message] = []  # they wait until the far end may guess again
        self._pause = Timer()  # ends then
        self._timer = Timer()  # bounds the whole proof

    @property
    def unsent(self) -> int:
        return self.queued + self.raw.queued

    @property
    def is_stranger(self) -> bool:
        return self.raw.is_stranger

    @is_stranger.setter
    def is_stranger(self, is_stranger: bool) -> None:
        self.raw.is_stranger = is_stranger

    @property
    def is_dialled(self) -> bool:
        """Whether we dialled the far end."""
        return self._accept is None

    @property
    def guesser(self) -> str:
        """The address that its guesses, and the work that it causes, count for."""
        return guesser_at(self.remote[0])

    def describe(self) -> str:
        return self._tls.describe() if self._tls is not None else ""

    # -- the connection below --------------------------------------------------------------------------

    def accepted(self, raw: Connection, protocols: Protocols) -> None:
        """Wait for the first bytes of a connection that was accepted."""
        self.raw, self.local = raw, raw.local
        self._timer = self.loop.call_later(HELLO_TIMEOUT, self.on_late)
        raw.reader = FirstBytes(raw, {**protocols, b"\x16": self.start_tls, b"{": self.on_clear}, self.on_noise)

    def start_tls(self, raw: Connection) -> None:
        """What is below speaks TLS: hand over its bytes."""
        raw.reader = TlsReader(self.take)
        self._speaks_tls = True

    def on_open(self) -> None:
        self.remote, self.local = self.raw.remote, self.raw.local
        self._timer = self.loop.call_later(HELLO_TIMEOUT, self.on_late)
        self._tls = self.room.make_tls(is_server=False)
        self._tls.receive(b"")  # begins the handshake
        self._answer()

    def on_clear(self, raw: Connection) -> None:
        """Somebody speaks to us in the clear. What it says is not read: it could be long."""
        name = self.room.name
        self.fail(ROOM, f"this is the closed room {name}: {room_option(name)}")

    def on_noise(self, raw: Connection) -> None:
        self.fail(PROTOCOL, "this is a closed room of p2pchat, and that is not TLS")

    def on_close(self, reason: str) -> None:
        if self._is_queued and self.state != CLOSED:
            self._reason = self._reason or reason  # first handle what it has sent
        else:
            self.abort(reason)
            self.room.forget(self)

    def on_late(self) -> None:
        """The far end takes too long."""
        self.fail(PROTOCOL, "too many wrong passphrases came from your address: try again later" if self._pause.active
                  else "no proof of the passphrase came in time")

    def take(self, data: bytes) -> None:
        """Take bytes from `raw`; none: the far end sends no more. Bytes before the proof wait for their turn."""
        if self.state == OPEN and data:
            self._receive(data)
        elif self.state == OPEN:
            self.loop.at_turn_end(functools.partial(self.close, "closed by the other side"))
        elif self.state == CONNECTING and data:
            self._taken += len(data)
            if self._taken > MAX_PROOF_BYTES:
                self.fail(PROTOCOL, f"more than {MAX_PROOF_BYTES} bytes before the proof")
                return
            self._unread.append(data)
            if not self._is_queued:
                self._is_queued = True
                self.room.strangers.add(self.guesser, self.number, self._read_on)

    def close(self, reason: str, timeout: float = 0.0) -> None:
        super().close(reason, timeout)
        self.flush()  # what is below may close in this turn as well

    def flush(self) -> None:
        self._flush_pending = False
        if self._output and self.state in (OPEN, DRAINING):
            assert self._tls is not None
            data, self.queued = b"".join(self._output), 0
            self._output.clear()
            self.raw.send_now(self._tls.seal(data))
        if self.state == DRAINING:
            self.raw.close(self._reason)

    def close_transport(self) -> None:
        self._timer.cancel()
        self._pause.cancel()
        self._unread.clear()
        self._held.clear()
        if self.is_exposed:
            self.room.end_run(self)
            self.room.on_failed(self, PASSPHRASE, "")  # it hung up, and may know whether it guessed right
        self._tls = None  # 50 KB, which would wait for the collector of cycles
        if self.raw.state in (CONNECTING, OPEN) and self.raw.handler is self:  # else it is sending our last words,
            self.raw.abort("closed")  # or was handed over
        if self.raw.state != DRAINING:  # it counts as long as it takes a descriptor
            self.room.forget(self)

    def abort(self, reason: str) -> None:
        if self.state == CLOSED and self.raw.handler is self:
            self.raw.abort(reason)  # and sends no last words any more
        super().abort(reason)

    def _receive(self, data: bytes) -> None:
        assert self._tls is not None
        try:
            text = self._tls.receive(data)
        except TlsError as error:
            self._bad_input(str(error))
            return
        self._empty = max(0, self._empty + len(data) - 2 * len(text))
        if self._empty > MAX_EMPTY:
            self._bad_input(f"more than {MAX_EMPTY} bytes of TLS without content")
            return
        self.feed(text)
        self._answer()

    def _answer(self) -> None:
        """Send what TLS itself has to say."""
        answer = self._tls.seal() if self._tls is not None else b""
        if answer:
            self.raw.send(answer)

    # -- the proof -------------------------------------------------------------------------------------

    def fail(self, about: str, words: str, shown: str = "") -> None:
        """End an attempt to open the connection. Tell the far end why, and our user perhaps in other words."""
        if self.state != CONNECTING:
            return
        if words:
            self._say(MSG_ERROR, {"reason": words, "about": about, "room": self.room.name})
        self.raw.close(words)
        self.proof = None
        has_hidden = self.is_exposed and about == PROTOCOL  # what it knows now, behind silence or rubbish
        self.room.end_run(self, has_guessed=bool(words) and about == PASSPHRASE)
        self.room.on_failed(self, *(PASSPHRASE, "") if has_hidden else (about, shown or words))
        self.abort(shown or words)

    def _say(self, kind: str, content: Any) -> None:
        """Send a message before the proof: in the clear, if the far end does not speak TLS, and from nobody."""
        data = create_message(kind, "", content)
        if self._tls is not None:
            self.raw.send(self._tls.seal(data))
        elif not self._speaks_tls:
            self.raw.send(data)

    def _read_on(self) -> None:
        """Work off what came before the proof."""
        data, self._is_queued = b"".join(self._unread), False
        self._unread.clear()
        if self.state == CONNECTING:
            self._prove(data)
        if self._reason and self.state in (CONNECTING, OPEN):  # what is below was closed meanwhile
            self.abort(self._reason)

    def _prove(self, data: bytes) -> None:
        self._tls = self._tls or self.room.make_tls(is_server=True)
        if self.is_dialled and self._taken == len(data) and data[:1] not in b"\x15\x16":
            self.fail(*(ROOM, IN_OPEN_ROOM) if data[:1] == b"{" else (PROTOCOL, "what answers there is no p2pchat"))
            return
        try:
            text = self._tls.receive(data)
        except TlsError as error:
            self.fail(PROTOCOL, str(error))
            return
        self._answer()
        if self._tls.is_open and self.proof is None:
            self.proof = self.room.make_proof(self._tls, self.is_dialled)
            self._say_all(self.proof.start())
        messages = self.reader.feed(text)
        self._held += messages
        self._handle_held()
        if self.reader.error is not None:
            self.fail(PROTOCOL, self.reader.error)
            self._bad_input(self.reader.error)  # if the proof has succeeded

    def _say_all(self, messages: List[Message]) -> None:
        for message in messages:
            self._say(message["type"], message["content"])

    def read_held(self) -> None:
        """The far end may perhaps guess now: go on when it is its turn."""
        self._pause.cancel()
        if self.state == CONNECTING:
            self.room.strangers.add(self.guesser, self.number, self._handle_held)

    def _handle_held(self) -> None:
        """Handle the messages that came before the proof; those after its last one are for the owner."""
        while self._held and self.state == CONNECTING:
            message = self._held[0]
            wait = self.room.seconds_to_wait(self)
            if wait > 0:
                if not self._pause.active:
                    self._pause = self.loop.call_later(wait, self.read_held)
                return
            del self._held[0]
            self._handle(message)
        if self._held and self.state == OPEN:
            messages, self._held = self._held, []
            self.handler.on_messages(messages)

    def _handle(self, message: Message) -> None:
        assert self.proof is not None
        content = message["content"]
        if message["type"] == MSG_ERROR:
            about = content.get("about")
            about = about if about in (ROOM, PASSPHRASE) else PROTOCOL
            limited_log("refused by", logging.INFO, "[P2P] %s:%d refuses us: %s", *self.remote,
                        clean(content["reason"])[:200])  # it is no member: nothing of what it says is for the screen
            self.fail(about, "", {ROOM: "another room is there", PROTOCOL: "what answers there is no member"}.get(
                about, f"the passphrase there for the closed room {self.room.name} is another"))
        elif message["type"] not in _BEFORE_PROOF:
            self.fail(PROTOCOL, "prove that you know the passphrase first")
        else:
            if self.proof.is_next_exposing and self.is_dialled:
                self.room.expose(self)
            try:
                self._say_all(self.proof.handle(message))
            except ProofError as error:
                other = f"the closed room {content.get('room')} is there, not {self.room.name}"
                self.fail(error.about, str(error), other if error.about == ROOM else "")
                return
            if self.proof.proved:
                self._open()

    def _open(self) -> None:
        """Both ends have proved that they know the passphrase: the owner gets the connection."""
        self._timer.cancel()
        self.state = OPEN
        self._line_started = self.loop.now()  # of what came after the proof
        self.room.on_proved(self)
        if self._accept is not None:
            self.handler = self._accept(self)
        else:
            self.handler.on_open()
        self._flush_later()


OnMismatch = Callable[[Address, bool, str, str], None]  # address, whether we dialled it, `about`, and in words


class OpenRoom:
    """Connections as they are: whoever is on the network can read them, and can join."""

    name = ""
    has_proved = False  # somebody has accepted our passphrase

    def __init__(self, loop: Loop, on_mismatch: OnMismatch) -> None:
        """`on_mismatch` is told of connections that failed because the far end is in another room."""
        self.loop = loop
        self.on_mismatch = on_mismatch

    def listen(self, host: str, port: int, accept: Callable[[Connection], Handler], protocols: Protocols
               ) -> SocketListener:
        """Listen for members, and for whoever speaks one of these protocols. Raises OSError."""
        def accept_any(connection: Connection) -> Handler:
            connection.reader = FirstBytes(connection, {**protocols, b"\x16": self._on_tls})
            return accept(connection)
        return self.loop.listen(host, port, accept_any)

    def connect(self, address: Address, handler: Handler, timeout: float, is_trusted: bool = True) -> Connection:
        """Dial a member. One that only strangers named is not trusted: it may get no more guesses than others."""
        return self.loop.connect(address, handler, timeout)

    def beacon(self) -> Dict[str, Any]:
        """Return what a beacon says of the room."""
        return {"room": self.name} if self.name else {}

    def may_dial(self, ip: str) -> bool:
        """Whether to dial an address on the word of others."""
        return True

    def wrong_guesses(self, ip: str) -> int:
        """How many wrong passphrases an address has tried in the last minute."""
        return 0

    def change_passphrase(self, passphrase: bytes) -> None:
        """Prove another one from now on."""

    def close(self) -> None:
        """Close what is unproved."""

    def _on_tls(self, connection: Connection) -> None:
        """Somebody in a closed room dialled us."""
        connection.handler.on_bad_input("this is an open room, and you are in a closed one: leave out --room")
        connection.close("it is in a closed room")
        self.on_mismatch(connection.remote, False, ROOM, "it is in a closed room")


class ClosedRoom(OpenRoom):
    """Makes connections of which both ends know the passphrase."""

    def __init__(self, loop: Loop, on_mismatch: OnMismatch, room: Room) -> None:
        """Raises ImportError without ssl, and OSError if the certificate can't be loaded."""
        super().__init__(loop, on_mismatch)
        certificate, key = make_certificate()
        self._contexts = (make_context(), make_context(certificate + key))
        self._sha256 = sha256_of_pem(certificate)
        self._room = room
        self.name = room.name
        self.strangers = FairQueue(loop, PROOF_TIME)
        self.numbers = itertools.count()
        self.guesses = Guesses()
        self._unproved = Unidentified(in_all=MAX_UNPROVED)
        self._exposed: Dict[str, int] = {}  # by address: how many runs under way are
        self._waiting: Dict[str, Dict[SealedConnection, None]] = {}  # by address: those that may not guess yet

    def listen(self, host: str, port: int, accept: Callable[[Connection], Handler], protocols: Protocols
               ) -> SocketListener:
        def accept_any(raw: Connection) -> Handler:
            sealed = SealedConnection(self, raw.remote, accept)
            sealed.accepted(raw, protocols)
            self._unproved.add(sealed)
            return sealed
        return self.loop.listen(host, port, accept_any)

    def connect(self, address: Address, handler: Handler, timeout: float, is_trusted: bool = True) -> Connection:
        sealed = SealedConnection(self, address, None)
        sealed.handler, sealed.is_trusted = handler, is_trusted
        sealed.raw = self.loop.connect(address, sealed, timeout)
        sealed.start_tls(sealed.raw)
        return sealed

    def may_dial(self, ip: str) -> bool:
        return not self.guesses.may_start(guesser_at(ip), self.loop.now())

    def wrong_guesses(self, ip: str) -> int:
        return self.guesses.wrong_in_last_minute(guesser_at(ip), self.loop.now())

    def change_passphrase(self, passphrase: bytes) -> None:
        self._room = self._room._replace(passphrase=passphrase)
        self.guesses = Guesses()  # those who seemed to guess wrong may have been right
        self.has_proved = False

    def close(self) -> None:
        for connection in self._unproved:
            connection.abort("leaving")

    # -- what connections ask for ----------------------------------------------------------------------

    def make_tls(self, is_server: bool) -> Tls:
        """Begin TLS on a connection."""
        return Tls(self._contexts[is_server], is_server)

    def make_proof(self, tls: Tls, is_dialled: bool) -> Proof:
        """Begin the proof on a connection."""
        sha256 = hashlib.sha256(tls.certificate()).digest() if is_dialled else self._sha256
        return Proof(self._room, is_dialled, sha256)

    def seconds_to_wait(self, connection: SealedConnection) -> float:
        """How long the far end must wait for an answer that tells it whether it guessed right."""
        if connection.proof is None or not connection.proof.is_next_exposing or connection.is_trusted:
            return 0.0
        ip, now = connection.guesser, self.loop.now()
        wait, under_way = self.guesses.may_start(ip, now), self._exposed.get(ip, 0)
        if connection.is_dialled and under_way and under_way >= GUESSES - self.guesses.wrong_in_last_minute(ip, now):
            wait = max(wait, HELLO_TIMEOUT)  # until a run ends: a hundred runs must not get a hundred answers
        if wait > 0:
            self._waiting.setdefault(ip, {})[connection] = None
        return wait

    def expose(self, connection: SealedConnection) -> None:
        """We are about to confirm first. An acceptor that confirms is not exposed: it has checked the dialler before.

        It waits for no run under way, either, or two that dial each other at the same time would wait for good."""
        connection.is_exposed = True
        self._exposed[connection.guesser] = self._exposed.get(connection.guesser, 0) + 1

    def end_run(self, connection: SealedConnection, has_guessed: bool = False) -> None:
        """A run failed. If the far end may know by now whether it guessed right, that was a guess, however it ends."""
        if connection.is_exposed or has_guessed:
            self.guesses.count(connection.guesser, self.loop.now())
        self._free(connection)

    def on_proved(self, connection: SealedConnection) -> None:
        """A connection is a member's."""
        self.has_proved = True
        self._unproved.discard(connection)
        self.guesses.proved(connection.guesser, self.loop.now())
        self._free(connection)

    def _free(self, connection: SealedConnection) -> None:
        """A run is not exposed any more: let the next at that address go on."""
        ip = connection.guesser
        self._leave_queue(connection)
        if connection.is_exposed:
            connection.is_exposed = False
            self._exposed[ip] -= 1
            if not self._exposed[ip]:
                del self._exposed[ip]
        next_one = next(iter(self._waiting.get(ip, {})), None)
        if next_one is not None:
            self._leave_queue(next_one)
            next_one.read_held()

    def on_failed(self, connection: SealedConnection, about: str, words: str) -> None:
        """The far end is no member."""
        address = connection.address if connection.is_dialled else connection.remote
        self.on_mismatch(address, connection.is_dialled, about, words)

    def forget(self, connection: SealedConnection) -> None:
        """A connection is closed."""
        self._unproved.discard(connection)
        self._leave_queue(connection)

    def _leave_queue(self, connection: SealedConnection) -> None:
        waiting = self._waiting.get(connection.guesser, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.guesser, None)


class RoomError(Exception):
    """A closed room can't be had on this machine; the text says why."""


def check_ssl() -> None:
    """Raise RoomError if this Python has no ssl: a closed room is refused then, and never weakened."""
    try:
        import ssl  # noqa: F401
    except ImportError:
        raise RoomError("this Python has no ssl module, which a closed room needs: look for another python3") from None


def make_room(loop: Loop, room: Optional[Room], on_mismatch: OnMismatch) -> OpenRoom:
    """Return what makes the connections of a closed room, or of an open one. Raises RoomError."""
    if room is None:
        return OpenRoom(loop, on_mismatch)
    check_ssl()
    try:
        return ClosedRoom(loop, on_mismatch, room)
    except OSError as error:
        import ssl
        why = "its ssl module can't do what that needs" if isinstance(error, ssl.SSLError) else \
            "its certificate can't be kept in a file for a moment"
        raise RoomError(f"no closed room on this machine: {why}: {error_text(error)}") from None


# ======================================================================================================
# Discovery server
#
# Introduces peers to one another. No chat passes through it. Each connection has
# a Session; the Session of a registered peer stands in `_peers` under the peer's id. Joins and leaves are
# gathered for UPDATE_GATHER_TIME seconds, encoded once and sent to everybody: a thousand peers that come at once
# cost each of them one list and a few messages. Besides, server and peers hand out this program over HTTP.
# ======================================================================================================


class RequestReader(Reader):
    """The reader of an HTTP request, which becomes {"method", "target"}. What comes after the first is ignored."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        super().__init__()
        self._done = False

    def feed(self, data: bytes) -> List[Message]:
        if self._done or self.error is not None:
            return []
        self.partial += data
        head, blank_line, _ = bytes(self.partial).replace(b"\r\n", b"\n").partition(b"\n\n")
        if len(head) > MAX_REQUEST:
            self.error = f"an HTTP request of more than {MAX_REQUEST} bytes"
            self.partial.clear()
        elif blank_line:
            self._done = True
            self.partial.clear()
            words = head.partition(b"\n")[0].decode("latin-1").split(" ")
            if len(words) == 3 and words[0] in ("GET", "HEAD") and words[2].startswith("HTTP/1."):
                return [{"method": words[0], "target": words[1]}]
            self.error = "not an HTTP request"
        return []


def http_response(status: str, body: bytes, headers: str = "Content-Type: text/plain; charset=utf-8\r\n") -> bytes:
    """Return a response, after which the connection ends."""
    head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\nCache-Control: no-cache\r\nConnection: close"
    return f"{head}\r\n\r\n".encode("ascii") + body


def download_page(address: Address, digest: str, option: str, room: str = "") -> str:
    """Return the page that says how to get the program and to start it. `option` names where the page comes from."""
    here = format_address(address)
    file = f"http://{here}/p2pchat.py"
    start = f"p2pchat.py peer --user YOURNAME{f' {room_option(room)}' if room else ''} {option} {here}"
    who = "Whoever is on this network can read what is said here, and can join."
    if room:
        who = (f"Here is the closed room {room}: encrypted, and only for those who know its passphrase.\n"
               "It asks for it. First compare the file's SHA-256 with the one on the server's own screen:\n"
               "whoever can change what you download gets the passphrase that you type into it.")
    return f"""\
p2pchat {__version__}: chat for a room full of machines on one network.
One file; it needs Python 3.8 or newer and nothing else.
{who}

Linux and macOS:
    curl -O {file}
    python3 {start}

Windows:
    curl.exe -O {file}
    py {start}

SHA-256 of the file:
    {digest}
Compare it with the one on the screen of whoever told you of this page.
"""


@functools.lru_cache(maxsize=1)
def read_program() -> bytes:
    """Return the file of this program, or b"" if it cannot be read."""
    try:
        with open(__file__, "rb") as file:
            return file.read()
    except OSError:
        return b""


class Download(Handler):
    """One connection that speaks HTTP."""

    def __init__(self, files: "FileServer", connection: Connection) -> None:
        self.files = files
        self.connection = connection
        self.request: Message = {}

    def on_messages(self, messages: List[Message]) -> None:
        self.request = messages[0]
        self.files.on_request(self)

    def on_bad_input(self, reason: str) -> None:
        self.connection.send(http_response("400 Bad Request", f"{reason}\n".encode("utf-8")))

    def on_close(self, reason: str) -> None:
        self.files.on_closed(self)


class FileServer:
    """Hands out this program over HTTP: the file at /p2pchat.py, and at / a page that says what to type.

    The file is read once, so everybody gets what runs here. Requests wait for their turn."""

    def __init__(self, loop: Loop, option: str, room: str = "") -> None:
        """`option` is the one by which a peer names us, --server or --join; `room` is the name of a closed room."""
        self.source = read_program()
        self.digest = hashlib.sha256(self.source).hexdigest()
        self._loop = loop
        self._option = option
        self._room = room
        self._partial = Unidentified()  # connections whose request is not complete
        self._waiting: Dict[Download, None] = {}
        self._serving: Dict[Download, None] = {}
        self._limits: Dict[str, RateLimit] = {}  # by address
        self._timer = Timer()

    @property
    def protocols(self) -> Protocols:
        """What FirstBytes needs to know of HTTP."""
        return {b"GET ": self._accept, b"HEAD ": self._accept}

    def on_request(self, download: Download) -> None:
        """Answer a request, now or when it is its turn."""
        self._partial.discard(download.connection)
        if len(self._waiting) >= HTTP_WAITING:
            download.connection.send(http_response("503 Service Unavailable", b"Too many requests; try again.\n"))
            download.connection.close("too many requests")
            return
        self._waiting[download] = None
        self._serve()

    def on_closed(self, download: Download) -> None:
        """Forget a connection; the next one may have its turn."""
        self._partial.discard(download.connection)
        self._waiting.pop(download, None)
        if download in self._serving:
            del self._serving[download]
            self._serve()

    def response(self, request: Message, address: Address) -> bytes:
        """Return the response to a request that came to an address of ours."""
        response = http_response("404 Not Found", b"There is only / and /p2pchat.py here.\n")
        if request["target"] == "/":
            response = http_response("200 OK", download_page(address, self.digest, self._option, self._room).encode())
        elif request["target"] == "/p2pchat.py" and self.source:
            kind = "Content-Type: text/x-python; charset=utf-8\r\nContent-Disposition: attachment\r\n"
            response = http_response("200 OK", self.source, kind)
        return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if request["method"] == "HEAD" else response

    def _accept(self, connection: Connection) -> None:
        connection.reader = RequestReader()
        connection.hand_over(Download(self, connection), "it asks for the program")
        self._partial.add(connection)

    def _serve(self) -> None:
        """Answer those whose turn it is. Those who asked too often are looked at again after a while."""
        for download in list(self._waiting):
            if len(self._serving) >= HTTP_SERVING:
                break
            if self._may_serve(download.connection.remote[0]):
                del self._waiting[download]
                self._serving[download] = None
                self._answer(download)
        if self._waiting and not self._timer.active:
            self._timer = self._loop.call_later(60.0 / HTTP_A_MINUTE, self._serve)

    def _may_serve(self, ip: str) -> bool:
        if sum(each.connection.remote[0] == ip for each in self._serving) >= HTTP_AT_ONCE:
            return False
        if len(self._limits) > MAX_PEERS:
            self._limits.clear()
        return self._limits.setdefault(ip, RateLimit(HTTP_A_MINUTE)).take(self._loop.now())

    def _answer(self, download: Download) -> None:
        connection, request = download.connection, download.request
        limited_log("download", logging.INFO, "[HTTP] %s %s for %s:%d", request["method"],
                    clean(request["target"])[:80], *connection.remote)
        connection.send(self.response(request, connection.local))
        connection.close("answered", HTTP_TIMEOUT)


class Session(Endpoint):
    """One connection to the server: of a registered peer, or of a program that asks for the list."""

    def __init__(self, server: "DiscoveryServer", connection: Connection) -> None:
        super().__init__(server.loop, "Server", server.handlers)
        self.server = server
        self.connection = connection
        self.peer_id: Optional[str] = None  # once it is registered
        self.ids: Tuple[str, ...] = ()  # its last eight ids: a message under way may bear an older one
        self.identity: Dict[str, Any] = {}  # its instance and incarnation, if it told them
        self.encoded = ""  # its record as JSON
        self.reference: Dict[str, Any] = {}  # the `re` of its last registration
        self.registrations = RateLimit(MAX_RENAMES)  # each is told to everybody

    def sender_and_to(self) -> Tuple[str, str]:
        return self.server.id, self.peer_id or ""

    def may_handle(self, message: Message) -> bool:
        """Only a registered peer may send a heartbeat or say goodbye, and only under its own id."""
        if message["type"] not in (MSG_HEARTBEAT, MSG_UNREGISTER) or (
                self.peer_id and message["sender_id"] in self.ids):
            return True
        self.refuse(f"sender_id is not yours, which is {self.peer_id}" if self.peer_id else "register first")
        return False

    def on_close(self, reason: str) -> None:
        self.server.on_session_closed(self, reason)

    def error(self, reason: str, **more: Any) -> None:
        super().error(reason, role="server", **more)


class DiscoveryServer:
    """The server. Use: DiscoveryServer(loop, settings).start(), then run the loop."""

    def __init__(self, loop: Loop, settings: Optional[ServerSettings] = None, room: Optional[Room] = None) -> None:
        """With a `room` it serves that closed one. Raises RoomError if there can be none."""
        self.loop = loop
        self.settings = settings or ServerSettings()
        self.id = ""
        self.handlers: Dict[str, Callable[[Session, Message], None]] = {
            MSG_REGISTER: self.handle_register,
            MSG_HEARTBEAT: lambda session, message: session.answer(message, MSG_HEARTBEAT, None),
            MSG_UNREGISTER: self.handle_unregister,
            MSG_SYNC_PEERS_REQUEST: self.handle_sync_request,
            MSG_HELLO: lambda session, _: session.error("this is a discovery server: say MSG_REGISTER"),
            MSG_CHAT: lambda session, _: session.error("this is a discovery server: chat goes from peer to peer"),
        }
        self._listener: Optional[SocketListener] = None
        self._lan: Optional[Lan] = None
        self._monitor: Optional[Ticker] = None
        self.room = make_room(loop, room, self._on_mismatch)
        self._sessions: Dict[Session, None] = {}
        self.files = FileServer(loop, "--server", self.room.name)
        self._unidentified = Unidentified()  # not registered
        self._registrations: Dict[str, RateLimit] = {}  # by address
        self._peers: Dict[str, Session] = {}  # by id
        self._joined: Dict[str, None] = {}  # ids, since the last update was sent
        self._left: Dict[str, Dict[str, Any]] = {}  # id -> what the update will say of it
        self._gathering = Timer()
        self._tell_again_at = 0.0  # not before: telling everybody costs the more the more there are
        self._stopping = False

    # -- starting and stopping -------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._listener is not None, "not started"
        return self._listener.address

    def start(self) -> None:
        """Listen. Raises OSError when the port can't be had."""
        self._listener = self.room.listen(self.settings.host, self.settings.port, self._accept, self.files.protocols)
        log.info("[Server] starting")
        self.id = f"server@{format_address(self.address)}"
        self._monitor = Ticker(self.loop, self.settings.check_interval, self.monitor_peers)
        if self.settings.lan:
            self._lan = self.loop.lan(self.settings.host, DEFAULT_PORT, self._on_beacon)
        log.info("[Server] listening on %s:%d", *self.address)

    def how_to_join(self) -> List[str]:
        """Return the lines that the user needs now."""
        host, port = self.address
        here = (self.loop.local_addresses()[0] if host == "0.0.0.0" else host, port)
        return ["On each machine, to get the program and to chat:",
                f"    curl -O http://{format_address(here)}/p2pchat.py",
                f"    {start_line('--server', here, self.settings.host, self.room.name)}",
                "SHA-256 of the program:", f"    {self.files.digest}"]

    def stop(self) -> None:
        """Say goodbye to everybody and close. The last messages need some more turns of the loop."""
        if self._stopping:
            return
        log.info("[Server] goodbye: telling %d peers", len(self._peers))
        self._stopping = True
        for closable in (self._listener, self._lan, self._monitor, self.room):
            if closable is not None:
                closable.close()
        for session in list(self._sessions):
            session.error("the server stops")
            session.connection.close("the server stops")

    @property
    def peer_ids(self) -> List[str]:
        """The ids of the registered peers."""
        return sorted(self._peers)

    # -- connections -----------------------------------------------------------------------------------

    def _accept(self, connection: Connection) -> Handler:
        session = Session(self, connection)
        self._sessions[session] = None
        self._unidentified.add(connection)
        return session

    def _on_mismatch(self, address: Address, is_dialled: bool, about: str, words: str) -> None:
        """Somebody is in another room, or has another passphrase."""
        limited_log(about, logging.WARNING, "[Server] %s:%d is not in this room: %s", *address, words)

    def on_session_closed(self, session: Session, reason: str) -> None:
        """A connection is gone, and with it the peer that was registered over it."""
        self._sessions.pop(session, None)
        self._unidentified.discard(session.connection)
        if session.peer_id is not None and not self._stopping:
            self.unregister_peer(session, f"connection lost: {reason}")

    def monitor_peers(self) -> None:
        """Drop each connection that was silent for the heartbeat timeout; open beacon sockets on new addresses."""
        limit = self.loop.now() - self.settings.heartbeat_timeout
        for session in [each for each in self._sessions if each.heard_at < limit]:
            if session.peer_id is not None:
                limited_log("timeout", logging.INFO, "[Monitor] timeout: %s", session.peer_id)
                self.unregister_peer(session, "timed out")
            session.refuse(f"nothing heard for {self.settings.heartbeat_timeout:g} s")
        if self._lan is not None:
            self._lan.refresh()

    # -- messages from peers ---------------------------------------------------------------------------

    def handle_register(self, session: Session, message: Message) -> None:
        """A peer registers, for the first time or with another name or address."""
        content = message["content"]
        ip = self._reachable_ip(session.connection, content)
        peer_id = f"{content['username']}@{ip}:{content['port']}"
        if peer_id not in self._peers and self._is_full(ip):
            session.refuse(f"the server is full: {MAX_PEERS} peers, {MAX_PER_ADDRESS} from one address")
        elif self._registers_too_often(session, ip):
            session.refuse("you register too often")
        else:
            session.reference = reference(message)
            self.register_peer(session, {"id": peer_id, "ip": ip, "port": content["port"],
                                         "username": content["username"]}, content)

    def handle_unregister(self, session: Session, message: Message) -> None:
        """A peer says that it leaves."""
        self.unregister_peer(session, "left")
        session.connection.close("left")

    def handle_sync_request(self, session: Session, message: Message) -> None:
        """Send the list to anybody that asks, but not while something is still queued for it."""
        if session.connection.unsent > 0:
            return
        lists = pack_lists(each.encoded for each in self._peers.values())
        for number, peers in enumerate(lists, 1):
            more = ',"more":true' if number < len(lists) else ""
            content = f'{{"peer_list":[{peers}]{more}}}'
            session.connection.send(create_raw(MSG_SYNC_PEERS_RESPONSE, self.id, message["sender_id"], content,
                                               **reference(message)))

    def _on_beacon(self, data: bytes, sender: Address) -> Optional[bytes]:
        """Answer a peer that looks for a server."""
        message = parse_message(data)
        if message is None or message["type"] != MSG_BEACON or not message["content"].get("server_wanted"):
            return None
        if message["content"].get("room", "") != self.room.name:
            return None
        content = {"role": "server", "port": self.address[1], **self.room.beacon()}
        return make_beacon(self.id, content, len(data)) or None

    # -- the list --------------------------------------------------------------------------------------

    def register_peer(self, session: Session, record: Dict[str, Any], content: Dict[str, Any]) -> None:
        """Enter a session's peer in the list, in place of any other with its id."""
        peer_id = record["id"]
        former = self._peers.get(peer_id)
        if former is not None and former is not session:
            self.unregister_peer(former, "registered anew")
            del self._left[peer_id]  # it has not left: its record is replaced
            former.refuse("somebody registered under the same id")
        if session.peer_id not in (None, peer_id):
            self.unregister_peer(session, "renamed")
        self._unidentified.discard(session.connection)
        session.peer_id = peer_id
        session.ids = (*session.ids[-7:], peer_id)
        session.identity = {key: content[key] for key in ("instance", "incarnation") if key in content}
        channels = {"channels": content["channels"]} if content.get("channels") else {}
        session.encoded = _ENCODER.encode({**record, **session.identity, **channels})
        self._peers[peer_id] = session
        self._joined[peer_id] = None
        limited_log(f"registered from {record['ip']}", logging.INFO, "[Server] registered %s", peer_id)
        self._gather()

    def unregister_peer(self, session: Session, reason: str) -> None:
        """Take a session's peer out of the list, and tell the others why."""
        peer_id = session.peer_id
        assert peer_id is not None
        session.peer_id = None
        del self._peers[peer_id]
        self._joined.pop(peer_id, None)
        self._left[peer_id] = {"id": peer_id, "reason": clean(reason), **session.identity}
        limited_log("dropped", logging.INFO, "[Server] dropped %s: %s", peer_id, reason)
        self._gather()

    def _registers_too_often(self, session: Session, ip: str) -> bool:
        """Whether a connection or an address exceeds its registrations a minute: each is told to everybody."""
        if len(self._registrations) > MAX_PEERS:
            self._registrations.clear()
        now = self.loop.now()
        limit = self._registrations.setdefault(ip, RateLimit(MAX_PER_ADDRESS))
        has_room = limit.take(now) or ip in self.loop.local_addresses()
        return not (session.registrations.take(now) and has_room)

    def _is_full(self, ip: str) -> bool:
        """Whether there is no room for another peer at an address; the server's own machine may have any number."""
        if len(self._peers) >= MAX_PEERS:
            return True
        if len(self._peers) < MAX_PER_ADDRESS or ip in self.loop.local_addresses():
            return False
        return sum(f"@{ip}:" in peer_id for peer_id in self._peers) >= MAX_PER_ADDRESS

    def _reachable_ip(self, connection: Connection, content: Dict[str, Any]) -> str:
        """The address that the server sees; for a peer on the server's own machine one that others can reach."""
        seen = connection.remote[0]
        if not is_loopback(seen):
            return seen
        own, claimed = self.loop.local_addresses(), content.get("ip")
        if claimed in own:
            return str(claimed)
        return seen if is_loopback(self.settings.host) else own[0]

    # -- telling the peers -----------------------------------------------------------------------------

    def _gather(self) -> None:
        if not self._gathering.active:
            wait = max(UPDATE_GATHER_TIME, self._tell_again_at - self.loop.now())
            self._gathering = self.loop.call_later(wait, self.broadcast_peer_update)

    def broadcast_peer_update(self) -> None:
        """Send the whole list to the newcomers, and what has changed to everybody else."""
        newcomers = [self._peers[peer_id] for peer_id in self._joined]
        others = [session for peer_id, session in self._peers.items() if peer_id not in self._joined]
        gone = _ENCODER.encode(list(self._left.values()))
        for joined in pack_lists(each.encoded for each in newcomers):
            update = create_raw(MSG_PEER_LIST_UPDATE, self.id, EVERYONE, f'{{"joined":[{joined}],"left":{gone}}}')
            gone = "[]"
            for session in others:
                session.connection.send(update)
        self._introduce(newcomers)
        rest = UPDATE_REST * (3 if self.room.name else 1)  # TLS takes so much longer
        self._tell_again_at = self.loop.now() + len(self._peers) * rest
        limited_log("broadcast", logging.INFO, "[Broadcast] %d joined, %d left: told %d and answered %d",
                    len(self._joined), len(self._left), len(others), len(newcomers))
        self._joined.clear()
        self._left.clear()

    def _introduce(self, newcomers: List[Session]) -> None:
        """Answer the newcomers' registrations. The list is encoded once; only the first bytes differ."""
        if not newcomers:
            return
        first, *rest = pack_lists(each.encoded for each in self._peers.values())
        tail = f'"peer_list":[{first}]}}}}\n'.encode("ascii")
        more = [create_raw(MSG_PEER_LIST_UPDATE, self.id, EVERYONE, f'{{"joined":[{peers}],"left":[]}}')
                for peers in rest]
        for session in newcomers:
            peer_id, repeated = json.dumps(session.peer_id), encode_extra(session.reference)
            head = (f'{{"type":"{MSG_REGISTER_ACK}","sender_id":{json.dumps(self.id)},"to":{peer_id}{repeated},'
                    f'"content":{{"peer_id":{peer_id},')
            for piece in (head.encode("ascii"), tail, *more):
                session.connection.send(piece)


def make_beacon(sender_id: str, content: Dict[str, Any], size: int) -> bytes:
    """A beacon padded to `size` bytes, or b"" when it does not fit: an answer is never longer than its question."""
    message = {"type": MSG_BEACON, "sender_id": sender_id, "to": EVERYONE, "content": content, "pad": ""}
    bare = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8")  # shorter than with escapes
    return bare[:-2] + b" " * (size - len(bare) - 1) + bare[-2:] + b"\n" if len(bare) < size else b""


# ======================================================================================================
# Peer node
#
# A peer is client and server at once. PeerNode holds what a peer knows: the list of peers, the news that
# is being passed on, the addresses that were dialled. Its helpers do one job each, in this order:
#   Whereabouts  the address by which we are known
#   OtherRooms   who is here, but in another room than ours, or with another passphrase
#   Links        connections to other peers: dialling, saying hello, who is at the far end
#   Detector     failure detection: probes, suspicion, and whether it is ourselves who are isolated
#   Gossip       what peers tell each other about others: news at once, lists where they differ
#   Discovery    the connection to a discovery server
#   Identity     what we say of ourselves: name and address, away, channels
#   Delivery     chat messages: numbered, kept until acknowledged, shown once and in order
#   Recall       what was said before a newcomer came: asks for that, and tells it
#   Finder       looks for others: addresses named by hand, beacons on the local network
# Each calls only those above it. To reach others it makes an upcall: it calls a short method of PeerNode,
# which calls the helpers concerned, in the right order. Everything that they keep about one peer stands in
# its Contact. The node tells its listeners by events and shows nothing. A hello proves
# nothing: its sender must be seen at the address that it claims, or answer there.
# ======================================================================================================


class ChatError(Exception):
    """Something that the user asked for can't be done; the text says why, in a sentence for the user."""


class Contact(Peer):
    """A peer, and everything that the node's helpers keep about it."""

    __slots__ = ("link", "via", "has_ended", "contested_at", "banned_until", "suspicion", "askers", "sync_by_user",
                 "outbox", "inbox", "last_words")

    def __init__(self, username: str, ip: str, port: int, instance: str = "", incarnation: int = 0) -> None:
        super().__init__(username, ip, port, instance, incarnation)
        self.link: Optional[Link] = None  # the one over which we send
        self.via: Optional[Address] = None  # another address of its machine, at which we reached it
        self.has_ended = False  # it said goodbye, or its address refused us after it was gone: its program has ended
        self.contested_at = float("-inf")  # when it was asked whether it lives: somebody elsewhere claims to be it
        self.banned_until = float("-inf")
        self.suspicion: Optional[Suspicion] = None
        self.askers: Dict[Link, Dict[str, Any]] = {}  # peers that asked us to probe it -> what the answer repeats
        self.sync_by_user: Optional[bool] = None  # None: no lists to compare; else: did the user ask for it?
        self.outbox: Optional[Outbox] = None  # None until something is sent to it
        self.inbox: Optional[Inbox] = None  # None until a chat message comes from it
        self.last_words = ""  # what it says while it leaves

    @property
    def route(self) -> Address:
        """Where to dial it."""
        return self.via or self.address

    @property
    def has_waiting_messages(self) -> bool:
        """Whether something that was sent to it is not acknowledged yet."""
        return self.outbox is not None and bool(self.outbox.waiting)

    @property
    def is_direct(self) -> bool:
        """Whether it is heard over a link of our own, and not through others."""
        return self.heard_at > 0 and self.link is not None

    def describe(self, now: float) -> Tuple[str, str, str]:
        """Return in words how we hear it, how long ago we last did, and how long a round trip takes."""
        how = "quiet" if self.quiet else "directly" if self.is_direct else "through others"
        since = now - (self.heard_at if self.is_direct else self.last_sign_at())
        return how, f"{max(0, since):.0f} s", "" if self.rtt is None else f"{self.rtt * 1000:.1f} ms"


class Link(Endpoint):
    """A connection to another peer. It is *bound* once we know whose it is: then `peer` is set."""

    def __init__(self, node: "PeerNode", address: Address, dialled: bool) -> None:
        super().__init__(node.loop, "P2P", node.handlers)
        self.node = node
        self.address = address  # of the far end, as it was named: by its IP or its host's name
        self.dialled = dialled  # by us
        self.peer: Optional[Contact] = None
        self.ids: Tuple[str, ...] = ()  # that it may send as: its id, and up to seven older ones
        self.greeted_at = 0.0  # when we said hello
        self.announced_id = ""  # the id under which the far end knows us; empty until we said hello
        self.inbox: Optional[Inbox] = None  # of a program that chats without a hello
        self.is_resumed = False  # the messages that waited were sent over it, so new ones may follow
        self.used_at = node.loop.now()
        self.listed_at = float("-inf")  # when our list was last sent over it
        self.warned_at = float("-inf")  # when its peer was last told that it is suspected
        self.renames = RateLimit(MAX_RENAMES)
        self.catch_ups = RateLimit(2 * MAX_CHANNELS)  # questions for what was said
        self.failure = ""  # why it can't be bound, in words
        self.timer = Timer()  # fires if the far end has not said hello in time

    def sender_and_to(self) -> Tuple[str, str]:
        return self.node.me.id, self.peer.id if self.peer else EVERYONE

    def may_handle(self, message: Message) -> bool:
        """A peer sends under its own id only, and before its hello few types of messages."""
        if self.peer is None:
            if message["type"] in _FROM_ANYONE:
                return True
            self.refuse("say MSG_HELLO first")
        elif message["sender_id"] in self.ids:
            return True
        else:
            self.refuse(f"sender_id is not yours, which is {self.ids[-1]}")
        return False

    def on_open(self) -> None:
        self.node.whereabouts.on_local_address(self.connection.local[0])
        self.node.links.say_hello(self)

    def on_messages(self, messages: List[Message]) -> None:
        self.node.check_clock()  # which closes all links if this process was stopped
        if self.connection.state == OPEN and self.take_traffic(len(messages)):
            self.node.on_heard(self)
            super().on_messages(messages)

    def on_close(self, reason: str) -> None:
        self.timer.cancel()
        self.node.links.on_link_closed(self, reason)
        self.fail_questions()

    def send(self, kind: str, content: Any, **extra: Any) -> None:
        self.used_at = self.loop.now()
        super().send(kind, content, **extra)

    def error(self, reason: str, **more: Any) -> None:
        super().error(reason, you={"ip": self.connection.remote[0]}, **more)

    def take_traffic(self, amount: int) -> bool:
        """Count messages, or records in lists. If they exceed MAX_MESSAGES a minute, ban the peer and return False."""
        self.used_at = self.loop.now()
        if self.traffic.take(self.used_at, amount) or not self.node.settings.budget:  # 0 lifts this limit, too
            return True
        self.node.links.ban(self)
        return False


_FROM_ANYONE = frozenset((MSG_HELLO, MSG_CHAT, MSG_CHAT_SETTLED, MSG_SYNC_PEERS_REQUEST, MSG_ERROR, MSG_REGISTER))


class Whereabouts:
    """The address by which we are known. An address at which others see us beats one from which a connection left,
    which beats a guess. Of those that others see, the first stays, unless it is foreign (a router's, if we are
    behind NAT) and a later one is this machine's own."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.is_fixed = node.settings.host != "0.0.0.0"  # by --host
        self._is_seen = False  # whether others saw us at our address
        self._is_behind_nat = False  # whether they saw us at an address that is not this machine's
        self._own: Tuple[float, List[str]] = (float("-inf"), [])  # when we looked up our addresses, and which

    def first_guess(self) -> str:
        """The address to begin with."""
        return self.node.settings.host if self.is_fixed else self.node.loop.local_addresses()[0]

    def own_addresses(self) -> List[str]:
        """This machine's addresses, looked up at most every few seconds; the one towards the outside first."""
        now = self.node.loop.now()
        if now - self._own[0] > (60.0 if os.name == "nt" else QUIET_AFTER):  # on Windows it may block
            self._own = (now, self.node.loop.local_addresses())
        return self._own[1]

    def is_own(self, ip: str) -> bool:
        """Whether an address is this machine's."""
        return ip == self.node.me.ip or is_loopback(ip) or ip in self.own_addresses()

    def may_reach(self, ip: str) -> bool:
        """Whether to dial an address: if we listen on the loopback only, we stay on this machine."""
        return not is_loopback(self.node.settings.host) or self.is_own(ip)

    @property
    def has_network(self) -> bool:
        """Whether this machine has an address on a network, and, except behind NAT, the one that we are known by."""
        own = self.own_addresses()
        return self.is_fixed or (not is_loopback(own[0]) and (self.node.me.ip in own or self._is_behind_nat))

    def on_local_address(self, ip: str) -> None:
        """A connection left from this address of ours."""
        if not is_loopback(ip) and is_peer_ip(ip):
            self._consider(ip, is_seen=False)

    def on_seen(self, ip: Any, by: str) -> None:
        """The far end of a connection, at the address `by`, sees us at this address."""
        if is_peer_ip(ip) and not is_loopback(ip) and not is_loopback(by):
            self._consider(ip, is_seen=True)

    def _consider(self, ip: str, is_seen: bool) -> None:
        is_own = ip in self.own_addresses()
        is_better = is_seen and is_own and self.node.me.ip not in self.own_addresses()
        if not self.is_fixed and (not self._is_seen or is_better):
            self._is_seen = is_seen
            self._is_behind_nat = not is_own if is_seen else self._is_behind_nat
            self._move(ip)

    def follow_machine(self) -> None:
        """Take the machine's new address if it has another by now (a new lease, another network)."""
        own = self.own_addresses()
        is_current = self.node.me.ip in own and not is_loopback(self.node.me.ip)  # loopback: there was no network
        if not (self.is_fixed or is_current or self._is_behind_nat or is_loopback(own[0])):
            self.forget_sightings()
            self.node.on_address_lost(own)
            self._move(own[0])

    def forget_sightings(self) -> None:
        """The network is gone; it may come back with another address."""
        self._is_seen = False

    def _move(self, ip: str) -> None:
        if ip != self.node.me.ip:
            self._own = (float("-inf"), [])  # looked up, perhaps, before the machine had the new address
        self.node.change_identity(self.node.me.username, ip)


# What an address was dialled for.
LOST_PEER, HEARSAY, PRESENT_PEER = "a lost peer's", "named by a peer", "a peer's"
BEACON, SERVER, NAMED = "heard on the local network", "a server's", "named by hand"
STRANGERS_WORD = (BEACON, HEARSAY)  # anybody can have us dial an address for these reasons
ONLINE = "online"  # the result of a server that has registered us


class Target:
    """An address that is, was or will be dialled: why, to reach which peer, and with what result."""

    __slots__ = ("address", "why", "peer", "link", "tried_at", "wait", "retry_at", "result")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.why = LOST_PEER
        self.peer: Optional[Contact] = None  # the peer that we expect there, or last met there
        self.link: Optional[Link] = None  # while it is being dialled
        self.tried_at = float("-inf")
        self.wait = 0.0  # seconds from the last failure to the next try
        self.retry_at = float("-inf")  # until then is_due() is False
        self.result = ""  # of the last try, in words, for the report


class Targets:
    """All addresses that are, were or will be dialled: one table, bounded by MAX_PEERS, the latest last."""

    def __init__(self) -> None:
        self._all: Dict[Address, Target] = {}
        self.dialling = 0
        self.queue: Dict[Address, None] = {}  # addresses that wait for a dial to end
        self._named: Dict[Address, float] = {}  # when a beacon or a peer named those of the last seconds

    def __len__(self) -> int:
        return len(self._all)

    def get(self, address: Address) -> Optional[Target]:
        """What is known of an address."""
        return self._all.get(address)

    def enter(self, address: Address, why: str, peer: Optional[Contact] = None) -> Target:
        """Return the entry of an address, now the last. One named by hand stays so, unless it is a server's."""
        target = self._all.pop(address, None) or Target(address)
        self._all[address] = target
        if target.why != NAMED or peer is not None:
            target.peer = peer
        target.why = NAMED if target.why == NAMED and why != SERVER else why
        if len(self._all) > MAX_PEERS:
            self._forget_oldest()
        return target

    def note(self, address: Address, result: str, why: str) -> None:
        """Keep the result of a try, in words."""
        self.enter(address, why).result = result

    def reset(self, address: Address) -> None:
        """Forget past failures to reach an address, and that it waits to be dialled."""
        self.queue.pop(address, None)
        target = self._all.get(address)
        if target is not None:
            target.wait, target.retry_at, target.result = 0.0, float("-inf"), ""

    def is_due(self, address: Address, now: float) -> bool:
        """Whether the last failure to reach an address is long enough ago."""
        target = self._all.get(address)
        return target is None or now >= target.retry_at

    def pause(self, address: Address, now: float) -> float:
        """How long to wait with a dial if a link there was lost: dialled just now, it may be lost at once again."""
        target = self._all.get(address)
        return max(0.0, target.tried_at + RETRY_MIN - now) if target is not None else 0.0

    def recent(self, now: float) -> Dict[Address, float]:
        """The addresses that a beacon or a peer named in the last QUIET_AFTER seconds, and when."""
        self._named = {address: at for address, at in self._named.items() if now - at < QUIET_AFTER}
        return self._named

    def results(self) -> List[Target]:
        """The last tries that the report names."""
        return [each for each in self._all.values() if each.result and each.why in (BEACON, SERVER, NAMED)][-16:]

    def _forget_oldest(self) -> None:
        for address, target in self._all.items():
            if target.link is None and address not in self.queue and target.why != NAMED:
                del self._all[address]
                return


def back_off(wait: float, least: float, most: float, rng: random.Random) -> Tuple[float, float]:
    """Return the wait that follows one of `wait` s, doubled from `least` to `most`, and the same with jitter."""
    wait = min(max(2 * wait, least), most)
    return wait, wait * (0.75 + rng.random() / 2)


class OtherRooms:
    """Who is here but not in our room: the user is told, and they are not dialled again and again."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.is_paused = False  # our passphrase is wrong, it seems: nobody is dialled before the user gives another
        self._refused_at: Set[Address] = set()  # machines that refused it, while nobody has accepted it
        self._heard: Dict[Address, Tuple[float, str]] = {}  # beacons of other rooms: when, and which
        self._barred: Dict[Address, Tuple[float, float]] = {}  # who refused us: how long to wait, and until when
        self._limits: Dict[Tuple[str, str], RateLimit] = {}  # of what is said of an address
        # Lines about those in other rooms, about guesses here, and about guesses elsewhere: none takes another's room.
        self._notices, self._guesses, self._reports = (RateLimit(MAX_NOTICES) for _ in range(3))

    def on_beacon(self, address: Address, content: Dict[str, Any]) -> bool:
        """Note whose beacon came, and return whether it is of our room."""
        room = content.get("room", "")
        self._heard.pop(address, None)
        if room == self.node.room.name:
            return True
        if content["role"] == "peer":
            self._heard[address] = (self.node.loop.now(), room)
            if len(self._heard) > MAX_ELSEWHERE:
                del self._heard[next(iter(self._heard))]
        return False

    def report(self) -> List[str]:
        """Say in which other rooms peers were heard lately."""
        since = self.node.loop.now() - 3 * BEACON_INTERVAL
        rooms = collections.Counter(room for heard_at, room in self._heard.values() if heard_at >= since)
        lines = []
        for room, count in sorted(rooms.items(), key=lambda item: (-item[1], item[0]))[:4]:
            peers = "1 peer here is" if count == 1 else f"{count} peers here are"
            where = f"in the closed room {room}: {room_option(room)}" if room else "in the open room: leave out --room"
            lines.append(f"{peers} {where}")
        return lines

    def may_dial(self, address: Address, why: str) -> bool:
        """Whether to dial an address: not while our passphrase seems wrong or the address is barred."""
        until = self._barred.get(address, (0.0, float("-inf")))[1]
        if (self.is_paused and not self.node.room.has_proved) or self.node.loop.now() < until:
            return False
        return why not in STRANGERS_WORD or self.node.room.may_dial(address[0])

    def forgive(self, address: Address) -> None:
        """Forget that an address failed: a member is there, or the user wants it dialled."""
        self._barred.pop(address, None)
        for about in (ROOM, PASSPHRASE):
            self._limits.pop((format_address(address), about), None)

    def has_told(self, address: Address) -> bool:
        """Whether the user was told that this address is not in our room."""
        return any((format_address(address), about) in self._limits for about in (ROOM, PASSPHRASE))

    def on_mismatch(self, address: Address, is_dialled: bool, about: str, words: str) -> None:
        """A connection failed because the far end is in another room, has another passphrase, or proves nothing."""
        node, place = self.node, format_address(address)
        if is_dialled:
            self._bar(address, RETRY_MAX if about == PROTOCOL else BAR_MAX)
        if is_dialled and words and about == PASSPHRASE and not node.room.has_proved:
            is_own = node.whereabouts.is_own(address[0])  # here each program counts, elsewhere each machine:
            self._refused_at.add(address if is_own else (address[0], 0))  # a stranger's has ports enough for anything
        machine = guesser_at(address[0])
        if about == PROTOCOL:
            limited_log("no proof", logging.INFO, "[P2P] %s: %s", place, words)
        elif is_dialled and words:
            self._tell(place, about, f"{place}: {words}.", 600.0, self._notices)
        elif about == ROOM and not self.is_paused:
            self._tell(machine, about, f"{machine} is in another room.", 60.0, self._notices)
        elif not self.is_paused:  # else it is ours that is wrong
            wrong = max(1, node.room.wrong_guesses(machine))
            self._tell(machine, about, tried(machine, wrong), 60.0, self._guesses)
            if self._may_tell(machine, "members", 60.0):
                self._report(machine, wrong)
        if len(self._refused_at) >= MAX_REFUSED and not self.is_paused:
            self.is_paused = True
            node.emit({"event": "notice", "text": f"{MAX_REFUSED} peers have another passphrase. Is yours right? "
                       "/passphrase asks for it again; until then nobody is dialled.", "about": PASSPHRASE})

    def _report(self, ip: str, count: int) -> None:
        """Tell the members who has guessed here, those to whom there is a link."""
        ip = self.node.me.ip if is_loopback(ip) else ip  # the loopback's addresses mean another machine elsewhere
        for peer in self.node.present():
            if peer.link is not None:
                peer.link.send(MSG_GUESSES, {"ip": ip, "count": count})

    def handle_guesses(self, link: "Link", message: Message) -> None:
        """A member says who has guessed at its place. That is shown, with who says it, and never acted on: a member may
        lie. Nobody passes it on, and of one address it is shown once a minute, whoever says it."""
        ip, now = message["content"]["ip"], self.node.loop.now()
        limits = [self._limits[ip, about] for about in (PASSPHRASE, "report") if (ip, about) in self._limits]
        if self.node.room.name and link.peer is not None and not any(limit.wait(now) for limit in limits):
            text = f"{self.node.peers.label(link.peer)} says: {tried(ip, message['content']['count'])}"
            self._tell(ip, "report", text, 60.0, self._reports)

    def start_over(self) -> None:
        """The passphrase is another now: whoever refused the former one may be dialled again."""
        self.is_paused = False
        self._refused_at.clear()
        self._barred.clear()
        self._limits.clear()

    def _bar(self, address: Address, most: float) -> None:
        wait, delay = back_off(self._barred.get(address, (0.0, 0.0))[0], QUIET_AFTER, most, self.node.loop.random)
        if len(self._barred) >= MAX_ELSEWHERE:
            self._barred.clear()
        self._barred[address] = (wait, self.node.loop.now() + delay)

    def _tell(self, place: str, about: str, text: str, interval: float, notices: RateLimit) -> None:
        """Tell the user, at most once in an interval about one address."""
        if not notices.wait(self.node.loop.now()) and self._may_tell(place, about, interval):
            notices.take(self.node.loop.now())
            self.node.emit({"event": "notice", "text": text, "about": ROOM if about == ROOM else PASSPHRASE})

    def _may_tell(self, place: str, about: str, interval: float) -> bool:
        """Whether something is to be said about an address: once in an interval."""
        if len(self._limits) >= MAX_ELSEWHERE:
            del self._limits[next(iter(self._limits))]
        return self._limits.setdefault((place, about), RateLimit(1, interval)).take(self.node.loop.now())


def tried(ip: str, count: int) -> str:
    """Return the sentence about an address that has guessed."""
    return f"{ip} tried {'a wrong passphrase' if count == 1 else f'{count} wrong passphrases'}."


class Links:
    """All links. Over one of them we send to a peer (`Contact.link`); over any we may receive."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.all: Dict[Link, None] = {}
        self.met_ourselves_at: Set[Address] = set()
        self._unidentified = Unidentified()

    # -- dialling --------------------------------------------------------------------------------------

    def ensure_link(self, peer: Contact) -> None:
        """Dial a peer that is present, unless there is a link to it."""
        if peer.link is None and not peer.gone:
            self.dial(peer.route, PRESENT_PEER, peer)

    def dial(self, address: Address, why: str, peer: Optional[Contact] = None) -> None:
        """Dial an address, unless that is under way; beyond MAX_DIALS at once, addresses wait in a queue."""
        node, targets = self.node, self.node.targets
        known = targets.get(address)
        if (known is not None and known.link is not None) or address in self.met_ourselves_at:
            return
        if node.stopping or not (node.whereabouts.may_reach(address[0]) and node.other_rooms.may_dial(address, why)):
            return
        target = targets.enter(address, why, peer)
        if targets.dialling >= MAX_DIALS:
            if len(targets.queue) < MAX_PEERS:
                targets.queue[address] = None
            return
        targets.queue.pop(address, None)
        targets.dialling += 1
        target.tried_at = node.loop.now()
        target.link = link = Link(node, address, dialled=True)
        self.all[link] = None
        link.connection = node.room.connect(address, link, node.settings.timeout, why not in STRANGERS_WORD)

    def verify_address(self, address: Address, why: str = HEARSAY) -> None:
        """Dial an address that somebody named, to see which peer answers: few at a time, none twice in QUIET_AFTER."""
        now = self.node.loop.now()
        recent = self.node.targets.recent(now)
        at_machine = sum(ip == address[0] for ip, _ in recent)
        is_crowded = at_machine >= MAX_LOOKS // 4 and not self.node.whereabouts.is_own(address[0])
        if address not in (self.node.me.address, *recent) and not is_crowded and len(recent) < MAX_LOOKS:
            recent[address] = now
            self.dial(address, why)

    def is_awaiting_hello(self, peer: Contact, begun_by: float) -> bool:
        """Whether a dial to a peer waits for its hello: it began by `begun_by`, or has connected."""
        target = self.node.targets.get(peer.route)
        link = target.link if target is not None else None
        return link is not None and (bool(link.announced_id) or link.used_at <= begun_by)

    def _end_dial(self, link: Link, failure: str = "") -> None:
        """A dial has succeeded or failed: note that, and dial addresses that wait."""
        targets = self.node.targets
        target = targets.get(link.address)
        if target is None or target.link is not link:
            return
        target.link = None
        targets.dialling -= 1
        expected, met = target.peer, link.peer
        if met is None:
            target.result = link.failure or failure
            target.wait, wait = back_off(target.wait, RETRY_MIN, RETRY_MAX, self.node.loop.random)
            target.retry_at = self.node.loop.now() + wait
            self._note_dial_failed(expected, target.result)
            self.node.dialled(target.address, target.result, True)
        else:
            target.result, target.wait, target.peer = "", 0.0, met
            self.node.other_rooms.forgive(target.address)
            if expected is not met:
                self._note_dial_failed(expected, REFUSED)  # another peer has its address now
        while targets.queue and targets.dialling < MAX_DIALS:
            address = next(iter(targets.queue))
            waiting = targets.get(address)
            del targets.queue[address]
            if waiting is not None:
                self.dial(address, waiting.why, waiting.peer)

    def _note_dial_failed(self, peer: Optional[Contact], failure: str) -> None:
        if peer is not None:
            peer.has_ended = peer.has_ended or (peer.gone and failure == REFUSED)
            self.node.dial_failed(peer, failure)

    # -- saying hello ----------------------------------------------------------------------------------

    def handle_p2p_connection(self, connection: Connection) -> Handler:
        """Somebody dialled us: wait for a hello."""
        link = Link(self.node, connection.remote, dialled=False)
        link.connection = connection
        self._unidentified.add(connection)  # which may abort an older one
        self.all[link] = None
        link.timer = self.node.loop.call_later(HELLO_TIMEOUT, self._on_no_hello, link)
        return link

    def say_hello(self, link: Link) -> None:
        """Send our hello; in answer to another, also the address at which we see its sender."""
        node = self.node
        link.announced_id, link.greeted_at = node.me.id, node.loop.now()
        content = {"peer": node.me.wire(node.loop.now()), "digest": node.peers.digest()}
        if not link.dialled:
            content["you"] = {"ip": link.connection.remote[0]}
        else:
            link.timer = node.loop.call_later(node.settings.timeout, self._on_no_hello, link)
        link.send(MSG_HELLO, content)

    def handle_hello(self, link: Link, message: Message) -> None:
        """The far end says who it is: bind the link to that peer, unless something speaks against it."""
        if link.peer is not None:
            return
        node, content = self.node, message["content"]
        record = content["peer"]
        objection = self._objection(link, record)
        if objection:
            link.failure = f"{record['id']} answers there: {objection}"
            link.refuse(objection)
            return
        before = node.peers.by_key(record["instance"])
        was_lost = before is not None and before.gone
        verdict, peer, changes = node.peers.merge_own_claim(record, node.loop.now())
        if link.dialled:
            peer.via = link.connection.remote if link.connection.remote != peer.address else None
        self._bind(link, peer, record["id"])
        if link.dialled:
            node.whereabouts.on_seen(content.get("you", {}).get("ip"), link.connection.remote[0])
        else:
            self.say_hello(link)
        node.linked(link, peer, verdict, changes, content.get("digest"), was_lost)

    def _bind(self, link: Link, peer: Contact, peer_id: str) -> None:
        link.peer, link.ids = peer, (peer_id,)
        link.timer.cancel()
        self._unidentified.discard(link.connection)
        if link.dialled:
            self._end_dial(link)
        for needless in [each for each in self.all if each.peer is peer][:-LINKS_TO_ONE]:
            needless.connection.abort("one link too many")
        peer.link = link
        peer.has_ended = False
        self.node.targets.reset(peer.route)
        log.debug("[P2P] linked to %s", peer.id)

    def _on_no_hello(self, link: Link) -> None:
        if link.peer is None:
            link.failure = "what listens there does not answer as a peer does"
            link.refuse("no MSG_HELLO came")
            if link.dialled:
                link.connection.abort(link.failure)

    # -- checking a hello ------------------------------------------------------------------------------

    def _objection(self, link: Link, record: Dict[str, Any]) -> str:
        """Why the far end can't be the peer that it claims to be; empty if nothing speaks against it."""
        node, claimed = self.node, (record["ip"], record["port"])
        known, holder = node.peers.by_key(record["instance"]), node.peers.get(record["id"])
        if record["instance"] == node.me.instance:
            self._on_met_ourselves(link)
            return "this is yourself"
        if known is not None and known.banned_until > node.loop.now():
            return "you sent too much; come back later"
        if not self.is_seen_at(link, claimed) and not self._may_be_multihomed(link, record, known, holder):
            self.verify_address(claimed)
            return f"you say that you are at {format_address(claimed)}, but I see you at {link.connection.remote[0]}"
        if not link.dialled and holder is not None and holder is not known and not self._is_unreachable(holder):
            self.verify_address(claimed)
            return "another peer has that id; I am looking which of you answers there"
        if known is not None and not known.gone and known.address != claimed and self._may_be_alive(known):
            node.contested(known)
            return f"that instance is at {format_address(known.address)}, and still answers"
        return ""

    def _on_met_ourselves(self, link: Link) -> None:
        if len(self.met_ourselves_at) >= MAX_DIALS:
            self.met_ourselves_at.clear()  # we do not have so many addresses: somebody plays with us
        self.met_ourselves_at.add(link.address if link.dialled else link.connection.local)

    def is_seen_at(self, link: Link, claimed: Address) -> bool:
        """Whether the address that the far end claims is the one at which we see it."""
        seen, port = link.connection.remote
        is_own = self.node.whereabouts.is_own
        if link.dialled and port != claimed[1]:
            return False
        return seen == claimed[0] or (is_own(seen) and is_own(claimed[0]))

    def _may_be_multihomed(self, link: Link, record: Dict[str, Any], known: Optional[Contact],
                           holder: Optional[Contact]) -> bool:
        """Whether a peer that we dialled may claim another address: its machine may have several."""
        fits_known = known is None or known.gone or link.connection.remote in (known.via, known.address)
        is_its_port = link.dialled and link.connection.remote[1] == record["port"]
        return is_its_port and fits_known and holder in (None, known) and not self.node.whereabouts.is_own(record["ip"])

    def _is_unreachable(self, peer: Contact) -> bool:
        """Whether a peer is not linked, where all should be, and has not answered a dial for CONTEST_TIME: a firewall
        lets nobody in. Another instance that dials us from its address is then the same program, restarted."""
        if peer.link is not None or len(self.node.peers) > IDLE_LINKS:
            return False
        target = self.node.targets.get(peer.route)
        if target is None or target.link is None or target.link.connection.state != CONNECTING:
            return False
        return target.tried_at <= self.node.loop.now() - CONTEST_TIME

    def _may_be_alive(self, peer: Contact) -> bool:
        """Whether a peer may still be at its address; a silent one has CONTEST_TIME to answer a probe."""
        now = self.node.loop.now()
        if peer.link is not None and now - peer.heard_at < QUIET_AFTER:
            return True
        if peer.contested_at <= peer.heard_at:
            peer.contested_at = now
        return now - peer.contested_at < CONTEST_TIME

    # -- closing ---------------------------------------------------------------------------------------

    def on_link_closed(self, link: Link, reason: str) -> None:
        """A link is gone. Another one to the same peer takes its place, if there is one."""
        del self.all[link]
        self._unidentified.discard(link.connection)
        if link.dialled and link.peer is None:
            self._end_dial(link, reason)
        peer = link.peer
        if peer is not None and peer.link is link:
            others = (each for each in self.all if each.peer is peer and each.connection.state == OPEN)
            peer.link = next(others, None)
            self.node.unlinked(link, peer, reason)
        if self.node.stopping:
            self.node.maybe_depart()

    def drop(self, peer: Contact, reason: str) -> None:
        """Close every link to a peer. A dial that waits is dropped; one under way may show that the peer lives."""
        self.node.targets.reset(peer.route)
        for link in list(self.all):
            if link.peer is peer:
                link.connection.abort(reason)

    def abort_all(self, reason: str) -> None:
        """Close every open link to a peer without reading what has come: what was not acknowledged is sent again."""
        for link in list(self.all):
            if link.connection.state == OPEN and (link.peer is not None or link.dialled):
                link.connection.abort(reason)

    def ban(self, link: Link) -> None:
        """End a link, and accept no other from that peer for a while."""
        if link.peer is not None:
            link.peer.banned_until = self.node.loop.now() + BAN_TIME
            name = self.node.peers.label(link.peer)
            text = f"{name} sent far too much and was cut off for {BAN_TIME:.0f} s."
            self.node.emit({"event": "notice", "text": text})
        link.refuse("you sent too much; come back later")

    def close_all(self) -> None:
        """Announce our last incarnation, or late news of it would revive us. Then say goodbye to all and close."""
        self.announce()
        for link in list(self.all):
            if link.peer is None and not link.dialled:
                self.say_hello(link)  # its hello is under way, and ours tells it which peer leaves
            link.send(MSG_UNREGISTER, self.node.me.last_words or None)
            link.connection.close("leaving")

    def was_idle(self, link: Link, peer: Contact) -> bool:
        """Whether neither end needed a link that the far end closed."""
        is_unused = self.node.loop.now() - link.used_at > IDLE_TIMEOUT / 2 and not peer.has_waiting_messages
        return is_unused and len(self.node.peers) > IDLE_LINKS

    # -- keeping them in order -------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Dial peers that should be linked; close links that nobody needs."""
        node, now = self.node, self.node.loop.now()
        are_few = len(node.peers) <= IDLE_LINKS
        for peer in node.peers.present():
            # The one with the lesser key dials; the other, too, if it hears nothing.
            should_dial = are_few and (node.me.key < peer.key or now - peer.last_sign_at() > QUIET_AFTER - 1)
            is_wanted = peer.link is None and (should_dial or peer.has_waiting_messages)
            if is_wanted and node.targets.is_due(peer.route, now):
                self.dial(peer.route, PRESENT_PEER, peer)
        for link in list(self.all):
            if link.peer is not None and now - link.used_at > IDLE_TIMEOUT and self._is_needless(link, link.peer):
                link.connection.close("not needed")

    def _is_needless(self, link: Link, peer: Contact) -> bool:
        """Whether an idle link is a second one to its peer, which one side closes, or one too many."""
        if peer.link not in (None, link):
            return self.node.me.key < peer.key
        return len(self.node.peers) > IDLE_LINKS < len(self.all) and not peer.has_waiting_messages

    def announce(self) -> None:
        """Send our record under the id that we announced to each peer, because later messages bear our new id."""
        content = {"peers": [self.node.me.wire(self.node.loop.now())]}
        for link in self.all:
            if link.announced_id:
                link.connection.send(create_message(MSG_PEER_NEWS, link.announced_id, content))
                link.announced_id = self.node.me.id

    def sample(self, count: int, omit: Optional[Contact] = None) -> List[Link]:
        """Up to `count` of the links over which we send, at random, none of them to the peer `omit`."""
        links = [link for link in self.all if link.peer not in (None, omit) and link.peer.link is link]
        return self.node.loop.random.sample(links, min(count, len(links)))


# The evidence that a peer is gone. SAID_ is hearsay.
SILENT, REFUSES, SAID_SUSPECT, SAID_DEAD, SAID_LEFT = "silent", "refuses", "said suspect", "said dead", "said left"

# How long a peer has to refute it, in seconds from the first evidence on. The strongest evidence counts.
TIME_TO_REFUTE: Dict[FrozenSet[str], float] = {
    frozenset((SILENT,)): 6.0,  # so it is removed 11 s after its last sign of life
    frozenset((SAID_SUSPECT,)): 6.0,
    frozenset((REFUSES,)): 3.0,  # its address refuses connections: time for others to say that it lives
    frozenset((SAID_DEAD,)): 2.5,  # time for its own answer to a probe
    frozenset((SAID_LEFT,)): 1.0,
    frozenset((SAID_DEAD, REFUSES)): 0.5,  # two witnesses that do not know of each other
    frozenset((SAID_LEFT, REFUSES)): 0.5,
}


def time_to_refute(evidence: AbstractSet[str]) -> float:
    """Return how long after the first suspicion a peer is removed if it shows no sign of life."""
    return min(seconds for needed, seconds in TIME_TO_REFUTE.items() if needed <= evidence)


class Suspicion:
    """A peer may be gone: it has until `timer` fires to show that it lives."""

    __slots__ = ("since", "evidence", "words", "timer")

    def __init__(self, now: float, words: str) -> None:
        self.since = now
        self.evidence: Set[str] = set()
        self.words = words  # what was said first
        self.timer = Timer()

    @property
    def is_hearsay(self) -> bool:
        """Whether there is no evidence but what others say."""
        return self.evidence.isdisjoint((SILENT, REFUSES))

    @property
    def reason(self) -> str:
        """What our user is told if the peer is removed."""
        if SAID_LEFT in self.evidence:
            return "left"
        return "connection refused" if REFUSES in self.evidence else self.words


class Detector:
    """Failure detection. Each peer probes its NEIGHBOURS on a ring, so each is watched by a few and the cost
    does not grow with the number of peers. A silent peer is suspected: others are asked to probe it, it is told
    itself and can refute it, and only if none of that helps in time is it removed."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.contact_at = 0.0  # when anything last came from another machine
        self.is_isolated = False  # everybody fell silent at once: it is us
        self.server_seen_at = float("-inf")  # when a server on another machine was last online; inf while it is
        self._last_tick = (0.0, 0.0)  # when we last probed, by the loop's clock and by the wall clock
        self._slept = node.loop.slept()  # until then

    def start(self) -> None:
        """Count silence from now on."""
        self.contact_at = self.node.loop.now()
        self._last_tick = (self.contact_at, self.node.loop.wall())

    # -- signs of life ---------------------------------------------------------------------------------

    def on_heard(self, peer: Optional[Contact]) -> None:
        """Something came from a peer itself; None for the server, or for one that has not said who it is.

        What comes from this very machine says nothing about the network."""
        now = self.node.loop.now()
        if peer is None or peer.ip != self.node.me.ip:
            self.contact_at = now
            if self.is_isolated:
                self._on_network_back()
        if peer is not None:
            peer.heard_at = now
            self._on_alive(peer)

    def on_confirmed(self, peer: Contact) -> None:
        """Somebody else heard a peer, or the peer refuted that it is gone."""
        peer.confirmed_at = self.node.loop.now()
        self._on_alive(peer)

    def _on_alive(self, peer: Contact) -> None:
        if peer.suspicion is not None:
            peer.suspicion.timer.cancel()
            peer.suspicion = None
            self.node.news.drop(peer, SUSPECT)
        peer.unconfirmed_since = None
        if peer.quiet:
            self._set_quiet(peer, False)

    def _set_quiet(self, peer: Contact, quiet: bool) -> None:
        if peer.quiet != quiet and not peer.gone:
            peer.quiet = quiet
            self.node.emit({"event": "quiet", "peer": peer.public, "quiet": quiet})

    # -- probing ---------------------------------------------------------------------------------------

    def probe_neighbours(self) -> None:
        """Probe the neighbours, suspect those that are silent, and dial a peer that was lost."""
        node = self.node
        self._last_tick = (node.loop.now(), node.loop.wall())
        ahead, behind = node.peers.neighbours(NEIGHBOURS)
        for peer in ahead:
            self.probe(peer)
        for peer in ahead + behind:
            self.check_silence(peer)
        self._dial_a_lost_peer()

    def probe(self, peer: Contact, status: str = ALIVE) -> None:
        """Ask a peer for a sign of life, and tell it what is said of it."""
        link, now = peer.link, self.node.loop.now()
        if link is None:
            self.node.links.ensure_link(peer)
        elif status == ALIVE or now - link.warned_at >= WARN_INTERVAL:
            if status != ALIVE:
                link.warned_at = now
            content = {"number": int(now * 1_000_000), "incarnation": peer.incarnation, "status": status}
            link.ask(MSG_PROBE, content, functools.partial(self._on_probe_answered, peer, now))

    def handle_probe(self, link: Link, message: Message) -> None:
        """A peer asks for a sign of life, and says what it believes of us."""
        content, me = message["content"], self.node.me
        if content.get("status", ALIVE) != ALIVE:
            self.node.refute(content.get("incarnation", 0))
            link.send(MSG_PEER_NEWS, {"peers": [me.wire(self.node.loop.now())]})
        link.answer(message, MSG_PROBE_ACK, {"number": content["number"], "incarnation": me.incarnation})

    def _on_probe_answered(self, peer: Contact, asked_at: float, message: Message) -> None:
        peer.rtt = self.node.loop.now() - asked_at
        self.answer_askers(peer)

    def measure_trip(self, link: Link, peer: Contact) -> None:
        """Learn the round trip time to a new peer, for /who: by the hellos if we dialled, else by a probe."""
        if link.dialled:
            peer.rtt = peer.rtt or self.node.loop.now() - link.greeted_at
        elif peer.rtt is None:
            self.probe(peer)

    def on_link_replaced(self, peer: Contact) -> None:
        """A link broke, and another one is left: it may be as dead, which shows only when something is sent."""
        if peer.suspicion is not None:
            self.probe(peer, SUSPECT)

    def check_silence(self, peer: Contact) -> None:
        """Suspect a peer that should be heard and is not."""
        is_silent = self.node.loop.now() - peer.last_sign_at() > (QUIET_AFTER - 1) * self._patience()
        if is_silent and peer.suspicion is None and not self.is_isolated:
            self.node.links.drop(peer, "silent")  # perhaps only this connection is dead: another is tried
            self.suspect(peer, SILENT)
            self.node.check_server()  # is it the network?
            self.node.loop.call_later(QUIET_SHOWN, self._check_still_silent, peer, peer.suspicion)

    def _patience(self) -> int:
        """How many times the usual to wait: a sign of life may have come that we are too busy to read.

        That is Lifeguard's local health: who is late doubts itself before it doubts others."""
        return BUSY_PATIENCE if self.node.loop.is_behind else 1

    def _check_still_silent(self, peer: Contact, suspicion: Suspicion) -> None:
        """Nobody else heard it either: say so, which reaches the peer itself if anything does."""
        if peer.suspicion is suspicion:
            self._set_quiet(peer, True)
            self.node.spread(peer, SUSPECT)

    def on_dial_failed(self, peer: Contact, reason: str) -> None:
        """A peer can't be dialled. Refused is as good as proof, unless others still hear it."""
        if reason != REFUSED:
            return
        if peer.ip != self.node.me.ip:
            self.on_heard(None)  # somebody sent the refusal: our own network works
        if peer.suspicion is not None and peer.suspicion.is_hearsay:
            self.suspect(peer, REFUSES)
        elif (peer.link is None and self.node.loop.now() - peer.confirmed_at > QUIET_AFTER
              and self.suspect(peer, REFUSES)):
            self.node.spread(peer, SUSPECT)

    # -- suspicion -------------------------------------------------------------------------------------

    def on_accusation(self, peer: Contact, status: str, words: str = "silent") -> None:
        """Somebody says that a peer is suspect or gone: let the peer itself answer."""
        if status == SUSPECT and self.node.loop.now() - peer.heard_at < QUIET_AFTER:
            self.probe(peer, SUSPECT)  # we hear it: it will refute that, and its word travels
            return
        if status == SUSPECT and peer.suspicion is None:
            self.node.spread(peer, SUSPECT)
        if peer.suspicion is None:
            self.node.loop.call_later(QUIET_SHOWN, self._show_if_silent, peer)
        self.suspect(peer, {SUSPECT: SAID_SUSPECT, LEFT: SAID_LEFT}.get(status, SAID_DEAD), words)
        self.probe(peer, status)

    def _show_if_silent(self, peer: Contact) -> None:
        """It has not answered an accusation so far."""
        if peer.suspicion is not None:
            self._set_quiet(peer, True)

    def suspect(self, peer: Contact, evidence: str, words: str = "silent") -> bool:
        """Add evidence against a peer. If that leaves it less time, ask others to probe it and return True."""
        if peer.gone:
            return False
        now = self.node.loop.now()
        suspicion = peer.suspicion = peer.suspicion or Suspicion(now, words)
        before = time_to_refute(suspicion.evidence) if suspicion.evidence else float("inf")
        suspicion.evidence.add(evidence)
        seconds = time_to_refute(suspicion.evidence)
        if seconds >= before:
            return False
        suspicion.timer.cancel()
        wait = max(0.0, suspicion.since + seconds - now)
        suspicion.timer = self.node.loop.call_later(wait, self._on_suspicion_expired, peer)
        self.probe(peer, SUSPECT)
        for link in self.node.links.sample(PROBE_HELPERS, omit=peer):
            link.ask(MSG_PROBE_REQUEST, {"peer": peer.wire(now)}, self._on_helper_answered)
        return True

    def handle_probe_request(self, link: Link, message: Message) -> None:
        """Somebody can't reach a peer and asks whether we can (SWIM's indirect probe)."""
        peer = self.node.peers.by_key(message["content"]["peer"].get("instance", ""))
        if peer is None or peer.gone:
            return
        if len(peer.askers) < IDLE_LINKS:
            peer.askers[link] = reference(message)  # a question may be long
        self.probe(peer, SUSPECT)

    def answer_askers(self, peer: Contact) -> None:
        """Tell those that asked us to probe a peer that it is alive."""
        askers, peer.askers = peer.askers, {}
        for link, repeated in askers.items():
            link.send(MSG_PROBE_RESULT, {"peer": peer.wire(self.node.loop.now())}, **repeated)

    def _on_helper_answered(self, message: Message) -> None:
        """A peer that we asked has heard the one that we suspect."""
        peer = self.node.peers.by_key(message["content"]["peer"].get("instance", ""))
        if peer is not None and not peer.gone and peer.suspicion is not None:
            self.on_confirmed(peer)

    def _on_suspicion_expired(self, peer: Contact) -> None:
        """Remove the peer, unless its hello is due any moment or we are isolated."""
        suspicion = peer.suspicion
        if self.node.check_clock() or suspicion is None:
            return
        now = self.node.loop.now()
        self._check_isolation()
        is_local = peer.ip == self.node.me.ip  # which a pulled cable does not hide
        is_hello_due = (suspicion.is_hearsay and now - suspicion.since < TIME_TO_REFUTE[frozenset((SAID_DEAD,))]
                        and self.node.links.is_awaiting_hello(peer, suspicion.since + CONTEST_TIME / 2))
        is_early = is_hello_due or (
            now - suspicion.since < time_to_refute(suspicion.evidence) * self._patience() - 0.001)  # it is rounded
        if is_early or (self.is_isolated and not is_local and now - self.contact_at < TOMBSTONE_TIME):
            wait = WARN_INTERVAL if is_early else QUIET_AFTER
            suspicion.timer = self.node.loop.call_later(wait, self._on_suspicion_expired, peer)
        else:
            self.node.remove_dead_peer(peer, LEFT if suspicion.reason == "left" else DEAD, suspicion.reason)

    def drop_suspicion(self, peer: Contact) -> None:
        """Drop the suspicion of a peer, and the requests to probe it."""
        peer.askers = {}
        if peer.suspicion is not None:
            peer.suspicion.timer.cancel()
            peer.suspicion = None

    # -- isolation, and sleep --------------------------------------------------------------------------

    def _check_isolation(self) -> None:
        """If several others fell silent at once, the fault is likely ours: keep the list, and probe them all."""
        node = self.node
        others = sum(1 for each in node.peers.present() if each.ip != node.me.ip)
        others += self.server_seen_at > self.contact_at
        if self.is_isolated or others <= 1 or node.loop.now() - self.contact_at <= QUIET_AFTER:
            return
        self.is_isolated = True
        log.warning("[P2P] nobody can be heard: this machine's own network seems to be gone")
        for peer in node.peers.present():
            self._set_quiet(peer, True)
            peer.unconfirmed_since = peer.unconfirmed_since or self.contact_at
        node.whereabouts.forget_sightings()
        node.emit({"event": "network", "gone": True})

    def _on_network_back(self) -> None:
        self.is_isolated = False
        log.info("[P2P] the network is back")
        self.node.emit({"event": "network", "gone": False})
        self.node.start_over()

    def start_over(self) -> List[Contact]:
        """Count silence from now on, and confirm the list anew: peers may have gone meanwhile. Return those probed."""
        now, present = self.node.loop.now(), self.node.peers.present()
        for peer in present:
            peer.added_at = now
            peer.unconfirmed_since = peer.unconfirmed_since or now
            self.drop_suspicion(peer)
        probed = self.node.peers.sample(self.node.loop.random, MAX_DIALS, present)
        for peer in probed:
            self.probe(peer)
        self.node.loop.call_later(QUIET_AFTER, self._suspect_unconfirmed)
        return probed

    def _suspect_unconfirmed(self) -> None:
        """Suspect the peers that neither answered nor are on anybody's list."""
        for peer in self.node.peers.present():
            if peer.unconfirmed_since is not None and not self.is_isolated:
                self.suspect(peer, SILENT)

    def check_clock(self) -> bool:
        """If the machine slept or this process was stopped, start over and return True: the silence was ours."""
        now, wall = self.node.loop.now(), self.node.loop.wall()
        passed = now - self._last_tick[0]
        late, jump = passed - PROBE_INTERVAL, abs(wall - self._last_tick[1] - passed)
        if late < QUIET_AFTER - PROBE_INTERVAL and jump < CLOCK_JUMP:
            return False
        self._last_tick = (now, wall)
        slept, self._slept = self.node.loop.slept() - self._slept, self.node.loop.slept()
        if slept > CLOCK_JUMP:
            self.node.on_slept(slept)
        if max(late, jump) > CLOCK_JUMP:
            log.warning("[P2P] the clock jumped by %d s: looking who is still there", max(late, jump))
            self.node.check_server()
        for peer in self.node.peers.tombstones():
            peer.removed_at += max(0.0, late)  # the time of the pause does not count
        if late >= QUIET_AFTER - PROBE_INTERVAL:  # its senders may have given up what came meanwhile
            self.node.links.abort_all("this process was stopped")
        self.node.start_over()
        return True

    def _dial_a_lost_peer(self) -> None:
        """Dial one of those that were lost: so the halves of a cut network find each other again."""
        lost = [peer for peer in self.node.peers.tombstones()
                if peer.status == DEAD and peer.heard_at and not peer.has_ended]
        if lost:
            peer = self.node.loop.random.choice(lost)
            self.node.links.dial(peer.route, LOST_PEER, peer)


class Gossip:
    """What peers tell each other about others. News goes to a few at once, and these pass it on. Each interval we
    compare lists with a random peer, by a digest first, and so find what the news missed."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self._timer = Timer()  # of the next round of news
        self._has_synced = False  # whether we compared lists with anybody yet

    # -- news ------------------------------------------------------------------------------------------

    def tell_soon(self) -> None:
        """Send the news in the next turn."""
        if self.node.news and not self._timer.active:
            self._timer = self.node.loop.call_later(0, self._tell)

    def _tell(self) -> None:
        """Send all news to a few peers."""
        chosen = self.node.links.sample(NEWS_FANOUT)
        if chosen:
            for data in self._encode_news(self.node.news.take(len(chosen), self.node.loop.now()), EVERYONE):
                for link in chosen:
                    link.connection.send(data)
        if self.node.news and chosen:  # with nobody to tell, it waits for the next link
            self._timer = self.node.loop.call_later(NEWS_INTERVAL, self._tell)

    def handle_news(self, link: Link, message: Message) -> None:
        """A peer tells what is new."""
        self.merge_peer_lists(link, message["content"]["peers"])

    def _send_news(self, link: Link, records: List[Dict[str, Any]]) -> None:
        for start in range(0, len(records), NEWS_BATCH):
            for data in self._encode_news(records[start:start + NEWS_BATCH], link.peer.id if link.peer else EVERYONE):
                link.used_at = self.node.loop.now()
                link.connection.send(data)

    def _encode_news(self, records: List[Dict[str, Any]], to: str) -> Iterator[bytes]:
        """Encode records as one message, or more if they are very long."""
        for packed in pack_lists(map(_ENCODER.encode, records)):
            yield create_raw(MSG_PEER_NEWS, self.node.me.id, to, f'{{"peers":[{packed}]}}')

    # -- comparing lists -------------------------------------------------------------------------------

    def sync_with_random_peer(self) -> None:
        """Compare lists with one random peer."""
        peer = self.node.peers.get_random_peer(self.node.loop.random)
        if peer is not None:
            self.sync(peer)

    def sync_for_user(self) -> None:
        """Compare lists with one random peer, and say so."""
        peer = self.node.peers.get_random_peer(self.node.loop.random)
        text = "There is nobody to compare lists with."
        if peer is not None:
            self.sync(peer, by_user=True)
            text = f"Comparing lists with {self.node.peers.label(peer)} ..."
        self.node.emit({"event": "notice", "text": text})

    def sync(self, peer: Contact, by_user: bool = False) -> None:
        """Compare lists with a peer, now or as soon as it is linked."""
        peer.sync_by_user = by_user or bool(peer.sync_by_user)
        if peer.link is None:
            self.node.links.ensure_link(peer)
        else:
            self._request(peer.link)

    def _request(self, link: Link) -> None:
        link.ask(MSG_SYNC_PEERS_REQUEST, {"digest": self.node.peers.digest()},
                 functools.partial(self.handle_sync_response, link))

    def on_linked(self, link: Link, peer: Contact, verdict: str, digest: Any, was_lost: bool) -> None:
        """A link was bound: pass on that the peer is present, and compare lists if there is reason to."""
        now, peers = self.node.loop.now(), self.node.peers
        self.tell_soon()
        gone = [each.wire(now) for each in peers.tombstones() if now - each.removed_at < RECENT_TIME]
        self._send_news(link, gone[-NEWS_BATCH:])  # a newcomer missed that news
        if verdict == NEW:
            self.node.spread(peer, ALIVE)
        elif verdict == STALE:  # others call it suspect or gone: it must know that to refute it
            link.send(MSG_PEER_NEWS, {"peers": [peer.wire(now, peer.status if peer.gone else SUSPECT)]})
        is_needed = not self._has_synced or (was_lost and link.dialled)  # of two that met again, one asks
        if (is_needed and digest != peers.digest()) or peer.sync_by_user is not None:
            self._request(link)

    def handle_sync_request(self, link: Link, message: Message) -> None:
        """Somebody asks for our list: send all of it, unless its digest says that it holds the same."""
        node, content, now = self.node, message["content"] or {}, self.node.loop.now()
        digest = node.peers.digest()
        if content.get("digest") == digest:
            link.answer(message, MSG_SYNC_PEERS_RESPONSE, {"peer_list": [], "digest": digest})
            return
        if now - link.listed_at < LIST_INTERVAL:
            return  # it has our list already
        link.listed_at = now
        to = link.peer.id if link.peer else message["sender_id"]
        lists = pack_lists(self._encoded_list(with_tombstones=link.peer is not None))
        for number, records in enumerate(lists, 1):
            more = ',"more":true' if number < len(lists) else ""
            answer = f'{{"peer_list":[{records}],"digest":"{digest}"{more}}}'
            link.connection.send(create_raw(MSG_SYNC_PEERS_RESPONSE, node.me.id, to, answer, **reference(message)))

    def _encoded_list(self, with_tombstones: bool) -> Iterator[str]:
        peers = self.node.peers
        yield from (peer.encoded for peer in [self.node.me, *peers.shared()])
        if with_tombstones:
            now = self.node.loop.now()
            yield from (_ENCODER.encode(peer.wire(now)) for peer in peers.tombstones()[-NEWS_BATCH:])

    def handle_sync_response(self, link: Link, message: Message) -> None:
        """The list that we asked for: merge it, and send back what it lacks."""
        peers, listed = self.node.peers, message["content"]["peer_list"]
        before = len(peers)

        def finish() -> None:
            if listed and len(listed) < MAX_PEERS:
                their_keys = {record.get("instance", "") or record["id"] for record in listed}
                now = self.node.loop.now()
                self._send_news(link, [peer.wire(now) for peer in peers.shared() if peer.key not in their_keys])
            if link.peer is not None:
                self._report(link.peer, len(peers) - before)
            self._has_synced = True

        self.merge_peer_lists(link, listed, finish)

    def _report(self, peer: Contact, found: int) -> None:
        by_user, peer.sync_by_user = peer.sync_by_user, None
        level = logging.INFO if found or by_user or not self._has_synced else logging.DEBUG
        log.log(level, "[Gossip] compared with %s: %d new", peer.id, found)
        if by_user:
            news = f"{found} new" if found else "nothing new"
            self.node.emit({"event": "notice", "text": f"Compared lists with {self.node.peers.label(peer)}: {news}."})

    # -- merging ---------------------------------------------------------------------------------------

    def merge_peer_lists(self, link: Link, records: List[Dict[str, Any]], then: Callable[[], None] = lambda: None
                         ) -> None:
        """Merge records that a peer sent into our list, in portions; tell it where we know better. Then call `then`."""
        if not link.take_traffic(len(records)):
            return
        before = len(self.node.peers)
        new: List[Contact] = []
        answers: List[Dict[str, Any]] = []

        def merge(record: Dict[str, Any]) -> None:
            verdict, peer = self._merge_record(link, record)
            if verdict == NEW:
                new.append(peer)
            elif verdict == STALE:
                answers.append(peer.wire(self.node.loop.now()))

        def finish() -> None:
            if len(new) <= max(before, 1):  # a newcomer's first list is no news to anybody else
                for peer in new:
                    self.node.spread(peer, ALIVE)
            self._send_news(link, answers[:NEWS_BATCH])
            then()

        self.node.backlog.work_off(link, records, merge, finish)

    def _merge_record(self, link: Link, record: Dict[str, Any]) -> Tuple[str, Contact]:
        node = self.node
        if record.get("instance") == node.me.instance or record["id"] == node.me.id:
            return self._merge_claim_about_me(record), node.me
        if link.peer is not None and record.get("instance") == link.peer.instance:
            return self._merge_own_claim(link, link.peer, record)
        return self.merge_hearsay(record, link.connection.remote[0])

    def merge_hearsay(self, record: Dict[str, Any], source_ip: str) -> Tuple[str, Contact]:
        """Merge what somebody at an address says of a third peer."""
        node, where = self.node, self.node.whereabouts
        if (is_loopback(record["ip"]) and not where.is_own(source_ip)) or not where.may_reach(record["ip"]):
            return IMPLAUSIBLE, node.me
        known = node.peers.by_key(record.get("instance", ""))
        if known is not None and known.link is not None and not known.gone:
            if record["id"] != known.id:
                return KNOWN, known  # it will tell us a new name itself
            news: Dict[str, Any] = {key: record[key] for key in ("incarnation", "status", "age") if key in record}
            record = {**known.own_record(), "incarnation": 0, **news}  # and all else that its user does
        verdict, peer, changes = node.peers.merge_claim(record, node.loop.now())
        if verdict == NEW or (verdict == KNOWN and peer.unconfirmed_since is not None and not peer.gone):
            node.detector.on_confirmed(peer)
        elif verdict == ACCUSED:
            node.detector.on_accusation(peer, record["status"])
        elif verdict == CONFLICT:
            node.links.verify_address((record["ip"], record["port"]))
        node.publish(changes)
        return verdict, peer

    def _merge_claim_about_me(self, record: Dict[str, Any]) -> str:
        me = self.node.me
        if record.get("instance") != me.instance:
            return KNOWN  # a peer that had our address before us, or is said to
        incarnation = record.get("incarnation", 0)
        if incarnation > me.incarnation + MAX_RAISE:
            return IMPLAUSIBLE  # forged: we can't rise above it, and an answer would be answered for ever
        differs = record.get("status", ALIVE) != ALIVE or record["id"] != me.id
        if incarnation > me.incarnation or (incarnation == me.incarnation and differs):
            self.node.refute(incarnation)
            return STALE
        return KNOWN

    def _merge_own_claim(self, link: Link, peer: Contact, record: Dict[str, Any]) -> Tuple[str, Contact]:
        """What the far end says of itself: another name, or that it is not gone."""
        address = (record["ip"], record["port"])
        has_moved = address != peer.address and not self.node.links.is_seen_at(link, address)
        if has_moved or self.node.peers.get(record["id"]) not in (None, peer):  # or another peer has that id
            self.node.links.verify_address(address)
            return IMPLAUSIBLE, peer
        if record.get("status", ALIVE) != ALIVE:
            return KNOWN, peer
        verdict, peer, changes = self.node.peers.merge_own_claim(record, self.node.loop.now())
        if record["id"] not in link.ids:
            link.ids = (*link.ids[-7:], record["id"])
        self.node.detector.on_heard(peer)
        self.node.publish(changes)
        is_other = any(change.kind in (RENAMED, AWAY, CHANNELS) for change in changes)
        if is_other and not link.renames.take(self.node.loop.now()):
            self.node.links.ban(link)
        return verdict, peer


class Discovery(Endpoint):
    """The client of the discovery server: registers, sends heartbeats, merges the list. Without a server it tries
    again, later each time, in turn with any others that were found."""

    def __init__(self, node: "PeerNode") -> None:
        super().__init__(node.loop, "Discovery", {
            MSG_REGISTER_ACK: Discovery.handle_register_ack, MSG_HEARTBEAT: Discovery.handle_answer,
            MSG_PEER_LIST_UPDATE: Discovery.handle_peer_list_update, MSG_ERROR: Discovery.handle_error})
        self.node = node
        self.is_online: Optional[bool] = None  # None until the listeners were told
        self.since = node.loop.wall()  # since when it is, or is not, online
        self.peer_id = ""  # what the server calls us: it may see another address than we do
        self._registered: Tuple[Any, ...] = ()  # what the server knows of us: name and channels
        self._reason = ""  # what the server said was wrong
        self.has_registered = False  # ever
        self._first = node.settings.server or ("127.0.0.1", DEFAULT_PORT)
        self._first_tried_at = float("-inf")
        self._named: Tuple[Address, ...] = ()  # servers that the user named otherwise
        self.candidates: List[Address] = [self._first]  # the one that is used, or tried next, and further ones
        self.connection = Connection(node.loop, self._first, CLOSED)
        self._wait = 0.0
        self._tried_at = float("-inf")
        self._timer = Timer()  # of the next try
        self._heartbeat = Timer()

    @property
    def address(self) -> Address:
        """The server that is used, or tried next."""
        return self.candidates[0]

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the server, or one is being opened."""
        return not self._timer.active

    def sender_and_to(self) -> Tuple[str, str]:
        return self.peer_id or self.node.me.id, "server"

    # -- registering -----------------------------------------------------------------------------------

    def connect_to_discovery(self) -> None:
        """Dial the first candidate."""
        now = self.node.loop.now()
        self._tried_at = now
        if self.address == self._first:
            self._first_tried_at = now
        self.peer_id = ""
        self.traffic = RateLimit(MAX_MESSAGES)
        is_trusted = self.address in (self._first, *self._named)
        self.connection = self.node.room.connect(self.address, self, self.node.settings.timeout, is_trusted)

    def on_found(self, address: Address, why: str = BEACON) -> None:
        """A server was found on the network, or named with --join."""
        if self.is_connected or self.node.stopping or not self.node.whereabouts.may_reach(address[0]):
            return
        if not self.node.other_rooms.may_dial(address, why):
            return
        if why == NAMED:
            self._named = (address, *self._named)[:MAX_SERVERS]
        if address not in self.candidates:
            limited_log("server", logging.INFO, "[Discovery] found a server at %s:%d", *address)
        now = self.node.loop.now()
        is_overdue = now - self._first_tried_at > 2 * RETRY_SERVER_MAX  # others found meanwhile must not crowd it out
        first = [self._first, address] if is_overdue else [address, self._first]
        self.candidates = list(dict.fromkeys(first + self.candidates))[:MAX_SERVERS]
        if now - self._tried_at > 2 * RETRY_SERVER_MIN:  # it says that it is there: try it now
            self.retry()

    def retry(self) -> None:
        """Dial now, if it is not connected."""
        if not self.is_connected:
            self._timer.cancel()
            self.connect_to_discovery()

    def on_open(self) -> None:
        self.register()

    def register(self) -> None:
        """Say who we are; again after a change of name or address."""
        if self.connection.state != OPEN:
            return
        self.node.whereabouts.on_local_address(self.connection.local[0])
        me = self.node.me
        self._registered = (me.username, me.channels)
        content = {"username": me.username, "port": me.port, "ip": me.ip, "instance": me.instance,
                   "incarnation": me.incarnation, **({"channels": me.channels} if me.channels else {})}
        self.ask(MSG_REGISTER, content, lambda message: None, self.node.settings.timeout,
                 functools.partial(self.connection.abort, "what listens there does not answer as a server does"))

    def handle_register_ack(self, message: Message) -> None:
        """The server has registered us, and says who is there. To several registrations it may give one answer."""
        node, content = self.node, message["content"]
        self.drop_questions(MSG_REGISTER_ACK)
        parts = split_id(content["peer_id"])
        assert parts is not None
        self._wait, self._reason, self.has_registered = 0.0, "", True
        node.other_rooms.forgive(self.address)
        self.peer_id = content["peer_id"]
        node.whereabouts.on_seen(parts[1], self.connection.remote[0])
        node.targets.note(self.address, ONLINE, SERVER)
        if not self.is_online:
            log.info("[Discovery] registered as %s", content["peer_id"])
            self._set_online(True, "")
            self._send_heartbeat()
        if self._registered[0] != node.me.username:  # we were renamed since we registered
            self.register()
        self._merge(content["peer_list"], node.on_settled)

    def _send_heartbeat(self) -> None:
        interval = self.node.settings.heartbeat_interval
        self.check(1.5 * interval)
        self._heartbeat = self.node.loop.call_later(interval, self._send_heartbeat)

    def check(self, timeout: float) -> None:
        """Send a heartbeat; a server that does not answer it in `timeout` s is given up."""
        if self.is_online and self._registered != (self.node.me.username, self.node.me.channels):
            self.register()
        elif self.is_online:
            self.ask(MSG_HEARTBEAT, None, self._on_heartbeat_answered, timeout,
                     functools.partial(self.connection.abort, "the server is silent"))

    def _on_heartbeat_answered(self, message: Message) -> None:
        self._reason = ""  # what it said before did not end the connection

    # -- messages of the server ------------------------------------------------------------------------

    def on_messages(self, messages: List[Message]) -> None:
        if not self.traffic.take(self.node.loop.now(), len(messages)):
            self.connection.abort("the server sends too much")
            return
        if not is_loopback(self.connection.remote[0]):
            self.node.detector.on_heard(None)
        super().on_messages(messages)

    def on_bad_input(self, reason: str) -> None:
        limited_log("bad input", logging.WARNING, "[Discovery] bad input from the server: %s", reason)

    def handle_error(self, message: Message) -> None:
        """The server says what was wrong."""
        content = message["content"]
        self._reason = clean(content["reason"])[:200]
        if content.get("about") == ROOM:
            self.node.other_rooms.on_mismatch(self.address, True, ROOM, f"it says: {self._reason}")
        limited_log("server says", logging.WARNING, "[Discovery] the server says: %s", self._reason)

    def handle_peer_list_update(self, message: Message) -> None:
        """The server says who came and who left."""
        self._merge(message["content"]["joined"], functools.partial(self._on_left, message["content"]["left"]))

    def _on_left(self, left: List[Dict[str, Any]]) -> None:
        for gone in left:
            peer = self.node.peers.get(gone["id"])
            reason = clean(gone.get("reason", ""))[:100]
            if peer is not None and gone.get("instance", peer.instance) == peer.instance and reason != "renamed":
                self.node.detector.on_accusation(peer, LEFT if reason == "left" else SUSPECT, reason or "silent")

    def _merge(self, records: List[Dict[str, Any]], then: Callable[[], None]) -> None:
        if not self.traffic.take(self.node.loop.now(), len(records)):
            self.connection.abort("the server sends too much")
            return
        server_ip = self.connection.remote[0]

        def merge(record: Dict[str, Any]) -> None:
            if record.get("instance") != self.node.me.instance and record["id"] != self.node.me.id:
                self.node.gossip.merge_hearsay(record, server_ip)

        self.node.backlog.work_off(self, records, merge, then)

    # -- without a server ------------------------------------------------------------------------------

    def on_close(self, reason: str) -> None:
        """The connection is closed, or could not be opened: try the next server later."""
        self.drop_questions()
        self._heartbeat.cancel()
        if self.node.stopping:
            return
        reason, self._reason = self._reason or reason, ""
        if self.node.settings.server or self.address != self._first:  # else nobody said that one is there
            self.node.targets.note(self.address, reason, SERVER)
        self._set_online(False, reason)
        self.candidates.append(self.candidates.pop(0))
        self._wait, delay = back_off(self._wait, RETRY_SERVER_MIN, RETRY_SERVER_MAX, self.node.loop.random)
        self._timer = self.node.loop.call_later(delay, self.connect_to_discovery)
        self.node.on_server_failed()

    def _set_online(self, is_online: bool, reason: str) -> None:
        if not is_loopback(self.connection.remote[0]) and (is_online or self.is_online):
            self.node.detector.server_seen_at = float("inf") if is_online else self.node.loop.now()
        if is_online != self.is_online:
            self.is_online = is_online
            self.since = self.node.loop.wall()
            if not is_online:
                log.info("[Discovery] no server: %s; going on in P2P mode", reason)
            self.node.emit({"event": "server", "online": is_online, "address": format_address(self.address),
                            "reason": reason})

    def leave(self) -> None:
        """Tell the server that we leave."""
        self._timer.cancel()
        self._heartbeat.cancel()
        if self.is_online:
            self.send(MSG_UNREGISTER, None)
        self.connection.close("leaving")


def change_event(change: Change) -> Event:
    """Return the event that tells listeners of a change."""
    peer = change.peer
    if change.kind == AWAY:
        return {"event": "away", "peer": peer.public, "text": peer.away}
    if change.kind == CHANNELS:
        joined, left = set(peer.channels) - set(change.old), set(change.old) - set(peer.channels)
        return {"event": "channels", "peer": peer.public, "joined": sorted(joined), "left": sorted(left)}
    if change.kind == JOINED:
        more = {"away": peer.away, "channels": list(peer.channels)}
        return {"event": "joined", "peer": peer.public, **{key: value for key, value in more.items() if value}}
    if change.kind == RENAMED:
        return {"event": "renamed", "peer": peer.public, "old": change.old}
    more, peer.last_words = {"text": peer.last_words, "channels": list(peer.channels)}, ""
    return {"event": "left", "peer": peer.public, "reason": change.reason,
            **{key: value for key, value in more.items() if value}}


class Identity:
    """What we say of ourselves: name and address, whether the user is away, channels.

    Each change raises our incarnation and is told to everybody."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.ids: Dict[str, None] = {}  # every id that we had, the last one last
        self._announcements = RateLimit(MAX_RENAMES / 2)  # others cut off who makes twice as many
        self._timer = Timer()  # of an announcement that has to wait

    def set(self, username: str, ip: str, port: int) -> None:
        """Set name and address, and tell nobody."""
        self.node.me.set_identity(username, ip, port)
        self.ids[self.node.me.id] = None
        self.node.peers.clear_caches()

    def change(self, username: str, ip: str) -> None:
        """Take another name or address, and tell everybody: a change, not a leave and a join."""
        node = self.node
        if (username, ip) == (node.me.username, node.me.ip):
            return
        old = node.me.public
        self.set(username, ip, node.me.port)
        node.links.met_ourselves_at.clear()  # somebody else may get the old address
        log.info("[P2P] now known as %s", node.me.id)
        self._announce()  # now: what we send from now on bears the new id
        if node.discovery.is_online:
            node.discovery.register()
        node.emit({"event": "renamed", "peer": node.me.public, "old": old})

    def rename(self, username: str) -> None:
        """Take another name. Raises ChatError."""
        try:
            self.change(check_username(username), self.node.me.ip)
        except ValueError as error:
            raise ChatError(str(error)) from None

    def set_away(self, note: str) -> None:
        """Say that the user is away, and why; "" for here."""
        note, me = check_note(note), self.node.me
        if note != me.away and not self.node.leaving:
            me.set_away(note)
            self._announce_soon()
            self.node.emit(change_event(Change(AWAY, me)))

    def join(self, name: str) -> str:
        """Join a channel; return its name in the form in which it is used. Raises ChatError."""
        try:
            name = check_channel(name)
        except ValueError as error:
            raise ChatError(str(error)) from None
        channels = self.node.me.channels
        if name not in channels:
            if len(channels) >= MAX_CHANNELS:
                raise ChatError(f"You are in {MAX_CHANNELS} channels, and nobody can be in more. /part leaves one.")
            self._set_channels((*channels, name))
        return name

    def part(self, name: str) -> None:
        """Leave a channel. Raises ChatError."""
        channels = self.node.me.channels
        if name not in channels:
            raise ChatError(f"You are not in {name}.")
        self._set_channels(tuple(each for each in channels if each != name))

    def refute(self, incarnation: int) -> None:
        """Somebody calls us suspect or gone, or by an old id: raise our incarnation above that, and spread it."""
        me = self.node.me
        if me.incarnation <= incarnation <= me.incarnation + MAX_RAISE:
            me.incarnation = incarnation + 1
        self.node.spread(me, ALIVE)

    def _set_channels(self, names: Tuple[str, ...]) -> None:
        me = self.node.me
        old = me.channels
        me.set_channels(names)
        self._announce_soon()
        self.node.emit(change_event(Change(CHANNELS, me, old=old)))

    def _announce_soon(self) -> None:
        """Announce our record, but not so often that others would cut us off for it."""
        wait = self._announcements.wait(self.node.loop.now())
        if not wait:
            self._announce()
        elif not self._timer.active:
            self._timer = self.node.loop.call_later(wait, self._announce)

    def _announce(self) -> None:
        """Our record is another now: tell everybody."""
        self._announcements.take(self.node.loop.now())
        self.node.me.incarnation += 1
        self.node.links.announce()
        self.node.spread(self.node.me, ALIVE)


class Pending(NamedTuple):
    """A message that a receiver has not yet acknowledged. One is shared by all its receivers."""

    sequence: int
    to: str
    text: str
    message_id: str
    size: int  # bytes, encoded


class Outbox:
    """What is on its way to one peer, in order. What was reported as failed, and is kept, goes first."""

    __slots__ = ("waiting", "size", "kept", "progress_at", "heard_us_at", "timer")

    def __init__(self) -> None:
        self.waiting: Deque[Pending] = collections.deque()
        self.size = 0  # bytes waiting
        self.kept: Dict[int, Dict[str, Any]] = {}  # sequences of those kept -> what `public` was when that was reported
        self.progress_at = 0.0  # when the first of the others began to wait, or an acknowledgement came
        self.heard_us_at = 0.0  # when its peer last showed that it heard us, or something began to wait
        self.timer = Timer()  # gives up what is kept

    @property
    def in_flight(self) -> int:
        """How many wait and were not reported as failed."""
        return len(self.waiting) - len(self.kept)

    def take(self, upto: float = float("inf")) -> List[Pending]:
        """Take messages out of what waits, those with numbers up to `upto`."""
        taken: List[Pending] = []
        while self.waiting and self.waiting[0].sequence <= upto:
            taken.append(self.waiting.popleft())
            self.size -= taken[-1].size
        return taken


class Inbox:
    """How far we got with what one peer sent: every message up to `upto` was shown, or refused for good.

    Neighbouring refusals are one range. While there are MAX_REFUSALS ranges, everything is refused, which makes
    the last one longer: so the list has a bound, and no refusal is ever forgotten before its sender knows of it."""

    __slots__ = ("upto", "refused", "budget")

    def __init__(self, budget: RateLimit) -> None:
        self.upto = 0
        self.refused: List[Tuple[int, int, str]] = []  # first, last, why: those that the sender may not know of yet
        self.budget = budget

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another range of refusals."""
        return len(self.refused) >= MAX_REFUSALS

    def refuse(self, sequence: int, why: str) -> None:
        """Note that the next message will not be shown."""
        first, last, reason = self.refused[-1] if self.refused else (0, -1, "")
        if last == self.upto and (reason == why or self.is_full):
            self.refused[-1] = (first, sequence, reason)
        else:
            self.refused.append((sequence, sequence, why))
        self.upto = sequence

    def settle(self, upto: int) -> None:
        """Forget the refusals up to a number: the sender knows them."""
        self.refused = [each for each in self.refused if each[1] > upto]


TOO_LATE = "it did not come back in time"


class Kept:
    """What is kept for the return of peers, altogether. A message that is kept for several is counted once."""

    def __init__(self) -> None:
        self.peers: Dict[str, Contact] = {}  # by key
        self.size = 0  # bytes
        self._receivers: Dict[int, int] = {}  # sequence -> for how many peers that message is kept

    def names(self, label: Callable[[Contact], str]) -> str:
        """Return for whom something is kept."""
        labels = list(map(label, self.peers.values()))
        return ", ".join(labels[:5]) + ", ..." * (len(labels) > 5)

    def keep(self, peer: Contact, outbox: Outbox) -> Tuple[List[Pending], List[Pending]]:
        """Keep all that waits for a peer. If that is too much, the oldest is given up; return that, and what was not
        kept before."""
        new = [pending for pending in outbox.waiting if pending.sequence not in outbox.kept]
        given_up: List[Pending] = []
        self.peers[peer.key] = peer
        for pending in new:
            outbox.kept[pending.sequence] = peer.public
            receivers = self._receivers.get(pending.sequence, 0)
            self._receivers[pending.sequence] = receivers + 1
            self.size += 0 if receivers else pending.size
        while (len(outbox.waiting) > KEPT_MESSAGES or outbox.size > KEPT_BYTES
               or outbox.waiting and self.size > KEPT_BYTES_IN_ALL):
            given_up += self.take(peer, outbox, outbox.waiting[0].sequence)[0]
        return given_up, [pending for pending in new if pending.sequence in outbox.kept]

    def take(self, peer: Contact, outbox: Outbox, upto: float) -> Tuple[List[Pending], Dict[int, Dict[str, Any]]]:
        """Take messages for a peer out of what waits; return them, and which of them were kept, as in the outbox."""
        taken = outbox.take(upto)
        if not outbox.kept:
            return taken, {}
        kept = {each.sequence: outbox.kept.pop(each.sequence) for each in taken if each.sequence in outbox.kept}
        for pending in taken:
            if pending.sequence in kept:
                self._receivers[pending.sequence] -= 1
                if not self._receivers[pending.sequence]:
                    del self._receivers[pending.sequence]
                    self.size -= pending.size
        if not outbox.kept:
            outbox.timer.cancel()
            self.peers.pop(peer.key, None)
        return taken, kept


class Delivery:
    """Chat messages, out and in. Sent ones wait until acknowledged, and are sent again on every new link; the receiver
    shows each number once. None comes twice or out of order; failures are reported.

    What a peer that was lost did not acknowledge is reported, and kept for the return of that instance, until KEEP_TIME
    after it last showed that it heard us: its tombstone of us, which knows what was shown, lasts a little longer."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.in_flight = 0  # messages that wait for acknowledgements, each counted once a receiver
        self._sequence = 0
        self._sent = 0  # messages since the last line of the log that counts them
        self._unnumbered = itertools.count(1)  # messages that came without a number
        self._unidentified: Dict[str, RateLimit] = {}  # budgets of programs that never said hello, by address
        self._kept = Kept()
        self._timer = Timer()

    # -- out -------------------------------------------------------------------------------------------

    def send(self, texts: Sequence[str], receivers: Sequence[Contact], to: str) -> List[str]:
        """Send texts, each a message, to all the receivers, encoded once; return the messages' ids."""
        node = self.node
        messages: List[Pending] = []
        encoded: List[bytes] = []
        receiver_ids = [peer.id for peer in receivers]
        for text in texts:
            self._sequence += 1
            data = create_chat(node.me.id, text, to, self._sequence)
            message = Pending(self._sequence, to, text, f"{node.me.instance}-{self._sequence}", len(data))
            messages.append(message)
            encoded.append(data)
            node.emit({"event": "sent", "to": to, "text": text, "id": message.message_id, "receivers": receiver_ids})
        message_ids = [message.message_id for message in messages]
        log.log(DETAIL, "[Chat] sent %s to %d", message_ids, len(receivers))
        self._sent += len(texts)
        together = b"".join(encoded)
        for peer in receivers:
            count = self._enqueue(peer, messages, len(together))
            if count and peer.link is not None and peer.link.is_resumed:
                peer.link.used_at = node.loop.now()
                peer.link.connection.send(together if count == len(messages) else b"".join(encoded[:count]))
            for message in messages[count:]:
                self._report(peer, message, "too much is waiting for it already", {})
        self._watch_progress()
        return message_ids

    def _enqueue(self, peer: Contact, messages: List[Pending], size: int) -> int:
        """Queue messages for a receiver, as many as there is room for; return how many. `size` is that of all."""
        outbox, count = peer.outbox or Outbox(), len(messages)
        while count and (len(outbox.waiting) + count > OUTBOX_MESSAGES or outbox.size + size > OUTBOX_BYTES):
            count -= 1
            size -= messages[count].size
        now = self.node.loop.now()
        outbox.heard_us_at = outbox.heard_us_at if outbox.waiting else now
        outbox.progress_at = outbox.progress_at if outbox.in_flight else now
        outbox.waiting.extend(messages[:count])
        outbox.size += size
        self.in_flight += count
        peer.outbox = outbox
        if count and peer.link is None:
            self.node.links.ensure_link(peer)
        return count

    def resume(self, peer: Contact, link: Link) -> None:
        """Send all that is unacknowledged over a new link, in order; only then may new messages follow.

        It is encoded anew: our name or address may have changed since."""
        link.is_resumed = True
        outbox = peer.outbox
        if outbox is not None and outbox.waiting:
            if self.node.loop.now() - outbox.heard_us_at > KEEP_TIME:
                self.fail(peer, TOO_LATE)
            for pending in outbox.waiting:
                link.connection.send(create_chat(self.node.me.id, pending.text, pending.to, pending.sequence))

    def handle_chat_ack(self, link: Link, message: Message) -> None:
        """The far end says what became of all messages up to a number: refused where it says so, else shown."""
        peer, content = link.peer, message["content"]
        if peer is None or peer.outbox is None:
            return
        refused = collections.deque(content.get("refused", ()))
        taken, kept = self._take(peer, content["upto"])
        if taken:
            peer.outbox.progress_at = peer.outbox.heard_us_at = self.node.loop.now()
        emit, public = self.node.emit, peer.public
        for pending in taken:
            while refused and refused[0][1] < pending.sequence:
                refused.popleft()
            if refused and refused[0][0] <= pending.sequence:
                self._report(peer, pending, clean(refused[0][2])[:200], kept)
            elif pending.sequence not in kept:
                emit({"event": "delivered", "id": pending.message_id, "to": public})
            else:
                self.node.undelivered -= 1
                emit({"event": "delivered", "id": pending.message_id, "to": kept[pending.sequence], "kept": True})
        if content.get("refused"):
            link.send(MSG_CHAT_SETTLED, {"upto": content["upto"]})
        self.node.maybe_depart()

    def _take(self, peer: Contact, upto: float) -> Tuple[List[Pending], Dict[int, Dict[str, Any]]]:
        """Take messages for a peer out of what waits; return them, and which of them were kept."""
        assert peer.outbox is not None
        taken, kept = self._kept.take(peer, peer.outbox, upto)
        self.in_flight -= len(taken) - len(kept)
        return taken, kept

    def fail(self, peer: Contact, reason: str, upto: float = float("inf")) -> None:
        """Give up what waits for a peer, all or the messages with numbers up to `upto`, and say so."""
        if peer.outbox is not None:
            taken, kept = self._take(peer, upto)
            for pending in taken:
                self._report(peer, pending, reason, kept)

    def fail_all(self, reason: str) -> None:
        """Give up everything that waits."""
        for peer in self.node.peers.present():
            self.fail(peer, reason)
        names = self._kept.names(self.node.peers.label)
        if names:
            self.node.emit({"event": "notice", "text": f"What waited for {names} is dropped: you leave too early."})

    def on_lost(self, peer: Contact, reason: str) -> None:
        """A peer is gone. What waits for it has failed; unless its process has ended, it is kept for its return."""
        if peer.has_ended or reason == RESTARTED:
            self.fail(peer, reason)
        else:
            self._keep(peer, reason)

    def on_linked(self, peer: Contact) -> None:
        """A peer is linked. Another instance that was lost at its id has ended."""
        for other in [each for each in self._kept.peers.values() if each.id == peer.id and each is not peer]:
            self.fail(other, RESTARTED)

    def _keep(self, peer: Contact, reason: str) -> None:
        """Report what is in flight to a peer as failed, and keep it."""
        outbox = peer.outbox
        if outbox is None or not outbox.in_flight:
            return
        self.in_flight -= outbox.in_flight
        before = dict(outbox.kept)
        given_up, new = self._kept.keep(peer, outbox)
        for pending in given_up:
            self._report(peer, pending, reason, before)
        for pending in new:
            self._report(peer, pending, reason, before, is_kept=True)
        if outbox.kept and not outbox.timer.active:
            wait = max(0.0, outbox.heard_us_at + KEEP_TIME - self.node.loop.now())
            outbox.timer = self.node.loop.call_later(wait, self._on_never_back, peer)

    def _on_never_back(self, peer: Contact) -> None:
        """What is kept for a peer has waited for so long, unless the peer was heard meanwhile."""
        outbox = peer.outbox
        assert outbox is not None
        outbox.timer.cancel()
        wait = outbox.heard_us_at + KEEP_TIME - self.node.loop.now()
        if wait > 0.001:  # it is rounded
            outbox.timer = self.node.loop.call_later(wait, self._on_never_back, peer)
        else:
            self.fail(peer, TOO_LATE, max(outbox.kept, default=0))

    def on_slept(self, seconds: float) -> None:
        """The machine slept so long, and its clock stood still: for the others the time has passed."""
        for peer in [*self.node.peers.present(), *self._kept.peers.values()]:
            if peer.outbox is not None:
                peer.outbox.heard_us_at -= seconds
        for peer in list(self._kept.peers.values()):
            self._on_never_back(peer)

    def _report(self, peer: Contact, pending: Pending, reason: str, kept: Dict[int, Dict[str, Any]],
                is_kept: bool = False) -> None:
        """Say that a message has failed, for good or so far; `kept` holds those of which that was said before."""
        self.node.undelivered += pending.sequence not in kept
        limited_log("undelivered", logging.WARNING, "[Chat] not delivered to %s: %s", peer.id, reason)
        self.node.emit({"event": "failed", "id": pending.message_id, "to": kept.get(pending.sequence, peer.public),
                        "reason": reason, "text": pending.text, **({"kept": True} if is_kept else {})})

    def _watch_progress(self) -> None:
        if not self._timer.active:
            self._timer = self.node.loop.call_later(1.0, self._check_progress)

    def _check_progress(self) -> None:
        """Once a second while anything waits: a receiver that does not answer is suspected, then given up."""
        node = self.node
        node.check_clock()
        if self._sent:
            log.info("[Chat] sent %d to %d", self._sent, len(node.peers))
            self._sent = 0
        now = node.loop.now()
        for peer in node.peers.present():
            if peer.outbox is None or not peer.outbox.in_flight:
                continue
            if peer.route in node.targets.queue:
                peer.outbox.progress_at = now  # it was not even dialled yet
            stalled = now - peer.outbox.progress_at
            if stalled > UNREACHABLE_TIME and not node.detector.is_isolated:
                self._keep(peer, "it can't be reached from here")
                node.links.drop(peer, "it does not acknowledge what it is sent")
            elif stalled > QUIET_AFTER - 1:
                node.detector.probe(peer)
                node.detector.check_silence(peer)
        if self.in_flight:
            self._watch_progress()

    def start_over(self) -> None:
        """Count waiting from now on: we slept, or were cut off."""
        now = self.node.loop.now()
        for peer in self.node.peers.present():
            if peer.outbox is not None:
                peer.outbox.progress_at = now

    # -- in --------------------------------------------------------------------------------------------

    def handle_chat(self, link: Link, message: Message) -> None:
        """A chat message came: hand it over if it is new, for us, and within its sender's budget."""
        peer = link.peer or self._identify(link, message)
        if peer is None:
            return
        inbox, sequence = self._inbox(link), message.get("id", 0)
        self.node.acknowledge_later(link, inbox)
        if sequence and sequence <= inbox.upto:
            return  # it came again because our acknowledgement was lost
        refusal = self._refusal(link, inbox, message)
        if refusal:
            self._refuse(link, inbox, sequence, refusal)
            return
        inbox.upto = sequence or inbox.upto
        me, to = self.node.me, message["to"]
        message_id = f"{peer.key}-{sequence}" if sequence else f"{me.instance}-unnumbered-{next(self._unnumbered)}"
        self.node.emit({"event": "chat", "from": peer.public, "to": to if to == EVERYONE or is_channel(to) else me.id,
                        "text": clean(message["content"], newlines=True), "id": message_id})

    def _refusal(self, link: Link, inbox: Inbox, message: Message) -> str:
        """Why a message is refused; empty if it is not."""
        to, text, budget = message["to"], message["content"], self.node.settings.budget
        size = CHAT_OVERHEAD + (len(text) if text.isascii() else len(text.encode("utf-8", "replace")))
        if budget and not inbox.budget.take(self.node.loop.now(), size):  # first: it counts what is refused anyway
            if inbox.budget.excess > CUT_OFF_FACTOR * budget:
                inbox.budget.excess = 0.0
                self.node.links.ban(link)
            return "you send too much: slow down"
        if inbox.is_full:
            return inbox.refused[-1][2]
        if to == EVERYONE or to in self.node.identity.ids or to in self.node.me.channels:
            return ""
        if is_channel(to):
            return "not in that channel"
        return "" if to == self.node.discovery.peer_id else "it is meant for somebody else"

    def _refuse(self, link: Link, inbox: Inbox, sequence: int, why: str) -> None:
        limited_log("refused chat", logging.WARNING, "[Chat] refused from %s: %s", link.connection.remote[0], why)
        if sequence:
            inbox.refuse(sequence, why)
        else:
            link.send(MSG_ERROR, {"reason": why})

    def acknowledge(self, link: Link, inbox: Inbox) -> None:
        """Tell the far end what became of all its messages so far. To tell it again changes nothing."""
        if not inbox.upto:
            return
        if inbox.refused:
            link.send(MSG_CHAT_ACK, {"upto": inbox.upto, "refused": inbox.refused})
        else:
            to = link.peer.id if link.peer else EVERYONE
            ack = create_raw(MSG_CHAT_ACK, self.node.me.id, to, f'{{"upto":{inbox.upto}}}')
            link.connection.send(ack, may_wait=True)

    def handle_chat_settled(self, link: Link, message: Message) -> None:
        """The sender knows our refusals up to a number: they need not be told again."""
        self._inbox(link).settle(message["content"]["upto"])

    def _inbox(self, link: Link) -> Inbox:
        """The inbox of the peer at the far end; of a program that never said hello, one for the link, with a
        budget that it shares with all others at its address: it may call itself anything."""
        owner: Any = link.peer or link
        if owner.inbox is None:
            owner.inbox = Inbox(self._budget_of(link))
        inbox: Inbox = owner.inbox
        return inbox

    def _budget_of(self, link: Link) -> RateLimit:
        if link.peer is not None:
            return RateLimit(self.node.settings.budget)
        if len(self._unidentified) >= MAX_PEERS:
            self._unidentified.clear()
        return self._unidentified.setdefault(link.connection.remote[0], RateLimit(self.node.settings.budget))

    def _identify(self, link: Link, message: Message) -> Optional[Contact]:
        """Return which peer a program is that chats without a hello; refuse it if its id is another's."""
        parts = split_id(message["sender_id"])
        if parts is None:
            link.refuse("sender_id must be username@ip:port")
            return None
        known = self.node.peers.get(message["sender_id"])
        link.ids = link.ids or (message["sender_id"],)  # one name a connection
        is_taken = (known is not None and known.instance) or message["sender_id"] in self.node.identity.ids
        if is_taken or message["sender_id"] not in link.ids or parts[1] != link.connection.remote[0]:
            link.refuse("that sender_id is not yours; say MSG_HELLO first")
            return None
        return known or Contact(*parts)


class Talk:
    """The last messages of a conversation, for those who come later."""

    def __init__(self) -> None:
        self.messages: Deque[Tuple[float, Event]] = collections.deque(maxlen=CATCH_UP)  # when, chat or sent
        self.told: Dict[str, Tuple[str, str]] = {}  # of the messages that we were told: id -> id of the sender, text

    def trim(self) -> None:
        """Drop the oldest messages while all have more than CATCH_UP_BYTES characters: a long one has come."""
        excess = sum(len(event["text"]) for _, event in self.messages) - CATCH_UP_BYTES
        while excess > 0:
            excess -= len(self.messages.popleft()[1]["text"])


class Recall:
    """Tells those who come late what was said, and asks for that when we do; private messages are no part of it.

    Each tells only what it heard itself: nobody passes on under its own name what a liar has invented. Of the linked
    peers that one is asked which runs longest by its own word; another one, if it has nothing to tell."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self.is_known: Callable[[str], bool] = lambda message_id: False  # whether the user has a message already
        self._talks = {name: Talk() for name in (EVERYONE, *node.settings.channels)}
        self._wanted: Dict[str, None] = dict.fromkeys(self._talks)  # conversations for which nobody was asked yet
        self._is_settled = False
        self._timer = Timer()

    # -- listening -------------------------------------------------------------------------------------

    def listen(self, events: List[Event]) -> None:
        """Keep what is said; ask when we have looked around, and when we join a channel."""
        now, talks = self.node.loop.now(), self._talks
        for event in events:
            kind = event["event"]
            if kind == "chat" or kind == "sent":
                talk = talks.get(event["to"])
                if talk is None:
                    continue
                talk.messages.append((now, event))
                if len(event["text"]) > CATCH_UP_BYTES // CATCH_UP:  # shorter ones are bounded by their number
                    talk.trim()
                if talk.told and kind == "chat" and talk.told.get(event["id"]) == (event["from"]["id"], event["text"]):
                    event["told"] = True
            elif kind in ("settled", "channels"):
                self._is_settled = self._is_settled or kind == "settled"
                if kind == "channels" and self.node.is_me(event["peer"]["id"]):
                    self._on_own_channels(event["joined"], event["left"])
                self.ask_soon()

    def _on_own_channels(self, joined: List[str], left: List[str]) -> None:
        for name in left:
            self._talks.pop(name, None)
            self._wanted.pop(name, None)
        for name in joined:
            self._talks[name], self._wanted[name] = Talk(), None

    # -- asking ----------------------------------------------------------------------------------------

    def ask_soon(self) -> None:
        """Ask for what nobody was asked for yet, if we have looked around: perhaps there is somebody now."""
        if self._wanted and self._is_settled and self.node.settings.catch_up and not self._timer.active:
            self._timer = self.node.loop.call_later(LINK_TIME, self._ask_for_what_is_wanted)

    def _ask_for_what_is_wanted(self) -> None:
        """Ask about each conversation in which somebody else is."""
        wanted = [name for name in self._wanted if self._tellers([name], [])]
        for name in wanted:
            del self._wanted[name]
        self._ask(wanted, [])

    def _tellers(self, wanted: List[str], tried: List[Contact]) -> List[Contact]:
        """Those who may tell what was said in one of the conversations."""
        is_everyone, channels = EVERYONE in wanted, set(wanted)
        return [peer for peer in self.node.present() if peer.link is not None and peer.incarnation and peer not in tried
                and (is_everyone or peer.channels and not channels.isdisjoint(peer.channels))]

    def _ask(self, wanted: List[str], tried: List[Contact]) -> None:
        """Ask one peer about the conversations that it is in, and others about the rest."""
        tellers = self._tellers(wanted, tried) if len(tried) < CATCH_UP_TRIES else []
        if not tellers:
            return
        teller = min(tellers, key=lambda peer: (peer.incarnation, peer.id))
        here = [name for name in wanted if name == EVERYONE or name in teller.channels]
        tried = [*tried, teller]
        link, content = teller.link, {"of": here, "most": self.node.settings.catch_up}
        assert link is not None
        link.ask(MSG_CATCH_UP_REQUEST, content, functools.partial(self._on_answer, teller, here, tried),
                 self.node.settings.timeout, functools.partial(self._ask, here, tried))
        self._ask([name for name in wanted if name not in here], [])

    def _on_answer(self, teller: Contact, wanted: List[str], tried: List[Contact], message: Message) -> None:
        """Look at it in the next turn: by then it is known what came live in this one."""
        self.node.loop.call_later(0, self._on_told, teller, wanted, tried, message)

    def _on_told(self, teller: Contact, wanted: List[str], tried: List[Contact], message: Message) -> None:
        """Hand over what a peer tells, but for what is known, the oldest first."""
        messages = message["content"]["messages"]
        known = {event["id"] for talk in self._talks.values() for _, event in talk.messages}
        told = sorted(messages, key=lambda each: -int(each["age"]))[-self.node.settings.catch_up:]
        for each in told:
            talk = self._talks.get(each["to"])
            is_own = each["id"].startswith(f"{self.node.me.instance}-")
            if talk is None or each["to"] not in wanted or each["age"] > CATCH_UP_TIME or is_own:
                continue
            if each["id"] not in known and each["id"] not in talk.told and not self.is_known(each["id"]):
                sender, text = Contact.from_wire(each["from"]), clean(each["text"], newlines=True)
                talk.told[each["id"]] = (sender.id, text)
                self.node.emit({"event": "told", "from": sender.public, "to": each["to"], "text": text,
                                "id": each["id"], "age": each["age"], "told_by": teller.public})
        answered = {each["to"] for each in messages}
        self._ask([name for name in wanted if name not in answered], tried)

    def on_slept(self, seconds: float) -> None:
        """The machine slept so long, and its clock stood still: what was said is older than it seems."""
        for talk in self._talks.values():
            older = [(when - seconds, event) for when, event in talk.messages]
            talk.messages.clear()
            talk.messages.extend(older)

    # -- telling ---------------------------------------------------------------------------------------

    def handle_catch_up_request(self, link: Link, message: Message) -> None:
        """Somebody asks what was said: tell the newest of it, the oldest first."""
        content, now = message["content"], self.node.loop.now()
        if not link.catch_ups.take(now):
            link.error("you ask too often for what was said")
            return
        talks = [self._talks[name] for name in dict.fromkeys(content["of"]) if name in self._talks]
        said = [each for talk in talks for each in talk.messages
                if now - each[0] <= CATCH_UP_TIME and _is_message_id(each[1]["id"])]  # others can't be told apart
        said.sort(key=lambda each: each[0])
        told: List[Dict[str, Any]] = []
        room = CATCH_UP_BYTES
        for when, event in said[:-1 - min(CATCH_UP, content["most"]):-1]:
            room -= len(event["text"].encode("utf-8", "replace"))
            if room >= 0:
                told.append({"id": event["id"], "from": event.get("from", self.node.me.public), "to": event["to"],
                             "text": event["text"], "age": int(now - when)})
        link.answer(message, MSG_CATCH_UP_RESPONSE, {"messages": told[::-1]})


NO_NETWORK = "This machine has no address on a network at the moment."


class Finder:
    """Looks for others: at the addresses named with --join, and by beacons on the local network. What a
    beacon says is only a hint: its address is dialled, and few of them at once."""

    def __init__(self, node: "PeerNode") -> None:
        self.node = node
        self._beacon_at = float("-inf")  # when the last one of another peer came
        self._lan: Optional[Lan] = None
        self._timer = Timer()
        self._answers = RateLimit(BEACON_ANSWERS, 1.0)
        self._typed: Dict[Address, None] = {}  # with /connect
        names = (address for address in node.settings.join if is_name(address[0]))
        self._asked = dict.fromkeys(names)  # addresses of which the user is told what came of the next dial

    def start(self) -> None:
        """Look around, now and from time to time."""
        settings, targets = self.node.settings, self.node.targets
        for address in settings.join:
            targets.enter(address, NAMED)
        if settings.server is None:
            self._open_lan()
        self._look_around()

    def _open_lan(self) -> None:
        if self.node.settings.lan:
            self._lan = self.node.loop.lan(self.node.settings.host, DEFAULT_PORT, self.on_beacon)

    def _look_around(self) -> None:
        """Dial the addresses named by hand, and send a beacon."""
        is_alone = not len(self.node.peers)
        if self._lan is not None and self.node.settings.server and self.node.discovery.has_registered:
            self._lan.close()  # it was opened because the server was missing
            self._lan = None
        if self._lan is not None or self.node.settings.join or self._typed:
            wait = BEACON_INTERVAL_ALONE if is_alone else BEACON_INTERVAL * (0.75 + self.node.loop.random.random() / 2)
            self._timer = self.node.loop.call_later(wait, self._look_around)  # first: an error must not end it
        known = {peer.address for peer in self.node.peers.present()}.union(self.node.discovery.candidates)
        now = self.node.loop.now()
        typed = [address for address in self._typed if self.node.targets.is_due(address, now)]
        for address in (*self.node.settings.join, *typed):
            if address not in known and not self._has_met(address):
                self.node.links.dial(address, NAMED)
        if self._lan is not None:
            self._lan.refresh()
            self._lan.broadcast(self._beacon(is_answer=False, size=BEACON_SIZE))

    def _has_met(self, address: Address) -> bool:
        """Whether the peer at an address named by hand is present, by whatever address it is known."""
        target = self.node.targets.get(address)
        return target is not None and target.peer is not None and not target.peer.gone

    def _beacon(self, is_answer: bool, size: int) -> bytes:
        node = self.node
        wants_server = not (node.settings.server or node.discovery.is_online)
        content = {"role": "peer", "port": node.me.port, "instance": node.me.instance, "answer": is_answer,
                   "alone": not len(node.peers), "server_wanted": wants_server, **node.room.beacon()}
        return make_beacon(node.me.id, content, size)

    def on_beacon(self, data: bytes, sender: Address) -> Optional[bytes]:
        """A datagram came. If it is a beacon, dial an unknown peer or server, and answer a peer that is alone."""
        message = parse_message(data)
        if message is None or message["type"] != MSG_BEACON:
            limited_log("beacon", logging.INFO, "[P2P] a datagram from %s that is no beacon", sender[0])
            return None
        node, content = self.node, message["content"]
        if content.get("instance") == node.me.instance or node.stopping:
            return None
        address = (sender[0], content["port"])
        is_in_our_room = node.other_rooms.on_beacon(address, content)
        if content["role"] == "server":
            if is_in_our_room and node.settings.server is None:  # else it may introduce peers that we don't want
                node.discovery.on_found(address)
            return None
        self._beacon_at = node.loop.now()
        known = node.peers.by_key(content.get("instance", ""))
        is_chosen = node.loop.random.random() * len(node.peers) < 10  # of a thousand peers about ten react
        if is_in_our_room and (known is None or known.gone) and is_chosen:
            node.links.verify_address(address, BEACON)
            target = node.targets.get(address)
            if target is not None and target.link is not None:  # for the report, until the dial ends
                target.result = target.result or "not met yet"
        is_wanted = content.get("alone") is True and content.get("answer") is not True and is_chosen
        if not is_wanted or not self._answers.take(node.loop.now()):
            return None
        return self._beacon(is_answer=True, size=min(len(data), BEACON_SIZE)) or None

    def handle_error(self, link: Link, message: Message) -> None:
        """The far end says what it did not like, or that it is a server."""
        node, content = self.node, message["content"]
        reason = clean(content["reason"])[:200]
        limited_log("error", logging.INFO, "[P2P] %s:%d says: %s", *link.connection.remote, reason)
        target = node.targets.get(link.address)
        if content.get("role") == "server" and link.dialled and target is not None and target.why == NAMED:
            in_use = f"; the one at {format_address(node.discovery.address)} stays" * bool(node.discovery.is_online)
            self.on_dialled(link.address, f"a discovery server{in_use}")
            node.discovery.on_found(link.address, NAMED)
            link.connection.close("a discovery server")
            return
        if content.get("about") == ROOM and link.peer is None and link.dialled:
            node.other_rooms.on_mismatch(link.address, True, ROOM, f"it says: {reason}")
        elif link.peer is None and link.dialled:
            node.whereabouts.on_seen(content.get("you", {}).get("ip"), link.connection.remote[0])
        link.failure = f"it says: {reason}"

    def on_server_failed(self) -> None:
        """The server does not answer. If we know nobody and never did, look on the local network as well.

        A peer that was registered does not: two groups, each with a server, would merge when both servers stop."""
        node = self.node
        if self._lan is None and not node.discovery.has_registered and not len(node.peers):
            self._open_lan()
            if self._lan is not None:
                node.emit({"event": "notice", "text": f"Looking on {self._around} as well."})
                node.loop.call_later(SETTLE_TIME, node.on_settled)
                self._timer.cancel()
                self._look_around()
        if self._lan is None and not node.settings.join:
            node.on_settled()  # there is nothing to wait for

    def who(self) -> Sequence[Tuple[str, ...]]:
        """A table of the peers: address, how it is heard, how long ago, and how long a round trip takes."""
        peers, now = self.node.peers, self.node.loop.now()
        return [("name", "address", "heard", "ago", "trip")] + [
            (peers.label(peer) + " (away)" * bool(peer.away), format_address(peer.address), *peer.describe(now))
            for peer in peers.present()]

    def change_passphrase(self, text: str) -> None:
        """Take another passphrase, and dial again whoever refused the former one. Raises ChatError."""
        try:
            self.node.room.change_passphrase(normalise_passphrase(text))
        except ValueError as error:
            raise ChatError(str(error)) from None
        self.node.other_rooms.start_over()
        self.node.discovery.retry()
        self.node.links.reconcile()

    def encryption(self) -> str:
        """Say in which room we are, and how links are encrypted."""
        kinds = sorted({link.connection.describe() for link in self.node.links.all if link.peer is not None})
        using = f" ({'; '.join(kinds)})" if kinds else ""
        room = self.node.room.name
        return f"closed room {room}, encrypted{using}" if room else "not encrypted"

    def report(self) -> List[str]:
        """Why nobody is here, and what to do about it; empty if somebody is."""
        node = self.node
        if len(node.peers):
            return []
        lines = ["Nobody else is here.", f"You are {node.me.id}."]
        lines += [self._outcome(target) for target in node.targets.results()]
        lines += [f"{line}." for line in node.other_rooms.report()]
        has_network, is_local = node.whereabouts.has_network, is_loopback(node.me.ip)
        if not has_network:
            lines.append(NO_NETWORK)
        elif self._lan is not None and node.loop.now() - self._beacon_at > 2 * BEACON_INTERVAL:
            result = f", but {self._lan.problem}" if self._lan.problem else f" (UDP port {DEFAULT_PORT}): no answer"
            lines.append(f"Looked on {self._around}{' only' * is_local}{result}.")
        if has_network or is_local:
            where = "in another terminal of this machine" if is_local else "on the other machine"
            lines += ["From here: /connect HOST:PORT, which /who says there.", f"To connect {where}, type there:",
                      start_line("--join", node.me.address, node.settings.host, node.room.name)]
        return lines

    def first_look(self) -> str:
        """What the first look around has shown of the network and of a server, in a line; empty if that was said."""
        node = self.node
        if not node.whereabouts.has_network:
            return NO_NETWORK
        if node.discovery.is_online or node.settings.server:
            return ""
        looked_outside = self._lan is not None and not is_loopback(node.settings.host)
        return f"No server on this {'network' if looked_outside else 'machine'}; none is needed."

    def connect(self, text: str) -> str:
        """Dial what the user names, until it answers; return the address. A notice will say what came of the first
        dial. Raises ChatError."""
        node = self.node
        try:
            address = parse_address(text)
            check_reach(node.settings.host, [address])
        except ValueError as error:
            raise ChatError(f"{error}.") from None
        if address == node.me.address or address in node.links.met_ourselves_at:
            raise ChatError("That is you.")
        self._asked[address] = self._typed[address] = None
        if len(self._typed) > MAX_TYPED:
            del self._typed[next(iter(self._typed))]
        node.other_rooms.forgive(address)
        node.links.dial(address, NAMED)
        if not self._timer.active:
            self._timer = node.loop.call_later(BEACON_INTERVAL_ALONE, self._look_around)
        return format_address(address)

    def on_dialled(self, address: Address, outcome: str, has_failed: bool = False) -> None:
        """A dial has ended. If the user waits for it, say how."""
        if address in self._asked:
            del self._asked[address]
            if has_failed and self.node.other_rooms.has_told(address):
                return
            again = "; it is tried again" * (has_failed and address not in self.node.links.met_ourselves_at)
            self.node.emit({"event": "notice", "text": f"{format_address(address)}: {outcome}{again}."})

    def _outcome(self, target: Target) -> str:
        """An address that was tried, and what came of it."""
        address = format_address(target.address)
        if target.why == SERVER and target.result == ONLINE:
            return f"The server {address} is online, and knows nobody else."
        heard = f"heard on {self._around}, but " * (target.why == BEACON)
        return f"Tried {'server ' * (target.why == SERVER)}{address}: {heard}{target.result}."

    @property
    def _around(self) -> str:
        """Where beacons go."""
        return "this machine" if is_loopback(self.node.me.ip) else "the local network"

    def stop(self) -> None:
        """Look no longer."""
        self._timer.cancel()
        if self._lan is not None:
            self._lan.close()


def node_handlers(node: "PeerNode") -> Dict[str, Callable[[Link, Message], None]]:
    """The methods that take in each type of message between peers."""
    return {
        MSG_CHAT: node.delivery.handle_chat,
        MSG_CHAT_ACK: node.delivery.handle_chat_ack,
        MSG_CHAT_SETTLED: node.delivery.handle_chat_settled,
        MSG_HELLO: node.links.handle_hello,
        MSG_UNREGISTER: node.handle_unregister,
        MSG_PROBE: node.detector.handle_probe,
        MSG_PROBE_ACK: Link.handle_answer,
        MSG_PROBE_REQUEST: node.detector.handle_probe_request,
        MSG_PROBE_RESULT: Link.handle_answer,
        MSG_PEER_NEWS: node.gossip.handle_news,
        MSG_SYNC_PEERS_REQUEST: node.gossip.handle_sync_request,
        MSG_SYNC_PEERS_RESPONSE: Link.handle_answer,
        MSG_CATCH_UP_REQUEST: node.recall.handle_catch_up_request,
        MSG_CATCH_UP_RESPONSE: Link.handle_answer,
        MSG_GUESSES: node.other_rooms.handle_guesses,
        MSG_ERROR: node.finder.handle_error,
        MSG_REGISTER: lambda link, message: link.refuse("this is a peer, not a discovery server: say MSG_HELLO"),
    }


def check_text(text: str) -> str:
    """The text as it is sent. Raises ChatError if it can't be."""
    text = clean(text, newlines=True)
    if not text.strip():
        raise ChatError("There is nothing to send.")
    size = len(text) if text.isascii() else len(text.encode("utf-8"))
    if size > MAX_TEXT:
        raise ChatError(f"The text has {size} bytes; at most {MAX_TEXT} can be sent at once.")
    return text


class Turn:
    """What a turn of the loop brought: events for the listeners, and links over which chat came."""

    def __init__(self, node: "PeerNode") -> None:
        self._node = node
        self._events: List[Event] = []
        self._inboxes: Dict[Link, Inbox] = {}
        self._is_end_scheduled = False

    def emit(self, event: Event) -> None:
        """Tell the listeners, at the end of this turn."""
        self._events.append(event)
        if not self._is_end_scheduled:
            self._call_at_end()

    def acknowledge_later(self, link: Link, inbox: Inbox) -> None:
        """Acknowledge what came over a link at the end of this turn, when the listeners have it."""
        self._inboxes[link] = inbox
        if not self._is_end_scheduled:
            self._call_at_end()

    def acknowledge(self) -> None:
        """Acknowledge it now."""
        inboxes, self._inboxes = self._inboxes, {}
        for link, inbox in inboxes.items():
            self._node.delivery.acknowledge(link, inbox)

    def _call_at_end(self) -> None:
        self._is_end_scheduled = True
        self._node.loop.at_turn_end(self._end)

    def _end(self) -> None:
        """Hand over the events, then acknowledge the messages in them. So a listener's reply is sent before the
        acknowledgement, and reaches a peer that leaves as soon as it is acknowledged.

        An exception in a listener does not stop the others: it is raised in the next turn; the loop reports it."""
        self._is_end_scheduled = False
        events, self._events = self._events, []
        for listener in self._node.listeners if events else ():
            try:
                listener(events)
            except Exception as error:
                self._node.loop.call_later(0, self._raise, error)
        self.acknowledge()

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error


class PeerNode:
    """A peer. Use: PeerNode(loop, settings, listener).start(), then run the loop. `room` is a closed one.

    Each listener is called with a list of events: all that one turn of the loop brought."""

    def __init__(self, loop: Loop, settings: Settings, *listeners: Listener, room: Optional[Room] = None) -> None:
        self.loop = loop
        self.settings = settings
        self.other_rooms = OtherRooms(self)
        self.room = make_room(loop, room, self.other_rooms.on_mismatch)
        self.me = Contact(settings.username or "anonymous", "127.0.0.1", 0,
                          instance=f"{loop.random.getrandbits(64):016x}", incarnation=int(loop.wall() * 1000))
        self.me.channels = settings.channels
        self.peers: PeerList[Contact] = PeerList(self.me)
        self.news = News()
        self.targets = Targets()
        self.backlog = FairQueue(loop, MERGE_TIME, MAX_MERGING)  # of records to merge
        self.files = FileServer(loop, "--join", self.room.name)
        self.undelivered = 0  # messages reported as failed
        self.leaving = False  # no new messages; what is under way may still arrive
        self.stopping = False  # saying goodbye
        self._is_settled = self._has_stopped = False
        self._turn = Turn(self)
        self.emit, self.acknowledge_later = self._turn.emit, self._turn.acknowledge_later
        self._listener: Optional[SocketListener] = None
        self._tickers: List[Ticker] = []
        self.whereabouts = Whereabouts(self)
        self.links = Links(self)
        self.detector = Detector(self)
        self.gossip = Gossip(self)
        self.discovery = Discovery(self)
        self.identity = Identity(self)
        self.delivery = Delivery(self)
        self.recall = Recall(self)
        self.finder = Finder(self)
        self.handlers = node_handlers(self)
        self.listeners = [self.recall.listen, *listeners]
        # Methods of the helpers that interfaces call as methods of the node. `alone` says why nobody is here.
        self.present, self.find, self.label = self.peers.present, self.peers.find, self.peers.label_of
        self.first_look, self.alone, self.connect = self.finder.first_look, self.finder.report, self.finder.connect
        self.who, self.encryption, self.sync = self.finder.who, self.finder.encryption, self.gossip.sync_for_user
        self.rename, self.set_away = self.identity.rename, self.identity.set_away
        self.join, self.part = self.identity.join, self.identity.part
        self.dialled, self.check_clock = self.finder.on_dialled, self.detector.check_clock  # upcalls
        self.refute, self.change_identity = self.identity.refute, self.identity.change

    # -- starting and leaving --------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and look for others. Raises OSError when the port can't be had."""
        self.start_p2p_listener()
        self.emit({"event": "ready", "id": self.me.id, "ip": self.me.ip, "port": self.me.port})
        self.detector.start()
        self._tickers = [Ticker(self.loop, PROBE_INTERVAL, self._on_probe_interval),
                         Ticker(self.loop, self.settings.gossip_interval, self.gossip.sync_with_random_peer)]
        self.discovery.connect_to_discovery()
        self.finder.start()
        named = bool(self.settings.server or self.settings.join)
        self.loop.call_later(SETTLE_TIME + named * self.settings.timeout, self.on_settled)

    def start_p2p_listener(self) -> None:
        """Listen for other peers. Raises OSError when the port can't be had."""
        settings = self.settings
        accept, protocols = self.links.handle_p2p_connection, self.files.protocols
        self._listener = self.room.listen(settings.host, settings.port, accept, protocols)
        self.identity.set(self.me.username, self.whereabouts.first_guess(), self._listener.address[1])
        log.info("[P2P] listening on %s:%d as %s", settings.host, self.me.port, self.me.id)

    def _on_probe_interval(self) -> None:
        self.check_clock()
        self.whereabouts.follow_machine()
        self.detector.probe_neighbours()
        self.links.reconcile()

    def on_settled(self) -> None:
        """The first look around is over: whoever could be found quickly is known. Said once."""
        if not self._is_settled and not self.stopping:
            self._is_settled = True
            self.emit({"event": "settled"})

    def leave(self, words: str = "") -> None:
        """Wait for what is under way, at most settings.timeout; tell everybody; then comes "stopped"."""
        if not self.leaving:
            self.leaving, self.me.last_words = True, check_note(words)
            self.loop.call_later(self.settings.timeout, self.depart)
            self.maybe_depart()

    def maybe_depart(self) -> None:
        """Leave, if we want to and there is nothing left to wait for."""
        if self.stopping:
            if not self.links.all:
                self._stop()
        elif self.leaving and not self.delivery.in_flight:
            self.depart()

    def depart(self) -> None:
        """Leave without waiting: what is still under way fails."""
        self.leaving = True
        if self.stopping:
            return
        self.delivery.fail_all("you left before it was delivered")
        self.stopping = True
        for ticker in self._tickers:
            ticker.close()
        self.finder.stop()
        self.backlog.close()
        self.discovery.leave()
        self._turn.acknowledge()
        self.links.close_all()
        self.room.close()
        if self._listener is not None:
            self._listener.close()
        self.loop.call_later(1.0, self._stop)
        self.maybe_depart()

    def _stop(self) -> None:
        if not self._has_stopped:
            self._has_stopped = True
            log.info("[P2P] left")
            self.emit({"event": "stopped"})

    # -- what an interface asks for --------------------------------------------------------------------

    def broadcast_chat_message(self, text: str) -> str:
        """Send a text to everybody; return the message's id. Raises ChatError."""
        return self.send_chat_messages(EVERYONE, [text])[0]

    def send_chat_message(self, to: str, text: str) -> str:
        """Send a text to the peer with the id `to` alone; return the message's id. Raises ChatError."""
        return self.send_chat_messages(to, [text])[0]

    def send_chat_messages(self, to: str, texts: Sequence[str]) -> List[str]:
        """Send texts, each a message, to EVERYONE, a channel that we are in, or the peer with the id `to`; return the
        messages' ids. Raises ChatError and sends none."""
        receivers = self.members(to)
        if is_channel(to) and to not in self.me.channels:
            raise ChatError(f"Not sent: you are not in {to}. /join {to} first.")
        if is_channel(to) and not receivers:
            raise ChatError(f"Not sent: nobody else is in {to}.")
        if not receivers:
            raise ChatError("Not sent: nobody else is here. /who says why." if to == EVERYONE else
                            f"Not sent: {self.peers.label_of(to)} is not here.")
        if self.leaving:
            raise ChatError("You are leaving: nothing more is sent.")
        message_ids = self.delivery.send(list(map(check_text, texts)), receivers, to)
        self.set_away("")
        return message_ids

    def members(self, conversation: str) -> List[Contact]:
        """Return the others in a conversation: EVERYONE, a channel, or the peer with that id."""
        if conversation == EVERYONE:
            return self.present()
        if is_channel(conversation):
            return [peer for peer in self.present() if conversation in peer.channels]
        peer = self.peers.get(conversation)
        return [] if peer is None else [peer]

    def is_me(self, peer_id: str) -> bool:
        """Whether an id is ours, or was."""
        return peer_id in self.identity.ids

    def channel_counts(self) -> Dict[str, int]:
        """Return the channels that are there, and how many peers are in each, ourselves included."""
        return dict(collections.Counter(name for peer in [self.me, *self.present()] for name in peer.channels))

    def server_status(self) -> Tuple[bool, str, float]:
        """Return whether it is online, its address, and since when, in Unix time."""
        return bool(self.discovery.is_online), format_address(self.discovery.address), self.discovery.since

    @property
    def network_gone(self) -> bool:
        """Whether everybody fell silent at once."""
        return self.detector.is_isolated

    # -- upcalls: what the helpers tell each other -----------------------------------------------------

    def on_heard(self, link: Link) -> None:
        """Something came over a link: a sign of life, unless an unidentified program on this machine sent it."""
        if link.peer is not None or not self.whereabouts.is_own(link.connection.remote[0]):
            self.detector.on_heard(link.peer)

    def linked(self, link: Link, peer: Contact, verdict: str, changes: List[Change], digest: Any,
               was_lost: bool) -> None:
        """A peer said hello, and the link was bound to it."""
        self.detector.on_heard(peer)
        self.detector.answer_askers(peer)
        self.publish(changes)
        self.gossip.on_linked(link, peer, verdict, digest, was_lost)
        self.detector.measure_trip(link, peer)
        self.delivery.on_linked(peer)
        if not peer.gone and not link.is_resumed:
            self.delivery.resume(peer, link)
        self.recall.ask_soon()
        self.dialled(link.address, f"connected to {self.peers.label(peer)}")
        self.loop.call_later(SETTLE_TIME / 4, self.on_settled)

    def unlinked(self, link: Link, peer: Contact, why: str) -> None:
        """The link over which we sent to a peer is gone; perhaps another took its place."""
        if self.stopping:
            return
        if peer.link is not None:
            self.delivery.resume(peer, peer.link)
            self.detector.on_link_replaced(peer)
        elif not peer.gone:
            log.debug("[P2P] link to %s lost: %s", peer.id, why)
            if not self.links.was_idle(link, peer):  # a link may break while both peers live
                self.loop.call_later(self.targets.pause(peer.route, self.loop.now()), self.links.ensure_link, peer)

    def dial_failed(self, peer: Contact, why: str) -> None:
        """A peer could not be reached at its address."""
        if not peer.gone:
            self.detector.on_dial_failed(peer, why)

    def contested(self, peer: Contact) -> None:
        """Somebody at another address claims to be a known peer: probe the known one."""
        self.detector.probe(peer)

    def start_over(self) -> None:
        """Neither silence from before now nor the list proves anything: probe, and compare lists."""
        self.delivery.start_over()
        for peer in self.detector.start_over():
            self.gossip.sync(peer)

    def on_slept(self, seconds: float) -> None:
        """The machine slept: its clock stood still for so long."""
        self.delivery.on_slept(seconds)
        self.recall.on_slept(seconds)

    def check_server(self) -> None:
        """Peers fell silent, or we slept: see at once whether the server still answers."""
        self.discovery.check(self.settings.timeout)

    def on_server_failed(self) -> None:
        """The server can't be reached."""
        self.finder.on_server_failed()

    def on_address_lost(self, own: List[str]) -> None:
        """The machine has other addresses now: nothing comes through connections from the old ones any more."""
        for connection in [self.discovery.connection, *(link.connection for link in self.links.all)]:
            if connection.state == OPEN and connection.local[0] not in own:
                connection.abort("our address is another now")

    # -- changes ---------------------------------------------------------------------------------------

    def publish(self, changes: List[Change]) -> None:
        """The list has changed: clean up behind those that left, and tell the listeners."""
        for change in changes:
            peer = change.peer
            detail = change.reason or (f"formerly {change.old['id']}" if change.kind == RENAMED else "")
            detail = f" ({detail})" if detail else ""
            limited_log(change.kind, logging.INFO, "[P2P] %s: %s%s", change.kind, peer.id, detail)
            if change.kind == GONE:
                self.detector.drop_suspicion(peer)
                self.links.drop(peer, change.reason)
                self.delivery.on_lost(peer, change.reason)
            elif change.kind == JOINED and peer.link is not None and not peer.link.is_resumed:
                self.delivery.resume(peer, peer.link)  # it was thought gone when it was linked
            self.emit(change_event(change))
            if change.kind == GONE:
                self.maybe_depart()

    def remove_dead_peer(self, peer: Contact, status: str, reason: str) -> None:
        """Make a peer a tombstone, and spread that."""
        changes = self.peers.remove(peer, status, reason, self.loop.now())
        self.publish(changes)
        if changes:
            self.spread(peer, status)

    def handle_unregister(self, link: Link, message: Message) -> None:
        """The far end says that it leaves."""
        assert link.peer is not None
        peer = link.peer
        peer.last_words = check_note(message["content"]) if type(message["content"]) is str else ""
        peer.has_ended = True
        link.connection.close("it left")
        if any(each.peer is peer and each.connection.state == OPEN for each in self.links.all):
            self.loop.call_later(GOODBYE_TIME, self.remove_dead_peer, peer, LEFT, "left")  # it says goodbye there, too
        else:
            self.remove_dead_peer(peer, LEFT, "left")

    def spread(self, peer: Contact, status: str) -> None:
        """Pass on what has become of a peer (oneself included)."""
        self.news.add(peer, status, len(self.peers))
        self.gossip.tell_soon()


# ======================================================================================================
# History
#
# What was said, kept in a file for the next start: only where --history names one. A History listens to a node,
# gathers what it hears, and writes it in batches, by the loop's timer. Nothing here waits: a file that another
# program is just reading is written a little later. Whatever else goes wrong, the user is told once, nothing is
# kept from then on, and the chat goes on. No file is ever destroyed: one that is not ours is left alone, and a
# damaged one gets another name. What is read is cleaned like what comes from the network: a file can be changed.
# ======================================================================================================

HISTORY_ID = 0x70327063  # "p2pc", as SQLite's application_id: by that a file is known to be a history
HISTORY_VERSION = 1  # of the tables, as SQLite's user_version; a file with a higher one is left alone
WRITE_INTERVAL = 0.1  # between two batches: kill -9 loses no more than that
WRITE_INTERVAL_MAX = 6.4  # the same where each commit is slow; doubled each time
SLOW_COMMIT = 0.05  # a commit that takes longer makes the next ones rarer: nothing else happens meanwhile
WRITE_PORTION = 1000  # messages of a batch: some 20 ms of work
WRITE_SIZE = 1024 * 1024  # characters of a batch, of about the same cost
MAX_UNWRITTEN = 32 * 1024 * 1024  # characters of what waits while another program has the file; the oldest is dropped
MESSAGE_OVERHEAD = 200  # characters that a message counts beside its text
MAX_HISTORY = 256 * 1024 * 1024  # bytes in use in the file: 1.5 million usual messages; then the oldest are deleted
MAX_ENTERED = 500  # lines that the user entered, in all conversations
SEARCH_TIME = 0.015  # of one turn
HISTORY_PAGE = 200  # messages read at a time
HISTORY_END = sys.maxsize  # a row behind the last one
PAGE_SIZE = 256 * 1024  # characters of them: what a scrollback has room for 16 times
LAST_TIME = 253402300799.0  # 9999: what a file says of time is held within what can be shown
_LOCKED_BYTE = 0x40000000 + 4096  # is locked while a History has the file: far behind the bytes that SQLite locks
ACTION = "/me "  # begins a text that says what its sender does

_TABLES = (
    "CREATE TABLE IF NOT EXISTS messages (row INTEGER PRIMARY KEY, id TEXT UNIQUE, time REAL NOT NULL, "
    "conversation TEXT NOT NULL, sender TEXT NOT NULL, own INTEGER NOT NULL, told_by TEXT NOT NULL, "
    "text TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS conversations ON messages (conversation)",
    "CREATE TABLE IF NOT EXISTS entered (row INTEGER PRIMARY KEY, conversation TEXT NOT NULL, text TEXT NOT NULL)")


class Said(NamedTuple):
    """A message in the history."""

    row: int  # rises from message to message
    id: str
    time: float  # Unix time at which it came or was sent
    conversation: str  # EVERYONE, a channel, or the name of the other user: ids do not last
    sender: str  # a name
    own: bool
    told_by: str  # name of the peer that told of it, if it did not come from its sender
    text: str


_COLUMNS = ", ".join(Said._fields)


def conversation_of(key: str) -> str:
    """Return the name under which the history has a conversation: a peer's id does not last, its user's name does."""
    return key if key == EVERYONE or is_channel(key) else (split_id(key) or (key,))[0]


def said_from(values: Sequence[Any]) -> Said:
    """Return a message from what a file says, whatever that is."""
    row, message_id, when, conversation, sender, own, told_by, text = values
    seconds = when if type(when) is float and 0 <= when <= LAST_TIME else 0.0
    names = (clean(str(each)) for each in (conversation, sender, told_by))
    conversation, sender, told_by = names
    return Said(row, str(message_id or ""), seconds, conversation, sender, bool(own), told_by,
                clean(str(text), newlines=True))


def check_history_file(header: bytes) -> None:
    """Check the first 100 bytes of a file. Raises ValueError, with words, if it can't be a history that we know."""
    if header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:72], "big") != HISTORY_ID:
        raise ValueError("it is another program's file")
    if int.from_bytes(header[60:64], "big") > HISTORY_VERSION:
        raise ValueError("a newer version of p2pchat wrote it")


def open_history_file(path: str, create: bool) -> Tuple[int, bool]:
    """Open a file, check that it is a history, or empty; return its descriptor, and whether it is empty.

    Raises OSError, and ValueError with words."""
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no ordinary file")
        header = os.read(descriptor, 100)
        if header:
            check_history_file(header)
    except Exception:
        os.close(descriptor)
        raise
    return descriptor, not header


def lock_history_file(descriptor: int) -> None:
    """Lock a file for as long as this descriptor is open. Raises ValueError if somebody else has done so.

    SQLite's own locks come and go with each commit, so that others can read meanwhile; and it drops every usual lock
    of this process. So this one belongs to the open file (F_OFD_SETLK). A system without those has no lock here."""
    try:
        if sys.platform == "win32":
            import msvcrt
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        elif sys.platform in ("linux", "darwin"):
            import fcntl
            import struct
            if sys.platform == "linux":
                fcntl.fcntl(descriptor, 37, struct.pack("hhqqq", fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0))
            else:
                fcntl.fcntl(descriptor, 90, struct.pack("qqihh", _LOCKED_BYTE, 1, 0, fcntl.F_WRLCK, os.SEEK_SET))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, getattr(errno, "EDEADLOCK", errno.EAGAIN)):
            raise ValueError("another chat keeps its history there") from None
        log.info("[P2P] the history can't be locked: %s", error_text(error))  # an old system


def free_name(path: str) -> str:
    """Return a name for a damaged file that no other file has."""
    numbers = (f"{path}.damaged-{number}" for number in itertools.count(1))
    return next(name for name in numbers if not os.path.lexists(name) and not os.path.lexists(f"{name}-journal"))


class HistoryReader:
    """Reads the file of a history, which another process may write meanwhile. Raises what SQLite does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._database: Any = None  # while the file is open

    def connect(self, **how: Any) -> None:
        """Open the file with SQLite. Raises ImportError, and the module's errors."""
        import sqlite3
        self._database = sqlite3.connect(os.path.abspath(self.path), isolation_level=None, **how)
        self._database.text_factory = lambda data: data.decode("utf-8", "replace")

    def rows(self, query: str, *values: Any) -> List[Any]:
        """Return the rows of a query."""
        return list(self._database.execute(query, values))

    def before(self, row: int, conversation: Optional[str], count: int = HISTORY_PAGE) -> List[Said]:
        """Return the messages of a conversation, or of all, above a row: so many, oldest first."""
        return self._page("row < ?", row, conversation, "DESC", count)[::-1]

    def since(self, row: int, conversation: Optional[str], count: int = HISTORY_PAGE) -> List[Said]:
        """Return the messages from a row on, oldest first."""
        return self._page("row >= ?", row, conversation, "ASC", count)

    def _page(self, where: str, row: int, conversation: Optional[str], order: str, count: int) -> List[Said]:
        page = self._select(where, row, conversation, order, count)
        sizes = itertools.accumulate(len(message.text) for message in page)
        return page[:max(1, sum(size <= PAGE_SIZE for size in sizes))]

    def _select(self, where: str, row: int, conversation: Optional[str], order: str, count: int) -> List[Said]:
        """Return messages of a conversation; None stands for all."""
        only, values = ("", ()) if conversation is None else ("conversation = ? AND ", (conversation,))
        if conversation == EVERYONE and "holds" in where:
            only = f"+{only}"  # without the index, which is a detour if most messages are wanted
        query = f"SELECT {_COLUMNS} FROM messages WHERE {only}{where} ORDER BY row {order} LIMIT ?"
        return [said_from(each) for each in self.rows(query, *values, row, count)]


class History(HistoryReader):
    """What was said, and the lines that the user entered, in a file. open() before anything else.

    It reads nothing if the file can't be read; the user is told of that."""

    def __init__(self, loop: Loop, path: str) -> None:
        super().__init__(path)
        self._loop = loop
        self._sqlite3: Any = None  # the module
        self._descriptor = -1  # of the file, for its lock
        self._unwritten: Deque[Said] = collections.deque()
        self._size = 0  # characters of that
        self._entered: List[Tuple[str, str]] = []  # lines that are not written yet, each with its conversation
        self._interval = WRITE_INTERVAL
        self._timer = Timer()  # of the next batch
        self._search = Timer()  # of the next portion of a search
        self._has_set_aside = self._has_dropped = False

    @property
    def is_open(self) -> bool:
        return self._database is not None

    def open(self) -> None:
        """Open the file, or begin it. If that can't be done, the user is told, and nothing is kept."""
        try:
            import sqlite3
            self._sqlite3 = sqlite3
        except ImportError:
            self._give_up("this Python has no sqlite3")
            return
        try:
            self._descriptor, is_new = open_history_file(self.path, create=True)
            lock_history_file(self._descriptor)
            if is_new and os.name == "posix":
                os.fchmod(self._descriptor, 0o600)
            self.connect(timeout=0)
            self._prepare()
        except OSError as error:
            self._give_up(error_text(error))
        except ValueError as error:
            self._give_up(str(error))
        except sqlite3.Error as error:
            self._on_error(error, is_opening=True)

    def _prepare(self) -> None:
        """Make the tables, if they are missing. The file is written in any case: that shows whether it can be."""
        for pragma in ("journal_mode = DELETE", "synchronous = OFF", "temp_store = MEMORY"):  # WAL fails on NFS
            self._database.execute(f"PRAGMA {pragma}").fetchall()
        steps = (f"PRAGMA application_id = {HISTORY_ID}", f"PRAGMA user_version = {HISTORY_VERSION}", *_TABLES)
        for step in ("BEGIN IMMEDIATE", *steps, "COMMIT"):
            self._database.execute(step)

    def close(self) -> int:
        """Write what waits, and let go of the file; return how many messages could not be written."""
        if self.is_open:
            self._database.execute("PRAGMA busy_timeout = 1000")
        waiting = -1
        while waiting != len(self._unwritten):
            waiting = len(self._unwritten)
            self.write()
        self._let_go()
        return waiting

    def _let_go(self) -> None:
        """Close the file. Only then its descriptor: closing that drops every lock that this process has on the file."""
        self._timer.cancel()
        database, self._database = self._database, None
        if database is not None:
            database.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _give_up(self, why: str) -> None:
        """Go on without, and say why."""
        self._let_go()
        self._unwritten.clear()
        log.critical("No history is kept: %s: %s", clean(self.path), clean(why))

    # -- in --------------------------------------------------------------------------------------------

    def listen(self, node: PeerNode, ignored: Container[str]) -> None:
        """Keep what is said at a node, but not by peers whose ids are ignored: they were not shown either.

        What is shown comes first: then a window that opens for a message reads here only what was said before."""
        node.listeners.append(functools.partial(self._on_events, node.me, ignored))

    def _on_events(self, me: Peer, ignored: Container[str], events: List[Event]) -> None:
        if not self.is_open:
            return
        for event in events:
            kind = event["event"]
            if kind == "sent":
                self._keep(event, conversation_of(event["to"]), me.username, own=True)
            elif kind in ("chat", "told") and event["from"]["id"] not in ignored and not (
                    kind == "told" and event["told_by"]["id"] in ignored):
                to, sender = event["to"], event["from"]["username"]
                self._keep(event, to if to == EVERYONE or is_channel(to) else sender, sender)

    def _keep(self, event: Event, conversation: str, sender: str, own: bool = False) -> None:
        told_by = event["told_by"]["username"] if "told_by" in event else ""
        when = self._loop.wall() - event.get("age", 0.0)
        self._unwritten.append(Said(0, event["id"], when, conversation, sender, own, told_by, event["text"]))
        self._size += len(event["text"]) + MESSAGE_OVERHEAD
        while self._size > MAX_UNWRITTEN:
            self._size -= len(self._unwritten.popleft().text) + MESSAGE_OVERHEAD
            if not self._has_dropped:
                self._has_dropped = True
                log.critical("The history %s could not be written for long: some messages are missing there",
                             clean(self.path))
        self._write_later(self._interval)

    def keep_entered(self, conversation: str, text: str) -> None:
        """Keep a line that the user entered, but not what begins like /passphrase: the passphrase may follow."""
        start = clean(text).lstrip()[:5].lower()
        if self.is_open and start not in ("", "/pass") and len(text) <= MAX_TEXT:
            self._entered = [*self._entered[1 - MAX_ENTERED:], (conversation, text)]
            self._write_later(self._interval)

    def _write_later(self, delay: float) -> None:
        if not self._timer.active and self.is_open:
            self._timer = self._loop.call_later(delay, self.write)

    def write(self) -> None:
        """Write a batch of what waits, and see to the rest later."""
        self._timer.cancel()
        if not self.is_open or not (self._unwritten or self._entered):
            return
        batch: List[Said] = []
        size = 0
        for message in self._unwritten:
            if len(batch) == WRITE_PORTION or size > WRITE_SIZE:
                break
            batch.append(message)
            size += len(message.text)
        started = self._loop.now()
        try:
            self._commit(batch)
        except self._sqlite3.Error as error:
            self._on_error(error)
            return
        for message in batch:
            self._unwritten.popleft()
            self._size -= len(message.text) + MESSAGE_OVERHEAD
        self._entered = []
        is_slow = self._pace(self._loop.now() - started)
        if self._unwritten:
            self._write_later(self._interval if is_slow else 0.0)

    def _commit(self, batch: List[Said]) -> None:
        """Write messages, and the lines entered, in one transaction. If it raises, nothing was written."""
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        for message in batch:
            self._insert(message)
        for line in self._entered:
            execute("INSERT INTO entered (conversation, text) VALUES (?, ?)", line)
        if self._entered:
            execute("DELETE FROM entered WHERE row <= (SELECT max(row) FROM entered) - ?", (MAX_ENTERED,))
        (pages,), (free,), (size,) = (execute(f"PRAGMA {what}").fetchone()
                                      for what in ("page_count", "freelist_count", "page_size"))
        if (pages - free) * size > MAX_HISTORY:
            oldest = "SELECT row FROM messages ORDER BY row LIMIT ?"
            execute(f"DELETE FROM messages WHERE row IN ({oldest})", (2 * len(batch) + 64,))
        execute("COMMIT")

    def _insert(self, message: Said) -> None:
        """Put a message in. What is only told yields to what came from its sender, and is put in if it is not known.

        A sender that uses an id twice gains nothing by that: such a message is kept without its id."""
        execute, values = self._database.execute, message[2:]
        into = f"INTO messages ({', '.join(Said._fields[1:])}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        if not message.told_by:
            execute("DELETE FROM messages WHERE id = ? AND told_by != ''", (message.id,))
        is_known = not execute(f"INSERT OR IGNORE {into}", (message.id, *values)).rowcount
        if is_known and not message.told_by:
            execute(f"INSERT {into}", (None, *values))

    def _pace(self, took: float) -> bool:
        """Make commits rarer if the last one was slow; return whether it was."""
        is_slow = took > SLOW_COMMIT
        if is_slow:
            self._interval = min(2 * self._interval, WRITE_INTERVAL_MAX)
            limited_log("history", logging.WARNING, "[P2P] writing %d ms to the history: now every %.1f s",
                        1000 * took, self._interval)
        elif took < SLOW_COMMIT / 4:
            self._interval = max(self._interval / 2, WRITE_INTERVAL)
        return is_slow

    def _on_error(self, error: Exception, is_opening: bool = False) -> None:
        """The file could not be written or read: try again, set it aside, or go on without."""
        text = str(error)
        if self.is_open and self._database.in_transaction:
            self._database.rollback()  # on a full disk SQLite has done that itself
        if "locked" in text and not is_opening:
            self._write_later(max(5 * WRITE_INTERVAL, self._interval))  # another program reads or writes it just now
        elif type(error) is self._sqlite3.DatabaseError or text.startswith("no such"):
            self._set_aside(text)
        else:
            self._give_up("another program has it open" if "locked" in text else text)

    def _set_aside(self, why: str) -> None:
        """The file is damaged: give it another name, and begin a new one, once. Its journal goes along, to mend it."""
        if self._has_set_aside:
            self._give_up(why)
            return
        self._has_set_aside, name = True, free_name(self.path)
        self._let_go()
        try:
            if os.path.lexists(f"{self.path}-journal"):
                os.rename(f"{self.path}-journal", f"{name}-journal")
            os.rename(self.path, name)
        except OSError as error:
            self._give_up(f"it is damaged ({why}), and can't be renamed: {error_text(error)}")
            return
        log.critical("The history %s is damaged (%s): it is now %s, and a new one begins", clean(self.path), why,
                     clean(name))
        self.open()
        self._write_later(self._interval)

    # -- out -------------------------------------------------------------------------------------------

    def rows(self, query: str, *values: Any) -> List[Any]:
        """Return the rows of a query, once what waits is written; none if the file can't be read."""
        self.write()
        if not self.is_open:
            return []
        try:
            return super().rows(query, *values)
        except self._sqlite3.Error as error:
            self._on_error(error)
            return []

    def entered(self, conversation: str) -> List[str]:
        """Return the lines that the user entered in a conversation, oldest first."""
        query = "SELECT text FROM entered WHERE conversation = ? ORDER BY row DESC LIMIT ?"
        rows = self.rows(query, conversation, MAX_ENTERED)
        lines = (clean(str(text), newlines=True) for (text,) in reversed(rows))
        return [line for line, _ in itertools.groupby(lines)]  # what was entered twice is there once

    def knows(self, message_id: str) -> bool:
        """Whether it has a message."""
        return self.is_open and self.row_of(message_id) is not None

    def row_of(self, message_id: str) -> Optional[int]:
        """Return the row of a message."""
        rows = self.rows("SELECT row FROM messages WHERE id = ?", message_id)
        return rows[0][0] if rows else None

    def find(self, wanted: str, conversation: Optional[str], before: int, count: int,
             then: Callable[[List[Said]], None]) -> None:
        """Look for a text in the messages above a row, newest first, and hand over so many that hold it.

        That is in a later turn: each one has SEARCH_TIME for it. Another search ends it."""
        self._search.cancel()
        self._search = self._loop.call_later(0, self._look, wanted.casefold(), conversation, before, count, [], then)

    def _look(self, wanted: str, conversation: Optional[str], before: int, count: int, found: List[Said],
              then: Callable[[List[Said]], None]) -> None:
        """Look through as many messages as there is time for."""
        until, stopped_at = self._loop.now() + SEARCH_TIME, 0

        def is_late(row: int) -> bool:
            """Whether there is no time left; then the search stops at this row."""
            nonlocal stopped_at
            if not stopped_at and self._loop.now() >= until:
                stopped_at = row
            return stopped_at > 0

        if self.is_open:
            self._database.create_function("is_late", 1, is_late)
            self._database.create_function("holds", 2, lambda sender, text: wanted in f"{sender}: {text}".casefold())
        where = "row < ? AND (random() & 63 = 0 AND is_late(row) OR holds(sender, text))"  # now and then, to save time
        seen = self._select(where, before, conversation, "DESC", count - len(found))
        found = found + [message for message in seen if message.row > stopped_at]
        if stopped_at and len(found) < count and self.is_open:
            self._search = self._loop.call_later(0, self._look, wanted, conversation, stopped_at + 1, count, found,
                                                 then)
        else:
            then(found)


# ======================================================================================================
# Chat view
#
# The model behind all three interfaces. ChatView stands at the end of the section and holds the parts:
# Windows, each a conversation with its scrollback and its input line; People and Outgoing, what is kept of
# other peers and of the user's own messages; Narrator, which shows what happened at the node; Commands and
# Keyboard, which do what the user says. The tables of commands and of keys are help, completion and the
# README's tables at once. Where there is no screen, a Transcript takes the place of all scrollbacks, and a
# window only says where a typed text goes.
#
# One rule says in which window something stands. What is said stands in the window of its conversation. That
# somebody came, went or took another name stands in those of the conversations that this peer is in. All the
# rest, which is answers, errors and notices, stands in the window at hand.
#
# render(view, rows, cols) draws the view as lines of styled spans: a pure function, for every size. Nothing
# here knows curses, sockets or a clock, and every text that comes in is clean already.
# ======================================================================================================

MAX_UNDO = 100  # changes of the input line that can be taken back: 1.6 MB, if each line is the longest
MAX_ENTRIES = 5000  # in a scrollback; with texts of the usual length some 3 MiB
MAX_SCROLLBACK = 4 * 1024 * 1024  # characters of all entries: 250 of the longest texts, which /search reads in 30 ms
DRAW_PORTION = 48 * 1024  # characters wrapped for one drawing, those beyond ASCII counted threefold: some 30 ms
MAX_WINDOWS = 50  # that are open: strangers open them, too, each by a private message
MAX_HELD = 3 * MAX_SCROLLBACK  # characters in all windows together, with ENTRY_SIZE for each entry: 20 to 50 MiB
ENTRY_SIZE = 200  # what an entry without its text counts as
LAST_LINES = 50  # of the history that a window begins with
FOUND_LINES = 10  # that /search prints, where there is no screen
MAX_DRAWN = 50_000  # rows kept as they were drawn: more than the largest screen and the longest texts on it have
MAX_DELIVERIES = 3000  # awaited at a time while lines are piped in: one acknowledgement may end them all, in one turn
MAX_SENDING = 1024 * 1024  # bytes of the texts under way meanwhile, on the wire: a quarter of a receiver's outbox
GATHER_TIME = 60.0  # seconds within which joins, or leaves, that follow each other share a line
GATHER_NAMES = 5  # names in such a line; the other peers are counted
LATELY = 1800.0  # seconds: of a peer that spoke within them, /quiet shows joins and leaves
BELL_INTERVAL = 3.0  # seconds between two rings
ASK_LINES = 20  # a message of more lines is sent only when Enter is pressed twice
SIDE_COLS = 60  # a narrower screen has no list of peers
FRESH_TIME = 60.0  # seconds that a peer is marked as new, or until the next key
TIME_COLS = 32  # a narrower screen shows no times
NICK_STYLES = 8  # colours of names: the styles nick0 to nick7
BAR_NAME = 16  # columns that the status bar has for the name of a window
PROMPT = "> "
CHAT_KINDS = ("chat", "action")  # kinds of entries that somebody said


class Span(NamedTuple):
    """A piece of a line in one style. Styles are words; what they look like is the terminal's business."""

    text: str
    style: str = ""


Line = List[Span]
_MARKS = {"error": Span("! ", "error"), "joined": Span("+ ", "dim")}  # before what nobody said; else "- "
EntryRow = Tuple[Tuple[Span, ...], str, str]  # of an entry: what stands before a text, the text, its style
Place = Tuple[int, int]  # in a scrollback: the seq of an entry, and one of its rows
Clock = Callable[[float], str]  # turns Unix time into what is shown


class Layout(NamedTuple):
    """How many rows each part of the screen has, and how many columns the messages and the list of peers have."""

    bar: int
    height: int  # of the messages: 1 even if there is no room for them
    rule: int
    input: int
    cols: int  # of the messages
    side: int  # with its border


class Screen(NamedTuple):
    """What a screen of a given size shows. `cursor` is (row, column)."""

    lines: List[Line]
    cursor: Tuple[int, int]
    is_complete: bool = True  # else some texts are missing, and the next drawing has more


class LineEditor:
    """A line that is being written, its history, and what was cut from it.

    The line is held in two parts, left and right of the cursor. A secret one is shown as dots."""

    def __init__(self, text: str = "", is_secret: bool = False) -> None:
        self.left, self.right = text, ""
        self.is_secret = is_secret
        self._history: List[str] = []
        self._at = 0  # index in the history; its length stands for the line that is being written
        self._draft = ""  # that line, while the history is shown
        self.was_cut = ""  # by cut(), for Ctrl-Y
        self._doing = ""  # what the last key did and the next one may go on with: "cutting", "typing", "last word"
        self._former: List[Tuple[str, str]] = []  # both parts before each change, for undo()
        self._last_word: Tuple[int, str] = (0, "")  # where in the history the inserted word stands, and the word

    @property
    def text(self) -> str:
        return self.left + self.right

    @property
    def shown(self) -> Tuple[str, str]:
        """What is drawn left and right of the cursor."""
        if not self.is_secret:
            return self.left, self.right
        return "●" * len(graphemes(self.left)), "●" * len(graphemes(self.right))

    def set(self, text: str) -> None:
        """Replace the line, and put the cursor at its end."""
        self.change(text, "")

    def insert(self, text: str) -> None:
        """Insert a text at the cursor. A word that is typed is one step for undo()."""
        goes_on = self._doing == "typing" and not text.isspace()
        self.change(self.left + text, self.right, "typing", goes_on)

    def move(self, left: int) -> None:
        """Put the cursor so many characters from the beginning."""
        self.left, self.right, self._doing = self.text[:left], self.text[left:], ""

    def change(self, left: str, right: str, doing: str = "", goes_on: bool = False) -> None:
        """Replace both parts, and keep the former ones for undo() unless this goes on with the change before."""
        if not goes_on and left + right != self.text:
            self._former = [*self._former[1 - MAX_UNDO:], (self.left, self.right)]
        self.left, self.right, self._doing = left, right, doing

    def undo(self) -> None:
        if self._former:
            self.left, self.right = self._former.pop()
        self._doing = ""

    def before(self) -> int:
        """Where the character left of the cursor begins: what a reader takes for one character."""
        return len(self.left) - len((graphemes(self.left[-64:]) or [""])[-1])

    def behind(self) -> int:
        """Where the character right of the cursor ends."""
        return len(self.left) + len((graphemes(self.right[:64]) or [""])[0])

    def word_before(self) -> int:
        """Where the word left of the cursor begins."""
        return len(self.left) - _first_word(self.left[::-1])

    def word_behind(self) -> int:
        """Where the word right of the cursor ends."""
        return len(self.left) + _first_word(self.right)

    def blank_before(self) -> int:
        """Where the word left of the cursor begins, if only blanks separate words."""
        words = self.left.rstrip()
        return next((at + 1 for at in range(len(words) - 1, -1, -1) if words[at].isspace()), 0)

    def delete(self, where: int) -> str:
        """Delete what stands between the cursor and an index; return it."""
        text, (start, end) = self.text, sorted((where, len(self.left)))
        self.change(text[:start], text[end:])
        return text[start:end]

    def cut(self, where: int) -> None:
        """Delete, and keep it in `was_cut`; pieces that are cut one after the other are kept as one."""
        backwards, is_cutting = where < len(self.left), self._doing == "cutting"
        gone = self.delete(where)
        if is_cutting:
            gone = gone + self.was_cut if backwards else self.was_cut + gone
        if gone:
            self.was_cut, self._doing = gone, "cutting"

    def remember(self, lines: List[str]) -> None:
        """Begin with a history."""
        self._history = lines + self._history
        self._at = len(self._history)

    def enter(self) -> str:
        """Return the line, add it to the history, and begin an empty one."""
        text = self.text
        if text.strip() and self._history[-1:] != [text]:
            self._history = self._history[-499:] + [text]
        self._at = len(self._history)
        self.set("")
        self._former.clear()
        return text

    def recall(self, step: int) -> None:
        """Show another line of the history; the one that is being written waits at its end."""
        if self._at == len(self._history):
            self._draft = self.text
        at = self._at + step
        if 0 <= at <= len(self._history):
            self._at = at
            self.set((self._history + [self._draft])[at])

    def transpose(self) -> None:
        """Exchange the characters on both sides of the cursor, or the last two."""
        middle = self.before() if not self.right else len(self.left)
        left, right = self.text[:middle], self.text[middle:]
        first, second = (graphemes(left[-64:]) or [""])[-1], (graphemes(right[:64]) or [""])[0]
        if first and second:
            self.change(left[:len(left) - len(first)] + second + first, right[len(second):])

    def convert(self, change: Callable[[str], str]) -> None:
        """Change the rest of the word right of the cursor, and go behind it."""
        end = self.word_behind() - len(self.left)
        self.change(self.left + change(self.right[:end]), self.right[end:])

    def insert_last_word(self) -> None:
        """Insert the last word of the line entered before; again: in its place that of the line before that one."""
        goes_on = self._doing == "last word"
        at, word = self._last_word if goes_on else (len(self._history), "")
        if at > 0:
            found = (self._history[at - 1].split() or [""])[-1]
            self._last_word = (at - 1, found)
            self.change(self.left[:len(self.left) - len(word)] + found, self.right, "last word", goes_on)

    def find(self, wanted: str, before: Optional[int] = None) -> Optional[int]:
        """Show the last line of the history that holds a text, above index `before`; return its index."""
        for at in range((len(self._history) if before is None else before) - 1, -1, -1):
            if wanted.casefold() in self._history[at].casefold():
                self.set(self._history[at])
                return at
        return None


def _first_word(text: str) -> int:
    """Where the first word of a text ends."""
    at = 0
    while at < len(text) and not text[at].isalnum():
        at += 1
    while at < len(text) and (text[at].isalnum() or unicodedata.category(text[at])[0] == "M" or text[at] in _JOINERS):
        at += 1
    return at


def wire_size(text: str) -> int:
    """Return about the most bytes of a text in a message: beyond ASCII a character is one escape, or two.

    A quote, a backslash and a line break have two bytes, and count as one: the bounds have room for that."""
    return len(text) if text.isascii() else 12 * len(text)


class Receipts:
    """What became of an own message at each of its receivers."""

    __slots__ = ("text", "size", "seq", "window", "outcomes", "waiting", "failed", "kept")

    def __init__(self, text: str, receivers: Iterable[str]) -> None:
        self.text = text
        self.size = wire_size(text)
        self.seq = -1  # of its entry, if there is a scrollback
        self.window: Optional["Window"] = None  # which holds that entry
        self.outcomes: Dict[str, Optional[str]] = dict.fromkeys(receivers)  # None under way, "" delivered, else why not
        self.waiting = len(self.outcomes)  # receivers with no outcome yet
        self.failed = 0  # receivers that do not get it
        self.kept = 0  # those of them for whose return it waits

    def forget_delivered(self) -> None:
        """Keep only the failures, which are shown for good."""
        self.outcomes = {each: outcome for each, outcome in self.outcomes.items() if outcome} if self.failed else {}

    def failures(self, label: Callable[[str], str]) -> List[str]:
        """Return lines that say whom it was not delivered to, one for each reason."""
        by_reason: Dict[str, List[str]] = {}
        for peer_id, outcome in self.outcomes.items():
            if outcome:
                by_reason.setdefault(outcome, []).append(label(peer_id))
        return [f"✗ not delivered to {', '.join(names)} {reason}" for reason, names in by_reason.items()]


class Outgoing:
    """The user's own messages: those under way, those that wait for somebody's return, and the last one."""

    def __init__(self) -> None:
        self.under_way: Dict[str, Receipts] = {}  # by message id
        self.last: Optional[Receipts] = None
        self._kept: Dict[str, Receipts] = {}  # by message id
        self._deliveries = 0  # awaited
        self._size = 0  # bytes of the texts under way, on the wire

    @property
    def is_full(self) -> bool:
        """Whether so much is under way that input from a pipe or a file has to wait."""
        return self._deliveries >= MAX_DELIVERIES or self._size >= MAX_SENDING

    def add(self, message_id: str, text: str, receivers: List[str]) -> Receipts:
        if self.last is not None and not self.last.waiting:
            self.last.forget_delivered()
        receipts = self.last = Receipts(text, receivers)
        if receipts.waiting:
            self.under_way[message_id] = receipts
            self._deliveries += receipts.waiting
            self._size += receipts.size
        return receipts

    def settle(self, message_id: str, peer_id: str, outcome: str, is_kept: bool = False) -> Optional[Receipts]:
        """Note what became of a message at one receiver; return its receipts, if they were still awaited."""
        receipts = self.under_way.get(message_id) or self._kept.get(message_id)
        if receipts is None:
            return None
        before = receipts.outcomes.get(peer_id, "")
        if before is None:
            receipts.waiting -= 1
            self._deliveries -= 1
        receipts.outcomes[peer_id] = outcome
        if outcome or before:
            self._count_failure(message_id, receipts, outcome, before or "", is_kept)
        if not receipts.waiting and self.under_way.pop(message_id, None) is not None:
            self._size -= receipts.size
            if receipts is not self.last:  # /info tells all about the last one
                receipts.forget_delivered()
        return receipts

    def _count_failure(self, message_id: str, receipts: Receipts, outcome: str, before: str, is_kept: bool) -> None:
        receipts.failed += bool(outcome) - bool(before)
        receipts.kept += is_kept - bool(before)  # what fails for good is reported once, and not awaited any more
        if receipts.kept > 0:
            self._kept[message_id] = receipts
        else:
            self._kept.pop(message_id, None)


@functools.lru_cache(maxsize=1024)
def head(kind: str, sender: str, to: str) -> Tuple[Span, ...]:
    """Return what stands before a text: the labels of sender and only receiver, or a mark if nobody said it."""
    if kind not in CHAT_KINDS:
        return (_MARKS.get(kind, Span("- ", "dim")),)
    aside = (Span(" → ", "private"), Span(to, nick_style(to))) if to else ()
    before, behind = ("* ", " ") if kind == "action" else ("", ": ")
    return (Span(before, "dim"), Span(sender, nick_style(sender)), *aside, Span(behind))


@functools.lru_cache(maxsize=1024)
def head_text(kind: str, sender: str, to: str) -> str:
    """Return the same without styles."""
    return "".join(span.text for span in head(kind, sender, to))


def nick_style(label: str) -> str:
    """Return the style of a label: each name has a colour of its own."""
    return f"nick{hash64(label.partition('@')[0]) % NICK_STYLES}"


class Entry:
    """One message or notice of the scrollback."""

    __slots__ = ("seq", "added_at", "kind", "sender", "to", "text", "style", "id", "called", "members", "receipts")

    def __init__(self, seq: int, now: float, kind: str, text: str, style: str, sender: str, to: str) -> None:
        self.seq = seq  # consecutive: its index in the scrollback is seq minus the seq of the first entry
        self.added_at = now  # Unix time
        self.kind = kind  # one of CHAT_KINDS; or notice, answer, error, joined, left, gone, date, blank
        self.sender = sender  # label; empty for what nobody said
        self.to = to  # label of the only receiver; empty for everyone
        self.text = text
        self.style = style
        self.id = ""  # of a message
        self.called = ""  # the user's name, if it stands in the text
        self.members: List[Tuple[str, str]] = []  # ids of those who joined, left or are gone, each with the reason
        self.receipts: Optional[Receipts] = None  # of an own message


def _rule(text: str, cols: int) -> str:
    """Return a line across the messages that says something."""
    return f"─── {text} " + "─" * (cols - 5 - width(text))


def _fit_labels(spans: Tuple[Span, ...], cols: int) -> Tuple[Span, ...]:
    """Cut the labels before a text, and nothing else, to the width of a row."""
    labels = [span for span in spans if span.style.startswith("nick")]
    others = sum(width(span.text) for span in spans if span not in labels)
    if others + sum(width(span.text) for span in labels) <= cols or not labels:
        return spans
    room = max(1, (cols - others) // len(labels))
    return tuple(Span(cut(text, room, "…"), style) if style.startswith("nick") else Span(text, style)
                 for text, style in spans)


def _marked(text: str, name: str) -> Tuple[Span, ...]:
    """Return a text as spans in which a name stands out."""
    parts = re.split(_word_pattern(f"({re.escape(name)})"), text, flags=re.IGNORECASE)
    return tuple(Span(part, "mention" if at % 2 else "") for at, part in enumerate(parts))


def _word_pattern(pattern: str) -> str:
    """Return what finds a pattern only as a word of its own."""
    return rf"(?<![^\W_]){pattern}(?![^\W_])"


class Scrollback:
    """The entries of one window, oldest first, and where the reader is in them.

    The anchor is the place of the lowest row on screen; it is None at the bottom. What is added below an anchor
    moves nothing of what is being read. Rows are kept as they were drawn, until their entry looks different."""

    def __init__(self, clock: Clock, day: Clock, label: Callable[[str], str]) -> None:
        self._clock = clock
        self._day = day
        self._label = label
        self.entries: List[Entry] = []
        self.next = 0  # seq of the next entry
        self._size = 0  # characters of all entries
        self._drawn: Dict[int, Tuple[Tuple[Any, ...], List[EntryRow]]] = {}  # by seq: the state that is shown, and rows
        self._drawn_rows = 0  # at most so many
        self.portion = DRAW_PORTION  # characters that may still be wrapped for this drawing; if none, texts are missing
        self.anchor: Optional[Place] = None
        self._left_at = -1  # seq of the newest entry when the reader scrolled away from the bottom
        self.unread: Optional[int] = None  # seq of the entry below which "new" is drawn
        self._is_missed = False  # that mark is where the focus was lost, and the reader has not seen it yet
        self.found: Optional[int] = None  # seq of the entry that the last search found
        self.gap: Optional[int] = None  # seq of the first entry below those that a search has brought from far above
        self.wanted = ""  # what the last search looked for

    def add(self, now: float, kind: str, text: str, style: str = "", sender: str = "", to: str = "") -> Entry:
        """Append an entry, below the date if it is another day; drop the oldest ones when there are too many."""
        if kind != "date" and self.entries and self._day(now) != self._day(self.entries[-1].added_at):
            self.pass_over(self.add(now, "date", self._day(now)))
        entry = Entry(self.next, now, kind, text, style, sender, to)
        self.next += 1
        self._size += len(text)
        self.entries.append(entry)
        if len(self.entries) > MAX_ENTRIES + 500 or self._size > MAX_SCROLLBACK:
            self._trim()
        return entry

    def insert(self, at: int, entries: Sequence[Entry]) -> None:
        """Put older entries in at an index. Those above it are renumbered, those below keep their seq.

        So whatever stands for an entry goes on standing for it. The marks of what is new stay above the same entry.
        Nothing is dropped for it: the next entry that is added sees to that."""
        count, border = len(entries), self.entries[at].seq if at < len(self.entries) else self.next
        above = [*self.entries[:at], *entries]
        for seq, entry in enumerate(above, border - len(above)):
            entry.seq = seq
            if entry.receipts is not None:
                entry.receipts.seq = seq
        self.entries[:at] = above
        self._size += sum(len(entry.text) for entry in entries)

        def renumbered(seq: int) -> int:
            return seq - count if seq < border else seq

        self._drawn = {renumbered(seq): drawn for seq, drawn in self._drawn.items()}
        if self.anchor is not None:
            self.anchor = (renumbered(self.anchor[0]), self.anchor[1])
        if self.found is not None:
            self.found = renumbered(self.found)
        if self.gap is not None:
            self.gap = renumbered(self.gap)
        self._left_at = renumbered(self._left_at + 1) - 1
        if self.unread is not None:
            self.unread = renumbered(self.unread + 1) - 1

    def insert_before_live(self, entries: Sequence[Entry]) -> None:
        """Put entries in above the first one that was added here, and below all that were put in so before."""
        first = self.entries[0].seq if self.entries else self.next
        self.insert(min(len(self.entries), max(0, -first)), entries)

    def insert_above(self, entries: Sequence[Entry], is_far: bool = False) -> None:
        """Put older entries in at the top, those of each day below its date; `is_far` if others come between."""
        dated, day = [], ""
        for entry in entries:
            if self._day(entry.added_at) != day:
                day = self._day(entry.added_at)
                dated.append(Entry(0, entry.added_at, "date", day, "", "", ""))
            dated.append(entry)
        if self.entries and self.entries[0].kind == "date" and (is_far or self.entries[0].text == day):
            self.drop(1)
        if self.entries and is_far:
            when = self.entries[0].added_at
            self.insert(0, [Entry(0, when, "date", f"{self._day(when)}; above, some is left out", "", "", "")])
            self.gap = self.entries[0].seq
        self.insert(0, dated)

    def close_gap(self) -> None:
        """Drop what a search has brought from far above."""
        if self.gap is not None and self.entries[0].seq <= self.gap:
            self.drop(self.gap - self.entries[0].seq)
            self.change(self.entries[0], self._day(self.entries[0].added_at))
        self.gap = None

    def change(self, entry: Entry, text: str) -> None:
        self._size += len(text) - len(entry.text)
        entry.text = text
        self._drawn.pop(entry.seq, None)

    def pass_over(self, entry: Entry) -> None:
        """Let the mark of what is new not stand directly above an entry: that one is the user's own."""
        if self.unread == entry.seq - 1:
            self.unread = entry.seq

    def clear(self, now: float, height: int) -> None:
        """Scroll all entries off a screen."""
        if self.entries and self.entries[-1].kind != "blank":
            self.add(now, "blank", "\n" * (height - 1))
        self.anchor = self.unread = self.found = None

    def _trim(self) -> None:
        """Drop the oldest entries, many at once: that is cheaper, and nobody is reading there."""
        drop = max(len(self.entries) - MAX_ENTRIES, 1)
        while self._size - sum(len(entry.text) for entry in self.entries[:drop]) > MAX_SCROLLBACK * 0.9:
            drop *= 2
        self.drop(drop)

    def drop(self, count: int) -> None:
        """Drop so many entries, the oldest ones."""
        for entry in self.entries[:count]:
            self._size -= len(entry.text)
            self._drawn.pop(entry.seq, None)
        del self.entries[:count]

    @property
    def held(self) -> int:
        """What it holds, in characters: an entry counts as some, too."""
        return self._size + ENTRY_SIZE * len(self.entries)

    # -- rows ------------------------------------------------------------------------------------------

    def rows(self, entry: Entry, cols: int) -> List[EntryRow]:
        """Return an entry as rows. Once enough was wrapped for this drawing, other entries come without their text."""
        receipts = entry.receipts
        style = "found" if entry.seq == self.found else "dim" if receipts and receipts.waiting else entry.style
        state = (cols, style, entry.seq - 1 == self.unread, (receipts.failed, receipts.kept) if receipts else None)
        known = self._drawn.get(entry.seq)
        if known is not None and known[0] == state:
            return known[1]
        if self.portion <= 0:
            return self._draw(entry, cols, style, "…")
        self.portion -= len(entry.text) * (1 if entry.text.isascii() else 3)
        if self._drawn_rows > MAX_DRAWN:
            self.forget_rows()
        rows = self._draw(entry, cols, style, entry.text)
        self._drawn[entry.seq] = (state, rows)
        self._drawn_rows += len(rows)
        return rows

    def forget_rows(self) -> None:
        """Drop the rows that are kept as they were drawn."""
        self._drawn.clear()
        self._drawn_rows = 0

    def _draw(self, entry: Entry, cols: int, style: str, text: str) -> List[EntryRow]:
        """Draw an entry: its head, the text wrapped beside it, and below it the failures."""
        if entry.kind in ("blank", "date"):
            return [((), line and _rule(line, cols), "dim") for line in text.split("\n")]
        when = (Span(self._clock(entry.added_at) + " ", "dim"),) if cols >= TIME_COLS else ()
        is_called = bool(entry.called) and not style
        first = when + head(entry.kind, entry.sender, entry.to)
        if is_called:
            first = tuple(Span(text, "mention" if style.startswith("nick") else style) for text, style in first)
        indent = sum(width(span.text) for span in first)
        rows: List[EntryRow] = []
        if entry.seq - 1 == self.unread:
            rows.append(((), _rule("new", cols), "rule"))
        if indent > cols // 2:  # the text has no room beside the head
            rows.append((_fit_labels(first, cols), "", ""))
            indent = min(2, cols // 4)
            first = (Span(" " * indent),)
        rest = (Span(" " * indent),)
        texts = wrap(text, max(1, cols - indent), table=entry.kind == "answer")
        if is_called:
            rows += [((rest if at else first) + _marked(text, entry.called), "", "") for at, text in enumerate(texts)]
        else:
            rows += [(rest if at else first, text, style) for at, text in enumerate(texts)]
        for failure in entry.receipts.failures(self._label) if entry.receipts else []:
            rows += [(rest, text, "error") for text in wrap(failure, max(1, cols - indent))]
        return rows

    def visible(self, area: Layout) -> List[Line]:
        """Return exactly as many rows as fit, filled to their width; the anchor or the newest row is the lowest."""
        height, cols = area.height, area.cols
        self.portion = DRAW_PORTION
        rows: List[EntryRow] = []
        if self.entries:
            low = (self.entries[-1].seq, sys.maxsize)
            if self.anchor is not None:
                low = self._clamped(self.moved(self.anchor, 0, cols), area)
            for index in range(low[0] - self.entries[0].seq, -1, -1):
                block = self.rows(self.entries[index], cols)
                rows += reversed(block[:low[1] + 1] if self.entries[index].seq == low[0] else block)
                if len(rows) >= height:
                    break
        rows = rows[:height] + [((), "", "")] * (height - len(rows))
        return [fill((*before, Span(text, style)), cols) for before, text, style in reversed(rows)]

    def read_entries(self) -> List[Entry]:
        """Return the entries that end at the lowest row on screen, as many as a screen may hold."""
        end = len(self.entries) if self.anchor is None else self.anchor[0] - self.entries[0].seq + 1
        return [entry for entry in self.entries[max(0, end - 300):end] if entry.kind not in ("blank", "date")]

    # -- where the reader is ---------------------------------------------------------------------------

    def scroll(self, by: int, area: Layout) -> None:
        """Go down by some rows; up if `by` is negative."""
        if self.entries:
            self.go_to(self.moved(self.anchor or self._bottom(area.cols), by, area.cols), area)

    def go_to(self, place: Place, area: Layout) -> None:
        """Make a place the lowest on screen, as far as that is possible."""
        place, bottom = self._clamped(place, area), self._bottom(area.cols)
        if self.anchor is None and place < bottom:
            self._left_at = self.next - 1
            if not self._is_missed or self.is_on_screen(self.unread or 0, area):  # else the reader looks for the mark
                self.unread, self._is_missed = self._left_at, False
        self.anchor = place if place < bottom else None

    def to_top(self, area: Layout) -> None:
        if self.entries:
            self.go_to((self.entries[0].seq, 0), area)

    def to_bottom(self) -> None:
        self._is_missed = self._is_missed and self.anchor is None
        self.anchor = self.found = None

    def on_focus_lost(self) -> None:
        """Mark what comes from now on as new, unless the reader is further up."""
        if self.anchor is None:
            self.unread, self._is_missed = self.next - 1, True

    def is_on_screen(self, seq: int, area: Layout) -> bool:
        """Whether an entry is on screen, or at least its end."""
        low = self.anchor or self._bottom(area.cols)
        if not low[0] - area.height < seq <= low[0]:
            return False  # each entry has at least one row
        return self.moved(low, 1 - area.height, area.cols)[0] <= seq

    def count_below(self) -> int:
        """Count the messages that came since the reader scrolled away."""
        first = self.entries[0].seq if self.entries else 0
        return sum(entry.kind in CHAT_KINDS for entry in self.entries[max(0, self._left_at + 1 - first):])

    def moved(self, place: Place, by: int, cols: int) -> Place:
        """Return the place so many rows below another, within the scrollback."""
        first = self.entries[0].seq
        index, row = place[0] - first, place[1] + by
        if index < 0:
            index, row = 0, 0
        while row < 0 and index > 0:
            index -= 1
            row += len(self.rows(self.entries[index], cols))
        count = len(self.rows(self.entries[index], cols))
        while row >= count and index < len(self.entries) - 1:
            index, row = index + 1, row - count
            count = len(self.rows(self.entries[index], cols))
        return first + index, max(0, min(row, count - 1))

    def _bottom(self, cols: int) -> Place:
        """Return the lowest place."""
        last = self.entries[-1]
        return last.seq, len(self.rows(last, cols)) - 1

    def _clamped(self, place: Place, area: Layout) -> Place:
        """Return a place, or the highest one with a screenful above it if that is lower."""
        return max(place, self.moved((self.entries[0].seq, 0), area.height - 1, area.cols))

    # -- search ----------------------------------------------------------------------------------------

    def search(self, text: str) -> List[Entry]:
        """Return the messages that contain a text; for the same text again, only those above what was found last."""
        if text.casefold() != self.wanted.casefold():
            self.found = None
        if self.found is None:
            self.close_gap()
        self.wanted = text
        before, folded = self.next if self.found is None else self.found, text.casefold()
        return [each for each in self.entries if each.seq < before and each.kind in CHAT_KINDS
                and folded in (head_text(each.kind, each.sender, each.to) + each.text).casefold()]


def teller_added(message: Said) -> str:
    """Return the name of a message's sender, and who told of it if it did not come from there."""
    return message.sender + (f" (told by {message.told_by})" if message.told_by else "")


def split_action(text: str) -> Tuple[str, str]:
    """Return the kind of entry that a text of a peer is, and what is shown of it."""
    return ("action", text[len(ACTION):]) if text.startswith(ACTION) else ("chat", text)


def past_texts(message: Said, own_name: str) -> Tuple[str, str]:
    """Return what stands before a message of the history where there are no windows, and the message."""
    kind, text = split_action(message.text)
    to = "" if message.conversation == EVERYONE else message.conversation
    if to and not message.own and not is_channel(to):
        to = own_name
    return head_text(kind, teller_added(message), to), text


class Transcript:
    """Takes the place of all scrollbacks where there is no screen: entries are printed as lines as they come.

    The last messages are kept for /search."""

    def __init__(self, clock: Clock, show: Optional[Callable[[str], None]] = None, echo: bool = True,
                 date: Clock = lambda when: "") -> None:
        self._clock = clock
        self._date = date
        self._show = show  # is called with each line; None: the interface prints something else
        self._echo = echo  # whether the user's own messages are shown, too
        self._kept: Deque[Tuple[float, str, str]] = collections.deque()  # messages: when, head, text
        self._size = 0  # characters of the texts

    def add(self, now: float, kind: str, text: str, sender: str = "", to: str = "", own: bool = False) -> None:
        """Print a message or a notice; keep it if it is a message."""
        start, kept = head_text(kind, sender, to), self._kept
        if kind in CHAT_KINDS:
            kept.append((now, start, text))
            self._size += len(text)
            while len(kept) > MAX_ENTRIES or self._size > MAX_SCROLLBACK:
                self._size -= len(kept.popleft()[2])
        if self._show is not None and (self._echo or not own):
            self._show(self._line(now, start, text))

    def _line(self, now: float, start: str, text: str) -> str:
        return f"{self._clock(now)} {start}" + (text.replace("\n", "\n      ") if "\n" in text else text)

    def add_told(self, words: str, entries: List[Entry], conversation: str) -> None:
        """Print what was said in a conversation before we came, below a line with these words."""
        to = "" if conversation == EVERYONE else conversation
        self.add(entries[0].added_at, "notice", f"{words}:")
        for entry in entries[1:]:
            self.add(entry.added_at, entry.kind, entry.text, entry.sender, to)

    def past_line(self, message: Said, own_name: str) -> str:
        """Return a message of the history as a line."""
        return f"{self._date(message.time)} {self._line(message.time, *past_texts(message, own_name))}"

    def print(self, line: str) -> None:
        if self._show is not None:
            self._show(line)

    def search(self, text: str) -> List[str]:
        """Return the messages that contain a text, as lines."""
        wanted = text.casefold()
        return [self._line(*each) for each in self._kept if wanted in (each[1] + each[2]).casefold()]


class Window:
    """A conversation: what is read, and the line that is written."""

    def __init__(self, key: str, scrollback: Scrollback) -> None:
        self.key = key  # EVERYONE, the name of a channel, or the id of a peer: where what is entered goes
        self.scrollback = scrollback
        self.line = LineEditor()
        self.peer_key = ""  # of the peer in a private one: a peer that only has its name is another
        self.unread = 0  # messages that came while another window was at hand
        self.calls = 0  # those of them that were private or named the user

    @property
    def is_private(self) -> bool:
        return self.key != EVERYONE and not is_channel(self.key)

    @property
    def used_at(self) -> float:
        """When something last happened here, in Unix time."""
        return self.scrollback.entries[-1].added_at if self.scrollback.entries else 0.0


class Windows:
    """The open windows, in the order of their numbers. The first one is everyone's, and stays."""

    def __init__(self, make: Callable[[str], Window]) -> None:
        self._make = make  # is called with the key
        self.current = self._before = make(EVERYONE)  # the one at hand, and the one before it
        self.all = {EVERYONE: self.current}  # by key
        self._added = 0  # about so many characters since the bound was last checked

    def open(self, key: str) -> Optional[Window]:
        """Return the window of a conversation, if need be a new one; None if too many are open."""
        window = self.all.get(key)
        if window is None and self._make_room():
            window = self.all[key] = self._make(key)
        return window

    def _make_room(self) -> bool:
        """Return whether one more may be opened. Of private ones that were read, the oldest without a draft closes."""
        if len(self.all) >= MAX_WINDOWS:
            spare = [each for each in self.all.values()
                     if each.is_private and each is not self.current and not each.unread and not each.line.text]
            if not spare:
                return False
            self.close(min(spare, key=lambda each: each.used_at))
        return True

    def go_to(self, window: Window) -> None:
        """Take another window at hand; what was cut in one can be inserted in another."""
        if window is not self.current:
            self.current.scrollback.on_focus_lost()
            self.current.scrollback.forget_rows()
            window.line.was_cut = self.current.line.was_cut
            self._before, self.current = self.current, window
        window.unread = window.calls = 0

    def close(self, window: Window) -> None:
        """Close a window other than everyone's; the one before it comes back."""
        del self.all[window.key]
        window.scrollback.drop(len(window.scrollback.entries))  # receipts may hold the window for long
        if window is self.current:
            self.go_to(self._before)
        if self._before is window:
            self._before = self.all[EVERYONE]

    def rekey(self, old: str, new: str) -> None:
        """The peer of a private window has another id. A window of an earlier peer with that id closes."""
        window, earlier = self.all.get(old), self.all.get(new)
        if window is None or window is earlier:
            return
        if earlier is not None:
            if earlier is self.current:
                self.go_to(window)
            self.close(earlier)
        window.key = new
        self.all = {each.key: each for each in self.all.values()}

    def go_on(self, peer: Contact) -> Tuple[Optional[Window], bool]:
        """Return the private window of a peer that has come again: it was the same process, or is at the same address.
        Return also whether its id is another."""
        for window in self.all.values():
            if window.key == peer.id or (window.is_private and window.peer_key == peer.key):
                has_moved = window.key != peer.id
                self.rekey(window.key, peer.id)
                window.peer_key = peer.key
                return window, has_moved
        return None, False

    def numbered(self, number: int) -> Optional[Window]:
        return next(itertools.islice(self.all.values(), number - 1, None), None) if number > 0 else None

    def beside(self, step: int) -> Window:
        """Return the window so many places behind the one at hand; behind the last stands the first."""
        windows = list(self.all.values())
        return windows[(windows.index(self.current) + step) % len(windows)]

    def with_news(self) -> List[Window]:
        """Return the windows with something new: first those that call the user, each in the order of their numbers
        from the one at hand on."""
        windows = list(self.all.values())
        at = windows.index(self.current)
        return sorted((each for each in windows[at:] + windows[:at] if each.unread), key=lambda each: not each.calls)

    def on_added(self, size: int) -> None:
        """So many characters were added: while all windows hold too much, drop the oldest part of the largest one."""
        self._added += size + ENTRY_SIZE
        if self._added < MAX_HELD // 50:
            return
        self._added = 0
        while sum(each.scrollback.held for each in self.all.values()) > MAX_HELD:
            largest = max((each.scrollback for each in self.all.values()), key=lambda each: each.held)
            largest.drop(len(largest.entries) // 4 + 1)


def past_entry(when: float, sender: str, text: str, message_id: str) -> Entry:
    """Return an entry for what was said before the start; `sender` is a label."""
    kind, text = split_action(text)
    entry = Entry(0, when, kind, text, "dim", sender, "")
    entry.id = message_id
    return entry


def by_age(page: List[Said]) -> List[Said]:
    """Return messages of the history as they are shown: what was told later, but said earlier, goes first."""
    return sorted(page, key=lambda message: message.time) if any(message.told_by for message in page) else page


class Past:
    """What the history has of each conversation: its last lines when a window opens, more when one scrolls up there or
    looks for something. All that is dim, and stands above what came since."""

    def __init__(self, view: "ChatView", history: Optional[History]) -> None:
        self.view = view
        self._history = history
        self.is_searching = False

    @property
    def history(self) -> Optional[History]:
        """The history, if there is one that can be read."""
        return self._history if self._history is not None and self._history.is_open else None

    def fill(self, window: Window) -> None:
        """Begin a new window with the last lines of its conversation, and with what was entered there."""
        if self.history is not None:
            conversation = conversation_of(window.key)
            window.line.remember(self.history.entered(conversation))
            if self.view.on_screen:
                last = self.history.before(HISTORY_END, conversation, LAST_LINES)
                window.scrollback.insert_above(list(map(self._entry, by_age(last))))

    def print_last(self) -> None:
        """Print the last lines of all conversations, where there is no screen."""
        transcript, history = self.view.transcript, self.history
        last = history.before(HISTORY_END, None, LAST_LINES) if history is not None else []
        if transcript is not None and last:
            self.view.notice("From the history:")
            for message in by_age(last):
                transcript.print(transcript.past_line(message, self.view.node.me.username))
            self.view.notice("That was the history.")

    def keep_entered(self, text: str) -> None:
        """Keep a line that is entered in the window at hand."""
        if self.history is not None:
            self.history.keep_entered(conversation_of(self.view.window.key), text)

    def load_above(self, rows: int) -> None:
        """Load more if fewer than so many rows may be left above the lowest one on screen."""
        scrollback, history = self.view.window.scrollback, self.history
        if history is None or not scrollback.entries:
            return
        lowest = scrollback.anchor[0] if scrollback.anchor else scrollback.entries[-1].seq
        if lowest - scrollback.entries[0].seq >= rows:
            return
        if len(scrollback.entries) + HISTORY_PAGE > MAX_ENTRIES or scrollback.held + PAGE_SIZE > MAX_SCROLLBACK:
            self.view.hint = "No more is shown here. /search finds what is above."
            return
        page = history.before(self._first_row(scrollback), conversation_of(self.view.window.key))
        scrollback.insert_above(list(map(self._entry, by_age(page))))
        self.view.windows.on_added(sum(len(message.text) + ENTRY_SIZE for message in page))

    def search(self, wanted: str) -> None:
        """Look for a text in the history: on a screen for the next message above all that is shown."""
        view, history = self.view, self.history
        assert history is not None
        self.is_searching = True
        view.hint = "Looking through the history ..."
        if view.transcript is not None:
            history.find(wanted, None, HISTORY_END, FOUND_LINES, functools.partial(self._on_lines_found, wanted))
        else:
            history.find(wanted, conversation_of(view.window.key), self._first_row(view.window.scrollback), 1,
                         functools.partial(self._on_found, view.window, wanted))

    def _on_lines_found(self, wanted: str, found: List[Said]) -> None:
        view = self.view
        assert view.transcript is not None
        name, print_line = view.node.me.username, view.transcript.past_line
        if found:
            view.answer("\n".join(print_line(message, name) for message in reversed(found)))
        else:
            view.refuse(f"Nothing was found for {wanted}.")
        self._end_search()

    def _on_found(self, window: Window, wanted: str, found: List[Said]) -> None:
        """Show what was found, unless the user has gone to another window."""
        self.view.hint = ""
        if found and window is self.view.window:
            self.view.show_found(self._bring(window, found[0]), "/search goes on above, End comes back.")
        elif window is self.view.window:
            more = "more " if window.scrollback.found is not None else ""
            self.view.refuse(f"Nothing {more}was found for {wanted}.")
        self._end_search()

    def _end_search(self) -> None:
        self.is_searching = False
        self.view.on_change()

    def _bring(self, window: Window, message: Said) -> Entry:
        """Load what surrounds a message that stands above all that is shown; return its entry.

        If that leaves something out, or would be too much, the top of the scrollback makes room."""
        scrollback, history, conversation = window.scrollback, self.history, conversation_of(window.key)
        assert history is not None
        first = self._first_row(scrollback)
        page = history.before(message.row, conversation, HISTORY_PAGE // 4)
        page += [each for each in history.since(message.row, conversation) if each.row < first] or [message]
        following = history.since(page[-1].row + 1, conversation, 1)
        is_far = bool(following) and following[0].row < first
        if is_far or len(scrollback.entries) + len(page) > MAX_ENTRIES:
            if scrollback.gap is None:
                scrollback.drop(max(0, len(scrollback.entries) - MAX_ENTRIES // 5))
            scrollback.close_gap()
            is_far = True
        entries = list(map(self._entry, page))
        scrollback.insert_above(entries, is_far)
        self.view.windows.on_added(sum(len(each.text) + ENTRY_SIZE for each in page))
        return next(entry for entry, each in zip(entries, page) if each.row == message.row)

    def _first_row(self, scrollback: Scrollback) -> int:
        """Return the least row of the first messages that are shown; 0 if the history knows none of them, so nothing is
        above. What is told stands above what came before it, and has a higher row."""
        ids = [entry.id for entry in scrollback.entries if entry.id][:CATCH_UP + 20]
        rows = (self.history.row_of(each) for each in ids if self.history is not None)
        return min((row for row in rows if row is not None), default=0 if ids else HISTORY_END)

    @staticmethod
    def _entry(message: Said) -> Entry:
        return past_entry(message.time, teller_added(message), message.text, message.id)


class People:
    """What is kept of other peers: who spoke when, who is ignored, who is new."""

    def __init__(self) -> None:
        self.ignored: Dict[str, None] = {}  # ids
        self.fresh: Dict[str, float] = {}  # of those who came since the last key: when, as Unix time by id
        self.top = 0  # index of the first one that the list shows
        self.spoke_at: Dict[str, float] = {}  # Unix time by id; the latest speaker stands last
        self.private: Optional[str] = None  # id of the peer that last wrote privately

    def on_spoke(self, peer_id: str, now: float) -> None:
        self.spoke_at.pop(peer_id, None)
        self.spoke_at[peer_id] = now
        if len(self.spoke_at) > 2 * MAX_PEERS:
            del self.spoke_at[next(iter(self.spoke_at))]

    def mark(self, peer: Contact, now: float) -> str:
        """Return the sign that stands before a peer in the list."""
        if peer.quiet:
            return "○ "
        if peer.away:
            return "z "
        return "+ " if now - self.fresh.get(peer.id, float("-inf")) < FRESH_TIME else "● " if peer.is_direct else "◐ "


def _mentions(text: str, name: str) -> bool:
    """Whether a text contains a name as a word of its own."""
    return bool(re.search(_word_pattern(re.escape(name.casefold())), text.casefold()))


def _nearest(name: str, choices: List[str]) -> str:
    """Return a question that names the choice that was probably meant; empty if none is similar."""
    import difflib
    folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(name.casefold(), folded, 1, 0.5)
    return f" Did you mean {folded[found[0]]}?" if found else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shortened(text: str) -> str:
    first, newline, _ = text.partition("\n")
    return cut(first, 60, "…") + (" …" if newline else "")


# -- drawing -------------------------------------------------------------------------------------------
#
# Pure functions from the view and a size to lines. What has no room is left out, the input line last of all.


def layout(view: "ChatView", rows: int, cols: int) -> Layout:
    bar, rule = int(rows >= 3), int(rows >= 6)
    wanted = len(_input_rows(view, cols)[0]) if rows >= 4 else 1
    lines = max(1, min(wanted, (rows - bar - rule) // 3))
    has_side = view.has_side and cols >= SIDE_COLS and rows >= 4 and view.node.present()
    side = min(cols // 4, 40) if has_side else 0  # whatever the names: text should not move whenever somebody comes
    return Layout(bar, max(1, rows - bar - rule - lines), rule, lines, cols - side, side)


def render(view: "ChatView", rows: int, cols: int) -> Screen:
    """Draw the screen: the status bar, messages beside the list of peers, a rule with a hint, the input line."""
    part, scrollback = layout(view, rows, cols), view.window.scrollback
    messages = scrollback.visible(part)
    hint = _hint(view)
    if hint and not part.rule:
        messages[-1] = fill((Span(hint, "rule"),), part.cols)
    if part.side:
        blank: Line = []
        peers = itertools.zip_longest(messages, _side_rows(view, part.height, part.side - 3), fillvalue=blank)
        messages = [[*left, Span(" │ ", "dim"), *right] for left, right in peers]
    start = f"── {hint} " if hint else ""
    rule = [Span(start, "rule"), Span("─" * (cols - width(start)), "dim")]
    typed, (row, column) = _input_rows(view, cols)
    top = max(0, row - part.input + 1)
    below = [_prompted(view, text, top + at == 0) for at, text in enumerate(typed[top:top + part.input])]
    lines = [*[_status_bar(view, cols)] * part.bar, *messages, *[clip(rule, cols)] * part.rule, *below]
    return Screen(lines[-rows:], (rows - part.input + row - top, column), scrollback.portion > 0)


def render_bare(view: "ChatView", rows: int, cols: int) -> List[str]:
    """Return the messages that are on screen, each line of them unbroken, as many as fit: the terminal breaks them."""
    lines: List[str] = []
    for entry in reversed(view.window.scrollback.read_entries()):
        block = (head_text(entry.kind, entry.sender, entry.to) + entry.text).expandtabs(4).split("\n")
        rows -= sum(max(1, -(-width(line) // cols)) for line in block)
        if rows < 1 and lines:
            break
        lines = block + lines
    return lines


def clip(line: Iterable[Span], cols: int) -> Line:
    """Cut a line to the width of the screen."""
    clipped: Line = []
    for text, style in line:
        text = cut(text, cols, "…")
        cols -= width(text)
        if text:
            clipped.append(Span(text, style))
    return clipped


@functools.lru_cache(maxsize=512)
def fill(line: Tuple[Span, ...], cols: int) -> Line:
    """Cut a line to the width of the screen, or fill it with blanks."""
    clipped = clip(line, cols)
    return [*clipped, Span(" " * (cols - sum(width(span.text) for span in clipped)))]


def _hint(view: "ChatView") -> str:
    """Return what is said above the input line."""
    if view.node.leaving:
        return "Leaving, once what is under way has arrived. Ctrl-C leaves at once."
    scrollback = view.window.scrollback
    if view.hint or scrollback.anchor is None:
        return view.hint
    count = scrollback.count_below()
    return f"{count} new below: End goes there." if count else "PgDn shows more, End the newest."


def _status_bar(view: "ChatView", cols: int) -> Line:
    """Draw the status bar, as much of it as there is room for."""
    online, address, since = view.node.server_status()
    number = len(view.node.present())
    if view.node.network_gone:
        state, short = "✗ no network", "✗"
    elif online:
        state, short = f"● server online since {view.clock(since)}", "● online"
    else:
        state, short = "○ P2P mode" + (f" since {view.clock(since)}" if since else ""), "○ P2P"
    name, peers = view.node.me.username, _count(number, "peer")
    room = f" · closed room {view.node.room.name}" * bool(view.node.room.name)
    title = f" Chat P2P - {name}{room}"
    every, some, count = _window_lists(view, cols)
    for start, windows, right in (
            (title, every, f"{state} · {peers} "), (title, every, f"{short} · {peers} "),
            (f" {name}{room}", every, f"{short} {number} "), (f" {name}", every, f"{short} {number} "),
            (f" {name}", some, f"{short} {number} "), (f" {name}", count, f"{short} {number} "),
            ("", some, f"{number} "), ("", count, f"{number} "), (f" {name}", count, "")):
        left = [Span(start, "bar"), *windows]
        gap = cols - sum(width(span.text) for span in left) - width(right)
        if gap >= 2:
            return [*left, Span(" " * gap + right, "bar")]
    return [Span(pad(f" {name}", cols), "bar")]


def _window_lists(view: "ChatView", cols: int) -> Tuple[Line, Line, Line]:
    """Return the windows for the status bar in three forms: all, those with news and the one at hand, and how many
    have news. In brackets stands the one at hand; "!" means that somebody calls the user."""
    windows, news = list(view.windows.all.values()), view.windows.with_news()
    if len(windows) == 1:
        return [], [], []
    shown: List[Tuple[Window, Span]] = []
    for number, window in enumerate(windows, 1):
        text = f"{number}:{cut(view.name_of(window.key), BAR_NAME, '…')}"
        called = "!" * bool(window.calls)
        if window is view.window:
            text = f"[{text}]"
        elif window.unread:
            text = f"{text}({window.unread}{called})"
        shown.append((window, Span("  " + text, "called" if called else "bar")))
    called = "!" * any(each.calls for each in news)
    count = [Span(f"  new in {len(news)}{called}", "called" if called else "bar")] * bool(news)
    if cols < SIDE_COLS:
        return count, count, count
    return ([span for _, span in shown],
            [span for window, span in shown if window.unread or window is view.window], count)


def _side_rows(view: "ChatView", height: int, cols: int) -> List[Line]:
    """Draw the list of peers: a mark and the name, and the address if all of them have room for theirs."""
    peers, people, now = view.node.members(view.window.key), view.people, view.node.loop.wall()
    room = height if len(peers) <= height else height - 1
    people.top = max(0, min(people.top, len(peers) - room))
    shown = peers[people.top:people.top + room]
    texts = [(label, "" if "@" in label else f" {format_address(peer.address)}")
             for peer, label in zip(shown, view.labels(shown))]
    has_addresses = all(width(label + address) <= cols - 2 for label, address in texts)
    rows: List[Line] = []
    for peer, (label, address) in zip(shown, texts):
        style = "dim" if peer.quiet else nick_style(label)
        rows.append([Span(people.mark(peer, now), "dim"), Span(cut(label, cols - 2, "…"), style),
                     Span(address if has_addresses else "", "dim")])
    below = len(peers) - people.top - room
    if room < len(peers):
        rows.append([Span(f"{below} more: Alt-PgDn" if below else f"{people.top} more: Alt-PgUp", "dim")])
    return [clip(row, cols) for row in rows]


def prompt(view: "ChatView", cols: int) -> str:
    """Return what stands before the line that is typed: it names the receiver, unless that is everyone."""
    key = view.window.key
    if view.window.line.is_secret:
        return "Passphrase: " if cols >= 24 else ""
    text = f"[{view.name_of(key)}] {PROMPT}" if key != EVERYONE else PROMPT
    return text if width(text) <= cols // 2 else PROMPT if cols >= 8 else ""


def _input_rows(view: "ChatView", cols: int) -> Tuple[List[str], Tuple[int, int]]:
    """Return the prompt and the line as rows; and where the cursor is."""
    return flow(prompt(view, cols), *view.window.line.shown, cols)


def _prompted(view: "ChatView", text: str, first: bool) -> Line:
    """Draw a row of the input line; nobody should overlook that it does not go to everyone."""
    is_named = first and view.window.key != EVERYONE and text.startswith("[")
    end = text.find(PROMPT) + len(PROMPT) if is_named else 0
    return [Span(text[:end], "private" if view.window.is_private else "bold"), Span(text[end:])]


@functools.lru_cache(maxsize=8)
def flow(prompt: str, left: str, right: str, cols: int) -> Tuple[List[str], Tuple[int, int]]:
    """Break a prompt and the two parts of a line into rows; return them, and where the cursor is."""
    rows, used, cursor = [prompt], width(prompt), (0, 0)
    before = graphemes(left)
    for index, cluster in enumerate([*before, *graphemes(right), ""]):  # "": the place behind the last one
        text, columns = glyph(cluster) if cluster.strip() else (cluster and " ", 1)
        if used + columns > cols and used:
            rows.append("")
            used = 0
        if index == len(before):
            cursor = (len(rows) - 1, used)
        if cluster == "\n":
            rows.append("")
            used = 0
        elif columns <= cols:
            rows[-1] += text
            used += columns
    return rows, cursor


# -- events --------------------------------------------------------------------------------------------


class Narrator:
    """Shows what happened at the node: an event becomes an entry or changes one."""

    def __init__(self, view: "ChatView") -> None:
        self.view = view
        self._labels: Dict[str, str] = {}  # by id; the same for all events of a turn, which come when all is done
        self._told: Dict[Tuple[str, str], List[Event]] = {}  # in this turn, by conversation and teller
        self._failures: List[Receipts] = []  # of messages that failed and have one more outcome in this turn
        self._now = 0.0  # Unix time of this turn
        self._rang_at = float("-inf")
        self._has_met_server = False
        self._namesake = ""  # the user's own name, once it was said that somebody else has it, too
        kinds = ("ready", "settled", "server", "network", "joined", "left", "renamed", "chat", "sent", "delivered",
                 "failed", "notice", "channels", "told")
        self._handlers: Dict[str, Callable[[Event], None]] = {kind: getattr(self, f"on_{kind}") for kind in kinds}

    def handle(self, events: List[Event]) -> None:
        """Take in the events of one turn."""
        self._labels.clear()
        self._now = self.view.node.loop.wall()
        handlers = self._handlers
        for event in events:
            handler = handlers.get(event["event"])
            if handler is not None:
                handler(event)
        if self._failures:
            self._report_failures()
        if self._told:
            self._show_told()

    # -- chat ------------------------------------------------------------------------------------------

    def on_chat(self, event: Event) -> None:
        """Show what a peer said; ring if it is for the user alone or names the user."""
        view, people = self.view, self.view.people
        sender, to, text = event["from"]["id"], event["to"], event["text"]
        if sender in people.ignored or "told" in event:  # it stands there already
            return
        now = self._now
        people.on_spoke(sender, now)
        private = to != EVERYONE and not is_channel(to)
        if private:
            people.private = sender
        is_called = private or view.on_screen and _mentions(text, view.node.me.username)
        window = self.view.window_of(sender if private else to) if view.on_screen else view.window
        entry = self._say(window, sender, event)
        if entry is not None and is_called and not private:
            entry.called = view.node.me.username
        if window is not view.window:
            window.unread += 1
            window.calls += is_called
            if is_called and window.calls == 1:
                self._gather(view.window, "called", sender, "" if private else f" ({view.name_of(to)})")
        view.unread += not view.has_focus
        if is_called and now - self._rang_at >= BELL_INTERVAL and (view.is_on["bell"] or view.is_on["notify"]):
            self._rang_at = now
            view.has_rung = view.is_on["bell"]
            view.note = f"{self._label(sender)}: {_shortened(text)}" if view.is_on["notify"] else ""

    def on_told(self, event: Event) -> None:
        """Somebody tells what was said before we came."""
        ignored = self.view.people.ignored
        if event["from"]["id"] not in ignored and event["told_by"]["id"] not in ignored:
            self._told.setdefault((event["to"], event["told_by"]["id"]), []).append(event)

    def _show_told(self) -> None:
        """Show it above what came since, dim, under a line that says who tells it: it rings for nobody."""
        view, told, self._told, now = self.view, self._told, {}, self._now
        for (conversation, teller), events in told.items():
            words = f"before you came, told by {self._label(teller)}"
            entries = [Entry(0, now - events[0]["age"], "date", words, "", "", ""),
                       *(past_entry(now - event["age"], self._label(event["from"]["id"]), event["text"], event["id"])
                         for event in events)]
            if view.transcript is not None:
                view.transcript.add_told(words, entries, conversation)
            else:
                self.view.window_of(conversation).scrollback.insert_before_live(entries)
                view.windows.on_added(sum(len(entry.text) + ENTRY_SIZE for entry in entries))

    def on_sent(self, event: Event) -> None:
        """Show what the user said; its receipts will follow."""
        view, text, to = self.view, event["text"], event["to"]
        window = self.view.window_of(to) if view.on_screen else view.window
        entry = self._say(window, view.node.me.id, event, own=True)
        receipts = view.outgoing.add(event["id"], text, event["receivers"])
        if entry is not None:
            window.scrollback.found = None
            entry.receipts, receipts.seq, receipts.window = receipts, entry.seq, window
            window.scrollback.pass_over(entry)
            if window is not view.window:
                view.notice(f"To {view.name_of(to)}: {_shortened(text)}")

    def _say(self, window: Window, sender: str, event: Event, own: bool = False) -> Optional[Entry]:
        """Show what somebody said, with the receiver where that is not plain from the window."""
        to, (kind, text) = event["to"], split_action(event["text"])
        is_plain = to == EVERYONE or self.view.on_screen and window.key != EVERYONE
        style = "private" if not is_plain and not own and not is_channel(to) else ""
        to = "" if is_plain else self._label(to)
        if self.view.transcript is not None:  # at once: there are so many of these
            self.view.transcript.add(self._now, kind, text, self._label(sender), to, own)
            return None
        entry = self.view.add(kind, text, style, self._label(sender), to, own, window)
        if entry is not None:
            entry.id = event["id"]
        return entry

    def _label(self, peer_id: str) -> str:
        """Return a peer's label. The user's own name never has an address: the label of a namesake has one."""
        label = self._labels.get(peer_id)
        if label is None:
            me = self.view.node.me
            label = self._labels[peer_id] = me.username if peer_id == me.id else self.view.node.label(peer_id)
        return label

    def on_delivered(self, event: Event) -> None:
        """Note that a message was shown. There are so many of these that the usual case is all done here."""
        receipts = self.view.outgoing.settle(event["id"], event["to"]["id"], "")
        if receipts is not None and (receipts.failed or "kept" in event):
            self._on_delivered_late(receipts, event)

    def _on_delivered_late(self, receipts: Receipts, event: Event) -> None:
        """Others have not got it, or this one was lost meanwhile."""
        if "kept" not in event:
            self._failures.append(receipts)
        elif not self.view.is_in_sight(receipts):
            self.view.notice(f"✓ delivered to {self._label(event['to']['id'])} after all: {_shortened(receipts.text)}")

    def on_failed(self, event: Event) -> None:
        """Say that a message was not delivered; on the screen that stands below the message itself."""
        is_kept = bool(event.get("kept"))
        words = f"({event['reason'] or 'it failed'})" + "; it waits" * is_kept
        receipts = self.view.outgoing.settle(event["id"], event["to"]["id"], words, is_kept)
        if receipts is not None:
            self._failures.append(receipts)
        if receipts is None or not self.view.on_screen:
            name = self.view.node.label(event["to"]["id"])
            self.view.notice(f"✗ not delivered to {name} {words}: {_shortened(event['text'])}", "error")

    def _report_failures(self) -> None:
        """Say again what stands below messages that are out of sight; keep it if the screen will soon be gone."""
        view = self.view
        failures, self._failures = dict.fromkeys(self._failures), []
        for receipts in (each for each in failures if not each.waiting and view.on_screen):
            lines = [f"{line}: {_shortened(receipts.text)}" for line in receipts.failures(view.node.label)]
            view.lost += lines if view.node.leaving else []
            if not view.is_in_sight(receipts):
                for line in lines:
                    view.notice(line, "error")

    # -- who is here -----------------------------------------------------------------------------------

    def on_joined(self, event: Event) -> None:
        peer_id = event["peer"]["id"]
        self.view.people.fresh[peer_id] = self.view.node.loop.wall()
        self._come_or_go("joined", peer_id, "", [EVERYONE, *event.get("channels", ())])
        self._continue_window(event["peer"])
        self._warn_of_namesake()

    def _continue_window(self, public: Dict[str, Any]) -> None:
        """A peer joined: if it was here before, its private window goes on, and says so. One that only has the name of
        somebody who left is another, which is said, too."""
        view, address = self.view, f"{public['ip']}:{public['port']}"
        peer = view.node.peers.get(public["id"])
        if peer is None or len(view.windows.all) == 1:
            return
        window, has_moved = view.windows.go_on(peer)
        elsewhere = f", at another address: {address}" if has_moved else ""
        if window is not None:
            view.notice(f"{self._label(peer.id)} is back{elsewhere}.", window=window)
            return
        text = f"Somebody called {peer.username} is here, at {address}. /query {self._label(peer.id)} writes there."
        for window in view.windows.all.values():
            if window.key.rpartition("@")[0] == peer.username and not view.node.peers.get(window.key):
                view.notice(text, window=window)

    def on_left(self, event: Event) -> None:
        peer_id, reason = event["peer"]["id"], event["reason"]
        self.view.people.fresh.pop(peer_id, None)
        words = f" ({event['text']})" if event.get("text") else ""
        kind, why = ("left", words) if reason == "left" else ("gone", f" ({reason})")
        self._come_or_go(kind, peer_id, why, [EVERYONE, peer_id, *event.get("channels", ())])

    def on_channels(self, event: Event) -> None:
        """Say that a peer joined or left channels that the user is in; open or close windows if that is the user."""
        view, peer_id = self.view, event["peer"]["id"]
        if view.node.is_me(peer_id):
            for name in event["left"]:
                if name in view.windows.all:
                    view.windows.close(view.windows.all[name])
            for name in event["joined"]:
                view.windows.open(name)
                self._say_members(name)
            return
        for kind in ("joined", "left"):
            for name in event[kind]:
                if name in view.node.me.channels:
                    self._come_or_go(kind, peer_id, "", [name])

    def _say_members(self, name: str) -> None:
        """Say in the window of a channel who else is in it."""
        labels = self.view.labels(self.view.node.members(name))
        more = f", {len(labels) - GATHER_NAMES} more" if len(labels) > GATHER_NAMES else ""
        others = f" with {', '.join(labels[:GATHER_NAMES])}{more}." if labels else ". Nobody else is in it so far."
        self.view.notice(f"You are in {name}{others}", window=self.view.window_of(name))

    def _come_or_go(self, kind: str, peer_id: str, reason: str, conversations: Sequence[str]) -> None:
        """Say that a peer came to conversations, or went: on the screen in the windows of those."""
        view = self.view
        now = view.node.loop.wall()
        if view.is_quiet and now - view.people.spoke_at.get(peer_id, float("-inf")) > LATELY:
            return
        if view.transcript is None:
            for window in [view.windows.all[key] for key in conversations if key in view.windows.all]:
                self._gather(window, kind, peer_id, reason)
        else:
            where = f" {conversations[0]}" * is_channel(conversations[0])
            view.add(kind, self._crowd(kind, [(peer_id, reason)]) + where)

    def _gather(self, window: Window, kind: str, peer_id: str, reason: str) -> None:
        """Say on the screen what a peer did. Those who do the same one after the other share a line."""
        scrollback, now = window.scrollback, self.view.node.loop.wall()
        last = scrollback.entries[-1] if scrollback.entries else None
        if last is None or last.kind != kind or not 0 <= now - last.added_at < GATHER_TIME:
            last = scrollback.add(now, kind, "", "private" if kind == "called" else "dim")
        if kind != "called" or (peer_id, reason) not in last.members:
            last.members.append((peer_id, reason))
        scrollback.change(last, self._crowd(kind, last.members))

    def _crowd(self, kind: str, members: List[Tuple[str, str]]) -> str:
        """Return a line that says who came or went, each with the reason."""
        more = len(members) - GATHER_NAMES
        names = ", ".join(self.view.node.label(each) + reason for each, reason in members[:GATHER_NAMES])
        where = f" or /window {self.view.node.label(members[0][0])}" if len(members) == 1 and not members[0][1] else ""
        verb = {"gone": "is gone" if len(members) == 1 else "are gone",
                "called": f"wrote to you: Alt-A{where} goes there."}.get(kind, kind)
        return names + (f", {more} more" if more > 0 else "") + f" {verb}"

    def on_renamed(self, event: Event) -> None:
        """Say that a peer or the user has another name or address, and go on with the new id."""
        view, people, old, new = self.view, self.view.people, event["old"], event["peer"]
        waits = [each.outcomes for each in view.outgoing.under_way.values() if each.outcomes.get(old["id"], "") is None]
        tables: List[Dict[str, Any]] = [people.ignored, people.spoke_at, people.fresh, *waits]
        for table in tables:
            if old["id"] in table:
                table[new["id"]] = table.pop(old["id"])
        people.private = new["id"] if people.private == old["id"] else people.private
        view.windows.rekey(old["id"], new["id"])
        is_me, is_name = new["id"] == view.node.me.id, old["username"] != new["username"]
        what = f"known as {self._label(new['id'])}" if is_name else f"at {new['ip']}:{new['port']}"
        text = f"{'You are' if is_me else old['username'] + ' is'} now {what}."
        peer = view.node.peers.get(new["id"])
        about = [EVERYONE, new["id"], *(peer.channels if peer else ())] if view.on_screen and not is_me else []
        for window in [view.windows.all[key] for key in about if key in view.windows.all] or [view.window]:
            view.notice(text, window=window)
        self._warn_of_namesake()

    def _warn_of_namesake(self) -> None:
        """Say once that somebody else has the user's name, too: nothing else on the screen shows it."""
        me = self.view.node.me
        if self._namesake != me.username and self.view.node.find(me.username):
            self._namesake = me.username
            self.view.notice(f"There is another {me.username} here: the others see you as "
                             f"{self.view.node.label(me.id)}. /nick gives you another name.")

    # -- the network -----------------------------------------------------------------------------------

    def on_ready(self, event: Event) -> None:
        self.view.notice(f"You are {event['id']}. /help lists the commands.")
        for name in self.view.node.me.channels:
            self.view.windows.open(name)

    def on_settled(self, event: Event) -> None:
        """The first look around is over: say what it has shown, and if nobody is here, why."""
        node = self.view.node
        self.view.people.fresh.clear()
        lines = dict.fromkeys([node.first_look(), *node.alone()])  # neither says the same twice
        text = "\n".join(line for line in lines if line not in ("", f"You are {node.me.id}."))
        if text:
            self.view.notice(text)
        for name in node.me.channels:
            self._say_members(name)

    def on_server(self, event: Event) -> None:
        """Say that the server is online, or is not: but not that there is none where nobody named one."""
        address, reason = event["address"], event["reason"]
        if event["online"]:
            self.view.notice(f"Server {address} is online.")
        elif self._has_met_server or self.view.node.settings.server:
            self.view.notice(f"No server at {address} ({reason}). P2P mode: the chat goes on without it.")
        self._has_met_server = self._has_met_server or event["online"]

    def on_network(self, event: Event) -> None:
        if event["gone"]:
            self.view.notice("Nobody answers: this machine seems to be cut off from the network.", "error")
        else:
            self.view.notice("The network is back.")

    def on_notice(self, event: Event) -> None:
        self.view.notice(event["text"], "error" if event.get("error") else "notice")
        self.view.lost += [event["text"]] if self.view.node.leaving and self.view.on_screen else []


# -- keys ----------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """Some keys that do the same. `run` is called with the LineEditor (EDIT_KEYS) or the Keyboard (VIEW_KEYS)."""

    names: str
    help: str
    run: Callable[[Any], None]


EDIT_KEYS: Tuple[Key, ...] = (
    Key("Left, Ctrl-B", "a character to the left", lambda line: line.move(line.before())),
    Key("Right, Ctrl-F", "a character to the right", lambda line: line.move(line.behind())),
    Key("Ctrl-Left, Alt-B", "a word to the left", lambda line: line.move(line.word_before())),
    Key("Ctrl-Right, Alt-F", "a word to the right", lambda line: line.move(line.word_behind())),
    Key("Home, Ctrl-A", "to the beginning of the line", lambda line: line.move(0)),
    Key("Ctrl-E", "to the end of the line", lambda line: line.move(len(line.text))),
    Key("Backspace", "delete the character to the left", lambda line: line.delete(line.before())),
    Key("Delete", "delete the character to the right", lambda line: line.delete(line.behind())),
    Key("Ctrl-W", "cut back to the space before", lambda line: line.cut(line.blank_before())),
    Key("Alt-Backspace", "cut the word to the left", lambda line: line.cut(line.word_before())),
    Key("Alt-D", "cut the word to the right", lambda line: line.cut(line.word_behind())),
    Key("Ctrl-U", "cut back to the beginning", lambda line: line.cut(0)),
    Key("Ctrl-K", "cut to the end", lambda line: line.cut(len(line.text))),
    Key("Ctrl-Y", "insert what was cut", lambda line: line.insert(line.was_cut)),
    Key("Up, Ctrl-P", "the line entered before", lambda line: line.recall(-1)),
    Key("Down, Ctrl-N", "the line entered after it", lambda line: line.recall(1)),
    Key("Ctrl-_", "undo", lambda line: line.undo()),
    Key("Ctrl-T", "exchange two characters", lambda line: line.transpose()),
    Key("Alt-U", "the word in capitals", lambda line: line.convert(str.upper)),
    Key("Alt-L", "the word in small letters", lambda line: line.convert(str.lower)),
    Key("Alt-C", "the word with a capital", lambda line: line.convert(str.title)),
    Key("Alt-.", "the last word of the line before", lambda line: line.insert_last_word()),
    Key("Alt-Enter, Ctrl-J", "a line break in the message", lambda line: line.insert("\n")),
)
VIEW_KEYS: Tuple[Key, ...] = (
    Key("Enter", "send", lambda keys: keys.enter()),
    Key("Ctrl-R", "look for a line that was entered; again: for an older one", lambda keys: keys.look_back()),
    Key("Tab", "complete a name or a command; again: the next one", lambda keys: keys.complete(1)),
    Key("Shift-Tab", "the completion before", lambda keys: keys.complete(-1)),
    Key("PgUp", "scroll back", lambda keys: keys.page(-1)),
    Key("PgDn", "scroll forth", lambda keys: keys.page(1)),
    Key("Alt-1 to Alt-0", "to the window of that number", lambda keys: None),
    Key("Alt-Left, F5", "to the window before", lambda keys: keys.go_beside(-1)),
    Key("Alt-Right, F6", "to the window behind", lambda keys: keys.go_beside(1)),
    Key("Alt-A", "to the next window with news; private and mentions first", lambda keys: keys.go_to_news()),
    Key("Alt-Up", "scroll back by a line", lambda keys: keys.scroll(-1)),
    Key("Alt-Down", "scroll forth by a line", lambda keys: keys.scroll(1)),
    Key("Alt-PgUp, F11", "scroll the list of peers back", lambda keys: keys.scroll_peers(-1)),
    Key("Alt-PgDn, F12", "scroll the list of peers forth", lambda keys: keys.scroll_peers(1)),
    Key("F9", "show or hide the list of peers", lambda keys: keys.toggle_peers()),
    Key("Ctrl-Home", "to the oldest message", lambda keys: keys.to_top()),
    Key("Esc, Ctrl-End", "to the newest message", lambda keys: keys.to_bottom()),
    Key("End", "to the newest message; and to the end of the line", lambda keys: keys.to_end()),
    Key("Ctrl-C", "drop the line; twice: leave", lambda keys: keys.interrupt()),
    Key("Ctrl-D", "leave, when the line is empty; else like Delete", lambda keys: keys.end_input()),
    Key("F10", "show unbroken lines to copy; any key comes back", lambda keys: keys.show_bare()),
    Key("Ctrl-L", "draw the screen anew", lambda keys: None),  # this and the next one are the interface's
    Key("Ctrl-Z", "suspend; fg comes back", lambda keys: None),
)
KEYS = EDIT_KEYS + VIEW_KEYS
_KEYS: Dict[str, Key] = {name.lower(): key for key in KEYS for name in key.names.split(", ")}
_KEYS.update((f"alt-{at % 10}", Key("", "", functools.partial(lambda keys, at: keys.go_to_number(at), at=at)))
             for at in range(1, 11))
_KEYS["focus-in"] = Key("", "", lambda keys: keys.on_focus(True))
_KEYS["focus-out"] = Key("", "", lambda keys: keys.on_focus(False))


# -- commands ------------------------------------------------------------------------------------------

Handle = Callable[[Any, str], None]  # is called with what stands behind the command


class Command(NamedTuple):
    """What can be typed after a slash."""

    name: str
    usage: str
    help: str  # what stands before a semicolon has to be enough where there is little room
    run: Handle
    group: str  # one of GROUPS
    aliases: Tuple[str, ...]


GROUPS = ("talk", "windows", "people", "screen", "connection")  # the order of /help
COMMANDS: Dict[str, Command] = {}
_ALIASES: Dict[str, Command] = {}  # the same commands, by every name
_UNCLEAR = {  # names that mean different things elsewhere, or something that does not exist here: what is answered
    "/w": "Which one: /who, /whois NAME, /window NAME or /msg NAME TEXT?",
    "/q": "Which one: /query NAME or /quit?",
}
_SYNONYMS = {  # what other programs call our commands: is suggested, not done
    "/msg": ("/whisper", "/tell", "/dm", "/pm", "/send", "/notice"), "/reply": ("/answer", "/r"),
    "/nick": ("/name", "/rename", "/user"), "/me": ("/action", "/emote", "/describe"), "/whois": ("/finger",),
    "/who": ("/ls", "/online", "/ping"), "/search": ("/find", "/grep", "/lastlog", "/last"),
    "/ignore": ("/block", "/mute"), "/away": ("/afk", "/brb"), "/unignore": ("/unblock", "/unmute"),
    "/clear": ("/cls",), "/help": ("/?", "/man", "/commands"), "/quit": ("/disconnect", "/logout", "/stop"),
    "/window": ("/switch", "/goto", "/tab"), "/join": ("/channel", "/enter"), "/list": ("/channels", "/rooms"),
}


def _enter(entry: Command) -> None:
    COMMANDS[entry.name] = entry
    _ALIASES.update(dict.fromkeys((entry.name, *entry.aliases), entry))


def command(usage: str, group: str, *aliases: str) -> Callable[[Handle], Handle]:
    """Put a method into the table of commands. Its docstring is the command's help."""
    def enter(method: Handle) -> Handle:
        name = usage.split()[0]
        _enter(Command(name, usage, (method.__doc__ or "").strip().rstrip("."), method, group, aliases))
        return method
    return enter


Topics = Dict[str, List[Tuple[str, str, str]]]  # by heading: a text, a shorter one, and what it means


def help_topics(wanted: str) -> Topics:
    """Return what /help lists about commands ("/") or keys ("/keys")."""
    if wanted == "/keys":
        tables = (("Writing:", EDIT_KEYS), ("Sending, reading, leaving:", VIEW_KEYS))
        return {heading: [(key.names, key.names.partition(",")[0], key.help) for key in keys]
                for heading, keys in tables}
    topics = {f"{group.capitalize()}:": [(each.usage, each.name, each.help)
                                         for each in COMMANDS.values() if each.group == group] for group in GROUPS}
    topics["Talk:"].append(("//TEXT", "//TEXT", "say a text with a slash"))
    return topics if wanted == "/" else {}


def topic_list(topics: Topics, cols: int) -> str:
    """Return a table below each heading. Texts are shortened if that saves rows."""
    forms = []
    for short, brief in ((False, False), (False, True), (True, True)):
        rows = {heading: [(each[short], each[2].partition(";")[0] if brief else each[2]) for each in rows]
                for heading, rows in topics.items()}
        size = max(len(left) for table in rows.values() for left, _ in table)
        if size + 2 > cols // 2 and not short:
            continue  # wrap() would not indent what is explained
        forms.append("\n".join("\n".join([heading, *(f"{left.ljust(size)}  {right}" for left, right in table)])
                               for heading, table in rows.items()))
    return min(forms, key=lambda form: len(wrap(form, cols, table=True)))


def find_command(name: str) -> Command:
    """Return the command of this name or alias. Raises ChatError, which says what was probably meant."""
    name = name.lower()
    if name in _ALIASES:
        return _ALIASES[name]
    if name in _UNCLEAR:
        raise ChatError(_UNCLEAR[name])
    shown = _shortened(clean(name))
    if "/" in name[1:]:
        raise ChatError(f"There is no command {shown}. To say it, begin it with two slashes.")
    meant = next((each for each, synonyms in _SYNONYMS.items() if name in synonyms), "") or _begins_alike(name)
    guess = f" Did you mean {meant}?" if meant else ""
    raise ChatError(f"There is no {shown}.{guess} /help lists the commands.")


def _begins_alike(name: str) -> str:
    """Return the command that a mistyped one probably is: it begins with the same letter, and shares most letters."""
    def likeness(each: str) -> float:
        shared = sum((collections.Counter(each[1:]) & collections.Counter(name[1:])).values())
        return 1.0 if each.startswith(name) else 2 * shared / (len(each) + len(name) - 2)
    best = max((each for each in COMMANDS if each[:2] == name[:2]), key=likeness, default="")
    return best if best and likeness(best) >= 0.7 else ""


def is_surely_text(line: str) -> bool:
    """Whether an entered line is a text without a closer look: nothing that begins so can be a command."""
    return line[:1].isalnum() and line[0] not in _INVISIBLE  # some blanks of Korean script count as letters


class CommandLine:
    """Sends what was entered, or runs it as a command."""

    def __init__(self, view: "ChatView") -> None:
        self.view = view
        self.node = view.node
        self._most_blanks: Tuple[Sequence[Peer], int] = ([], 0)  # some peers, and the most blanks in one of their names
        self.sent_id = ""  # of the last message

    def enter(self, text: str) -> bool:
        """Do what a line says; return whether that was possible, and if not, say why."""
        try:
            self._enter(text)
        except ChatError as error:
            self.view.refuse(str(error))
            return False
        return True

    def enter_texts(self, texts: Sequence[str]) -> None:
        """Do what lines say, in order, which are surely texts and no commands: they are sent together."""
        try:
            self.node.send_chat_messages(self.view.window.key, texts)
        except ChatError:
            for text in texts:  # one of them can't be sent, or none: say which, and why
                self.enter(text)

    def say(self, text: str, to: str) -> None:
        """Send a text that is data, never a command, to a conversation that is named, or with "" to that at hand."""
        key = self._key(to) if to else self.view.window.key
        self._send(text, key or self._only(self.node.find(to), to).id)

    def _enter(self, text: str) -> None:
        if not is_surely_text(text):
            text = clean(text, newlines=True)  # nothing invisible before a slash makes a command a text, and public
        start = text.lstrip()
        if start.startswith("//"):
            self._send(text.replace("//", "/", 1), self.view.window.key)
        elif start.startswith("/"):
            self._run(start)
        elif start:
            self._send(text, self.view.window.key)

    def _send(self, text: str, to: str) -> None:
        """Send a text to a conversation, of which `to` is the key."""
        (self.sent_id,) = self.node.send_chat_messages(to, [text])

    def _run(self, text: str) -> None:
        """Run the command that a line begins with."""
        name = text.split(None, 1)[0]
        if name == "/":
            raise ChatError("A command begins with a slash and a word; //TEXT says a text with a slash.")
        found = find_command(name)
        rest = text[len(name):].strip()
        if rest and found.usage == found.name:
            raise ChatError(f"{found.name} takes nothing behind it. /help lists the commands.")
        found.run(self, rest)

    # -- names in what was typed -----------------------------------------------------------------------

    def _key(self, name: str) -> str:
        """Return the key of the conversation that a word names; "" if it can only be a peer's."""
        if name.casefold() in (EVERYONE, "everyone"):
            return EVERYONE
        try:
            return check_channel(name) if is_channel(name) else ""
        except ValueError as error:
            raise ChatError(str(error)) from None

    def _split_key(self, text: str) -> Tuple[str, str]:
        """Return the key of the conversation that a text begins with, and what stands behind it."""
        word = "".join(text.split(None, 1)[:1])
        key = self._key(word.rstrip(":,"))
        if key and not any(self.node.find(text[:end]) for end in self._name_ends(text) if end > len(word)):
            return key, text[len(word):].strip()  # and nobody is called Everyone Else
        peer, rest = self._split_name(text)
        return peer.id, rest

    def _split_name(self, text: str) -> Tuple[Peer, str]:
        """Return the peer whose name a text begins with, and what stands behind it. The longest name counts."""
        if not text:
            raise ChatError("Whom? Say a name; /who lists them.")
        if text.startswith('"') and '"' in text[1:]:
            name, _, rest = text[1:].partition('"')
            return self._only(self.node.find(name), name), rest.strip()
        for end in self._name_ends(text):
            name = text[:end]
            found = self.node.find(name)
            if not found and name[-1] in ":,":
                found = self.node.find(name.rstrip(":,"))
            if found:
                return self._only(found, name), text[end:].strip()
        return self._only([], text.split()[0].rstrip(":,")), ""

    def _name_ends(self, text: str) -> List[int]:
        """Return where a name at the beginning of a text may end, last first. No peer's name has more blanks."""
        present = self.node.present()
        if present is not self._most_blanks[0]:
            self._most_blanks = (present, max((peer.username.count(" ") for peer in present), default=0))
        ends = (at for at in range(1, min(len(text), MAX_ID) + 1) if at == len(text) or text[at].isspace())
        return list(itertools.islice(ends, self._most_blanks[1] + 1))[::-1]

    def _peer(self, text: str) -> Peer:
        """Return the peer that a text names; nothing may stand behind the name."""
        peer, rest = self._split_name(text)
        return self._only([], text) if rest else peer

    def _only(self, found: Sequence[Peer], name: str) -> Peer:
        """Return the one peer that was found for a name. Raises ChatError if there is none, or a choice."""
        if len(found) == 1:
            return found[0]
        labels = self.view.labels(found or self.node.present())
        if found:
            raise ChatError(f"There are {len(found)} called {name}: {', '.join(labels)}. Which one?")
        if self._is_me(name):
            raise ChatError("That is you.")
        raise ChatError(f"Nobody here is called {clean(name)[:40]}.{_nearest(name, labels)}")

    def _is_me(self, name: str) -> bool:
        return name.casefold().lstrip("@") in (self.node.me.username.casefold(), self.node.me.id.casefold())


class Commands(CommandLine):
    """The commands. They raise ChatError when they can't be done."""

    # -- talk ------------------------------------------------------------------------------------------

    @command("/msg NAME TEXT", "talk", "/m")
    def _msg(self, rest: str) -> None:
        """send a private message; NAME may be a #channel or everyone, too."""
        key, text = self._split_key(rest)
        if not text:
            raise ChatError("There is nothing to send: say the text behind the name.")
        self._send(text, key)

    @command("/reply TEXT", "talk")
    def _reply(self, rest: str) -> None:
        """answer the last private text; goes to whoever wrote it."""
        if self.view.people.private is None:
            raise ChatError("Nobody has written to you privately yet.")
        if not rest:
            raise ChatError("/reply wants a text, for example: /reply yes.")
        self._send(rest, self.view.people.private)

    @command("/me TEXT", "talk")
    def _me(self, rest: str) -> None:
        """say what you do; /me waves: * Alice waves."""
        if not rest:
            raise ChatError("/me wants a text, for example: /me waves.")
        self._send(ACTION + rest, self.view.window.key)

    # -- people ----------------------------------------------------------------------------------------

    @command("/who", "people", "/users")
    def _who(self, rest: str) -> None:
        """who is here; and how well they are heard."""
        peers, how = self.node.present(), self.node.encryption()
        quiet = sum(peer.quiet for peer in peers)
        online, address, _ = self.node.server_status()
        summary = (f"{len(peers)} here: {len(peers) - quiet} heard, {quiet} quiet; "
                   f"{f'server {address} online' if online else 'no server'}; you are {self.node.me.id}; {how}.")
        alone = self.node.alone()
        lines = [*alone, f"{how[0].upper()}{how[1:]}."] if alone else [summary, *self._table(peers)]
        self.view.answer("\n".join(lines))

    def _table(self, peers: Sequence[Peer]) -> List[str]:
        """Return a table of present peers, with how each is heard."""
        if not peers:
            return []
        wanted = {peer.id for peer in peers}
        heading, *rows = self.node.who()
        rows = [row for peer, row in zip(self.node.present(), rows) if peer.id in wanted]
        return fit_columns([heading, *rows], self.view.answer_cols(), (4, 1))

    @command("/whois NAME", "people", "/wi")
    def _whois(self, rest: str) -> None:
        """address and state of a peer."""
        people = self.view.people
        if self._is_me(rest):
            self.view.answer(f"You are {self.node.me.id}.")
            if not self.node.find(rest):
                return
        peer = self._peer(rest)
        spoke_at = people.spoke_at.get(peer.id)
        spoke = f"last spoke at {self.view.clock(spoke_at)}" if spoke_at is not None else "has not spoken yet"
        traits = [spoke] + ["away" if peer.away == AWAY else f"away ({peer.away})"] * bool(peer.away)
        traits += ["silent at the moment"] * peer.quiet + ["ignored"] * (peer.id in people.ignored)
        self.view.answer(f"{peer.username} is {peer.id}: {', '.join(traits)}.")

    @command("/away [TEXT]", "people")
    def _away(self, rest: str) -> None:
        """say that you are away, and why; until you talk again."""
        self.node.set_away(rest or AWAY)
        why = f" ({self.node.me.away})" if rest else ""
        self.view.answer(f"You are away{why}, until you talk again or say /back.")

    @command("/back", "people")
    def _back(self, rest: str) -> None:
        """say that you are here again."""
        self.node.set_away("")
        self.view.answer("You are here.")

    @command("/peers", "screen")
    def _peers(self, rest: str) -> None:
        """show or hide the list of peers."""
        if self.view.on_screen and self.view.cols >= SIDE_COLS:
            self.view.keyboard.toggle_peers()
            return
        labels = self.view.labels(self.node.present())
        names = f": {', '.join(labels)}" if labels else ""
        self.view.answer(f"{_count(len(labels), 'peer')}{names}.")

    @command("/nick NAME", "people")
    def _nick(self, rest: str) -> None:
        """take another name."""
        if rest == self.node.me.username:
            raise ChatError("That is your name already.")
        self.node.rename(rest)

    @command("/info", "talk")
    def _info(self, rest: str) -> None:
        """who has your last message."""
        receipts = self.view.outgoing.last
        if receipts is None:
            raise ChatError("You have not sent a message yet.")
        lines = [_shortened(receipts.text)]
        for outcome, what in (("", "delivered to"), (None, "under way to")):
            names = [self.node.label(each) for each, became in receipts.outcomes.items() if became == outcome]
            lines += [f"{what}: {', '.join(names)}"] if names else []
        self.view.answer("\n".join(lines + receipts.failures(self.node.label)))

    # -- the network, the screen -----------------------------------------------------------------------

    @command("/sync", "connection")
    def _sync(self, rest: str) -> None:
        """compare lists of peers now; with a random peer."""
        self.node.sync()

    @command("/connect HOST[:PORT]", "connection")
    def _connect(self, rest: str) -> None:
        """dial a peer or a server; one that was not found by itself."""
        if not rest:
            raise ChatError("/connect wants an address, for example: /connect 192.168.1.10:40123.")
        self.view.answer(f"Dialling {self.node.connect(rest)} ...")

    @command("/passphrase", "connection")
    def _passphrase(self, rest: str) -> None:
        """type the passphrase again; of a closed room; it is not shown."""
        if not self.node.room.name:
            raise ChatError("This room is open: it has no passphrase.")
        if not self.view.has_keyboard:
            raise ChatError("There is no terminal to type it on. Start again, with another --passphrase-file.")
        self.view.ask_passphrase()

    @command("/log [LINES]", "connection")
    def _log(self, rest: str) -> None:
        """show the last lines of the log."""
        count = (rest or "20")[:9]
        if not count.isdecimal():
            raise ChatError("/log wants a number of lines, for example: /log 50.")
        self.view.answer("\n".join(list(self.view.log)[-max(1, int(count)):]) or "The log is empty.")

    @command("/search [TEXT]", "screen")
    def _search(self, rest: str) -> None:
        """find TEXT, newest first; again: the one before."""
        view, scrollback = self.view, self.view.window.scrollback
        wanted = rest or scrollback.wanted
        if not wanted:
            raise ChatError("/search wants a text to look for.")
        if view.transcript is not None and view.past.history is not None:
            scrollback.wanted = wanted
            view.past.search(wanted)
            return
        if view.transcript is not None:
            scrollback.wanted, lines = wanted, view.transcript.search(wanted)
            if not lines:
                raise ChatError(f"Nothing was found for {wanted}.")
            view.answer("\n".join(lines[-FOUND_LINES:]))
            return
        hits = scrollback.search(wanted)
        if hits and view.past.history is not None:
            view.show_found(hits[-1], "/search goes on above, End comes back.")
        elif hits:
            view.show_found(hits[-1], f"{len(hits) - 1} more above: /search goes on, End comes back.")
        elif view.past.history is not None:
            view.past.search(wanted)
        else:
            raise ChatError(f"Nothing {'more ' if scrollback.found is not None else ''}was found for {wanted}.")

    @command("/ignore [NAME]", "people")
    def _ignore(self, rest: str) -> None:
        """show nothing more from a peer; alone: who is ignored."""
        ignored = self.view.people.ignored
        if rest:
            ignored[self._peer(rest).id] = None
        self.view.answer(f"Ignored: {', '.join(map(self.node.label, ignored)) or 'nobody'}.")

    @command("/unignore NAME", "people")
    def _unignore(self, rest: str) -> None:
        """show what a peer says again."""
        ignored, wanted = self.view.people.ignored, rest.strip('"').casefold()
        found = [each for each in ignored
                 if wanted in (each.casefold(), self.node.label(each).casefold(), each.rpartition("@")[0].casefold())]
        if len(found) != 1:
            raise ChatError(f"Which one? Ignored: {', '.join(ignored)}." if ignored else "Nobody is ignored.")
        del ignored[found[0]]
        self.view.answer(f"{self.node.label(found[0])} is heard again.")

    @command("/quiet", "screen")
    def _quiet(self, rest: str) -> None:
        """show fewer joins and leaves; only of those who spoke lately; again: all."""
        self.view.is_quiet = not self.view.is_quiet
        self.view.answer(f"Joins and leaves of the silent are {'hidden' if self.view.is_quiet else 'shown'}.")

    @command("/bare", "screen")
    def _bare(self, rest: str) -> None:
        """show unbroken lines to copy; any key comes back."""
        if not self.view.on_screen:
            raise ChatError("There is no screen: the lines are unbroken already.")
        self.view.is_bare = True

    def switch(self, rest: str, name: str) -> None:
        """Switch something on or off, or say which it is."""
        if rest.lower() not in ("", "on", "off"):
            raise ChatError(f"/{name} can be on or off.")
        self.view.is_on[name] = rest.lower() == "on" if rest else self.view.is_on[name]
        self.view.answer(f"/{name} is {'on' if self.view.is_on[name] else 'off'}.")

    @command("/clear", "screen")
    def _clear(self, rest: str) -> None:
        """clear the screen; PgUp still shows what was on it."""
        self.view.window.scrollback.clear(self.node.loop.wall(), self.view.area().height)

    @command("/help [COMMAND]", "screen")
    def _help(self, rest: str) -> None:
        """list the commands; or explain one; /help keys lists the keys."""
        wanted = "/" + "".join(rest.lower().split()[:1]).lstrip("/")
        topics = help_topics(wanted)
        if topics:
            self.view.answer(topic_list(topics, self.view.answer_cols()))
            return
        found = find_command(wanted)
        also = f"\nalso  {', '.join(found.aliases)}" if found.aliases else ""
        self.view.answer(f"{found.usage}  {found.help}{also}")

    @command("/version", "connection")
    def _version(self, rest: str) -> None:
        """show which version this is."""
        python = ".".join(map(str, sys.version_info[:3]))
        self.view.answer(f"p2pchat {__version__}, Python {python} on {sys.platform}.")

    @command("/quit [TEXT]", "connection", "/exit", "/bye", "/signoff")
    def _quit(self, rest: str) -> None:
        """leave the chat; the others are told TEXT."""
        self.node.leave(rest)


class WindowCommands(Commands):
    """And those for windows and channels."""

    @command("/join #NAME", "windows", "/j")
    def _join(self, rest: str) -> None:
        """enter a channel; it is there as long as somebody is in it."""
        if not rest:
            raise ChatError("/join wants a channel, for example: /join #lab. /list shows those that are there.")
        self._go_to(self.node.join(rest if is_channel(rest) else f"#{rest}"))

    @command("/part [#NAME]", "windows", "/leave")
    def _part(self, rest: str) -> None:
        """leave a channel; that at hand, or another; its window closes."""
        view, joined = self.view, self.node.me.channels
        name = self._key(rest if is_channel(rest) else f"#{rest}") if rest else view.window.key
        if not is_channel(name):
            raise ChatError(f"Which one? You are in {', '.join(joined)}." if joined else "You are in no channel.")
        self.node.part(name)
        if name in view.windows.all:
            view.windows.close(view.windows.all[name])
        view.answer(f"You left {name}.")

    @command("/list", "windows")
    def _list(self, rest: str) -> None:
        """show the channels; and how many are in each."""
        counts = sorted(self.node.channel_counts().items(), key=lambda item: (-item[1], item[0]))
        rows = [(name, str(count), "you are in it" if name in self.node.me.channels else "") for name, count in counts]
        self.view.answer("\n".join(fit_columns([("channel", "peers", ""), *rows], self.view.answer_cols(), (2,)))
                         if rows else "There is no channel yet. /join #NAME makes one.")

    @command("/names", "windows", "/n")
    def _names(self, rest: str) -> None:
        """who is in this conversation; as /who shows it."""
        members, name = self.node.members(self.view.window.key), self.view.name_of(self.view.window.key)
        others = f"{_count(len(members), 'peer')} and you" if members else "nobody but you"
        self.view.answer("\n".join([f"{name}: {others}.", *self._table(members)]))

    @command("/query [NAME [TEXT]]", "windows")
    def _query(self, rest: str) -> None:
        """type to NAME only; in a window; /query alone: to everyone again."""
        key, text = self._split_key(rest) if rest else (EVERYONE, "")
        self._go_to(key)
        if text:
            self._send(text, key)

    @command("/window [NAME]", "windows", "/win", "/buffer")
    def _window(self, rest: str) -> None:
        """go to a window; NAME is a peer, #channel, everyone or a number; alone: list them."""
        windows = self.view.windows
        if not rest:
            news = [f"  {each.unread} new{'!' * bool(each.calls)}" * bool(each.unread) for each in windows.all.values()]
            self.view.answer("\n".join(f"{number}  {self.view.name_of(key)}{new}"
                                       for number, (key, new) in enumerate(zip(windows.all, news), 1)))
        elif rest.isdecimal():
            window = windows.numbered(int(rest[:9]))
            if window is None:
                raise ChatError(f"There is no window {rest[:9]}, but {_count(len(windows.all), 'window')}.")
            self._go_to(window.key)
        else:
            key, more = self._split_key(rest)
            self._go_to(key if not more else self._peer(rest).id)

    @command("/close", "windows", "/wc")
    def _close(self, rest: str) -> None:
        """close this window; leaves its channel, and drops what was said there."""
        window = self.view.window
        if window.key == EVERYONE:
            raise ChatError("Everyone's window stays open. /quit leaves the chat.")
        if is_channel(window.key):
            self._part("")
            return
        self.view.windows.close(window)
        if not self.view.on_screen:
            self._say_receiver()

    def _go_to(self, key: str) -> None:
        """Take a window at hand; open it if there is none."""
        windows = self.view.windows
        if is_channel(key) and key not in self.node.me.channels:
            raise ChatError(f"You are not in {key}. /join {key} enters it.")
        is_new = key not in windows.all
        window = windows.open(key)
        if window is None:
            raise ChatError(f"There are {MAX_WINDOWS} windows already: /close one.")
        windows.go_to(window)
        if is_new and window.is_private or not self.view.on_screen:
            self._say_receiver()

    def _say_receiver(self) -> None:
        view, window = self.view, self.view.window
        back = " Alt-1 goes back to everyone." if view.on_screen and window.key != EVERYONE else ""
        view.answer(f"What you type goes to {view.name_of(window.key)}{' only' * window.is_private}.{back}")


SWITCHES = {
    "bell": "ring when you are called; by name or privately",
    "notify": "note on the desktop if called; where the terminal can show one",
    "wheel": "the wheel scrolls; off: three arrow keys at once are arrow keys, for slow lines",
    "mouse": "take the mouse; its wheel scrolls the list of peers, too; Shift selects text"}
for _name, _text in SWITCHES.items():
    _enter(Command(f"/{_name}", f"/{_name} [on|off]", _text, functools.partial(Commands.switch, name=_name),
                   "screen", ()))


class Completion:
    """Completes the word before the cursor; done again, it takes the next candidate."""

    def __init__(self, view: "ChatView") -> None:
        self.view = view
        self._before = ""  # what stands before the word
        self._candidates: List[str] = []
        self._at = 0  # index of the candidate that is shown

    def complete(self, step: int, again: bool) -> None:
        """Put the first candidate in the place of the word; with `again`, go on by `step` candidates."""
        line = self.view.window.line
        if again and self._candidates:
            self._at = (self._at + step) % len(self._candidates)
        else:
            start = line.blank_before() if line.left[-1:].strip() else len(line.left)
            self._before, self._candidates, self._at = line.left[:start], self._find(line.left, start), 0
        if self._candidates:
            line.change(self._before + self._candidates[self._at], line.right)

    def _find(self, text: str, start: int) -> List[str]:
        """Return what the word at `start` can become: commands, or names, the latest speakers first."""
        view, word, before = self.view, text[start:].casefold(), text[:start].split()
        if word.startswith("/") and not before:
            return [name + " " for name in COMMANDS if name.startswith(word)]
        if before == ["/help"]:
            return [name + " " for name in (*COMMANDS, "keys") if name.lstrip("/").startswith(word.lstrip("/"))]
        if not word and not before:
            return []
        if word.startswith("#"):
            return [name + " " for name in sorted(view.node.channel_counts()) if name.startswith(word)]
        at = "@" if word.startswith("@") else ""
        end = ": " if start == 0 else " "
        spoke_at = view.people.spoke_at
        peers = sorted(view.node.present(), key=lambda peer: -spoke_at.get(peer.id, float("-inf")))
        labels = view.labels(peers)
        if before[:1] and _ALIASES.get(before[0]) is COMMANDS["/window"]:
            labels = list(dict.fromkeys([*map(view.name_of, view.windows.all), *labels]))
        return [at + label + end for label in labels if label.casefold().startswith(word[len(at):])]


class LookBack:
    """Looks for a line that was entered, by a part of it, while that part is typed."""

    def __init__(self, line: LineEditor) -> None:
        self._line = line
        self._draft = line.text  # comes back if nothing is wanted
        self.wanted = ""
        self._at: Optional[int] = None  # index of what was found in the history

    def type(self, text: str) -> None:
        """Look for a longer part."""
        self.wanted += text
        self._at = self._line.find(self.wanted, None if self._at is None else self._at + 1)

    def older(self) -> None:
        found = self._line.find(self.wanted, self._at) if self.wanted else None
        self._at = self._at if found is None else found

    def shorten(self) -> None:
        """Look for a shorter part, from the newest line on."""
        wanted, self.wanted, self._at = self.wanted[:-1], "", None
        self._line.set(self._draft)
        if wanted:
            self.type(wanted)

    def drop(self) -> None:
        self._line.set(self._draft)

    def hint(self) -> str:
        if not self.wanted:
            return "Type a part of what you entered before. Ctrl-R: an older one, Enter takes it, Esc drops it."
        return f"{'Found' if self._at is not None else 'Nothing older has'}: {_shortened(self.wanted)}"


class Keyboard:
    """What keys, typed text and pastes do."""

    def __init__(self, view: "ChatView") -> None:
        self.view = view
        self._completion = Completion(view)
        self._key = self._key_before = ""
        self._has_asked = False  # the next Enter sends even a long text
        self._look_back: Optional[LookBack] = None  # while a line that was entered is looked for

    def press(self, name: str) -> None:
        key = _KEYS.get(name)
        if key is not None and not self._press_while_looking(name):
            self._begin(name)
            key.run(self.view.window.line if key in EDIT_KEYS else self)

    def _press_while_looking(self, name: str) -> bool:
        """Go on with looking for a line, or end it; return whether that was all that the key is for."""
        looking = self._look_back
        if looking is None or name in ("focus-in", "focus-out"):
            return False
        self._begin(name)
        if name in ("ctrl-r", "backspace"):
            {"ctrl-r": looking.older, "backspace": looking.shorten}[name]()
            self.view.hint = looking.hint()
            return True
        self._look_back = None
        if name in ("esc", "ctrl-c"):
            looking.drop()
        return name in ("esc", "ctrl-c", "enter")  # what was found is not sent unseen

    def type(self, text: str) -> None:
        self._begin("")
        if self._look_back is not None:
            self._look_back.type(text)
            self.view.hint = self._look_back.hint()
        else:
            self.view.window.line.insert(text)

    def paste(self, text: str) -> None:
        """Insert what was pasted, as one message, however many lines it has."""
        self._begin("")
        self._look_back = None
        text = clean(text, newlines=True).rstrip("\n")
        lines = text.count("\n") + 1
        if len(text.encode("utf-8")) > MAX_TEXT:
            self.view.hint = f"Not pasted: it is more than the {MAX_TEXT} bytes that a message can hold."
        else:
            self.view.window.line.insert(text)
            self.view.hint = f"{lines} lines were pasted: they are one message." if lines > 1 else ""

    def _begin(self, name: str) -> None:
        """Before each key, clear what is shown only until the next key."""
        self._key_before, self._key = self._key, name
        if name not in ("focus-in", "focus-out"):
            self.view.hint = ""
            self.view.people.fresh.clear()
            self._has_asked = self._has_asked and name == "enter"

    # -- what they do ----------------------------------------------------------------------------------

    def enter(self) -> None:
        """Enter the line; if it is long, ask first."""
        view, line = self.view, self.view.window.line
        if line.is_secret:
            view.take_passphrase()
            return
        lines = line.text.count("\n") + 1
        if lines > ASK_LINES and not self._has_asked:
            self._has_asked = True
            view.hint = f"{lines} lines: Enter sends, Ctrl-C drops them."
            return
        self._has_asked = False
        view.window.scrollback.anchor = None  # to the bottom; what was found stays, for /search goes on from there
        view.past.keep_entered(line.text)
        if not view.enter(line.enter()):
            view.hint = "Up brings the line back."

    def interrupt(self) -> None:
        """Drop the line; when pressed twice, leave."""
        view, line = self.view, self.view.window.line
        if self._key_before == "ctrl-c":
            view.node.leave()
        elif line.text:
            line.move(len(line.text))
            line.cut(0)
            view.hint = "Ctrl-C again leaves. Ctrl-Y brings the line back."
        else:
            view.hint = "Ctrl-C again leaves."

    def end_input(self) -> None:
        """Leave if the line is empty, else delete a character."""
        line = self.view.window.line
        if line.text:
            line.delete(line.behind())
        else:
            self.view.node.leave()

    def look_back(self) -> None:
        self._look_back = LookBack(self.view.window.line)
        self.view.hint = self._look_back.hint()

    def complete(self, step: int) -> None:
        if not self.view.window.line.is_secret:
            self._completion.complete(step, again=self._key_before in ("tab", "shift-tab"))

    def go_to_number(self, number: int) -> None:
        self._go_to(self.view.windows.numbered(number), f"There is no window {number}. /query NAME opens one.")

    def go_beside(self, step: int) -> None:
        self._go_to(self.view.windows.beside(step), "")

    def go_to_news(self) -> None:
        self._go_to(next(iter(self.view.windows.with_news()), None), "Nothing new in another window.")

    def _go_to(self, window: Optional[Window], otherwise: str) -> None:
        """Take a window at hand, or say why there is none; but a passphrase is typed to its end."""
        if window is None:
            self.view.hint = otherwise
        elif not self.view.window.line.is_secret:
            self.view.windows.go_to(window)

    def scroll(self, rows: int) -> None:
        if rows < 0:
            self.view.past.load_above(2 * self.view.area().height - rows)
        self.view.window.scrollback.scroll(rows, self.view.area())

    def page(self, pages: int) -> None:
        """Scroll by screenfuls; one row stays on screen."""
        self.scroll(pages * max(1, self.view.area().height - 1))

    def wheel(self, value: str) -> None:
        """Scroll what the pointer is over; `value` is the rows and the pointer's column, 0 if that is not known."""
        rows, column = map(int, value.split())
        if column > self.view.area().cols:
            self.view.people.top += rows
        else:
            self.scroll(rows)

    def show_bare(self) -> None:
        self.view.is_bare = True

    def scroll_peers(self, pages: int) -> None:
        """Scroll the list of peers; drawing it keeps it within its bounds."""
        self.view.people.top += pages * max(1, self.view.area().height - 2)

    def toggle_peers(self) -> None:
        self.view.has_side = not self.view.has_side

    def to_top(self) -> None:
        self.view.past.load_above(sys.maxsize)
        self.view.window.scrollback.to_top(self.view.area())

    def to_bottom(self) -> None:
        self.view.window.scrollback.to_bottom()

    def to_end(self) -> None:
        """Go to the newest message, and to the end of the line."""
        self.to_bottom()
        self.view.window.line.move(len(self.view.window.line.text))

    def on_focus(self, has_focus: bool) -> None:
        """Note that the terminal got or lost the focus."""
        self.view.has_focus = has_focus
        if has_focus:
            self.view.unread = 0
            self.view.people.fresh.clear()
        else:
            self.view.window.scrollback.on_focus_lost()


class ChatView:
    """The model: its parts, and what they share. Interfaces hand in events, lines and keys, and draw it."""

    def __init__(self, node: PeerNode, clock: Clock, transcript: Optional[Transcript] = None,
                 day: Clock = lambda when: "", history: Optional[History] = None) -> None:
        self.node = node
        self.clock, self._day = clock, day
        self.transcript = transcript  # where there is no screen
        self.on_screen = transcript is None
        self.has_keyboard = self.on_screen  # so something can be typed that is not shown
        self._draft: Optional[LineEditor] = None  # the line that waits while a passphrase is typed
        self.rows, self.cols = 24, 80
        self.people = People()
        self.past = Past(self, history)
        self.windows = Windows(self._make_window)
        self.outgoing = Outgoing()
        self.lost: List[str] = []  # what was said while leaving: the screen is gone soon
        self.log: Deque[str] = collections.deque(maxlen=500)
        self.refused = 0  # lines that could not be done
        self.hint = ""  # is shown above the input line until the next key
        self.has_side = True  # the list of peers is shown
        self.is_quiet = False  # joins and leaves of peers that have not spoken lately are hidden
        self.is_bare = False  # messages are shown as unbroken lines, until the next key
        self.is_on = {"bell": True, "notify": False, "wheel": True, "mouse": False}
        self.has_rung = False  # the interface has yet to ring the bell
        self.note = ""  # what the interface has yet to show on the desktop
        self.has_focus = True
        self.unread = 0  # messages that came while the terminal did not have the focus
        self.on_answer: Callable[[str, str], None] = lambda text, kind: None
        self.on_change: Callable[[], None] = lambda: None  # is called when something changes by itself
        self.keyboard = Keyboard(self)
        self.commands = WindowCommands(self)
        self.enter = self.commands.enter
        self.handle = Narrator(self).handle  # takes in the events of one turn

    def _make_window(self, key: str) -> Window:
        window = Window(key, Scrollback(self.clock, self._day, self.node.label))
        peer = self.node.peers.get(key)
        window.peer_key = peer.key if peer is not None else ""
        self.past.fill(window)
        return window

    @property
    def window(self) -> Window:
        """The one at hand."""
        return self.windows.current

    def window_of(self, key: str) -> Window:
        """Return the window of a conversation; everyone's, if too many are open, or if there is no screen."""
        window = self.windows.all.get(key) or (self.windows.open(key) if self.on_screen else None)
        return window or self.windows.all[EVERYONE]

    def name_of(self, key: str) -> str:
        """Return what the user calls a conversation."""
        return "everyone" if key == EVERYONE else self.node.label(key)

    def ask_passphrase(self) -> None:
        """What is typed next is the passphrase: it is neither shown nor kept among the lines that were entered."""
        self._draft, self.window.line = self.window.line, LineEditor(is_secret=True)
        self.hint = "Enter takes it; an empty one changes nothing."

    def take_passphrase(self) -> None:
        """The passphrase was typed."""
        assert self._draft is not None
        text, self.window.line = self.window.line.text, self._draft
        if not text:
            self.answer("The passphrase stays as it was.")
            return
        try:
            self.node.finder.change_passphrase(text)
        except ChatError as error:
            self.refuse(str(error))
            return
        self.answer("The passphrase is another now: peers are dialled again. Links that are open stay.")

    def refuse(self, why: str) -> None:
        """Say why something could not be done."""
        self.refused += 1
        self.answer(why, "error")

    def add(self, kind: str, text: str, style: str = "", sender: str = "", to: str = "", own: bool = False,
            window: Optional[Window] = None) -> Optional[Entry]:
        """Show a message or a notice, in the window at hand or another one; `sender` and `to` are labels. Return its
        entry, if there is a screen."""
        now = self.node.loop.wall()
        if self.transcript is None:
            self.windows.on_added(len(text))
            return (window or self.window).scrollback.add(now, kind, text, style, sender, to)
        self.transcript.add(now, kind, text, sender, to, own)
        return None

    def notice(self, text: str, kind: str = "notice", window: Optional[Window] = None) -> None:
        """Say something that nobody said."""
        self.add(kind, text, {"notice": "dim", "error": "error"}.get(kind, ""), window=window)

    def answer(self, text: str, kind: str = "answer") -> None:
        """Answer the user. An answer that is longer than the screen is shown from its beginning."""
        self.notice(text, kind)
        if self.on_screen:
            scrollback, area = self.window.scrollback, self.area()
            scrollback.pass_over(scrollback.entries[-1])
            scrollback.go_to((scrollback.next - 1, area.height - 1), area)
        self.on_answer(text, kind)

    def show_found(self, entry: Entry, hint: str) -> None:
        """Show what a search has found in the window at hand."""
        scrollback, area, day = self.window.scrollback, self.area(), self._day(entry.added_at)
        scrollback.found = entry.seq
        scrollback.go_to(scrollback.moved((entry.seq, 0), area.height // 2, area.cols), area)  # below the middle
        self.hint = hint if day == self._day(self.node.loop.wall()) else f"{day}: {hint}"

    def title(self) -> str:
        return (f"({self.unread}) " if self.unread else "") + f"{self.node.me.username} - p2pchat"

    def labels(self, peers: Iterable[Peer]) -> List[str]:
        return [self.node.label(peer.id) for peer in peers]

    def answer_cols(self) -> int:
        """Return how many columns the text of an answer has; without a screen there is no limit."""
        return self.area().cols - (8 if self.cols >= TIME_COLS else 2) if self.on_screen else sys.maxsize

    def area(self) -> Layout:
        """Return the size of the part of the screen that shows messages, among others."""
        return layout(self, self.rows, self.cols)

    def is_in_sight(self, receipts: Receipts) -> bool:
        """Whether the message that these belong to is on screen, and so is what became of it."""
        scrollback = self.window.scrollback
        return self.on_screen and receipts.window is self.window and scrollback.is_on_screen(receipts.seq, self.area())


# -- the start form ------------------------------------------------------------------------------------


class StartForm:
    """What is asked before the chat begins: the name, the server, the passphrase of a closed `room`. Each row is edited
    like the chat's input line."""

    def __init__(self, name: str, server: str, port: str, room: str = "") -> None:
        self.name, self.server, self.passphrase = LineEditor(name), LineEditor(server), LineEditor("", is_secret=True)
        none = "(none: whoever is found on this network)"
        self.fields = [("Name", self.name, ""), ("Server", self.server, none)]  # label, line, and for an empty one
        if room:
            self.fields.append(("Passphrase", self.passphrase, "(not shown; Enter alone makes one up)"))
        self.room = room
        self.label_cols = 12 if room else 8
        self.port = port
        self.at = 0  # index of the field that is being written
        self.message = ""
        self.is_busy = False  # a server is being tried: nothing is typed meanwhile

    @property
    def line(self) -> LineEditor:
        return self.fields[self.at][1]

    def press(self, name: str) -> None:
        """Go to another field, or edit this one."""
        key = _KEYS.get(name)
        if self.is_busy:
            return
        if name in ("tab", "down"):
            self.at = (self.at + 1) % len(self.fields)
        elif name in ("shift-tab", "up"):
            self.at = (self.at - 1) % len(self.fields)
        elif name == "end":
            self.line.move(len(self.line.text))
        elif key in EDIT_KEYS and name not in ("alt-enter", "ctrl-j"):
            key.run(self.line)

    def type(self, text: str) -> None:
        """Insert what was typed or pasted."""
        if not self.is_busy:
            self.line.insert(clean(text.strip("\r\n")))

    paste = type


def render_form(form: StartForm, rows: int, cols: int) -> Screen:
    """Draw the form. A small screen shows the field that is being written, then the message, then the rest."""
    ranked: List[Tuple[int, Line]] = [(6, [Span(" p2pchat: chat for everyone on this network", "bold")]), (6, [])]
    column = 0
    for at, (label, line, placeholder) in enumerate(form.fields):
        prompt = f" {label.ljust(form.label_cols)}" if cols >= 2 * form.label_cols else ""
        texts, (row, place) = flow(prompt, *line.shown, cols)
        text = Span(texts[row if at == form.at else 0])
        ranked.append((0 if at == form.at else 2, [text, Span("" if line.text else placeholder, "dim")]))
        column = place if at == form.at else column
    keys = "Enter starts, Ctrl-C leaves, Esc goes on without a server, Tab goes to the other field."
    for label, value in [("Port", form.port)] + [("Room", f"{form.room}, which is closed")] * bool(form.room):
        ranked.append((5, [Span(f" {label.ljust(form.label_cols)}{value}", "dim")]))
    ranked.append((5, []))
    ranked += [(1, [Span(f" {text}", "error")]) for text in wrap(form.message, max(1, cols - 1)) if form.message]
    ranked += [(7, [])] + [(4, [Span(f" {text}", "dim")]) for text in wrap(keys, max(1, cols - 1))]
    shown = sorted(sorted(range(len(ranked)), key=lambda at: ranked[at][0])[:rows])  # high ranks are left out first
    lines = [clip(ranked[at][1], cols) for at in shown]
    blank: Line = []
    return Screen(lines + [blank] * (rows - len(lines)), (shown.index(2 + form.at), column))


# ======================================================================================================
# Interfaces
#
# Three thin shells around the chat view: a curses screen, plain lines, JSON lines. Each hands events and what
# its user types to the view, and turns what changed into output. None has a loop of its own, and none ever
# waits: input is read when it is there, in portions that leave time for the network; output is written as far
# as it is taken; a timer draws the screen while something has changed. Curses only draws: keys are decoded
# here, from bytes. However it ends, the terminal is put back as it was.
# ======================================================================================================

FRAME = 1 / 30  # seconds between two drawings: faster than anybody reads
REDRAW_INTERVAL = 5.0  # seconds: what the list of peers shows also changes without an event
ESCAPE_TIME = 0.025  # seconds after which an ESC that nothing followed is the Esc key
WHEEL_KEYS = 3  # equal arrow keys in one read are a notch of the wheel
WHEEL_ROWS = 3  # that a notch scrolls where the terminal tells of the mouse itself
MAX_PASTE = 4 * MAX_TEXT  # characters of a paste that are kept
PIPE_SIZE = 64 * 1024  # bytes read or written at a time: a pipe holds no more
SAFE_WRITE = 4096 if sys.platform == "linux" else 512  # bytes that a pipe or terminal takes whenever it is ready
INPUT_TIME = 0.006  # seconds of a turn for lines of input: the others wait for the next turn
INPUT_LINES = 64  # lines of input that are sent together, if that makes no more than MAX_DELIVERIES
INPUT_PORTION = 64 * 1024  # bytes of them, on the wire: a few of the longest texts
INPUT_ROOM = 512 * 1024  # bytes of a turn: what a turn adds to MAX_SENDING still fits an outbox
MAX_UNREAD = 64 * 1024 * 1024  # bytes of output kept for a program that does not read them
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

PRESS, TEXT, PASTE, WHEEL = "press", "text", "paste", "wheel"  # what a KeyReader makes of bytes
Press = Tuple[str, str]

# What follows ESC: an escape sequence's last character, for ~ with its number.
_SEQUENCES = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end", "M": "enter",
              "I": "focus-in", "O": "focus-out", "Z": "shift-tab", "1~": "home", "3~": "delete", "4~": "end",
              "5~": "pgup", "6~": "pgdn", "7~": "home", "8~": "end", "15~": "f5", "17~": "f6", "20~": "f9",
              "21~": "f10", "23~": "f11", "24~": "f12"}
_WHEEL = {"<64": -WHEEL_ROWS, "<65": WHEEL_ROWS}
_MODIFIERS = {"2": "shift-", "3": "alt-", "5": "ctrl-", "7": "ctrl-"}
_CONTROLS = {"\x1f": "ctrl-_", "\r": "enter", "\n": "ctrl-j", "\t": "tab", "\x7f": "backspace", "\x08": "backspace"}
_TERMINFO_KEYS = {"kcuu1": "up", "kcud1": "down", "kcuf1": "right", "kcub1": "left", "khome": "home",
                  "kend": "end", "kpp": "pgup", "knp": "pgdn", "kdch1": "delete", "kcbt": "shift-tab"}
_PASTE_START, _PASTE_END = "\x1b[200~", "\x1b[201~"
_PRESS = re.compile(r"""  # what is complete; what matches none of these has to wait for more
    (?P<text> [^\x00-\x1f\x7f]+ )
  | \x1b? \x1b\[\[ .  # a function key of the Linux console
  | (?P<alt> \x1b? ) \x1b (?: O | (?!\[\[) \[ (?P<number> [\x20-:<-?]* ) ;? (?P<held> [\x20-?]* ) (?= [^\x20-?] ) )
    (?P<final> . )  # a key's sequence; some terminals send another ESC before it for Alt
  | (?P<meta> \x1b? ) (?P<one> [^\x1b\[O] )  # a control character, or a character with Alt
  | (?P<esc> \x1b ) (?= \x1b [^\[O] )
""", re.DOTALL | re.VERBOSE)


class KeyReader:
    """Turns the bytes that a terminal sends into keys, typed text and pastes, however the bytes are cut."""

    def __init__(self, known: Optional[Dict[str, str]] = None) -> None:
        self._known = known or {}  # this terminal's own sequences
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""
        self.has_brackets = False  # whether this terminal marks what was pasted

    @property
    def is_waiting(self) -> bool:
        """Whether the meaning of the last bytes depends on what comes next."""
        return bool(self._rest) and not self._rest.startswith(_PASTE_START)

    def feed(self, data: bytes) -> List[Press]:
        """Take in bytes; return what they mean."""
        self._rest += self._decode(data)
        presses: List[Press] = []
        while self._rest:
            size = self._paste(presses) if self._rest.startswith(_PASTE_START) else self._press(presses)
            if not size:
                break
            self._rest = self._rest[size:]
        return presses

    def flush(self) -> List[Press]:
        """Nothing came: what waits is the Esc key, and what was typed after it."""
        rest, self._rest = self._rest, ""
        return [(PRESS, "esc")] + ([(TEXT, rest[1:])] if rest[1:].isprintable() and rest[1:] else [])

    def _paste(self, presses: List[Press]) -> int:
        """Take a paste; return its length, 0 if its end has not come. Of too long a one, only the beginning is kept."""
        self.has_brackets = True
        text, end, _ = self._rest[len(_PASTE_START):].partition(_PASTE_END)
        if end:
            presses.append((PASTE, text[:MAX_PASTE]))
            return len(_PASTE_START) + len(text) + len(end)
        most = len(_PASTE_START) + MAX_PASTE
        self._rest = self._rest[:most] + self._rest[most:][1 - len(_PASTE_END):]
        return 0

    def _press(self, presses: List[Press]) -> int:
        """Take one key or a run of text; return its length, 0 if it is not complete."""
        for sequence, name in self._known.items():
            if self._rest.startswith(sequence):
                presses.append((PRESS, name))
                return len(sequence)
        found = _PRESS.match(self._rest)
        if found is None:
            return len(self._rest) if len(self._rest) > 64 else 0  # no key is that long
        text, number, final, one = found.group("text", "number", "final", "one")
        name = ""
        if text:
            presses.append((TEXT, text))
        elif number and number[0] == "<":  # the mouse: only its wheel counts
            column = found["held"].partition(";")[0]
            if number in _WHEEL and column.isdecimal() and len(column) < 6:
                presses.append((WHEEL, f"{_WHEEL[number]} {column}"))
        elif final:
            name = _SEQUENCES.get((number or "") + final if final == "~" else final, "")
            name = name and _MODIFIERS.get(found["held"], "") + name
        elif one:
            name = _CONTROLS.get(one) or (one.lower() if one >= " " else "ctrl-" + chr(ord(one) + 96))
        elif found["esc"]:
            name = "esc"
        if name:
            presses.append((PRESS, "alt-" + name if found["alt"] or found["meta"] else name))
        return found.end()


def with_wheel(presses: List[Press]) -> List[Press]:
    """Arrow keys that came in one piece are the wheel: terminals send them to programs that do not take the mouse."""
    found: List[Press] = []
    for press, run in itertools.groupby(presses):
        keys, step = list(run), {(PRESS, "up"): -1, (PRESS, "down"): 1}.get(press)
        found += [(WHEEL, f"{step * len(keys)} 0")] if step and len(keys) >= WHEEL_KEYS else keys
    return found


def without_burst(presses: List[Press]) -> List[Press]:
    """Three lines at once with no editing key were pasted, in a terminal that does not mark pastes: make them one."""
    plain = {(PRESS, "enter"): "\n", (PRESS, "ctrl-j"): "\n", (PRESS, "tab"): "\t"}
    edited = any(kind != TEXT and (kind, value) not in plain for kind, value in presses)
    if edited or presses.count((PRESS, "enter")) < 3:
        return presses
    return [(PASTE, "".join(plain.get(press, press[1]) for press in presses))]


def complain(why: object, status: int = 1) -> int:
    """Say in a line on stderr what is wrong; return the exit status that says so, too."""
    sys.stderr.write(f"p2pchat: {why}\n")
    return status


class LogTail(logging.Handler):
    """Keeps the last lines of the log, for /log. What is critical is told to the user at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.lines: Deque[str] = collections.deque(maxlen=500)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.CRITICAL:
            self._tell(record.getMessage())
        self.lines.append(f"{show_time(record.created)}:{int(record.created) % 60:02} {clean(record.getMessage())}")


def show_time(when: float) -> str:
    """Return hours and minutes of a Unix time."""
    return _time_and_day(int(when // 60))[0]


def show_day(when: float) -> str:
    return _time_and_day(int(when // 60))[1]


def show_date(when: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(when))


@functools.lru_cache(maxsize=64)
def _time_and_day(minute: int) -> Tuple[str, str]:
    when = time.localtime(minute * 60)
    return time.strftime("%H:%M", when), time.strftime("%A, %d %B %Y", when)


def read_input(size: int) -> bytes:
    """Read from standard input; return nothing at its end, or if that can't be done."""
    try:
        return os.read(0, size)
    except OSError:
        return b""


class Interface:
    """What the three have in common. A `failure` is a bug of ours; it ends the program in an orderly way."""

    transcript: Optional[Transcript] = None  # of an interface without a screen
    shows_past = False  # the end of the history is printed at the start
    keys_size = PIPE_SIZE  # bytes of a turn that are typed or pasted

    def __init__(self, loop: Loop, settings: Settings, room: Optional[Room] = None) -> None:
        """`room` is a closed one; the form asks for its passphrase if that is empty."""
        self.loop = loop
        self.settings = settings
        self.room = room
        self.log = LogTail(self.tell)
        self.failure: Optional[BaseException] = None
        self.node: Optional[PeerNode] = None
        self.history: Optional[History] = None
        self.view: ChatView

    def run(self) -> int:
        """Chat until somebody leaves; return the exit status."""
        log.addHandler(self.log)
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        try:
            self.chat()
        except RoomError as error:
            return complain(error)
        except Exception as error:
            if isinstance(error, OSError) and self.node is not None and not self.node.me.port:
                return complain(port_problem(self.settings.host, self.settings.port, error))
            self.failure = error
        finally:
            unwritten = self.history.close() if self.history is not None else 0
            if unwritten:
                complain(f"{_count(unwritten, 'message')} could not be written to the history: it is in use")
            log.removeHandler(self.log)
            self.loop.close()
        return self.status() if self.failure is None else complain(self._report(self.failure))

    def chat(self) -> None:
        """Set up, run the loop, clean up."""
        raise NotImplementedError

    def status(self) -> int:
        """Return the exit status if there was no failure."""
        return 0

    def start_node(self, settings: Settings) -> None:
        """Start a node and its view. Raises OSError if the port can't be had."""
        self.node = node = PeerNode(self.loop, settings, lambda events: self.guard(self.on_events, node, events),
                                    room=self.room)
        if self.history is None and settings.history is not None:
            self.history = History(self.loop, settings.history)
            self.history.open()
        self.view = ChatView(node, show_time, self.transcript, show_day, self.history)
        self.view.log = self.log.lines
        self.view.on_change = lambda: self.guard(self.changed)
        if self.history is not None:
            self.history.listen(node, self.view.people.ignored)
            node.recall.is_known = self.history.knows
        if self.shows_past:
            self.view.past.print_last()
        node.start()

    def on_events(self, node: PeerNode, events: List[Event]) -> None:
        """Show what happened at the node in one turn."""
        raise NotImplementedError

    def guard(self, call: Callable[..., None], *args: Any) -> None:
        """Make a call. Its failure ends the program: the loop would blame the connection that led to it."""
        try:
            call(*args)
        except Exception as error:
            self.failure = error
            self.loop.stop()

    def listen_for_signals(self) -> None:
        """Leave when a signal asks for it."""
        for number in _ENDING:
            self.loop.on_signal(number, self.interrupt if number == signal.SIGINT else self.leave)

    def tell(self, text: str) -> None:
        if self.node is not None:
            self.node.emit({"event": "notice", "text": f"{text}.", "error": True})

    def leave(self) -> None:
        """Say goodbye, and end when that is done."""
        if self.node is None:
            self.loop.stop()
        else:
            self.node.leave()

    def interrupt(self) -> None:
        """Leave; the second time, wait for nothing more; the third time, end at once."""
        if self.node is None or self.node.stopping:
            self.loop.stop()
        elif self.node.leaving:
            self.node.depart()
        else:
            self.leave()

    def run_on(self, terminal: Any) -> None:
        """Run the loop. Meanwhile the terminal is ours, but not while this program is suspended."""
        self.terminal = terminal
        self.loop.on_signal(signal.SIGTSTP, self.suspend)
        self.loop.on_signal(signal.SIGCONT, self.on_continue)
        self.loop.watch(0, self._on_typed)
        try:
            terminal.resume()
            self.loop.run()
        finally:
            terminal.suspend()

    def _on_typed(self) -> None:
        data = read_input(self.keys_size)
        if data:
            self.on_keys(data)
        else:  # the terminal is gone
            self.loop.unwatch(0)
            self.leave()

    def on_keys(self, data: bytes) -> None:
        """Do what keys say."""
        raise NotImplementedError

    def suspend(self) -> None:
        """Stop, as Ctrl-Z asks. The terminal is put back before, so it is in order even if we never go on."""
        self.terminal.suspend()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(0, signal.SIGTSTP)
        self.loop.on_signal(signal.SIGTSTP, self.suspend)
        self.on_continue()

    def on_continue(self) -> None:
        self.terminal.resume()
        self.changed()

    def changed(self, by_user: bool = False) -> None:
        """Show what has changed."""

    def _report(self, failure: BaseException) -> str:
        """Return one line: what happened, and which file says more."""
        import tempfile
        import traceback
        log.error("[P2P] an error in the program", exc_info=failure)
        path = self.settings.log_file
        if not path:
            descriptor, path = tempfile.mkstemp(prefix="p2pchat-", suffix=".log")
            with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write("\n".join(self.log.lines) + "\n")
                file.write("".join(traceback.format_exception(type(failure), failure, failure.__traceback__)))
        what = f"{type(failure).__name__}: {clean(str(failure))}"
        return f"an error in the program: {what}; the log is in {path}"


# -- the screen -----------------------------------------------------------------------------------------


_NO_TITLE = ("linux", "vt", "ansi", "cons", "sun")  # beginnings of TERM: terminals without a title


def move_to(row: int, column: int) -> str:
    """Return the sequence that moves the cursor."""
    return f"\x1b[{row + 1};{column + 1}H"


def emoji_over(line: Line, row: int, cols: int, sgr: Callable[[str], str]) -> str:
    """Return what draws the unsteady emoji of a row over what stands for them.

    A terminal that joins the parts needs two columns for an emoji. Another one draws the parts side by side, over what
    stands behind them. So each is followed by a move of the cursor, and by what belongs there: then both show the
    same row, the other terminal only the first part. Where the parts have no room in the row, they would go on in the
    next one: the emoji is left as it is."""
    pieces: List[str] = []
    column = spoilt = 0  # columns up to `spoilt` may hold parts
    for text, style in line:
        for cluster in graphemes(text):
            end = column + most_columns(cluster)
            if is_unsteady(cluster) and end <= cols:
                pieces.append(move_to(row, column) + sgr(style) + cluster)
                spoilt = max(spoilt, end)
            elif column < spoilt:
                pieces.append(move_to(row, column) + sgr(style) + steady(cluster))
            column += glyph(cluster)[1]
    if column < spoilt:
        pieces.append(f"{move_to(row, column)}\x1b[m" + " " * (spoilt - column))
    return "".join(pieces)


class Terminal:
    """The terminal while it shows our screen. suspend() puts it back as it was."""

    # Modes, each as what switches it on and what puts it back. Terminals that do not know one ignore it. The wheel's
    # (alternate scroll) is saved and restored: it may have been on before.
    _MODES = {"paste": ("\x1b[?2004h", "\x1b[?2004l"), "focus": ("\x1b[?1004h", "\x1b[?1004l"),
              "wheel": ("\x1b[?1007s\x1b[?1007h", "\x1b[?1007r"),
              "mouse": ("\x1b[?1000h\x1b[?1006h", "\x1b[?1006l\x1b[?1000l"),
              "title": ("\x1b[22;2t", "\x1b[23;2t")}
    _ASCII = str.maketrans("✗●○◐→…─│·◌", "x*o%>~-|-o")

    def __init__(self) -> None:
        import curses
        import locale
        import termios
        self._curses: Any = curses
        self._termios: Any = termios
        for name in ("", "C.UTF-8", "C"):  # the first one may not be installed here
            try:
                locale.setlocale(locale.LC_CTYPE, name)
                break
            except locale.Error:
                continue
        self._utf8 = locale.nl_langinfo(locale.CODESET).upper().replace("-", "") == "UTF8"
        self._before = termios.tcgetattr(0)
        self._window: Any = None
        self._styles: Dict[str, int] = {}
        self._modes: Dict[str, bool] = {}  # those that this terminal can have; whether they are on
        self._with_emoji: Dict[int, Line] = {}  # rows on screen over which emoji were drawn
        self._title = ""
        curses.setupterm()
        if (curses.tigetstr("cup") or b"").startswith(b"\x1b["):
            self._modes = {"paste": True, "focus": True, "wheel": True, "mouse": False}
            if not os.environ.get("TERM", "").startswith(_NO_TITLE):
                self._modes["title"] = True

    def resume(self) -> None:
        """Take the screen, for the first time or again."""
        if self._window is None:
            self._window = self._curses.initscr()
            self._make_styles()
        for call in (self._curses.raw, self._curses.noecho, self._curses.nonl):
            self._quietly(call)
        self._quietly(self._curses.typeahead, -1)  # curses reads no keys, and so need not look for them
        self._write("".join(self._MODES[mode][0] for mode, is_on in self._modes.items() if is_on))
        self._title = ""
        self.resize()

    def suspend(self) -> None:
        """Give the terminal back; harmless if that was done before."""
        self._write("".join(self._MODES[mode][1] for mode, is_on in self._modes.items() if is_on))
        self._quietly(self._curses.endwin)
        self._quietly(self._termios.tcsetattr, 0, self._termios.TCSADRAIN, self._before)

    def resize(self) -> None:
        """Ask for the size, which may be another one, and draw everything anew."""
        try:
            cols, rows = os.get_terminal_size(0)
        except OSError:
            cols = rows = 0
        if rows and cols:
            self._quietly(self._curses.resizeterm, rows, cols)
        self._window.clear()
        self._with_emoji = {}

    def _quietly(self, call: Callable[..., Any], *args: Any) -> None:
        """Make a call that may fail: the terminal is a poor one, or gone, which is noticed elsewhere."""
        try:
            call(*args)
        except (OSError, self._curses.error, self._termios.error):
            pass

    def size(self) -> Tuple[int, int]:
        """(rows, columns)."""
        rows, cols = self._window.getmaxyx()
        return int(rows), int(cols)

    def keys(self) -> Dict[str, str]:
        """Return the sequences that this terminal sends for its keys."""
        found = {self._curses.tigetstr(name): key for name, key in _TERMINFO_KEYS.items()}
        return {code.decode("latin-1"): key for code, key in found.items() if code and len(code) > 1}

    def _write(self, text: str) -> None:
        """Write past curses what moves no cursor."""
        self._quietly(os.write, 1, text.encode("utf-8" if self._utf8 else "ascii", "replace"))

    def set_mode(self, mode: str, is_on: bool) -> None:
        if self._modes.get(mode, is_on) != is_on:
            self._modes[mode] = is_on
            self._write(self._MODES[mode][0 if is_on else 1])

    def set_title(self, title: str) -> None:
        if "title" in self._modes and title != self._title:
            self._title = title
            self._write(f"\x1b]2;{self._drawable(title)}\x07")

    def notify(self, text: str) -> None:
        """Ask for a note on the desktop, in the way that this terminal understands."""
        if "title" in self._modes:
            knows_777 = os.environ.get("TERM", "").startswith(("rxvt", "foot")) or "VTE_VERSION" in os.environ
            self._write(f"\x1b]{'777;notify;p2pchat;' if knows_777 else '9;p2pchat: '}{self._drawable(text)}\x07")

    def beep(self) -> None:
        self._curses.beep()

    def draw_bare(self, lines: List[str]) -> None:
        """Show lines that the terminal itself breaks, so that it copies them whole."""
        self._window.clear()
        self._quietly(self._window.refresh)
        self._write("\r\n".join(map(self._drawable, lines)))

    def draw(self, screen: Screen) -> None:
        """Show a screen. Curses sends only what has changed."""
        self._window.erase()
        for row, line in enumerate(screen.lines):
            self._quietly(self._draw_row, row, line)  # fails behind the last cell, but draws it
        self._quietly(self._window.move, *screen.cursor)  # the terminal may be smaller by now
        self._quietly(self._window.refresh)
        if self._modes and self._utf8:
            self._draw_emoji(screen)

    def _draw_emoji(self, screen: Screen) -> None:
        """Draw the emoji, past curses, over what it drew for them: in rows that have changed."""
        rows = {row: line for row, line in enumerate(screen.lines) if any(_MAY_BE_UNSTEADY(text) for text, _ in line)}
        before, self._with_emoji = self._with_emoji, rows
        text = "".join(emoji_over(line, row, self.size()[1], self._sgr) for row, line in rows.items()
                       if before.get(row) != line)
        if text:
            self._write(f"{text}\x1b[m{move_to(*screen.cursor)}")  # curses takes the cursor to be there

    def _sgr(self, style: str) -> str:
        """Return the sequence that switches a style on."""
        curses, value = self._curses, self._styles.get(style, 0)
        bits = ((curses.A_BOLD, 1), (curses.A_DIM, 2), (curses.A_UNDERLINE, 4), (curses.A_REVERSE, 7))
        codes = "".join(f";{code}" for bit, code in bits if value & bit)
        if value & curses.A_COLOR:
            codes += f";38;5;{curses.pair_content(curses.pair_number(value))[0]}"
        return f"\x1b[0{codes}m"

    def _draw_row(self, row: int, line: Line) -> None:
        self._window.move(row, 0)
        for text, style in line:
            self._window.addstr(self._drawable(steady(text)), self._styles.get(style, 0))

    def _drawable(self, text: str) -> str:
        """Return a text in characters that the locale has, at the same width."""
        if self._utf8 or text.isascii():
            return text
        clusters = (cluster.translate(self._ASCII) for cluster in graphemes(text))
        return "".join(cluster if cluster.isascii() else "?" * width(cluster) for cluster in clusters)

    def _make_styles(self) -> None:
        """Choose what the styles look like: in colour if there is any, but never by colour alone."""
        curses, styles = self._curses, self._styles
        bold = curses.A_BOLD
        styles.update(dim=curses.A_DIM, bold=bold, bar=curses.A_REVERSE, rule=bold, error=bold, private=bold,
                      mention=bold | curses.A_UNDERLINE, found=curses.A_REVERSE, called=curses.A_REVERSE | bold)
        try:
            curses.start_color()
            curses.use_default_colors()
            many = curses.COLORS >= 256  # some of them can be read on white and on black
            nicks = (31, 64, 97, 130, 132, 166, 29, 161) if many else (1, 2, 5, 6, 1, 2, 5, 6)
            for pair, colour in enumerate((*nicks, 1, 5, 3 if not many else 172), 1):
                curses.init_pair(pair, colour, -1)
        except (curses.error, ValueError):
            return
        styles.update((f"nick{at}", curses.color_pair(at + 1)) for at in range(NICK_STYLES))
        for pair, style in enumerate(("error", "private", "mention"), NICK_STYLES + 1):
            styles[style] |= curses.color_pair(pair)


class CursesInterface(Interface):
    """The screen. As long as there is a form, it is shown in place of the chat."""

    def __init__(self, loop: Loop, settings: Settings, room: Optional[Room] = None) -> None:
        super().__init__(loop, settings, room)
        self.form: Optional[StartForm] = None
        self._next: Optional[Settings] = None  # of the next node, which starts when this one has stopped
        self._frame = Timer()
        self._still = Timer()  # nothing was drawn for a while
        self._drawn_at = 0.0
        self._escape = Timer()

    def chat(self) -> None:
        if self.settings.username is None:
            server = self.settings.server
            port = str(self.settings.port) if self.settings.port else "chosen by the system"
            room = self.room.name if self.room is not None and not self.room.passphrase else ""
            self.form = StartForm(login_name(), f"{server[0]}:{server[1]}" if server else "", port, room)
        else:
            self.start_node(self.settings)
        terminal = Terminal()
        self._keys = KeyReader(terminal.keys())
        self.listen_for_signals()
        self.loop.on_signal(signal.SIGWINCH, self._on_resize)
        self.changed()
        self.run_on(terminal)
        lost = self.view.lost if self.node is not None else []
        more = [f"and {_count(len(lost) - 5, 'message')} more"] if len(lost) > 5 else []
        for line in lost[:5] + more:
            complain(line)

    # -- out -------------------------------------------------------------------------------------------

    def on_events(self, node: PeerNode, events: List[Event]) -> None:
        if node is not self.node:
            return  # with another name or server from the form, there is another node
        self.view.handle(events)
        for event in events:
            if event["event"] == "server" and self.form is not None and self.form.is_busy:
                self._on_server_tried(self.form, event)
            elif event["event"] == "stopped" and self._next is None:
                self.loop.stop()
            elif event["event"] == "stopped":
                self._launch()
        self.changed()

    @property
    def is_bare(self) -> bool:
        """Whether messages are shown as unbroken lines in place of the screen."""
        return self.form is None and self.view.is_bare

    def changed(self, by_user: bool = False) -> None:
        """Draw: in the next turn what the user did, else when the frame before was shown long enough."""
        if self.is_bare and not by_user:
            return  # drawing would drop what is selected
        if by_user:
            self._frame.cancel()
        if not self._frame.active:
            wait = 0.0 if by_user else max(0.0, self._drawn_at + FRAME - self.loop.now())
            self._frame = self.loop.call_later(wait, self.guard, self._draw)

    def _draw(self) -> None:
        rows, cols = self.terminal.size()
        if self.is_bare:
            self.terminal.draw_bare(render_bare(self.view, rows, cols))
            return
        if self.form is not None:
            screen = render_form(self.form, rows, cols)
        else:
            self.view.rows, self.view.cols = rows, cols
            screen = render(self.view, rows, cols)
            self._ask_for_attention()
        self.terminal.draw(screen)
        self._drawn_at = self.loop.now()
        self._still.cancel()
        self._still = self.loop.call_later(REDRAW_INTERVAL, self.changed)
        if not screen.is_complete:
            self.changed()

    def _ask_for_attention(self) -> None:
        """Tell the terminal what it shows outside of its screen."""
        view = self.view
        self.terminal.set_mode("mouse", view.is_on["mouse"])
        self.terminal.set_mode("wheel", view.is_on["wheel"])
        self.terminal.set_title(view.title())
        if view.has_rung:
            self.terminal.beep()
        if view.note:
            self.terminal.notify(view.note)
        view.has_rung, view.note = False, ""

    # -- in --------------------------------------------------------------------------------------------

    def on_keys(self, data: bytes) -> None:
        self._escape.cancel()
        presses = self._keys.feed(data)
        if self.form is None and self.view.is_on["wheel"]:
            presses = with_wheel(presses)
        self._press(presses if self._keys.has_brackets else without_burst(presses))
        if self._keys.is_waiting:
            self._escape = self.loop.call_later(ESCAPE_TIME, self.guard, lambda: self._press(self._keys.flush()))

    def _press(self, presses: List[Press]) -> None:
        if self.is_bare:
            self._press_in_bare(presses)
            return
        for kind, value in presses:
            if kind == PRESS and value == "ctrl-l":
                self.terminal.resize()
            elif kind == PRESS and value == "ctrl-z":
                self.suspend()
            elif self.form is not None and kind == PRESS and value in ("ctrl-c", "ctrl-d", "esc", "enter"):
                self._press_in_form(self.form, value)
            elif kind == PRESS and value == "ctrl-c" and self.node is not None and self.node.leaving:
                self.interrupt()
            elif kind == WHEEL:
                if self.form is None:
                    self.view.keyboard.wheel(value)
            else:
                keyboard = self.form or self.view.keyboard
                {PRESS: keyboard.press, TEXT: keyboard.type, PASTE: keyboard.paste}[kind](value)
        self.changed(by_user=True)

    def _press_in_bare(self, presses: List[Press]) -> None:
        """Any key comes back; the focus changes while text is being copied."""
        for press in presses:
            if press in ((PRESS, "focus-in"), (PRESS, "focus-out")):
                self.view.keyboard.press(press[1])
            elif self.is_bare:
                self.view.is_bare = False
                self._on_resize()

    def _on_resize(self) -> None:
        self.terminal.resize()
        self.changed()

    # -- the form --------------------------------------------------------------------------------------

    def _press_in_form(self, form: StartForm, key: str) -> None:
        """Start the chat, or leave. Enter does nothing while a server is tried."""
        if key in ("ctrl-c", "ctrl-d"):
            self.leave()
        elif key == "esc":
            self._submit(form, wait=False)
        elif not form.is_busy:
            self._submit(form, wait=True)

    def _submit(self, form: StartForm, wait: bool) -> None:
        """Start with what the form says. With `wait`, it stays until the server has answered."""
        try:
            name, server = check_username(form.name.text.strip()), None
            try:
                server = parse_address(form.server.text.strip()) if form.server.text.strip() else None
                check_reach(self.settings.host, [server] if server else [])
            except ValueError:
                if wait:  # else start without a server
                    raise
                server = None
            has_room = self._take_passphrase(form)
        except ValueError as error:
            form.message = f"{str(error).rstrip('.')}."
            return
        if not has_room:
            return
        form.is_busy = wait and server is not None
        form.message = f"Trying the server at {form.server.text.strip()} ..." if form.is_busy else ""
        settings = self.settings._replace(username=name, server=server)
        if self.node is not None and self.node.settings == settings and not form.is_busy:
            self.form = None
            return
        self._next = settings
        if self.node is None:
            self._launch()
        else:  # each try has a node of its own
            self.node.leave()

    def _take_passphrase(self, form: StartForm) -> bool:
        """Take over the passphrase; if there should be one and is none, make one up and return False."""
        if form.room and not form.passphrase.text:
            form.passphrase.set(make_passphrase())
            form.message = f"Made up: {form.passphrase.text}. Tell it to the others now; Enter takes it."
            return False
        if form.room:
            self.room = Room(form.room, normalise_passphrase(form.passphrase.text))
        return True

    def _launch(self) -> None:
        """Start a node with what was submitted last."""
        assert self.form is not None and self._next is not None
        settings, self._next = self._next, None
        try:
            self.start_node(settings)
        except OSError as error:
            self.form.message = f"{port_problem(settings.host, settings.port, error)}."
            self.node, self.form.is_busy = None, False
            return
        assert self.node is not None
        if self.form.room and self.room is not None and is_short(self.room.passphrase):
            self.node.emit({"event": "notice", "text": f"{IS_SHORT[0].upper()}{IS_SHORT[1:]}."})
        self.form.port = str(self.node.me.port)
        if not self.form.is_busy:
            self.form = None

    def _on_server_tried(self, form: StartForm, event: Event) -> None:
        if event["online"]:
            self.form = None
        else:
            form.is_busy = False
            form.message = (f"No server at {event['address']}: {event['reason']}. Enter tries again, "
                            "Esc goes on without it.")


# -- lines ----------------------------------------------------------------------------------------------


class LineReader:
    """Reads lines from standard input, be it a terminal, a pipe, a file or nothing. Never waits for it."""

    def __init__(self, loop: Loop, on_lines: Callable[[List[str]], None]) -> None:
        self._loop = loop
        self._on_lines = on_lines  # is called with all lines of one read, and at the end
        self._rest = b""  # the beginning of a line
        self._is_too_long = False  # the beginning of this line was handed over as a line, and the rest is dropped
        self._source: Any = 0
        self._read: Callable[[int], bytes] = read_input
        self.state = "paused"  # watching, polling (a file: it can't be watched), paused, ended
        self._poll = Timer()
        if sys.platform == "win32":
            self._start_thread()

    def resume(self) -> None:
        if self.state == "paused":
            try:
                self._loop.watch(self._source, self._on_readable)
                self.state = "watching"
            except (OSError, ValueError):
                self.state = "polling"
                self._poll = self._loop.call_later(0, self._on_readable)

    def pause(self) -> None:
        if self.state == "watching":
            self._loop.unwatch(self._source)
        self._poll.cancel()
        if self.state != "ended":
            self.state = "paused"

    def _on_readable(self) -> None:
        data = self._read(PIPE_SIZE)
        if self.state == "polling":
            self._poll = self._loop.call_later(0, self._on_readable)
        lines = self._cut(data)
        if not data:
            self.pause()
            self.state = "ended"
        if lines or not data:
            self._on_lines(lines)

    def _cut(self, data: bytes) -> List[str]:
        """Return the lines that these bytes complete; the end of input completes one. Of too long a line, which is
        refused, the rest is dropped: it must not be taken for a line of its own."""
        if self._is_too_long:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return []
            self._is_too_long = False
        end = data.rfind(b"\n") + 1
        if not end and data:
            if len(self._rest) + len(data) <= MAX_LINE:
                self._rest += data
                return []
            end, self._is_too_long = len(data), True
        text, self._rest = (self._rest + data[:end]).decode("utf-8", "replace"), data[end:]
        return [line.rstrip("\r") for line in text.split("\n") if line and not line.isspace()]

    def _start_thread(self) -> None:
        """Read in a thread on Windows, and only there: it can't wait for a console or pipe and sockets together."""
        import threading
        self._source, far_end = socket.socketpair()
        self._read = self._source.recv

        def copy() -> None:
            with far_end:
                for line in sys.stdin.buffer:
                    far_end.sendall(line)
        threading.Thread(target=copy, daemon=True).start()


class Prompt:
    """The line that is typed on a terminal without a screen: it makes room while other lines are printed.

    The terminal hands over each key and shows none. The row with the cursor is drawn here, by carriage returns, blanks
    and backspaces alone, which every terminal knows. suspend() puts the terminal back as it was."""

    def __init__(self, view: ChatView) -> None:
        import termios
        self._termios: Any = termios
        self._view = view  # holds the line
        self._before = termios.tcgetattr(0)
        self._shown = ""  # what stands on the row of the cursor

    def resume(self) -> None:
        """Have keys handed over one by one, and not shown."""
        mode = list(self._before)
        mode[3] &= ~(self._termios.ICANON | self._termios.ECHO)
        self._termios.tcsetattr(0, self._termios.TCSADRAIN, mode)

    def suspend(self) -> None:
        try:
            os.write(1, self.around("", is_over=True).encode("utf-8", "replace"))
            self._termios.tcsetattr(0, self._termios.TCSADRAIN, self._before)
        except (OSError, self._termios.error):
            pass  # the terminal is gone

    def around(self, lines: str, is_over: bool = False) -> str:
        """Return what prints some lines above the line that is typed."""
        cols = max(2, shutil.get_terminal_size().columns - 1)
        rows, (row, column) = flow(prompt(self._view, cols), *self._view.window.line.shown, cols)
        shown = "" if is_over else steady(rows[row]) + "\b" * (width(rows[row]) - column)
        if not lines and shown == self._shown:
            return ""
        blanks = " " * width(self._shown.rstrip("\b"))
        self._shown = shown
        return f"\r{blanks}\r{lines}{shown}" if blanks else lines + shown


class LineWriter:
    """Writes lines to standard output. Never waits for it: what is not taken at once is kept."""

    def __init__(self, loop: Loop, on_broken: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_broken = on_broken  # is told why; "" if the reader is gone
        self._lines: List[str] = []  # since the last flush
        self.prompt: Optional[Prompt] = None  # of a user who types on the same terminal
        self._output = bytearray()
        self.state = "idle"  # idle, waiting, broken
        self._on_empty: Optional[Callable[[], None]] = None
        self._descriptor: Any = _own_pipe()
        self._is_own = self._descriptor != 1
        self._most = PIPE_SIZE if self._is_own or stat.S_ISREG(os.fstat(1).st_mode) else SAFE_WRITE  # bytes of a write

    def write(self, line: str) -> None:
        """Write a line at the next flush."""
        self._lines.append(line)

    def flush(self, events: int = 0) -> None:
        """Write what is taken at once; the rest follows when there is room."""
        if self._lines or self.prompt is not None:
            text = "\n".join([*self._lines, ""]) if self._lines else ""
            self._output += (self.prompt.around(text) if self.prompt else text).encode("utf-8", "replace")
            self._lines.clear()
        if self.state == "broken":
            self._output.clear()
            return
        try:
            while self._output and self._may_write():
                del self._output[:os.write(self._descriptor, self._output[:self._most])]
        except BlockingIOError:
            pass  # the pipe is full
        except OSError as error:
            self._break("" if isinstance(error, BrokenPipeError) else error_text(error))
            return
        if len(self._output) > MAX_UNREAD:
            self._break("nobody reads it")
        else:
            self._await(bool(self._output))

    def when_empty(self, call: Callable[[], None]) -> None:
        """Call back once everything is written, or never can be."""
        self._on_empty = call
        if self.state in ("idle", "broken"):
            call()

    def _may_write(self) -> bool:
        """Whether a write of `_most` bytes returns at once. Windows can tell that of sockets only."""
        import select
        return self._is_own or sys.platform == "win32" or bool(select.select([], [self._descriptor], [], 0)[1])

    def _await(self, more: bool) -> None:
        """Be called when there is room, if there is more to write."""
        if more != (self.state == "waiting"):
            self._loop.set_interest(self._descriptor, selectors.EVENT_WRITE if more else 0, self.flush)
        self.state = "waiting" if more else "idle"
        if not more and self._on_empty is not None:
            self._on_empty()

    def _break(self, why: str) -> None:
        """Give up: nothing can be written any more."""
        self._await(False)
        self.state = "broken"
        self._output.clear()
        self._on_broken(why)


def _own_pipe() -> int:
    """If standard output is a pipe, open it once more, non-blocking, for ourselves. Return 1 if that can't be done.

    O_NONBLOCK belongs to the open file, not to the descriptor: set on standard output, it would hold for all programs
    that share it, such as a shell. Linux opens the same pipe here, but as a file that is ours alone. So a write takes
    as much as fits, up to all that a pipe holds, and returns. Asking first could not do that: a pipe counts pages, so
    nobody knows how many bytes fit, and another writer may come between."""
    try:
        if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(1).st_mode):
            return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        pass  # there is no /proc, or the pipe is another user's, or nobody reads it
    return 1


class PlainInterface(Interface):
    """Lines in, lines out: what is typed is what the screen's input line takes."""

    keys_size = 512  # they may be 256 texts to everyone
    shows_chat = True  # what is said is printed as lines

    def __init__(self, loop: Loop, settings: Settings, room: Optional[Room] = None) -> None:
        super().__init__(loop, settings._replace(username=settings.username or login_name()), room)
        self._by_hand = os.isatty(0)  # if so, what was typed is on the screen already
        self.reader = LineReader(loop, functools.partial(self.guard, self._on_lines))
        self._writer = LineWriter(loop, self._on_broken)
        show = self._writer.write if self.shows_chat else None
        self.transcript = Transcript(show_time, show, not self._by_hand, show_date)
        self.shows_past = self.shows_chat and self._by_hand and os.isatty(1)
        self._input: Deque[str] = collections.deque()  # lines that came and wait
        self._goes_on = False  # more of them will be entered at the end of this turn
        self._own_lines = Timer()  # of writing them
        self._keys = KeyReader()

    def status(self) -> int:
        """1 if something was not delivered, not written, or, in a script, not understood."""
        assert self.node is not None
        is_broken = self._writer.state == "broken"
        return int(bool(self.node.undelivered or is_broken or self.view.refused and not self._by_hand))

    def chat(self) -> None:
        self.start_node(self.settings)
        self.listen_for_signals()
        if self._by_hand and os.isatty(1) and sys.platform != "win32":
            self._writer.prompt = Prompt(self.view)
            self.view.has_keyboard = True
            self.run_on(self._writer.prompt)
            return
        if self._by_hand:
            self.reader.resume()
        self.loop.run()

    def on_events(self, node: PeerNode, events: List[Event]) -> None:
        self.view.handle(events)
        self.show(events)
        kinds = {event["event"] for event in events}
        if "settled" in kinds and self._writer.prompt is None:  # before, what is piped in would go to nobody
            self.reader.resume()
        if self._input and not self._goes_on:
            self._enter_lines()
        if kinds != {"sent"}:
            self._writer.flush()
        elif not self._own_lines.active:  # what the user said can wait for what others say: that saves a call
            self._own_lines = self.loop.call_later(ACK_DELAY, self._writer.flush)
        if "stopped" in kinds:
            self.loop.call_later(self.settings.timeout, self.loop.stop)
            self._writer.when_empty(self.loop.stop)

    def changed(self, by_user: bool = False) -> None:
        if self._input or self.reader.state == "ended":  # they waited for a search
            self._enter_lines()
        self._writer.flush()

    @property
    def _must_wait(self) -> bool:
        """Whether input has to wait: too much is under way, or an answer is."""
        return self.view.outgoing.is_full or self.view.past.is_searching

    def on_keys(self, data: bytes) -> None:
        for kind, value in self._keys.feed(data):
            if value in ("enter", "ctrl-j") and kind == PRESS:  # here a line is a message, however it ends
                value = "enter"
                if not self.view.window.line.is_secret:
                    self._writer.write(prompt(self.view, sys.maxsize) + self.view.window.line.text)
            keyboard = self.view.keyboard
            {PRESS: keyboard.press, TEXT: keyboard.type, PASTE: keyboard.paste}[kind](value)
        self._writer.flush()

    def show(self, events: List[Event]) -> None:
        """Print events that the transcript does not print; here it prints them all."""

    def _on_lines(self, lines: List[str]) -> None:
        self._input += lines
        self._enter_lines()

    def _enter_lines(self) -> None:
        """Do what the input says, as far as this turn has time and not too much is under way.

        A command is the first in its turn: its answer stands behind the texts that came before, and counts them."""
        until, room = self.loop.now() + INPUT_TIME, INPUT_ROOM
        while self._input and room > 0 and not self._must_wait and self.loop.now() < until:
            if room < INPUT_ROOM and self.may_be_command(self._input[0]):
                break
            lines, size = self._next_portion()
            room -= size
            if len(lines) > 1:
                self.view.commands.enter_texts(lines)
            else:
                self.enter(lines[0])
        if self._input:
            self.reader.pause()
            if not self._must_wait and not self._goes_on:  # if it must, what it waits for goes on with it
                self._goes_on = True
                self.loop.at_turn_end(functools.partial(self.guard, self._go_on))
        elif self.reader.state != "ended":
            self.reader.resume()
        elif not self.view.past.is_searching:
            self.leave()
        self._writer.flush()

    def _go_on(self) -> None:
        """Enter more lines, now that the events of those before were handed over."""
        self._goes_on = False
        self._enter_lines()

    def may_be_command(self, line: str) -> bool:
        """Whether a line of input asks for more than to send a text."""
        return not is_surely_text(line) and clean(line).lstrip().startswith("/")

    def _next_portion(self) -> Tuple[List[str], int]:
        """Take the next line; if it surely is a text, so are more that follow, and they are sent together.

        Return them and their size on the wire."""
        lines = [self._input.popleft()]
        size = wire_size(lines[0])
        most = min(INPUT_LINES, MAX_DELIVERIES // max(1, len(self.view.node.present())))
        if is_surely_text(lines[0]):
            while self._input and size < INPUT_PORTION and len(lines) < most and is_surely_text(self._input[0]):
                lines.append(self._input.popleft())
                size += wire_size(lines[-1])
        return lines, size

    def enter(self, line: str) -> None:
        self.view.enter(line)

    def _on_broken(self, why: str) -> None:
        """Leave: nobody would read what is said."""
        if why:
            log.error("[P2P] the output can't be written: %s", why)
            complain(f"the output can't be written: {why}")
        self.leave()


_ID_GIVEN = (lambda value: is_count(value) or type(value) is str and len(value) <= MAX_ID,
             f"an integer, or a text of at most {MAX_ID} characters")
_SAYING: Fields = {"text": (_is_text(MAX_LINE), "a text"),
                   "to?": (_is_text(MAX_ID, len), "a name, a #channel, or * for everyone"), "id?": _ID_GIVEN}
_COMMANDING: Fields = {"command": (lambda value: type(value) is str and re.match(r"\s*/(?!/)", value) is not None,
                                   "a text that begins with one slash"), "id?": _ID_GIVEN}


def check_request(request: Dict[str, Any]) -> None:
    """Check an object that a program gives us as input. Raises BadMessage."""
    fields = _COMMANDING if "command" in request else _SAYING
    _check_fields("the input", request, fields)
    allowed = [name.rstrip("?") for name in fields]
    if not set(request) <= set(allowed):
        raise BadMessage(f"the input must have no other keys than {', '.join(allowed)}")


class JsonInterface(PlainInterface):
    """Input as lines or JSON objects. Every event is a JSON object on a line of its own, and so is every answer."""

    shows_chat = False  # for the events are printed

    def start_node(self, settings: Settings) -> None:
        super().start_node(settings)
        self.view.on_answer = self._on_answer
        self._about: Dict[str, Any] = {}  # what answers repeat of the object that is being done
        self._is_answered = False  # something was said of that object
        self._sent_about: Dict[str, Dict[str, Any]] = {}  # the same by id of a message, until its event "sent"

    def enter(self, line: str) -> None:
        """Do what a line says: the line of a user, or an object, whose text is data and never a command."""
        text = line.strip(_BLANKS + "\ufeff")
        if not text.startswith("{"):
            super().enter(line)
            return
        try:
            request, end = _decode(text, 0)
            if _ID_GIVEN[0](request.get("id")):
                self._about = {"re": request["id"]}
            if end != len(text):
                raise BadMessage("more than one JSON value on a line")
            check_request(request)
            self._do(request)
        except BadMessage as error:
            self.view.refuse(f"Not done: {error}.")
        except ChatError as error:
            self.view.refuse(str(error))
        if not self.view.past.is_searching:
            self._about = {}

    def changed(self, by_user: bool = False) -> None:
        self._about = {}  # a search has ended: it is answered
        super().changed(by_user)

    def may_be_command(self, line: str) -> bool:
        return '"command"' in line or super().may_be_command(line)

    def _do(self, request: Dict[str, Any]) -> None:
        """Do what an object says, and remember which message came of it."""
        commands = self.view.commands
        commands.sent_id, self._is_answered = "", False
        if "command" in request:
            commands.enter(request["command"])
        else:
            commands.say(request["text"], request.get("to", ""))
        if commands.sent_id and self._about:
            self._sent_about[commands.sent_id] = self._about
        elif self._about and not self._is_answered and not self.view.past.is_searching:
            self._on_answer("Done.", "answer")

    def _on_answer(self, text: str, kind: str) -> None:
        """Print the answer to a command; "error" tells bots that it, or a text, could not be done."""
        self._is_answered = True
        self.show([{"event": "notice", "text": text, **({"error": True} if kind == "error" else {}), **self._about}])

    def show(self, events: List[Event]) -> None:
        """Print events, but not the messages of ignored peers."""
        ignored = self.view.people.ignored
        if self._sent_about:
            events = [{**each, **self._sent_about.pop(each["id"], {})} if each["event"] == "sent" else each
                      for each in events]
        if ignored:
            events = [each for each in events if each["event"] != "chat" or each["from"]["id"] not in ignored]
        if events:
            self._writer.write(encode_events(events, round(self.loop.wall(), 3)))


_EVENT_ENCODER = json.JSONEncoder()


def encode_events(events: List[Event], now: float) -> str:
    """Encode events as JSON, each on a line, with the time behind the first key, which is "event".

    They are encoded as one list, which is faster; then times and line breaks are put in. Both are found by quotes
    that are not escaped, and such quotes are in no text."""
    text = _EVENT_ENCODER.encode(events)[1:-1]
    for kind in {event["event"] for event in events}:
        start = f'{{"event": "{kind}"'
        text = text.replace(start, f'{start}, "time": {now}')
    return text.replace('}, {"event": ', '}\n{"event": ')


def login_name() -> str:
    """Return the login name, as far as it can be used."""
    import getpass
    try:
        return check_username(clean(getpass.getuser())[:MAX_NAME].strip())
    except Exception:  # a user without a name, or with one of no use; what is raised differs
        return "anonymous"


def has_screen() -> bool:
    """Whether there is a terminal on which curses can move the cursor."""
    if not (os.isatty(0) and os.isatty(1)):
        return False
    try:
        import curses
        curses.setupterm()
        return bool(curses.tigetstr("cup"))
    except Exception:  # no curses, or no such terminal
        return False


# ======================================================================================================
# Command line
#
# Wrong values are answered with one line that says what would be right, and exit status 2, before the
# screen is touched or a socket opened.
# ======================================================================================================


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {clean(message)} (see {self.prog} --help)\n")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; return its exit status: 0 all well, 1 it failed, 2 it was called wrongly."""
    secret = os.environ.pop("P2PCHAT_PASSPHRASE", None)  # so no child inherits it
    _open_standard_files()
    parser = make_parser()
    options = parser.parse_args(with_command(parser, list(sys.argv[1:] if argv is None else argv)))
    problem = start_logging(options)
    if problem:
        return complain(problem, 2)
    if raise_descriptor_limit() < MIN_DESCRIPTORS:
        needed = MIN_DESCRIPTORS
        return complain(f"too few files may be open at once; {needed} are needed: ulimit -n {needed}")
    try:
        return int(options.run(options, secret))
    except KeyboardInterrupt:
        return 130
    except RoomError as error:
        return complain(error)


def with_command(parser: Parser, arguments: List[str]) -> List[str]:
    """Return the arguments, which begin with a command; if there are none, and there is a terminal, "peer".

    Without a command the program ends, and says which line the user probably meant."""
    if not arguments and os.isatty(0) and os.isatty(1):
        return ["peer"]
    first = arguments[0] if arguments else ""
    if first not in ("peer", "server", "history", "-h", "--help", "--version"):
        import shlex
        is_peers = first[:1] not in ("", "-") or any(each.startswith("--user") for each in arguments)
        meant = arguments[1:] if first.lower() == "peer" else arguments
        rest = " ".join(map(shlex.quote, meant)) if is_peers else "--user Alice"
        parser.error(f"say peer (the chat) or server first, for example: python3 p2pchat.py peer {rest}")
    return arguments


def _open_standard_files() -> None:
    """Where one of them is closed, the next file opened would take its place, and get what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 1 else os.O_RDWR)  # that nothing can be printed is noticed


def _option(convert: Callable[[str], Any], right: str = "", valid: Callable[[Any], bool] = lambda value: True
            ) -> Callable[[str], Any]:
    """A converter of an option's value; where it can't, it says what would be right, `right` or the error itself."""
    def converted(text: str) -> Any:
        try:
            value = convert(text)
            if not valid(value):
                raise ValueError
            return value
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {right}" if right else str(error)) from None
    return converted


def parse_date(text: str) -> float:
    """Return the Unix time of a date, perhaps with a time of day, on this machine's clock. Raises ValueError."""
    form = "%Y-%m-%d %H:%M" if ":" in text else "%Y-%m-%d"
    try:
        return time.mktime(time.strptime(text.replace("T", " ").strip(), form))
    except OverflowError as error:
        raise ValueError from error


_port = _option(int, "a port: 0 to 65535", lambda port: 0 <= port <= 65535)
_seconds = _option(float, "a number of seconds from 0.1 to 86400", lambda value: 0.1 <= value <= 86400)
_catch_up = _option(int, f"a number of messages: 0 to {CATCH_UP}", lambda value: 0 <= value <= CATCH_UP)
_bytes = _option(int, "a number of bytes: 0 or more", lambda value: value >= 0)
_date = _option(parse_date, "a date, such as 2026-11-28 or '2026-11-28 10:00'")
_username, _address, _room = _option(check_username), _option(parse_address), _option(check_room)
_channel = _option(lambda text: check_channel(text if is_channel(text) else f"#{text}"))  # shells take # for a comment


def _parse_local_ip(text: str) -> str:
    """Return the address to listen on. No name: a lookup could delay the start, and one machine has many names."""
    return text if text == "0.0.0.0" else parse_address(f"{text}:1")[0]


_local_ip = _option(_parse_local_ip, "an IPv4 address of this machine, such as 127.0.0.1", lambda ip: not is_name(ip))

Row = Tuple[str, Callable[[str], Any], str, str]  # of an option that has a value: name, converter, value, help
_HOST: Row = ("host", _local_ip, "IP", "address to listen on (0.0.0.0: all; 127.0.0.1: this machine only)")
SERVER_OPTIONS: Tuple[Row, ...] = (
    _HOST,
    ("port", _port, "N", f"TCP port to listen on ({DEFAULT_PORT})"),
    ("heartbeat-timeout", _seconds, "S", "drop a peer that is silent for so long (30 s)"),
    ("check-interval", _seconds, "S", "look for silent peers so often (10 s)"),
)
PEER_OPTIONS: Tuple[Row, ...] = (
    ("user", _username, "NAME", "your name (without it, a form asks; --plain and --json take the login name)"),
    ("server", _address, "HOST[:PORT]", "discovery server (127.0.0.1:9999, and any on the local network)"),
    ("join", _address, "HOST:PORT", "a peer or server to connect to; may be given several times"),
    ("channel", _channel, "'#NAME'", "a channel to join; may be given several times"),
    _HOST,
    ("port", _port, "N", "TCP port to listen on (0: chosen by the system)"),
    ("heartbeat-interval", _seconds, "S", "between heartbeats to the server (10 s)"),
    ("gossip-interval", _seconds, "S", "between two comparisons of the list with a random peer (5 s)"),
    ("timeout", _seconds, "S", "for a connection to a peer to answer, and for leaving (5 s)"),
    ("catch-up", _catch_up, "N", f"earlier messages that you want to be told at the start ({CATCH_UP}; 0: none)"),
    ("budget", _bytes, "BYTES", "of chat accepted from one sender a minute (1048576; 0: no limit)"),
)


PEER_EXAMPLES = """examples:
  python3 p2pchat.py peer Alice                             chat with whoever is on this network
  python3 p2pchat.py peer Alice --server 192.168.1.5        be introduced by a server elsewhere
  python3 p2pchat.py peer Alice --join 192.168.1.10:40123   name a peer by hand; /who there says its address
  python3 p2pchat.py peer Alice --host 127.0.0.1            try it: nothing leaves this machine
"""
SERVER_EXAMPLES = """examples:
  python3 p2pchat.py server                                 all that a server needs
  python3 p2pchat.py server --host 127.0.0.1                try it: nothing leaves this machine
"""


def make_parser() -> Parser:
    """The command line: two subcommands and their options, whose defaults are those of the settings."""
    parser = Parser(prog="p2pchat.py", description="Chat for a room full of machines on one network. Alone, on a "
                    "terminal, it starts the chat, and a form asks for your name.")
    parser.add_argument("--version", action="version", version=f"p2pchat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="server|peer|history")
    server = commands.add_parser(
        "server", help="introduce peers to one another", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The discovery server. It introduces peers to one another; no chat passes through it.",
        epilog=SERVER_EXAMPLES)
    _add_options(server, SERVER_OPTIONS, ServerSettings(), run_server)
    server.add_argument("-v", "--verbose", action="store_true", help="log more")
    server.add_argument("-q", "--quiet", action="store_true", help="log only what is wrong")
    peer = commands.add_parser(
        "peer", help="chat", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=PEER_EXAMPLES,
        description="The chat. Peers on one local network find each other; no server is needed.")
    peer.add_argument("name", nargs="?", type=_username, metavar="NAME", help="the same as --user NAME")
    _add_options(peer, PEER_OPTIONS, Settings(), run_peer)
    kind = peer.add_mutually_exclusive_group()
    kind.add_argument("--plain", dest="kind", action="store_const", const=PlainInterface, help="lines in, lines out")
    kind.add_argument("--json", dest="kind", action="store_const", const=JsonInterface,
                      help="lines in, JSON out: for programs")
    peer.add_argument("--history", metavar="FILE", help="keep what is said there, for the next start")
    peer.set_defaults(verbose=False, quiet=False)
    _add_history_command(commands.add_parser("history", help="print what --history has kept"))
    return parser


def _add_history_command(history: argparse.ArgumentParser) -> None:
    history.description = "Print what peer --history FILE has kept."
    history.add_argument("file", metavar="FILE", help="the file; a chat may have it open")
    history.add_argument("--conversation", metavar="NAME", help="only this one: a user, #channel or everyone")
    history.add_argument("--since", type=_date, metavar="DATE", default=0.0,
                         help="only what is not older, for example 2026-11-28 or '2026-11-28 10:00'")
    history.add_argument("--json", action="store_true", help="a JSON object for each message")
    history.set_defaults(run=run_history, log_file=None)


def _add_options(parser: argparse.ArgumentParser, rows: Sequence[Row], defaults: Any,
                 run: Callable[[argparse.Namespace, Optional[str]], int]) -> None:
    parser.set_defaults(run=run)
    for name, convert, metavar, text in rows:
        field = {"user": "username", "channel": "channels"}.get(name, name.replace("-", "_"))
        default = getattr(defaults, field)
        is_repeated = type(default) is tuple
        parser.add_argument(f"--{name}", dest=field, type=convert, metavar=metavar, help=text,
                            default=list(default) if is_repeated else default,
                            action="append" if is_repeated else "store")
    parser.add_argument("--no-lan", dest="lan", action="store_false",
                        help=f"send and answer no beacons on the local network (UDP port {DEFAULT_PORT})")
    parser.add_argument("--room", type=_room, metavar="NAME",
                        help="a closed room: encrypted, and only for those who know its passphrase, which is asked for")
    parser.add_argument("--passphrase-file", metavar="FILE", help="read the passphrase from there")
    parser.add_argument("--log-file", metavar="FILE", help="write a log there")


def start_logging(options: argparse.Namespace) -> str:
    """Log to the file that was asked for, the server to stderr as well; return what is wrong, if anything."""
    logging.raiseExceptions = False  # stderr may be closed: nothing of that is to be shown
    handlers: List[logging.Handler] = []
    if options.command == "server":
        handlers.append(logging.StreamHandler())
    if options.log_file is not None:
        try:
            handlers.append(LogFile(options.log_file, encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"--log-file {clean(options.log_file)}: {error_text(error)}; name a file that can be written"
    log.propagate = False
    if handlers:
        log.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else DETAIL)
    for handler in handlers:
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)-7s %(message)s"))
        log.addHandler(handler)
    return ""


class LogFile(logging.FileHandler):
    """A log file. When it can't be written (a full disk), the user is told once."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            error = sys.exc_info()[1]
            why = error_text(error) if isinstance(error, OSError) else str(error)
            log.critical("The log file can't be written: %s", why)


class LineFormatter(logging.Formatter):
    """One line an event, whatever is in it; only a traceback of our own has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return clean(super().formatMessage(record))


def find_room(options: argparse.Namespace, secret: Optional[str], has_form: bool = False) -> Optional[Room]:
    """Return the closed room that was asked for; `secret` is the passphrase from the environment.

    With `has_form` a passphrase that nothing names is left empty, for the form asks for it. Standard input is never
    read for it, unless it is a terminal. Raises RoomError, and ValueError with a sentence that shows no passphrase."""
    if options.room is None:
        if options.passphrase_file:
            raise ValueError("--passphrase-file is for a closed room: name that with --room")
        return None
    check_ssl()
    if options.passphrase_file:
        text = read_passphrase(options.passphrase_file)
    elif secret is not None:
        text = secret
    elif not os.isatty(0):
        raise ValueError("there is no terminal to ask for the passphrase on: use --passphrase-file FILE, or set "
                         "P2PCHAT_PASSPHRASE")
    elif has_form:
        return Room(options.room, b"")
    else:
        text = ask_passphrase(options.room)
    passphrase = normalise_passphrase(text)
    if not passphrase:
        raise ValueError("the passphrase is empty")
    if is_short(passphrase):
        complain(f"{IS_SHORT}.")
    return Room(options.room, passphrase)


def read_passphrase(path: str) -> str:
    """Read a passphrase from a file. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(MAX_PASSPHRASE + 1)
        if os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077:
            complain(f"others may read {clean(path)}, which holds the passphrase: chmod 600 it")
        text = data.decode("utf-8-sig")  # editors on Windows begin a file with a mark that nobody has typed
    except OSError as error:
        raise ValueError(f"--passphrase-file {clean(path)}: {error_text(error)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--passphrase-file {clean(path)}: it is not UTF-8") from None
    if len(data) > MAX_PASSPHRASE:
        raise ValueError(f"--passphrase-file {clean(path)}: it has more than {MAX_PASSPHRASE} bytes")
    return text


def ask_passphrase(room: str) -> str:
    """Ask for a passphrase on the terminal, which does not show it. Raises ValueError."""
    import getpass
    try:
        text = getpass.getpass(f"Passphrase of {room} (not shown; Enter alone makes one up): ")
        if not text:
            text = make_passphrase()
            sys.stderr.write(f"Made up: {text}\nTell it to the others now; it is not shown again.\n")
            text = getpass.getpass("Enter takes it; or type another one: ") or text
    except (EOFError, OSError):
        raise ValueError("no passphrase was typed") from None
    return text


def run_server(options: argparse.Namespace, secret: Optional[str]) -> int:
    """The server, until a signal ends it."""
    try:
        room = find_room(options, secret)
    except ValueError as error:
        return complain(error, 2)
    loop = Loop()
    server = DiscoveryServer(loop, ServerSettings(**_chosen(options, ServerSettings._fields)), room)

    def stop() -> None:
        server.stop()
        loop.call_later(0.5, loop.stop)  # time for the last words

    try:
        server.start()
    except OSError as error:
        return complain(port_problem(options.host, options.port, error))
    sys.stderr.write("\n".join([*server.how_to_join(), ""]))
    for number in _ENDING:
        loop.on_signal(number, stop)
    loop.run()
    loop.close()
    return 0


def run_peer(options: argparse.Namespace, secret: Optional[str]) -> int:
    """The chat, in one of the three ways."""
    if options.name and options.username not in (None, options.name):
        return complain(f"you gave two names, {options.name} and {options.username}: leave out one", 2)
    settings = Settings(**_chosen(options, Settings._fields))
    settings = settings._replace(join=tuple(options.join), username=options.username or options.name,
                                 channels=tuple(dict.fromkeys(options.channels)))
    if len(settings.channels) > MAX_CHANNELS:
        return complain(f"--channel may be given {MAX_CHANNELS} times: nobody can be in more channels", 2)
    kind: Type[Interface] = options.kind or (CursesInterface if has_screen() else PlainInterface)
    try:
        check_reach(settings.host, [*settings.join, *([settings.server] if settings.server else [])])
        room = find_room(options, secret, has_form=kind is CursesInterface and settings.username is None)
    except ValueError as error:
        return complain(error, 2)
    return kind(Loop(), settings, room).run()


def run_history(options: argparse.Namespace, secret: Optional[str]) -> int:
    """Print a history, in portions, so that a chat can go on writing it. Who reads it may end that at any time."""
    try:
        os.close(open_history_file(options.file, create=False)[0])
        reader = HistoryReader(options.file)
        reader.connect(timeout=5)
        print_history(reader, options)
        sys.stdout.flush()
    except ImportError:
        return complain("this Python has no sqlite3")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more is said of it at the exit either
    except (OSError, ValueError) as error:
        why = error_text(error) if isinstance(error, OSError) else error
        return complain(f"{clean(options.file)}: {why}")
    except Exception as error:  # of SQLite, which may be missing
        if type(error).__module__ != "sqlite3":
            raise
        return complain(f"{clean(options.file)} can't be read: {error}")
    return 0


def print_history(reader: HistoryReader, options: argparse.Namespace) -> None:
    """Print the messages that were asked for. Raises ValueError if there is no such conversation."""
    wanted = options.conversation
    if wanted is not None:
        names = sorted(str(name) for (name,) in reader.rows("SELECT DISTINCT conversation FROM messages"))
        asked = EVERYONE if wanted.casefold() == "everyone" else unicodedata.normalize("NFC", wanted)
        found = sorted((name for name in names if name.casefold() == asked.casefold()), key=lambda name: name != asked)
        if not found:
            there = ", ".join("everyone" if name == EVERYONE else clean(name) for name in names) or "nothing"
            raise ValueError(f"no conversation {clean(wanted)} is there, but {there}")
        wanted = found[0]
    page = reader.since(0, wanted, 1000)
    while page:
        lines = [history_line(message, options.json) for message in page if message.time >= options.since]
        sys.stdout.buffer.write("".join(lines).encode("utf-8", "replace"))
        page = reader.since(page[-1].row + 1, wanted, 1000)


def history_line(message: Said, as_json: bool) -> str:
    """Return a message as a line, with its end: JSON, or for people, where every line of the text is indented."""
    if as_json:
        return json.dumps({"time": message.time, "conversation": message.conversation, "from": message.sender,
                           "own": message.own, "text": message.text, "id": message.id,
                           **({"told_by": message.told_by} if message.told_by else {})}) + "\n"
    start, text = past_texts(message, "you")
    return f"{show_date(message.time)} {show_time(message.time)} {start}" + text.replace("\n", "\n      ") + "\n"


def _chosen(options: argparse.Namespace, names: Iterable[str]) -> Dict[str, Any]:
    return {name: getattr(options, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
